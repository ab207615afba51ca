"""The report: what a compression job did, as one HTML page."""

from featherweight.report.page import render

__all__ = ["render"]
