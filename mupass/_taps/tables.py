"""Tables at run time: copies of a parameter's entries that know their rows.

Every copy carries, in its own shape, the number of the row of the table that each entry stands in. Whatever
copies entries copies these numbers alike. Where activations are joined to it the copy is spread out to their
shape: the gradient of what is spread is that of every single reading of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mupass._dims.operator_traits import Trait, having
from mupass._taps.forms import Args, Kwargs, Table
from mupass._taps.leaves import Tap
from mupass._taps.recurrent import by_name

Shape = tuple[int, ...]


def functions(*names: str) -> dict[Any, None]:
    """Return the functions of torch and the methods of tensors that have these names.

    They are the keys of a dict: Dynamo of torch 2.8 cannot trace that a function is in a frozenset, and none
    follows a look-up of traits.

    Args:
        *names: The names, or texts of several.
    """
    found: dict[Any, None] = {}
    for name in " ".join(names).split():
        for owner in (torch, Tensor):
            function = getattr(owner, name, None)
            if callable(function):  # torch.half is a type, and Tensor.mT a property
                found[function] = None
    return found


# Functions whose results are copies of entries of their first argument.
COPYING = functions("__getitem__", *having(Trait.RESHAPES | Trait.PICKS))
COPYING |= dict.fromkeys((Tensor.T.__get__, Tensor.mT.__get__))  # type: ignore[attr-defined]
SPREADING = functions(*having(Trait.SPREADS))
# Copies of all entries in another type or place: code that keeps weights in float32 and multiplies in
# bfloat16, say.
SAME = functions("to contiguous float double half bfloat16 type_as type clone")
# 1 + w, w - 1, 1 - w, 2 * w, w / 2, -w with numbers.
SUMS = functions("add __add__ __radd__")
ADDING = SUMS | functions("sub subtract __sub__")
TAKING = functions("rsub __rsub__ neg negative __neg__")
SCALING = functions("mul multiply __mul__ __rmul__")
DIVIDING = functions("div divide true_divide __truediv__ __div__")
# Functions that join tensors entry by entry, some of them into the first one.
WRITING = functions("add_ __iadd__ sub_ __isub__ mul_ __imul__ div_ __itruediv__ addcmul_ lerp_")
JOINING = ADDING | SCALING | DIVIDING | functions("rsub __rsub__ __rtruediv__ where addcmul lerp") | WRITING
BATCHED = functions("baddbmm")
# They tell of a tensor, and do not read it.
BLIND = functions(
    "size dim stride numel nelement is_contiguous new_zeros new_ones new_full new_empty new_tensor "
    "zeros_like ones_like empty_like full_like rand_like randn_like __len__ element_size data_ptr get_device"
)


@dataclass(frozen=True)
class Copies:
    """What a tensor of copies of a table's entries knows of them.

    Attributes:
        tap: That of the table.
        rows: The number of its row for every entry.
        factor: What the entries were multiplied by.
        spread: Whether they were copied several times, for every sample say.
    """

    tap: Tap
    rows: Tensor
    factor: float = 1.0
    spread: bool = False

    @staticmethod
    def of_table(table: Tensor, tap: Tap) -> Copies:
        """Return what a table knows of its own entries.

        Args:
            table: The parameter.
            tap: Its tap, which was opened.
        """
        assert tap.layer is not None
        sizes = [1 if axis in tap.layer.features else size for axis, size in enumerate(table.shape)]
        rows = torch.arange(prod(sizes), device=table.device).reshape(sizes)
        return Copies(tap, rows.expand(table.shape))

    def entered(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the copies in the shape of what is joined to them, tapped.

        Args:
            tensor: The copies.
            shape: That shape.
        """
        assert self.tap.layer is not None
        form = Table(self.tap.layer.shown, self.factor)
        return self.tap.through(tensor.expand(shape), self.rows.expand(shape), form)


def copied(
    func: Any,
    args: Args,
    kwargs: Kwargs,
    known_of: Callable[[Any], Copies | None],
    wrap: Callable[[Tensor, Copies], Tensor],
) -> Any:
    """Return the result of a function that copies entries of a table, or adds a mask to them; else None.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
        known_of: Returns what an argument knows of its entries, None for other arguments.
        wrap: Makes a tensor know that of its own.
    """
    place = _shifted(func, args, kwargs, known_of)
    if place is not None:
        output, known = func(*args, **kwargs), known_of(args[place])
        assert known is not None
        return wrap(output, replace(known, rows=known.rows.expand(output.shape), spread=True))
    known = known_of(args[0]) if args else None
    if known is None:
        return None
    if func in SAME:
        return wrap(func(*args, **kwargs), known)
    slope = _slope(func, args, kwargs)
    if slope is not None:
        return wrap(func(*args, **kwargs), replace(known, factor=known.factor * slope))
    if func not in COPYING:
        return None
    outputs, rows = func(*args, **kwargs), func(known.rows, *args[1:], **kwargs)
    spread = known.spread or func in SPREADING
    if isinstance(outputs, Tensor):
        return wrap(outputs, replace(known, rows=rows, spread=spread))
    parts = zip(outputs, rows, strict=True)
    return tuple([wrap(part, replace(known, rows=numbers, spread=spread)) for part, numbers in parts])


def _shifted(func: Any, args: Args, kwargs: Kwargs, known_of: Callable[[Any], Copies | None]) -> int | None:
    """Return which argument is the table of a sum with what has no gradient, a mask or data; else None."""
    if func not in ADDING or len(args) != 2 or kwargs:
        return None
    # mask - table is no such sum
    for place in (0, 1) if func in SUMS else (0,):
        other = args[1 - place]
        if known_of(args[place]) is not None and isinstance(other, Tensor) and not other.requires_grad:
            return place
    return None


def _slope(func: Any, args: Args, kwargs: Kwargs) -> float | None:
    """Return what a function multiplies its first argument by, to which it joins numbers alone; else None."""
    numbers = args[1:]
    if any(not isinstance(number, (int, float)) for number in (*numbers, *kwargs.values())):
        return None
    if func in ADDING:
        return 1.0
    if func in TAKING:
        return -1.0
    if func in SCALING:
        return float(numbers[0])
    return 1 / float(numbers[0]) if func in DIVIDING else None


def joined(
    func: Any, args: Args, kwargs: Kwargs, known: Callable[[Any], Copies | None]
) -> tuple[Args, dict[str, Any]]:
    """Return the arguments of a function; copies of tables tapped, in the shape of what they are joined to.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
        known: Returns what an argument knows of its entries, None for other arguments.
    """
    if func in BLIND or getattr(func, "__name__", "") == "__get__":
        return args, dict(kwargs)
    if func in WRITING and known(args[0]) is not None:  # into the table itself
        return args, dict(kwargs)
    enter = _Entering(known)
    places, names = _joins(func, args, kwargs)
    entered = [enter(value, wanted) for value, wanted in zip(args, places, strict=True)]
    return tuple(entered), {name: enter(value, names[name]) for name, value in kwargs.items()}


class _Entering:
    """Taps the copies of tables among the arguments of one call, each tensor once.

    ``attention(x, x, x)`` of one tensor stays so: its code asks whether they are the same.

    Args:
        known: Returns what an argument knows of its entries, None for other arguments.
    """

    def __init__(self, known: Callable[[Any], Copies | None]) -> None:
        self._known = known
        self._before: list[tuple[Tensor, Shape | None, Tensor]] = []

    def __call__(self, value: Any, wanted: Shape | None) -> Any:
        """Return an argument, tapped where it is copies of a table.

        Args:
            value: The argument.
            wanted: Shape in which it is joined to others, None where it is not.
        """
        if isinstance(value, (tuple, list)):
            return type(value)([self(part, wanted) for part in value])
        copies = self._known(value)
        # A copy for every sample is an activation itself, whoever reads it.
        if copies is None or not (wanted is not None or copies.spread):
            return value
        for other, shape_of_other, tapped in self._before:
            if other is value and shape_of_other == wanted:
                return tapped
        tapped = copies.entered(value, tuple(value.shape) if wanted is None else wanted)
        self._before.append((value, wanted, tapped))
        return tapped


def _joins(func: Any, args: Args, kwargs: Kwargs) -> tuple[list[Shape | None], dict[str, Shape | None]]:
    """Return the shapes in which a function joins its arguments to others; None for those that it does not.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
    """
    shape: Shape | None = None
    if func in JOINING:
        tensors = [value for value in _leaves((*args, *kwargs.values())) if isinstance(value, Tensor)]
        shape = tuple(torch.broadcast_shapes(*[tensor.shape for tensor in tensors]))  # type: ignore[no-untyped-call]
    places = [shape] * len(args)
    names: dict[str, Shape | None] = dict.fromkeys(kwargs, shape)
    # A mask is added to the scores of every sample.
    if func is F.scaled_dot_product_attention:
        bound = by_name(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, kwargs)
        names["attn_mask"] = (*bound["query"].shape[:-1], bound["key"].shape[-2])
        places[3:4] = [names["attn_mask"]] * len(places[3:4])
    if func is F.multi_head_attention_forward:
        query, key, heads = args[0], args[1], args[4]
        names["attn_mask"] = (query.shape[1] * heads, query.shape[0], key.shape[0])
    # baddbmm(bias, x, w): the bias is added to the products.
    if func in BATCHED and len(args) > 2:
        places[0] = (*args[1].shape[:2], args[2].shape[-1])
    return places, names


def _leaves(values: tuple[Any, ...] | list[Any]) -> Iterator[Any]:
    """Yield the values of nested tuples and lists."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


def has_tables(args: Args, kwargs: Kwargs, known: Callable[[Any], Copies | None]) -> bool:
    """Return whether copies of tables are among arguments.

    Args:
        args: Arguments.
        kwargs: Named ones.
        known: Returns what an argument knows of its entries, None for other arguments.
    """
    return any(known(value) is not None for value in _leaves((*args, *kwargs.values())))
