"""The command line: argparse -> one public call -> print."""

from .commands import main

__all__ = ["main"]
