"""Keywords that a function takes as ``**options`` and keeps in records: its signature, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, TypeVar

from mupass._errors import MupassError, suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Function = TypeVar("Function", bound=Callable[..., Any])
Record = TypeVar("Record", bound="DataclassInstance")


def takes(keywords: type, *records: type[DataclassInstance]) -> Callable[[Function], Function]:
    """Show the keywords behind ``**options`` in a function's signature, for `inspect.signature` and `help`.

    Type checkers and editors read them from ``Unpack[keywords]``.

    Args:
        keywords: A typed dictionary of all of them.
        *records: Records that have a field of the same name for each, with its default.

    Returns:
        What a function is to be decorated with; it stays as it is.
    """
    field_of: dict[str, Field[Any]] = {}
    for record in records:
        field_of.update({field.name: field for field in fields(record)})

    def shown(function: Function) -> Function:
        described = signature(function)
        parameters = [
            argument
            for argument in described.parameters.values()
            if argument.kind is not Parameter.VAR_KEYWORD
        ]
        for name in keywords.__annotations__:
            field = field_of[name]
            parameters.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            )
        function.__signature__ = described.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return shown


class Keywords:
    """What a function was given as ``**options``; the function is decorated with `takes`.

    Args:
        function: The function or class.
        options: The keywords with their values.
        error: What to raise for a keyword that it does not take.
    """

    def __init__(
        self, function: Callable[..., Any], options: Mapping[str, Any], error: type[MupassError]
    ) -> None:
        known = signature(function).parameters
        for name in options:
            if name not in known:
                raise error(f"{function.__name__} takes no {name!r}{suggestion(name, known)}")
        self._options = options

    def record(self, kind: type[Record], **given: Any) -> Record:
        """Return a record of the keywords that are its fields; the others have their defaults.

        Args:
            kind: The record.
            **given: Fields that are no keywords.
        """
        for field in fields(kind):
            if field.name in self._options:
                given[field.name] = self._options[field.name]
        return kind(**given)
