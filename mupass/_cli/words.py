"""The words of the command line: what may be said, and what to say where something else is."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mupass import __version__
from mupass._errors import MupassError, suggestion
from mupass._scales.optimizers import OPTIMIZERS
from mupass._scales.parameterizations import PARAMETERIZATIONS

TARGET = "module:factory, timm:NAME or hf:CONFIG_CLASS[,key=value...]"
TRAINED = tuple(known.name for known in OPTIMIZERS.values() if known.recipe)  # those that studies can make
PAGES = (".html", ".htm", ".png", ".txt", ".md", ".json")


class WordError(MupassError):
    """A word of the command line is none that it knows."""


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, and suggests what may be meant."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Args:
            message: What argparse has to say.

        Raises:
            WordError: Always.
        """
        # argparse tells of unknown options at the end only, and without a suggestion.
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            unknown_word = message.removeprefix(unknown).split()[0]
            advice = suggestion(unknown_word.partition("=")[0], self._option_string_actions)
            message = f"unknown option {unknown_word}{advice}"
        # The wording of argparse for an unknown command.
        choice = re.search(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            choices = re.findall(r"\w+", choice[2])
            message = f"unknown command {choice[1]!r}{suggestion(choice[1], choices)}"
        raise WordError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options where they are met, so that the suggestion is of this command.

        Args:
            args: As in argparse.
            namespace: As in argparse.
        """
        parsed, unread = super().parse_known_args(args, namespace)
        if unread:
            self.error(f"unrecognized arguments: {' '.join(unread)}")
        return parsed, unread


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """Return a reader of one of several words.

    Args:
        known: The words.
    """

    def read(word: str) -> str:
        if word in known:
            return word
        advice = suggestion(word, known) or f"; known: {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"unknown {word!r}{advice}")

    return read


def number(whole: bool = False) -> Callable[[str], Any]:
    """Return a reader of a finite positive number.

    Args:
        whole: Whether it must be whole.
    """
    wanted = "a whole number, at least 1" if whole else "a positive number"

    def read(word: str) -> float:
        try:
            value: float = int(word) if whole else float(word)
        except ValueError:
            # NaN is neither positive nor infinite, and so is refused below.
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}")
        return value

    return read


def file(endings: Sequence[str] = ()) -> Callable[[str], str]:
    """Return a reader of a file to be written, which refuses before any work is done.

    Args:
        endings: What its name may end with; anything if left out.
    """

    def read(word: str) -> str:
        path = Path(word)
        if endings and path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"{word!r} must end with {', '.join(endings)}")
        # Before hours of work: the folder must be there and writable.
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(
                f"{word!r} cannot be written: no such folder, or a folder itself"
            )
        return word

    return read


def dim(word: str) -> tuple[str, str]:
    """Read ``PATTERN=VERDICT``.

    Args:
        word: What was written.
    """
    # A regular expression may hold "=", so the last one counts.
    pattern, equals, verdict = word.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{word!r} is not PATTERN=VERDICT")
    if verdict not in ("finite", "infinite"):
        raise argparse.ArgumentTypeError(f"the verdict of {word!r} must be 'finite' or 'infinite'")
    return pattern, verdict


def sizes(word: str) -> tuple[tuple[int, ...], str]:
    """Read ``2x3x32x32`` or ``2x16:long``.

    Args:
        word: What was written.
    """
    shape, colon, dtype = word.partition(":")
    parts = shape.split("x")
    if not all(part.isdigit() for part in parts) or (colon and not dtype):
        raise argparse.ArgumentTypeError(f"{word!r} is not sizes such as 2x3x32x32 or 2x16:long")
    return tuple(int(part) for part in parts), dtype or "float32"


def width(word: str) -> tuple[str, int]:
    """Read ``128`` or ``d_model=128``.

    Args:
        word: What was written.
    """
    # A number alone has no name: it is the model's width.
    name, _, size = word.rpartition("=")
    if not size.isdigit() or int(size) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number, nor NAME=N")
    return name, int(size)


POSITIVE, COUNT = number(), number(whole=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = Parser(prog="mupass", description="Width-aware model rewriting for PyTorch.")
    top.add_argument("--version", action="version", version=f"mupass {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _analyze(
        commands.add_parser("analyze", help="print which dimensions of a model grow with width, and why")
    )
    check = commands.add_parser("check", help="train narrow copies for a few steps; fails when updates scale")
    _study(check)
    _checked(check)
    sweep = commands.add_parser("sweep", help="find the best hyperparameters at several widths")
    _study(sweep)
    _tuned(sweep)
    transfer = commands.add_parser(
        "transfer", help="tune a narrow copy; print what the full model takes over"
    )
    _study(transfer, widths=False)
    _tuned(transfer)
    add = transfer.add_argument
    add("--proxy", type=COUNT, metavar="N", help="width of the copy that is tuned")
    add("--width", type=COUNT, metavar="N", help="of the full model (default: its own)")
    add("--driver", type=one_of(("grid", "optuna", "gradient")), default="grid")
    add("--trials", type=COUNT, default=32, help="of optuna and gradient")
    add("--state", type=file(), metavar="FILE", help="save the full model's state_dict, folded")
    report = commands.add_parser(
        "report", help="write one page: the plan, a check and, with --data and --lr, a sweep"
    )
    _study(report, out=False)
    _checked(report, rates=False)
    _tuned(report, required=False)
    report.add_argument("--out", type=file((".html", ".htm")), required=True, metavar="FILE", help="the page")
    _resize(commands.add_parser("resize", help="build a narrower or wider copy and print its sizes"))
    return top


def _target(command: argparse.ArgumentParser, device: str, inputs: bool = True) -> None:
    add = command.add_argument
    add("target", help=TARGET)
    add("--device", default=device, help=f"where to build the model (default: {device})")
    if inputs:
        add("--input", action="append", type=sizes, metavar="SIZES", help="example input, such as 2x3x32x32")


def _analyze(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _target(command, "meta")
    add("--base", type=POSITIVE, help="reference width (default: 256, or the model's own if that is less)")
    add("--base-target", metavar="TARGET", help="a second instance, which settles every verdict")
    add(
        "--base-shapes", metavar="FILE", help="base shapes that microsoft/mup wrote (.bsh), which do the same"
    )
    add(
        "--dim",
        action="append",
        default=[],
        metavar="PATTERN=VERDICT",
        type=dim,
        help="settle a dimension: a name or a regular expression for parameter:axis, finite or infinite",
    )
    add(
        "--optimizer",
        type=one_of(tuple(OPTIMIZERS)),
        default="adamw",
        help="whose learning-rate factors to print",
    )
    add("--parameterization", type=one_of(tuple(PARAMETERIZATIONS)), default="mup")
    add("--lenient", action="store_true", help="leave unknown operators ambiguous")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--html", type=file(), metavar="FILE", help="write an HTML page instead")
    form.add_argument("--json", action="store_true", help="print JSON instead")


def _study(command: argparse.ArgumentParser, widths: bool = True, out: bool = True) -> None:
    add = command.add_argument
    _target(command, "cpu", inputs=False)
    add("--loss", metavar="MODULE:FUNCTION", help="of output and targets")
    add("--optimizer", type=one_of(TRAINED), default="adam")
    if widths:
        add("--widths", type=COUNT, nargs="+", help="default: three from 64")
    add("--parameterization", type=one_of(tuple(PARAMETERIZATIONS)), default="mup")
    add("--seed", type=int, default=0, help="of the model's initial weights (default: 0)")
    if out:
        endings = "report.html, .png, .txt"
        add("--out", action="append", default=[], type=file(PAGES), metavar="FILE", help=endings)


def _checked(command: argparse.ArgumentParser, rates: bool = True) -> None:
    add = command.add_argument
    add("--batch", type=COUNT, default=16, help="samples of random numbers (default: 16)")
    add("--tolerance", type=POSITIVE, default=0.25, help="largest power that counts as flat")
    if rates:
        add("--data", help="module:function that returns batches (default: random numbers)")
        add("--lr", type=POSITIVE)
        add("--steps", type=COUNT, default=3)
        add("--seeds", type=COUNT, default=3)


def _tuned(command: argparse.ArgumentParser, required: bool = True) -> None:
    add = command.add_argument
    add("--data", required=required, help="module:function that returns batches (inputs, targets)")
    add("--lr", type=POSITIVE, nargs="+", required=required)
    add("--damping", type=POSITIVE, nargs="+", help="for kfac and shampoo")
    add("--steps", type=COUNT, default=100)
    add("--seeds", type=COUNT, default=1)
    add("--store", type=file(), metavar="FILE", help="keeps results; a killed sweep goes on")
    add("--jobs", type=COUNT, default=1, help="number of processes")


def _resize(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _target(command, "cpu")
    add(
        "--width",
        action="append",
        type=width,
        default=[],
        metavar="N | NAME=N",
        help="new width, or the new size of a dimension by its name (may be given more than once)",
    )
    add("--scale", type=POSITIVE, help="factor on every growing dimension instead")
    add("--seed", type=int, help="seed of the new parameters")
    add("--output", type=file(), metavar="FILE", help="save the state_dict of the copy")
