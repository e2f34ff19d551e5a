"""Records of what the graph says of each parameter: axes, uses, role. The vocabulary of all rooms."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

Role = Literal["input", "hidden", "output", "vector", "scalar"]
Shape = tuple[int, ...]
Axes = tuple[int, ...]
Ranges = tuple[tuple[int, int], ...]  # positions along an axis, as (first, behind the last)
PRODUCT_AND_SUM = "product and sum"  # kind of the use of a weight in (x * w).sum(-1)


@dataclass(frozen=True)
class Use:
    """One operator that reads a parameter.

    Attributes:
        operator: ATen name, such as ``aten.linear.default``.
        module: Qualified name of the module whose forward called it; ``""`` is the root.
        kind: ``linear``, ``conv``, ``conv_transpose``, ``embedding``, ``matmul``,
            ``product and sum``, ``recurrent``, ``pointwise``, ``norm`` or ``other``.
        fan_in: Axes of the parameter that the operator contracts with an activation.
        fan_out: Axes of the parameter that the operator keeps.
        fed_by: Of a tied readout, modules whose outputs are what it reads, and that nothing else reads: a
            multiplier on what it reads can go there.
        unfed: Why there are none.
    """

    operator: str
    module: str
    kind: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    fed_by: tuple[str, ...] = ()
    unfed: str = ""


@dataclass(frozen=True)
class Site:
    """How one operator uses a parameter: what a preconditioner needs to know of it.

    Attributes:
        kind: ``linear``, ``contraction``, ``grouped``, ``conv``, ``standardized`` (a kernel whose rows are
            standardized first), ``embedding``, ``bag``, ``gain``, ``shift``, ``norm gain``, ``norm shift``,
            ``table``, ``bias``;
            ``""`` where there is no Kronecker form.
        operator: ATen name.
        module: Qualified name of the module whose forward called it.
        in_axes: Axes of the parameter that are summed with the activation's.
        out_axes: Axes of the parameter that only the output shares.
        weight: Of a bias, the weight whose output it shifts.
        sources: Names of the activations in the captured graph, one a call: equal names, one activation.
        reason: Why there is no Kronecker form.
        scale: Of a bias, what multiplies it over what multiplies the weight's product (``beta / alpha``).
        groups: Number of separate convolutions.
        shown: Of a table, for every axis of the parameter the axes along which its positions stand where it
            meets activations, counted from the last one (-1); none where it is not whole there.
    """

    kind: str
    operator: str
    module: str
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    weight: str = ""
    sources: tuple[str, ...] = ()
    reason: str = ""
    scale: float = 1.0
    groups: int = 1
    shown: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Fusion:
    """An axis along which a parameter holds several matrices.

    Attributes:
        axis: The axis.
        view: Sizes that the axis splits into, row-major.
        along: Which of them counts the matrices.
        sizes: Length of every matrix along it: ones for a stack, sizes of the parts for a concatenation.
        grows: For every one of the sizes that the axis splits into, whether it grows with width.
        part_grows: For every matrix, whether its length along the axis does; empty where one of them is a sum
            that holds something fixed, so that its length does not follow from that of the axis.
    """

    axis: int
    view: tuple[int, ...]
    along: int
    sizes: tuple[int, ...]
    grows: tuple[bool, ...] = ()
    part_grows: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Carrier:
    """Plain parameters that can hold a factor on a value of the forward pass in the place of a hook.

    Attributes:
        parameters: Those to be multiplied by the factor.
        divided: Those to be divided by it: other readers of the value, which must not notice.
        offsets: Parameter -> constant that the code adds to it: ``c (w + 1) = (c w + c - 1) + 1``.
        tied: Of a readout, the tied parameter; ``""`` for a branch.
        reason: Why no parameters can; ``""`` if some can.
    """

    parameters: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    offsets: tuple[tuple[str, float], ...] = ()
    tied: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ScoreScale:
    """A factor on attention scores whose head_dim grows, put on the queries: ``1/head_dim``, not its root.

    Attributes:
        module: What puts out the queries; or, with ``attention``, the `nn.MultiheadAttention` itself.
        growth: head_dim relative to its base size.
        where: The operators that compute the scores.
        parts: Where the queries are in what the module puts out, as (first, behind the last) along its
            features; empty if that is nothing else.
        axis: Axis of the features in what the module puts out.
        attention: Whether the module computes queries and scores itself.
        rows: Parameters that make the queries, with the axis of the features: what can hold the factor on
            ``parts`` in the place of a hook.
        carrier: What can hold it where the module puts out queries alone.
        follows: A parameter whose fan_out grows as head_dim does, ``""`` if there is none.
    """

    module: str
    growth: float
    where: tuple[str, ...] = ()
    parts: Ranges = ()
    axis: int = -1
    attention: bool = False
    rows: tuple[tuple[str, int], ...] = ()
    carrier: Carrier = Carrier()
    follows: str = ""

    @property
    def factor(self) -> float:
        """What scores are multiplied by: from ``1/sqrt(d)`` to ``sqrt(base)/d``."""
        return float(self.growth**-0.5)

    def note(self) -> str:
        """Return what to write in the model where the factor is left out."""
        return (
            f"{', '.join(self.where)}: head_dim grows, so logits must scale as 1/head_dim, not "
            "1/sqrt(head_dim)"
        )

    def explanation(self) -> str:
        """Return what is changed in the forward pass, and why."""
        what = "the queries in what" if self.parts else "what"
        changed = f"{what} {self.module or 'the model'} puts out is multiplied by {self.factor:.6g}"
        if self.attention:
            changed = f"the scores inside of {self.module or 'the model'} are multiplied by {self.factor:.6g}"
        return (
            f"{changed} = (base head_dim / head_dim)^(1/2): head_dim grows, and scores go with 1/head_dim, "
            f"not its root ({', '.join(self.where)}; Yang et al., arXiv 2203.03466, definition 4.1)"
        )


@dataclass(frozen=True)
class Branch:
    """One branch of a residual stream, the ``f(x)`` of a sum ``x + f(x)``.

    Attributes:
        modules: Whose outputs, added up, are the branch: where a multiplier goes.
        parameters: Those that act on the model's output through this branch alone.
        reason: Why no module ends the branch; ``""`` if one does.
        carrier: What can hold the branch's multiplier in the place of a hook.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    reason: str = ""
    carrier: Carrier = Carrier()


@dataclass(frozen=True)
class Geometry:
    """Width geometry of one parameter.

    Attributes:
        name: Qualified name, the first one for a tied parameter.
        shape: Sizes of the axes.
        base_shape: Sizes of the same axes at the base width (not always whole numbers).
        infinite: For every axis, whether it grows with width.
        dims: For every axis, its readable name or term, such as ``d_model`` or ``3*d_model``.
        role: Row of the scale table. ``input``: only fan_out grows; ``hidden``: both grow;
            ``output``: only fan_in grows; ``vector``: no fan_in axis (bias, gain) and the one kept
            axis grows; ``scalar``: no axis grows.
        fan_in_axes: Axes that make up fan_in (kernel axes included); ``()`` for vectors.
        fan_out_axes: Axes that make up fan_out.
        readout_uses: Uses in which the parameter acts as a readout (only fan_in grows) although
            its role is ``input``: a tied embedding. They need the readout multiplier.
        uses: Every operator that reads the parameter.
        evidence: Why, one line a fact.
        ambiguous: For every axis, whether one model could not settle it (a policy decided).
        aliases: Further qualified names of the same tensor.
        fusions: Output axes along which the tensor holds several matrices (qkv, gate and up, gates).
        sites: Where taps of a preconditioner can go.
        given: Power of width that the entries of what it multiplies have, since the code scales them so
            (-1/2 for a tensor of unit length); of the multiplier of its fan_in, of its fan_out where it has
            none. For a tied embedding that of its readout.
        normalized: Of a readout, the operator that divides its output by the output's own size; else ``""``.
        length: Of a weight under weight norm, the parameter that holds its length.
        direction: Of such a length, the weight whose length it is.
        m_direction: fan_in of that weight relative to the base width where it is a readout; else 1.
        depth: Number of residual branches relative to the base depth, for a parameter that acts through one
            of them alone; else 1.
        folded: What `mupass.fold` multiplied the parameter by, to hold a factor on what it makes.
        folded_in: What `mupass.fold` multiplied it by, to undo a factor on what it is multiplied with.
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[float, ...]
    infinite: tuple[bool, ...]
    dims: tuple[str, ...]
    role: Role
    fan_in_axes: tuple[int, ...] = ()
    fan_out_axes: tuple[int, ...] = ()
    readout_uses: tuple[Use, ...] = ()
    uses: tuple[Use, ...] = ()
    evidence: tuple[str, ...] = ()
    ambiguous: tuple[bool, ...] = ()
    aliases: tuple[str, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    sites: tuple[Site, ...] = ()
    given: float = 0.0
    normalized: str = ""
    length: str = ""
    direction: str = ""
    m_direction: float = 1.0
    depth: float = 1.0
    folded: float = 1.0
    folded_in: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """All qualified names of the tensor, its own one first."""
        return (self.name, *self.aliases)

    @property
    def fan_in(self) -> int:
        """Product of the fan_in axes (1 for vectors)."""
        return prod(self.shape[number] for number in self.fan_in_axes)

    @property
    def fan_out(self) -> int:
        """Product of the fan_out axes."""
        return prod(self.shape[number] for number in self.fan_out_axes)

    @property
    def grows_in(self) -> bool:
        """Whether fan_in grows."""
        return any(self.infinite[axis] for axis in self.fan_in_axes)

    @property
    def grows_out(self) -> bool:
        """Whether fan_out grows."""
        return any(self.infinite[axis] for axis in self.fan_out_axes)

    @property
    def sums_change(self) -> bool:
        """Whether its sums run over a side that grows, at a width other than the base."""
        return self.role in ("hidden", "output") and self.shape != self.base_shape

    @property
    def m_in(self) -> float:
        """Width multiplier fan_in / base fan_in; 1 where fan_in is finite, or zero."""
        return self._growth_of(self.fan_in_axes)

    @property
    def m_out(self) -> float:
        """Width multiplier fan_out / base fan_out; 1 where fan_out is finite, or zero."""
        return self._growth_of(self.fan_out_axes)

    def _growth_of(self, axes: tuple[int, ...]) -> float:
        """Return the size of some axes together relative to their base size; 1 where that is zero."""
        size = prod(self.shape[number] for number in axes)
        return size / prod(self.base_shape[number] for number in axes) if size else 1.0
