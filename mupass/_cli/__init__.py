"""The command line. Words are read here, without PyTorch; `mupass._cli.commands` does the work."""

from mupass._cli.words import main

__all__ = ["main"]
