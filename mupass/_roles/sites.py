"""Sites: the operators of a captured graph that use a parameter, and how they see it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import operator_name, shape_of, summed_axes
from mupass._dims.operator_traits import Trait, traits
from mupass._records import Axes, Shape, Site, Use
from mupass._roles import contraction, standardized, tables
from mupass._roles.nodes import (
    arguments_of,
    behind_copies,
    made_of,
    placeholders_of,
    tensors_among,
    traits_of,
)
from mupass._walks import walk

CONVOLUTIONS = ("aten.conv", "aten.convolution", "aten._convolution")
RECURRENCES = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
CELLS = tuple(f"{name}_cell" for name in RECURRENCES)
GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
# For each axis that the operator sees, the parameter's axis. None where entries stand in their order under
# another shape.
View = Axes | None
Found = tuple[Site, str]  # how an operator uses the parameter, and the activation that it reads there


def find_sites(captured: Capture) -> dict[str, tuple[Site, ...]]:
    """Find every operator that uses each parameter.

    Args:
        captured: The graph.

    Returns:
        Parameter name -> its sites. Calls that differ only in their input are one site, with all sources.
    """
    sites_of = {}
    dependent = made_of(captured.inputs, captured)
    for placeholder, parameter in captured.parameters.items():
        # A module that is called twice has two equal operators: one site with two sources.
        sources_of: dict[Site, list[str]] = defaultdict(list)
        kernels = standardized.standardized_kernels(captured, placeholder, dependent)
        found = [_standardized(captured, placeholder, reader) for reader in kernels]
        for site, source in found or _sites(captured, placeholder):
            sources_of[site].append(source)
        sites_of[parameter] = tuple(
            replace(site, sources=tuple(sources)) for site, sources in sources_of.items()
        )
    return sites_of


def _sites(captured: Capture, placeholder: Node) -> list[Found]:
    """Return how every operator uses a parameter."""
    # In derivatives the weight is used forwards as well.
    readings = [
        reading for reading in _readings(captured, placeholder) if reading.reader not in captured.derivatives
    ]
    found = [_site(reading) for reading in readings]
    # x * w + y * (1 - w): one use is that of a table, so all are.
    if any(site.kind == "table" for site, _ in found):
        for place, (site, _) in enumerate(found):
            if site.kind in ("gain", "shift"):
                found[place] = _table(readings[place])
    return found


def _standardized(captured: Capture, placeholder: Node, reader: Node) -> Found:
    """Return how a convolution uses a parameter whose rows were standardized: as a plain kernel."""
    kernel: Any = reader.args[1]
    axes = tuple(range(len(_shape(placeholder))))
    reading = _Reading(captured, placeholder, reader, kernel, axes)
    groups = reading.argument("groups") or 1
    site = reading.site("standardized", in_axes=axes[1:], out_axes=axes[:1], groups=groups)
    return site, _source(reader.args[0])


def readers_of(captured: Capture, parameter: str, use: Use) -> list[tuple[Node, Node]]:
    """Return the operators of one use of a parameter, each with the activation that it multiplies.

    Args:
        captured: The graph.
        parameter: Name of the parameter.
        use: One of its uses, a product.
    """
    readers = []
    for placeholder in placeholders_of(captured, parameter):
        for reading in _readings(captured, placeholder):
            # Uses are found by dimension rules, sites by the patterns below: they meet in these three.
            site, _ = _site(reading)
            if (site.operator, site.module, site.in_axes) == (use.operator, use.module, use.fan_in):
                factors, _ = reading.product()
                others = reading.others(factors)
                if others:
                    readers.append((reading.reader, others[0]))
    return readers


@dataclass(frozen=True)
class _Reading:
    """One operator that reads a parameter.

    Attributes:
        captured: The graph.
        parameter: Placeholder of the parameter.
        reader: The operator.
        operand: What it reads: the parameter, or a copy, a transpose or a reshaped form of it.
        view: How that shows the parameter.
        path: The operators between the parameter and the operand.
        copied: Whether the operand has copies of entries, or of multiples of them, and no axes of a weight.
    """

    captured: Capture
    parameter: Node
    reader: Node
    operand: Node
    view: View
    path: tuple[Node, ...] = ()
    copied: bool = False

    @property
    def name(self) -> str:
        """Name of the operator, without its overload."""
        return operator_name(self.reader.target)

    @property
    def shape(self) -> Shape:
        """Shape of the parameter."""
        return _shape(self.parameter)

    @property
    def untransposed(self) -> bool:
        """Whether the operator sees the axes in the parameter's order."""
        return self.view == tuple(range(len(self.shape)))

    @property
    def convolves(self) -> bool:
        """Whether the operator is a convolution."""
        return self.name.startswith(CONVOLUTIONS)

    def argument(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema."""
        return arguments_of(self.reader).get(name)

    def places(self, arguments: Iterable[Any]) -> list[int]:
        """Return where the parameter stands among arguments."""
        return [position for position, argument in enumerate(arguments) if argument is self.operand]

    def others(self, arguments: Iterable[Any]) -> list[Node]:
        """Return the other tensors among arguments."""
        return [tensor for tensor in tensors_among(arguments) if tensor is not self.operand]

    def product(self) -> tuple[list[Any], Any]:
        """Return what the operator multiplies, and what it adds to the product or None."""
        arguments: Any = self.reader.args
        # torch.einsum("bi,oi->bo", x, w) is captured as einsum(equation, [x, w]).
        if self.name == "aten.einsum":
            return list(arguments[1]), None
        # F.linear(x, w, bias), F.conv2d(x, w, bias, ...)
        if self.name == "aten.linear" or self.convolves:
            bias = arguments[2] if len(arguments) > 2 else None
            return list(arguments[:2]), bias
        # torch.addmm(bias, x, w): beta * bias + alpha * product
        if traits(self.name) & Trait.AFFINE:
            return list(arguments[1:]), arguments[0]
        return list(arguments), None

    def site(self, kind: str, **more: Any) -> Site:
        """Return a site of this operator."""
        owner = self.captured.owners.get(self.reader, "")
        return Site(kind, str(self.reader.target), owner, **more)

    def refused(self, what: str) -> Found:
        """Return that the operator does something with the parameter that has no Kronecker form."""
        return self.site("", reason=f"{self.reader.target} {what}"), ""


def _readings(captured: Capture, placeholder: Node) -> Iterator[_Reading]:
    """Yield every operator that reads a parameter, through copies, transposes and other shapes of it."""
    in_order = tuple(range(len(_shape(placeholder))))
    yield from _onward(_Reading(captured, placeholder, placeholder, placeholder, in_order))


def _onward(at: _Reading) -> Iterator[_Reading]:
    """Yield every operator that reads the result of one that shows the parameter."""
    for reader in at.reader.users:
        # x.reshape_as(w) reads no entry of w.
        blind = traits_of(reader) & Trait.SHAPE_OF_SECOND and at.reader not in reader.args[:1]
        if blind or reader.op == "output":
            continue
        reading = replace(at, reader=reader, operand=at.reader)
        shown = _passed_on(reading)
        if shown is None:
            yield reading
        else:
            yield from _onward(replace(shown, path=(*shown.path, reader)))


def _passed_on(reading: _Reading) -> _Reading | None:
    """Return the reading with the view that its result is; None if that is no parameter."""
    operator = reading.reader
    copied = replace(reading, view=None, copied=True)
    # 1 + w moves no entry, so it is no step on their way.
    if tables.is_affine(operator, reading.operand):
        return copied
    # table + mask, table + data: what is trained is joined to it later
    other = tables.shifted_by(operator, reading.operand)
    if other is not None and not _of(other, reading.captured.trained):
        return copied
    # w.to(x.dtype) passes the parameter on; x.to(w.dtype) reads nothing of it.
    if reading.operand not in operator.args[:1]:
        return None
    if reading.copied:
        copies = traits(reading.name) & Trait.COPIES or tables.copies_entries(operator, reading.operand)
        return reading if copies else None
    # w[:n], w[index], w.expand(batch, -1, -1), w.T.reshape(...): copies of entries, where they are no view
    return _viewed(reading) or (copied if tables.copies_entries(operator, reading.operand) else None)


def _viewed(reading: _Reading) -> _Reading | None:
    """Return the reading with the view of the parameter that its result is; None if that is no such view."""
    operator, shape = reading.reader, reading.shape
    if reading.view is not None:
        turned = _view_through(operator, reading.view)
        if turned is not None:
            return replace(reading, view=turned)
    elif traits(reading.name) & Trait.COPIES:
        return reading
    # Entries of a transpose that is reshaped are in no order that could be told afterwards.
    in_order = reading.untransposed or reading.view is None
    # w.reshape(1, len(w), -1), w.flatten(1), w[None]: the entries stay in their order.
    keeps_order = traits(reading.name) & Trait.KEEPS_ORDER
    if keeps_order and in_order and reading.places(operator.args) == [0]:
        # Back in the parameter's own shape its axes are known again.
        is_original = _shape(operator) == shape
        return replace(reading, view=tuple(range(len(shape))) if is_original else None)
    return None


def _view_through(operator: Node, view: Axes) -> Axes | None:
    """Return how the result of a copy or a transpose shows the parameter, or None for other operators.

    Args:
        operator: The operator.
        view: How its first operand shows the parameter.
    """
    name = operator_name(operator.target)
    arguments: Any = operator.args
    if traits(name) & Trait.COPIES:
        return view
    # w.T, w.mT
    if name in ("aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint") and len(view) == 2:
        return contraction.reordered(view, "last")
    # w.transpose(0, 1)
    if name in ("aten.transpose", "aten.swapaxes") and view:
        return contraction.reordered(view, "swap", arguments[1:3])
    # w.permute(2, 0, 1)
    if name == "aten.permute":
        return contraction.reordered(view, "permute", arguments[1])
    return None


def _shape(node: Node) -> Shape:
    value = node.meta.get("val")
    return shape_of(value) if isinstance(value, torch.Tensor) else ()


def _site(reading: _Reading) -> Found:
    """Return how an operator uses a parameter: what the first pattern says that fits."""
    if reading.copied:
        return _table(reading)
    for pattern in PATTERNS:
        matched = pattern(reading)
        if matched is not None:
            return matched
    # x += shift, x - shift, torch.where(mask, x, token)
    if _joined_shape(reading) is not None:
        return _table(reading)
    return reading.refused("uses it in a way that has no Kronecker form here")


def _lookup(reading: _Reading) -> Found | None:
    """Match a table that is read by index: ``F.embedding(tokens, table)``."""
    arguments = reading.reader.args
    if reading.name != "aten.embedding" or reading.places(arguments) != [0] or reading.view != (0, 1):
        return None
    if reading.argument("scale_grad_by_freq"):
        return reading.refused("has gradients that are divided by how often a row was read")
    # As a product with one-hot rows: the rows of the table are summed over, its columns are made.
    return reading.site("embedding", in_axes=(0,), out_axes=(1,)), _source(arguments[1])


def _bag(reading: _Reading) -> Found | None:
    """Match a table of which sums or means of rows are read: ``F.embedding_bag(tokens, table, offsets)``."""
    if reading.name != "aten.embedding_bag" or reading.places(reading.reader.args) != [0]:
        return None
    if reading.view != (0, 1):
        return None
    if reading.argument("mode") == 2:
        return reading.refused("takes the largest of its rows, entry by entry, which is no sum of them")
    if reading.argument("scale_grad_by_freq") or reading.argument("sparse"):
        return reading.refused("has gradients that are sparse or divided by how often a row was read")
    # As a look-up of every row of a bag, behind which they are added up.
    return reading.site("bag", in_axes=(0,), out_axes=(1,)), ""


def _convolution(reading: _Reading) -> Found | None:
    """Match the kernel of ``F.conv2d(x, kernel)``, ``[channels out, channels in, *positions]``.

    A transposed convolution has ``[channels in, channels out, *positions]``.
    """
    arguments = reading.reader.args
    if not reading.convolves or reading.places(arguments) != [1]:
        return None
    # A matrix as a kernel of one position, or a kernel without the axis of one channel: rows are the same.
    keeps_rows = reading.view is None and _shape(reading.operand)[:1] == reading.shape[:1]
    # The kernel must be seen as it is: a transposed one makes other channels.
    if not (reading.untransposed or keeps_rows) or len(reading.shape) < 2:
        return None
    first_axis, *other_axes = range(len(reading.shape))
    in_axes, out_axes = tuple(other_axes), (first_axis,)
    if "transpose" in reading.name or reading.argument("transposed"):
        if not reading.untransposed:
            # A kernel of a transposed convolution that was reshaped: its rows are input channels.
            return None
        in_axes, out_axes = (first_axis, *other_axes[1:]), (other_axes[0],)
    groups = reading.argument("groups") or 1
    site = reading.site("conv", in_axes=in_axes, out_axes=out_axes, groups=groups)
    return site, _source(arguments[0])


def _product(reading: _Reading) -> Found | None:
    """Match a product summed over axes: the parameter is a factor, or is added to it as a bias."""
    if not (traits(reading.name) & (Trait.MATRIX_PRODUCT | Trait.AFFINE) or reading.convolves):
        return None
    factors, bias = reading.product()
    if reading.view is None and bias is not reading.operand:
        return reading.refused("reads it in another shape")
    if bias is reading.operand and isinstance(factors[-1], Node):
        return _bias(reading, factors)
    # What is left of convolutions has a transposed kernel, or a parameter where the activation is.
    if reading.convolves:
        return reading.refused("does not use it as it is")
    return _factor(reading, factors)


def _factor(reading: _Reading, factors: list[Any]) -> Found:
    """Return how a product of tensors uses a parameter that is one of them."""
    # x @ w, with one activation and the parameter once; w @ w.T and einsum("ij,jk,kl", ...) are refused.
    places, others = reading.places(factors), reading.others(factors)
    if len(places) != 1 or len(others) != 1 or len(factors) != 2:
        return reading.refused("multiplies it with itself or with several tensors")
    (activation,) = others
    # x @ (a @ b), a and b parameters: the gradient of a is no sum over rows of x.
    if root_of(activation) in reading.captured.parameters:
        return reading.refused("multiplies it with another parameter, not with an activation")
    product = _form(reading, _shape(activation), places[0])
    if product is None or not product.proper:
        return reading.refused("is not one sum over a shared axis")
    kind = "contraction"
    if reading.name == "aten.linear" and reading.view == (0, 1):
        kind = "linear"
    return reading.site(kind, in_axes=product.in_axes, out_axes=product.out_axes), _source(activation)


def _form(reading: _Reading, activation: Shape, place: int) -> contraction.Contraction | None:
    """Return the form of a product of an activation with a parameter, or None.

    Args:
        reading: The product.
        activation: Shape of the activation.
        place: Place of the parameter among the two factors.
    """
    view, shape = reading.view, reading.shape
    if view is None:
        return None
    if reading.name == "aten.einsum":
        equation = str(reading.reader.args[0])
        return contraction.einsum(equation, activation, view, shape, place)
    if reading.name != "aten.linear":
        # torch.addbmm sums its products over the batch as well.
        summed = reading.name == "aten.addbmm"
        return contraction.matmul(activation, view, shape, place, summed)
    # F.linear(w, x) has an activation where the weight is.
    return contraction.linear(len(activation), view, shape) if place == 1 else None


def _bias(reading: _Reading, factors: list[Any]) -> Found:
    """Match what an operator adds to its own product: ``beta * bias + alpha * product``."""
    scales = reading.reader.kwargs
    alpha, beta = scales.get("alpha", 1), scales.get("beta", 1)
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)) or not alpha:
        return reading.refused(f"adds it to a product times alpha={alpha}")
    # baddbmm(bias, x, w) has one matrix a sample: the bias is added as any tensor to a product.
    if reading.name == "aten.baddbmm":
        if beta != 1:
            return reading.refused(f"adds it times beta={beta}")
        return _along_one_axis(reading, "shift", factors[0], len(_shape(reading.reader)))
    # "" where the factor is no parameter as it is: an activation, or a weight that is computed.
    weight = reading.captured.parameters.get(_weight_behind(factors[-1]), "")
    return reading.site("bias", weight=weight, scale=float(beta / alpha)), ""


def _grouped(reading: _Reading) -> Found | None:
    """Match ``F.grouped_mm(x, w, offs)``: rows of x, group by group, times the matrix of their group."""
    arguments = reading.reader.args
    if reading.name not in GROUPED or reading.places(arguments) != [1] or reading.view is None:
        return None
    activation: Any = arguments[0]
    if len(reading.view) != 3 or len(_shape(activation)) != 2:
        return None
    # [groups, inputs, outputs] as the operator sees it
    _, inputs, outputs = reading.view
    return reading.site("grouped", in_axes=(inputs,), out_axes=(outputs,)), _source(activation)


def _recurrence(reading: _Reading) -> Found | None:
    """Match a weight or a bias of ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells."""
    if reading.name not in (*RECURRENCES, *CELLS) or not reading.untransposed:
        return None
    arguments = arguments_of(reading.reader)
    # Of every layer and direction w_ih, w_hh, then b_ih, b_hh, then a projection of the hidden state.
    if reading.name in CELLS:
        weights = [arguments[name] for name in ("w_ih", "w_hh")]
        biases = [arguments.get(name) for name in ("b_ih", "b_hh")]
        cells = [[*weights, *biases]]
    else:
        # A bidirectional layer has two cells, and stacked layers come one after the other.
        number_of_cells = arguments["num_layers"] * (2 if arguments["bidirectional"] else 1)
        length = len(arguments["params"]) // number_of_cells
        cells = [
            arguments["params"][start : start + length]
            for start in range(0, number_of_cells * length, length)
        ]
    for cell in cells:
        for position in reading.places(cell):
            if position in (2, 3) and len(cell) > 3:
                # A bias belongs to the weight two places ahead of it: b_ih to w_ih, b_hh to w_hh.
                weight = reading.captured.parameters.get(root_of(cell[position - 2]), "")
                return reading.site("bias", weight=weight), ""
            # Both weights are [gates * hidden, inputs]: their last axis is summed over.
            return reading.site("contraction", in_axes=(1,), out_axes=(0,)), ""
    return None


def _norm(reading: _Reading) -> Found | None:
    """Match the gain or the shift of a norm: ``F.layer_norm(x, shape, gain, shift)``."""
    arguments = reading.reader.args
    places = reading.places(arguments)
    if "norm" not in reading.name or len(places) != 1 or not reading.shape:
        return None
    # F.batch_norm(w.reshape(...), None, None, gain), torch._weight_norm(v, g)
    if _weight_behind(arguments[0]) in reading.captured.parameters:
        return reading.refused("normalizes a parameter, not an activation")
    target: Any = reading.reader.target
    # Norms differ in the order of their arguments, and agree in the names of these two.
    kind = {"weight": "norm gain", "bias": "norm shift"}.get(target._schema.arguments[places[0]].name)
    return (reading.site(kind), _source(arguments[0])) if kind else None


def _summed(reading: _Reading) -> Found | None:
    """Match ``(x * w).sum(-1)``, which contracts as ``x @ w`` does but keeps every product in between."""
    places, others = reading.places(reading.reader.args), reading.others(reading.reader.args)
    if not traits(reading.name) & Trait.MULTIPLIES or len(places) != 1 or len(others) != 1:
        return None
    shapes = _shape(reading.operand), _shape(others[0])
    for axis in summed_axes(reading.reader):
        # Both have more than one entry along the axis that is summed.
        if all(len(shape) >= -axis and shape[axis] > 1 for shape in shapes):
            return reading.refused("multiplies it and a sum follows: write x @ w, F.linear or einsum for it")
    return None


def _elementwise(reading: _Reading) -> Found | None:
    """Match ``x * gain`` and ``x + shift``, in either order."""
    kind = {"aten.mul": "gain", "aten.add": "shift"}.get(reading.name)
    places = reading.places(reading.reader.args)
    if kind is None or len(places) != 1:
        return None
    other = reading.reader.args[1 - places[0]]
    scaled = reading.reader.kwargs  # add(x, shift, alpha=2)
    if not isinstance(other, Node) or root_of(other) in reading.captured.parameters or scaled:
        return reading.refused("joins it to another parameter or a number")
    # gain * rsqrt(var(w)), w * mask(v): no activation, but what other parameters are made into
    if _of(other, set(reading.captured.parameters)) and not _of_inputs(other, reading.captured):
        return reading.refused("joins it to what is computed of other parameters alone")
    return _along_one_axis(reading, kind, other, len(_shape(other)))


def _along_one_axis(reading: _Reading, kind: str, activation: Node, rank: int) -> Found:
    """Return the site of a gain or a shift that varies along one axis of an activation of some rank."""
    shape = reading.shape
    if reading.view is None:
        shape = _shape(reading.operand)
    wide_axes = [axis for axis, size in enumerate(shape) if size > 1]
    # x + positions, or a shift that is wider than the activation
    if len(wide_axes) > 1 or len(shape) > rank:
        return _table(reading)
    # Of a parameter of one number the last axis stands for all; a scalar has none.
    axes = range(len(reading.shape))
    out_axes = [axis for axis in axes if reading.shape[axis] > 1] or list(axes)[-1:]
    return reading.site(kind, out_axes=tuple(out_axes)), _source(activation)


def _table(reading: _Reading) -> Found:
    """Match a table of which entries, copied to where activations are, are joined with them there."""
    joined = _joined_shape(reading)
    if joined is None:
        return reading.refused(f"reads {_manner(reading)}, and joins no activation to it entry by entry")
    try:
        numbers = tables.entries(reading.shape, _moving(reading)).expand(joined)
    except (RuntimeError, TypeError, IndexError):
        return reading.refused(f"reads {_manner(reading)}, which follows values of activations")
    return reading.site("table", shown=tables.axes_shown(numbers, reading.shape)), ""


def _moving(reading: _Reading) -> list[Node]:
    """Return the operators between a parameter and what reads it that copy entries to other places."""
    behind, moving = reading.parameter, []
    for operator in reading.path:
        if not tables.is_affine(operator, behind):
            moving.append(operator)
        behind = operator
    return moving


def _manner(reading: _Reading) -> str:
    """Say through which operators a parameter is read."""
    if not reading.path:
        return "it"
    return "it through " + ", ".join([str(operator.target) for operator in reading.path])


def _joined_shape(reading: _Reading) -> Shape | None:
    """Return the shape in which the entries of a table meet activations, or None where they do not."""
    arguments = reading.reader.args
    places, others = reading.places(arguments), reading.others(arguments)
    name = reading.name.removesuffix("_")
    writes = reading.name != name and places == [0]
    if name in (*tables.JOINING, "aten.baddbmm") and len(places) == 1 and not writes:
        # Joined to what does not depend on the inputs it stays a table.
        if any(_of_inputs(other, reading.captured) for other in others):
            # Of baddbmm(bias, x, w) the bias is added; x and w are factors.
            return _shape(reading.reader) if name != "aten.baddbmm" or places == [0] else None
    # F.scaled_dot_product_attention(q, k, v, mask): the mask is added to the scores of every sample.
    if name == "aten.scaled_dot_product_attention" and reading.argument("attn_mask") is reading.operand:
        query, key = _shape(others[0]), _shape(others[1])
        return (*query[:-1], key[-2])
    # What is copied for every sample is an activation itself, whoever reads it.
    return _shape(reading.operand) if not writes and _is_spread(reading) else None


def _is_spread(reading: _Reading) -> bool:
    """Return whether entries of a table are copied for every sample before they are read."""
    for operator in _moving(reading):
        if traits_of(operator) & Trait.SPREADS or operator_name(operator.target) in tables.AFFINE:
            return True
    return False


def _of_inputs(node: Node, captured: Capture) -> bool:
    """Return whether a tensor depends on the inputs of the model, and not on parameters and buffers alone."""
    return _of(node, set(captured.inputs))


def _of(node: Node, sources: Set[Node]) -> bool:
    """Return whether a tensor depends on one of these."""
    return any(behind in sources for behind in walk([node], lambda operator: operator.all_input_nodes))


def root_of(node: Any) -> Any:
    """Follow copies and transposes back to what they show.

    Args:
        node: An operand.
    """
    while isinstance(node, Node) and node.op == "call_function" and node.args:
        source = node.args[0]
        if not isinstance(source, Node):
            break
        if _view_through(node, tuple(range(len(_shape(source))))) is None:
            break
        node = source
    return node


def _weight_behind(node: Any) -> Any:
    """Follow a weight back to the parameter that it is a view of.

    Args:
        node: An operand.
    """
    behind = root_of(node)
    while isinstance(behind, Node) and traits_of(behind) & Trait.KEEPS_ORDER:
        behind = root_of(behind.args[0])
    return behind


def _source(activation: Any) -> str:
    """Name the activation behind copies: taps that read equal ones share an input factor."""
    return str(behind_copies(activation))


# From the narrow patterns to the wide ones: a norm's gain is met before gains of all kinds.
PATTERNS = (_lookup, _bag, _convolution, _product, _grouped, _recurrence, _norm, _summed, _elementwise)
