"""K-FAC's update of one matrix, as pure tensor code: it runs as it is, or compiled for each shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mupass._optim.linalg.packed import squared_lengths, unpack
from mupass._optim.matrix.block_stack import compiled, compiles
from mupass._taps.pieces import cut, paste

Product = Callable[[Tensor, tuple[Tensor, ...], int, bool], Tensor]


class Root(NamedTuple):
    """The inverse root of one side.

    Attributes:
        product: Multiplies a stack by it.
        tensors: What that needs.
        size: Of the packed matrices among them; 0 where they are whole, or diagonals.
        grown: By how much factors have grown since, one entry for each.
        power: Power of the inverse.
    """

    product: Product
    tensors: tuple[Tensor, ...]
    size: int
    grown: Tensor
    power: float


class Average(NamedTuple):
    """The average of a factor.

    Attributes:
        kept: Packed, whole or diagonal, not corrected for its start.
        size: As for a root.
        weight: What it is to be divided by, one entry for each.
    """

    kept: Tensor
    size: int
    weight: Tensor


def update(
    stack: Tensor,
    b: Root | None,
    a: Root | None,
    factor: Average | None,
    rho: Tensor | None,
    unit: Tensor | None,
    unit_power: float,
    shrink: float,
    longer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the directions ``D`` of one matrix, or of several, and ``tr(D A D^T)`` of each.

    With ``D = H (A + rho)^-1``, ``D A = H - rho D``: no further product is needed while the root is that of
    the present A.

    Args:
        stack: Gradients, ``[groups, out, in]``.
        b: Root on the output side.
        a: Root on the input side; None where A is the number 1.
        factor: A, to multiply by.
        rho: Damping of A where that is not needed.
        unit: Damping of the number 1.
        unit_power: Power of that inverse.
        shrink: What steps are divided by where factors are cut into more blocks than at the base width.
        longer: What directions are multiplied by, one entry for each; None for nothing.
    """
    # H = B^-1 G, D = H A^-1
    half = _times_root(stack, b, True)
    direction = _times_root(half, a, False)
    # Roots that are older than their factors count as if they had followed their size.
    divisor = _followed(b, stack) * _followed(a, stack) * shrink
    if longer is not None:
        divisor = divisor / longer
    # The inverse of the number 1 with its damping is (1 + rho)^-e.
    if unit is not None:
        divisor = divisor * (1 + unit) ** unit_power
    # A = 1: outputs change by D itself.
    if a is None:
        change = _inner(direction, direction)
    # A has changed since its root, or the root is no plain inverse: multiply by A.
    elif factor is not None:
        change = _output_change(direction, factor) / _first_of_each(factor.weight, stack)
    else:
        assert rho is not None
        # <D, D A> with D A = H - rho D
        change = _inner(direction, half) - rho * _inner(direction, direction)
    return direction / divisor.view(-1, 1, 1), change.clamp(min=0.0) / divisor.square()


def tangent(stack: Tensor, rows: Tensor, b: Root | None, a: Root | None) -> Tensor:
    """Return gradients with what of them changes the lengths of rows exchanged, so that directions do not.

    A standardized kernel is ``W = diag(lengths) U``, with U of rows of length 1. Its gradient lacks the part
    along each row of U, and the direction that is steepest in K-FAC's metric among all that keep these
    lengths is ``D = B^-1 (G - diag(mu) U) A^-1`` with mu such that each row of D is orthogonal to that of U::

        sum over j of  (B^-1)_ij (U A^-1 U^T)_ij mu_j  =  row i of (B^-1 G A^-1) . row i of U

    The solution is the same whatever multiple of each row of U the gradient holds, so that nothing is lost
    with the part that it lacks.

    Args:
        stack: Gradients by U, ``[groups, out, in]``.
        rows: U, of the same shape; zero where a row has no direction.
        b: Root on the output side.
        a: Root on the input side.
    """
    turned = _times_root(rows, a, False)  # U A^-1
    wanted = (_times_root(stack, b, True) * turned).sum(-1, keepdim=True)
    identity = torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device).expand(len(stack), -1, -1)
    # The product entry by entry of two semi-definite matrices is one, too.
    system = _times_root(identity, b, True) * (turned @ rows.mT)
    # Scaled to a diagonal of ones; rows without a direction, or without a root, stand by themselves.
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    smallest = torch.finfo(stack.dtype).tiny
    scale = torch.where(alive, diagonal.clamp(min=smallest).rsqrt(), 0.0)[..., None]
    # What rounding may take from its smallest eigenvalue is added: that leaves a little of the row itself.
    added = torch.where(alive, torch.finfo(stack.dtype).eps * stack.shape[1], 1.0)
    scaled = scale * system * scale.mT + torch.diag_embed(added)
    lower, failed = torch.linalg.cholesky_ex(scaled)
    # Where it has no factorization after all, each row keeps its own length alone, as the diagonal says.
    lower = torch.where(failed[:, None, None] > 0, identity, lower)
    return stack - scale * torch.cholesky_solve(scale * wanted, lower) * rows


def _times_root(stack: Tensor, root: Root | None, left: bool) -> Tensor:
    """Multiply by the root of one side, if there is one."""
    if root is None:
        return stack
    return root.product(stack, root.tensors, root.size, left)


def _followed(root: Root | None, stack: Tensor) -> Tensor:
    """Return by what the factors of a side have grown since their root, to its power; one entry a matrix."""
    if root is None:
        return stack.new_ones(len(stack))
    return _first_of_each(root.grown, stack).pow(root.power)


def _output_change(direction: Tensor, factor: Average) -> Tensor:
    """Return ``tr(D A D^T)`` of each direction, for what is kept of A before its weight."""
    if factor.size and len(factor.kept) == len(direction):
        return squared_lengths(direction, factor.kept, factor.size)
    return _inner(direction, times(direction, whole(factor.kept, factor.size), False))


def _first_of_each(numbers: Tensor, stack: Tensor) -> Tensor:
    """Return one entry a matrix: the blocks of a factor have the same, and the first stands for all."""
    return numbers.view(len(stack), -1)[:, 0]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Return the sums of the products of entries, one for each matrix of two stacks."""
    return (x * y).sum((1, 2))


def whole(kept: Tensor, size: int) -> Tensor:
    """Return matrices that are packed, or what is whole or diagonal as it is.

    Args:
        kept: The matrices.
        size: Their size where they are packed, else 0.
    """
    if size:
        return unpack(kept, size)
    return kept


def by_root(stack: Tensor, tensors: tuple[Tensor, ...], size: int, left: bool) -> Tensor:
    """Multiply by roots, see `Root`."""
    return times(stack, whole(tensors[0], size), left)


def by_eigenbasis(stack: Tensor, tensors: tuple[Tensor, ...], size: int, left: bool) -> Tensor:
    """Multiply by damped inverses ``U (diag(values) + rho)^-1 U^T``, see `Root`."""
    basis, damped = tensors
    # U^T G from the left, or G U from the right, and back again.
    to_basis, from_basis = (basis.mT, basis) if left else (basis, basis.mT)
    turned = times(stack, to_basis, left)
    return times(times(turned, inverse(damped), left), from_basis, left)


def inverse(damped: Tensor) -> Tensor:
    """Return inverses; zero where nothing was ever seen and nothing is added, as under a zero readout.

    Args:
        damped: What is inverted, at least zero.
    """
    return torch.where(damped > 0, 1 / damped.clamp(min=torch.finfo(damped.dtype).tiny), 0.0)


def times(stack: Tensor, factor: Tensor, left: bool) -> Tensor:
    """Multiply ``[groups, out, in]`` from one side by ``[groups * blocks, n, n]`` or by ``[groups, n]``.

    Args:
        stack: The matrices.
        factor: Symmetric matrices, or diagonals.
        left: From which side.
    """
    if factor.dim() == 2:
        return factor[..., None] * stack if left else stack * factor[:, None]
    count = len(factor) // len(stack)
    if count > 1:  # a factor in blocks, each of which multiplies its part of a side
        if left:
            return times(stack.mT, factor, False).mT  # blocks are symmetric
        return paste(cut(stack, count, factor.shape[-1]) @ factor, count, stack.shape[-1])
    return factor @ stack if left else stack @ factor


class Compiled:
    """Functions compiled once for each shape of their arguments.

    Args:
        wanted: Whether to compile; None where the device gains.
    """

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self._known: dict[Any, Callable[..., Any]] = {}

    def on(self, device: torch.device) -> bool:
        """Return whether calls with tensors of a device are compiled.

        Args:
            device: The device.
        """
        return compiles(self.wanted, device)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of pure tensor code, whose first argument is a tensor.

        Args:
            function: The function.
            *arguments: Its arguments; numbers among them are part of what it is compiled for.
        """
        if not self.on(arguments[0].device):
            return function(*arguments)
        # Compiled code depends on the numbers among the arguments, and on strides.
        key = (function, *(_signature(argument) for argument in arguments))
        if key not in self._known:
            self._known[key] = compiled(function)
        return self._known[key](*arguments)


def _signature(argument: Any) -> Any:
    """Return what compiled code depends on in an argument."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, tuple):
        return tuple(map(_signature, argument))
    return argument
