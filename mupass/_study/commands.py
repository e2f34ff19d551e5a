"""Commands: ``mupass check`` and ``mupass sweep``."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from torch import nn

from mupass._capture.inputs import find_inputs
from mupass._study.batches import StudyError, cross_entropy, random_batch
from mupass._study.check import coord_check
from mupass._study.recipes import RECIPES
from mupass._study.sweep import sweep


def add_commands(commands: Any) -> None:
    """Add the two commands to a parser.

    Args:
        commands: What ``add_subparsers`` gave.
    """
    check = commands.add_parser("check", help="train narrow copies for a few steps; fails when updates scale")
    _common(check)
    check.add_argument("--data", help="module:function that returns batches (default: random numbers)")
    check.add_argument("--batch", type=int, default=16, help="samples of random numbers (default: 16)")
    check.add_argument("--lr", type=float)
    check.add_argument("--steps", type=int, default=3)
    check.add_argument("--seeds", type=int, default=3)
    check.add_argument("--tolerance", type=float, default=0.25, help="largest power that counts as flat")
    tune = commands.add_parser("sweep", help="find the best hyperparameters at several widths")
    _common(tune)
    tune.add_argument("--data", required=True, help="module:function that returns batches (inputs, targets)")
    tune.add_argument("--lr", type=float, nargs="+", required=True)
    tune.add_argument("--damping", type=float, nargs="+", help="for kfac and shampoo")
    tune.add_argument("--steps", type=int, default=100)
    tune.add_argument("--seeds", type=int, default=1)
    tune.add_argument("--store", metavar="FILE", help="keeps results; a sweep that was killed goes on")
    tune.add_argument("--jobs", type=int, default=1, help="number of processes")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", help="module:factory, timm:NAME or hf:CONFIG_CLASS[,key=value...]")
    command.add_argument("--loss", metavar="MODULE:FUNCTION", help="of output and targets")
    command.add_argument("--optimizer", choices=tuple(RECIPES), default="adam")
    command.add_argument("--widths", type=int, nargs="+", help="default: three from 64")
    command.add_argument("--parameterization", default="mup")
    command.add_argument("--seed", type=int, default=0, help="of the model's initial weights (default: 0)")
    command.add_argument("--out", action="append", default=[], metavar="FILE", help="report.html, .png, .txt")
    command.set_defaults(device="cpu")


def run(options: argparse.Namespace, model: nn.Module) -> int:
    """Run one of the two commands.

    Args:
        options: Words of the command line.
        model: The model that they name.

    Returns:
        Exit code: 0; 1 when a check fails, or when a sweep leaves an optimum without a bracket.
    """
    loss = named(options.loss) if options.loss else cross_entropy
    shared = {
        "loss": loss,
        "optimizer": options.optimizer,
        "steps": options.steps,
        "seeds": options.seeds,
        "widths": options.widths,
        "parameterization": options.parameterization,
    }
    if options.command == "check":
        data = named(options.data) if options.data else random_batch(model, find_inputs(model), options.batch)
        checked = coord_check(model, data, lr=options.lr, tolerance=options.tolerance, **shared)
        _show(checked, options.out)
        return 0 if checked.ok else 1
    grid = {"lr": options.lr, **({"damping": options.damping} if options.damping else {})}
    swept = sweep(
        model, named(options.data), grid, store=options.store, jobs=options.jobs,
        progress=sys.stderr.isatty(), **shared,
    )  # fmt: skip
    _show(swept, options.out)
    return 1 if swept.open_ends() else 0


def _show(result: Any, paths: list[str]) -> None:
    print(result)
    for path in paths:
        print(f"wrote {result.report(path)}")


def named(target: str) -> Any:
    """Return what ``module:name`` names.

    Args:
        target: Module and name, dots allowed in both.

    Raises:
        StudyError: Nothing goes by that name.
    """
    module, colon, name = target.partition(":")
    if not colon or not name:
        raise StudyError(f"{target!r} is not module:function")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"cannot find {target!r}: {type(error).__name__}: {error}") from error
    return found
