"""Inverse roots: both methods against float64, up to where rounding errors take over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mupass._optim.kronecker import factor_stack
from mupass._optim.linalg.newton import largest_eigenvalues, newton_roots, root_index
from mupass._optim.linalg.packed import (
    LOOKED_UP,
    _places_of_entries,
    blend,
    pack,
    packed_diagonal,
    packed_size,
    squared_lengths,
    unpack,
)
from mupass._optim.linalg.roots import eigenbases, inverse_roots

N = 48


def matrices(condition: float) -> Tensor:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, N, N, dtype=torch.float64)).Q
    return (q * condition ** -torch.linspace(0, 1, N, dtype=torch.float64)) @ q.mT


def root(m: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(m.double())
    return (vectors * values[:, None, :].pow(-power)) @ vectors.mT


def error(found: Tensor, want: Tensor) -> float:
    return float(((found.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).max())


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_roots_in_double_precision(p: int, condition: float, method: str) -> None:
    m = matrices(condition)
    zero = torch.zeros(3, dtype=torch.float64)
    found, failed = inverse_roots(m, zero, 1 / p, method=method)
    assert not failed.any()
    assert error(found, root(m, 1 / p)) < 1e-9


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("condition", [1.0, 50.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("power", [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 8, 0.3])
def test_roots_in_single_precision(power: float, condition: float) -> None:
    # Rounding errors are 6e-8 of the largest eigenvalue: that is 6e-4 of the smallest at condition 1e4.
    m = matrices(condition).float()
    found, failed = inverse_roots(m, torch.zeros(3), power, method="eigh")
    assert not failed.any() and error(found, root(m, power)) < 1e-5
    if root_index(power):
        found, failed = inverse_roots(m, torch.zeros(3), power, method="newton")
        assert not failed.any() and error(found, root(m, power)) < 1e-5


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("condition", [1e6, 1e8, 1e12])
def test_roots_stay_bounded_beyond(condition: float, p: int) -> None:
    m = matrices(condition).float()
    found, solved = newton_roots(m, torch.zeros(3), p)
    bound = (6e-8 * N) ** (-1 / p)  # no smaller eigenvalue can be told from zero
    assert found.isfinite().all()
    assert (torch.linalg.matrix_norm(found[solved], 2) < 10 * max(bound, condition ** (1 / p))).all()
    damped, failed = inverse_roots(m, torch.full((3,), 1e-4), 1 / p, method="newton")
    assert not failed.any()
    assert torch.linalg.matrix_norm(damped, 2).max() < 1.01 * 1e-4 ** (-1 / p)


@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_damping_relative_to_the_largest_eigenvalue(method: str) -> None:
    m = matrices(1e3) * torch.tensor([1.0, 1e-6, 1e6], dtype=torch.float64)[:, None, None]
    rho = torch.full((3,), 0.03, dtype=torch.float64)
    found, failed = inverse_roots(m, rho, 0.25, relative=True, method=method)
    top = torch.linalg.eigvalsh(m)[:, -1]
    eye = torch.eye(N, dtype=torch.float64)
    assert not failed.any()
    assert error(found, root(m + 0.03 * top[:, None, None] * eye, 0.25)) < 1e-3
    assert ((largest_eigenvalues(m) / top - 1).abs() < 0.05).all()


def test_what_newton_does_not_solve_is_decomposed() -> None:
    m = torch.stack([matrices(1e2)[0], torch.diag(torch.logspace(0, -30, N, dtype=torch.float64))])
    found, failed = inverse_roots(m, torch.zeros(2, dtype=torch.float64), 1.0, method="newton")
    assert not failed.any() and error(found[:1], root(m[:1], 1.0)) < 1e-9
    assert error(found[1:], torch.diag(torch.logspace(0, 30, N, dtype=torch.float64))[None]) < 1e-6


def test_a_failure_is_told_and_a_zero_matrix_is_none() -> None:
    m = torch.stack([torch.full((N, N), float("nan")), torch.zeros(N, N), torch.eye(N)])
    for method in ("eigh", "newton"):
        found, failed = inverse_roots(m, torch.zeros(3), 0.25, method=method)
        assert failed.tolist() == [True, False, False]
        assert (found[:2] == 0).all()
        torch.testing.assert_close(found[2], torch.eye(N))


@pytest.mark.parametrize("fault", ["NaN", "error"])
def test_what_single_precision_does_not_decompose_is_decomposed_in_double(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """LAPACK fails on some matrices of low rank in single precision, at times without an error."""
    eigh = torch.linalg.eigh
    rows = torch.randn(3, 4, 9)
    bank = rows.mT @ rows
    lost = torch.zeros(9, 9)  # fails in double precision too

    def failing(matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrices)
        for number, matrix in enumerate(matrices):
            fails = matrix.count_nonzero() == 0 or matrix.dtype == torch.float32 and matrix.equal(bank[1])
            if fails and fault == "error":
                raise torch.linalg.LinAlgError("the algorithm failed to converge")  # type: ignore[attr-defined]
            if fails:
                values[number] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors, found = eigenbases(torch.cat([bank, lost[None]]))
    assert found.tolist() == [True, True, True, False]
    assert not values[3].any() and not vectors[3].any()
    torch.testing.assert_close(vectors[:3] @ values[:3].diag_embed() @ vectors[:3].mT, bank)
    torch.testing.assert_close(vectors[:3].mT @ vectors[:3], torch.eye(9).expand(3, 9, 9), atol=1e-5, rtol=0)


def test_only_whole_roots_are_iterated() -> None:
    assert [root_index(x) for x in (1.0, 0.5, 1 / 3, 0.25, 0.125)] == [1, 2, 3, 4, 8]
    assert [root_index(x) for x in (0.0, 0.3, 2.0, 0.75, 1 / 9)] == [None] * 5


def test_a_bank_inverts_large_matrices_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 9, generator=generator, dtype=torch.float64)
    factors = x @ x.mT
    factors[3] = torch.nan
    bank = factor_stack.FactorStack(list(range(5)), (4, 4), torch.float64, torch.device("cpu"))
    bank.average({0: (factors, torch.ones(1, dtype=torch.bool))}, 0.0)
    bank.state["factor"][4] = torch.nan  # what no average lets in, to see which one is blamed
    monkeypatch.setattr(factor_stack, "AT_ONCE", 32)  # two at a time
    bank.refresh(torch.full((5,), 0.1, dtype=torch.float64), 1.0, [0, 1, 2, 4])
    assert bank.failed.tolist() == [0, 0, 0, 0, 1] and bank.overflowed.tolist() == [0, 0, 0, 1, 0]
    eye = torch.eye(4, dtype=torch.float64)
    roots = unpack(bank.state["root"], 4)
    torch.testing.assert_close(roots[:3] @ (factors[:3] + 0.1 * eye), eye.expand(3, 4, 4))
    assert not roots[3:].any()


@pytest.mark.parametrize("n", [1, 5, 16, 17, 100, LOOKED_UP, LOOKED_UP + 1, 400])
def test_packed_matrices_are_the_whole_ones(n: int) -> None:
    """By a table of places up to a size, by bands beyond."""
    half = torch.randn(2, n, n, dtype=torch.float64)
    whole, other = half + half.mT, half @ half.mT
    packed = pack(whole)
    assert packed.shape == (2, packed_size(n)) and n * (n + 1) / 2 <= packed_size(n) <= n * n
    assert torch.equal(unpack(packed, n), whole)
    # As compiled code finds them.
    assert torch.equal(packed[:, _places_of_entries(n, packed.device)], whole)
    assert torch.equal(packed_diagonal(packed, n), whole.diagonal(dim1=-2, dim2=-1))
    weight = torch.tensor([0.25, 1.0], dtype=torch.float64)
    blend(packed, other, weight)
    torch.testing.assert_close(unpack(packed, n), whole.lerp(other, weight[:, None, None]))
    # Rows of several matrices, in a memory of another order too.
    rows = torch.randn(2, n, 3, dtype=torch.float64).mT
    wanted = torch.einsum("kmi,kij,kmj->k", rows, unpack(packed, n), rows)
    torch.testing.assert_close(squared_lengths(rows, packed, n), wanted)
