"""Coverage and exactness of K-FAC beside kfac-pytorch, curvlinops and singd, one row a case.

The reference is dense and in float64: for every weight use, its rows and the derivatives of each sample's
loss by the rows' products, from autograd Jacobians (`benchmarks.parity_cases`); it is checked against the
model's own output and gradient before it is used. From it, and from each package's factors, the same update
is made,

    dW = (B + r tr(B) I)^-1  G  (A + r tr(A) I)^-1,   A = mean of x x^T over rows, B = sum of delta delta^T,

and a cell is its relative error over the row's parameters, up to one scalar a parameter: the packages scale
their factors differently, and trace damping makes that a scalar. For mupass it is the step that it really
takes. Where a package folds the bias into A (kfac-pytorch, singd), so does its reference. A weight used
several times has the sums over its uses; with transposed uses (tied), the Kronecker product nearest to the
sum of both.

    python -m benchmarks.kfac_parity               # half a minute; --compile adds a column, and minutes

``missing`` is a parameter that a package leaves out without a word; an error is shown by its class; ``falls
back`` is said by mupass's `coverage()`, with the reason below the table. curvlinops and singd average the
channels of groups, as they document. Peers: ``pip install curvlinops-for-pytorch singd`` and ``pip install
git+https://github.com/gpauloski/kfac-pytorch``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

import mupass
from benchmarks.parity_cases import CASES, WIDTH, Case, Stack, Tape

RHO = 0.03
Deltas = dict[str, Tensor]


@dataclass
class Factors:
    """Factors and gradient of one parameter, ``[matrices, n, n]``; with the mean row, for a folded bias."""

    stack: Stack
    a: Tensor
    b: Tensor
    gradient: Tensor

    def update(self) -> Tensor:
        return precondition(self.a, self.b, self.gradient)


@dataclass
class Problem:
    """A case with its data and its reference."""

    case: Case
    model: nn.Module
    x: Tensor
    y: Tensor
    factors: dict[str, Factors]
    folded: dict[str, Factors]

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), self.y)


def precondition(a: Tensor, b: Tensor, gradient: Tensor) -> Tensor:
    """Return ``(B + r tr B)^-1 G (A + r tr A)^-1`` for stacks of matrices."""

    def damped(m: Tensor) -> Tensor:
        trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
        return m + RHO * trace[..., None, None] * torch.eye(m.shape[-1], dtype=m.dtype)

    left = torch.linalg.solve(damped(b), gradient)
    return torch.linalg.solve(damped(a), left.mT).mT


# The reference ---------------------------------------------------------------------------------------------


def problem(case: Case) -> Problem:
    """Draw a case's model and data, and compute its reference."""
    torch.manual_seed(0)
    model, x = case.build().double(), case.inputs()
    y = torch.randint(case.classes, (len(x),))
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    first = Tape(parameters)
    torch.testing.assert_close(case.plain(first, x), model(x).detach())

    def losses(zeros: list[Tensor]) -> Tensor:
        return F.cross_entropy(case.plain(Tape(parameters, zeros), x), y, reduction="none")

    own = [torch.stack([j[n, :, n] for n in range(len(x))], 1) for j in jacrev(losses)(first.made)]
    F.cross_entropy(model(x), y).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    found = Problem(case, model, x, y, {}, {})
    for name in dict.fromkeys(u.name for u in first.uses):
        uses = [u for u in first.uses if u.name == name]
        pairs = [(u.rows, own[u.slot] if u.gain is None else own[u.slot] * u.gain) for u in uses]
        # A transposed use multiplies by the matrix' other side: its gradient comes transposed.
        sides = [(d, r) if u.transposed else (r, d) for u, (r, d) in zip(uses, pairs, strict=True)]
        gradient = sum(torch.einsum("knpo,knpi->koi", d, r) for r, d in sides) / len(x)
        torch.testing.assert_close(gradient, uses[0].stack(gradients[name]))
        a, b = tied(pairs) if any(u.transposed for u in uses) else pooled(pairs, case.reduce)
        found.factors[name] = Factors(uses[0].stack, a, b, gradient)
        bias = gradients.get(name.removesuffix("weight") + "bias") if name.endswith("weight") else None
        if (
            bias is not None
            and not any(u.gain is not None for u in uses)
            and not any(u.transposed for u in uses)
        ):
            augmented = [(torch.cat([r, torch.ones_like(r[..., :1])], -1), d) for r, d in pairs]
            a, b = pooled(augmented, case.reduce)
            column = bias.view(len(gradient), -1, 1)
            found.folded[name] = Factors(uses[0].stack, a, b, torch.cat([gradient, column], -1))
    return found


def pooled(pairs: list[tuple[Tensor, Tensor]], reduce: bool) -> tuple[Tensor, Tensor]:
    """Return A and B over all uses; in the reduce setting positions are averaged in x and summed in delta."""
    if reduce:
        pairs = [(r.mean(2, keepdim=True), d.sum(2, keepdim=True)) for r, d in pairs]
    count = sum(r.shape[1] * r.shape[2] for r, _ in pairs)
    a = sum(torch.einsum("knpi,knpj->kij", r, r) for r, _ in pairs) / count
    return a, sum(torch.einsum("knpi,knpj->kij", d, d) for _, d in pairs) / pairs[0][0].shape[1]


def tied(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the (A, B) whose Kronecker product is nearest to that of both uses together.

    The words' side of the second use keeps its diagonal only, as it has no more in the first. Van Loan and
    Pitsianis: the rearranged sum has rank 2, and its first singular pair is the answer.
    """
    (a1, b1), (a2, b2) = (pooled([p], False) for p in pairs)
    words = torch.stack([a1[0].flatten(), torch.diag(b2[0].diagonal()).flatten()], 1)
    features = torch.stack([b1[0].flatten(), a2[0].flatten()], 1)
    u, s, v = torch.linalg.svd(words @ features.T, full_matrices=False)
    sign = u[:, 0].sum().sign()
    a, b = (sign * s[0].sqrt() * m for m in (u[:, 0], v[0]))
    return a.view_as(a1), b.view_as(b1)


# The packages ----------------------------------------------------------------------------------------------


class Missing(Exception):
    """A package has nothing for a parameter."""


def error(got: Tensor, want: Tensor) -> float:
    """Return the relative distance, up to a scalar."""
    scale = (got * want).sum() / got.square().sum().clamp(min=1e-300)
    return ((scale * got - want).norm() / want.norm()).item()


def of_mupass(p: Problem, compiled: bool = False) -> tuple[float, dict[str, str]]:
    """Take one step of `mupass.KFAC`; return the worst error and why parameters fall back."""
    torch.manual_seed(0)
    model = mupass.transform(p.case.build().double(), p.x, base=WIDTH)
    model.load_state_dict(p.model.state_dict())
    # No floor: the reference has none, and at these sizes it binds on queries and keys.
    options: dict[str, Any] = {"damping_floor": 0.0, "sharing": "reduce" if p.case.reduce else "expand"}
    optimizer = mupass.KFAC(
        model,
        1.0,
        RHO,
        momentum=0.0,
        step_bound=None,
        kl_clip=None,
        fallback="sgd",
        fallback_lr=0.0,
        **options,
    )
    reasons = {c.parameter: c.reason for c in optimizer.coverage() if not c.treatment.startswith("kfac")}
    if any(n in reasons for n in p.case.subject):
        return 0.0, {n: reasons[n] for n in p.case.subject if n in reasons}
    before = {n: q.detach().clone() for n, q in model.named_parameters()}
    p.loss(torch.compile(model, fullgraph=True) if compiled else model).backward()
    optimizer.step()
    moved = {n: before[n] - q.detach() for n, q in model.named_parameters()}
    found = {n: p.factors[n] for n in p.case.subject}
    return max(error(f.stack(moved[n]), f.update()) for n, f in found.items()), {}


def compared(p: Problem, factors: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the worst error of updates made from a peer's factors, module name -> (A, B)."""
    errors = []
    if p.case.tied in factors:  # they see one of its two uses, the other way round
        factors = {p.case.subject[0].rpartition(".")[0]: factors[p.case.tied][::-1]}
    for name in p.case.subject:
        module, _, leaf = name.rpartition(".")
        if module not in factors or leaf not in ("weight", "bias"):
            raise Missing
        a, b = factors[module]
        # A bias folded into A is one more column of the weight.
        weight = p.factors[f"{module}.weight"]
        folded = a.shape[-1] == weight.a.shape[-1] + 1
        want = p.folded[f"{module}.weight"] if folded else p.factors[name]
        if leaf == "bias" and not folded:
            a = torch.ones(1, 1, dtype=b.dtype)
        groups, out = want.gradient.shape[:2]
        blocks = torch.stack([b[i : i + out, i : i + out] for i in range(0, groups * out, out)])
        got = precondition(a.expand(groups, *a.shape), blocks, want.gradient)
        errors.append(error(got, want.update()))
    return max(errors)


def of_kfac_pytorch(p: Problem) -> float:
    from kfac.preconditioner import KFACPreconditioner

    if p.case.reduce:
        raise Missing("no reduce setting")
    preconditioner = KFACPreconditioner(
        p.model, factor_decay=lambda step: 0.0, update_factors_in_hook=False, kl_clip=lambda step: None
    )
    p.loss(p.model).backward()
    preconditioner.step()
    layers = {name: layer for name, layer in preconditioner._layers.values()}
    return compared(p, {n: (layer.a_factor, layer.g_factor) for n, layer in layers.items()})


def of_curvlinops(p: Problem) -> float:
    from curvlinops import KFACLinearOperator

    approximation = "reduce" if p.case.reduce else "expand"
    operator = KFACLinearOperator(
        p.model,
        nn.CrossEntropyLoss(),
        list(p.model.parameters()),
        [(p.x, p.y)],
        fisher_type="empirical",
        kfac_approx=approximation,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    a, b = state["input_covariances"], state["gradient_covariances"]
    return compared(p, {n: (a[n], b[n]) for n in a})


def of_singd(p: Problem) -> float:
    from singd.optim.optimizer import SINGD

    approximation = "reduce" if p.case.reduce else "expand"
    optimizer = SINGD(p.model, T=1, kfac_approx=approximation, warn_unsupported=False)
    p.loss(p.model).backward()
    # Its preconditioners start at the identity, so that these are the factors themselves.
    layers = {n: (optimizer.H_Ks[n].to_dense(), optimizer.H_Cs[n].to_dense()) for n in optimizer.H_Ks}
    optimizer.step()
    return compared(p, layers)


PEERS: dict[str, Callable[[Problem], float]] = {
    "kfac-pytorch": of_kfac_pytorch,
    "curvlinops": of_curvlinops,
    "singd": of_singd,
}


def peer_cell(case: Case, peer: Callable[[Problem], float]) -> str:
    p = problem(case)  # a fresh model: peers leave hooks on it
    try:
        return f"{peer(p):.0e}"
    except Missing as why:
        return str(why) or "missing"
    except ImportError:
        return "not installed"
    except Exception as error:  # noqa: BLE001 a peer's failure is a result
        return type(error).__name__


def own_cell(case: Case, compiled: bool, reasons: dict[str, str]) -> str:
    try:
        worst, falls = of_mupass(problem(case), compiled)
    except (mupass.MupassError, TypeError) as error:  # TypeError: an option that is not there yet
        reasons[case.name] = f"{type(error).__name__}: {error}"
        return type(error).__name__
    if falls:
        reasons[case.name] = "; ".join(f"{n}: {why}" for n, why in falls.items())
    return "falls back" if falls else f"{worst:.0e}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="a column under torch.compile(fullgraph=True)")
    parser.add_argument("--only", nargs="+", help="names of cases, or parts of them")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # many models of one class in one process
    own = ["mupass", "mupass, compiled"] if options.compile else ["mupass"]
    columns = [*own, *PEERS]
    print(f"{'':<30}" + "".join(f"{c:>20}" for c in columns))
    reasons: dict[str, str] = {}
    exact = 0
    chosen = [c for c in CASES if not options.only or any(part in c.name for part in options.only)]
    for case in chosen:
        cells = [own_cell(case, c != "mupass", reasons) for c in own]
        exact += cells[0][0].isdigit() and float(cells[0]) < 1e-6
        cells += [peer_cell(case, peer) for peer in PEERS.values()]
        print(f"{case.name:<30}" + "".join(f"{c:>20}" for c in cells), flush=True)
    print(f"relative error of the update, float64; mupass exact in {exact} of {len(chosen)} rows")
    for name, why in reasons.items():
        print(f"{name}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
