"""What the commands do; each takes the words of its command line and returns an exit code."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import nn

import mupass
from mupass._capture.inputs import find_inputs
from mupass._cli.targets import inputs_of, load, named
from mupass._errors import MupassError
from mupass._files import write_text
from mupass._page import column_widths
from mupass._runs.batches import cross_entropy, random_batch, read_batches


def analyze(options: argparse.Namespace) -> int:
    """Print the report of an analysis.

    Args:
        options: Words of the command line.
    """
    model = _build(options)
    base: Any = options.base_shapes or options.base
    if options.base_target:
        # Of a second instance only the shapes matter, so it needs no memory.
        with torch.device("meta"):
            base = load(options.base_target)
    inputs = inputs_of(options.input, model)
    analysis = mupass.analyze(model, inputs, base=base, dims=dict(options.dim), strict=not options.lenient)
    report = analysis.report(options.optimizer, options.parameterization)
    if options.html:
        write_text(options.html, report.html(), MupassError)
        print(f"wrote {options.html}")
    elif options.json:
        print(json.dumps(report.record(), indent=1))
    else:
        print(report.text())
    return 0


def check(options: argparse.Namespace) -> int:
    """Check that updates scale as they should; 1 when they do not.

    Args:
        options: Words of the command line.
    """
    model = _build(options, options.seed)
    checked = _check(options, model, options.lr, options.steps, options.seeds)
    _show(checked, options.out)
    return 0 if checked.ok else 1


def sweep(options: argparse.Namespace) -> int:
    """Sweep hyperparameters at several widths; 1 when an optimum has no bracket.

    Args:
        options: Words of the command line.
    """
    result = _sweep(options, _build(options, options.seed))
    _show(result, options.out)
    return 1 if result.open_ends() else 0


def transfer(options: argparse.Namespace) -> int:
    """Tune a narrow copy, and make the full model; 1 when an optimum has no bracket.

    Args:
        options: Words of the command line.
    """
    result = mupass.transfer(
        _build(options, options.seed),
        named(options.data),
        options.width,
        grid=_grid(options),
        proxy=options.proxy,
        driver=options.driver,
        trials=options.trials,
        **_shared(options),
        **_runs(options),
    )
    _show(result, options.out)
    if options.state:
        torch.save(mupass.fold(result.model).state_dict(), options.state)
        print(f"wrote {options.state}")
    return 1 if result.search.open_ends() else 0


def report(options: argparse.Namespace) -> int:
    """Write one page of the plan, a check and a sweep; 1 when one of them fails.

    Args:
        options: Words of the command line.

    Raises:
        MupassError: Data without rates or rates without data.
    """
    if bool(options.data) != bool(options.lr):
        raise MupassError("a sweep needs both --data and --lr; without it leave out both")
    model = _build(options, options.seed)
    checked = _check(options, model, None, 3, 3)
    passed = checked.ok
    studies = [checked]
    if options.data:
        swept = _sweep(options, model)
        passed = passed and not swept.open_ends()
        studies.append(swept)
    path = mupass.report(options.out, *studies, _plan(options, model), title=f"mupass: {options.target}")
    print(f"wrote {path}")
    for study in studies:
        print(study.verdict())
    return 0 if passed else 1


def resize(options: argparse.Namespace) -> int:
    """Resize a model, print what became of it, and save it where asked.

    Args:
        options: Words of the command line.

    Raises:
        MupassError: A width without a name beside others.
    """
    model = _build(options)
    widths = dict(options.width)
    if "" in widths and len(options.width) > 1:
        raise MupassError("--width: a number alone is the model's width; give the others as NAME=N alone")
    resized = mupass.resize(
        model,
        widths.get("", widths or None),
        scale=options.scale,
        example_inputs=inputs_of(options.input, model),
        device="cpu" if options.device == "meta" else options.device,
        seed=options.seed,
    )
    print(_sizes_of(model, resized))
    if options.output:
        torch.save(resized.state_dict(), options.output)
        print(f"wrote {options.output}")
    return 0


def _build(options: argparse.Namespace, seed: int | None = None) -> nn.Module:
    try:
        device = torch.device(options.device)
        # A first tensor tells whether the device is there.
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device raises errors of its own
        raise MupassError(f"--device {options.device!r}: {str(error).splitlines()[0]}") from error
    # The seed comes before the model is built, and so decides its initial weights.
    if seed is not None:
        torch.manual_seed(seed)
    with device:
        return load(options.target)


def _check(options: argparse.Namespace, model: nn.Module, lr: float | None, steps: int, seeds: int) -> Any:
    data: Any
    if options.data:
        data = named(options.data)
    else:
        data = random_batch(model, find_inputs(model), options.batch)
    shared = _shared(options) | {"widths": options.widths}
    return mupass.coord_check(
        model, data, lr=lr, tolerance=options.tolerance, steps=steps, seeds=seeds, **shared
    )


def _sweep(options: argparse.Namespace, model: nn.Module) -> Any:
    shared = _shared(options) | _runs(options)
    return mupass.sweep(model, named(options.data), _grid(options), widths=options.widths, **shared)


def _plan(options: argparse.Namespace, model: nn.Module) -> mupass.Plan:
    """Return the plan of a transformed copy; the narrowest width of the study is its base."""
    if options.data:
        example: Any = read_batches(named(options.data), 1)[0].inputs
    else:
        example = find_inputs(model)
    transformed = mupass.transform(
        model,
        example,
        base=min(options.widths) if options.widths else None,
        optimizer=options.optimizer,
        parameterization=options.parameterization,
        inplace=False,
    )
    return mupass.plan_of(transformed)[1]


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "loss": named(options.loss) if options.loss else cross_entropy,
        "optimizer": options.optimizer,
        "parameterization": options.parameterization,
    }


def _runs(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "steps": options.steps,
        "seeds": options.seeds,
        "store": options.store,
        "jobs": options.jobs,
        "progress": sys.stderr.isatty(),
    }


def _grid(options: argparse.Namespace) -> dict[str, list[float]]:
    grid = {"lr": options.lr}
    if options.damping:
        grid["damping"] = options.damping
    return grid


def _show(result: Any, paths: list[str]) -> None:
    print(result)
    for path in paths:
        print(f"wrote {result.report(path)}")


def _sizes_of(old: nn.Module, new: nn.Module) -> str:
    """Return the shapes of both models, one line a parameter, and their numbers of parameters."""
    shapes = {name: _shape(parameter) for name, parameter in new.named_parameters()}
    sizes = [(name, _shape(parameter), shapes[name]) for name, parameter in old.named_parameters()]
    sizes.append(("parameters", _count(old), _count(new)))
    rows = []
    for name, before, after in sizes:
        remark = "  (same)" if before == after else ""
        rows.append([name, before, f"-> {after}{remark}"])
    names, befores, _ = column_widths(rows)
    # The new sizes are set to the left, so only the two columns before them are padded.
    lines = []
    for name, before, after in rows:
        lines.append(f"{name.ljust(names)}  {before.rjust(befores)} {after}")
    return "\n".join(lines)


def _count(model: nn.Module) -> str:
    """Return the number of a model's parameters."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


def _shape(parameter: torch.Tensor) -> str:
    return " x ".join(map(str, parameter.shape)) or "scalar"
