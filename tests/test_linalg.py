"""Linear algebra keeps widths apart from data: every operator between two layers, at two sets of sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo.case import randn

import mupass

DATA = 5  # rows of data, never a width


class Between(nn.Module):
    """A layer, a function of its output [batch, DATA, d], and a readout of what is left of d."""

    def __init__(self, function: Callable[[Tensor], Tensor], d: int) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(3, d)
        self.head = nn.Linear(function(randn(2, DATA, d)).shape[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x)))


def gram(x: Tensor) -> Tensor:
    return x.mT @ x + torch.eye(x.shape[-1], device=x.device)


def lower(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(gram(x))


WIDE = {
    "inv": lambda x: torch.linalg.inv(gram(x)),
    "inverse": lambda x: torch.inverse(gram(x)),
    "inv_ex": lambda x: torch.linalg.inv_ex(gram(x))[0],
    "matrix_exp": lambda x: torch.linalg.matrix_exp(gram(x)),
    "matrix_power": lambda x: torch.linalg.matrix_power(gram(x), 3),
    "cholesky": lower,
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(gram(x))[0],
    "cholesky_inverse": lambda x: torch.cholesky_inverse(lower(x)),
    "pinv": lambda x: torch.linalg.pinv(x).mT,
    "eigh": lambda x: torch.linalg.eigh(gram(x))[1],
    "eigvalsh": lambda x: torch.linalg.eigvalsh(gram(x)),
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False)[2],
    "svd_full": lambda x: torch.linalg.svd(x, full_matrices=True)[2],
    "old_svd": lambda x: torch.svd(x)[2].mT,
    "qr": lambda x: torch.linalg.qr(x)[1],
    "qr_of_transpose": lambda x: torch.linalg.qr(x.mT)[0].mT,
    "lu": lambda x: torch.linalg.lu(gram(x))[1],
    "lu_of_rows": lambda x: torch.linalg.lu(x)[2],
    "lu_of_columns": lambda x: torch.linalg.lu(x.mT)[0],
    "lu_factor": lambda x: torch.linalg.lu_factor(gram(x))[0],
    "lu_factor_ex": lambda x: torch.linalg.lu_factor_ex(x.mT)[0].mT,
    "lu_unpack": lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x))[2],
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(gram(x)), x.mT).mT,
    "lu_solve_right": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(gram(x)), x, left=False),
    "geqrf": lambda x: torch.geqrf(x)[0],
    "vander": lambda x: torch.linalg.vander(x[0]),
    "matrix_rank": lambda x: x * torch.linalg.matrix_rank(gram(x))[:, None, None],
    "diagflat": lambda x: torch.diagflat(x[0, 0]),
    "row_stack": lambda x: torch.row_stack([x[0], x[1]]),
    "dsplit": lambda x: torch.dsplit(x.transpose(0, 1)[..., None], 1)[0].squeeze(-1),
    "window": lambda x: x * torch.blackman_window(DATA)[:, None],
    "hfft2": lambda x: torch.fft.hfft2(x.transpose(1, 2), s=(x.shape[2], 8)).mT,
    "solve": lambda x: torch.linalg.solve(gram(x), x.mT).mT,
    "solve_vector": lambda x: torch.linalg.solve(gram(x), x[:, 0]),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(lower(x), x.mT, upper=False).mT,
    "solve_right": lambda x: torch.linalg.solve(gram(x), x, left=False),
    "cholesky_solve": lambda x: torch.cholesky_solve(x.mT, lower(x)).mT,
    "lstsq": lambda x: torch.linalg.lstsq(gram(x), x.mT)[0].mT,
    "multi_dot": lambda x: torch.linalg.multi_dot([x[0], x[1].mT, x[1], x[0].mT, x[0]]),
    "tensordot": lambda x: torch.tensordot(x, gram(x)[0], dims=([2], [0])),
    "vecdot": lambda x: torch.linalg.vecdot(x, x.cos(), dim=1),
    "norm": lambda x: torch.linalg.norm(x, dim=1),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x.unflatten(1, (1, DATA)), dim=(1, 2)),
    "quantile": lambda x: torch.quantile(x, torch.tensor([0.1, 0.9]), dim=1),
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "cov": lambda x: torch.cov(x[0].mT),
    "rot90": lambda x: torch.rot90(x, 1, (1, 2)).mT,
    "rot180": lambda x: torch.rot90(x, 2, (1, 2)),
    "fliplr": lambda x: torch.fliplr(x),
    "kron": lambda x: torch.kron(x[0], torch.ones(2, 1)),
    "determinant": lambda x: x * torch.linalg.det(gram(x))[:, None, None],
    "slogdet": lambda x: x + torch.linalg.slogdet(gram(x))[1][:, None, None],
    "logdet": lambda x: x + torch.logdet(gram(x))[:, None, None],
    "dist": lambda x: x * torch.dist(x[0], x[1]),
    "cond": lambda x: x * torch.linalg.cond(gram(x))[:, None, None],
}
FIXED = {
    "pdist": lambda x: torch.pdist(x[0]),
    "data_norm": lambda x: torch.linalg.norm(x, dim=-1),
    "data_slogdet": lambda x: torch.stack(torch.linalg.slogdet(x @ x.mT), -1),
    "data_lu": lambda x: torch.linalg.lu(x)[0],
    "pivots": lambda x: torch.linalg.lu_factor(x)[1].to(x.dtype),
    "powers": lambda x: torch.linalg.vander(x.mean(-1), N=4),
    "all_powers": lambda x: torch.vander(x.mean(-1)[0]),
    "singular_values": lambda x: torch.linalg.svdvals(x),
    "data_eigenvectors": lambda x: torch.linalg.eigh(x @ x.mT)[1],
}


@pytest.mark.sample
@pytest.mark.parametrize("d", [16, 40])
@pytest.mark.parametrize("name", [*WIDE, *FIXED])
def test_widths_pass_through_linear_algebra(name: str, d: int) -> None:
    model = Between({**WIDE, **FIXED}[name], d)
    analysis = mupass.analyze(model, randn(2, DATA, 3))
    assert not [w for w in analysis.warnings if "no dimension rule" in w]
    assert analysis["head.weight"].infinite == (False, name in WIDE)
    assert analysis["layer.weight"].infinite == (True, False)


@pytest.mark.parametrize("function", [torch.cross, torch.linalg.cross])
def test_vectors_in_space_do_not_grow(function: Callable[..., Tensor]) -> None:
    class Spatial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.vectors, self.head = nn.Linear(3, 16), nn.Linear(16, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(self.vectors(self.layer(x).relu()), x, dim=-1))

    analysis = mupass.analyze(Spatial(), randn(2, DATA, 3))
    assert analysis["vectors.weight"].infinite == (False, True)


def test_a_pick_from_a_constant_says_nothing() -> None:
    def mask(x: Tensor) -> Tensor:
        return x * torch.ones_like(x)[:, :, 0].unsqueeze(-1)

    assert mupass.analyze(Between(mask, 16), randn(2, DATA, 3))["layer.weight"].infinite == (True, False)
