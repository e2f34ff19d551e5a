"""Weights that are mixed, stacked or contracted with several activations at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}
# How a weight an expert is applied under a gate: mixed first, or the outputs are.
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "einsum": lambda g, w, h: torch.einsum("boi,bi->bo", torch.einsum("be,eoi->boi", g, w), h),
    "tensordot": lambda g, w, h: torch.bmm(torch.tensordot(g, w, 1), h[:, :, None])[:, :, 0],
    "sum": lambda g, w, h: ((g[:, :, None, None] * w).sum(1) @ h[:, :, None])[:, :, 0],
    "three operands": lambda g, w, h: torch.einsum("be,eoi,bi->bo", g, w, h),
    "outputs": lambda g, w, h: torch.einsum("be,beo->bo", g, torch.einsum("bi,eoi->beo", h, w)),
    "convolution": lambda g, w, h: F.conv1d(
        h.reshape(1, -1, 1), torch.einsum("be,eoi->boi", g, w).flatten(0, 1)[..., None], groups=len(h)
    ).view(len(h), -1),
}


class Mixture(nn.Module):
    """Experts, a weight an expert in one tensor."""

    def __init__(self, form: str, gate: str, width: int = 32, experts: int = 3):
        super().__init__()
        self.form, self.gate = FORMS[form], GATES[gate]
        self.stem, self.route = nn.Linear(7, width), nn.Linear(width, experts)
        self.weight = nn.Parameter(torch.randn(experts, 2 * width, width) / width**0.5)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        return self.head(F.relu(self.form(self.gate(self.route(h)), self.weight, h)))


@pytest.mark.sample
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_experts_is_fixed_or_marked(form: str, gate: str) -> None:
    analysis = mupass.analyze(Mixture(form, gate), torch.zeros(4, 7))
    for name in ("weight", "route.weight", "route.bias"):
        assert not analysis[name].infinite[0] or analysis[name].ambiguous[0]
        assert gate != "softmax" or not analysis[name].infinite[0]
    weight = analysis["weight"]
    assert (weight.role, weight.infinite[1:]) == ("hidden", (True, True))
    if form not in ("three operands", "outputs", "sum"):  # there the gate meets the weight as its input
        assert not weight.infinite[0]
        assert (weight.fan_in_axes, weight.fan_out_axes) == ((2,), (1,))


class Heads(nn.Module):
    """Attention that ends with values and output projection in one product, or in two."""

    def __init__(self, equations: tuple[str, ...], groups: int = 2, heads: int = 2, size: int = 8):
        super().__init__()
        d, self.equations = groups * heads * size, equations
        self.stem, self.head = nn.Linear(5, d), nn.Linear(d, 3)
        self.q = nn.Parameter(torch.randn(groups, heads, d, size))
        self.k, self.v = (nn.Parameter(torch.randn(groups, d, size)) for _ in range(2))
        self.o = nn.Parameter(torch.randn(groups, heads, size, d))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q = torch.einsum("bnd,gpde->bgpne", x, self.q)
        k, v = (torch.einsum("bnd,gde->bgne", x, w) for w in (self.k, self.v))
        a = torch.einsum("bgpie,bgje->bgpij", q, k).softmax(-1)
        tensors = {"a": a, "v": v, "o": self.o}
        for equation in self.equations:
            names, terms = zip(*(part.split(":") for part in equation.split("->")[0].split(",")), strict=True)
            out = equation.split("->")[1]
            y = torch.einsum(f"{','.join(terms)}->{out}", *[tensors[n] for n in names])
            tensors["y"] = y
        return self.head((x + y).mean(1))


THREE = (
    "a:bgpij,v:bgje,o:gped->bid",
    "o:gped,a:bgpij,v:bgje->bid",
    "v:bgje,o:gped,a:bgpij->bid",
)


@pytest.mark.parametrize("equation", THREE)
def test_a_product_of_three_is_read_as_two_products(equation: str) -> None:
    x = torch.zeros(2, 6, 5)
    two = mupass.analyze(Heads(("a:bgpij,v:bgje->bgpie", "y:bgpie,o:gped->bid")), x)
    for found, right in zip(mupass.analyze(Heads((equation,)), x).geometries, two.geometries, strict=True):
        assert found.infinite == right.infinite
        assert (found.role, found.fan_in_axes, found.fan_out_axes) == (
            right.role,
            right.fan_in_axes,
            right.fan_out_axes,
        )


class Stacked(nn.Module):
    """Query, key and value weights in one tensor ``(3, d, d)``, flattened for one product."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, ...]], width: int = 32):
        super().__init__()
        self.cut = cut
        self.stem, self.out, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.qkv = nn.Parameter(torch.randn(3, width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(3, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.linear(x, self.qkv.flatten(end_dim=1), self.bias.flatten())
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.cut(y))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.out(y))


@pytest.mark.parametrize("name", ["chunk", "split", "view"])
def test_a_flattened_stack_has_as_many_matrices_as_before(name: str) -> None:
    cut = {
        "chunk": lambda y: y.chunk(3, -1),
        "split": lambda y: y.split(y.shape[-1] // 3, -1),
        "view": lambda y: y.unflatten(-1, (3, -1)).unbind(-2),
    }[name]
    analysis = mupass.analyze(Stacked(cut), torch.zeros(2, 6, 5), base=16)
    weight, bias = analysis["qkv"], analysis["bias"]
    assert (weight.infinite, weight.role, weight.base_shape) == ((False, True, True), "hidden", (3, 16, 16))
    assert (bias.infinite, bias.base_shape) == ((False, True), (3, 16))
    assert [f.sizes for f in weight.fusions] == [(1, 1, 1)]


class Texts(nn.Module):
    """TextCNN: kernels over some words and the whole of their embedding."""

    def __init__(self, width: int = 24, words: tuple[int, ...] = (2, 3)):
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, width), nn.Linear(2 * width * len(words), 4)
        self.convs = nn.ModuleList(nn.Conv2d(1, 2 * width, (n, width)) for n in words)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids).unsqueeze(1)
        return self.head(torch.cat([F.relu(c(x)).squeeze(3).amax(2) for c in self.convs], 1))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("width", [16, 24, 64])
def test_a_kernel_over_all_of_an_embedding_grows_with_it(width: int) -> None:
    ids = torch.zeros(2, 12, dtype=torch.long)
    analysis = mupass.analyze(Texts(width), ids, base=8)
    narrow = {n: tuple(p.shape) for n, p in Texts(8).named_parameters()}
    assert {g.name: tuple(g.base_shape) for g in analysis.geometries} == narrow
    assert analysis["convs.0.weight"].role == "hidden"
    # No nonlinearity parts the table from the kernel: whether its width grows one model cannot tell.
    with pytest.warns(mupass.MupassWarning, match="sizes that one model cannot settle"):
        wide = mupass.resize(Texts(width), scale=2, example_inputs=ids)
    assert {n: p.shape for n, p in wide.named_parameters()} == {
        n: p.shape for n, p in Texts(2 * width).named_parameters()
    }


def test_a_kernel_over_all_of_an_image_is_fixed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 6), nn.Flatten(), nn.Linear(64, 5)
    )
    analysis = mupass.analyze(model, torch.zeros(2, 3, 8, 8))
    assert analysis["2.weight"].infinite == (True, True, False, False)
    assert not any(analysis["2.weight"].ambiguous)
