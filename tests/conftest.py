"""Conditions that all tests share."""

import random

import numpy
import pytest
import torch

# Tensors of tests are small: a second thread costs more than it brings, and sums come out alike everywhere.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
