"""The command line: ``mupass resize TARGET --width N``."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from mupass._errors import MupassError
from mupass._resize.resize import resize


def add_resize(commands: Any) -> None:
    """Declare the command.

    Args:
        commands: Sub-parsers of the command line.
    """
    command = commands.add_parser("resize", help="build a narrower or wider copy and print its sizes")
    command.add_argument("target", help="module:factory, timm:NAME or hf:CONFIG_CLASS[,key=value...]")
    command.add_argument("--input", action="append", metavar="SIZES", help="example input, such as 2x3x32x32")
    command.add_argument(
        "--width",
        action="append",
        metavar="N | NAME=N",
        help="new width, or the new size of a dimension by its name (may be given more than once)",
    )
    command.add_argument("--scale", type=float, help="factor on every growing dimension instead")
    command.add_argument("--seed", type=int, help="seed of the new parameters")
    command.add_argument("--device", default="cpu", help="where to build the model (default: cpu)")
    command.add_argument("--output", metavar="FILE", help="save the state_dict of the copy")


def run_resize(options: argparse.Namespace, model: nn.Module, inputs: Any) -> None:
    """Resize a model, print what became of it, and save it where asked.

    Args:
        options: Words of the command line.
        model: The source.
        inputs: Example inputs, or None.

    Raises:
        MupassError: The words are no sizes, or the model cannot be resized.
    """
    place = "cpu" if options.device == "meta" else options.device
    width = _width(options.width)
    new = resize(model, width, scale=options.scale, example_inputs=inputs, device=place, seed=options.seed)
    print(table(model, new))
    if options.output:
        torch.save(new.state_dict(), options.output)
        print(f"wrote {options.output}")


def table(old: nn.Module, new: nn.Module) -> str:
    """Return the shapes of both models, one line a parameter, and their numbers of parameters.

    Args:
        old: The source.
        new: Its copy.
    """
    shapes = {n: tuple(p.shape) for n, p in new.named_parameters()}
    rows: list[tuple[str, str, str]] = [
        (n, _sizes(p.shape), _sizes(shapes[n])) for n, p in old.named_parameters()
    ]
    before, after = (f"{sum(p.numel() for p in m.parameters()):,}" for m in (old, new))
    rows.append(("parameters", before, after))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(
        f"{name:<{widths[0]}}  {before:>{widths[1]}} -> {after}{'' if before != after else '  (same)'}"
        for name, before, after in rows
    )


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _width(words: list[str] | None) -> int | dict[str, int] | None:
    """Read ``128`` or ``d_model=128 heads=2``.

    Raises:
        MupassError: A word is neither.
    """
    sizes: dict[str, int] = {}
    for word in words or ():
        name, equals, size = word.rpartition("=")
        if not size.isdigit() or (not equals and len(words or ()) > 1):
            raise MupassError(f"--width {word!r} is not a number, nor NAME=N")
        if not equals:
            return int(size)
        sizes[name] = int(size)
    return sizes or None
