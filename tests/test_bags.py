"""K-FAC on tables of which sums or means of rows are read: updates against dense factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kfac import LR, PLAIN, RHO, damping, moved, power
from torch import Tensor, nn

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WIDTH, BASE, WORDS = 8, 4, 6
OPTIONS: dict[str, Any] = {"damping_floor": 0.0, **PLAIN}
# In the short tier eager models; a graph for every case takes a second each.
COMPILED = [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
IDS = torch.tensor([[3, 1, 0, 1], [5, 5, 2, 0], [0, 4, 1, 2]])
FLAT, STARTS = torch.tensor([3, 1, 0, 1, 5, 2, 0]), torch.tensor([0, 2, 6])
WEIGHTS = torch.linspace(0.5, 2, len(FLAT), dtype=torch.float64)
# Arguments of the module, those of its call, and weights of readings.
BAGS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], Tensor | None]] = {
    "mean": ({}, (IDS,), None),
    "sum of unequal bags": ({"mode": "sum"}, (FLAT, STARTS), None),
    "mean of unequal bags": ({}, (FLAT, STARTS), None),
    "weights": ({"mode": "sum"}, (FLAT, STARTS), WEIGHTS),
    "no word": ({"padding_idx": 0}, (FLAT, STARTS), None),
}


class Words(nn.Module):
    """A bag of words and two layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, WIDTH, **BAGS[kind][0])
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.kind = kind

    def forward(self, *inputs: Tensor) -> Tensor:
        h = self.bag(*inputs, per_sample_weights=BAGS[self.kind][2])
        return self.out(torch.tanh(self.mix(torch.tanh(h))))


def terms(out: Tensor) -> Tensor:
    return (out - 1).square().sum(1)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}], ids=str)
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("kind", BAGS)
def test_update_equals_that_of_a_look_up_with_a_sum_behind_it(
    kind: str, compiled: bool, options: dict[str, Any]
) -> None:
    made, inputs, weights = BAGS[kind]
    torch.manual_seed(0)
    net: Any = mupass.transform(Words(kind).double(), inputs, base=BASE)
    optimizer = mupass.KFAC(net, LR, RHO, strict=True, **OPTIONS, **options)
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    out = run(*inputs)
    plain = Words(kind).double()
    plain.load_state_dict(net.state_dict())
    # The reference: look-ups, of which each bag is a sum with weights written out.
    ids = inputs[0].flatten()
    starts = inputs[1].tolist() if len(inputs) > 1 else [0, 4, 8]
    bags = torch.bucketize(torch.arange(len(ids)), torch.tensor(starts), right=True) - 1
    shares = torch.ones(len(ids), dtype=torch.float64) if weights is None else weights
    if "padding_idx" in made:
        shares = shares * (ids != made["padding_idx"])
    matrix = F.one_hot(bags).double().T * shares
    if made.get("mode") != "sum":
        matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1)  # one bag is empty
    looked_up = plain.bag.weight.detach()[ids].requires_grad_()
    h = matrix @ looked_up
    wanted = plain.out(torch.tanh(plain.mix(torch.tanh(h))))
    torch.testing.assert_close(out, wanted)
    terms(out).mean().backward()
    got = moved(net, optimizer.step)["bag.weight"]
    deltas = [torch.autograd.grad(t, looked_up, retain_graph=True)[0] for t in terms(wanted)]
    d, rows = torch.cat(deltas), F.one_hot(ids, WORDS).double()
    a, b = rows.T @ rows / len(rows), d.T @ d / len(deltas)
    gradient = rows.T @ sum(deltas) / len(deltas)
    rho_a, rho_b = damping("trace", a, b, 1, 2)
    want = -LR * power(a, rho_a, 1) @ gradient @ power(b, rho_b, 1)
    assert (got - want).norm() < 1e-8 * want.norm()


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones_while_sizes_move() -> None:
    """From the second size on the graph has sizes that are not known when it is made."""
    torch._dynamo.reset()  # other tests have compiled the same code, and Dynamo counts
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net: Any = mupass.transform(Words("no word").double(), BAGS["no word"][1], base=BASE)
        optimizer = mupass.KFAC(net, LR, RHO, strict=True, **OPTIONS)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        for size in (7, 6, 5):
            out = run(FLAT[:size], STARTS.clamp(max=size - 1))
            optimizer.zero_grad()
            terms(out).mean().backward()
            optimizer.step()
        weights.append(net.bag.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-8, atol=1e-12)


def test_bags_of_largest_entries_fall_back_by_name() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(WORDS, WIDTH, mode="max"), nn.Linear(WIDTH, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.bag(ids)))

    optimizer = mupass.KFAC(mupass.transform(Largest(), IDS, base=BASE))
    reasons = {c.parameter: c.reason for c in optimizer.coverage() if c.treatment == "adamw"}
    assert list(reasons) == ["bag.weight"] and "largest" in reasons["bag.weight"]
