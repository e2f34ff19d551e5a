"""Coverage: which parameters K-FAC can take, where their taps go, and why not the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
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

PRODUCTS = ("linear", "contraction")
MODULES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "contraction": (nn.Linear,),  # as recorded runs show it
    "conv": (*CONVOLUTIONS, *TRANSPOSED),
    "embedding": (nn.Embedding,),
    "norm gain": NORMS,
    "norm shift": NORMS,
    "gain": (),
    "shift": (),
}
VECTORS = {"gain", "shift", "norm gain", "norm shift"}
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # of attention with widths of its own


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
    weights = [e.geometry for e in plan.entries if any(s.kind != "bias" for s in e.geometry.sites)]
    for geometry in weights:
        maker.weight(geometry)
    for entry in plan.entries:
        if entry.geometry not in weights:
            maker.bias(entry.geometry)
    maker.exclude()
    maker.blocks = {n: b for n, b in maker.blocks.items() if n in trained}
    order = {e.geometry.name: i for i, e in enumerate(plan.entries)}
    blocks = tuple(sorted(maker.blocks.values(), key=lambda b: order[b.parameter]))
    read = {p for b in blocks for f in (*b.a, *b.b, *_second(b)) for p in f.places}
    layers = {p: layer for p, layer in maker.layers.items() if p in read}
    return Cover(blocks, layers, maker.reasons, maker.together())


def _second(block: Block) -> tuple[Factor, ...]:
    return block.tied.second if block.tied else ()


def _of_bias(g: Geometry, weight: Matrices) -> Matrices | None:
    """Return how a bias splits into vectors as its weight does into matrices, or None where it does not."""
    out, size = weight.out_axes[0], prod(g.shape)
    batch = prod(n for i, n in enumerate(weight.shape) if i not in (*weight.out_axes, *weight.in_axes))
    outputs = weight.shape[out] * (weight.groups if out else 1)  # groups divide the first axis
    if batch > 1 or size != outputs or max(g.shape, default=1) != size:
        return None
    fusions = tuple(replace(f, axis=f.axis - out) for f in weight.fusions)
    return Matrices((size,), (0,), (), fusions, weight.groups)


def _first_reason(sites: Iterable[Site]) -> str:
    return next((site.reason for site in sites if site.reason), "")


def _bias_reason(bias: Geometry) -> str:
    """Return why the uses of a bias cannot be covered; ``""`` if they can."""
    if not bias.sites:
        return "the captured forward pass does not read it"
    return _first_reason(bias.sites)


def _no_partner(bias: Geometry, partners: set[str], block: Block | None) -> str:
    """Return why a bias cannot take the output factors of the weight that it comes with."""
    if block is None:
        where = ", ".join(sorted(partners)) or "several operators"
        return f"it shifts the output of {where}, which K-FAC does not take as one weight"
    if len({site.scale for site in bias.sites}) > 1:
        return "its uses multiply it by different numbers"
    return (
        f"its shape {list(bias.shape)} is not one number for each output of {block.parameter}, "
        f"{list(block.matrices.shape)}"
    )


class _Maker:
    """Builds blocks one parameter at a time."""

    def __init__(self, model: nn.Module, plan: Plan, options: Options) -> None:
        self.model, self.plan, self.options = model, plan, options
        self.blocks: dict[str, Block] = {}
        self.layers: dict[Place, Layer] = {}
        self.reasons: dict[str, str] = {}

    def weight(self, g: Geometry) -> None:
        """Cover a parameter that is no mere bias, or say why not."""
        sites = [site for site in g.sites if site.kind != "bias"]
        if any(site.kind == "" for site in sites) and self._packed_attention(g):
            return
        reason = _first_reason(sites)
        if not reason and len(sites) < len(g.sites):
            reason = "it is a weight here and a bias there"
        if reason:
            self.reasons[g.name] = reason
            return
        kinds = {site.kind for site in sites}
        uses = {(site.in_axes, site.out_axes) for site in sites}
        if kinds <= VECTORS and len(kinds) == 1:
            self._vector(g, sites)
        elif kinds in ({"conv"}, {"embedding"}) or (kinds <= {*PRODUCTS} and len(uses) == 1):
            self._single(g, sites)
        elif kinds <= {"embedding", *PRODUCTS} and uses == {((0,), (1,)), ((1,), (0,))}:
            self._tied(g, sites)
        else:
            names = ", ".join(site.operator for site in sites)
            self.reasons[g.name] = f"its {len(sites)} uses ({names}) have no common Kronecker form"

    def bias(self, g: Geometry) -> None:
        """Cover a bias by the output factors of the weight that it comes with."""
        partners = {site.weight for site in g.sites}
        block = None
        if len(partners) == 1:
            block = self.blocks.get(next(iter(partners)))
        if block is not None and (len(block.matrices.out_axes) != 1 or block.tied):
            block = None
        matrices = None
        if block is not None:
            matrices = _of_bias(g, block.matrices)
        scales = {site.scale for site in g.sites}
        if block is None or matrices is None or len(scales) > 1 or _bias_reason(g):
            self.reasons[g.name] = _bias_reason(g) or _no_partner(g, partners, block)
            return
        owners = {site.module for site in g.sites}
        seen = [place for place in block.b[0].places if place.module is None or place.module in owners]
        if owners == {""}:  # the root module itself calls all operators
            seen = list(block.b[0].places)
        (scale,) = scales
        factors = tuple(replace(factor, places=tuple(seen), scale=scale**2) for factor in block.b)
        self.blocks[g.name] = Block(g.name, "bias", matrices, (), factors)

    def _places(self, g: Geometry, sites: list[Site], key: str) -> tuple[Place, ...] | None:
        """Return the taps that see all of a parameter's sites, or None."""
        owners = {name.rpartition(".")[0] for name in (g.name, *g.aliases)}
        callers = {s.module for s in sites}
        fitting = {
            m
            for m in owners
            if isinstance(module := self.model.get_submodule(m), MODULES[sites[0].kind]) and tap_of(module)
        }
        if callers and callers <= fitting:
            return tuple(Place(m, g.name) for m in sorted(callers))
        return (Place(None, g.name, key),) if key and not self._apart(g) else None

    def _apart(self, g: Geometry) -> bool:
        """Whether code sees shards: all of a parameter only where FSDP2 collects it."""
        return is_sharded(self.model.get_parameter(g.name)) and not is_collected(self.model, g.name)

    def _misplaced(self, g: Geometry, site: Site) -> str:
        where = f"{site.operator} is called by {site.module or 'the root module'}, not by a plain module"
        return f"{where}, and a sharded parameter cannot carry a tap" if self._apart(g) else where

    def _vector(self, g: Geometry, sites: list[Site]) -> None:
        """Cover a gain or a shift by the gradients of every position."""
        if not self.options.norms:
            self.reasons[g.name] = "norms=False"
            return
        if len({s.out_axes for s in sites}) > 1:
            self.reasons[g.name] = f"its {len(sites)} uses act on different axes"
            return
        kind, size, piece = sites[0].kind.removeprefix("norm "), prod(g.shape), 0
        layer = Layer("vector", 1, 0, (size,), gains=(kind == "gain",))
        places = self._places(g, sites, kind)
        if places is None:
            self.reasons[g.name] = self._misplaced(g, sites[0])
            return
        module = self.model.get_submodule(places[0].module) if places[0].module is not None else None
        if module is not None:  # one tap serves a norm's gain and its bias
            present = [n for n in ("weight", "bias") if getattr(module, n, None) is not None]
            places = tuple(Place(p.module, "") for p in places)
            layer = replace(
                layer, outputs=(size,) * len(present), gains=tuple(n == "weight" for n in present)
            )
            piece = present.index("weight" if kind == "gain" else "bias")
        self._open(places, layer)
        factor = Factor("b", places, piece)
        self.blocks[g.name] = Block(g.name, kind, Matrices((size,), (0,)), (), (factor,))

    def _single(self, g: Geometry, sites: list[Site]) -> None:
        """Cover a weight that all of its sites use in the same way."""
        site = sites[0]
        into, made = site.in_axes, site.out_axes
        key = {"embedding": "embedding", "conv": ""}.get(site.kind, product_key(into, made))
        places = self._places(g, sites, key)
        if places is None:
            self.reasons[g.name] = self._misplaced(g, site)
            return
        groups, kind = 1, "linear" if site.kind in PRODUCTS and len(g.shape) == 2 else site.kind
        if site.kind == "conv":
            module = self.model.get_submodule(places[0].module or "")
            groups = int(module.groups)  # type: ignore[arg-type]
            if isinstance(module, TRANSPOSED):
                kind, into, made = "conv_transpose", (0, *range(2, len(g.shape))), (1,)
        fusions = tuple(f for f in g.fusions if f.axis in made) if groups == 1 else ()
        matrices = Matrices(g.shape, made, into, fusions, groups)
        self._open(places, self._layer(g, matrices, kind))
        pieces = len(self.layers[places[0]].outputs)
        a = (Factor("a", places),) * pieces
        b = tuple(Factor("b", places, i) for i in range(pieces))
        self.blocks[g.name] = Block(g.name, kind, matrices, a, b)

    def _layer(self, g: Geometry, m: Matrices, kind: str) -> Layer:
        batch = [i for i in range(len(g.shape)) if i not in (*m.out_axes, *m.in_axes)]
        inputs = prod(g.shape[i] for i in m.in_axes)
        outputs = prod(g.shape[i] for i in m.out_axes)
        inputs //= m.groups if 0 in m.in_axes else 1  # groups divide the first axis, whichever side it is on
        outputs //= m.groups if 0 in m.out_axes else 1
        sizes = [outputs]
        for f in m.fusions:
            sizes = [n // sum(f.sizes) * s for n in sizes for s in f.sizes]
        return Layer(
            kind,
            m.groups * prod(g.shape[i] for i in batch),
            inputs,
            tuple(sizes),
            tuple(replace(f, axis=3 + m.out_axes.index(f.axis)) for f in m.fusions),
            diagonal_in=kind == "embedding" or self._large(g, m.in_axes),
            diagonal_out=self._large(g, m.out_axes),
        )

    def _large(self, g: Geometry, axes: tuple[int, ...]) -> bool:
        """A growing side keeps its full factor: cutting it at some width would change the exponents."""
        fixed = not any(g.infinite[i] for i in axes)
        return fixed and prod(g.shape[i] for i in axes) > self.options.diagonal_above

    def _tied(self, g: Geometry, sites: list[Site]) -> None:
        """Cover a table that is read by index (or as a first layer) and used as a readout as well."""
        made = g.fan_out_axes if g.fan_out_axes in ((0,), (1,)) else (1,)
        into = (1 - made[0],)
        sides: list[tuple[Factor, Factor]] = []
        for use in ((into, made), (made, into)):
            own = [s for s in sites if (s.in_axes, s.out_axes) == use]
            key = "embedding" if own[0].kind == "embedding" else product_key(*use)
            places = self._places(g, own, key)
            if places is None:
                self.reasons[g.name] = self._misplaced(g, own[0])
                return
            matrices = Matrices(g.shape, use[1], use[0])
            layer = self._layer(g, matrices, own[0].kind)
            # The side that is a table's length is a diagonal in one use, so it is in the other.
            layer = replace(layer, diagonal_out=True) if sides else replace(layer, diagonal_in=True)
            self._open(places, layer)
            sides.append((Factor("a", places), Factor("b", places)))
        matrices = Matrices(g.shape, made, into)
        self.blocks[g.name] = Block(
            g.name, "tied", matrices, sides[0][:1], sides[0][1:], Tied(sides[0], sides[1])
        )

    def _packed_attention(self, g: Geometry) -> bool:
        """Cover the packed projection of cross-attention: three matrices with inputs of their own."""
        path, _, leaf = g.name.rpartition(".")
        if not isinstance(self.model.get_submodule(path), nn.MultiheadAttention) or self._apart(g):
            return False
        third = g.shape[0] // 3
        fusions = (Fusion(0, (3, third), 0, (1, 1, 1)),)
        if leaf == "in_proj_bias":
            names = ["in_proj_weight"] if f"{path}.in_proj_weight".lstrip(".") in self.plan else SEPARATE
            weights = [self.blocks.get(f"{path}.{name}".lstrip(".")) for name in names]
            if all(weights):
                b = tuple(f for block in weights if block for f in block.b)
                self.blocks[g.name] = Block(g.name, "bias", Matrices(g.shape, (0,), (), fusions), (), b)
        elif leaf == "in_proj_weight":
            places = [Place(None, g.name, key) for key in "qkv"]
            self._open(tuple(places), Layer("linear", 1, g.shape[1], (third,)))
            a, b = (tuple(Factor(side, (p,)) for p in places) for side in "ab")
            self.blocks[g.name] = Block(g.name, "linear", Matrices(g.shape, (0,), (1,), fusions), a, b)
        return g.name in self.blocks

    def _open(self, places: tuple[Place, ...], layer: Layer) -> None:
        layer = replace(layer, block=self.options.block)
        for place in places:
            self.layers[place] = reduced(layer) if self.options.reduce else layer

    def exclude(self) -> None:
        """Leave out what the caller's patterns name."""
        for pattern in self.options.exclude:
            fitting = [n for n in (*self.blocks, *self.reasons) if fnmatchcase(n, pattern)]
            if not fitting:
                raise OptimizerError(f"exclude={pattern!r} fits no parameter")
            for name in fitting:
                self.blocks.pop(name, None)
                self.reasons[name] = f"exclude={pattern!r}"

    def together(self) -> tuple[tuple[Place, ...], ...]:
        """Group the taps of linear weights that read the same activations."""
        groups: dict[tuple[str, ...], list[Place]] = defaultdict(list)
        for name, block in self.blocks.items():
            sites = [s for s in self.plan[name].geometry.sites if s.kind == "linear"]
            places = block.a[0].places if block.a else ()
            alone = len(sites) == 1 and block.tied is None and len(places) == 1 and len(set(block.a)) == 1
            if alone and not self.layers[places[0]].diagonal_in and all(sites[0].sources):
                groups[sites[0].sources].append(places[0])
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)
