"""Width inference against architectures whose truth is read off two instances."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from zoo.analyses import alone, beside_a_second, truth
from zoo.case import Case
from zoo.plain_blind import CASES as BLIND
from zoo.plain_blind_more import CASES as BLINDER
from zoo.plain_dense import CASES as DENSE
from zoo.plain_kinds import CASES as KINDS
from zoo.plain_more import CASES as MORE
from zoo.plain_sequence import CASES as SEQUENCE
from zoo.plain_vision import CASES as VISION

import mupass

PLAIN = {**BLIND, **BLINDER, **DENSE, **SEQUENCE, **VISION, **MORE, **KINDS}
# For the short tier; the weights of one case are computed, so names and order of its parameters stay.
PARAMETRIZED = {"normalized_weights"}
SOME = [name for name in list(PLAIN)[::8] if name not in PARAMETRIZED]
# Cases with operators, or questions, that no quicker test of the short tier has.
ALONE = {
    *("char_lstm", "conformer", "fno", "glow", "implicit_quantile", "involution", "plane_field", "rwkv"),
    *("set_transformer", "slot_attention", "spatial_transformer", "speech_pooling", "super_resolution"),
    "vqvae",
}


def wrong(case: Case, analysis: mupass.Analysis, conventional: bool) -> list[str]:
    """Say where the analysis differs from the truth; axes that are a convention count only when asked."""
    found = []
    for (name, axis), grows in truth(case).items():
        if analysis[name].infinite[axis] != grows and (conventional or not case.conventional(name, axis)):
            found.append(f"{name}:{axis} should be {grows}: {analysis[name].evidence[axis]}")
    return found


def unmarked(case: Case, analysis: mupass.Analysis) -> list[str]:
    """Say which axes that are a matter of convention got a verdict without a question mark."""
    axes = [(g, axis) for g in analysis.geometries for axis, size in enumerate(g.shape) if size > 1]
    return [
        f"{g.name}:{axis} {g.evidence[axis]}"
        for g, axis in axes
        if case.conventional(g.name, axis) and not g.ambiguous[axis]
    ]


@pytest.mark.sample(
    *[f"{name}-train" for name in {*list(PLAIN)[::5]} | ALONE], *[f"{name}-eval" for name in SOME[::2]]
)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_one_model_tells_its_widths(case: Case, mode: str) -> None:
    one_model_tells(case, mode)


def one_model_tells(case: Case, mode: str) -> None:
    analysis = alone(case, 1, mode)
    assert not wrong(case, analysis, conventional=False)
    assert not unmarked(case, analysis)


@pytest.mark.sample(*SOME[::2])
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_a_second_instance_settles_everything(case: Case) -> None:
    a_second_instance_settles(case)


def a_second_instance_settles(case: Case) -> None:
    analysis = beside_a_second(case)
    assert not wrong(case, analysis, conventional=True)
    for geometry in analysis.geometries:
        assert not any(geometry.ambiguous)


def verdicts(model: nn.Module, inputs: tuple, order: list[int] | None = None) -> list[tuple[bool, ...]]:
    """Return verdicts in an order that does not depend on names."""
    analysis = mupass.analyze(model, inputs)
    by_id = {id(p): analysis[n].infinite for n, p in model.named_parameters()}
    return [by_id[i] for i in order or by_id]


def of_all(analysis: mupass.Analysis) -> list[tuple[bool, ...]]:
    """Return the verdicts on all parameters, in the model's order."""
    return [geometry.infinite for geometry in analysis.geometries]


def permute(model: nn.Module) -> None:
    """Reverse the registration order of parameters and modules, where the forward pass goes by name."""
    for module in model.modules():
        for table in (module._modules, module._parameters):
            if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ParameterList)) and isinstance(
                table, dict
            ):
                entries = list(table.items())[::-1]
                table.clear()
                table.update(entries)


def rename(model: nn.Module) -> None:
    """Give every parameter and module a name without meaning; the old attribute is a property."""
    containers = (nn.Sequential, nn.ModuleList, nn.ParameterList, nn.ModuleDict, nn.ParameterDict, nn.RNNBase)
    for module in list(model.modules()):
        if isinstance(module, containers) or type(module).__name__.startswith("Parametri"):
            continue
        aliases = {}
        for table in (module._modules, module._parameters):
            for name in list(table):
                new = f"x{len(aliases)}"
                aliases[name] = property(lambda self, new=new: getattr(self, new))
                table[new] = table.pop(name)
        module.__class__ = type(type(module).__name__, (type(module),), aliases)


def changes() -> Iterator[pytest.param]:
    """Yield every case with each change; one of them, in turn, is run by the slow tier."""
    names = [name for name in PLAIN if name not in PARAMETRIZED]
    for number, name in enumerate(names):
        for turn, change in enumerate((permute, rename)):
            marks = () if turn == number % 2 else pytest.mark.long
            yield pytest.param(PLAIN[name], change, id=f"{name}-{change.__name__}", marks=marks)


@pytest.mark.sample(every=9)
@pytest.mark.parametrize(("case", "change"), list(changes()))
def test_order_and_names_do_not_matter(case: Case, change) -> None:
    model, inputs = case.build(1).eval(), case.inputs()
    order = [id(p) for p in model.parameters()]
    change(model)
    assert verdicts(model, inputs, order) == of_all(alone(case, 1, "eval"))


class Coincidence(nn.Module):
    """A language model whose sizes can all be the same number."""

    def __init__(self, d: int, vocabulary: int, length: int, heads: int, hidden: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Parameter(torch.zeros(length, d))
        self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.mix, self.head = nn.Linear(length, length), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def coincidence(
    d: int, vocabulary: int, length: int, batch: int, heads: int, hidden: int
) -> list[tuple[bool, ...]]:
    model = Coincidence(d, vocabulary, length, heads, hidden)
    return verdicts(model, (torch.zeros(batch, length, dtype=torch.long),))


REFERENCE = coincidence(24, 50, 9, 2, 3, 70)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_equal_sizes_do_not_confuse(size: int) -> None:
    assert coincidence(size, size, size, size, 2, size) == REFERENCE
    assert coincidence(size, size, size, size, size // 2, 2 * size) == REFERENCE


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("seed", range(8))
def test_random_sizes_do_not_matter(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    heads, head_dim, vocabulary, length, batch, hidden = torch.randint(2, 12, (6,), generator=draw).tolist()
    assert coincidence(heads * head_dim, vocabulary, length, batch, heads, hidden) == REFERENCE


@pytest.mark.parametrize(("features", "grows"), [(10, False), (16, True)])
def test_features_of_the_code_are_a_policy(features: int, grows: bool) -> None:
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.time, self.head = nn.Linear(3, 16), nn.Linear(features, 32), nn.Linear(16, 3)
            self.mix = nn.Linear(32, 16)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            waves = torch.cos(t[:, None] * torch.arange(features))
            return self.head(torch.relu(self.enter(x) + self.mix(torch.relu(self.time(waves)))))

    geometry = mupass.analyze(Timed(), (torch.zeros(2, 3), torch.zeros(2)))["time.weight"]
    assert geometry.infinite == (True, grows)
    assert geometry.ambiguous == (False, True)


@pytest.mark.thin(2)
@pytest.mark.sample(*SOME[1::2])
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_verdicts_do_not_depend_on_the_width_they_are_taken_at(case: Case) -> None:
    assert of_all(alone(case, 1, "eval")) == of_all(alone(case, 3, "eval"))
