"""Taps inside parameters: for weights that code other than a plain module uses.

A parameter whose class is `TappedParameter` sees every torch function that it takes part in, wherever the
code stands, and sends the output of those that use it as a weight through its tap. The class of the very
tensor is changed, so that optimizers, ties and DDP keep it; ``nn.Parameter`` stays its base class. Copies and
pickles of it are plain parameters again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._parallel import is_sharded
from mupass._roles.contraction import Contraction, einsum, linear, matmul, reordered
from mupass._taps.forms import Elementwise, Features, Lookup, Scaled
from mupass._taps.leaves import Tap
from mupass._taps.sharded import on_whole

ATTRIBUTE = "_mupass_taps"
VIEW = "_mupass_view"  # for each axis of a transposed parameter, the parameter's axis
T = Tensor
NORMS = {  # names of their arguments, in order
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    ),
}
MATMULS = (torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm, torch.bmm, T.bmm)
SUMMED = (torch.addbmm, T.addbmm)  # over the batch axis as well
BATCHED = (torch.baddbmm, T.baddbmm)
ADDED = (torch.addmm, T.addmm, *BATCHED, *SUMMED)
Operands = tuple[tuple[int, tuple[str, ...]], tuple[int, tuple[str, ...]]]
OPERANDS: Mapping[Any, Operands] = {  # places and names of the two factors
    **dict.fromkeys(MATMULS, ((0, ("input", "self")), (1, ("other", "mat2")))),
    **dict.fromkeys(ADDED, ((1, ("mat1", "batch1")), (2, ("mat2", "batch2")))),
    F.linear: ((0, ("input",)), (1, ("weight",))),
    F.embedding: ((0, ("input",)), (1, ("weight",))),
}
GAINS = (torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply)  # type: ignore[attr-defined]
SHIFTS = (torch.add, T.add, T.__add__, T.__radd__)  # type: ignore[attr-defined]
SAME = (T.to, T.contiguous, T.float, T.double, T.half, T.bfloat16, T.type_as, T.type, T.clone, torch.clone)
TWO_AXES = (T.t, torch.t, T.T.__get__, T.mT.__get__)  # type: ignore[attr-defined]
SWAPS = (T.transpose, torch.transpose, T.swapaxes, torch.swapaxes)
ORDERS = (T.permute, torch.permute)


class _Intercepted:
    """What both tensor classes below do with a torch function."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function on plain tensors, and tap its output."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.multi_head_attention_forward:
                return _attention(args, dict(kwargs or {}))
            output = func(*args, **(kwargs or {}))
            return _tapped(func, args, kwargs or {}, output)


class TappedView(_Intercepted, Tensor):
    """A transposed or converted `TappedParameter`, on its way to the operator that uses it."""


class TappedParameter(_Intercepted, nn.Parameter):
    """A parameter that taps the operators that use it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a plain parameter: taps belong to the optimizer that opened them."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain parameter."""
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def intercept(root: nn.Module, name: str, key: str) -> Tap:
    """Return the tap for one kind of use of a parameter; the parameter is made to look out for it.

    Args:
        root: The module that the name is relative to.
        name: Name of a plain parameter, or of one that FSDP2 shards.
        key: Kind of use: `product_key` of its axes, ``embedding``, ``gain``, ``shift``, ``q``, ``k``, ``v``.

    Raises:
        OptimizerError: The parameter is of a class of its own.
    """
    parameter = root.get_parameter(name)
    taps: dict[str, Tap] = vars(parameter).setdefault(ATTRIBUTE, {})
    if not is_sharded(parameter):
        _look_out(parameter, name, taps)
    elif not taps:
        on_whole(root, name, lambda whole: _look_out(whole, name, taps))
    return taps.setdefault(key, Tap())


def pass_on(root: nn.Module, name: str, old: Tensor) -> None:
    """Let the tensor that took a parameter's place in its module look out for the same uses.

    Args:
        root: The module that the name is relative to.
        name: Name of the parameter.
        old: What the parameter was.
    """
    taps: dict[str, Tap] | None = vars(old).get(ATTRIBUTE)
    new = root.get_parameter(name)
    if not taps or new is old:
        return
    vars(new)[ATTRIBUTE] = taps
    if is_sharded(new):
        on_whole(root, name, lambda whole: _look_out(whole, name, taps))
    else:
        _look_out(new, name, taps)


def _look_out(parameter: nn.Parameter, name: str, taps: dict[str, Tap]) -> None:
    if type(parameter) is nn.Parameter:
        parameter.__class__ = TappedParameter
        setattr(parameter, ATTRIBUTE, taps)
    if type(parameter) is not TappedParameter:
        raise OptimizerError(f"{name} is a {type(parameter).__name__}, which cannot carry a tap")


def release(parameter: nn.Parameter) -> None:
    """Make a parameter that looks out for its uses a plain one again.

    Args:
        parameter: Any parameter.
    """
    vars(parameter).pop(ATTRIBUTE, None)
    if type(parameter) is TappedParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def product_key(in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> str:
    """Return the name of a product's tap: which axes of the parameter are summed, and which are made.

    Args:
        in_axes: Axes that are summed.
        out_axes: Axes that only the output shares.
    """
    return f"{in_axes}->{out_axes}"


def _taps(value: Any) -> dict[str, Tap] | None:
    return getattr(value, ATTRIBUTE, None) if isinstance(value, _Intercepted) else None


def _view(weight: Tensor) -> tuple[int, ...]:
    return getattr(weight, VIEW, None) or tuple(range(weight.dim()))


def _tapped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Return the output of a function, tapped where a parameter was its weight."""
    if func in OPERANDS:
        return _tapped_product(func, args, kwargs, output)
    if func is torch.einsum and len(args) >= 2:  # einsum(equation, x, w) or einsum(equation, [x, w])
        listed = isinstance(args[1], (tuple, list))
        operands = list(args[1]) if listed else list(args[1:])
        if len(operands) != 2:
            return output
        return _product(output, operands[0], operands[1], args[0])
    if func in GAINS and len(args) == 2:
        return _elementwise(output, *args, "gain")
    if func in SHIFTS and len(args) == 2 and not kwargs:
        return _elementwise(output, *args, "shift")
    if func in NORMS:
        return _normed(func, dict(zip(NORMS[func], args, strict=False)) | dict(kwargs), output)
    whole = func is T.__getitem__ and _takes_all(args[0], args[1], output)
    if whole or func in SAME or func in TWO_AXES or func in SWAPS or func in ORDERS:
        return _turned(output, args[0], _order(func, args))
    return output


def _tapped_product(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Return the output of a product of two tensors, or of a look-up in a table, tapped."""
    left, right = _operands(args, kwargs, OPERANDS[func])
    if func is F.embedding:
        if _taps(right) is None or _view(right) != (0, 1):
            return output
        return _through(output, left, _taps(right), "embedding", Lookup())
    if func in BATCHED:  # baddbmm(bias, x, w): bias is added to a product as to any tensor
        added = args[0] if args else kwargs["input"]
        output = _elementwise(output, left, added, "shift")
    return _product(output, left, right, func, kwargs.get("alpha", 1))


def _takes_all(source: Tensor, index: Any, output: Tensor) -> bool:
    """Whether an index is ``[:]``, ``[..., 0:]`` and so on, and takes all of a tensor as it is."""
    indices = index if isinstance(index, tuple) else (index,)
    spans = all(isinstance(i, slice) or i is Ellipsis for i in indices)
    return spans and output.shape == source.shape


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any], places: Operands) -> list[Any]:
    """Return the two factors of a product, given by their places or by one of their names."""
    found: list[Any] = []
    for place, names in places:
        named = [kwargs[name] for name in names if name in kwargs]
        found += [args[place] if place < len(args) else named[0] if named else None]
    return found


def look_out_for(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a tensor that taps its uses as a parameter does, to be used in its place.

    Args:
        value: The tensor.
        parameter: The parameter, tapped or not.
    """
    taps = _taps(parameter)
    if taps is None:
        return value
    seen = value.as_subclass(TappedView)
    setattr(seen, ATTRIBUTE, taps)
    return seen


def _through(output: Tensor, x: Any, taps: dict[str, Tap] | None, key: str, form: Any) -> Tensor:
    tap = taps.get(key) if taps else None
    return output if tap is None or not isinstance(x, Tensor) else tap.through(output, x, form)


def _product(output: Tensor, left: Any, right: Any, how: Any, alpha: float = 1) -> Tensor:
    weight_at = 1 if _taps(right) is not None else 0
    weight, x = (right, left) if weight_at else (left, right)
    taps = _taps(weight)
    if taps is None or not isinstance(x, Tensor):
        return output
    view = _view(weight)
    sizes = [0] * len(view)
    for at, axis in enumerate(view):
        sizes[axis] = weight.shape[at]
    form: Contraction | None
    if isinstance(how, str):
        form = einsum(how, x.shape, view, sizes, weight_at)
    elif how is F.linear:
        form = linear(x.dim(), view, sizes)
    else:
        form = matmul(x.shape, view, sizes, weight_at, how in SUMMED)
    if form is None or not form.proper:
        return output
    key = product_key(form.in_axes, form.out_axes)
    return _through(output, x, taps, key, form if alpha == 1 else Scaled(form, float(alpha)))


def _elementwise(output: Tensor, left: Any, right: Any, key: str) -> Tensor:
    weight, x = (right, left) if _taps(right) is not None else (left, right)
    if (
        not isinstance(weight, (TappedParameter, TappedView))
        or not isinstance(x, Tensor)
        or _view(weight) != tuple(range(weight.dim()))  # converted it may be, but not transposed
    ):
        return output
    wide = [i for i in range(weight.dim()) if weight.shape[i] > 1]
    form = Elementwise(wide[0] - weight.dim()) if wide else Elementwise(0, 0)
    return _through(output, x, _taps(weight), key, form)


def _normed(func: Any, bound: dict[str, Any], output: Tensor) -> Tensor:
    """Tap the gain and the shift of a norm: a gain multiplies what the norm gives without them."""
    found = {key: _taps(bound.get(name)) for key, name in (("gain", "weight"), ("shift", "bias"))}
    if all(tap.idle for taps in found.values() for tap in (taps or {}).values()):
        return output
    batch = bool(bound.get("training"))
    stats: dict[str, Any] = {n: None for n in ("running_mean", "running_var") if n in bound and batch}
    bare: dict[str, Any] = {n: None for n in ("weight", "bias") if n in bound}
    with torch.no_grad():
        x = func(**{**bound, **stats, **bare})
    count = len(bound["normalized_shape"]) if "normalized_shape" in bound else 0
    form = Elementwise(-count, count) if count else Elementwise(1)
    for key, taps in found.items():
        output = _through(output, x, taps, key, form)
    return output


def _order(func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    view = range(args[0].dim())
    if func in TWO_AXES:
        return reordered(view, "last") if len(view) > 1 else tuple(view)
    if func in SWAPS:
        return reordered(view, "swap", args[1:3])
    if func in ORDERS:
        return reordered(view, "permute", args[1] if isinstance(args[1], (tuple, list)) else args[1:])
    return tuple(view)


def _turned(output: Tensor, weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a view of a parameter that still knows its tap."""
    taps, view = _taps(weight), _view(weight)
    if taps is None or not isinstance(output, Tensor):
        return output
    seen = output.view_as(output).as_subclass(TappedView)  # a new tensor: it may be the parameter itself
    setattr(seen, ATTRIBUTE, taps)
    setattr(seen, VIEW, tuple(view[i] for i in order))
    return seen


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run multi-head attention with its projections outside of it, where they can be tapped.

    Only while factors are collected: inside, identity matrices stand for the projections then, which
    multiply exactly.
    """
    function = F.multi_head_attention_forward
    query, key, value, width = args[:4]
    packed, biases, out, out_bias = args[5], args[6], args[11], args[12]
    separate = [kwargs.get(f"{n}_proj_weight") for n in "qkv"]
    weights = [w for w in (packed, out, *separate) if w is not None]
    taps = [tap for w in weights for tap in (_taps(w) or {}).values()]
    if all(tap.idle for tap in taps):
        return function(*args, **kwargs)
    if packed is not None and query is key and key is value:
        whole = _product(F.linear(query, packed, biases), query, packed, F.linear)
        projected = list(whole.chunk(3, -1))
    else:
        shifts = [None] * 3 if biases is None else list(biases.chunk(3))
        parts: list[Any] = separate if packed is None else list(packed.chunk(3))
        projected = []
        for name, x, weight, shift in zip("qkv", (query, key, value), parts, shifts, strict=True):
            y = F.linear(x, weight, shift)
            if packed is None:
                projected.append(_product(y, x, weight, F.linear))
            else:
                projected.append(_through(y, x, _taps(packed), name, Features()))
    eye = torch.eye(width, dtype=query.dtype, device=query.device)
    inner = [*projected, *args[3:5], None, None, *args[7:11], eye, None, *args[13:]]
    kwargs |= {f"{n}_proj_weight": eye for n in "qkv"} | {"use_separate_proj_weight": True}
    attended, scores = function(*inner, **kwargs)
    return _product(F.linear(attended, out, out_bias), attended, out, F.linear), scores
