"""The command line: ``bitlab``."""

from bitlab_hf.cli.app import main

__all__ = ["main"]
