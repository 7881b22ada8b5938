"""The command line: argparse -> one public call -> print."""

from .line import main

__all__ = ["main"]
