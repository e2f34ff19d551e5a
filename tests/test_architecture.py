"""The architecture: no module imports itself by a detour, and rooms import down one line only."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import networkx as nx
import pytest

from benchmarks.architecture import (
    PAGE,
    PICTURE,
    ROOMS,
    ROOT,
    imported,
    imports,
    modules,
    page,
    picture,
    room,
    statements,
)

pytestmark = pytest.mark.xdist_group("architecture")  # the files are parsed once
LAZY = {"mupass._cli"}  # commands need PyTorch, which takes seconds to load; --help does not


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
    assert {room(name) for name in graph} == set(ROOMS)
    height = {name: ROOMS.index(room(name)) for name in graph}
    upward = [f"{name} -> {other}" for name, other in graph.edges if height[name] < height[other]]
    assert not upward


def test_imports_stand_at_the_top_of_a_module():
    """In functions are only imports of other packages, but for the lazy entry points."""
    known = modules()
    late = []
    for name, path in known.items():
        for node, function in statements(path):
            if function and name not in LAZY:
                late += [f"{name}.{function} -> {other}" for other in imported(node, known)]
    assert not late


def test_words_of_the_command_line_load_no_torch():
    code = "import sys, mupass._cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_the_page_shows_the_imports_of_today():
    """Write it anew with ``python -m benchmarks.architecture``."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
    drawn = picture()
    assert PICTURE.read_text(encoding="utf-8") == drawn
    shown = {element.text for element in ElementTree.fromstring(drawn).iter() if element.text}
    assert set(ROOMS) <= shown
