"""Taps inside parameters: for weights that code other than a plain module uses.

A parameter whose class is `TappedParameter` sees every torch function that it takes part in, wherever the
code stands, and sends the output of those that use it as a weight through its tap. The class of the very
tensor is changed, so that optimizers, ties and DDP keep it; ``nn.Parameter`` stays its base class. Copies and
pickles of it are plain parameters again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.variables.torch import get_overridable_functions

from mupass._dims.operator_traits import Trait, having
from mupass._errors import OptimizerError
from mupass._parallel import is_sharded
from mupass._roles.contraction import Contraction, einsum, linear, matmul, reordered
from mupass._taps import recurrent, tables
from mupass._taps.forms import (
    Args,
    Bag,
    Convolution,
    Elementwise,
    Features,
    Form,
    Kwargs,
    Lookup,
    Scaled,
    Sorted,
    Standardized,
)
from mupass._taps.functions import edge_to
from mupass._taps.leaves import Tap
from mupass._taps.recurrent import by_name
from mupass._taps.sharded import on_whole

ATTRIBUTE = "_mupass_taps"
# For each axis of a transposed parameter, the parameter's axis.
# RESHAPED where the entries are in order and the shape is another one.
VIEW = "_mupass_view"
RESHAPED = (-1,)
SHAPE = "_mupass_shape"  # of the parameter
SOURCE = "_mupass_source"  # the parameter that a standardized kernel is made of
HOOKED = "_mupass_hooked"  # kind of use of the module that holds the parameter, which has a tap of its own
COPIES = "_mupass_copies"  # what copies of a table's entries know of them
T = Tensor
# F.layer_norm(x, shape, gain, shift): a call may give its arguments by place or by name.
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
SUMMED = (torch.addbmm, T.addbmm, T.addbmm_)  # over the batch axis as well
BATCHED = (torch.baddbmm, T.baddbmm, T.baddbmm_)
ADDED = (torch.addmm, T.addmm, T.addmm_, *BATCHED, *SUMMED)
# Place of each factor among the positional arguments, and the names that it may have instead.
Operands = tuple[tuple[int, tuple[str, ...]], tuple[int, tuple[str, ...]]]
OPERANDS: Mapping[Any, Operands] = {  # places and names of the two factors
    **dict.fromkeys(MATMULS, ((0, ("input", "self")), (1, ("other", "mat2")))),
    **dict.fromkeys(ADDED, ((1, ("mat1", "batch1")), (2, ("mat2", "batch2")))),
    F.linear: ((0, ("input",)), (1, ("weight",))),
    F.embedding: ((0, ("input",)), (1, ("weight",))),
}
LOOKUP = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
BAG = (  # the arguments of F.embedding_bag, in order
    *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)
# w * x calls Tensor.__mul__, 2 * w calls Tensor.__rmul__; w.T and w.mT are met as getters of properties.
GAINS = (torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply)  # type: ignore[attr-defined]
# Names: of torch, and of an operator of transformers for where torch has none.
GROUPED = ("_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback.default")
# Modules of convolutions are hooked (taps.py): these are calls with a kernel that other code holds.
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
CALLED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # their arguments, in order
CALLED_TRANSPOSED = (*CALLED[:5], "output_padding", "groups", "dilation")
SHIFTS = (torch.add, T.add, T.__add__, T.__radd__)  # type: ignore[attr-defined]
TWO_AXES = (T.t, torch.t, T.T.__get__, T.mT.__get__)  # type: ignore[attr-defined]
SHAPE_OF_SECOND = tables.functions(*having(Trait.SHAPE_OF_SECOND))
SWAPS = (T.transpose, torch.transpose, T.swapaxes, torch.swapaxes)
ORDERS = (T.permute, torch.permute)
# w.reshape(...), torch.flatten(w, 1)
RESHAPES = tables.functions(*having(Trait.KEEPS_ORDER))
# Backward passes to inputs=: they run code of the caller's, as a checkpoint does that runs forward again.
DERIVATIVES = (torch.autograd.grad, torch.autograd.backward)


class _Intercepted:
    """What both tensor classes below do with a torch function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Run the function on plain tensors, and tap its output."""
        kwargs = kwargs or {}
        # Dynamo cannot call this one here.
        if func is T.__rsub__:
            func = torch.rsub
        if func in DERIVATIVES:
            return _differentiated(func, args, dict(kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            if tables.has_tables(args, kwargs, _copies):
                output = tables.copied(func, args, kwargs, _copies, _known)
                if output is not None:
                    return output
                args, kwargs = tables.joined(func, args, kwargs, _copies)
            # Fused attention and recurrences multiply by several weights inside of one call.
            # They are run in parts, so that each weight has an output of its own.
            if func is F.multi_head_attention_forward:
                return _attention(args, dict(kwargs))
            if func in recurrent.SEQUENCES or func in recurrent.CELLS:
                return _recurrence(func, args, kwargs)
            output = func(*args, **kwargs)
            return _tapped(func, args, kwargs, output)


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
        key: Kind of use: `product_key` of its axes, ``standardized``, ``embedding``, ``table``, ``gain``,
            ``shift``, ``q``, ``k``, ``v``.

    Raises:
        OptimizerError: The parameter is of a class of its own.
    """
    parameter = root.get_parameter(name)
    taps: dict[str, Tap] = vars(parameter).setdefault(ATTRIBUTE, {})
    if not is_sharded(parameter):
        _look_out(parameter, name, taps)
    # One hook changes the parameter for all taps of it.
    elif not taps:
        on_whole(root, name, lambda whole: _look_out(whole, name, taps))
    if key.startswith("grouped"):
        # Dynamo tells the class of a tensor of functions on this list alone.
        get_overridable_functions().add(torch._grouped_mm)
    return taps.setdefault(key, Tap())


def note_hook(module: nn.Module) -> None:
    """Let a parameter know that its module has a tap of its own, which sees the module's use of it.

    Args:
        module: With a hook.
    """
    weight = module._parameters.get("weight")
    if isinstance(weight, TappedParameter):
        vars(weight)[HOOKED] = "embedding" if isinstance(module, nn.Embedding) else product_key((1,), (0,))


def pass_on(root: nn.Module, name: str, old: Tensor) -> None:
    """Let the tensor that took a parameter's place in its module look out for the same uses.

    Args:
        root: The module that the name is relative to.
        name: Name of the parameter.
        old: What the parameter was.
    """
    # fully_shard puts new tensors into modules; a trainer puts them into the optimizer's groups as well.
    taps: dict[str, Tap] | None = vars(old).get(ATTRIBUTE)
    new = root.get_parameter(name)
    if not taps or new is old:
        return
    vars(new)[ATTRIBUTE] = taps
    if HOOKED in vars(old):
        vars(new)[HOOKED] = vars(old)[HOOKED]
    if is_sharded(new):
        on_whole(root, name, lambda whole: _look_out(whole, name, taps))
    else:
        _look_out(new, name, taps)


def _look_out(parameter: nn.Parameter, name: str, taps: dict[str, Tap]) -> None:
    if type(parameter) is nn.Parameter:
        parameter.__class__ = TappedParameter
        setattr(parameter, ATTRIBUTE, taps)
    if type(parameter) is not TappedParameter:
        raise OptimizerError(
            f"{name} is a {type(parameter).__name__}, which cannot carry a tap: make it an nn.Parameter, or "
            f"leave it to the fallback with exclude=['{name}']"
        )


def release(parameter: nn.Parameter) -> None:
    """Make a parameter that looks out for its uses a plain one again.

    Args:
        parameter: Any parameter.
    """
    vars(parameter).pop(ATTRIBUTE, None)
    vars(parameter).pop(HOOKED, None)
    if type(parameter) is TappedParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def product_key(in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> str:
    """Return the name of a product's tap: which axes of the parameter are summed, and which are made.

    Args:
        in_axes: Axes that are summed.
        out_axes: Axes that only the output shares.
    """
    return f"{in_axes}->{out_axes}"


def _differentiated(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Run ``torch.autograd.grad`` or ``backward`` to parameters, in which taps are to see all functions.

    A checkpoint runs forward again in it, and must save as many tensors as the first time. So parameters are
    told by the edges of the graph that lead to them, and torch has no reason to ask this class.

    Args:
        func: One of `DERIVATIVES`.
        args: Outputs, and the inputs of ``grad``, as torch hands them on.
        kwargs: The other arguments, the inputs of ``backward`` among them.
    """
    is_backward = func is torch.autograd.backward
    inputs = kwargs.get("inputs") if is_backward else args[1]
    known = [value for value in (*args[0], *(inputs or ())) if isinstance(value, _Intercepted)]
    # Only what leads to parameters is run so. The others, and errors, are left to torch.
    with torch._C.DisableTorchFunctionSubclass():
        if not all(value.is_leaf and value.requires_grad for value in known):  # type: ignore[attr-defined]
            return func(*args, **kwargs)
    edge_of = {id(value): edge_to(value) for value in known}  # type: ignore[arg-type]
    outputs = tuple(edge_of.get(id(value), value) for value in args[0])
    edges = tuple(edge_of.get(id(value), value) for value in inputs or ())
    if is_backward:
        return func(outputs, **{**kwargs, "inputs": edges if inputs is not None else None})
    if kwargs.get("materialize_grads"):
        return _with_zeros(outputs, edges, inputs or (), kwargs)
    return func(outputs, edges, **kwargs)


def _with_zeros(outputs: Args, edges: Args, inputs: Args, kwargs: dict[str, Any]) -> Args:
    """Return gradients by edges, with zeros for what outputs do not depend on: edges have no shapes."""
    options = {**kwargs, "materialize_grads": False, "allow_unused": True}
    gradients = []
    for value, found in zip(inputs, torch.autograd.grad(outputs, edges, **options), strict=True):
        if found is None:
            found = torch.zeros_like(value, requires_grad=kwargs["create_graph"])
        gradients.append(found)
    return tuple(gradients)


def _taps(value: Any) -> dict[str, Tap] | None:
    """Return the taps of a parameter that a gradient reaches; None of one that is frozen, and of all else."""
    if isinstance(value, _Intercepted) and value.requires_grad:  # type: ignore[attr-defined]
        return getattr(value, ATTRIBUTE, None)
    return None


def _copies(value: Any) -> tables.Copies | None:
    """Return what copies of a table's entries know of them; None for all else, and while no one asks."""
    tap = (_taps(value) or {}).get("table")
    if tap is None or tap.idle or not torch.is_grad_enabled():
        return None
    return getattr(value, COPIES, None) or tables.Copies.of_table(value, tap)


def _known(tensor: Tensor, copies: tables.Copies) -> Tensor:
    """Return a tensor that knows of its entries."""
    tapped = tensor.view_as(tensor).as_subclass(TappedView)  # a new tensor: it may be the parameter itself
    setattr(tapped, ATTRIBUTE, {"table": copies.tap})
    setattr(tapped, COPIES, copies)
    return tapped


def _view(weight: Tensor) -> tuple[int, ...]:
    """Return the parameter's axis for each axis of a view, or RESHAPED."""
    return getattr(weight, VIEW, None) or tuple(range(weight.dim()))


def _tapped(func: Any, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Return the output of a function, tapped where a parameter was its weight."""
    # S(w) on its way to F.conv2d(x, S(w)), whatever S is written with
    parameter = _standardized(args, kwargs)
    if parameter is not None and func not in CONVOLUTIONS:
        return _standardizing(func, args, output, parameter)
    # F.conv2d(x, kernel, bias)
    if func in CONVOLUTIONS or func in TRANSPOSED:
        return _convolved(func in TRANSPOSED, args, kwargs, output)
    # F.grouped_mm(x, w, offs=ends): a mixture of experts, with tokens sorted by expert.
    if getattr(func, "__name__", "") in GROUPED:
        return _grouped(args, kwargs, output)
    # x @ w, F.linear(x, w, bias), torch.addmm(bias, x, w), F.embedding(tokens, table)
    if func in OPERANDS:
        return _tapped_product(func, args, kwargs, output)
    if func is F.embedding_bag:
        return _bagged(args, kwargs, output)
    # torch.einsum("bi,oi->bo", x, w)
    if func is torch.einsum and len(args) >= 2:
        return _tapped_einsum(args, output)
    # F.layer_norm(x, shape, gain, shift)
    if func in NORMS:
        return _normed(func, by_name(NORMS[func], args, kwargs), output)
    kind = _kind_of_vector(func, args, kwargs)
    if kind:
        return _elementwise(output, args[0], args[1], kind)
    return _viewed(func, args, kwargs, output)


def _kind_of_vector(func: Any, args: Args, kwargs: Kwargs) -> str:
    """Return what a parameter would be in a call of two operands: a gain, a shift, or neither."""
    # x * gain
    if func in GAINS and len(args) == 2:
        return "gain"
    # x + shift, but not torch.add(x, shift, alpha=2)
    if func in SHIFTS and len(args) == 2 and not kwargs:
        return "shift"
    return ""


def _standardized(args: Args, kwargs: Kwargs) -> Tensor | None:
    """Return the parameter with standardized rows that arguments are made of, while someone asks for it."""
    for value in (*args, *kwargs.values()):
        tap = (_taps(value) or {}).get("standardized")
        if tap is not None and not tap.idle:
            source: Tensor | None = getattr(value, SOURCE, None)
            return value if source is None else source
    return None


def _standardizing(func: Any, args: Args, output: Any, parameter: Tensor) -> Any:
    """Return a result of one of the functions between a parameter and its standardized kernel.

    It knows the parameter, and so do results made of it, up to the convolution.
    """
    # x.reshape_as(w), torch.zeros_like(w) read no entry of w; w.shape is no tensor.
    if func in tables.BLIND or (func in SHAPE_OF_SECOND and _standardized(args[:1], {}) is None):
        return output
    # mean and deviation of torch.var_mean(w)
    if isinstance(output, (tuple, list)):
        return type(output)([_standardizing(func, args, part, parameter) for part in output])
    # w.detach(), w.clone() without gradients: copies of the parameter, which no kernel is made of
    if not isinstance(output, Tensor) or not output.requires_grad:
        return output
    tapped = output.view_as(output).as_subclass(TappedView)
    setattr(tapped, ATTRIBUTE, _taps(parameter))
    setattr(tapped, SOURCE, parameter)
    return tapped


def _viewed(func: Any, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Return the output of a function; of ``w.t()``, ``w.float()``, ``w[:]`` as a view that knows its tap.

    What comes out of these is still the parameter to those who read it.
    """
    source: Any = args[0] if args else kwargs.get("input")
    if _taps(source) is None or not isinstance(output, Tensor):
        return output
    # w.view(4, -1), w[None]: the same entries under another shape.
    if func in RESHAPES or (func is T.__getitem__ and _adds_axes(args[1], source, output)):
        return _reshaped(output, source)
    # w.t(), w.permute(1, 0), w.float(): the same entries with their axes in an order that is known.
    order = _order(func, source, args[1:], kwargs, output)
    if order is None:
        return output
    if _view(source) == RESHAPED:  # a copy stays what it is, a transpose does not
        return _shown(output, source, RESHAPED) if output.shape == source.shape else output
    return _shown(output, source, tuple(_view(source)[axis] for axis in order))


def _tapped_product(func: Any, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Return the output of a product of two tensors, or of a look-up in a table, tapped."""
    left, right = _operands(args, kwargs, OPERANDS[func])
    # F.embedding(tokens, table). A table that was transposed on the way is not followed.
    if func is F.embedding:
        if _taps(right) is None or _view(right) != (0, 1):
            return output
        padding = by_name(LOOKUP, args, kwargs).get("padding_idx")
        lookup = Lookup(-1 if padding is None else padding % right.shape[0])
        _tell_stray(output, right, "embedding")
        return _through(output, left, _taps(right), "embedding", lookup)
    # F.linear(x, w, bias): a bias with a tap of its own is a shift along the last axis.
    if func is F.linear:
        output = _shifted(output, left, args[2] if len(args) > 2 else kwargs.get("bias"), -1)
    if func in BATCHED:  # baddbmm(bias, x, w): bias is added to a product as to any tensor
        added = args[0] if args else kwargs["input"]
        output = _elementwise(output, left, added, "shift")
    return _product(output, left, right, func, kwargs.get("alpha", 1))


def _bagged(args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
    """Return the output of ``F.embedding_bag(tokens, table)``, tapped where the table is a parameter."""
    bound = by_name(BAG, args, kwargs)
    taps = _taps(bound["weight"])
    if taps is None or "bag" not in taps or taps["bag"].idle or _view(bound["weight"]) != (0, 1):
        return output
    return _through(output, bound["input"], taps, "bag", Bag.called(bound, output.shape[0]))


def _takes_all(source: Tensor, index: Any, output: Tensor) -> bool:
    """Whether an index is ``[:]``, ``[..., 0:]`` and so on, and takes all of a tensor as it is."""
    indices = index if isinstance(index, tuple) else (index,)
    spans = all(isinstance(i, slice) or i is Ellipsis for i in indices)
    return spans and output.shape == source.shape


def _tapped_einsum(args: Args, output: Any) -> Any:
    """Return the output of einsum(equation, x, w) or einsum(equation, [x, w]), tapped."""
    operands = args[1:]
    if isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2:
        return output
    return _product(output, *operands, args[0])


def _operands(args: Args, kwargs: Kwargs, places: Operands) -> list[Any]:
    """Return the two factors of a product, given by their places or by one of their names."""
    found: list[Any] = []
    for place, names in places:
        operand = None
        if place < len(args):
            operand = args[place]
        else:
            for name in names:
                operand = kwargs.get(name, operand)
        found.append(operand)
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
    tapped = value.as_subclass(TappedView)
    setattr(tapped, ATTRIBUTE, taps)
    return tapped


def _through(output: Tensor, x: Any, taps: dict[str, Tap] | None, key: str, form: Any) -> Tensor:
    """Send an output through the tap of this kind of use, if there is one."""
    if taps is None or key not in taps or not isinstance(x, Tensor):
        return output
    return taps[key].through(output, x, form)


def _tell_stray(output: Tensor, weight: Any, key: str) -> None:
    """Tell of a product with a parameter that has taps, but none for this kind of use.

    The captured pass had no such use: another branch, or the code around the model.
    """
    taps = _taps(weight)
    if taps is None or key in taps or torch.compiler.is_compiling() or not output.requires_grad:
        return
    if key == getattr(weight, HOOKED, None):
        return
    for tap in taps.values():
        if not tap.idle and tap.passes is not None:
            tap.passes.miss(tap, "in a way that the captured pass had not")
            return


def _product(output: Tensor, left: Any, right: Any, how: Any, alpha: float = 1) -> Tensor:
    """Return a sum of products of two tensors, tapped where one of them is a parameter.

    Args:
        output: The sum.
        left: The left factor.
        right: The right one.
        how: The function that made it, or the equation of an einsum.
        alpha: What the function multiplied the sum by.
    """
    # Which of the two factors is the parameter: x @ w has it on the right, w @ x on the left.
    weight, activation, weight_at = left, right, 0
    if _taps(right) is not None:
        weight, activation, weight_at = right, left, 1
    if _taps(weight) is None or not isinstance(activation, Tensor):
        return output
    # w @ w.T, as in a penalty on weights: no activation is multiplied.
    if _taps(weight) is _taps(activation):
        return output
    # The sizes of the parameter's own axes, transposes undone.
    view = _view(weight)
    if view == RESHAPED:
        return output
    sizes = [0] * len(view)
    for place, axis in enumerate(view):
        sizes[axis] = weight.shape[place]
    contraction: Contraction | None
    if isinstance(how, str):
        contraction = einsum(how, activation.shape, view, sizes, weight_at)
    elif how is F.linear:
        contraction = linear(activation.dim(), view, sizes)
    else:
        contraction = matmul(activation.shape, view, sizes, weight_at, how in SUMMED)
    # einsum("bii,oi->bo", x, w), say: the coverage has refused such uses by name.
    if contraction is None or not contraction.proper:
        return output
    # torch.addmm(bias, x, w, alpha=0.5): the gradient of the product is half of that of the output.
    form: Form = contraction
    if alpha != 1:
        form = Scaled(contraction, float(alpha))
    key = product_key(contraction.in_axes, contraction.out_axes)
    _tell_stray(output, weight, key)
    return _through(output, activation, _taps(weight), key, form)


def _elementwise(output: Tensor, left: Any, right: Any, key: str) -> Tensor:
    """Return a product or a sum of two tensors, tapped where one is a parameter along one axis."""
    weight, activation = left, right
    if _taps(right) is not None:
        weight, activation = right, left
    if not isinstance(weight, (TappedParameter, TappedView)) or not isinstance(activation, Tensor):
        return output
    # gain * gain, as in a penalty on gains: no activation is multiplied.
    if _taps(weight) is _taps(activation):
        return output
    rank = weight.dim()
    # Converted or reshaped it may be, but not transposed.
    if _view(weight) not in (tuple(range(rank)), RESHAPED):
        return output
    # The first axis longer than 1 holds the features, counted from the end, as x * gain broadcasts.
    form = Elementwise(0, 0)  # one number acts on all entries
    for axis, size in enumerate(weight.shape):
        if size > 1:
            form = Elementwise(axis - rank)
            break
    return _through(output, activation, _taps(weight), key, form)


def _normed(func: Any, bound: dict[str, Any], output: Tensor) -> Tensor:
    """Tap the gain and the shift of a norm: a gain multiplies what the norm gives without them."""
    found = {"gain": _taps(bound.get("weight")), "shift": _taps(bound.get("bias"))}
    if _all_idle(found.values()):
        return output
    # The norm once more, without gain and shift. It leaves the running statistics alone: in training those of
    # the batch are used, and these are updated already.
    absent = ["weight", "bias"]
    if bound.get("training"):
        absent += ["running_mean", "running_var"]
    unscaled = dict(bound)
    for name in absent:
        if name in unscaled:
            unscaled[name] = None
    with torch.no_grad():
        normalized = func(**unscaled)
    # F.batch_norm and F.group_norm: gain and shift have one number a channel, and channels stand on axis 1.
    form = Elementwise(1)  # channels of batch and group norms
    # F.layer_norm(x, (height, width)): gain and shift span the last axes.
    if "normalized_shape" in bound:
        count = len(bound["normalized_shape"])
        form = Elementwise(-count, count)
    for key, taps in found.items():
        output = _through(output, normalized, taps, key, form)
    return output


def _all_idle(found: Iterable[dict[str, Tap] | None]) -> bool:
    """Whether no optimizer collects factors from the taps of several parameters."""
    for taps in found:
        if taps is not None and not all(tap.idle for tap in taps.values()):
            return False
    return True


def _order(func: Any, source: Any, rest: Args, kwargs: Kwargs, output: Any) -> tuple[int, ...] | None:
    """Return the order in which a copy or a transpose has the axes of a tensor, None for other functions.

    Args:
        func: The function.
        source: Its first argument, the tensor.
        rest: Its other positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
    """
    if func in tables.SAME or (func is T.__getitem__ and _takes_all(source, rest[0], output)):
        return tuple(range(source.dim()))
    # w.t(), w.T, w.mT: the last two axes change places; a vector stays as it is.
    if func in TWO_AXES:
        view = tuple(range(source.dim()))
        return reordered(view, "last") if len(view) > 1 else view
    if func in SWAPS:  # w.transpose(0, 1), w.transpose(0, dim1=1), w.swapaxes(axis0=0, axis1=1)
        named = [kwargs[name] for name in ("dim0", "axis0", "dim1", "axis1") if name in kwargs]
        return reordered(range(source.dim()), "swap", (*rest, *named))
    if func in ORDERS:  # w.permute(1, 0), w.permute((1, 0)), w.permute(dims=(1, 0))
        axes = kwargs.get("dims", rest)
        if rest and isinstance(rest[0], (tuple, list)):
            axes = rest[0]
        return reordered(range(source.dim()), "permute", axes)
    return None


def _adds_axes(index: Any, source: Tensor, output: Tensor) -> bool:
    """Whether an index is ``[None]``, ``[:, None]`` and so on, and takes all of a tensor in a new shape."""
    indices = index if isinstance(index, tuple) else (index,)
    new = [i for i in indices if i is None]
    spans = all(i is None or isinstance(i, slice) or i is Ellipsis for i in indices)
    return bool(new) and spans and output.numel() == source.numel()


def _shown(output: Tensor, weight: Tensor, view: tuple[int, ...]) -> Tensor:
    """Return a view of a parameter that still knows its tap."""
    tapped = output.view_as(output).as_subclass(TappedView)  # a new tensor: it may be the parameter itself
    setattr(tapped, ATTRIBUTE, _taps(weight))
    setattr(tapped, VIEW, view)
    setattr(tapped, SHAPE, _shape(weight))
    return tapped


def _shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of the parameter that a tensor shows."""
    return getattr(weight, SHAPE, None) or tuple(weight.shape)


def _reshaped(output: Tensor, weight: Tensor) -> Tensor:
    """Return a parameter under another shape, if its entries stand in their order."""
    shape = _shape(weight)
    in_order = tuple(range(len(shape)))
    if _view(weight) not in (in_order, RESHAPED):
        return output
    # A reshape back to the parameter's own shape is the parameter again.
    return _shown(output, weight, in_order if output.shape == shape else RESHAPED)


def _grouped(args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
    """Return the output of ``F.grouped_mm(x, w, offs)``, tapped where w is a parameter, transposed or not."""
    bound = by_name(("input", "weight", "offs"), args[:3], kwargs)
    x, weight, ends = bound["input"], bound["weight"], bound.get("offs")
    if _taps(weight) is None or _view(weight) == RESHAPED or ends is None or x.dim() != 2:
        return output
    # What is summed over and what is made, by the axes of the parameter: w may have been transposed.
    _, inputs, outputs = _view(weight)
    key = f"grouped {product_key((inputs,), (outputs,))}"
    return _through(output, x, _taps(weight), key, Sorted(ends))


def _convolved(transposed: bool, args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
    """Return the output of ``F.conv2d`` and the like, tapped where the kernel or the bias is a parameter."""
    names = CALLED_TRANSPOSED if transposed else CALLED
    bound = by_name(names, args, kwargs)
    x, weight = bound["input"], bound["weight"]
    # Channels of the output stand ahead of the positions: on axis -3 for a kernel over two.
    output = _shifted(output, x, bound.get("bias"), 1 - weight.dim())
    # F.conv2d(x, S(w), bias): the gradient is taken to the rows of w in their own length.
    if "standardized" in (_taps(weight) or {}) and not transposed:
        parameter = getattr(weight, SOURCE, None)
        if parameter is None:  # no one asks, or it is not standardized here
            return output
        form = Standardized.called(weight, parameter, bound)
        return _through(output, x, _taps(weight), "standardized", form)
    if "conv" not in (_taps(weight) or {}):
        return output
    shape = _shape(weight)
    in_order = tuple(range(len(shape)))
    # F.conv1d(x, w[:, :, None]), a matrix as a kernel of one position: each row still makes one channel.
    rows = _view(weight) == RESHAPED and not transposed and weight.shape[0] == shape[0]
    if _view(weight) != in_order and not rows:
        return output
    return _through(output, x, _taps(weight), "conv", Convolution.called(weight, bound, transposed))


def _shifted(output: Tensor, x: Any, bias: Any, axis: int) -> Tensor:
    """Return an output that has a bias along an axis, which may have a tap of its own."""
    return output if _taps(bias) is None else _through(output, x, _taps(bias), "shift", Elementwise(axis))


def _attention(args: Args, kwargs: dict[str, Any]) -> Any:
    """Run multi-head attention with its projections outside of it, where they can be tapped.

    Only while factors are collected: inside, identity matrices stand for the projections then, which
    multiply exactly.
    """
    attention = F.multi_head_attention_forward
    # Places as in the signature of F.multi_head_attention_forward.
    width, packed, biases, out, out_bias = args[3], args[5], args[6], args[11], args[12]
    if kwargs.get("use_separate_proj_weight"):  # some code passes an empty tensor then
        packed = None
    separate = [kwargs.get(f"{letter}_proj_weight") for letter in "qkv"]
    if _all_idle(map(_taps, (packed, out, *separate))):
        return attention(*args, **kwargs)
    projected = projections(args[:3], packed, separate, biases)
    identity = torch.eye(width, dtype=args[0].dtype, device=args[0].device)
    # Neither packed weights nor biases, and nothing to multiply the output by.
    arguments = [*projected, *args[3:5], None, None, *args[7:11], identity, None, *args[13:]]
    identities = dict.fromkeys(["q_proj_weight", "k_proj_weight", "v_proj_weight"], identity)
    attended, scores = attention(*arguments, **{**kwargs, **identities, "use_separate_proj_weight": True})
    return _product(F.linear(attended, out, out_bias), attended, out, F.linear), scores


def projections(
    inputs: Sequence[Tensor], packed: Tensor | None, separate: Sequence[Any], biases: Tensor | None
) -> list[Tensor]:
    """Return queries, keys and values of multi-head attention, tapped.

    Args:
        inputs: What they are made of, in that order.
        packed: All three weights in one, ``[3 * width, width]``, or None.
        separate: The weights, where they are not packed.
        biases: All three in one, or None.
    """
    query, key, value = inputs
    # Self-attention: one product with all three matrices.
    if packed is not None and query is key and key is value:
        whole = _product(F.linear(query, packed, biases), query, packed, F.linear)
        return list(whole.chunk(3, -1))
    # Cross-attention: three inputs, each with its third of the packed weight [3 * width, width].
    weights = separate if packed is None else packed.chunk(3)
    shifts = [None] * 3 if biases is None else biases.chunk(3)
    projected = []
    for letter, x, weight, shift in zip("qkv", inputs, weights, shifts, strict=True):
        output = F.linear(x, weight, shift)
        if packed is None:
            projected.append(_product(output, x, weight, F.linear))
        else:  # a third of the packed weight has a tap of its own
            projected.append(_through(output, x, _taps(packed), letter, Features()))
    return projected


def _recurrence(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Run a recurrence, as written steps while factors are collected: fused operators do not show them."""
    weights = recurrent.weights_of(func, args, kwargs)
    # Fused kernels are much faster: passes that collect nothing keep them.
    if _all_idle(map(_taps, weights)) or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    key = product_key((1,), (0,))  # [gates * hidden, inputs]

    def tap_of(weight: Tensor | None) -> Tap | None:
        return (_taps(weight) or {}).get(key)

    return recurrent.run(func, args, kwargs, tap_of)
