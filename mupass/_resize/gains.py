"""Numbers of modules that follow the fan_in of their weight up to a gain, as NFNet's ``gain / sqrt(fan_in)``.

The gain is not known, so one module cannot tell. Several can: where the number times a power of fan_in is the
same in all modules of a class, at different fan_ins, that is what it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from mupass._errors import warn
from mupass._resize.attributes import SCALE_NAMES

POWERS = (-0.5, 0.5, -1.0, 1.0)
Place = tuple[str, str]  # module path, attribute


def follow_fan_in(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, float]:
    """Return the new values of numbers that are a gain times a power of a weight's fan_in.

    Args:
        model: The source.
        shapes: New shape of every parameter.

    Warns:
        A module whose fan_in changes holds a scale that may follow it, and its class does not tell.
    """
    groups: dict[tuple[type, str], dict[str, tuple[float, int, int]]] = defaultdict(dict)
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        new = shapes.get(f"{path}.weight".lstrip("."))
        if isinstance(weight, Tensor) and new is not None and weight.dim() > 1:
            fans = math.prod(weight.shape[1:]), math.prod(new[1:])
            for name, value in vars(module).items():
                if type(value) is float and SCALE_NAMES.search(name) and value not in (0.0, 1.0):
                    groups[type(module), name][path] = (value, *fans)
    found: dict[Place, float] = {}
    for (kind, name), places in groups.items():
        power = _power([(value, old) for value, old, _ in places.values()])
        for path, (value, old, new_fan) in places.items():
            if power is not None:
                found[path, name] = value * (new_fan / old) ** power
        changed = [path for path, (_, old, new_fan) in places.items() if old != new_fan]
        if power is None and changed:
            where = f"{changed[0]}{' ...' if len(changed) > 1 else ''}"
            value = places[changed[0]][0]
            message = (
                f"{kind.__name__}.{name} = {value:.6g} of {where} keeps its value although the fan_in of its "
                "weight changes; if it is computed from that, set it on the copy"
            )
            warn([message])
    return found


def _power(pairs: list[tuple[float, int]]) -> float | None:
    """Return the power of fan_in that all values follow; None where they do not, or none differ."""
    if len({fan for _, fan in pairs}) < 2:
        return None
    for power in POWERS:
        gains = [value / fan**power for value, fan in pairs]
        if all(math.isclose(g, gains[0], rel_tol=1e-6) for g in gains):
            return power
    return None
