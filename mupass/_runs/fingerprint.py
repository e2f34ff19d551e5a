"""Fingerprints: a hash of all that a result depends on, the same in every process, or a refusal by name."""

from __future__ import annotations

import enum
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import StudyError

PLAIN = (int, float, complex, str, bytes, bool, type(None), type(...), range, slice, PurePath)
# What Python keeps in a class for itself, some of it different in every process.
BOOKKEEPING = ("__dict__", "__weakref__", "__doc__", "__module__", "__slotnames__")
TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


def digest(*parts: Any, values: bool = True) -> str:
    """Return a hash of whatever a result depends on.

    Functions count with their code, defaults, closures, the globals that they use, and the object that they
    are bound to; modules with their attributes, parameters and buffers; other objects with their attributes.
    What an installed package defines counts by its name.

    Args:
        *parts: Anything.
        values: Whether entries of tensors count, or their shapes alone.

    Raises:
        StudyError: Something that cannot be hashed; the message says where it is.
    """
    state = _State(values)
    for number, part in enumerate(parts):
        state.add(part, f"[{number}]" if len(parts) > 1 else "")
    return state.hash.hexdigest()


class _State:
    """A hash in the making, and the objects that are in it already."""

    def __init__(self, values: bool) -> None:
        self.hash = hashlib.sha256()
        self.values = values
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no two objects have one id

    def mark(self, *words: Any) -> None:
        """Add words, with an end so that no two sequences look alike."""
        for word in words:
            # Lengths are hashed too: ("ab", "c") and ("a", "bc") are different.
            text = word if isinstance(word, bytes) else str(word).encode()
            self.hash.update(f"{len(text)}:".encode() + text)

    def add(self, thing: Any, where: str) -> None:
        """Add one thing and all that it holds."""
        # Values that print as they are first; then what can hold itself, and so is numbered when first met.
        if isinstance(thing, enum.Enum):
            self.mark("enum", type(thing).__qualname__, thing.name)
        elif type(thing) in PLAIN or isinstance(thing, (PurePath, *TORCH)):
            self.mark(type(thing).__qualname__, repr(thing))
        # An object that holds itself, or that is met twice, is told by its number.
        elif id(thing) in self.seen:
            self.mark("again", self.seen[id(thing)])
        else:
            self.seen[id(thing)] = len(self.seen)
            self.kept.append(thing)
            self._add_object(thing, where)

    def _add_object(self, thing: Any, where: str) -> None:
        if isinstance(thing, Tensor):
            self._add_tensor(thing)
        elif isinstance(thing, ModuleType):
            # A package is told by its version, and not by all that is in it.
            self.mark("package", thing.__name__, getattr(thing, "__version__", ""))
        elif isinstance(thing, FunctionType):
            self._add_function(thing, where)
        elif isinstance(thing, type):
            self._add_class(thing, where)
        elif isinstance(thing, (MethodType, BuiltinFunctionType, partial)):
            self._add_call(thing, where)
        elif isinstance(thing, (list, tuple, set, frozenset, dict)):
            self._add_container(thing, where)
        elif isinstance(thing, CodeType):
            self._add_code(thing, where)
        else:
            self._add_instance(thing, where)

    def _add_tensor(self, tensor: Tensor) -> None:
        self.mark("tensor", tensor.dtype, tuple(tensor.shape))
        if self.values and not tensor.is_meta:
            if hasattr(tensor, "full_tensor"):  # FSDP2 and tensor parallelism shard it
                tensor = tensor.full_tensor()
            plain = tensor.detach().cpu()
            if plain.layout != torch.strided:
                plain = plain.to_dense()
            # Conjugation and sign can be flags of a view: the bytes must hold them.
            plain = plain.resolve_conj().resolve_neg().contiguous().flatten()
            self.mark(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")

    def _add_container(self, thing: Any, where: str) -> None:
        self.mark(type(thing).__qualname__, len(thing))
        if isinstance(thing, (set, frozenset)):
            # The order of a set differs between processes, so its items are hashed one by one.
            self.mark(*sorted(digest(item, values=self.values) for item in thing))
        elif isinstance(thing, dict):
            for key, value in thing.items():
                self.add(key, where)
                self.add(value, f"{where}[{key!r}]")
        else:
            for number, item in enumerate(thing):
                self.add(item, f"{where}[{number}]")
        # A class of the caller's own may hold more than its items.
        if type(thing) not in (list, tuple, set, frozenset, dict):
            self.add(type(thing), where)
            self.add(vars(thing) if hasattr(thing, "__dict__") else {}, where)

    def _add_call(self, thing: Any, where: str) -> None:
        if isinstance(thing, partial):
            self.mark("partial")
            self.add((thing.func, thing.args, thing.keywords), f"{where}.partial")
            return
        self.mark("method", thing.__qualname__)
        owner = thing.__self__
        # A bound method is its function and the object that it is bound to.
        if isinstance(thing, MethodType):
            self.add(thing.__func__, where)
        if not isinstance(owner, ModuleType):
            self.add(owner, f"{where}.__self__")

    def _add_function(self, function: FunctionType, where: str) -> None:
        self.mark("function", function.__module__, function.__qualname__)
        where = f"{where} {function.__qualname__}".strip()
        # A function of an installed package is told by its name; a closure holds more than that.
        if _installed(function.__module__) and not function.__closure__:
            return
        self._add_code(function.__code__, where)
        self.add((function.__defaults__, function.__kwdefaults__), f"the defaults of {where}")
        # Closures hold objects that the code refers to by name.
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            try:
                content = cell.cell_contents
            except ValueError:
                # A cell of a recursive function may be empty.
                self.mark("empty")
            else:
                self.add(content, f"{name} in {where}")
        # Globals that the code names, and not all globals of its module.
        names = _names(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            self.mark(name)
            self.add(value, f"the global {name} in {where}")
            # Of a module of the caller's own counts what the function names, not all that is in it.
            if isinstance(value, ModuleType) and not _installed(value.__name__):
                for inner in sorted(names & vars(value).keys()):
                    self.mark(inner)
                    self.add(vars(value)[inner], f"{name}.{inner} in {where}")

    def _add_code(self, code: CodeType, where: str) -> None:
        self.mark("code", code.co_code, *code.co_names, *code.co_varnames)
        for constant in code.co_consts:
            self.add(constant, where)

    def _add_class(self, kind: type, where: str) -> None:
        self.mark("class", kind.__module__, kind.__qualname__)
        # Classes of installed packages are told by their name.
        if _installed(kind.__module__):
            return
        for base in kind.__bases__:
            self.add(base, where)
        for name, value in vars(kind).items():
            if name in BOOKKEEPING or name.startswith("_abc_"):
                # Python's own entries differ between processes, and caches of abstract classes do.
                continue
            self.mark(name)
            parts = [getattr(value, "__func__", value)]  # of static and class methods
            if isinstance(value, property):
                parts = [value.fget, value.fset, value.fdel]
            for part in parts:
                self._add_attribute(part, f"{kind.__qualname__}.{name}")

    def _add_attribute(self, value: Any, where: str) -> None:
        """Add an attribute of a class; descriptors of the interpreter's own are told by their kind."""
        if type(value).__module__ == "builtins" and type(value).__name__.endswith(
            ("_descriptor", "_wrapper")
        ):
            self.mark(type(value).__name__)
        else:
            self.add(value, where)

    def _add_instance(self, thing: Any, where: str) -> None:
        kind = type(thing)
        self.mark("object")
        self.add(kind, where)
        name = f"{where} ({kind.__qualname__})".strip()
        if hasattr(thing, "__wrapped__"):  # functools.lru_cache and the like
            self.add(thing.__wrapped__, where)
        # A generator is its state.
        elif isinstance(thing, torch.Generator):
            self._add_tensor(thing.get_state())
        # Arrays of numpy: type, shape and bytes.
        elif type(thing).__module__.partition(".")[0] == "numpy" and hasattr(thing, "tobytes"):
            self.mark(thing.dtype, thing.shape)
            self.add(thing.tolist(), name) if thing.dtype.hasobject else self.mark(thing.tobytes())
        elif isinstance(thing, nn.Module):
            self.add(_state_of_module(thing), name)
        elif isinstance(thing, Mapping) and not hasattr(thing, "__dict__"):
            self.add(dict(thing), name)
        else:
            self._add_state(thing, name)

    def _add_state(self, thing: Any, where: str) -> None:
        """Add what a copy of an object would be made of.

        Raises:
            StudyError: It cannot be copied: a file, a lock, a generator.
        """
        if hasattr(thing, "__next__"):
            raise _unknown(where, "what it gives depends on how far it has been read")
        try:
            # What pickle would copy says what an object is made of.
            parts = thing.__reduce_ex__(4)
        except Exception as error:
            raise _unknown(where, str(error)) from error
        if isinstance(parts, str):
            self.mark(parts)
            return
        # (function, arguments, state, items, pairs), of which the last three may be left out.
        function, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        if isinstance(function, FunctionType) and function.__module__ == "copyreg":
            arguments = arguments[1:]  # the class, which is in it already
        self.mark(getattr(function, "__qualname__", "made"))
        self.add((arguments, state, list(items or ()), list(pairs or ())), where)


def _state_of_module(module: nn.Module) -> dict[str, Any]:
    """Return attributes of a module, without the hooks and caches that are empty."""
    return {name: value for name, value in vars(module).items() if value or "_hooks" not in name}


def _unknown(where: str, why: str) -> StudyError:
    return StudyError(
        f"a stored result would depend on {where}, which cannot be hashed ({why}); pass what it is made of "
        "instead, or leave out store="
    )


def _names(code: CodeType) -> set[str]:
    """Return names of globals and attributes that code uses, that of functions inside it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


@cache
def _installed(module: str | None) -> bool:
    """Return whether a module comes with Python or an installed package, not with the caller's code."""
    top = (module or "").partition(".")[0]
    if top in ("builtins", "mupass", "torch") or top in sys.stdlib_module_names:
        return True
    if top in ("", "__main__", "__mp_main__"):
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    # A namespace package has no file of its own, but folders.
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    parents: set[Path] = set()
    for place in filter(None, places):
        parents.update(Path(place).resolve().parents)
    # Where pip installs packages.
    homes = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return not homes.isdisjoint(parents)


def called(function: Any) -> str:
    """Return a function's name for the reader.

    Args:
        function: The function.
    """
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    # Of a function in a function, without where it is.
    return name.rpartition("<locals>.")[2]
