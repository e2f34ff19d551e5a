"""Taps: factors against per-term gradients and Jacobians of the layer, in float64; no im2col of mupass."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mupass
from mupass._taps.blocks import Cover, Options
from mupass._taps.cover import cover
from mupass._taps.factors import Layer
from mupass._taps.taps import ModuleTap, attach, detach, hookable, tap_of

# torch warns that 'same' needs a copy where more zeros go behind than before.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

WIDTH, BASE = 8, 4


@dataclass(frozen=True)
class Case:
    """A small model by width, a batch, and its loss term by term."""

    name: str
    build: Callable[[int], nn.Module]
    x: Callable[[], Tensor]
    y: Callable[[], Tensor]
    terms: Callable[[Tensor, Tensor], Tensor]

    def net(self) -> nn.Module:
        """The model at `WIDTH`, transformed; captured once."""
        return transformed(Case.plain, self, inputs=self.batch()[0], base=BASE)

    def plain(self, width: int = WIDTH) -> nn.Module:
        torch.manual_seed(0)
        return self.build(width).double()

    def batch(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return self.x(), self.y()


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().flatten(0, -2).sum(-1)


def entropies(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="none")


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape)


class Twice(nn.Module):
    """The hidden layer is called twice."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.inp, self.hid, self.out = nn.Linear(5, w), nn.Linear(w, w), nn.Linear(w, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hid(torch.tanh(self.hid(torch.tanh(self.inp(x)))))))


def mlp(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 3))


def inplace(w: int) -> nn.Module:
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Linear(5, w), relu, nn.Linear(w, w), relu, nn.Linear(w, 3))


def no_bias(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, w, bias=False), nn.Tanh(), nn.Linear(w, 3, bias=False))


def language(w: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(11, w), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 11))


def cnn(cls: type[nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    """Two convolutions, the second with the options; positions are flattened into the mean."""

    def build(w: int) -> nn.Module:
        second = cls(w, w, **{"kernel_size": 3} | options)
        layers = [cls(2, w, 2), nn.Tanh(), second, nn.Tanh(), nn.Flatten(2)]
        return nn.Sequential(*layers, Mean(), nn.Linear(w, 3))

    return build


class Mean(nn.Module):
    """Average over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


CONVS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {}),
    "1d stride 2": (nn.Conv1d, {"stride": 2, "padding": 1}),
    "1d same dilation": (nn.Conv1d, {"padding": "same", "dilation": 3}),
    "1d same even": (nn.Conv1d, {"padding": "same", "kernel_size": 2, "dilation": 3}),
    "2d": (nn.Conv2d, {}),
    "2d no bias": (nn.Conv2d, {"bias": False}),
    "2d stride padding": (nn.Conv2d, {"stride": (2, 1), "padding": (0, 2)}),
    "2d same": (nn.Conv2d, {"padding": "same"}),
    "2d same even": (nn.Conv2d, {"padding": "same", "kernel_size": (4, 2), "padding_mode": "circular"}),
    "2d dilation": (nn.Conv2d, {"dilation": (1, 2)}),
    "2d groups": (nn.Conv2d, {"groups": 2}),
    "2d groups stride": (nn.Conv2d, {"groups": 2, "stride": 2, "padding": 1}),
    "2d reflect": (nn.Conv2d, {"padding": (1, 2), "padding_mode": "reflect"}),
    "2d circular": (nn.Conv2d, {"padding": 1, "padding_mode": "circular"}),
    "2d replicate same": (nn.Conv2d, {"padding": "same", "padding_mode": "replicate", "dilation": 2}),
    "3d": (nn.Conv3d, {"stride": (1, 2, 1), "padding": 1}),
}
SPACE = {nn.Conv1d: (9,), nn.Conv2d: (6, 7), nn.Conv3d: (4, 4, 4)}
DENSE = {
    "linear": Case("linear", mlp, normal(6, 5), normal(6, 3), squares),
    "sequence": Case("sequence", mlp, normal(4, 7, 5), normal(4, 7, 3), squares),
    "in-place": Case("in-place", inplace, normal(6, 5), normal(6, 3), squares),
    "no bias": Case("no bias", no_bias, normal(6, 5), normal(6, 3), squares),
    "twice": Case("twice", Twice, normal(6, 5), normal(6, 3), squares),
    "embedding": Case("embedding", language, ids(11, 4, 7), ids(11, 4, 7), entropies),
}
CASES = DENSE | {
    name: Case(name, cnn(cls, **options), normal(3, 2, *SPACE[cls]), normal(3, 3), squares)
    for name, (cls, options) in CONVS.items()
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@dataclass(frozen=True)
class Factors:
    """Expectations by the paper's definition: one matrix a group."""

    a: list[Tensor]
    b: list[Tensor]
    rows: int


def dense_factors(model: nn.Module, terms: Callable[[nn.Module], Tensor]) -> dict[str, Factors]:
    """A = mean of x x^T over rows, B = mean over loss terms of the sum of delta delta^T over positions.

    x are rows of the layer's Jacobian by its weight; delta are gradients of single loss terms.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    layers = {n: m for n, m in model.named_modules() if n and isinstance(getattr(m, "weight", None), Tensor)}

    def probe(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            calls[name].append((args[0].detach(), zero))
            return output + zero

        return hook

    handles = [m.register_forward_hook(probe(n)) for n, m in layers.items()]
    losses = terms(model)
    for handle in handles:
        handle.remove()
    probes = [zero for found in calls.values() for _, zero in found]
    deltas = defaultdict(list)
    for loss in losses:
        for zero, delta in zip(probes, torch.autograd.grad(loss, probes, retain_graph=True), strict=True):
            deltas[zero].append(delta)
    found = {}
    for name, layer in layers.items():
        groups = getattr(layer, "groups", 1)
        x = torch.cat([_patches(layer, x) for x, _ in calls[name]], 1)  # [groups, rows, n]
        d = torch.cat([_channels_last(layer, t) for _, zero in calls[name] for t in deltas[zero]])
        d = d.reshape(len(d), groups, -1)
        b = [d[:, g].T @ d[:, g] / len(losses) for g in range(groups)]
        found[name] = Factors([r.T @ r / len(r) for r in x], b, x.shape[1])
    return found


def _channels_last(layer: nn.Module, y: Tensor) -> Tensor:
    y = y.movedim(1, -1) if hasattr(layer, "groups") else y
    return y.reshape(-1, y.shape[-1])


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows that the weight multiplies, from d output / d weight at every position."""
    weight = layer.weight.detach()  # type: ignore[operator,union-attr]

    def output(w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    jacobian = torch.autograd.functional.jacobian(output, weight)
    y = output(weight)
    jacobian = jacobian.reshape(*y.shape, *weight.shape)
    if isinstance(layer, nn.Embedding):  # [..., features, table, features]
        return jacobian[..., 0, :, 0].reshape(1, -1, len(weight))
    if not hasattr(layer, "groups"):
        return jacobian[..., 0, 0, :].reshape(1, -1, weight.shape[1])
    first = range(0, len(weight), len(weight) // layer.groups)  # type: ignore[operator]
    return torch.stack([jacobian[:, o].select(y.dim() - 1, o).reshape(-1, weight[0].numel()) for o in first])


def terms_of(case: Case) -> Callable[[nn.Module], Tensor]:
    x, y = case.batch()
    return lambda model: case.terms(model(x), y)


@contextmanager
def opened(model: nn.Module, a: bool = True, b: bool = True) -> Iterator[dict[str, Any]]:
    """Open every tap of a transformed model and collect."""
    taps = {}
    for place, layer in covered(model).layers.items():
        tap = taps[place.module] = tap_of(model.get_submodule(place.module))
        tap.open(layer, torch.device("cpu"), next(model.parameters()).dtype, a, b)
        tap.collect(True)
    yield taps


def covered(model: nn.Module, **options: Any) -> Cover:
    names = frozenset(n for n, _ in model.named_parameters())
    return cover(model, model.mupass_plan, Options(**options), names)  # type: ignore[arg-type]


@pytest.mark.sample(every=2)
@cases
def test_raw_sums_are_those_of_the_definition(case: Case) -> None:
    net, plain = case.net(), case.plain()
    plain.load_state_dict(net.state_dict())
    want = dense_factors(plain, terms_of(case))
    with opened(net) as taps:
        terms_of(case)(net).sum().backward()
    assert taps.keys() == want.keys()
    terms = len(terms_of(case)(plain))
    for name, tap in taps.items():
        a, (b,), rows, *_ = tap.take()
        assert rows == want[name].rows
        b_want = torch.stack(want[name].b) * terms
        torch.testing.assert_close(b, b_want, rtol=1e-9, atol=1e-12)
        a_want = torch.stack(want[name].a) * want[name].rows
        if a.dim() == 2:  # one-hot rows: A is the diagonal of counts
            torch.testing.assert_close(torch.diag(a[0]), a_want[0])
        else:
            torch.testing.assert_close(a, a_want, rtol=1e-9, atol=1e-12)


@pytest.mark.sample(every=3)
@cases
def test_open_taps_change_neither_output_nor_gradients(case: Case) -> None:
    net, plain = case.net(), case.plain()
    plain.load_state_dict(net.state_dict())
    with opened(net):
        found = terms_of(case)(net)
    found.sum().backward()
    want = terms_of(case)(plain)
    want.sum().backward()
    assert torch.equal(found, want)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]


def sums(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Any]:
    """Raw sums of one backward pass."""
    with opened(model) as taps:
        run().backward()
    return {n: t.take() for n, t in taps.items()}


def assert_same_sums(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name])


def layer_sums(layer: nn.Module, x: Tensor, **how: Any) -> Any:
    """Raw sums of a bare layer under the loss sum(y^2)."""
    copied = copy.deepcopy(layer)
    attach(copied)
    tap, groups, weight = tap_of(copied), getattr(layer, "groups", 1), layer.weight
    tap.open(  # type: ignore[union-attr]
        Layer("layer", groups, weight[0].numel(), (len(weight) // groups,)),  # type: ignore[operator,arg-type,index]
        torch.device("cpu"),
        torch.float64,
        True,
        True,
    )
    tap.collect(True)  # type: ignore[union-attr]
    (copied(input=x) if how.get("by_name") else copied(x)).square().sum().backward()
    return tap.take()  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(2, 3, 2), (2, 5)),
        (nn.Conv2d(2, 4, 3, padding=1, groups=2), (2, 4, 5)),
        (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
        (nn.Linear(4, 3), (4,)),
    ],
    ids=["1d", "2d", "3d", "linear"],
)
def test_no_batch_axis_is_a_batch_of_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, layer = torch.randn(shape, dtype=torch.float64), layer.double()
    assert_same_sums({"": layer_sums(layer, x)}, {"": layer_sums(layer, x[None])})
    assert_same_sums({"": layer_sums(layer, x, by_name=True)}, {"": layer_sums(layer, x)})


def test_micro_batches_add_up() -> None:
    case = DENSE["sequence"]
    (x, y), net = case.batch(), case.net()
    whole = sums(net, lambda: case.terms(net(x), y).sum())
    with opened(net) as taps:
        for part in (slice(0, 1), slice(1, 4)):
            case.terms(net(x[part]), y[part]).sum().backward()
    assert_same_sums({n: t.take() for n, t in taps.items()}, whole)


def test_checkpointing_does_not_count_twice() -> None:
    case = DENSE["linear"]
    net = case.net()
    run = terms_of(case)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)  # type: ignore[no-any-return]

    want = sums(net, lambda: run(net).sum())
    assert_same_sums(sums(net, lambda: run(checkpointed).sum()), want)  # type: ignore[arg-type]


def test_take_empties_and_clear_forgets() -> None:
    case = DENSE["linear"]
    net = case.net()
    with opened(net) as taps:
        terms_of(case)(net).sum().backward()
    assert all(t.take() is not None and t.take() is None for t in taps.values())
    terms_of(case)(net).sum().backward()
    for tap in taps.values():
        tap.clear()
    assert all(t.take() is None for t in taps.values())


@pytest.mark.parametrize("a, b", [(True, False), (False, True)])
def test_only_wanted_factors_are_computed(a: bool, b: bool) -> None:
    net = DENSE["linear"].net()
    with opened(net, a, b) as taps:
        terms_of(DENSE["linear"])(net).sum().backward()
    for tap in taps.values():
        found = tap.take()
        assert (found[0] is not None, found[1][0] is not None) == (a, b) and found[2] == 6


def test_idle_taps_stay_out_of_the_graph() -> None:
    case = DENSE["linear"]
    net = case.net()
    x = case.batch()[0]

    def tapped() -> bool:
        return "Factors" in type(net[2](torch.randn(2, WIDTH, dtype=x.dtype)).grad_fn).__name__

    assert not tapped()
    with opened(net) as taps:
        assert tapped()
        with torch.no_grad():
            assert not net(x).requires_grad
    for tap in taps.values():
        tap.collect(False)
    assert not tapped()
    detach(net)
    assert all(tap_of(m) is None and not m._forward_hooks for m in net.modules())
    attach(net)
    attach(net)
    assert [len(m._forward_hooks) for m in net] == [1, 0, 1, 0, 1]


def test_factors_are_float32_under_autocast() -> None:
    case = DENSE["linear"]
    net = case.net().float()
    x, y = (t.float() for t in case.batch())

    def run(enabled: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return case.terms(net(x).float(), y).sum()

    want, found = (_float_taps(net, lambda e=e: run(e)) for e in (False, True))
    for name in want:
        for f, w in zip(found[name], want[name], strict=True):
            assert f.dtype == torch.float32
            assert (f - w).norm() < 0.03 * w.norm()


def _float_taps(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Any]:
    with opened(model) as taps:
        run().backward()
    found = {n: t.take() for n, t in taps.items()}
    return {n: (s.a, *s.b) for n, s in found.items()}


def test_copies_get_idle_taps_of_their_own() -> None:
    net = DENSE["linear"].net()
    with opened(net):
        twin = copy.deepcopy(net)
    tap = tap_of(twin[0])
    assert tap is not None and tap is not tap_of(net[0]) and tap.rows is None
    terms_of(DENSE["linear"])(twin).sum().backward()
    assert tap.take() is None and tap_of(net[0]).take() is None  # type: ignore[union-attr]


class Odd(nn.Linear):
    """A forward of its own, which uses the weight twice in different ways."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight, self.bias)


class Mixed(nn.Module):
    """Parameters that K-FAC can take, and some that it cannot."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.emb, self.positions = nn.Embedding(11, w), nn.Parameter(torch.randn(5, w))
        self.norm = nn.LayerNorm(w)
        self.odd, self.free = Odd(w, w), nn.Parameter(torch.randn(w, w) / math.sqrt(w))
        self.head = nn.Linear(w, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.odd(self.norm(self.emb(ids) + self.positions)))
        return self.head(torch.tanh(h @ self.free))


def test_reasons_name_what_is_in_the_way() -> None:
    net = mupass.transform(Mixed(), ids(11, 3, 5)(), base=BASE)
    found = covered(net)
    kinds = {b.parameter: b.kind for b in found.blocks}
    assert kinds == {
        "free": "linear",
        "emb.weight": "embedding",
        "norm.weight": "gain",
        "norm.bias": "shift",
        "head.weight": "linear",
        "positions": "table",
        "odd.bias": "shift",
        "head.bias": "bias",
    }
    assert found.reasons.keys() == {"odd.weight"}
    assert "aten.mul" in found.reasons["odd.weight"]


class Renamed(nn.Linear):
    """The forward of a plain layer under another name."""


@pytest.mark.parametrize(
    "layer, plain",
    [
        (nn.Embedding(5, 3, sparse=True), False),
        (nn.Embedding(5, 3, max_norm=1.0), False),
        (Odd(3, 3), False),
        (nn.MultiheadAttention(4, 2), False),
        (Renamed(3, 3), True),
        (nn.ConvTranspose1d(2, 3, 2), True),
        (nn.LayerNorm(4), True),
    ],
    ids=["sparse", "max_norm", "odd", "attention", "renamed", "transposed", "norm"],
)
def test_which_modules_are_one_operator(layer: nn.Module, plain: bool) -> None:
    assert hookable(layer) == plain
    attach(layer)
    assert isinstance(tap_of(layer), ModuleTap) == plain


@pytest.mark.parametrize(
    "shape, terms",
    [((7,), 7), ((7, 3), 7), ((2, 5, 3), 10), ((2, 3, 5, 4), 40), ((2, 3, 5, 4, 6), 240)],
    ids=str,
)
def test_loss_terms_leave_the_class_axis_out(shape: tuple[int, ...], terms: int) -> None:
    assert mupass._taps.terms.loss_terms(shape) == terms
