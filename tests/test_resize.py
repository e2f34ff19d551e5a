"""Resizing from one model gives the architecture that its author would have built at that width."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import plain_dense, plain_sequence, plain_vision

import mupass
from mupass import ResizeError, resize

CASES = {**plain_dense.CASES, **plain_sequence.CASES, **plain_vision.CASES}
# What grows is a matter of convention in the others.
NAMES = sorted(n for n, c in CASES.items() if not c.ambiguous)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def outputs(model: nn.Module, inputs: tuple) -> list[torch.Tensor]:
    args, kwargs = inputs
    torch.manual_seed(0)
    with torch.no_grad():
        return [t for t in tree_leaves(model.eval()(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def test_same_width_is_an_independent_copy_with_equal_output() -> None:
    torch.manual_seed(0)
    model, x = mlp(32), torch.randn(3, 20)
    twin = resize(model, 32)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


def test_class_attributes_and_law_follow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 10)
    )
    x = torch.randn(2, 3, 8, 8)
    wide = resize(model, 256, example_inputs=x, seed=0)
    assert type(wide) is type(model) and list(wide.state_dict()) == list(model.state_dict())
    assert (wide[0].out_channels, wide[1].num_features, wide[4].in_features) == (256, 256, 256 * 36)
    assert torch.equal(wide[1].running_var, torch.ones(256))
    assert wide(x).shape == (2, 10)
    for layer in (0, 4):  # default law: std 1/sqrt(3 fan_in)
        weight = wide[layer].weight
        assert weight.std().item() == pytest.approx((3 * weight[0].numel()) ** -0.5, rel=0.05)


def test_seeds_repeat_and_leave_the_global_state_alone() -> None:
    model = mlp(16)
    state = torch.get_rng_state()
    a, b, c = (resize(model, 64, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a[2].weight, b[2].weight) and not torch.equal(a[2].weight, c[2].weight)


def test_meta_source_gives_a_real_proxy_by_its_own_code() -> None:
    with torch.device("meta"):
        giant = mlp(1 << 15)
    proxy = resize(giant, 64, seed=0)
    assert shapes(proxy) == shapes(mlp(64)) and proxy(torch.randn(2, 20)).isfinite().all()
    assert proxy[2].weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


def test_refusals_name_the_dimension() -> None:
    with pytest.raises(ResizeError, match=r"0\.out.*would become 10\.67|would become"):
        resize(mlp(32), scale=1 / 3)
    with pytest.raises(ResizeError, match="no dimension 'nope'"):
        resize(mlp(32), {"nope": 3})
    with pytest.raises(ResizeError, match="either width= or scale="):
        resize(mlp(32))
    with pytest.raises(ResizeError, match="positive"):
        resize(mlp(32), scale=-1.0)
    chain = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((4, 8, 16, 6, 2))))
    with pytest.raises(ResizeError, match=r"name the width \(1.out\) or these too: \['1.out'\]"):
        resize(chain, {"0.out": 16, "2.out": 6})


def test_named_dimensions_move_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    new = resize(model, {"0.out": 24, "2.out": 12})
    assert [tuple(p.shape) for p in new.parameters() if p.dim() == 2] == [(24, 4), (12, 24), (2, 12)]


def test_a_resized_copy_can_be_transformed_and_trained() -> None:
    model = mupass.transform(resize(mlp(16), 64, seed=0), base=16)
    optimizer = mupass.KFAC(model, lr=0.05, damping=1e-2, momentum=0.0)
    x, y = torch.randn(64, 20), torch.randint(4, (64,))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_architecture_built_at_that_width(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    for source, target in ((1, 2), (2, 1), (1, 1)):
        torch.manual_seed(0)
        model = case.build(source)
        try:
            new = resize(model, scale=target / source, example_inputs=inputs, seed=0)
        except ResizeError as error:
            pytest.skip(f"refused by name: {error}")
        assert shapes(new) == shapes(case.build(target))
        if source == target:
            for a, b in zip(outputs(new, inputs), outputs(model, inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert [t.shape for t in outputs(new, inputs)] == [
                t.shape for t in outputs(case.build(target), inputs)
            ]
