"""Doubts: what speaks against a default is marked, with the override; ordinary models have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass


def doubted(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Return ``parameter:axis`` -> evidence, of all axes that are marked."""
    return marked_of(mupass.analyze(model, inputs))


def marked_of(analysis: mupass.Analysis) -> dict[str, str]:
    """The same of an analysis."""
    return {
        f"{g.name}:{axis}": g.evidence[axis]
        for g in analysis.geometries
        for axis, marked in enumerate(g.ambiguous)
        if marked
    }


class Block(nn.Module):
    """Pre-norm attention with a fused projection, and a feed-forward layer."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, d), nn.Embedding(9, d)
        self.blocks, self.norm = nn.Sequential(Block(d, 4), Block(d, 4)), nn.LayerNorm(d)
        self.head = nn.Linear(d, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, d, 4, 4), nn.Parameter(torch.zeros(1, 1, d))
        self.positions = nn.Parameter(torch.zeros(1, 17, d))
        self.blocks, self.norm, self.head = (
            nn.Sequential(Block(d, 4), Block(d, 4)),
            nn.LayerNorm(d),
            nn.Linear(d, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def conv(n_in: int, n_out: int, stride: int = 1, act: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)]
    return [*layers, nn.ReLU()] if act else layers


class Residual(nn.Module):
    """A bottleneck: 1/4 of the width inside."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        inner = n_out // 4
        self.body = nn.Sequential(
            *conv(n_in, inner), *conv(inner, inner, stride), *conv(inner, n_out, act=False)
        )
        self.short = nn.Sequential(*conv(n_in, n_out, stride, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet() -> nn.Module:
    blocks = [Residual(16, 64, 1), Residual(64, 128, 2)]
    return nn.Sequential(*conv(3, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    head = [nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)]
    body = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, *head)


def vgg() -> nn.Module:
    body = [
        *conv(3, 16),
        *conv(16, 32, 2),
        *conv(32, 64, 2),
        *conv(64, 64),
        *conv(64, 128, 2),
        *conv(128, 128),
    ]
    head = [nn.Linear(128 * 4 * 4, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*body, nn.Flatten(), *head)


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )


ORDINARY: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, randn(2, 784)),
    "cnn": (cnn, randn(2, 3, 32, 32)),
    "vgg": (vgg, randn(2, 3, 32, 32)),
    "resnet": (resnet, randn(2, 3, 16, 16)),
    "vit": (ViT, randn(2, 3, 16, 16)),
    "gpt": (GPT, randint(50, 2, 9)),
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_raise_no_doubts(name: str) -> None:
    build, x = ORDINARY[name]
    assert doubted(build(), x) == {}


class Adapted(nn.Module):
    """A layer with an update through a narrow middle, straight or behind an activation."""

    def __init__(self, d: int, rank: int, bent: bool = False) -> None:
        super().__init__()
        self.enter, self.base, self.head = nn.Linear(5, d), nn.Linear(d, 2 * d), nn.Linear(2 * d, 3)
        self.down, self.up, self.bent = nn.Linear(d, rank), nn.Linear(rank, 2 * d), bent

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        y = self.down(x)
        return self.head((self.base(x) + self.up(y.relu() if self.bent else y)).relu())


def test_a_rank_is_marked_and_the_override_settles_it() -> None:
    found = doubted(Adapted(32, 4), randn(2, 5))
    assert set(found) == {"down.weight:0", "down.bias:0", "up.weight:1"}
    assert "beside one that joins the same widths" in found["up.weight:1"]
    analysis = mupass.analyze(Adapted(32, 4), randn(2, 5))
    (question,) = analysis.report().questions()
    assert (question.axis, question.size, question.count, question.infinite) == ("down.weight:0", 4, 3, False)
    assert question.override == "{'down\\\\.weight:0': 'infinite'}"
    assert question.override in str(analysis.report()) and "down.weight" in analysis.report().html()
    settled = mupass.analyze(Adapted(32, 4), randn(2, 5), dims={r"down\.weight:0": "infinite"})
    assert settled["up.weight"].infinite == (True, True) and not settled.report().questions()


def test_behind_an_activation_only_a_much_narrower_width_is_marked() -> None:
    assert doubted(Adapted(32, 8, bent=True), randn(2, 5)) == {}
    found = doubted(Adapted(32, 4, bent=True), randn(2, 5))
    assert set(found) == {"down.weight:0", "down.bias:0", "up.weight:1"}
    assert "far narrower" in found["up.weight:1"]


class VAE(nn.Module):
    """Its latent is sampled inside, so that no input shows its size."""

    def __init__(self, d: int = 32, latent: int = 6) -> None:
        super().__init__()
        self.encode, self.mean, self.log_var = nn.Linear(20, d), nn.Linear(d, latent), nn.Linear(d, latent)
        self.decode, self.out = nn.Linear(latent, d), nn.Linear(d, 20)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x).tanh()
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.out(self.decode(z).tanh())


def test_a_latent_is_marked() -> None:
    found = doubted(VAE(), randn(3, 20))
    assert set(found) == {
        *("mean.weight:0", "mean.bias:0", "log_var.weight:0", "log_var.bias:0", "decode.weight:1")
    }


class Codebook(nn.Module):
    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.enter, self.table, self.head = nn.Linear(5, d), nn.Embedding(11, d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.enter(F.pad(x, (0, 0))).relu() if x.shape[-1] == 5 else x
        nearest = torch.cdist(z, self.table.weight).argmin(-1)
        code = self.table(nearest)
        return self.head(z + (code - z).detach()), F.mse_loss(code, z.detach())


def test_a_loss_between_activations_does_not_make_them_data() -> None:
    analysis = mupass.analyze(Codebook(), randn(3, 5))
    assert analysis["table.weight"].infinite == (False, True)


def test_features_by_lookup_that_only_wider_layers_read_are_marked() -> None:
    class Click(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(30, 4), nn.Embedding(40, 4)
            self.up, self.head = nn.Linear(8, d), nn.Linear(d, 1)

        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return self.head(self.up(torch.cat([self.users(user), self.items(item)], -1)).relu())

    found = doubted(Click(32), randint(30, 5), randint(40, 5))
    assert set(found) == {"users.weight:1", "items.weight:1", "up.weight:1"}


def test_a_widening_last_layer_and_a_wide_side_network_are_marked() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side = nn.Sequential(*conv(3, 16), *conv(16, 16)), nn.Linear(2, 512)
            self.gain, self.last, self.head = nn.Linear(512, 16), nn.Conv2d(16, 128, 1), nn.Linear(128, 10)

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            y = self.body(x) * self.gain(self.side(at).relu())[:, :, None, None]
            return self.head(self.last(y).relu().mean((2, 3)))

    found = doubted(Wide(), randn(2, 3, 8, 8), randn(2, 2))
    assert "only readouts see it and the width before it has 16" in found["last.weight:0"]
    assert "far wider than what is made of it" in found["side.weight:0"]
    assert set(found) == {
        *("last.weight:0", "last.bias:0", "head.weight:1", "side.weight:0", "side.bias:0", "gain.weight:1")
    }


def test_one_size_at_places_of_different_width_is_marked() -> None:
    class Stage(nn.Module):
        def __init__(self, d: int, out: int, inner: int) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(d, inner), nn.Linear(inner, out)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).relu())

    def net(first: int, second: int) -> nn.Module:
        stages = [Stage(first, second, 40), nn.ReLU(), Stage(second, 2 * second, 40), nn.ReLU()]
        return nn.Sequential(nn.Linear(5, first), nn.ReLU(), *stages, nn.Linear(2 * second, 3))

    found = doubted(net(32, 64), randn(2, 5))
    assert {name for name in found if "40 at several places" in found[name]} == {
        *(
            "2.down.weight:0",
            "2.down.bias:0",
            "2.up.weight:1",
            "4.down.weight:0",
            "4.down.bias:0",
            "4.up.weight:1",
        )
    }


def test_what_no_weight_reads_and_what_looks_like_hidden_state_are_marked() -> None:
    class Towers(nn.Module):
        def __init__(self, d: int = 16) -> None:
            super().__init__()
            self.a, self.b, self.left, self.right = (
                nn.Linear(5, d),
                nn.Linear(6, d),
                nn.Linear(d, 12),
                nn.Linear(d, 12),
            )
            self.out = nn.Linear(d, d)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = self.a(x).relu(), self.b(y).relu()
            return self.left(x) @ self.right(y).t(), self.out(x)

    found = doubted(Towers(), randn(2, 5), randn(2, 6))
    assert set(found) == {
        *("left.weight:0", "left.bias:0", "right.weight:0", "right.bias:0", "out.weight:0", "out.bias:0")
    }
    assert "no weight reads it again" in found["left.weight:0"]
    assert "is fixed: policy: fixed like data, though as many" in found["out.weight:0"]


def test_memory_slots_and_units_between_positions_are_marked() -> None:
    class Slots(nn.Module):
        def __init__(self, d: int = 16) -> None:
            super().__init__()
            self.enter, self.keys, self.values = nn.Linear(5, d), nn.Linear(d, 11), nn.Linear(11, d)
            self.mix, self.mixed, self.head = nn.Linear(7, 9), nn.Linear(9, 7), nn.Linear(d, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            x = x + self.values(self.keys(x).softmax(-1))
            return self.head(x + self.mixed(self.mix(x.transpose(1, 2)).relu()).transpose(1, 2))

    found = doubted(Slots(), randn(2, 7, 5))
    assert "its entries compete in a softmax" in found["keys.weight:0"]
    assert "it only mixes positions of data" in found["mix.weight:0"]


@pytest.mark.parametrize("groups", [2, 4])
def test_channels_of_a_group_are_marked_and_either_reading_can_be_stated(groups: int) -> None:
    net = nn.Sequential(
        *(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=groups),
            nn.ReLU(),
            nn.Conv2d(16, 5, 1),
        ),
    )
    x = randn(2, 3, 8, 8)
    assert set(doubted(net, x)) == {"2.weight:1"}
    assert mupass.analyze(net, x)["2.weight"].infinite == (True, True, False, False)
    regnet = mupass.analyze(net, x, dims={r"2\.weight:1": "finite"})
    assert regnet["2.weight"].infinite == (True, False, False, False)
    assert not regnet["2.weight"].ambiguous[1]


class Convolved(nn.Module):
    """Kernels of a few heads that a layer makes for each position, as fairseq writes them, or parameters."""

    def __init__(self, form: str, d: int, heads: int = 4, size: int = 3) -> None:
        super().__init__()
        self.form, self.heads, self.size = form, heads, size
        self.table, self.gate, self.out = nn.Embedding(20, d), nn.Linear(d, 2 * d), nn.Linear(d, 20)
        if form.startswith("dynamic"):
            self.kernel = nn.Linear(d, heads * size, bias=False)
        else:
            self.weight = nn.Parameter(torch.randn(heads, 1, size))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.glu(self.gate(self.table(ids)))
        b, n, d = x.shape
        if self.form == "light conv1d":
            x = F.pad(x.transpose(1, 2), (self.size - 1, 0)).reshape(-1, self.heads, n + self.size - 1)
            y = F.conv1d(x, self.weight.softmax(-1), groups=self.heads)
            return self.out(y.view(b, d, n).transpose(1, 2))
        count = b * n * self.heads
        if self.form == "light unfold":
            kernel = self.weight.view(1, self.heads, self.size).softmax(-1).expand(b * n, -1, -1)
            kernel = kernel.reshape(count, self.size)
        else:
            kernel = self.kernel(x).view(count, -1).softmax(1)
        windows = F.pad(x, (0, 0, self.size - 1, 0)).unfold(1, self.size, 1)
        windows = windows.reshape(count, d // self.heads, self.size)
        return self.out(torch.bmm(windows, kernel.unsqueeze(2)).view(b, n, d))


@pytest.mark.parametrize("form", ["dynamic", "light conv1d", "light unfold"])
def test_heads_of_light_and_dynamic_convolutions_are_marked(form: str) -> None:
    narrow, wide = Convolved(form, 32), Convolved(form, 64)
    shapes = {name: parameter.shape for name, parameter in wide.named_parameters()}
    found = doubted(narrow, randint(20, 2, 9))
    assert set(found) == {"kernel.weight:0" if form == "dynamic" else "weight:0"}
    analysis = mupass.analyze(narrow, randint(20, 2, 9), dims=dict.fromkeys(found, "finite"))
    for name, parameter in narrow.named_parameters():
        grown = tuple(size != other for size, other in zip(parameter.shape, shapes[name], strict=True))
        assert analysis[name].infinite == grown, name


class Patches(nn.Module):
    """Windows of three tokens, whose features lie end to end."""

    def __init__(self, d: int, unfolded: bool) -> None:
        super().__init__()
        self.d, self.unfolded, self.table = d, unfolded, nn.Embedding(20, d)
        self.conv = nn.Linear(3 * d, d) if unfolded else nn.Conv1d(1, d, kernel_size=3 * d, stride=d)
        self.head = nn.Linear(d, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).flatten(1)
        if self.unfolded:
            return self.head(self.conv(x.unfold(1, 3 * self.d, self.d)).relu().mean(1))
        return self.head(self.conv(x[:, None]).relu().mean(-1))


@pytest.mark.parametrize("unfolded", [False, True])
def test_a_kernel_of_whole_steps_as_long_as_a_width_is_marked(unfolded: bool) -> None:
    model, ids, axis = Patches(32, unfolded), randint(20, 2, 9), f"conv.weight:{1 if unfolded else 2}"
    assert "it moves by 32, which is the size of a width" in doubted(model, ids)[axis]
    settled = mupass.analyze(model, ids, dims={axis: "infinite"})
    assert settled["conv.weight"].role == "hidden"


class Picked(nn.Module):
    """A hidden layer of which something is picked or put in another order."""

    def __init__(self, form: str, d: int = 32) -> None:
        super().__init__()
        self.form, self.enter, self.head = form, nn.Linear(6, d), nn.Linear(d, 3)
        self.weight = nn.Parameter(torch.randn(d, d) / d**0.5)
        self.register_buffer("order", torch.randperm(d))

    def forward(self, x: Tensor) -> Tensor:
        h, weight = self.enter(x), self.weight
        if self.form == "winners":
            values, places = h.topk(h.shape[1] // 4, 1)
            h = torch.zeros_like(h).scatter(1, places, values)
        if self.form == "threshold":
            h = h * (h >= h.topk(h.shape[1] // 4, 1).values[:, -1:])
        if self.form == "gathered":
            h = torch.gather(h, 1, self.order.expand(len(h), -1))
        if self.form == "rows":
            weight = weight[self.order]
        if self.form == "columns":
            weight = weight.index_select(1, self.order)
        if self.form == "gathered weight":
            weight = torch.gather(weight, 1, self.order.expand(len(weight), -1))
        return self.head((h @ weight).relu())


@pytest.mark.parametrize("form", ["winners", "threshold", "gathered", "rows", "columns", "gathered weight"])
def test_what_is_picked_of_a_width_is_marked_where_it_is_taken_for_fixed(form: str) -> None:
    analysis, found = mupass.analyze(Picked(form), randn(5, 6)), doubted(Picked(form), randn(5, 6))
    for name, axes in {"enter.weight": (0,), "weight": (0, 1), "head.weight": (1,)}.items():
        for axis in axes:
            assert analysis[name].infinite[axis] or f"{name}:{axis}" in found


def test_tables_of_positions_and_codes_stay_without_a_mark() -> None:
    class Tables(nn.Module):
        def __init__(self, d: int = 32) -> None:
            super().__init__()
            self.table, self.codes, self.head = nn.Embedding(20, d), nn.Embedding(11, d), nn.Linear(d, 20)
            self.positions = nn.Parameter(torch.randn(9, d))
            self.register_buffer("ids", torch.arange(9))

        def forward(self, ids: Tensor) -> Tensor:
            x = torch.relu(self.table(ids) + self.positions[self.ids])
            return self.head(self.codes((x @ self.codes.weight.t()).argmax(-1)))

    assert doubted(Tables(), randint(20, 2, 9)) == {}


class OneHead(nn.Module):
    """One head on channels: queries, keys and values of one weight, or queries of a weight of their own."""

    def __init__(self, d: int, key: int, cut: bool) -> None:
        super().__init__()
        self.sizes = [key, key, d] if cut else [key, d]
        self.query = nn.Conv1d(key, key, 3, padding=1, groups=key) if cut else nn.Conv1d(d, key, 1)
        self.qkv = nn.Conv1d(d, sum(self.sizes), 1)

    def forward(self, x: Tensor) -> Tensor:
        *query, key, value = self.qkv(x).split(self.sizes, 1)
        scores = self.query(query[0] if query else x).mT @ key
        return value @ scores.softmax(-1).mT


class Cascade(nn.Module):
    """Heads one by one, each on a share of the channels and on what the head before gives (EfficientViT)."""

    def __init__(self, d: int, key: int, cut: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead(d // 2, key, cut) for _ in range(2))
        self.leave = nn.Conv1d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        first = self.heads[0](first)
        second = self.heads[1](first + second)
        return x + self.leave(torch.cat([first, second], 1).relu())


def cascades(first: int, second: int, keys: tuple[int, int], cut: bool = True) -> nn.Module:
    """Two stages of cascaded heads, of two widths."""
    enter, between = nn.Conv1d(3, first, 1), nn.Conv1d(first, second, 2, 2)
    stages = [Cascade(first, keys[0], cut), between, Cascade(second, keys[1], cut)]
    return nn.Sequential(enter, *stages, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(second, 5))


@pytest.mark.parametrize("key", [6, 16])  # 16 is also the size of values, in the first stage
def test_keys_of_cascaded_heads_are_fixed_behind_a_depthwise_convolution(key: int) -> None:
    analysis = mupass.analyze(cascades(32, 48, (key, key)), (randn(2, 3, 8),), base=24)
    for name, parameter in cascades(16, 24, (key, key)).named_parameters():
        assert analysis[name].base_shape == tuple(parameter.shape), name
    # One model cannot tell for certain.
    found = marked_of(analysis)
    assert {name.split(".", 3)[-1] for name in found} == {"query.weight:0", "query.bias:0"}
    assert all("fixed size of the queries and keys of one head" in reason for reason in found.values())


def test_keys_of_cascaded_heads_in_one_proportion_to_several_widths_grow() -> None:
    analysis = mupass.analyze(cascades(32, 48, (8, 12)), (randn(2, 3, 8),), base=24)
    for name, parameter in cascades(16, 24, (4, 6)).named_parameters():
        assert analysis[name].base_shape == tuple(parameter.shape), name
    assert not marked_of(analysis)


@pytest.mark.parametrize("keys", [(16, 16), (16, 24), (8, 12)])  # heads are made of 16 and of 24
def test_keys_made_with_values_that_a_weight_reads_are_marked_where_one_size_stays(
    keys: tuple[int, int],
) -> None:
    found = doubted(cascades(32, 48, keys, cut=False), randn(2, 3, 8))
    asked = {name.split(".", 3)[-1] for name in found if "only scores contract it" in found[name]}
    marked = {f"{name}:0" for name in ("query.weight", "query.bias", "qkv.weight", "qkv.bias")}
    assert asked == (marked if keys == (16, 16) else set())
    assert bool(found) == bool(asked)
