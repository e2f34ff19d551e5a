"""The architecture: no module imports itself by a detour, and rooms import down one line only."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
# Rooms of the package from the ground up: each imports from itself and from those above it in this list.
ROOMS = (
    "_errors",
    "_files",
    "_records",
    "_parallel",
    "_capture",
    "_dims",
    "_roles",
    "_scales",
    "_report",
    "_analyze",
    "_alignment",
    "_taps",
    "_rewrite",
    "_fold",
    "_optim",
    "_transform",
    "_initialize",
    "_resize",
    "_runs",
    "_hyper",
    "_study",
    "mupass",
    "_cli",
    "__main__",
)
LAZY = {"mupass._cli"}  # commands need PyTorch, which takes seconds to load; --help does not


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "mupass").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = path
    return found


def imported(node: ast.AST, known: dict[str, Path]) -> list[str]:
    """Return the modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        if node.module in known:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            return [name if name in known else node.module for name in submodules]
    return []


def imports() -> nx.DiGraph:
    """Return the graph of all imports, those in functions and those for type checkers included."""
    known = modules()
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            graph.add_edges_from((name, other) for other in imported(node, known))
    return graph


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return imports()


def test_the_graph_sees_imports(graph):
    assert len(graph) > 150
    assert graph.has_edge("mupass._optim.kfac", "mupass._optim.kronecker.preconditioner")
    assert graph.has_edge("mupass._dims.engine", "mupass._dims.rules")  # from a package
    assert graph.has_edge("mupass._cli", "mupass._cli.commands")  # in a function
    assert graph.has_edge("mupass", "mupass._analyze")  # for type checkers


def test_no_import_cycle(graph):
    cycles = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    assert not cycles
    assert not list(nx.selfloop_edges(graph))


def test_rooms_import_down_the_line(graph):
    rooms = {room(name) for name in graph}
    assert rooms == set(ROOMS)
    height = {name: ROOMS.index(room(name)) for name in graph}
    upward = [f"{name} -> {other}" for name, other in graph.edges if height[name] < height[other]]
    assert not upward


def test_imports_stand_at_the_top_of_a_module():
    """In functions are only imports of other packages, but for the lazy entry points."""
    known = modules()
    late = []
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = [other for node in ast.walk(function) for other in imported(node, known)]
                late += [f"{name}.{function.name} -> {other}" for other in inner if name not in LAZY]
    assert not late


def test_words_of_the_command_line_load_no_torch():
    code = "import sys, mupass._cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
