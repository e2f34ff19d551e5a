"""Resizing one instance gives the architecture that its author would have built at that width.

The proof is functional: the weights of the instance built at that width are loaded into the resized one, and
the outputs must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from test_zoo import PLAIN, SOME
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo.analyses import third_party, truth
from zoo.case import Case

import mupass

# Spectral norm keeps singular vectors as buffers; which factor of a channel shuffle grows is a guess.
REFUSED = {"normalized_weights", "shuffle_unit"}
HEADS_STAY = {"set_transformer", "cvt"}  # head_dim grows, where the author adds heads
# Their builders round to multiples of 8 or cut off below a size, where resize keeps every ratio.
ROUNDED = {
    "timm_efficientnet",
    "timm_ghostnet",
    "timm_mobilenet_v3",
    "timm_regnet",
    "timm_repvit",
    "timm_resnest",
    "timm_naflexvit",
    "tv_mnasnet",
}
PLAIN_MODULES = {"zoo.plain_dense", "zoo.plain_more", "zoo.plain_sequence", "zoo.plain_vision"}
WIDTHS = [(1, 2), (2, 1), (1, 1)]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def outputs(model: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [t for t in tree_leaves(model(*inputs[0], **inputs[1])) if isinstance(t, torch.Tensor)]


def conventions(case: Case) -> dict[str, str]:
    """Settle what one model cannot tell."""
    return {
        f"{re.escape(name)}:{axis}": "infinite" if grows else "finite"
        for (name, axis), grows in (truth(case) if case.ambiguous else {}).items()
        if case.conventional(name, axis)
    }


# For the short tier: the named ones have sizes in their code, and parts, that the others lack.
QUICK = {*(f"1-2-{name}" for name in SOME[::3]), "1-2-clip_like", "1-2-mamba2_dual", "2-1-diffusion_unet"}


def widths_of_cases() -> Iterator[pytest.param]:
    """Yield all pairs of widths of every case; one of each case, in turn, is run by the slow tier."""
    for number, (name, case) in enumerate(PLAIN.items()):
        for source, target in WIDTHS:
            key = f"{source}-{target}-{name}"
            turn = (source, target) == WIDTHS[number % len(WIDTHS)]
            marks = () if turn or key in QUICK else pytest.mark.long
            yield pytest.param(case, source, target, id=key, marks=marks)


@pytest.mark.sample(*QUICK)
@pytest.mark.parametrize(("case", "source", "target"), list(widths_of_cases()))
def test_equals_the_architecture_built_at_that_width(case: Case, source: int, target: int) -> None:
    equals_the_architecture(case, source, target)


def equals_the_architecture(case: Case, source: int, target: int) -> None:
    with third_party():
        model, inputs = case.build(source), case.inputs()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        width = {"scale": target / source, "dims": conventions(case)}
        try:
            new = mupass.resize(model, example_inputs=inputs, seed=0, **width)
        except mupass.ResizeError as error:
            assert case.name in REFUSED or case.build.__module__ not in PLAIN_MODULES, str(error)
            pytest.skip(f"refused by name: {error}")
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.isnan().any())
        truth = model if source == target else case.build(target)
        assert type(new) is type(model) and list(new.state_dict()) == list(model.state_dict())
        if case.name in ROUNDED and source != target:
            assert all(p.isfinite().all() for p in outputs(new, inputs))
            pytest.skip("the builder rounds")
        assert shapes(new) == shapes(truth)
        loss = sum(t.abs().sum() for t in outputs(new, inputs) if t.is_floating_point() or t.is_complex())
        loss.backward()
        if source == target:  # the backward pass may have moved running statistics
            new = mupass.resize(model, example_inputs=inputs, **width)
        else:
            new.load_state_dict(truth.state_dict())
        tolerance = 1e-6 if source == target else 1e-4  # sums of another length in between
        with torch.no_grad():
            for a, b in zip(outputs(new.eval(), inputs), outputs(truth.eval(), inputs), strict=True):
                assert a.shape == b.shape
                if source == target or case.name not in HEADS_STAY:
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
