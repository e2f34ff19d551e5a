"""New parameters and buffers of a resized model, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mupass._analyze import geometry_of
from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._errors import ResizeError, warn
from mupass._records import Geometry
from mupass._resize.attributes import Attributes
from mupass._resize.renew import Segment, draw, pattern, segments
from mupass._resize.sizes import NewSizes
from mupass._roles.weight_norm import with_lengths
from mupass._scales.init import Init, InitChoice, length_axis, own_init, told_laws
from mupass._scales.laws import FEW
from mupass._scales.learned import learned

Shape = tuple[int, ...]
Axes = list[list[Segment]]  # the parts of every axis


@dataclass(frozen=True)
class Draw:
    """Makes the values of a resized model from those of its source.

    Attributes:
        model: The source.
        captured: Its graph.
        sizes: The new sizes.
        init: Law of the present values, or ``"auto"``.
        fresh: Whether what keeps its size is drawn anew too.
        generator: Source of random numbers; None for the global one.
    """

    model: nn.Module
    captured: Capture
    sizes: NewSizes
    init: InitChoice
    fresh: bool
    generator: torch.Generator | None

    def parameters(self, shapes: Mapping[str, Shape], own_code: bool) -> dict[str, Tensor]:
        """Return new parameters, on the CPU; without values where the source has none.

        Args:
            shapes: New shape by name.
            own_code: Whether the model's own constructor makes what is left out here: all parameters of a
                meta-device model, and those whose law is in doubt or unknown.

        Raises:
            ResizeError: The values follow a pattern that is not known.
        """
        source = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        # On the meta device there are no values to follow a law.
        if any(values.is_meta for values in source.values()):
            if own_code:
                return {}
            return {name: torch.empty(shapes[name], dtype=values.dtype) for name, values in source.items()}
        axes = {}
        for name, values in source.items():
            axes[name] = self._axes(self.sizes.solved.dims[name], tuple(values.shape), shapes[name])
        new_values = self._continued(source, axes, shapes)
        geometries = with_lengths([self._geometry(name, shapes[name]) for name in source], self.captured)
        directions = _directions(source, geometries)
        # A pattern has no law, nor has the length of a drawn weight; they must not speak for one.
        drawn = {name: x for name, x in source.items() if name not in new_values and name not in directions}
        laws = own_init(drawn, geometries, self.init)
        if not own_code:
            self._warn_of_doubts(drawn, geometries, laws)
        new_values.update(self._drawn(drawn, axes, laws, shapes, own_code))
        for name, (direction, axis) in directions.items():
            if direction in new_values:
                new_values[name] = torch.norm_except_dim(new_values[direction], 2, axis)
        return new_values

    def _drawn(
        self,
        source: Mapping[str, Tensor],
        axes: Mapping[str, Axes],
        laws: Mapping[str, Init],
        shapes: Mapping[str, Shape],
        own_code: bool,
    ) -> dict[str, Tensor]:
        """Return the values of those parameters that follow a law, see `parameters`."""
        new_values = {}
        # What no width changes comes first: one seed draws it alike at every width.
        for name in sorted(source, key=lambda name: _grows(axes[name])):
            # Values of unknown origin are left to the model's own constructor where there is one.
            if own_code and (
                laws[name].doubtful or self._is_few(name, source[name], laws[name], shapes[name])
            ):
                continue
            try:
                new_values[name] = self._values(name, source[name], axes[name], laws[name], shapes[name])
            except ResizeError:
                if not own_code:
                    raise
        return new_values

    def _is_few(self, name: str, values: Tensor, law: Init, shape: Shape) -> bool:
        """Whether random entries that are to be drawn are too few to tell their scale, and nobody told it."""
        is_drawn = law.std is not None and tuple(values.shape) != shape
        return is_drawn and values.numel() < FEW and name not in self._told

    @cached_property
    def _told(self) -> dict[str, str]:
        """Laws that the caller states, by parameter."""
        return told_laws(self.init, list(self.sizes.solved.dims))

    def _values(self, name: str, values: Tensor, axes: Axes, law: Init, shape: Shape) -> Tensor:
        """Return the values of one parameter that follow a law.

        Raises:
            ResizeError: They follow none that is known.
        """
        if tuple(values.shape) == shape and not self.fresh:
            return _kept(values, law)
        return draw(name, values, axes, law, self.generator)

    def _continued(
        self, source: Mapping[str, Tensor], axes: Mapping[str, Axes], shapes: Mapping[str, Shape]
    ) -> dict[str, Tensor]:
        """Return the parameters of another size whose values are a pattern, not random."""
        continued_values = {}
        for name, values in source.items():
            # Only what changes its size must be continued.
            if tuple(values.shape) != shapes[name]:
                continued = pattern(values, axes[name])
                if continued is not None:
                    continued_values[name] = continued
        return continued_values

    def _warn_of_doubts(
        self, drawn: Mapping[str, Tensor], geometries: Sequence[Geometry], laws: Mapping[str, Init]
    ) -> None:
        """Warn of values that look trained, and of those whose law is not clear."""
        judged = [
            geometry for geometry in geometries if geometry.name in drawn and geometry.name not in self._told
        ]
        suspects = learned(drawn, judged)
        if suspects:
            warn(
                [
                    f"{_first_names(suspects)} look trained; a resized model is drawn anew by their size, as "
                    "initial weights"
                ]
            )
        doubtful = [name for name in drawn if laws[name].doubtful]
        if doubtful:
            names = _first_names(doubtful)
            warn([f"initialization law in doubt for {names}; settle it with init={{pattern: law}}"])

    def buffers(self, attributes: Attributes) -> dict[str, Tensor]:
        """Return new buffers: those of an untrained model where the size changes.

        Args:
            attributes: Options for numbers, which a buffer of one entry is.

        Raises:
            ResizeError: A buffer grows and its values cannot be told.
        """
        dims = self._buffer_dims()
        resized = {}
        for name, values in self.model.named_buffers():
            shape = tuple(values.shape)
            # Buffers that the graph reads have dimensions; others keep their size.
            if name in dims:
                shape = tuple(map(self.sizes.of_dim, dims[name]))
            resized[name] = self._buffer(name, values, dims.get(name, ()), shape, attributes)
        return resized

    def _buffer_dims(self) -> dict[str, tuple[int, ...]]:
        """Return the dimensions of every buffer that the graph reads."""
        dims = {}
        for node, name in self.captured.buffers.items():
            value = self.sizes.solved.engine.env.get(node)
            if isinstance(value, Value):
                dims[name] = tuple(axis.dim for axis in value.axes)
        return dims

    def _buffer(
        self, name: str, values: Tensor, dims: tuple[int, ...], shape: Shape, attributes: Attributes
    ) -> Tensor:
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        changed = shape != tuple(values.shape)
        if isinstance(owner, _NormBase) and (changed or self.fresh or values.is_meta):
            # Batch statistics before the first batch: variance 1, mean and count 0.
            return torch.full(shape, float(leaf == "running_var")).to(values.dtype)
        if values.is_meta:
            raise ResizeError(
                f"buffer {name} is on the meta device, so its values are unknown; build the model on the CPU"
            )
        if changed:
            axes = self._axes(dims, tuple(values.shape), shape)
            continued = pattern(values, axes)
            if continued is not None:
                return continued
            return draw(name, values, axes, None, self.generator)
        if values.numel() == 1 and values.is_floating_point():
            # A number such as sqrt(d_model) that the code keeps as a buffer.
            slot = attributes.slot(path, type(owner).__name__, leaf, float(values))
            if slot is not None:
                return torch.full_like(values, slot.options[0])
        return values.detach().clone()

    def _geometry(self, name: str, shape: Shape) -> Geometry:
        """Describe a parameter, with the new shape in the place of the base shape."""
        solved = self.sizes.solved
        infinite = tuple(solved.verdict(name, axis).infinite for axis in range(len(shape)))
        old_shape = tuple(map(solved.engine.space.size, solved.dims[name]))
        # The laws are asked about the new shape in the place of the base shape.
        base = tuple(map(float, shape))
        return geometry_of(name, old_shape, base, infinite, self.captured, solved, self.sizes.names)

    def _axes(self, dims: Sequence[int], old_shape: Shape, new_shape: Shape) -> Axes:
        """Return the parts of every axis, as the graph tells them apart."""
        axes = []
        for dim, old_size, new_size in zip(dims, old_shape, new_shape, strict=True):
            parts = segments(self.sizes, dim)
            if sum(math.prod(part.new) for part in parts) != new_size:
                # An axis that nothing reads: no parts are known of it.
                parts = [Segment((old_size,), (new_size,), (old_size != new_size,))]
            axes.append(parts)
        return axes


def _directions(source: Mapping[str, Tensor], geometries: Sequence[Geometry]) -> dict[str, tuple[str, int]]:
    """Return parameter -> weight whose lengths it starts with (``W = g v / |v|``), and along which axis."""
    directions = {}
    for geometry in geometries:
        if geometry.direction:
            axis = length_axis(source[geometry.name], source[geometry.direction])
            if axis is not None:
                directions[geometry.name] = geometry.direction, axis
    return directions


def _grows(axes: Axes) -> bool:
    segments = chain.from_iterable(axes)
    return any(any(segment.grows) for segment in segments)


def _kept(values: Tensor, law: Init) -> Tensor:
    """Return values of unchanged size at the scale of the new width.

    They may change all the same: the bias of a readout has the range 1/sqrt(fan_in).
    """
    if math.isclose(law.factor, 1):
        return values.clone()
    return values * law.factor


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if names[4:] else "")


def initialize(model: nn.Module, seed: int | None) -> None:
    """Initialize a model by its modules' own code.

    Args:
        model: The module, without values.
        seed: Seed; the global random state is left alone when given.

    Raises:
        ResizeError: A parameter belongs to a module without ``reset_parameters``.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        # Modules without parameters of their own need no reset.
        own_names = [name for name, parameter in module._parameters.items() if parameter is not None]
        if own_names and not hasattr(module, "reset_parameters"):
            raise ResizeError(
                f"the model is on the meta device and {path}.{own_names[0]}".strip(".")
                + " belongs to a module without reset_parameters; build the model on the CPU"
            )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for module in modules.values():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
