"""The command line: ``mupass analyze``, ``check``, ``sweep`` and ``resize``, each with a TARGET."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mupass._analyze import analyze
from mupass._cli_resize import add_resize, run_resize
from mupass._errors import MupassError
from mupass._files import write_text
from mupass._study.commands import add_commands, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of the process when left out.

    Returns:
        Exit code: 0; 1 when a check fails or a sweep has no bracket; 2 for input that was refused.
    """
    options = _parser().parse_args(arguments)
    try:
        with torch.device(options.device):
            if options.command in ("check", "sweep"):
                torch.manual_seed(options.seed)
            model = load(options.target)
        if options.command in ("check", "sweep"):
            return run(options, model)
        if options.command == "resize":
            run_resize(options, model, _inputs(options.input, model))
            return 0
        base: Any = options.base
        if options.base_target:
            with torch.device("meta"):
                base = load(options.base_target)
        inputs = _inputs(options.input, model)
        result = analyze(model, inputs, base=base, dims=dict(options.dim), strict=not options.lenient)
        report = result.report(options.optimizer, options.parameterization)
        if options.html:
            write_text(options.html, report.html(), MupassError)
    except MupassError as error:
        print(f"mupass: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.html}" if options.html else report.text())
    return 0


def load(target: str) -> nn.Module:
    """Build the model that a command-line target names.

    Args:
        target: ``module:factory`` (a callable without arguments, dots allowed after the colon, or a module
            instance), ``timm:NAME``, or ``hf:CONFIG_CLASS`` with optional ``,key=value`` settings.

    Returns:
        The model, on the device that is current.

    Raises:
        MupassError: The target names nothing that gives a model.
    """
    kind, colon, name = target.partition(":")
    if not colon or not name:
        raise MupassError(f"{target!r} is not module:factory, timm:NAME or hf:CONFIG_CLASS")
    try:
        if kind == "timm":
            model = importlib.import_module("timm").create_model(name)
        elif kind == "hf":
            model = _hugging_face(name)
        else:
            sys.path.insert(0, "")
            found: Any = importlib.import_module(kind)
            for part in name.split("."):
                found = getattr(found, part)
            model = found if isinstance(found, nn.Module) else found()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, KeyError) as error:
        raise MupassError(f"cannot build {target!r}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise MupassError(f"{target!r} gives a {type(model).__name__}, not an nn.Module")
    return model


def _hugging_face(name: str) -> nn.Module:
    """Build a model from a configuration class: the task model with a head where there is one."""
    transformers = importlib.import_module("transformers")
    words = name.split(",")
    config = getattr(transformers, words[0])(
        **{k: _literal(v) for k, _, v in (w.partition("=") for w in words[1:])}
    )
    for family in (
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForImageClassification",
        "AutoModel",
    ):
        auto = getattr(transformers, family)
        if type(config) in auto._model_mapping:
            model: nn.Module = auto.from_config(config)
            return model
    raise MupassError(f"transformers has no model for {words[0]}")


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _inputs(shapes: list[str] | None, model: nn.Module) -> Any:
    """Turn ``2x3x32x32`` or ``2x16:long`` into zeros on the model's device."""
    if not shapes:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = []
    for text in shapes:
        sizes, _, dtype = text.partition(":")
        kind = getattr(torch, dtype or "float32", None)
        if not isinstance(kind, torch.dtype) or not all(s.isdigit() for s in sizes.split("x")):
            raise MupassError(f"--input {text!r} is not sizes such as 2x3x32x32 or 2x16:long")
        inputs.append(torch.zeros([int(s) for s in sizes.split("x")], dtype=kind, device=device))
    return tuple(inputs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mupass", description="Width-aware model rewriting for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "analyze", help="print which dimensions of a model grow with width, and why"
    )
    command.add_argument("target", help="module:factory, timm:NAME or hf:CONFIG_CLASS[,key=value...]")
    command.add_argument("--input", action="append", metavar="SIZES", help="example input, such as 2x3x32x32")
    command.add_argument("--base", type=float, default=256, help="reference width (default: 256)")
    command.add_argument(
        "--base-target", metavar="TARGET", help="a second instance, which settles every verdict"
    )
    command.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="PATTERN=VERDICT",
        type=_pair,
        help="settle a dimension: a name or a regular expression for parameter:axis, finite or infinite",
    )
    command.add_argument("--optimizer", default="adamw", help="whose learning-rate factors to print")
    command.add_argument("--parameterization", default="mup")
    command.add_argument(
        "--device", default="meta", help="where to build the model (default: meta, no memory)"
    )
    command.add_argument("--lenient", action="store_true", help="leave unknown operators ambiguous")
    command.add_argument("--html", metavar="FILE", help="write an HTML page instead")
    add_commands(commands)
    add_resize(commands)
    return parser


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, verdict = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=VERDICT")
    return pattern, verdict
