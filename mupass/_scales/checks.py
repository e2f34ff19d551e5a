"""Checks of plans: what is read from a file, and what a plan may hold at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from itertools import chain
from math import isfinite, prod
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mupass._errors import PlanError, is_number
from mupass._records import Geometry, ScoreScale, Site
from mupass._scales.entry import Entry
from mupass._scales.parameterizations import row

Record = TypeVar("Record")
# Kinds of sites: products that sum over axes, all others, and none.
MATRICES = ("linear", "contraction", "grouped", "conv", "standardized", "embedding", "bag")
NAMED = {"linear": "linear", "conv": "conv", "embedding": "embedding", "bag": "embedding_bag"}
SITES = (*MATRICES, "gain", "shift", "norm gain", "norm shift", "table", "bias", "")
MOST_NUMBERS = 2**63 - 1  # that a tensor holds
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
    for key in _repeated(key for key, _ in pairs):
        raise PlanError(f"plan is damaged: {key!r} comes twice in one object")
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
        names += entry.geometry.names
    _refuse_repeated("parameter", names)
    _refuse_repeated("branch", branches)
    for entry in entries:
        for fault in (*_faults(entry), *_name_faults(entry.geometry, names)):
            raise PlanError(f"{entry.geometry.name}: {fault}")


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    """Refuse a plan in which a name comes twice.

    Raises:
        PlanError: One does.
    """
    for name in _repeated(names):
        raise PlanError(f"{what} {name!r} comes twice in the plan")


def _repeated(names: Iterable[str]) -> list[str]:
    """Return the names that come more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def check_scores(scores: Sequence[ScoreScale]) -> None:
    """Refuse factors on attention scores that would spoil a model.

    Args:
        scores: Of a plan.

    Raises:
        PlanError: A factor is NaN, zero, negative or beyond all bounds, a module comes twice, or parts are
            no runs of features.
    """
    _refuse_repeated("module of queries", [scale.module for scale in scores])
    for scale in scores:
        where = f"queries of {scale.module!r}"
        _positive(f"{where}: growth", scale.growth)
        edges = list(chain.from_iterable(scale.parts))
        if edges != sorted(set(edges)) or any(edge < 0 for edge in edges):
            raise PlanError(f"{where}: parts {scale.parts} are no runs of features")
        if scale.axis not in (-1, 1):
            raise PlanError(f"{where}: axis must be -1 or 1, not {scale.axis!r}")


def _name_faults(geometry: Geometry, names: Sequence[str]) -> Iterator[str]:
    """Yield what names a parameter that the plan does not have."""
    for site in geometry.sites:
        if site.weight and site.weight not in names:
            yield f"site {site.kind} is the bias of {site.weight!r}, which is not in the plan"


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
    if prod(size or 1 for size in geometry.shape) > MOST_NUMBERS:
        yield "shape has more numbers than any tensor can hold"
    for size, base_size in zip(geometry.shape, geometry.base_shape, strict=False):
        if size and not 0 < base_size < LARGEST:
            yield f"base_shape must hold positive numbers, not {base_size!r}"
    yield from _all_axis_faults(geometry)
    yield from _role_faults(geometry)
    yield from _site_faults(geometry)
    if not isfinite(geometry.given) or abs(geometry.given) > 8:
        yield f"given must be a power, not {geometry.given!r}"
    for field in ("depth", "folded", "folded_in", "m_direction"):
        _positive(f"{geometry.name}: {field}", getattr(geometry, field))


def _role_faults(geometry: Geometry) -> Iterator[str]:
    """Yield what contradicts itself in the role of a parameter, its fans and its uses."""
    fan_in, fan_out = set(geometry.fan_in_axes), set(geometry.fan_out_axes)
    if fan_in & fan_out:
        yield f"fan_in_axes {tuple(fan_in)} and fan_out_axes {tuple(fan_out)} share an axis"
    growing = {axis for axis, infinite in enumerate(geometry.infinite) if infinite}
    sides = (bool(growing & fan_in), bool(growing & fan_out))
    # The roles that go with what grows of fan_in and of fan_out.
    roles: tuple[str, ...] = {
        (True, True): ("hidden",),
        (True, False): ("output",),
        (False, True): ("input", "vector"),
    }.get(sides, ("vector",) if growing else ("scalar",))
    if geometry.role not in roles:
        yield f"role {geometry.role!r} contradicts its axes, which are those of {' or '.join(roles)}"
    # A use has fan_in as a whole; used with its transpose, as what it keeps.
    explained = any(fan_in <= set(use.fan_in) or fan_in <= set(use.fan_out) for use in geometry.uses)
    if fan_in and not explained:
        yield f"no use of it contracts fan_in_axes {tuple(fan_in)}"


def _site_faults(geometry: Geometry) -> Iterator[str]:
    """Yield what a preconditioner could not work with in the sites of a parameter."""
    # Nothing works with a parameter without entries, whose use has no axes to be found.
    if 0 in geometry.shape:
        return
    if geometry.uses and not geometry.sites:
        yield f"a parameter that has {len(geometry.uses)} uses and no site of any kind"
    for site in geometry.sites:
        if site.kind not in SITES:
            yield f"site of an unknown kind {site.kind!r}; known: {', '.join(filter(None, SITES))}"
        if set(site.in_axes) & set(site.out_axes):
            yield f"site {site.kind} has axes both in {site.in_axes} and out {site.out_axes}"
        if site.kind not in MATRICES:
            continue
        if not site.in_axes or not site.out_axes:
            yield f"site {site.kind} has no axes on one side: in {site.in_axes}, out {site.out_axes}"
        # aten.conv2d.default, transposed or not, is what a site of the kind conv stands for.
        if site.kind in NAMED and NAMED[site.kind] not in site.operator:
            yield f"site {site.kind} is no form of {site.operator}"
        # Sites and uses are two readings of the same operators.
        if not as_used(site, geometry):
            yield f"no use of it contracts the axes {site.in_axes} of site {site.kind}"


def as_used(site: Site, geometry: Geometry) -> bool:
    """Return whether some use of a parameter contracts the axes that a site does.

    Args:
        site: A site of the parameter, of a matrix.
        geometry: The parameter.
    """
    # A view may have dropped axes of one entry, as w.squeeze(1) of a depthwise kernel.
    single = {axis for axis, size in enumerate(geometry.shape) if size == 1}
    return any(set(use.fan_in) - single == set(site.in_axes) - single for use in geometry.uses)


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
