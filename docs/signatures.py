"""Shows the keywords behind ``**options: Unpack[...]`` on the API page; `mkdocs.yml` names this file."""

import ast
from importlib import import_module
from inspect import signature
from operator import attrgetter
from typing import Any

import griffe


class Signatures(griffe.Extension):
    """Puts the keywords that `inspect.signature` tells in the place of ``**options``."""

    def on_function(self, *, func: griffe.Function, **rest: Any) -> None:
        """Change one function.

        Args:
            func: What was read from its source.
            **rest: Not used.
        """
        variadic = [parameter for parameter in func.parameters if "Unpack" in str(parameter.annotation)]
        if not variadic:
            return
        del func.parameters[variadic[0].name]
        name_in_module = func.path.removeprefix(f"{func.module.path}.")
        function = attrgetter(name_in_module)(import_module(func.module.path))
        for name, shown in signature(function).parameters.items():
            if name in func.parameters:
                continue
            expression = ast.parse(shown.annotation, mode="eval").body
            parameter = griffe.Parameter(
                name,
                annotation=griffe.safe_get_annotation(expression, parent=func.module),
                kind=griffe.ParameterKind.keyword_only,
                default=repr(shown.default),
            )
            func.parameters.add(parameter)
