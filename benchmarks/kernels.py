"""What a network of infinite width reaches without learning features: kernel ridge regression.

Two kernels of a fully connected ReLU network without biases, weights of variance ``2 / fan_in`` behind a ReLU
and ``1 / fan_in`` behind the input: the NNGP kernel, of a network whose readout alone is trained, and the
NTK, of a network that is trained and stays close to its start (arXiv 1806.07572). Both are closed forms in
the angle of two inputs (arc-cosine kernels, Cho and Saul 2009).
"""

from __future__ import annotations

from math import inf, pi

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-2, 1.0)  # times the mean of the kernel's diagonal
ROWS = 1024  # of a kernel that are computed at once: what it is made of takes several times its memory


def kernels(x: Tensor, z: Tensor, hidden: int = 2) -> dict[str, Tensor]:
    """Return the kernels between rows of two matrices.

    Args:
        x: Inputs ``[n, d]``.
        z: Inputs ``[m, d]``.
        hidden: Number of hidden layers.

    Returns:
        ``nngp`` and ``ntk``, ``[n, m]`` each.
    """
    lengths = x.norm(dim=1)[:, None] * z.norm(dim=1)[None, :] / x.shape[1]
    nngp = x @ z.T / x.shape[1]
    ntk = nngp.clone()
    for _ in range(hidden):
        # The variance of 2 keeps lengths, so the cosine follows from them at every layer.
        cosine = (nngp / lengths).clamp(-1, 1)
        angle = torch.arccos(cosine)
        nngp = lengths * (torch.sqrt(1 - cosine.square()) + cosine * (pi - angle)) / pi
        ntk = nngp + ntk * (pi - angle) / pi
    return {"nngp": nngp, "ntk": ntk}


def kernel(name: str, x: Tensor, z: Tensor) -> Tensor:
    """Return one of the two kernels, computed in parts."""
    return torch.cat([kernels(rows, z)[name] for rows in x.split(ROWS)])


def ridge_losses(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the half mean squared error of each kernel on test data, for the best of `RIDGES` there.

    Choosing the ridge on the test data is in the kernels' favour. Takes about ``24 n^2`` bytes.

    Args:
        train: Inputs ``[n, d]`` and targets ``[n, 1]``.
        test: The same for ``m`` samples.
    """
    (x, y), (z, truth) = ((a.double(), b.double()) for a, b in (train, test))
    found = {}
    for name in ("nngp", "ntk"):
        among, across, best = kernel(name, x, x), kernel(name, z, x), inf
        unit = among.diagonal().mean()
        for ridge in RIDGES:
            damped = among.clone()
            damped.diagonal().add_(ridge * unit)
            weights = torch.cholesky_solve(y, torch.linalg.cholesky(damped))
            loss = 0.5 * (across @ weights - truth).square().mean().item()
            best = min(best, loss)
        found[name] = best
    return found
