"""K-FAC on tables that are added to activations or multiplied with them: updates against dense factors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from test_kfac import LR, PLAIN, RHO, damping, moved, power
from torch import Tensor, nn

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WIDTH, BASE = 8, 4
# In the short tier eager models; a graph for every case takes a second each.
COMPILED = [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
OPTIONS: dict[str, Any] = {"damping_floor": 0.0, **PLAIN}
# Shape of the table, its features and its rows, and what it is joined to.
TABLES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "positions": ((5, WIDTH), (1,), (0,), "add"),
    "positions of one batch": ((1, 5, WIDTH), (2,), (1,), "add"),
    "image": ((1, WIDTH, 2, 3), (1,), (2, 3), "add"),
    "gains": ((5, WIDTH), (1,), (0,), "mul"),
    "numbers to features": ((5, WIDTH), (1,), (0,), "numbers"),
    "gains of channels": ((WIDTH, 2, 3), (0,), (1, 2), "mul"),
}


class Tabled(nn.Module):
    """A table between two layers; ``copies`` stand for it in the reference, one for each sample."""

    copies: Tensor | None = None

    def __init__(self, kind: str, width: int = WIDTH) -> None:
        super().__init__()
        shape, _, rows, self.how = TABLES[kind]
        self.image = len(rows) == 2
        self.table = nn.Parameter(torch.randn([width if size == WIDTH else size for size in shape]))
        self.inp = nn.Conv2d(3, width, 1) if self.image else nn.Linear(3, width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if self.copies is None else self.copies
        if self.how == "numbers":
            h = x[..., :1] * table
        else:
            h = self.inp(x)
            h = h + table if self.how == "add" else table * h
        h = h.flatten(2).mT if self.image else h
        return self.out(torch.tanh(self.mix(torch.tanh(h))).mean(1))  # one term a sample


def data(kind: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn((4, 3, 2, 3) if len(TABLES[kind][2]) == 2 else (4, 5, 3), dtype=torch.float64)


def terms(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - 1).square().sum(1)


def make(cls: type[nn.Module], kind: str) -> Any:
    torch.manual_seed(0)
    return cls(kind).double()


def step_of_table(
    cls: type[nn.Module], kind: str, x: Tensor, compiled: bool, options: dict[str, Any]
) -> tuple[Any, Tensor]:
    """Return a plain network with the weights before a step of K-FAC, and how its table moves in it."""
    net, plain = transformed(make, cls, kind, inputs=x, base=BASE), make(cls, kind)
    plain.load_state_dict(net.state_dict())
    optimizer = mupass.KFAC(net, LR, RHO, **OPTIONS, **options)
    treatments = {covered.parameter: covered.treatment for covered in optimizer.coverage()}
    assert treatments["table"] == "kfac table"
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    terms(run, x).mean().backward()
    return plain, moved(net, optimizer.step)["table"]


@pytest.mark.sample
@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}, {"damping_mode": "absolute"}], ids=str)
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("kind", TABLES)
def test_update_equals_the_dense_formula(kind: str, compiled: bool, options: dict[str, Any]) -> None:
    x, (_, features, rows, _) = data(kind), TABLES[kind]
    plain, got = step_of_table(Tabled, kind, x, compiled, options)
    # Every entry of the output has a copy of its table.
    whole = plain.table.detach().expand(len(x), *plain.table.shape[-len(x.shape) + 1 :])
    plain.copies = whole.clone().requires_grad_()
    deltas = torch.stack(
        [torch.autograd.grad(t, plain.copies, retain_graph=True)[0] for t in terms(plain, x)]
    )
    d = deltas.movedim(features[0] - plain.table.dim(), -1).flatten(0, -2)
    count = plain.table.numel() // WIDTH
    a, b = torch.eye(count, dtype=x.dtype) / count, d.T @ d / len(x)
    order = [axis for axis in range(plain.table.dim()) if axis not in (*features, *rows)]
    gradient = deltas.sum((0, 1)).reshape(plain.table.shape) / len(x)
    flat = gradient.permute(*order, *features, *rows).reshape(WIDTH, count)
    rho_a, rho_b = damping(options.get("damping_mode", "trace"), a, b, 1, 2)
    want = -LR * power(b, rho_b, 1) @ flat @ power(a, rho_a, 1)
    found = got.permute(*order, *features, *rows).reshape(WIDTH, count)
    assert (found - want).norm() < 1e-8 * want.norm()


def test_two_micro_batches_equal_one_batch() -> None:
    x, steps = data("positions"), []
    for parts in (1, 2):
        torch.manual_seed(0)
        net = mupass.transform(Tabled("positions").double(), x, base=BASE)
        optimizer = mupass.KFAC(net, LR, RHO, **OPTIONS)
        for part in x.chunk(parts):
            (terms(net, part).sum() / len(x)).backward()
        steps.append(moved(net, optimizer.step))
    for name, want in steps[0].items():
        torch.testing.assert_close(steps[1][name], want, rtol=1e-9, atol=1e-12)


class Reading(nn.Module):
    """A table that is cut, picked from, spread or turned before activations are joined to it."""

    def __init__(self, kind: str, width: int = WIDTH) -> None:
        super().__init__()
        self.kind = kind
        grown = {WIDTH: width, WIDTH // 2: width // 2}
        self.table = nn.Parameter(torch.randn([grown.get(size, size) for size in READINGS[kind][0]]))
        self.register_buffer("index", torch.tensor([3, 0, 3, 6, 1]))
        self.register_buffer("mask", torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0])[:, None])
        self.inp = nn.Linear(3, width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def copies(self, x: Tensor) -> Tensor:
        """Return the copies before they are spread out to all samples."""
        return READINGS[self.kind][1](self, self.table, x)

    def join(self, h: Tensor, copies: Tensor) -> Tensor:
        """Join the copies to activations."""
        return READINGS[self.kind][2](h, copies)

    def forward(self, x: Tensor) -> Tensor:
        h = self.join(self.inp(x), self.copies(x))
        return self.out(torch.tanh(self.mix(torch.tanh(h))).mean(1))


def plus(h: Tensor, t: Tensor) -> Tensor:
    return h + t


def plus_in_place(h: Tensor, t: Tensor) -> Tensor:
    h = h * 1
    h += t
    return h


def before(h: Tensor, t: Tensor) -> Tensor:
    return torch.cat([t, h], 1)


def masked(h: Tensor, t: Tensor) -> Tensor:
    return torch.where(h.detach()[..., :1] > 0, h, t)


def masked_attention(h: Tensor, t: Tensor) -> Tensor:
    q = h.transpose(0, 1)
    eye, width = torch.eye(h.shape[-1], dtype=h.dtype), h.shape[-1]
    weights = torch.cat([eye, eye, eye])
    found = F.multi_head_attention_forward(
        q, q, q, width, 2, weights, None, None, None, False, 0.0, eye, None, attn_mask=t, need_weights=False
    )
    return found[0].transpose(0, 1)


def queries(h: Tensor, t: Tensor) -> Tensor:
    q = t.transpose(0, 1)
    eye, width = torch.eye(h.shape[-1], dtype=h.dtype), h.shape[-1]
    weights = torch.cat([eye, eye, eye])
    found = F.multi_head_attention_forward(
        q, q, q, width, 2, weights, None, None, None, False, 0.0, eye, None, need_weights=False
    )
    return h.mean(1, keepdim=True) + found[0].transpose(0, 1)


def attended(h: Tensor, t: Tensor) -> Tensor:
    q = h.unflatten(2, (-1, 2)).transpose(1, 2)
    return h + F.scaled_dot_product_attention(q, q, q, attn_mask=t).transpose(1, 2).flatten(2)


# Shape of the table, how it is copied, how copies are joined.
READINGS: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "slice": ((9, WIDTH), lambda m, t, x: t[: x.shape[1]], plus),
    "slice, batch": ((1, 9, WIDTH), lambda m, t, x: t[:, 1 : x.shape[1] + 1], plus_in_place),
    "index": ((7, WIDTH), lambda m, t, x: t[m.index], plus),
    "index of every sample": (
        (7, WIDTH),
        lambda m, t, x: t[m.index[None] - torch.arange(len(x))[:, None]],
        plus,
    ),
    "index_select": ((7, WIDTH), lambda m, t, x: t.index_select(0, m.index).unsqueeze(0), plus),
    "select": ((3, WIDTH), lambda m, t, x: t[1], plus),
    "features first": ((WIDTH, 7), lambda m, t, x: t[:, m.index].T, plus),
    "permuted": ((5, 1, WIDTH), lambda m, t, x: t.permute(1, 0, 2), plus),
    "token": ((1, 1, WIDTH), lambda m, t, x: t.expand(len(x), -1, -1), before),
    "tokens": ((2, WIDTH), lambda m, t, x: t[None].repeat(len(x), 1, 1), before),
    "queries of attention": ((5, WIDTH), lambda m, t, x: t[None].repeat(len(x), 1, 1), queries),
    "one for all": ((1, 1, WIDTH), lambda m, t, x: t.expand(len(x), 5, -1), masked),
    "split features": ((WIDTH,), lambda m, t, x: t.view(1, -1, 1, 2).permute(0, 2, 1, 3).flatten(2), plus),
    "of numbers": ((5, WIDTH), lambda m, t, x: 3 - 2 * t, lambda h, t: h * t),
    "with a mask": ((5, WIDTH), lambda m, t, x: m.mask + t, plus),
    "no features": ((7,), lambda m, t, x: t[m.index][:, None], plus),
    "mask of nn.MultiheadAttention": (
        (7,),
        lambda m, t, x: t[(m.index[:, None] - m.index).abs()],
        masked_attention,
    ),
    "relative positions": (
        (7, WIDTH // 2),
        lambda m, t, x: t[(m.index[:, None] - m.index).abs().view(-1)].view(5, 5, -1).permute(2, 0, 1)[None],
        attended,
    ),
}


# Of what copies are joined to, where it is not (4, 5, WIDTH).
SHAPES = {"relative positions": (4, WIDTH // 2, 5, 5), "mask of nn.MultiheadAttention": (8, 5, 5)}


def by_features(kind: str, tensor: Tensor) -> Tensor:
    """Lay copies in the shape of what they are joined to, or the table, out as ``[rows, features]``."""
    if kind == "relative positions":
        return (tensor.movedim(1, -1) if tensor.dim() == 4 else tensor).flatten(0, -2)
    if kind in ("no features", "mask of nn.MultiheadAttention"):
        return tensor.reshape(-1, 1)
    if kind == "features first" and tensor.dim() == 2:
        return tensor.T
    return tensor.reshape(-1, WIDTH)


@pytest.mark.thin(2)
@pytest.mark.sample
@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}, {"damping_mode": "absolute"}], ids=str)
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("kind", READINGS)
def test_readings_equal_the_dense_formula(kind: str, compiled: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    plain, got = step_of_table(Reading, kind, x, compiled, options)

    def spread(table: Tensor) -> Tensor:
        copies = READINGS[kind][1](plain, table, x)
        joined = SHAPES.get(kind, (4, 5, WIDTH))
        return copies if READINGS[kind][2] is before else copies.expand(joined)

    # Copies are linear in the table: their derivative tells which row each of them is, times a number.
    jacobian: Any = torch.autograd.functional.jacobian(spread, plain.table.detach())
    first = by_features(kind, jacobian.flatten(-plain.table.dim()).sum(-1))[:, 0]
    numbers = jacobian.flatten(-plain.table.dim()).unbind(-1)
    at = torch.stack([by_features(kind, number)[:, 0] for number in numbers], -1)
    rows = torch.stack([by_features(kind, r.reshape(plain.table.shape))[:, 0] for r in at]) / first[:, None]
    leaf = spread(plain.table).detach().requires_grad_()
    plain.copies = lambda _: leaf
    deltas = [torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in terms(plain, x)]
    parts = [by_features(kind, delta) * first[:, None] for delta in deltas]
    if rows.shape[1] == 1 and "sharing" in options:  # a vector has one gradient a sample
        parts = [part.sum(0, keepdim=True) for part in parts]
    d = torch.cat(parts)
    a, b = rows.T @ rows / len(rows), d.T @ d / len(x)
    gradient = rows.T @ by_features(kind, sum(deltas)) * first[0] / len(x)
    grows = 1 if plain.table.dim() == 1 and kind != "split features" else 2
    rho_a, rho_b = damping(options.get("damping_mode", "trace"), a, b, 1, grows)
    want = -LR * power(b, rho_b, 1) @ gradient.T @ power(a, rho_a, 1)
    assert want.norm() > 0 and (by_features(kind, got).T - want).norm() < 1e-8 * want.norm()


class Queries(nn.Module):
    """Learned queries that attend to each other, as in the first layer of DETR's decoder."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.added = added
        self.queries, self.inp = nn.Parameter(torch.randn(5, WIDTH)), nn.Linear(3, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, q = self.inp(x).mean(1, keepdim=True), self.queries[None].repeat(len(x), 1, 1)
        if self.added:  # the same numbers, as an activation
            q = q + 0 * h
        return self.out(torch.tanh(h + self.attention(q, q, q, need_weights=False)[0]).mean(1))


def test_a_table_that_attends_to_itself_is_one_input() -> None:
    x, steps = torch.randn(4, 6, 3, dtype=torch.float64), []
    for added in (False, True):
        torch.manual_seed(0)
        net = mupass.transform(Queries(added).double(), x)
        optimizer = mupass.KFAC(net, lr=LR)
        (terms(net, x).sum() / len(x)).backward()
        steps.append(moved(net, optimizer.step))
    for name, want in steps[1].items():
        if "attention" in name:
            torch.testing.assert_close(steps[0][name], want, rtol=1e-9, atol=1e-12)
    assert steps[0]["attention.in_proj_weight"].norm() > 0


REFUSED: dict[str, tuple[tuple[int, ...], Any, str]] = {
    "sum of two rows": ((3, WIDTH), lambda m, t, x: t[1] + t[2], "joins no activation"),
    "exponential": ((5, WIDTH), lambda m, t, x: torch.exp(t), "aten.exp"),
    "cut features": (
        (5, WIDTH),
        lambda m, t, x: t.view(5, 2, -1)[:, :1].expand(-1, 2, -1).flatten(1),
        "features",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_copy_of_rows_falls_back_by_name(kind: str) -> None:
    READINGS[kind] = (*REFUSED[kind][:2], plus)
    x = torch.randn(4, 5, 3)
    optimizer = mupass.KFAC(mupass.transform(Reading(kind), x, base=BASE))
    reasons = {c.parameter: c.reason for c in optimizer.coverage() if c.treatment == "adamw"}
    del READINGS[kind]
    assert list(reasons) == ["table"] and REFUSED[kind][2] in reasons["table"]


class Masked(nn.Linear):
    """A weight that is multiplied with a constant mask is no table."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.register_buffer("mask", torch.ones(width, width).tril())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def test_a_masked_weight_falls_back_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.mask, self.out = nn.Linear(3, WIDTH), Masked(WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mask(torch.tanh(self.inp(x))))).mean(1)

    net = mupass.transform(Net().double(), data("positions"), base=BASE)
    optimizer = mupass.KFAC(copy.deepcopy(net))
    reasons = {c.parameter: c.reason for c in optimizer.coverage() if c.treatment == "adamw"}
    assert list(reasons) == ["mask.weight"]
    assert "no activation" in reasons["mask.weight"]
