"""The table of operator traits against the operators themselves, in float64."""

import pytest
import torch

from mupass._dims.operator_traits import TRAITS, Trait, traits

IMAGE = torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([2, 0])
FLOATS = {"dtype": torch.float64}
# Operator -> what it is called with after its first operand; those that are left out take nothing more.
MORE = {
    "to": (torch.float32,),
    "type_as": (ROWS,),
    "view": ([3, 8],),
    "_unsafe_view": ([3, 8],),
    "view_as": (ROWS,),
    "reshape": ([3, 8],),
    "reshape_as": (ROWS,),
    "unflatten": (1, [2, 3]),
    "unsqueeze": (0,),
    "transpose": (0, 1),
    "permute": ([1, 0],),
    "movedim": ([0], [1]),
    "moveaxis": ([0], [1]),
    "swapaxes": (0, 1),
    "swapdims": (0, 1),
    "expand": ([2, 4, 6],),
    "expand_as": (ROWS.expand(2, 4, 6),),
    "slice": (0, 1, 3),
    "select": (0, 1),
    "narrow": (0, 1, 2),
    "index": ([INDEX],),
    "index_select": (0, INDEX),
    "gather": (0, INDEX[None]),
    "take_along_dim": (INDEX[:, None], 0),
    "flip": ([0],),
    "roll": ([1], [0]),
    "repeat": ([2, 1],),
    "broadcast_to": ([2, 4, 6],),
    "split": (3,),
    "split_with_sizes": ([3, 1],),
    "chunk": (2,),
    "tensor_split": (2,),
    "repeat_interleave": (2,),
    "tile": ([2, 1],),
    "dropout": (0.5, False),
    "feature_dropout": (0.5, False),
    "native_dropout": (0.5, False),
    "sum": ([0],),
    "mean": ([0],),
    "cumsum": (0,),
    "amax": ([0],),
    "pixel_shuffle": (2,),
    "pixel_unshuffle": (2,),
    "upsample_nearest2d": ([12, 12],),
    "upsample_bilinear2d": ([12, 12], False),
    "upsample_bicubic2d": ([12, 12], False),
}
POOLED = {f"{kind}_pool{rank}d": ([2] * rank,) for kind in ("max", "avg") for rank in (1, 2, 3)}
POOLED["max_pool2d_with_indices"] = ([2, 2],)
POOLED |= {f"adaptive_avg_pool{rank}d": ([2] * rank,) for rank in (1, 2, 3)}
POOLED["_adaptive_avg_pool2d"] = ([2, 2],)
IMAGES = (
    "pixel_shuffle",
    "pixel_unshuffle",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
)


def named(trait: Trait) -> list[str]:
    return [name for name, has in TRAITS.items() if has & trait]


def operand(name: str) -> torch.Tensor:
    if name in POOLED or name in IMAGES:
        return IMAGE[0] if "1d" in name else IMAGE
    return ROWS


def call(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the operator's result, the first of several."""
    result = getattr(torch.ops.aten, name)(x, *MORE.get(name, POOLED.get(name, ())))
    return result[0] if isinstance(result, (tuple, list)) else result


@pytest.mark.parametrize("name", named(Trait.HOMOGENEOUS))
def test_a_factor_passes(name):
    x = operand(name)
    torch.testing.assert_close(call(name, 4 * x), 4 * call(name, x))


@pytest.mark.parametrize("name", sorted({*named(Trait.COPIES), *named(Trait.DETACHES)} - {"float"}))
def test_a_copy_has_the_values_of_its_operand(name):
    if name == "_assert_tensor_metadata":  # it returns nothing, and stands for what it looks at
        assert torch.ops.aten._assert_tensor_metadata(ROWS) is None
        return
    torch.testing.assert_close(call(name, ROWS).double(), ROWS, rtol=1e-6, atol=1e-6)
    x = ROWS.clone().requires_grad_()
    assert call(name, x).requires_grad == bool(TRAITS[name] & Trait.COPIES)


@pytest.mark.parametrize("name", named(Trait.RESHAPES))
def test_a_reshape_has_the_entries_of_its_operand(name):
    result = call(name, ROWS)
    torch.testing.assert_close(result.unique(), ROWS.unique())
    if TRAITS[name] & Trait.KEEPS_ORDER:
        torch.testing.assert_close(result.flatten(), ROWS.flatten())
    elif name not in {"expand", "expand_as"}:  # these repeat whole matrices, and keep the order of each
        assert not torch.equal(result.flatten(), ROWS.flatten())


@pytest.mark.parametrize("name", [name for name in named(Trait.PICKS) if name != "getitem"])
def test_what_is_picked_is_entries_of_the_operand_in_other_places(name):
    result = call(name, ROWS)
    assert torch.isin(result, ROWS).all()
    assert result.shape != ROWS.shape or not torch.equal(result, ROWS)


@pytest.mark.parametrize("name", named(Trait.SPREADS))
def test_what_is_spread_has_every_entry_twice(name):
    result = call(name, ROWS)
    entries, counts = result.unique(return_counts=True)
    torch.testing.assert_close(entries, ROWS.unique())
    assert (counts == 2).all()


@pytest.mark.parametrize("name", named(Trait.SHAPE_OF_SECOND))
def test_values_of_a_second_operand_whose_shape_is_read_do_not_matter(name):
    operator, second = getattr(torch.ops.aten, name), MORE[name][0]
    assert torch.equal(operator(ROWS, second), operator(ROWS, torch.full_like(second, torch.nan)))


@pytest.mark.parametrize("name", named(Trait.LINEAR_AT_ZERO))
def test_functions_that_are_multiples_of_a_small_argument(name):
    x = ROWS.abs()
    more = (torch.full((1,), 0.5, **FLOATS),) if name == "prelu" else ()
    small, smaller = (getattr(torch.ops.aten, name)(e * x, *more) for e in (1e-6, 1e-7))
    torch.testing.assert_close(small, 10 * smaller, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", named(Trait.MATRIX_PRODUCT | Trait.INNER_PRODUCT))
def test_products_are_linear_in_each_factor(name):
    a, b = ROWS, ROWS.T.contiguous()
    if name == "bmm":
        a, b = a[None], b[None]
    elif name in {"dot", "vdot", "linalg_vecdot"}:
        a, b = ROWS[0], ROWS[1]
    elif name == "inner":
        b = ROWS.flip(0)

    def product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if name == "einsum":
            return torch.ops.aten.einsum("ij,jk->ik", [first, second])
        return getattr(torch.ops.aten, name)(first, second)

    torch.testing.assert_close(product(2 * a, 3 * b), 6 * product(a, b))


@pytest.mark.parametrize("name", named(Trait.AFFINE))
def test_an_affine_product_adds_its_bias(name):
    x, w = ROWS, ROWS[:3].T
    bias = torch.randn(3, generator=torch.Generator().manual_seed(2), **FLOATS)
    want = x @ w + bias
    if name == "linear":
        got = torch.ops.aten.linear(x, w.T, bias)
    elif name == "addmm":
        got = torch.ops.aten.addmm(bias, x, w)
    else:
        got = getattr(torch.ops.aten, name)(bias, x[None], w[None])
    torch.testing.assert_close(got.squeeze(0) if name == "baddbmm" else got, want)


@pytest.mark.parametrize("name", ["add", "sub", "rsub", "mul", "multiply", "div", "divide", "true_divide"])
def test_arithmetic_is_linear_in_one_tensor(name):
    """With the other one at rest: ``f(x + y) - f(y) = f(x) - f(0)``."""
    assert TRAITS[name] & Trait.LINEAR
    operator, other = getattr(torch.ops.aten, name), ROWS.flip(0) + 3
    x, y = ROWS, ROWS.flip(1)
    left = operator(x + y, other) - operator(y, other)
    torch.testing.assert_close(left, operator(x, other) - operator(torch.zeros_like(x), other))
    # Of two tensors that both change, sums stay linear and products do not.
    grown = operator(2 * x, 2 * other) / operator(x, other)
    products = bool(TRAITS[name] & (Trait.MULTIPLIES | Trait.DIVIDES))
    assert torch.allclose(grown, torch.full_like(grown, 2.0)) != products


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "hardtanh", "hardswish", "relu6", "selu"])
def test_functions_that_bend(name):
    assert TRAITS[name] & Trait.BENDS
    more = (0,) if "softmax" in name else ()
    f, x = getattr(torch.ops.aten, name), 4 * ROWS
    assert not torch.allclose(f(x + x.flip(0), *more), f(x, *more) + f(x.flip(0), *more))


def test_names():
    assert traits("aten.add_") == traits("aten.add") == TRAITS["add"]
    assert traits("getitem") == TRAITS["getitem"]
    assert traits("mul") == Trait.NONE  # operator.mul, of sizes
    assert traits("aten.nothing") == traits("other.add") == Trait.NONE
    missing = [name for name in TRAITS if name != "getitem" and not hasattr(torch.ops.aten, name)]
    assert missing in ([], ["float"])
