"""The zoo's architectures of other packages, by the tests of test_zoo and test_resize_zoo.

They are apart because it takes many seconds to import these packages: the short tier does not open this file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
from test_other_width import equals_its_own_plan_where_it_can
from test_resize_zoo import WIDTHS, equals_the_architecture
from test_zoo import a_second_instance_settles, one_model_tells, wrong
from zoo.analyses import third_party
from zoo.case import Case, Cases

import mupass

pytestmark = pytest.mark.zoo

# Modules of cases, and the packages without which they are skipped.
PACKAGED = {
    "hf_text": ("transformers",),
    "hf_other": ("transformers",),
    "hf_more": ("transformers",),
    "hf_blind": ("transformers",),
    "vision": ("timm", "torchvision"),
    "vision_more": ("timm", "torchvision", "transformers"),
    "generative": ("diffusers",),
    "graphs": ("torch_geometric",),
}


def packaged() -> Iterator[pytest.param]:
    for module, packages in PACKAGED.items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if missing:
            skip = pytest.mark.skip(reason=f"needs {missing[0]}")
            yield pytest.param(None, marks=skip, id=module)
            continue
        with third_party():
            cases: Cases = importlib.import_module(f"zoo.{module}").CASES
        yield from (pytest.param(case, id=name) for name, case in cases.items())


CASES = list(packaged())


@pytest.mark.parametrize("case", CASES)
def test_one_model_tells_its_widths(case: Case) -> None:
    one_model_tells(case, "train")


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", CASES)
def test_one_model_tells_its_widths_in_evaluation(case: Case) -> None:
    one_model_tells(case, "eval")


def test_regnet_is_read_right_once_its_groups_are_said_to_grow() -> None:
    pytest.importorskip("timm")
    with third_party():
        case = importlib.import_module("zoo.vision").CASES["timm_regnet"]
        model, dims = case.build(1).eval(), {r".*conv2\.conv\.weight:1": "finite"}
        assert wrong(case, mupass.analyze(model, case.inputs()), conventional=True)
        assert not wrong(case, mupass.analyze(model, case.inputs(), dims=dims), conventional=True)


@pytest.mark.thin(2)
@pytest.mark.parametrize("case", CASES)
def test_a_second_instance_settles_everything(case: Case) -> None:
    a_second_instance_settles(case)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("source", "target"), WIDTHS)
def test_equals_the_architecture_built_at_that_width(case: Case, source: int, target: int) -> None:
    equals_the_architecture(case, source, target)


# The projection of Mamba 2 has a part that is a sum of a width and a fixed state: refused. Widths rounded to
# multiples of 8 grow at some of three sizes only, or no two have one ratio. The last is not built that wide.
OTHERWISE = {
    *("mamba2", "bamba", "falcon_h1", "zamba2"),
    *("timm_resnest", "timm_efficientnet", "timm_mobilenet_v3"),
    "timm_ghostnet",
}


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if case.id not in OTHERWISE])
def test_the_plan_of_a_narrow_model_is_that_of_the_wide_one(case: Case) -> None:
    equals_its_own_plan_where_it_can(case)
