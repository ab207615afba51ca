"""The report: what a compression job did, as one HTML page."""

from featherweight.report.compare import compared
from featherweight.report.page import render

__all__ = ["compared", "render"]
