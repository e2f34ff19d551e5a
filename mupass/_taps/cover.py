"""Coverage: which parameters K-FAC can take, where their taps go, and why not the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from mupass._errors import OptimizerError
from mupass._parallel import is_sharded
from mupass._records import Fusion, Geometry, Site
from mupass._roles.matrices import Matrices
from mupass._scales.plan import Plan
from mupass._taps.blocks import Block, Cover, Factor, Options, Place, Tied
from mupass._taps.factors import Layer, reduced
from mupass._taps.forms import CONVOLUTIONS, TRANSPOSED
from mupass._taps.intercept import product_key
from mupass._taps.sharded import is_collected
from mupass._taps.taps import NORMS, attach, tap_of

PRODUCTS = {"linear", "contraction"}
# Modules whose whole forward is a use of this kind, so that a hook on them sees it.
MODULES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "contraction": (nn.Linear,),  # as recorded runs show it
    "conv": (*CONVOLUTIONS, *TRANSPOSED),
    "standardized": (),
    "grouped": (),
    "embedding": (nn.Embedding,),
    "bag": (),
    "norm gain": NORMS,
    "norm shift": NORMS,
    "gain": (),
    "shift": (),
    "table": (),
}
VECTORS = {"gain", "shift", "norm gain", "norm shift"}
# Of attention whose keys and values have widths of their own.
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def cover(model: nn.Module, plan: Plan, options: Options, trained: frozenset[str]) -> Cover:
    """Decide about every parameter of a plan.

    Args:
        model: The module that the plan's names are relative to.
        plan: Its plan.
        options: Choices.
        trained: Parameters that are not frozen.

    Raises:
        OptimizerError: A pattern of ``exclude`` fits no parameter.
    """
    if plan.folded:
        attach(model)  # fold took the taps off
    maker = _Maker(model, plan, options)
    # Biases come last: they take the output factors of weights.
    biases = []
    for entry in plan.entries:
        if any(site.kind != "bias" for site in entry.geometry.sites):
            maker.add(entry.geometry, maker.weight)
        else:
            biases.append(entry.geometry)
    for geometry in biases:
        maker.add(geometry, maker.bias)
    maker.exclude()
    # In the plan's order, without frozen parameters.
    kept = {}
    for entry in plan.entries:
        name = entry.geometry.name
        if name in maker.blocks and name in trained:
            kept[name] = maker.blocks[name]
    maker.blocks = kept
    # Parameters that turned out to be frozen or excluded leave taps behind that nothing reads.
    read: set[Place] = set()
    for block in kept.values():
        for factor in block.factors:
            read.update(factor.places)
    layers = {place: layer for place, layer in maker.layers.items() if place in read}
    return Cover(tuple(kept.values()), layers, maker.reasons, maker.together())


class _Uncovered(Exception):
    """K-FAC does not take a parameter; the text says why."""


def _refuse_formless(sites: Iterable[Site]) -> None:
    """Refuse a parameter if an operator uses it in a way that has no Kronecker form.

    Raises:
        _Uncovered: One does.
    """
    for site in sites:
        if site.reason:
            raise _Uncovered(site.reason)


def _size(geometry: Geometry, axes: Iterable[int]) -> int:
    return prod(geometry.shape[axis] for axis in axes)


def _of_bias(bias: Geometry, weight: Matrices) -> Matrices | None:
    """Return how a bias splits into vectors as its weight does into matrices, or None where it does not."""
    (output_axis,) = weight.out_axes
    # A batch of weights, experts say, makes more outputs than the bias has numbers.
    for axis, size in enumerate(weight.shape):
        if size > 1 and axis != output_axis and axis not in weight.in_axes:
            return None
    outputs = weight.shape[output_axis]
    if output_axis > 0:  # groups divide the first axis
        outputs *= weight.groups
    if prod(bias.shape) != outputs or max(bias.shape, default=1) != outputs:
        return None
    fusions = tuple(replace(fusion, axis=fusion.axis - output_axis) for fusion in weight.fusions)
    return Matrices((outputs,), (0,), (), fusions, weight.groups)


class _Maker:
    """Builds blocks one parameter at a time."""

    def __init__(self, model: nn.Module, plan: Plan, options: Options) -> None:
        self.model, self.plan, self.options = model, plan, options
        self.blocks: dict[str, Block] = {}
        self.layers: dict[Place, Layer] = {}
        self.reasons: dict[str, str] = {}

    def add(self, geometry: Geometry, make: Callable[[Geometry], Block]) -> None:
        """Add the block of a parameter, or the reason why there is none."""
        try:
            self.blocks[geometry.name] = make(geometry)
        except _Uncovered as reason:
            self.reasons[geometry.name] = str(reason)

    def weight(self, geometry: Geometry) -> Block:
        """Cover a parameter that is no mere bias.

        Raises:
            _Uncovered: Its uses have no common Kronecker form.
        """
        # A tensor may be a weight and shift something as well.
        sites = [site for site in geometry.sites if site.kind != "bias"]
        kinds = {site.kind for site in sites}
        # nn.MultiheadAttention cuts its packed projection up: of that no single operator has a form.
        if "" in kinds:
            packed = self._packed_attention(geometry)
            if packed is not None:
                return packed
        _refuse_formless(sites)
        if len(sites) < len(geometry.sites):
            raise _Uncovered("it is a weight here and a bias there")
        return self._by_kind(geometry, sites, kinds)

    def _by_kind(self, geometry: Geometry, sites: Sequence[Site], kinds: set[str]) -> Block:
        """Cover a parameter by the form that the kinds of its uses have in common.

        Raises:
            _Uncovered: They have none.
        """
        uses = {(site.in_axes, site.out_axes) for site in sites}
        # x * gain, or x + shift, at one place or at several.
        if kinds <= VECTORS and len(kinds) == 1:
            return self._vector(geometry, sites)
        # x + positions: a table with a row for each position.
        if kinds == {"table"}:
            return self._table(geometry, sites)
        self._check_kinds(geometry, kinds)
        # All calls read the weight alike: their factors add up.
        alike = len(uses) == 1 and len({site.groups for site in sites}) == 1
        single = ({"conv"}, {"standardized"}, {"embedding"}, {"bag"}, {"grouped"})
        if alike and (kinds in single or kinds <= PRODUCTS):
            return self._single(geometry, sites)
        # F.embedding(tokens, table), and F.linear(h, table) at the end.
        if kinds <= {"embedding", *PRODUCTS} and uses == {((0,), (1,)), ((1,), (0,))}:
            return self._tied(geometry, sites)
        names = ", ".join(site.operator for site in sites)
        raise _Uncovered(f"its {len(sites)} uses ({names}) have no common Kronecker form")

    def _check_kinds(self, geometry: Geometry, kinds: set[str]) -> None:
        """Refuse kernels whose directions could not keep the length of rows.

        Raises:
            _Uncovered: This is one of them.
        """
        if kinds != {"standardized"}:
            return
        if is_sharded(self.model.get_parameter(geometry.name)):
            raise _Uncovered("its rows are standardized, and a step needs all of them, not a shard")
        if geometry.role == "output":
            raise _Uncovered("it is a readout of standardized rows, which keep their size at all widths")

    def bias(self, geometry: Geometry) -> Block:
        """Cover a bias by the output factors of the weight that it comes with.

        Raises:
            _Uncovered: There is no such weight, or the bias is not one number for each of its outputs.
        """
        try:
            # A bias shifts the output of a weight, whose B holds the gradients of that output already.
            block = self._partner(geometry)
        except _Uncovered:
            # F.linear(x, w, bias) of a weight that has no block: the bias has a tap of its own.
            if not self._has_own_tap(geometry):
                raise
            shifts = [replace(site, kind="shift", out_axes=(0,)) for site in geometry.sites]
            return self._vector(geometry, shifts)
        # beta * bias + alpha * product: the bias sees beta / alpha times the gradients of the product.
        scales = {site.scale for site in geometry.sites}
        if len(scales) > 1:
            raise _Uncovered("its uses multiply it by different numbers")
        matrices = _of_bias(geometry, block.matrices)
        if matrices is None:
            raise _Uncovered(
                f"its shape {list(geometry.shape)} is not one number for each output of {block.parameter}, "
                f"{list(block.matrices.shape)}"
            )
        places = block.b[0].places
        # Modules that share the weight may have biases of their own.
        owners = {site.module for site in geometry.sites}
        if owners != {""}:  # the root module itself calls all operators
            places = tuple(place for place in places if place.module is None or place.module in owners)
        (scale,) = scales
        # B is quadratic in the gradient, so the number enters it squared.
        factors = tuple(replace(factor, places=places, scale=scale**2) for factor in block.b)
        return Block(geometry.name, "bias", matrices, (), factors)

    def _partner(self, bias: Geometry) -> Block:
        """Return the block of the weight that a bias comes with.

        Raises:
            _Uncovered: There is none, or it is none that a bias can share factors with.
        """
        if not bias.sites:
            raise _Uncovered("the captured forward pass does not read it")
        _refuse_formless(bias.sites)
        partners = sorted({site.weight for site in bias.sites})
        block = self.blocks.get(partners[0])
        if len(partners) > 1 or block is None or len(block.matrices.out_axes) != 1 or block.tied:
            where = ", ".join(partners) or "several operators"
            raise _Uncovered(f"it shifts the output of {where}, which K-FAC does not take as one weight")
        return block

    def _has_own_tap(self, bias: Geometry) -> bool:
        """Whether a bias is given to functions that tap it by itself: ``F.linear(x, w, bias)``."""
        operators = {site.operator.split(".")[1] for site in bias.sites}
        plain = all(name == "linear" or name.startswith("conv") for name in operators)
        return bool(operators) and plain and not any(site.reason for site in bias.sites)

    def _places(self, geometry: Geometry, sites: Sequence[Site], key: str) -> tuple[Place, ...]:
        """Return the taps that see all of a parameter's sites.

        Raises:
            _Uncovered: There are none.
        """
        # A tied parameter has several names, and may be called through any of the modules that hold it.
        callers = {site.module for site in sites}
        fitting = set()
        for name in (geometry.name, *geometry.aliases):
            owner = name.rpartition(".")[0]
            module = self.model.get_submodule(owner)
            if isinstance(module, MODULES[sites[0].kind]) and tap_of(module) is not None:
                fitting.add(owner)
        # All of its uses must be calls of such modules: a hook would miss the others.
        if callers and callers <= fitting:
            return tuple(Place(caller, geometry.name) for caller in sorted(callers))
        # Other code uses it: the tap sits in the parameter, under the key of this use.
        sharded = self._is_shard(geometry)
        if key and not sharded:
            return (Place(None, geometry.name, key),)
        site = sites[0]
        reason = f"{site.operator} is called by {site.module or 'the root module'}, not by a plain module"
        if sharded:
            reason += ", and a sharded parameter cannot carry a tap"
        raise _Uncovered(reason)

    def _is_shard(self, geometry: Geometry) -> bool:
        """Whether code sees shards: all of a parameter only where FSDP2 collects it."""
        sharded = is_sharded(self.model.get_parameter(geometry.name))
        return sharded and not is_collected(self.model, geometry.name)

    def _vector(self, geometry: Geometry, sites: Sequence[Site]) -> Block:
        """Cover a gain or a shift by the gradients of every position."""
        if not self.options.norms:
            raise _Uncovered("norms=False")
        if len({site.out_axes for site in sites}) > 1:
            raise _Uncovered(f"its {len(sites)} uses act on different axes")
        kind, size = sites[0].kind.removeprefix("norm "), prod(geometry.shape)
        places = self._places(geometry, sites, kind)
        present = [kind]
        if places[0].module is not None:  # one tap serves a norm's gain and its shift
            module = self.model.get_submodule(places[0].module)
            attributes = {"gain": "weight", "shift": "bias"}
            present = [part for part, name in attributes.items() if getattr(module, name, None) is not None]
            places = tuple(replace(place, parameter="") for place in places)
        gains = tuple(part == "gain" for part in present)
        self._open(places, Layer("vector", 1, 0, (size,) * len(present), gains=gains))
        factor = Factor("b", places, present.index(kind))
        # y = gain * x + shift: gain and shift are vectors, with a B and no A.
        return Block(geometry.name, kind, Matrices((size,), (0,)), (), (factor,))

    def _table(self, geometry: Geometry, sites: Sequence[Site]) -> Block:
        """Cover a table whose entries are copied to where activations are and joined with them there."""
        # A look-up by an index is no product with an activation.
        if any(use.fan_in and use.kind != "embedding" for use in geometry.uses):
            raise _Uncovered(
                "it is a weight that is multiplied with activations before they are multiplied by it"
            )
        features, rows = self._features(geometry, sites)
        # Where the features stand in what meets activations, one feature axis after the other.
        shown = set()
        for site in sites:
            shown.add(sum([site.shown[axis] for axis in features], ()))
        if len(shown) > 1:
            raise _Uncovered(f"its {len(sites)} uses act on different axes")
        matrices = Matrices(geometry.shape, features, rows)
        layer = self._layer(geometry, matrices, "table")
        if not rows:  # one row has no A
            matrices = Matrices((_size(geometry, features),), (0,))
            layer = Layer("vector", 1, 0, (_size(geometry, features),), gains=(False,))
        places = self._places(geometry, sites, "table")
        self._open(places, replace(layer, features=features, shown=shown.pop()))
        inputs = (Factor("a", places),) if rows else ()
        return Block(geometry.name, "table", matrices, inputs, (Factor("b", places),))

    def _features(self, geometry: Geometry, sites: Sequence[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the axes of a table that are features, and those that count its rows.

        Raises:
            _Uncovered: Features are not seen as such where they meet activations, or several axes grow and no
                other counts rows.
        """
        # A table of shape [1, length, width] has two axes: those of size 1 are there for broadcasting.
        wide = [axis for axis, size in enumerate(geometry.shape) if size > 1]
        whole = [axis for axis in wide if all(site.shown[axis] for site in sites)]
        # What grows are features; positions do not. Without features every number is a row.
        features = tuple(axis for axis in wide if geometry.infinite[axis])
        if not features:
            features = tuple(whole[-1:])
        cut = [axis for axis in features if axis not in whole]
        if cut:
            raise _Uncovered(
                f"its features, axes {cut}, are cut, picked from or mixed with others before they meet "
                "activations"
            )
        rows = tuple(axis for axis in wide if axis not in features)
        if not rows and len(features) > 1:
            raise _Uncovered("all of its axes grow, so that none of them counts rows of a table")
        return features, rows

    def _single(self, geometry: Geometry, sites: Sequence[Site]) -> Block:
        """Cover a weight that all of its sites use in the same way."""
        kind, in_axes, out_axes = sites[0].kind, sites[0].in_axes, sites[0].out_axes
        key = product_key(in_axes, out_axes)
        if kind in ("embedding", "bag", "conv", "standardized"):
            key = kind
        elif kind == "grouped":
            key = f"{kind} {key}"
        places = self._places(geometry, sites, key)
        groups = sites[0].groups
        # A transposed convolution has its input channels on the first axis.
        if kind == "conv" and out_axes != (0,):
            kind = "conv_transpose"
        elif kind == "bag":
            kind = "embedding"
        elif kind in PRODUCTS and len(geometry.shape) == 2:
            kind = "linear"
        # Groups cut the first axis themselves: fusions of a grouped kernel are not followed.
        fusions: tuple[Fusion, ...] = ()
        if groups == 1:
            fusions = tuple(fusion for fusion in geometry.fusions if fusion.axis in out_axes)
        matrices = Matrices(geometry.shape, out_axes, in_axes, fusions, groups)
        layer = self._layer(geometry, matrices, kind)
        self._open(places, layer)
        # A fused weight (q, k, v) reads one input, and has output gradients for every matrix.
        inputs = (Factor("a", places),) * len(layer.outputs)
        outputs = tuple(Factor("b", places, piece) for piece in range(len(layer.outputs)))
        return Block(geometry.name, kind, matrices, inputs, outputs)

    def _layer(self, geometry: Geometry, matrices: Matrices, kind: str) -> Layer:
        """Return the shapes of the factors of a weight."""
        in_axes, out_axes = matrices.in_axes, matrices.out_axes
        inputs, outputs = _size(geometry, in_axes), _size(geometry, out_axes)
        # Axes that are neither summed over nor made: they count experts, say.
        batch = [axis for axis in range(len(geometry.shape)) if axis not in (*in_axes, *out_axes)]
        # Groups divide the first axis, whichever side it is on.
        if 0 in in_axes:
            inputs //= matrices.groups
        if 0 in out_axes:
            outputs //= matrices.groups
        sizes = [outputs]
        for fusion in matrices.fusions:
            # Of several fusions each cuts what those before it have left.
            finer = []
            for size in sizes:
                unit = size // sum(fusion.sizes)
                finer += [unit * length for length in fusion.sizes]
            sizes = finer
        return Layer(
            kind,
            matrices.groups * _size(geometry, batch),
            inputs,
            tuple(sizes),
            # Rows are laid out as [groups, samples, positions, *out_axes].
            tuple(replace(fusion, axis=3 + out_axes.index(fusion.axis)) for fusion in matrices.fusions),
            diagonal_in=kind in ("embedding", "table") or self._is_table(geometry, in_axes),
            diagonal_out=self._is_table(geometry, out_axes),
        )

    def _is_table(self, geometry: Geometry, axes: Sequence[int]) -> bool:
        """Whether a side is large and does not grow; a cut at some width would change exponents in width."""
        grows = any(geometry.infinite[axis] for axis in axes)
        return not grows and _size(geometry, axes) > self.options.diagonal_above

    def _tied(self, geometry: Geometry, sites: Sequence[Site]) -> Block:
        """Cover a table that is read by index (or as a first layer) and used as a readout as well."""
        out_axes = geometry.fan_out_axes
        # Fans that are not one axis each: the table is taken as a look-up reads it, [rows, features].
        if out_axes not in ((0,), (1,)):
            out_axes = (1,)
        in_axes = (1 - out_axes[0],)
        # A look-up sums over rows and makes features; a readout sums over features and makes rows.
        first = self._side(geometry, sites, in_axes, out_axes, rows=in_axes)
        second = self._side(geometry, sites, out_axes, in_axes, rows=in_axes)
        matrices = Matrices(geometry.shape, out_axes, in_axes)
        return Block(geometry.name, "tied", matrices, first[:1], first[1:], Tied(first, second))

    def _side(
        self,
        geometry: Geometry,
        sites: Sequence[Site],
        in_axes: tuple[int, ...],
        out_axes: tuple[int, ...],
        rows: tuple[int, ...],
    ) -> tuple[Factor, Factor]:
        """Return the factors of one of the two uses of a tied weight."""
        fitting = [site for site in sites if (site.in_axes, site.out_axes) == (in_axes, out_axes)]
        kind = fitting[0].kind
        key = kind if kind == "embedding" else product_key(in_axes, out_axes)
        places = self._places(geometry, fitting, key)
        layer = self._layer(geometry, Matrices(geometry.shape, out_axes, in_axes), kind)
        # The side that counts the rows of the table is a diagonal in one use, so it is in the other.
        if in_axes == rows:
            layer = replace(layer, diagonal_in=True)
        if out_axes == rows:
            layer = replace(layer, diagonal_out=True)
        self._open(places, layer)
        return Factor("a", places), Factor("b", places)

    def _packed_attention(self, geometry: Geometry) -> Block | None:
        """Cover the packed projection of cross-attention: three matrices with inputs of their own."""
        path, _, leaf = geometry.name.rpartition(".")
        if not isinstance(self.model.get_submodule(path), nn.MultiheadAttention) or self._is_shard(geometry):
            return None
        third = geometry.shape[0] // 3
        # [3 * width, width] as three matrices of width rows: the first axis is cut into [3, width].
        fusions = (Fusion(0, (3, third), 0, (1, 1, 1)),)
        if leaf == "in_proj_weight":
            # A tap for each third, since query, key and value are different inputs.
            places = tuple(Place(None, geometry.name, key) for key in "qkv")
            self._open(places, Layer("linear", 1, geometry.shape[1], (third,)))
            inputs, outputs = (tuple(Factor(side, (place,)) for place in places) for side in "ab")
            return Block(
                geometry.name, "linear", Matrices(geometry.shape, (0,), (1,), fusions), inputs, outputs
            )
        if leaf != "in_proj_bias":
            return None
        prefix = geometry.name.removesuffix(leaf)
        names = ["in_proj_weight"] if f"{prefix}in_proj_weight" in self.plan else SEPARATE
        # The packed bias takes the Bs of q, k and v, in this order.
        factors: list[Factor] = []
        for name in names:
            block = self.blocks.get(prefix + name)
            if block is None:
                return None
            factors += block.b
        return Block(geometry.name, "bias", Matrices(geometry.shape, (0,), (), fusions), (), tuple(factors))

    def _open(self, places: Iterable[Place], layer: Layer) -> None:
        layer = replace(layer, block=self.options.block)
        if self.options.reduce:
            layer = reduced(layer)
        self.layers.update(dict.fromkeys(places, layer))

    def exclude(self) -> None:
        """Leave out what the caller's patterns name."""
        for pattern in self.options.exclude:
            fitting = [name for name in (*self.blocks, *self.reasons) if fnmatchcase(name, pattern)]
            if not fitting:
                raise OptimizerError(f"exclude={pattern!r} fits no parameter")
            for name in fitting:
                self.blocks.pop(name, None)
                self.reasons[name] = f"exclude={pattern!r}"

    def together(self) -> tuple[tuple[Place, ...], ...]:
        """Group the taps of linear weights that read the same activations."""
        # q, k and v of one layer read the same activation, whose factor is then multiplied once.
        groups: dict[tuple[str, ...], list[Place]] = defaultdict(list)
        for name, block in self.blocks.items():
            sites = [site for site in self.plan[name].geometry.sites if site.kind == "linear"]
            # One use, seen by one tap, with one input factor for all matrices.
            if len(sites) != 1 or block.tied or len(set(block.a)) != 1 or len(block.a[0].places) != 1:
                continue
            (place,), (site,) = block.a[0].places, sites
            if not self.layers[place].diagonal_in and all(site.sources):
                groups[site.sources].append(place)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)
