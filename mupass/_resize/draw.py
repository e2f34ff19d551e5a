"""New parameters and buffers of a resized model, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
from mupass._scales.init import InitChoice, own_init, told_laws
from mupass._scales.learned import learned


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

    def parameters(self, shapes: Mapping[str, tuple[int, ...]], own_code: bool) -> dict[str, Tensor]:
        """Return new parameters, on the CPU; without values where the source has none.

        Args:
            shapes: New shape by name.
            own_code: Whether the model's own constructor makes what is left out here: all parameters of a
                meta-device model, and those whose law is in doubt or unknown.

        Raises:
            ResizeError: The values follow a pattern that is not known.
        """
        source = {n: p.detach() for n, p in self.model.named_parameters()}
        if any(p.is_meta for p in source.values()):
            return {} if own_code else {n: torch.empty(shapes[n], dtype=p.dtype) for n, p in source.items()}
        made = {}
        axes = {
            n: self._axes(self.sizes.solved.dims[n], tuple(p.shape), shapes[n]) for n, p in source.items()
        }
        for name, old in source.items():
            if tuple(old.shape) != shapes[name] and (value := pattern(old, axes[name])) is not None:
                made[name] = value
        # A pattern has no law, and must not speak for one.
        random = {n: p for n, p in source.items() if n not in made}
        geometries = [self._geometry(n, shapes[n]) for n in source]
        laws = own_init(random, geometries, self.init)
        if not own_code:
            told = told_laws(self.init, list(source))
            suspects = learned(random, [g for g in geometries if g.name in random and g.name not in told])
            if suspects:
                names = ", ".join(suspects[:4]) + (" ..." if suspects[4:] else "")
                warn(
                    [f"{names} look trained; a resized model is drawn anew by their size, as initial weights"]
                )
        doubtful = [n for n in random if laws[n].doubtful]
        if doubtful and not own_code:
            names = ", ".join(doubtful[:4]) + (" ..." if doubtful[4:] else "")
            warn([f"initialization law in doubt for {names}; settle it with init={{pattern: law}}"])
        # What no width changes comes first: one seed draws it alike at every width.
        grows = {n: any(g for axis in axes[n] for s in axis for g in s.grows) for n in random}
        for name, old in sorted(random.items(), key=lambda item: grows[item[0]]):
            if own_code and name in doubtful:
                continue
            law = laws[name]
            if tuple(old.shape) == shapes[name] and not self.fresh:
                # It may change all the same: the bias of a readout has the range 1/sqrt(fan_in).
                made[name] = old.clone() if math.isclose(law.factor, 1) else old * law.factor
                continue
            try:
                made[name] = draw(name, old, axes[name], law, self.generator)
            except ResizeError:
                if not own_code:
                    raise
        return made

    def buffers(self, attributes: Attributes) -> dict[str, Tensor]:
        """Return new buffers: those of an untrained model where the size changes.

        Args:
            attributes: Options for numbers, which a buffer of one entry is.

        Raises:
            ResizeError: A buffer grows and its values cannot be told.
        """
        dims = {}
        for node, name in self.captured.buffers.items():
            value = self.sizes.solved.engine.env.get(node)
            if isinstance(value, Value):
                dims[name] = tuple(a.dim for a in value.axes)
        made = {}
        for name, old in self.model.named_buffers():
            path, _, leaf = name.rpartition(".")
            shape = tuple(map(self.sizes.of_dim, dims.get(name, ()))) if name in dims else tuple(old.shape)
            owner = self.model.get_submodule(path)
            changed = shape != tuple(old.shape)
            if isinstance(owner, _NormBase) and (changed or self.fresh or old.is_meta):
                made[name] = torch.full(shape, float(leaf == "running_var")).to(old.dtype)
            elif old.is_meta:
                raise ResizeError(
                    f"buffer {name} is on the meta device, so its values are unknown; "
                    "build the model on the CPU"
                )
            elif changed:
                axes = self._axes(dims[name], tuple(old.shape), shape)
                value = pattern(old, axes)
                made[name] = draw(name, old, axes, None, self.generator) if value is None else value
            elif old.numel() == 1 and old.is_floating_point():
                slot = attributes.slot(path, type(owner).__name__, leaf, float(old))
                made[name] = old.detach().clone() if slot is None else torch.full_like(old, slot.options[0])
            else:
                made[name] = old.detach().clone()
        return made

    def _geometry(self, name: str, shape: tuple[int, ...]) -> Geometry:
        """Describe a parameter, with the new shape in the place of the base shape."""
        solved = self.sizes.solved
        infinite = tuple(solved.verdict(name, i).infinite for i in range(len(shape)))
        old = tuple(solved.engine.space.size(d) for d in solved.dims[name])
        return geometry_of(
            name, old, tuple(map(float, shape)), infinite, self.captured, solved, self.sizes.names
        )

    def _axes(self, dims: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...]) -> list[list[Segment]]:
        axes = []
        for dim, a, b in zip(dims, old, new, strict=True):
            cut = segments(self.sizes, dim)
            whole = [Segment((a,), (b,), (a != b,))]  # of an axis that nothing reads no parts are known
            axes.append(cut if sum(math.prod(s.new) for s in cut) == b else whole)
        return axes


def initialize(model: nn.Module, seed: int | None) -> None:
    """Initialize a model by its modules' own code.

    Args:
        model: The module, without values.
        seed: Seed; the global random state is left alone when given.

    Raises:
        ResizeError: A parameter belongs to a module without ``reset_parameters``.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "reset_parameters") and any(
            p is not None for p in module._parameters.values()
        ):
            name = next(n for n, p in module._parameters.items() if p is not None)
            raise ResizeError(
                f"the model is on the meta device and {path}.{name}".strip(".")
                + " belongs to a module without reset_parameters; build the model on the CPU"
            )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
