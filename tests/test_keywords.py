"""Keywords behind ``**options``: what signatures show, what type checkers are told, and what is refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mupass
from mupass._hyper.implicit import SolverKeywords
from mupass._optim.kronecker.settings import KFACOptions
from mupass._optim.muon import MuonOptions
from mupass._optim.shampoo import ShampooOptions
from mupass._optim.soap import SOAPOptions
from mupass._runs.copies import CopyKeywords
from mupass._study.sweep import StudyKeywords

KEYWORDS: dict[Callable[..., Any], Any] = {
    mupass.KFAC: KFACOptions,
    mupass.Shampoo: ShampooOptions,
    mupass.SOAP: SOAPOptions,
    mupass.Muon: MuonOptions,
    mupass.sweep: StudyKeywords,
    mupass.transfer: StudyKeywords,
    mupass.coord_check: CopyKeywords,
    mupass.hypergradient: SolverKeywords,
}
OPTIMIZERS = [mupass.KFAC, mupass.Shampoo, mupass.SOAP, mupass.Muon]
X = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))


def name_of(function: Any) -> str:
    return function.__name__ if callable(function) else str(function)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)]
    return mupass.transform(nn.Sequential(*layers), X, base=32)


@pytest.mark.parametrize("function", KEYWORDS, ids=name_of)
def test_signatures_show_what_type_checkers_are_told(function: Callable[..., Any]) -> None:
    shown = inspect.signature(function).parameters
    for name, told in KEYWORDS[function].__annotations__.items():
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].default is not inspect.Parameter.empty
        assert shown[name].annotation == told.__forward_arg__
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in shown.values())


@pytest.mark.parametrize("function", KEYWORDS, ids=name_of)
def test_every_keyword_is_explained(function: Callable[..., Any]) -> None:
    explained = re.findall(r"^ +(\w+): ", inspect.getdoc(function) or "", re.MULTILINE)
    assert set(inspect.signature(function).parameters) <= set(explained)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=name_of)
def test_defaults_that_are_shown_are_those_that_hold(optimizer: Callable[..., Any]) -> None:
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    model, other = net(), net()
    trained = [(model, optimizer(model))]
    trained.append((other, optimizer(other, **{shown.name: shown.default for shown in parameters})))
    for member, its_optimizer in trained:
        for _ in range(3):
            its_optimizer.zero_grad()
            member(X).square().mean().backward()
            its_optimizer.step()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same)


@pytest.mark.parametrize("function", KEYWORDS, ids=name_of)
def test_a_misspelt_keyword_is_refused_with_what_may_be_meant(function: Callable[..., Any]) -> None:
    name = max(KEYWORDS[function].__annotations__, key=len)
    arguments = [net()] if function in OPTIMIZERS else [net(), [(X, X)], {"lr": [0.1]}]
    if function is mupass.coord_check:
        arguments = arguments[:2]
    given: dict[str, Any] = {name[:-1]: None}
    if function is mupass.transfer:
        arguments, given = arguments[:2], {**given, "grid": [0.1]}
    with pytest.raises(mupass.MupassError, match=f"takes no '{name[:-1]}'; did you mean .*{name}"):
        function(*arguments, **given)


def test_rate_and_damping_are_positional() -> None:
    optimizer = mupass.KFAC(net(), 0.25, 0.5, kl_clip=None)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["damping"], optimizer.kl_clip) == (0.25, 0.5, None)
