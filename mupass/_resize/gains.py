"""Numbers of modules that follow the fan_in of their weight up to a gain, as NFNet's ``gain / sqrt(fan_in)``.

The gain is not known, so one module cannot tell. Several can: where the number times a power of fan_in is the
same in all modules of a class, at different fan_ins, that is what it is.

Numbers that layers of torch hold beside their weight are read off its new shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mupass._errors import warn
from mupass._resize.attributes import SCALE_NAMES

POWERS = (-0.5, 0.5, -1.0, 1.0)
Place = tuple[str, str]  # module path, attribute


@dataclass(frozen=True)
class _Scale:
    """A number of one module that may follow the fan_in of its weight.

    Attributes:
        path: The module.
        value: The number.
        fan_in: Of the weight now.
        new_fan_in: Of the weight at the new width.
    """

    path: str
    value: float
    fan_in: int
    new_fan_in: int


def follow_fan_in(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, float]:
    """Return the new values of numbers that are a gain times a power of a weight's fan_in.

    Args:
        model: The source.
        shapes: New shape of every parameter.

    Warns:
        A module whose fan_in changes holds a scale that may follow it, and its class does not tell.
    """
    values: dict[Place, float] = {}
    for (kind, name), scales in _scales_by_class(model, shapes).items():
        power = _common_power(scales)
        if power is None:
            _warn_of_unknown(kind, name, scales)
            continue
        for scale in scales:
            values[scale.path, name] = scale.value * (scale.new_fan_in / scale.fan_in) ** power
    return values


def sizes_of_layers(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, float]:
    """Return the new values of numbers of torch's layers that the shape of their weight tells.

    Args:
        model: The source.
        shapes: New shape of every parameter.
    """
    values: dict[Place, float] = {}
    for path, module in model.named_modules():
        new_shape = shapes.get(f"{path}.weight".lstrip("."))
        if isinstance(module, (nn.Linear, _ConvNd)) and new_shape is not None:
            for name, axis in _axes_of_numbers(module).items():
                # A class of the user's own may have its weight otherwise.
                if getattr(module, name) == module.weight.shape[axis]:
                    values[path, name] = new_shape[axis]
    return values


def _axes_of_numbers(layer: nn.Linear | _ConvNd) -> dict[str, int]:
    """Return attribute of a layer -> axis of its weight that is as long."""
    if isinstance(layer, nn.Linear):
        return {"out_features": 0, "in_features": 1}
    # A depthwise convolution has a kernel for each channel, and so many groups.
    if layer.groups == layer.in_channels == layer.out_channels > 1:
        return {"out_channels": 0, "in_channels": 0, "groups": 0}
    if layer.groups > 1:
        return {}
    return {"out_channels": int(layer.transposed), "in_channels": int(not layer.transposed)}


def _scales_by_class(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[type, str], list[_Scale]]:
    """Return (class, attribute) -> numbers whose name says that they may scale something."""
    groups: dict[tuple[type, str], list[_Scale]] = defaultdict(list)
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        new_shape = shapes.get(f"{path}.weight".lstrip("."))
        # Biases and norms have no fan_in.
        if not isinstance(weight, Tensor) or new_shape is None or weight.dim() < 2:
            continue
        # [out, in, ...]: all axes but the first, in the usual layout.
        fan_in, new_fan_in = math.prod(weight.shape[1:]), math.prod(new_shape[1:])
        for name, value in vars(module).items():
            # Off (0) and without effect (1) are no scales.
            if type(value) is float and SCALE_NAMES.search(name) and value not in (0.0, 1.0):
                groups[type(module), name].append(_Scale(path, value, fan_in, new_fan_in))
    return groups


def _common_power(scales: Collection[_Scale]) -> float | None:
    """Return the power of fan_in that all values follow; None where they do not, or none differ."""
    if len({scale.fan_in for scale in scales}) < 2:
        # With one fan_in any power fits.
        return None
    for power in POWERS:
        # The gain is what is left when the power is taken out: it must be the same for all.
        gains = [scale.value / scale.fan_in**power for scale in scales]
        if all(math.isclose(gain, gains[0], rel_tol=1e-6) for gain in gains):
            return power
    return None


def _warn_of_unknown(kind: type, name: str, scales: Collection[_Scale]) -> None:
    """Warn of a number that stays as it is although the fan_in of its weight changes."""
    changed = [scale for scale in scales if scale.fan_in != scale.new_fan_in]
    if changed:
        first = changed[0]
        ellipsis = " ..." if len(changed) > 1 else ""
        message = (
            f"{kind.__name__}.{name} = {first.value:.6g} of {first.path}{ellipsis} keeps its value although "
            "the fan_in of its weight changes; if it is computed from that, set it on the copy"
        )
        warn([message])
