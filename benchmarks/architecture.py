"""Draws the rooms of the package and the arrows between them, from the package's own imports.

    python -m benchmarks.architecture

writes ``docs/architecture.svg`` and the table of ``docs/architecture.md``; `tests/test_architecture.py` tells
when they are out of date.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/architecture.md"
PICTURE = ROOT / "docs/architecture.svg"
BEGIN, END = "<!-- rooms: written by benchmarks/architecture.py -->", "<!-- end of rooms -->"

# From the ground up: a room imports from itself and from those before it in this list.
ROOMS = (
    "_errors",
    "_keywords",
    "_files",
    "_walks",
    "_page",
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
    "_stage",
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

# Sizes in the picture.
CELL_WIDTH, CELL_HEIGHT = 150, 62
BOX_WIDTH, BOX_HEIGHT = 108, 30
MARGIN = 16
SWEEPS = 24  # of sorting the layers by their neighbors


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "mupass").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _statements(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child, function
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _statements(child, child.name if is_function else function)


@cache
def statements(path: Path) -> list[tuple[ast.AST, str]]:
    """Return every statement of a file, with the name of the function that it stands in, if any."""
    return list(_statements(ast.parse(path.read_text(encoding="utf-8"))))


def imported(node: ast.AST, known: dict[str, Path]) -> list[str]:
    """Return the modules of the package that a statement imports; none for other statements."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        raise ValueError(f"line {node.lineno}: imports are absolute here")
    if node.module not in known:
        return []
    # from package import module: the module; from module import name: the module that has the name
    submodules = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in known else node.module for name in submodules]


@cache
def imports() -> nx.DiGraph:
    """Return the graph of all imports, those in functions and those for type checkers included."""
    known = modules()
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        for node, _ in statements(path):
            graph.add_edges_from((name, other) for other in imported(node, known))
    return graph


def room(module: str) -> str:
    """Return the room of a module; the package itself is a room too."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def rooms() -> nx.DiGraph:
    """Return the graph of imports between rooms."""
    graph = nx.DiGraph()
    graph.add_nodes_from(ROOMS)
    for name, other in imports().edges:
        if room(name) != room(other):
            graph.add_edge(room(name), room(other))
    return graph


def table() -> str:
    """Return the rooms as a table of the page, from the ground up."""
    graph, known = rooms(), modules()
    lines = ["| room | what it holds | imports from |", "|---|---|---|"]
    for name in ROOMS:
        top = name if name == "mupass" else f"mupass.{name}"
        what = (ast.get_docstring(ast.parse(known[top].read_text(encoding="utf-8"))) or "").splitlines()[0]
        below = [other for other in ROOMS if graph.has_edge(name, other)]
        used = ", ".join(f"`{other}`" for other in below) or "nothing"
        lines.append(f"| `{name}` | {what} | {used} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with its table renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def layers(graph: nx.DiGraph) -> list[list[str]]:
    """Return the nodes by the longest way to the ground, the ground first."""
    return [sorted(nodes) for nodes in nx.topological_generations(graph.reverse())]


def with_bends(graph: nx.DiGraph) -> tuple[nx.DiGraph, list[list[str]], dict[tuple[str, str], list[str]]]:
    """Give every arrow a point in each layer that it crosses.

    Returns:
        The graph in which every edge joins neighboring layers, its layers, and the way of every arrow.
    """
    rows = layers(graph)
    height = {node: level for level, nodes in enumerate(rows) for node in nodes}
    bent, ways = nx.DiGraph(), {}
    bent.add_nodes_from(graph)
    for above, below in sorted(graph.edges):
        way = [above]
        for level in range(height[above] - 1, height[below], -1):
            point = f"{above} to {below} at {level}"
            rows[level].append(point)
            way.append(point)
        way.append(below)
        nx.add_path(bent, way)
        ways[above, below] = way
    return bent, rows, ways


def places(bent: nx.DiGraph, rows: list[list[str]]) -> dict[str, float]:
    """Return the horizontal place of every node: near its neighbors, so that few arrows cross."""
    x = {}
    for nodes in rows:
        x.update({node: float(i - (len(nodes) - 1) / 2) for i, node in enumerate(nodes)})
    for sweep in range(SWEEPS):
        upward = sweep % 2 == 0
        for nodes in rows if upward else reversed(rows):
            wanted = {}
            for node in nodes:
                near = list(bent.successors(node) if upward else bent.predecessors(node))
                wanted[node] = sum(x[other] for other in near) / len(near) if near else x[node]
            nodes.sort(key=lambda node: (wanted[node], node))
            x.update(spread([wanted[node] for node in nodes], nodes))
    return x


def spread(wanted: list[float], nodes: list[str]) -> dict[str, float]:
    """Keep neighbors in a layer one cell apart, and the layer's middle where it is wanted."""
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + 1) if placed else place)
    shift = sum(wanted) / len(wanted) - sum(placed) / len(placed)
    return {node: place + shift for node, place in zip(nodes, placed, strict=True)}


def picture() -> str:
    """Return the rooms as SVG, the ground at the bottom; an arrow stands for all longer ways as well."""
    graph = nx.transitive_reduction(rooms())
    bent, rows, ways = with_bends(graph)
    x = places(bent, rows)
    left = min(x.values())
    width = round((max(x.values()) - left) * CELL_WIDTH + BOX_WIDTH + 2 * MARGIN)
    height = round((len(rows) - 1) * CELL_HEIGHT + BOX_HEIGHT + 2 * MARGIN)
    center = {}
    for level, nodes in enumerate(rows):
        for node in nodes:
            across = MARGIN + BOX_WIDTH / 2 + (x[node] - left) * CELL_WIDTH
            center[node] = (across, height - MARGIN - BOX_HEIGHT / 2 - level * CELL_HEIGHT)
    parts = [arrow([center[node] for node in way]) for _, way in sorted(ways.items())]
    parts += [box(name, *center[name]) for name in ROOMS]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'aria-labelledby="t d" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">',
            '  <title id="t">The rooms of mupass</title>',
            '  <desc id="d">Arrows go from a room to those that it imports from, all downward.</desc>',
            '  <defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            'orient="auto"><path d="M0 0.6 7.4 4 0 7.4z" fill="#64748b"/></marker></defs>',
            f'  <rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def arrow(points: list[tuple[float, float]]) -> str:
    """Return an arrow through points, upright where it passes a layer."""
    x, y = points[0]
    y += BOX_HEIGHT / 2
    path = f"M{x:.0f} {y:.0f}"
    for number, (across, down) in enumerate(points[1:], 2):
        end = down - BOX_HEIGHT / 2
        middle = (y + end) / 2
        path += f"C{x:.0f} {middle:.0f} {across:.0f} {middle:.0f} {across:.0f} {end:.0f}"
        x, y = across, end
        if number < len(points):  # past the layer
            y = down + BOX_HEIGHT / 2
            path += f"V{y:.0f}"
    return f'  <path d="{path}" stroke="#64748b" stroke-width="1.4" fill="none" marker-end="url(#tip)"/>'


def box(name: str, x: float, y: float) -> str:
    """Return a room."""
    return (
        f'  <rect x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="7" fill="#eef2ff" stroke="#6366f1"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}" font-size="13" fill="#0f172a" text-anchor="middle">{name}</text>'
    )


def main() -> None:
    """Write the picture and the table."""
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
