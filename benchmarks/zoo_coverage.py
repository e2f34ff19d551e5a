"""How much of the test zoo K-FAC takes, by numbers and by matrices, and why not the rest.

    python -m benchmarks.zoo_coverage

One line an architecture that leaves something to the fallback, then the reasons, the largest first. A matrix
is a parameter with more than one axis longer than 1: gains, shifts and biases count among the numbers only.
Cases whose packages (timm, torchvision, transformers, diffusers, torch_geometric) are not there are left out.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mupass

# The zoo is that of the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
FILES = (
    "plain_blind plain_blind_more plain_dense plain_sequence plain_vision plain_more plain_kinds "
    "hf_text hf_other hf_more hf_blind vision vision_more generative graphs"
).split()


class Parameter(NamedTuple):
    """One parameter of a case, and why it falls back; an empty text where it does not."""

    name: str
    numbers: int
    is_matrix: bool
    reason: str


def cases(pattern: str) -> Iterator[Any]:
    """Yield the cases whose packages are there and whose names fit a pattern."""
    for file in FILES:
        try:
            found = importlib.import_module(f"zoo.{file}").CASES
        except ImportError as error:
            print(f"left out: zoo.{file}, {error}", file=sys.stderr)
            continue
        for name, case in found.items():
            if re.search(pattern, name):
                yield case


def parameters(case: Any, width: int) -> list[Parameter]:
    """Return the parameters of one architecture, trained by K-FAC."""
    torch.manual_seed(0)
    positional, named = case.inputs()
    model = mupass.transform(case.build(width), (positional, named))
    tensors, found = dict(model.named_parameters()), []
    for covered in mupass.KFAC(model).coverage():
        shape = tensors[covered.parameter].shape
        reason = ""
        if not covered.treatment.startswith("kfac"):
            reason = covered.reason
        wide = [size for size in shape if size > 1]
        found.append(Parameter(covered.parameter, shape.numel(), len(wide) > 1, reason))
    return found


def share(found: list[Parameter]) -> str:
    """Return what K-FAC takes of parameters, by numbers and by matrices."""
    numbers = sum(p.numbers for p in found)
    taken = sum(p.numbers for p in found if not p.reason)
    matrices = [p for p in found if p.is_matrix]
    covered = [p for p in matrices if not p.reason]
    return (
        f"{100 * taken / max(numbers, 1):5.1f} % of {numbers} numbers, "
        f"{100 * len(covered) / max(len(matrices), 1):5.1f} % of {len(matrices)} matrices"
    )


def main() -> None:
    """Print shares by architecture, of all, and reasons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression over names of architectures")
    parser.add_argument("--width", type=int, default=1, help="multiplier of the zoo's widths")
    parser.add_argument("--verbose", action="store_true", help="every parameter that falls back")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    everything: list[Parameter] = []
    numbers: Counter[str] = Counter()
    matrices: Counter[str] = Counter()
    count = 0
    for case in cases(options.only):
        try:
            found = parameters(case, options.width)
        except Exception as error:  # one architecture that cannot be built here is named, and the rest go on
            print(f"{case.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        count += 1
        everything += found
        left = [p for p in found if p.reason]
        for p in left:
            numbers[p.reason] += p.numbers
            matrices[p.reason] += p.is_matrix
        if left:
            print(f"{case.name}: {share(found)}", flush=True)
        if options.verbose:
            for p in left:
                print(f"    {p.name} {p.numbers} {'matrix' if p.is_matrix else 'vector'}: {p.reason}")
    print(f"{count} architectures: {share(everything)}")
    for reason, size in numbers.most_common():
        print(f"{size:9d} numbers, {matrices[reason]:4d} matrices: {reason}")


if __name__ == "__main__":
    main()
