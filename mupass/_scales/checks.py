"""Checks of plans: what is read from a file, and what a plan may hold at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from math import isfinite
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mupass._errors import PlanError, is_number
from mupass._records import Geometry
from mupass._scales.entry import Entry
from mupass._scales.parameterizations import row

Record = TypeVar("Record")
LARGEST = 1e20  # of a factor; widths a million times the base, to the power of 3, stay below


def read_plan(kind: type[Record], text: str, version: int) -> Record:
    """Read a plan from JSON.

    Args:
        kind: Class of the plan.
        text: JSON text.
        version: Format version that is known.

    Raises:
        PlanError: Not JSON, another version, fields that are missing, unknown, double or of another type.
    """
    if not isinstance(text, (str, bytes, bytearray)):
        raise PlanError(f"from_json takes the text of a plan, not {type(text).__name__}")
    try:
        # Objects are read as pairs, since JSON's reader keeps the last of two equal keys without a word.
        content = json.loads(text, object_pairs_hook=_once)
        format_version = content["version"]
    except PlanError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PlanError(f"not the JSON of a mupass plan: {error!r}") from error
    # True == 1 in Python, and a version is no truth value.
    if format_version != version or isinstance(format_version, bool):
        raise PlanError(f"plan has format version {format_version!r}; this mupass reads {version}")
    try:
        plan: Record = _decode(kind, content, "plan")
    except PlanError:
        raise
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise PlanError(f"plan is incomplete or damaged: {error}") from error
    return plan


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, each of whose keys may come once.

    Raises:
        PlanError: A key comes twice.
    """
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise PlanError(f"plan is damaged: {repeated[0]!r} comes twice in one object")
    return dict(pairs)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Return the record, tuple or plain value of a declared type from its JSON form.

    Raises:
        PlanError: Something else stands there.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_record(kind, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin in (Union, UnionType):  # of one type and None
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, value, where)
    wanted = kind.__name__ if isinstance(kind, type) else " or ".join(map(repr, arguments))
    # Role = Literal["input", "hidden", ...]
    if origin is Literal:
        fits = isinstance(value, str) and value in arguments
    elif kind is float:
        wanted = "a finite number"
        fits = is_number(value) and isfinite(value)
    else:
        # bool is an int in Python, so the very type is asked for.
        fits = type(value) is kind
    if not fits:
        raise PlanError(f"plan is damaged: {where} must be {wanted}, not {value!r:.60}")
    return value


def _decode_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """Return a tuple from a JSON list.

    Raises:
        PlanError: It is no list, or one of another length.
    """
    if not isinstance(value, list):
        raise PlanError(f"plan is damaged: {where} must be a list, not {value!r:.60}")
    if kinds[-1] is Ellipsis:  # tuple[kind, ...]: any number of one kind
        kinds = (kinds[0],) * len(value)
    elif len(value) != len(kinds):
        raise PlanError(f"plan is damaged: {where} must have {len(kinds)} items, not {len(value)}")
    numbered = enumerate(zip(kinds, value, strict=True))
    return tuple(_decode(kind, item, f"{where}[{number}]") for number, (kind, item) in numbered)


def _decode_record(kind: type, value: Any, where: str) -> Any:
    """Return a record from a JSON object.

    Raises:
        PlanError: It is no object, lacks a field or has an unknown one.
    """
    types = get_type_hints(kind)
    if not isinstance(value, dict):
        raise PlanError(f"plan is damaged: {where} must be an object, not {value!r:.60}")
    unmatched = sorted(types.keys() ^ value.keys())
    if unmatched:
        state = "unknown" if unmatched[0] in value else "missing"
        raise PlanError(f"plan is incomplete or damaged: {where}.{unmatched[0]} is {state}")
    return kind(**{name: _decode(types[name], item, f"{where}.{name}") for name, item in value.items()})


def check_plan(
    parameterization: str,
    width: float,
    base_width: float,
    depth: float,
    branches: Sequence[str],
    entries: Sequence[Entry],
) -> None:
    """Refuse a plan that would spoil a model.

    Args:
        parameterization: Its name.
        width: Of the model.
        base_width: Width at which nothing is scaled.
        depth: Relative to the base depth.
        branches: Modules whose outputs are multiplied.
        entries: Of all parameters.

    Raises:
        PlanError: A factor is NaN, zero, negative or beyond all bounds, fields contradict each other, or a
            name comes twice.
    """
    row(parameterization)
    _positive("width", width)
    _positive("base_width", base_width)
    _positive("depth", depth)
    # Names and aliases alike: no tensor may be planned twice.
    names: list[str] = []
    for entry in entries:
        names += (entry.geometry.name, *entry.geometry.aliases)
    for what, all_names in (("parameter", names), ("branch", branches)):
        repeated = [name for name, count in Counter(all_names).items() if count > 1]
        if repeated:
            raise PlanError(f"{what} {repeated[0]!r} comes twice in the plan")
    for entry in entries:
        for fault in _faults(entry):
            raise PlanError(f"{entry.geometry.name}: {fault}")


def _faults(entry: Entry) -> Iterator[str]:
    """Yield what is wrong with one parameter."""
    for name, value in vars(entry.scales).items():
        # Powers may be negative or zero; all other scales are factors.
        if name == "lr_powers":
            if not all(isfinite(power) for power in value):
                yield f"lr_powers must be finite, not {value!r}"
        else:
            _positive(f"{entry.geometry.name}: {name}", value)
    _positive(f"{entry.geometry.name}: init_factor", entry.init_factor)
    if entry.init_std is not None and not 0 <= entry.init_std < LARGEST:
        yield f"init_std must be a finite number >= 0, not {entry.init_std!r}"
    yield from _geometry_faults(entry.geometry)


def _geometry_faults(geometry: Geometry) -> Iterator[str]:
    """Yield what contradicts itself in the fans of a parameter."""
    # Records that describe axes have one item for each.
    axes = len(geometry.shape)
    for field in ("base_shape", "infinite", "dims"):
        if len(getattr(geometry, field)) != axes:
            yield f"{field} has {len(getattr(geometry, field))} items for {axes} axes"
    if any(size < 0 for size in geometry.shape):
        yield f"shape {geometry.shape} has a negative size"
    for size, base_size in zip(geometry.shape, geometry.base_shape, strict=False):
        if size and not 0 < base_size < LARGEST:
            yield f"base_shape must hold positive numbers, not {base_size!r}"
    yield from _all_axis_faults(geometry)
    if not isfinite(geometry.given) or abs(geometry.given) > 8:
        yield f"given must be a power, not {geometry.given!r}"
    for field in ("depth", "folded", "folded_in", "m_direction"):
        _positive(f"{geometry.name}: {field}", getattr(geometry, field))


def _all_axis_faults(geometry: Geometry) -> Iterator[str]:
    """Yield what names an axis that the parameter does not have."""
    axes = len(geometry.shape)
    for field in ("fan_in_axes", "fan_out_axes"):
        yield from _axis_faults(field, getattr(geometry, field), axes)
    # A weight used with its transpose has an axis on both sides, so a use may name one twice.
    for use in (*geometry.uses, *geometry.readout_uses):
        yield from _axis_faults(f"use {use.operator}", (*use.fan_in, *use.fan_out), axes, unique=False)
    for site in geometry.sites:
        yield from _axis_faults(f"site {site.kind}", (*site.in_axes, *site.out_axes), axes, unique=False)
        # Groups of a convolution divide the first axis of its kernel, whatever the width.
        if site.groups < 1 or (geometry.shape and geometry.shape[0] % site.groups):
            yield f"site {site.kind} has {site.groups} groups, which do not divide {geometry.shape}"
    for fusion in geometry.fusions:
        yield from _axis_faults("fusion", (fusion.axis,), axes)
        # A fusion splits one axis into factors of at least 1, one of which counts the matrices.
        too_small = min((*fusion.view, *fusion.sizes), default=1) < 1
        if too_small or not 0 <= fusion.along < len(fusion.view):
            yield f"fusion along {fusion.along} of {fusion.view} is impossible"
        parts = len(fusion.part_grows)
        if len(fusion.grows) != len(fusion.view) or parts not in (0, len(fusion.sizes)):
            yield f"fusion along {fusion.along} of {fusion.view} does not say what grows"


def _axis_faults(field: str, found: Sequence[int], axes: int, unique: bool = True) -> Iterator[str]:
    if any(not 0 <= axis < axes for axis in found) or (unique and len(set(found)) != len(found)):
        yield f"{field} {tuple(found)} are no axes of {axes}"


def _positive(name: str, value: float) -> None:
    """Refuse what is no positive number of an ordinary size.

    Raises:
        PlanError: It is not.
    """
    if not is_number(value) or not 1 / LARGEST < value < LARGEST:
        raise PlanError(f"{name} must be a positive number of ordinary size, not {value!r}")
