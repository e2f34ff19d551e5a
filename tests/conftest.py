"""Conditions that all tests share, and the tiers that they run in.

Each test is in one tier: ``long`` where it is marked so, ``slow`` where it is marked ``slow`` or ``zoo``, and
otherwise the short one, which plain ``pytest`` runs. Of a test marked ``sample`` the short tier has a few
cases and the slow tier the rest. Of one marked ``thin`` the slow tier has each n-th case, the long tier the
others. All tests of one case of the zoo run on one worker, where they share its analyses (`zoo.analyses`).
"""

import random
from collections import defaultdict

import numpy
import pytest
import torch
from zoo.case import Case

# Tensors of tests are small: a second thread costs more than it brings, and sums come out alike everywhere.
torch.set_num_threads(1)

THE_REST = """\
That was the short tier. The rest, which CI runs too (20 to 35 minutes on 2 cores): pytest -m slow
What needs other packages is skipped there without pip install -e ".[dev,ci]". By hand only: pytest -m long"""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def _marks(item):
    return {mark.name for mark in item.iter_markers()}


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _sample(cases):
    """Choose cases of one test until every value of every parameter has been in one of them."""
    values = {case: {(name, id(value)) for name, value in _parameters(case).items()} for case in cases}
    missing = set().union(*values.values())
    chosen = set()
    while missing:
        best = max(cases, key=lambda case: len(values[case] & missing))
        chosen.add(best)
        missing -= values[best]
    return chosen


def _cases_of_tests(items, mark):
    """Return the cases of every test that has a mark, test by test."""
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker(mark):
            tests[item.path, item.parent.name, item.originalname].append(item)
    return tests.values()


def _left_out(items):
    """Return the cases of tests marked ``sample`` that the short tier does without."""
    left_out = set()
    short = [item for item in items if not _marks(item) & {"slow", "zoo", "long"}]
    for cases in _cases_of_tests(short, "sample"):
        mark = cases[0].get_closest_marker("sample")
        names, every = set(mark.args), mark.kwargs.get("every")
        chosen = set(cases[::every]) if every else _sample(cases)
        if names:
            chosen = {case for case in cases if case.callspec.id in names}
        unknown = names - {case.callspec.id for case in cases}
        if unknown and not _by_name(cases[0].config):
            raise pytest.UsageError(f"{cases[0].nodeid}: no case {sorted(unknown)} for its mark sample")
        left_out.update(set(cases) - chosen)
    return left_out


def _thinned(items):
    """Return the cases of tests marked ``thin`` that the slow tier leaves to the long one."""
    thinned = set()
    for cases in _cases_of_tests(items, "thin"):
        (every,) = cases[0].get_closest_marker("thin").args
        thinned.update(set(cases) - set(cases[::every]))
    return thinned


def _tier(item):
    """Tell the tier of a test by its markers."""
    marks = _marks(item)
    if {"slow", "long"} <= marks:
        raise pytest.UsageError(f"{item.nodeid} is marked both slow and long: a test has one tier")
    if "long" in marks:
        return "long"
    return "slow" if marks & {"slow", "zoo"} else "short"


def _by_name(config):
    """Whether a test was asked for by its own name."""
    return any("::" in argument for argument in config.args)


def _only_short(config):
    """Whether nothing was asked for by marker or name."""
    return not config.option.markexpr and not _by_name(config)


def pytest_ignore_collect(collection_path, config):
    """Leave a file of slow tests that takes many seconds to import, unless it is asked for."""
    heavy = collection_path.name == "test_zoo_packages.py"
    asked = any(argument.endswith(collection_path.name) for argument in config.args)
    return True if heavy and _only_short(config) and not asked else None


@pytest.hookimpl(tryfirst=True)  # before pytest itself reads the markers
def pytest_collection_modifyitems(config, items):
    """Sort tests into tiers, gather those of one case, skip what needs a GPU where there is none."""
    tiers = {"short": [], "slow": [], "long": []}
    left_out = _left_out(items)
    for item in items:
        tiers["slow" if item in left_out else _tier(item)].append(item)
    thinned = _thinned(tiers["slow"])
    for item in tiers["slow"]:
        if item in thinned:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
        item.add_marker(pytest.mark.long if item in thinned else pytest.mark.slow)
    for item in items:
        if isinstance(case := _parameters(item).get("case"), Case):
            item.add_marker(pytest.mark.xdist_group(case.name))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    if _only_short(config):
        config.hook.pytest_deselected(items=tiers["slow"] + tiers["long"])
        items[:] = tiers["short"]


def pytest_terminal_summary(terminalreporter, config):
    """Say at the end of the short tier how to run the rest."""
    if _only_short(config) and not config.option.collectonly:
        terminalreporter.write_line(THE_REST)
