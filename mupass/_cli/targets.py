"""Targets: what ``module:name``, ``timm:NAME`` and ``hf:CONFIG_CLASS`` name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mupass._errors import MupassError, suggestion

FAMILIES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load(target: str) -> nn.Module:
    """Build the model that a command-line target names.

    Args:
        target: ``module:factory`` (a callable without arguments, dots allowed after the colon, or a module
            instance), ``timm:NAME``, or ``hf:CONFIG_CLASS`` with optional ``,key=value`` settings.

    Returns:
        The model, on the device that is current.

    Raises:
        MupassError: The target names nothing that gives a model.
    """
    kind, colon, name = target.partition(":")
    if not colon or not name:
        raise MupassError(f"{target!r} is not module:factory, timm:NAME or hf:CONFIG_CLASS")
    try:
        if kind == "timm":
            model = _timm(name)
        elif kind == "hf":
            model = _hugging_face(name)
        else:
            source = _find(kind, name)
            # A factory is called; a model in a module is taken as it is.
            model = source if isinstance(source, nn.Module) else source()
    except MupassError:
        raise
    except (Exception, SystemExit) as error:  # whatever the code of a target raises, it gives no model
        raise MupassError(f"cannot build {target!r}: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise MupassError(f"{target!r} gives a {type(model).__name__}, not an nn.Module")
    return model


def named(target: str) -> Any:
    """Return what ``module:name`` names.

    Args:
        target: Module and name, dots allowed in both.

    Raises:
        MupassError: Nothing goes by that name.
    """
    module, colon, name = target.partition(":")
    if not colon or not name:
        raise MupassError(f"{target!r} is not module:function")
    try:
        return _find(module, name)
    except (Exception, SystemExit) as error:  # importing runs code of the user
        raise MupassError(f"cannot find {target!r}: {_first_line(error)}") from error


def inputs_of(shapes: Sequence[tuple[tuple[int, ...], str]] | None, model: nn.Module) -> Any:
    """Return zeros on the model's device, or None without shapes.

    Args:
        shapes: Sizes and the name of a type, for each input.
        model: The model.

    Raises:
        MupassError: There is no such type.
    """
    if not shapes:
        return None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = []
    for size, name in shapes:
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise MupassError(f"--input: torch has no type {name!r}{suggestion(name, _dtypes())}")
        inputs.append(torch.zeros(size, dtype=dtype, device=device))
    return tuple(inputs)


def _find(module: str, name: str) -> Any:
    # Code in the current folder can be named, as with python -m.
    sys.path.insert(0, "")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(target, part):
            raise AttributeError(f"{module} has no {part!r}{suggestion(part, dir(target))}")
        target = getattr(target, part)
    return target


def _timm(name: str) -> Any:
    timm = importlib.import_module("timm")
    # Tags after a dot are no part of the architecture's name.
    if not timm.is_model(name.partition(".")[0]):
        raise MupassError(f"timm has no model {name!r}{suggestion(name, timm.list_models())}")
    return timm.create_model(name)


def _hugging_face(name: str) -> Any:
    """Build a model from a configuration class: the task model with a head where there is one."""
    transformers = importlib.import_module("transformers")
    kind, *assignments = name.split(",")
    if not hasattr(transformers, kind):
        config_classes = [attribute for attribute in dir(transformers) if attribute.endswith("Config")]
        raise MupassError(f"transformers has no {kind!r}{suggestion(kind, config_classes)}")
    cls = getattr(transformers, kind)
    settings = {}
    for setting in assignments:
        key, equals, value = setting.partition("=")
        if not equals:
            raise MupassError(f"{setting!r} is not key=value")
        settings[key] = _literal(value)
    known_keys = _settings(cls)
    for key in settings:
        # Configurations take any name without a word: a misspelt one would be ignored.
        if known_keys and key not in known_keys:
            raise MupassError(f"{kind} has no setting {key!r}{suggestion(key, sorted(known_keys))}")
    config = cls(**settings)
    for family in FAMILIES:
        # The task model of a family, where the configuration has one.
        auto = getattr(transformers, family)
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise MupassError(f"transformers has no model for {kind}")


def _settings(cls: type) -> set[str]:
    """Return the names of all settings of a configuration class."""
    settings = set(getattr(cls, "attribute_map", {}))
    for ancestor in cls.__mro__:
        settings |= set(getattr(ancestor, "__annotations__", {}))
        if "__init__" in vars(ancestor) and ancestor is not object:
            settings |= set(inspect.signature(ancestor).parameters)
    try:
        settings |= {name for name in vars(cls()) if not name.startswith("_")}
    except Exception:  # it needs arguments: what its signatures say must do
        pass
    return settings - {"self", "args", "kwargs"}


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _dtypes() -> list[str]:
    return [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
