"""The command line. Words are read without PyTorch; `mupass._cli.commands`, loaded after, does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mupass._cli.words import parser
from mupass._errors import MupassError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of the process when left out.

    Returns:
        Exit code: 0; 1 when a check fails or an optimum has no bracket; 2 for input that was refused.
    """
    try:
        options = parser().parse_args(arguments)
        # PyTorch is imported here, so that a misspelt command is told at once.
        from mupass._cli import commands

        return int(getattr(commands, options.command)(options))
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except MupassError as error:
        print(f"mupass: {error}", file=sys.stderr)
    except OSError as error:
        print(f"mupass: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    return 2
