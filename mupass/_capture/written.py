"""Sizes that the code of a model writes out: numbers in its constructors that no argument changes.

A graph does not tell a width from a number of the author's own, such as the channels of a stem. The source of
the constructors does: ``stem_chs = 32`` is a number, ``dim * 4`` follows an argument. The source is read, not
run, and what is not understood counts as an argument.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product, starmap
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import nn

Path = tuple[str, ...]  # attributes, without the numbers of lists
Candidates = tuple[Any, ...] | None  # values that an expression may have; None where it follows an argument
Expression = ast.expr | None  # None for what is assigned in a way that is not read

DEPTH = 8  # constructors within constructors
MANY = 16  # values of one expression
LARGE = 10**6  # numbers that no size is made of
# Arguments of the layers of torch.nn that say how many features they make.
MADE = frozenset(
    "out_channels out_features num_features num_channels normalized_shape embedding_dim hidden_size "
    "proj_size embed_dim d_model dim_feedforward".split()
)
ROUNDING = (int, round, math.floor, math.ceil)
ADDING = ("append", "extend", "insert", "add_module")  # methods that put a layer into a list of layers
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def written_sizes(model: nn.Module) -> dict[str, dict[int, str]]:
    """Return for every parameter the sizes that the code writes out for what its layer makes, and its class.

    Args:
        model: The module.
    """
    found: dict[Path, dict[int, str]] = defaultdict(dict)
    reader = _Reader()
    outermost = _outermost(model)
    for name, module in model.named_modules():
        kind = type(module)
        # Of what the caller makes, the code sees no call. A size that is a default's may be one he has left.
        bound = _defaults(kind) if name in outermost else {}
        for written in (*reader.constructor(kind, {}), *reader.constructor(kind, bound)):
            found[_path(name) + written.path].setdefault(written.size, written.where)
    sizes: dict[str, dict[int, str]] = {}
    for name, _ in model.named_parameters():
        path = _path(name)
        of_name: dict[int, str] = {}
        # A list of layers has one name in the code, so what is written in it may be any of them.
        for length in range(len(path) + 1):
            of_name |= found.get(path[:length], {})
        if of_name:
            sizes[name] = of_name
    return sizes


def _outermost(model: nn.Module) -> set[str]:
    """Return the names of modules that no constructor of the model's own code makes: it, parts of lists."""
    if not _from_torch(type(model)):
        return {""}
    names = {""}
    for name, module in model.named_children():
        names.update(f"{name}.{inner}".rstrip(".") for inner in _outermost(module))
    return names


def _path(name: str) -> Path:
    return tuple(part for part in name.split(".") if part and not part.isdigit())


@dataclass(frozen=True)
class _Written:
    """A size, the attribute under which its layer is kept, and the class that writes it."""

    path: Path
    size: int
    where: str


@cache
def _tree(file: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """Return the functions of a source file by name and first line, decorators included."""
    try:
        with open(file, encoding="utf-8") as source:
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    functions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    _call_it_self(method)
        if isinstance(node, ast.FunctionDef):
            first_line = min([node.lineno, *[decorator.lineno for decorator in node.decorator_list]])
            functions[node.name, first_line] = node
    return functions


def _call_it_self(method: ast.FunctionDef) -> None:
    """Give the first parameter of a method the name that most authors give it."""
    parameters = [*method.args.posonlyargs, *method.args.args]
    own = parameters[0].arg if parameters and not method.decorator_list else "self"
    if own == "self":
        return
    parameters[0].arg = "self"
    for node in ast.walk(method):
        if isinstance(node, ast.Name) and node.id == own:
            node.id = "self"


def _definition(function: Any) -> ast.FunctionDef | None:
    """Return the source of a function as a tree, or None where it has none."""
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    return _tree(code.co_filename).get((code.co_name, code.co_firstlineno))


def _from_torch(kind: Any) -> bool:
    return str(getattr(kind, "__module__", "")).partition(".")[0] in ("torch", "builtins")


@dataclass
class _Scope:
    """A function that is read, with what is known of its names.

    Attributes:
        kind: Class whose constructor or method it is; None for a plain function.
        function: The function.
        tree: Its source.
        bound: Parameter -> its values.
        attributes: Attribute of the object under construction -> what is assigned to it, and in which scope.
        depth: How many calls lead here.
    """

    kind: type | None
    function: FunctionType
    tree: ast.FunctionDef
    bound: Mapping[str, Candidates]
    attributes: dict[str, list[tuple[_Scope, Expression]]]
    depth: int
    assigned: dict[str, list[Expression]] = field(default_factory=lambda: defaultdict(list))
    added: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    fallbacks: set[int] = field(default_factory=set)  # values for what a caller has not set
    _asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.If):
                self.fallbacks.update(_fallbacks(node))
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assign(node.target, node.value)
            elif isinstance(node, ast.AugAssign):
                if isinstance(node.target, ast.Name):
                    self.added[node.target.id].append(node.value)
                self._assign(node.target, None)
            elif isinstance(node, (ast.For, ast.comprehension)):
                # for c in [32, 64]: any of them
                self._assign(node.target, ast.Subscript(node.iter, ast.Name(""), ast.Load()))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # layers.append(...)
                if node.func.attr in ADDING and isinstance(node.func.value, ast.Name):
                    self.added[node.func.value.id] += node.args

    def _assign(self, target: ast.expr, value: Expression) -> None:
        if isinstance(target, ast.Name):
            self.assigned[target.id].append(value)
        elif _is_self(target):
            self.attributes.setdefault(target.attr, []).append((self, value))  # type: ignore[attr-defined]
        elif isinstance(target, (ast.Tuple, ast.List)):
            values: list[Expression] = [None] * len(target.elts)
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(values):
                values = list(value.elts)
            for part, part_value in zip(target.elts, values, strict=True):
                self._assign(part, part_value)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and value is not None:
            self.added[target.value.id].append(value)

    def values(self, expression: Expression) -> Candidates:
        """Return the values that an expression may have, or None where an argument decides."""
        match expression:
            case ast.Constant(value=value):
                return (value,)
            case ast.Name(id=name):
                return self._of_name(name)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return self._of_list(elements)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return _combined(ARITHMETIC[type(op)], self.values(left), self.values(right))
            case ast.BoolOp(op=ast.Or(), values=[*alternatives]):
                return self._first_set(alternatives)
            case ast.IfExp(body=body, orelse=orelse):
                return _joined([self.values(body), self.values(orelse)])
            case ast.Call(func=function, args=[_, *_] as numbers):
                return self._rounded(function, numbers[0]) or self._bounds(expression)
            case ast.Attribute() if _is_self(expression):
                return self._of_attribute(expression.attr)
            case ast.Attribute(value=holder, attr=name):
                # nn.Conv2d, or the expansion of a block's class
                found = [_attribute(item, name) for item in self.values(holder) or ()]
                return tuple(filter(_is_plain, found)) or None
            case ast.Subscript(value=holder, slice=index):
                return _entries(self.values(holder), self.values(index))
        return None

    def _first_set(self, alternatives: Sequence[ast.expr]) -> Candidates:
        """Return the values of ``inner or dim``: those of the first alternative that may be set."""
        found: list[Candidates] = []
        for alternative in alternatives:
            values = self.values(alternative)
            found.append(None if values is None else tuple(filter(None, values)))
            if values is None or all(values):  # what follows is never asked
                break
        return _joined(found)

    def callees(self, expression: ast.expr, depth: int = 0) -> list[Any]:
        """Return what a call may call, as far as it is known: ``nn.Linear`` in one branch, say."""
        match expression:
            case _ if depth > DEPTH:
                return []
            case ast.IfExp(body=body, orelse=orelse):
                return self.callees(body, depth + 1) + self.callees(orelse, depth + 1)
            case ast.Name(id=name) if name in self.assigned:
                found = list(self.bound.get(name) or ())
                for value in self.assigned[name]:
                    found += [] if value is None else self.callees(value, depth + 1)
                return found
            case ast.Call(func=function, args=[first, *_]) if self.values(function) == (partial,):
                return self.callees(first, depth + 1)
        return list(self.values(expression) or ())

    def _rounded(self, function: ast.expr, number: ast.expr) -> Candidates:
        """Return the values of ``int(4.0 * 32)``, ``sum([6, 1, 3])`` and their like."""
        functions, numbers = self.values(function), self.values(number)
        if functions is None or numbers is None or functions[0] not in (*ROUNDING, sum):
            return None
        if functions[0] is sum:
            parts = [value for value in numbers if isinstance(value, tuple) and all(map(_is_number, value))]
            return tuple(map(sum, parts)) or None
        return _combined(lambda value, _: functions[0](value), numbers, (None,))

    def _bounds(self, call: ast.Call) -> Candidates:
        """Return the numbers that bound ``max(dim // 4, 64)``: it may be 64, whatever the argument is.

        A function of the code's own that returns such a bound has it too: ``make_divisible(dim // 4, 8)``.
        """
        functions = self.values(call.func) or ()
        if functions in ((max,), (min,)) and len(call.args) > 1:
            known: list[Any] = []
            for number in call.args:
                known += filter(_is_number, self.values(number) or ())
            return tuple(known) or None
        if len(functions) != 1 or self.depth >= DEPTH or _from_torch(functions[0]):
            return None
        tree = _definition(functions[0]) if isinstance(functions[0], FunctionType) else None
        if tree is None:
            return None
        bound = _parameters(tree, _bound(self, call, functions[0], 0))
        inner = _Scope(None, inspect.unwrap(functions[0]), tree, bound, {}, self.depth + 1)
        return inner._least() or None

    def _least(self) -> tuple[Any, ...]:
        """Return the numbers that bound what a function returns, directly or under a name."""
        bounds: list[Any] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Return):
                name = node.value.id if isinstance(node.value, ast.Name) else ""
                for value in [node.value, *self.assigned.get(name, ())]:
                    bounds += (self._bounds(value) or ()) if isinstance(value, ast.Call) else ()
        return tuple(bounds)

    def _of_list(self, elements: list[ast.expr]) -> Candidates:
        entries = []
        for element in elements:
            of_element = self.values(element)
            if of_element is None or len(of_element) != 1:
                return None
            entries.append(of_element[0])
        return (tuple(entries),)

    def _of_name(self, name: str) -> Candidates:
        if name in self._asked:  # n = n or 64, with the n before; n = n + 1 of its own stays unknown
            return self.bound.get(name)
        self._asked.add(name)
        try:
            if name in self.bound or name in self.assigned:
                found = [self.bound[name]] if name in self.bound else []
                values = self.assigned.get(name, [])
                if found and found[0] and all(found[0]):
                    values = [value for value in values if id(value) not in self.fallbacks]
                return _joined([*found, *[self.values(value) for value in values]])
        finally:
            self._asked.discard(name)
        for table in (self.function.__globals__, vars(builtins)):
            if name in table:
                return (table[name],) if _is_plain(table[name]) else None
        return None

    def _of_attribute(self, name: str) -> Candidates:
        asked = f"self.{name}"
        if asked in self._asked or name not in self.attributes:
            return None
        self._asked.add(asked)
        try:
            return _joined([scope.values(value) for scope, value in self.attributes[name]])
        finally:
            self._asked.discard(asked)


def _fallbacks(condition: ast.If) -> Iterator[int]:
    """Yield the values that a name gets where it is not set: ``if not inner: inner = dim // 4``."""
    match condition.test:
        case ast.UnaryOp(op=ast.Not(), operand=ast.Name(id=name)):
            pass
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
            pass
        case _:
            return
    for statement in condition.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=assigned)], value=value) if assigned == name:
                yield id(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    """Whether sizes are made of a value or layers called by it; tensors and the like are not looked at."""
    if isinstance(value, (tuple, list)):
        return len(value) <= MANY and all(map(_is_plain, value))
    return isinstance(value, (int, float, str, type, ModuleType, FunctionType, BuiltinFunctionType))


def _attribute(holder: Any, name: str) -> Any:
    """Return an attribute of a module or a class, None where it has none."""
    try:
        return getattr(holder, name, None)
    except Exception:  # a module that imports its parts when asked may fail to
        return None


def _attributes_in(target: ast.expr) -> list[ast.Attribute]:
    """Return the attributes of the object under construction that an assignment sets."""
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return [part for part in parts if isinstance(part, ast.Attribute) and _is_self(part)]


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _joined(alternatives: list[Candidates]) -> Candidates:
    """Return all values of several alternatives, if all are known."""
    joined: tuple[Any, ...] = ()
    for values in alternatives:
        if values is None:
            return None
        joined += tuple(value for value in values if value not in joined)
    return joined if len(joined) <= MANY else None


def _combined(function: Callable[[Any, Any], Any], left: Candidates, right: Candidates) -> Candidates:
    if left is None or right is None or len(left) * len(right) > MANY:
        return None
    numbers = [value for value in (*left, *right) if value is not None]
    # Sizes are small: no text is multiplied, and no power is a matter of time.
    if not all(isinstance(value, (int, float)) and abs(value) < LARGE for value in numbers):
        return None
    try:
        return tuple(starmap(function, product(left, right)))
    except (TypeError, ValueError, ArithmeticError):  # None, or a division by zero
        return None


def _entries(holders: Candidates, indices: Candidates) -> Candidates:
    """Return the entries of lists that code writes out: those of known indices, else all."""
    if holders is None:
        return None
    found: list[Any] = []
    for holder in holders:
        if holder is None:  # until the list is made
            continue
        if not isinstance(holder, (tuple, list)):
            return None
        try:
            found += holder if indices is None else [holder[index] for index in indices]
        except (TypeError, IndexError):
            return None
    return tuple(found) if len(found) <= MANY else None


class _Reader:
    """Reads constructors, each once for what is known of its arguments."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, str], tuple[_Written, ...]] = {}

    def constructor(
        self, kind: type, bound: Mapping[str, Candidates], depth: int = 0, after: type | None = None
    ) -> tuple[_Written, ...]:
        """Return the sizes that a class writes out for the layers that it makes.

        Args:
            kind: The class of modules.
            bound: Values of its constructor's parameters, as far as a caller gives them.
            depth: How many constructors lead here.
            after: Class whose bases alone count, for ``super().__init__``.
        """
        bases = kind.__mro__ if after is None else kind.__mro__[kind.__mro__.index(after) + 1 :]
        home = next((base for base in bases if "__init__" in vars(base)), object)
        tree = None if _from_torch(home) or depth > DEPTH else _definition(vars(home)["__init__"])
        if tree is None:
            return ()
        key = (kind, home), str(sorted(bound.items(), key=str))
        if key not in self._read:
            self._read[key] = ()  # ends a constructor that calls itself
            function = inspect.unwrap(vars(home)["__init__"])
            scope = _Scope(kind, function, tree, _parameters(tree, bound), {}, depth)
            self._read[key] = tuple(dict.fromkeys(self._statements(scope, [()], home)))
        return self._read[key]

    def _statements(self, scope: _Scope, places: Sequence[Path], home: type | None) -> Iterator[_Written]:
        """Yield what the statements of a function write out; what it returns is kept at some places."""
        for node in ast.walk(scope.tree):
            match node:
                case ast.Assign(targets=targets, value=value):
                    yield from self._assigned(scope, targets, value)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    yield from self._assigned(scope, [target], value)
                case ast.Return(value=ast.expr() as value):
                    yield from self._kept(scope, value, places)
                case ast.Expr(value=ast.Call() as call):
                    yield from self._statement_call(scope, call, places[0], home)

    def _assigned(self, scope: _Scope, targets: list[ast.expr], value: ast.expr) -> Iterator[_Written]:
        """Yield what a value writes out that is assigned to attributes of the object under construction."""
        places: list[Path] = []
        for target in targets:
            places += [(name.attr,) for name in _attributes_in(target)]
        if places:
            yield from self._kept(scope, value, places)

    def _kept(self, scope: _Scope, value: ast.expr, places: Sequence[Path]) -> Iterator[_Written]:
        """Yield what a value writes out that is kept at a place, or its parts at one place each."""
        parts = value.elts if isinstance(value, ast.Tuple) else []
        if len(parts) == len(places):  # self.stem, self.head = Stem(), Head()
            for part, place in zip(parts, places, strict=True):
                yield from self._layers(scope, part, place, set())
        elif len(places) > 1 and isinstance(value, ast.Call) and _is_self(value.func):
            # self.stem, self.head = self._make()
            yield from self._method(scope, value, places)
        else:
            for place in places:
                yield from self._layers(scope, value, place, set())

    def _statement_call(
        self, scope: _Scope, call: ast.Call, place: Path, home: type | None
    ) -> Iterator[_Written]:
        """Yield what a call writes out that is a statement of its own."""
        match call.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__"):
                if scope.kind is not None and home is not None:
                    target = getattr(super(home, scope.kind), "__init__", None)
                    bound = _bound(scope, call, target, skip=1)
                    yield from self.constructor(scope.kind, bound, scope.depth + 1, home)
            case ast.Attribute(value=ast.Name(id="self"), attr="add_module" | "register_module"):
                name = scope.values(call.args[0]) if call.args else None
                own_path = (*place, *name) if name and isinstance(name[0], str) else place
                for argument in call.args[1:]:
                    yield from self._layers(scope, argument, own_path, set())
            case ast.Attribute(value=holder, attr="append" | "extend") if _is_self(holder):
                for argument in call.args:
                    yield from self._layers(scope, argument, (holder.attr,), set())  # type: ignore[attr-defined]
            case ast.Attribute(value=ast.Name(id="self")):
                yield from self._called(scope, call, place)

    def _layers(
        self, scope: _Scope, expression: ast.expr, place: Path, followed: set[str]
    ) -> Iterator[_Written]:
        """Yield what the calls within an expression write out, and within what its names stand for."""
        for node in ast.walk(expression):
            if isinstance(node, ast.Call):
                yield from self._called(scope, node, place)
            elif isinstance(node, ast.Name) and node.id not in followed:
                followed.add(node.id)
                # blocks = [Block(64)]; blocks.append(Block(128)); nn.Sequential(*blocks)
                for value in [*scope.assigned.get(node.id, ()), *scope.added.get(node.id, ())]:
                    if value is not None:
                        yield from self._layers(scope, value, place, followed)

    def _called(self, scope: _Scope, call: ast.Call, place: Path) -> Iterator[_Written]:
        """Yield what one call writes out: of a layer, of a module with a constructor, or of a function."""
        if scope.depth >= DEPTH:
            return
        if _is_self(call.func):
            yield from self._method(scope, call, [place])
            return
        for callee in scope.callees(call.func):
            if isinstance(callee, type) and issubclass(callee, nn.Module):
                bound = _bound(scope, call, callee.__init__, skip=1)
                if _from_torch(callee):
                    yield from _sizes(scope, callee, bound, place)
                else:
                    passed = _passed(scope, call)
                    for written in self.constructor(callee, bound, scope.depth + 1):
                        yield _here(scope, passed, replace(written, path=place + written.path))
            elif callee is nn.Parameter:
                yield from _parameter_sizes(scope, call, place)
            elif isinstance(callee, FunctionType) and not _from_torch(callee):
                yield from self._function(scope, call, callee, [place], None)

    def _method(self, scope: _Scope, call: ast.Call, places: Sequence[Path]) -> Iterator[_Written]:
        """Yield what a method of the object under construction writes out."""
        if scope.kind is not None:
            method = inspect.getattr_static(scope.kind, call.func.attr, None)  # type: ignore[attr-defined]
            yield from self._function(scope, call, method, places, scope.kind)

    def _function(
        self, scope: _Scope, call: ast.Call, function: Any, places: Sequence[Path], kind: type | None
    ) -> Iterator[_Written]:
        """Yield what a method or a function writes out that makes layers."""
        function = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
        tree = _definition(function)
        if tree is None:
            return
        skip = 1 if kind is not None and tree.args.args and tree.args.args[0].arg in ("self", "cls") else 0
        bound = _parameters(tree, _bound(scope, call, function, skip))
        key = (function, tuple(places)), str(sorted(bound.items(), key=str))
        if key not in self._read:
            self._read[key] = ()  # ends a function that calls itself
            attributes = scope.attributes if kind is not None else {}
            inner = _Scope(kind, inspect.unwrap(function), tree, bound, attributes, scope.depth + 1)
            self._read[key] = tuple(dict.fromkeys(self._statements(inner, places, None)))
        passed = _passed(scope, call)
        for written in self._read[key]:
            yield _here(scope, passed, written)


def _parameters(tree: ast.FunctionDef, bound: Mapping[str, Candidates]) -> dict[str, Candidates]:
    """Return the values of all parameters of a function; None for those that a caller may choose."""
    arguments = tree.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    return {argument.arg: bound.get(argument.arg) for argument in names}


def _bound(scope: _Scope, call: ast.Call, function: Any, skip: int) -> dict[str, Candidates]:
    """Return the values of parameters in a call: what is passed, and defaults for what is not."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):  # a class of C, which tells no arguments
        return {}
    names = [parameter.name for parameter in parameters if parameter.kind < parameter.VAR_POSITIONAL]
    passed = _by_place(scope, call, names)
    passed |= {
        keyword.arg: scope.values(keyword.value) for keyword in call.keywords if keyword.arg is not None
    }
    bound = {parameter.name: _default(parameter) for parameter in parameters} | passed
    for keyword in call.keywords:
        if keyword.arg is not None:
            continue
        # **kwargs may set any parameter, unless the keys are written out: dd = {"device": device}
        chosen = _keys(scope, keyword.value) or list(bound)
        bound.update(dict.fromkeys(name for name in chosen if name not in passed))
    return bound


def _defaults(kind: type) -> dict[str, Candidates]:
    """Return the defaults of a class of modules that asks its callers for sizes of other layers.

    Where all sizes have defaults, any of them may be the width; so may lists of numbers, one for each stage.
    """
    function = inspect.unwrap(kind.__init__)  # type: ignore[misc]
    tree = _definition(function)
    if tree is None:
        return {}
    parameters = list(inspect.signature(function).parameters.values())[1:]
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    scope = _Scope(kind, function, tree, _parameters(tree, {}), {}, 0)
    if not any(_takes_size(scope, node, required) for node in ast.walk(tree)):
        return {}
    chosen = [parameter for parameter in parameters if isinstance(parameter.default, (tuple, list))]
    return {parameter.name: _default(parameter) for parameter in parameters if parameter not in chosen}


def _takes_size(scope: _Scope, node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is a layer of torch.nn that takes one of some names: ``nn.Linear(5, d)``."""
    if not isinstance(node, ast.Call):
        return False
    named = any(isinstance(argument, ast.Name) and argument.id in names for argument in node.args)
    layers = [callee for callee in scope.callees(node.func) if isinstance(callee, type)] if named else []
    return any(issubclass(layer, nn.Module) and _from_torch(layer) for layer in layers)


def _default(parameter: inspect.Parameter) -> Candidates:
    """Return the default of a parameter as its values; None where it has none that is a number or a layer."""
    default = parameter.default
    known = default is None or (_is_plain(default) and default is not parameter.empty)
    return (default,) if known else None


def _by_place(scope: _Scope, call: ast.Call, names: Sequence[str]) -> dict[str, Candidates]:
    """Return the values of the parameters that a call passes by their place."""
    passed: dict[str, Candidates] = {}
    for place, argument in enumerate(call.args):
        if isinstance(argument, ast.Starred):  # any number of them
            passed.update(dict.fromkeys(names[place:]))
            break
        if place < len(names):
            passed[names[place]] = scope.values(argument)
    return passed


def _keys(scope: _Scope, expression: ast.expr) -> list[str]:
    """Return the keys of a dict that code writes out, none where they are not known."""
    sources: list[Expression] = [expression]
    if isinstance(expression, ast.Name):
        sources = scope.assigned.get(expression.id, [])
    keys: list[str] = []
    for source in sources:
        if not isinstance(source, ast.Dict):
            return []
        for key in source.keys:
            if not isinstance(key, ast.Constant):
                return []
            keys.append(str(key.value))
    return keys


def _sizes(scope: _Scope, layer: type, bound: Mapping[str, Candidates], place: Path) -> Iterator[_Written]:
    """Yield the sizes that a call of a layer of torch.nn writes out."""
    for name, values in bound.items():
        if name in MADE:
            yield from _numbers(scope, values, place)


def _parameter_sizes(scope: _Scope, call: ast.Call, place: Path) -> Iterator[_Written]:
    """Yield the sizes in ``nn.Parameter(torch.zeros(1, 32))``."""
    for inner in ast.walk(call):
        if isinstance(inner, ast.Call) and inner is not call:
            for argument in inner.args:
                yield from _numbers(scope, scope.values(argument), place)


def _here(scope: _Scope, passed: set[Any], written: _Written) -> _Written:
    """Return a size with the class that writes it: ConvBN(3, 32) does, and not where the layer is made."""
    return replace(written, where=_owner(scope)) if written.size in passed else written


def _passed(scope: _Scope, call: ast.Call) -> set[Any]:
    """Return the numbers that a call passes on."""
    passed: set[Any] = set()
    for argument in [*call.args, *[keyword.value for keyword in call.keywords]]:
        passed.update(value for value in scope.values(argument) or () if isinstance(value, int))
    return passed


def _owner(scope: _Scope) -> str:
    return scope.kind.__name__ if scope.kind is not None else scope.function.__name__


def _numbers(scope: _Scope, values: Candidates, place: Path) -> Iterator[_Written]:
    for value in values or ():
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, int) and _is_number(entry) and entry > 1:
                yield _Written(place, entry, _owner(scope))
