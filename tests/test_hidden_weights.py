"""Casts, copies and products with one that stand between a weight and its operator hide nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

# Between the parameter and the product; K-FAC sees through the first kind, the second goes to the fallback.
SEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "type_as": lambda w, x: w.type_as(x),
    "to tensor": lambda w, x: w.to(x),
    "to dtype and back": lambda w, x: w.double().to(x.dtype),
    "type": lambda w, x: w.type(x.dtype),
    "contiguous": lambda w, x: w.contiguous(),
    "clone": lambda w, x: w.clone(),
    "transposed twice": lambda w, x: w.t().contiguous().t(),
    "transposed by names": lambda w, x: w.transpose(dim0=0, dim1=1).transpose(0, dim1=1),
    "axes swapped by names": lambda w, x: torch.swapaxes(input=w, axis0=0, axis1=1).swapaxes(
        axis0=1, axis1=0
    ),
    "permuted by names": lambda w, x: torch.t(input=w).permute(dims=(1, 0)),
    "all of it": lambda w, x: w[:, :],
    "from its start": lambda w, x: w[0:],
    "every one": lambda w, x: w[::1],
    "the last axis": lambda w, x: w[..., :],
    "all axes": lambda w, x: w[...],
    "flat and back": lambda w, x: w.flatten().view(w.shape),
}
UNSEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "half and back": lambda w, x: w.half().float() * 1.0,
    "times one": lambda w, x: w * 1.0,
    "one times": lambda w, x: 1.0 * w,
    "over one": lambda w, x: w / 1.0,
    "plus zero": lambda w, x: w + 0.0,
    "times a tensor": lambda w, x: w * torch.ones((), dtype=x.dtype),
    "times a number of the data": lambda w, x: w * (x.abs().mean() * 0 + 1),
    "view_as": lambda w, x: w.view_as(w),
    "expand_as": lambda w, x: w.expand_as(w),
    "stacked": lambda w, x: torch.stack([w])[0],
    "straight through": lambda w, x: w + (w.sign() * w.abs().mean() - w).detach(),
    "masked": lambda w, x: torch.where(w > -1e9, w, torch.zeros_like(w)),
    "dropped out": lambda w, x: F.dropout(w, 0.0),
    "centred": lambda w, x: w - w.mean(),
}


class Hidden(nn.Linear):
    """A linear layer whose weight goes through a function first."""

    def __init__(self, fan_in: int, fan_out: int, through: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(fan_in, fan_out)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.through(self.weight, x), self.bias)


def build(through: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), Hidden(64, 256, through), nn.ReLU(), Hidden(256, 5, through)
    )


def plain(w: Tensor, x: Tensor) -> Tensor:
    return w


def geometry(model: nn.Module) -> dict[str, object]:
    found = mupass.analyze(model, torch.zeros(8, 20), base=32).geometries
    return {g.name: (g.role, g.infinite, g.base_shape, g.fan_in_axes, g.fan_out_axes) for g in found}


def stepped(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Take one step of K-FAC and return the model, with what took each parameter."""
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)).double()
    mupass.transform(model, x, base=32)
    optimizer = mupass.KFAC(model, lr=0.01)
    F.cross_entropy(model(x), torch.arange(8) % 5).backward()
    optimizer.step()
    return model, {c.parameter: c.treatment for c in optimizer.coverage()}


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_what_stands_between_a_weight_and_its_operator_hides_nothing(name: str) -> None:
    assert geometry(build((SEEN | UNSEEN)[name])) == geometry(build(plain))


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("name", SEEN)
def test_kfac_steps_as_for_the_plain_weight(name: str) -> None:
    right, covered = stepped(build(plain).double())
    model, found = stepped(build(SEEN[name]).double())
    assert found == covered
    for a, b in zip(model.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", UNSEEN)
def test_kfac_names_the_weights_that_it_does_not_see(name: str) -> None:
    model = build(UNSEEN[name])
    mupass.transform(model, torch.zeros(8, 20), base=32)
    left = {c.parameter: c for c in mupass.KFAC(model, lr=0.01).coverage() if c.treatment == "adamw"}
    assert set(left) == {"2.weight", "4.weight"}
    assert all(c.reason for c in left.values())


@pytest.mark.parametrize("how", ["addmm_", "baddbmm_", "addbmm_"])
def test_products_that_are_added_in_place_are_seen(how: str) -> None:
    class InPlace(nn.Module):
        def __init__(self, in_place: bool):
            super().__init__()
            self.in_place = in_place
            self.enter, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
            self.weight = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.enter(x))
            if not self.in_place:
                return self.head(h + h @ self.weight)
            if how == "addmm_":
                return self.head(h.clone().addmm_(h, self.weight))
            if how == "baddbmm_":
                return self.head(h[None].clone().baddbmm_(h[None], self.weight[None])[0])
            return self.head(h.clone().addbmm_(h[None], self.weight[None]))

    x, moved = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = mupass.transform(InPlace(in_place).double(), x, base=16)
        optimizer = mupass.KFAC(net, lr=0.01, kl_clip=None, damping_floor=0.0)
        before = net.weight.detach().clone()
        net(x).square().mean().backward()
        optimizer.step()
        treated = {c.parameter: c.treatment for c in optimizer.coverage()}
        moved.append((treated["weight"], net.weight.detach() - before))
    (plain, right), (found, move) = moved
    if how == "addmm_":
        assert found == plain == "kfac linear"
    if found == plain:
        torch.testing.assert_close(move, right)
    assert move.norm() > 0
