"""How dense is the code? Figures of every room: ``python -m benchmarks.code_figures [FOLDER]``.

Comprehensions, conditional expressions and comments are counted on 100 lines. A function's branches are its
``if``, ``for``, ``while``, ``except`` and ``case``, those of comprehensions and conditional expressions, and
every ``and`` and ``or``; functions inside of it count for themselves.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.match_case, ast.comprehension)
MANY_BRANCHES = 15
ROOT = Path(__file__).resolve().parents[1] / "mupass"


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of the functions inside of it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from own_nodes(node)


def branches(function: ast.AST) -> int:
    """Return the number of branches of a function."""
    count = 0
    for node in own_nodes(function):
        count += isinstance(node, BRANCHES)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
    return count


def comments(text: str) -> int:
    """Return the number of comments in a file."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


class Figures:
    """Figures of one room, file by file."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: list[int] = []  # lengths of assigned names
        self.most_parameters = 0
        self.large: list[tuple[int, str]] = []  # functions with many branches

    def add(self, text: str, where: str) -> None:
        """Count one file."""
        self.counts["lines"] += len(text.splitlines())
        self.counts["comments"] += comments(text)
        for node in ast.walk(ast.parse(text)):
            self.counts["nodes"] += 1
            self.counts["comprehensions"] += isinstance(node, COMPREHENSIONS)
            self.counts["conditional"] += isinstance(node, ast.IfExp)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.names.append(len(node.id))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._add_function(node, where)

    def _add_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, where: str) -> None:
        found = branches(node)
        if found > MANY_BRANCHES:
            self.large.append((found, f"{where} {node.name}"))
        arguments = node.args
        parameters = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        self.most_parameters = max(self.most_parameters, parameters)

    def row(self, name: str) -> str:
        """Return one line of the table."""
        lines = self.counts["lines"]
        shares = [100 * self.counts[key] / lines for key in ("comprehensions", "conditional", "comments")]
        middle = statistics.median(self.names or [0])
        return (
            f"{name:<10}{lines:>7}{self.counts['nodes']:>9}"
            + "".join(f"{share:>9.1f}" for share in shares)
            + f"{len(self.large):>7}{self.most_parameters:>7}{middle:>7.0f}"
        )


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    rooms: dict[str, Figures] = {}
    whole = Figures()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        room = parts[0] if len(parts) > 1 else "top"
        text = path.read_text(encoding="utf-8")
        for figures in (rooms.setdefault(room, Figures()), whole):
            figures.add(text, "/".join(parts))
    print(
        f"{'room':<10}{'lines':>7}{'nodes':>9}{'compr.':>9}{'cond.':>9}{'comm.':>9}"
        f"{'large':>7}{'most':>7}{'name':>7}"
    )
    for name in sorted(rooms):
        print(rooms[name].row(name))
    print(whole.row("all"))
    print(f"\nfunctions with more than {MANY_BRANCHES} branches")
    for count, place in sorted(whole.large, reverse=True):
        print(f"{count:4} {place}")


if __name__ == "__main__":
    main()
