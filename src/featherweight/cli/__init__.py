"""The command line: thin, one function a command."""

from featherweight.cli.app import app, main

__all__ = ["app", "main"]
