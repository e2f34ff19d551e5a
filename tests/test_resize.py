"""Resizing from one model gives the architecture that its author would have built at that width."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks import resize_meta
from mupass import ResizeError, resize
from mupass._cli import main
from mupass._resize.structure import _formulas, _table, recompute


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def test_normal_weights_are_drawn_anew_and_not_picked_from_the_old_ones() -> None:
    model = mlp(32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    grown = resize(model, 64, example_inputs=torch.randn(3, 20))
    for parameter in grown.parameters():
        assert len(parameter.unique()) > 0.98 * parameter.numel()


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


class Attention(nn.Module):
    """Self-attention with a fused projection, sinusoids as a buffer, and a padding row."""

    def __init__(self, d: int = 32, heads: int = 2):
        super().__init__()
        self.heads, self.scale = heads, d**0.5
        self.embed = nn.Embedding(50, d, padding_idx=0)
        angle = torch.arange(16)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        self.register_buffer("table", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale + self.table[: ids.shape[1]]
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x + y.transpose(1, 2).reshape(b, n, d))


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7], [8, 9, 10, 11]])


def test_numbers_tables_and_padding_follow_the_width() -> None:
    new, truth = resize(Attention(), 64, example_inputs=IDS, seed=0), Attention(64, 4)
    assert (new.heads, new.scale) == (4, 8.0)
    torch.testing.assert_close(new.table, truth.table)
    assert torch.equal(new.embed.weight[0], torch.zeros(64)) and new.embed.weight[1:].std() > 0.9
    new.load_state_dict(truth.state_dict())
    torch.testing.assert_close(new(IDS), truth(IDS))


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (8, 8), (2, 32)])
def test_width_and_heads_together_give_the_head_dim(heads: int, head_dim: int) -> None:
    new = resize(Attention(), {"d_model": 64, "heads": heads}, example_inputs=IDS, seed=0)
    assert new.heads == heads and new.qkv.weight.shape == (192, 64)
    truth = Attention(64, heads)
    new.load_state_dict(truth.state_dict())
    torch.testing.assert_close(new(IDS), truth(IDS))


def test_indivisible_heads_are_named() -> None:
    with pytest.raises(ResizeError, match="64 is not divisible by 3, so there is no whole head_dim"):
        resize(Attention(), {"d_model": 64, "heads": 3}, example_inputs=IDS)


def test_a_size_that_only_code_knows_is_refused_and_the_model_is_untouched() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)).view(-1, 12))

    model = Fixed()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ResizeError, match="its code holds a size that no attribute tells"):
        resize(model, 24, init="fan_in")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (model.up.out_features, model.down.in_features) == (12, 12)


def test_a_pattern_without_a_formula_is_refused() -> None:
    model = mlp(32)
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(0, 3, 32).sin())
    with pytest.raises(ResizeError, match="0.bias grows with width and holds a pattern"):
        resize(model, 64)


def test_a_group_norm_with_a_group_a_channel_keeps_it_so() -> None:
    def build(c: int) -> nn.Module:
        norms = nn.GroupNorm(c, c), nn.GroupNorm(4, c)
        return nn.Sequential(
            nn.Conv1d(2, c, 3), norms[0], nn.ReLU(), nn.Conv1d(c, c, 3), norms[1], nn.Conv1d(c, 3, 1)
        )

    x = torch.randn(2, 2, 9)
    new, truth = resize(build(8), 16, example_inputs=x), build(16)
    assert (new[1].num_groups, new[4].num_groups) == (16, 4)
    new.load_state_dict(truth.state_dict())
    torch.testing.assert_close(new(x), truth(x))


def test_a_number_of_groups_that_other_norms_have_for_more_channels_stays() -> None:
    layers = (
        nn.Conv1d(2, 8, 3),
        nn.GroupNorm(8, 8),
        nn.Conv1d(8, 16, 3),
        nn.GroupNorm(8, 16),
        nn.Conv1d(16, 3, 1),
    )
    new = resize(nn.Sequential(*layers), 32, example_inputs=torch.randn(2, 2, 9))
    assert (new[1].num_groups, new[3].num_groups) == (8, 8)


class Standardized(nn.Conv1d):
    """A convolution with a gain divided by the root of its fan_in, held as one number."""

    def __init__(self, n_in: int, n_out: int, gain: float = 1.7):
        super().__init__(n_in, n_out, 3, padding=1)
        self.scale = gain * self.weight[0].numel() ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight - self.weight.mean((1, 2), keepdim=True)) * self.scale
        return nn.functional.conv1d(x, weight, self.bias, padding=1)


def standardized(d: int, *gains: float) -> nn.Module:
    sizes = pairwise((4, d, 2 * d))
    return nn.Sequential(
        *(Standardized(a, b, g) for (a, b), g in zip(sizes, gains, strict=True)), nn.Conv1d(2 * d, 3, 1)
    )


def test_a_gain_over_the_root_of_fan_in_follows_it_where_the_class_tells_and_is_named_where_not() -> None:
    x = torch.randn(2, 4, 9)
    new, truth = resize(standardized(16, 1.7, 1.7), 64, example_inputs=x), standardized(32, 1.7, 1.7)
    assert [new[i].scale for i in (0, 1)] == pytest.approx([truth[i].scale for i in (0, 1)])
    new.load_state_dict(truth.state_dict())
    torch.testing.assert_close(new(x), truth(x))
    with pytest.warns(UserWarning, match=r"Standardized.scale = 0.28\d* of 1 keeps its value"):
        resize(standardized(16, 1.7, 2.0), 64, example_inputs=x)


@pytest.mark.parametrize(
    ("fill", "mean", "std"),
    [
        (lambda w: w.fill_(0.5), 0.5, 0.0),
        (lambda w: nn.init.uniform_(w, 0, 1), 0.5, 12**-0.5),
        (lambda w: w.exponential_(), 1.0, 1.0),
        (lambda w: nn.init.normal_(w, std=0.02), 0.0, 0.02),
    ],
)
def test_distributions_are_kept(fill, mean: float, std: float) -> None:
    model = nn.Sequential(nn.Embedding(200, 32), nn.Linear(32, 4))
    with torch.no_grad():
        fill(model[0].weight)
    new = resize(model, 128, example_inputs=torch.zeros(2, 3, dtype=torch.long), init="constant", seed=0)[
        0
    ].weight
    assert new.mean().item() == pytest.approx(mean, abs=0.03)
    assert new.std(correction=0).item() == pytest.approx(std, rel=0.05)
    assert new.min() >= 0 or mean == 0


def test_orthogonal_weights_stay_orthogonal() -> None:
    model = mlp(32)
    nn.init.orthogonal_(model[2].weight, 1.5)
    weight = resize(model, 64, seed=0)[2].weight
    torch.testing.assert_close(weight @ weight.T, 2.25 * torch.eye(64), rtol=1e-4, atol=1e-4)


def test_a_readout_bias_shrinks_with_its_fan_in() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 500))
    bias = resize(model, 256, seed=0)[2].bias
    assert bias.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.1)
    nn.init.zeros_(model[2].weight)  # it has no law, and its fan_in is still the bias'
    bias = resize(model, 256, seed=0, init={"0.*": "fan_in"})[2].bias
    assert bias.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.1)


def test_the_command_line_prints_and_saves(tmp_path, capsys) -> None:
    path = tmp_path / "small.pt"
    target = "tests.test_report:small"
    assert main(["resize", target, "--input", "2x6", "--width", "24", "--output", str(path)]) == 0
    assert "parameters" in capsys.readouterr().out
    assert 24 in torch.load(path)["0.weight"].shape
    assert main(["resize", target, "--input", "2x6", "--width", "wide"]) == 2
    assert "is not a number" in capsys.readouterr().err


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle:mupass.MupassWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_resized_hugging_face_model_is_saved_and_loaded(family: str, tmp_path) -> None:
    hf = pytest.importorskip("transformers")
    common = {"vocab_size": 40, "use_cache": False}
    torch.manual_seed(0)
    if family == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, **common))
    elif family == "llama":
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, **common,
            )
        )  # fmt: skip
    else:
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, **common)
        )
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    wide = resize(model, 64, example_inputs=inputs, seed=0).eval()
    wide.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert shapes(again) == shapes(wide)
    fresh = type(model)(again.config).eval()  # the saved configuration alone builds it
    fresh.load_state_dict(wide.state_dict())
    with torch.no_grad():
        expected = wide(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, expected)
        torch.testing.assert_close(fresh(**inputs).logits, expected)


@pytest.mark.zoo
def test_the_benchmark_of_a_giant_runs(capsys, monkeypatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["resize_meta", "--layers", "1"])
    resize_meta.main()
    assert "| 1 | 1,379,950,592 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_whose_constructor_sets_hooks_is_built_anew() -> None:
    transformers = pytest.importorskip("transformers")

    class Hooked(transformers.BertPreTrainedModel):
        """A layer of 40 units is a number of the code."""

        def __init__(self, config) -> None:
            super().__init__(config)
            self.enter, self.fixed = nn.Linear(5, config.hidden_size), nn.Linear(config.hidden_size, 40)
            self.head, self.seen = nn.Linear(40, 3), []
            self.fixed.register_forward_hook(self.keep)
            self.post_init()

        def keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
            self.seen = [output]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fixed(self.enter(x).relu()).relu())

    model = Hooked(transformers.BertConfig(hidden_size=32, num_attention_heads=4))
    x = torch.randn(4, 5)
    # The code says so: the size stays, and is marked. What the caller wants the constructor cannot make.
    with pytest.warns(mupass.MupassWarning, match=r"numbers of the code stay .*: fixed.weight:0 \(40\)"):
        resized = mupass.resize(model, scale=2, example_inputs=x)
    assert resized.fixed.weight.shape == (40, 64)
    with pytest.raises(ResizeError, match=r"fixed.weight has shape \(40, 64\)"):
        mupass.resize(model, scale=2, example_inputs=x, dims={r"fixed\.weight:0": "infinite"})
    resized = mupass.resize(model, scale=2, example_inputs=x, dims={r"fixed\.weight:0": "finite"})
    assert resized.fixed.weight.shape == (40, 64) and resized.config.hidden_size == 64
    # A hook of the user is kept, so that such a model is copied.
    model.enter.register_forward_hook(lambda *_: None)
    resized = mupass.resize(model, scale=2, example_inputs=x, dims={r"fixed\.weight:0": "finite"})
    assert resized.enter._forward_hooks


@pytest.mark.parametrize("seed", [4, 5])
def test_flat_draws_of_an_unusual_sample_are_drawn_flat_again(seed: int) -> None:
    """Their sample is off in mean and deviation, and has entries beyond the bound that these would give."""
    torch.manual_seed(seed)
    x = torch.randn(2, 10)
    torch.manual_seed(seed)
    layers = nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    resized = mupass.resize(nn.Sequential(*layers), scale=2, example_inputs=x, seed=seed)
    weight = resized[2].weight
    assert weight.abs().max() <= 128**-0.5 * (1 + 1e-6)
    assert len(weight.unique()) > 0.99 * weight.numel()  # and not picked from the old ones
    mupass.transform(resized, x, base=32)  # which would warn of what looks trained


class RandomGates(nn.Module):
    """Units that keep random shares, drawn once by the constructor."""

    def __init__(self, d: int, power: int = 1) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, d), nn.Linear(d, 3)
        self.register_buffer("share", torch.rand(d) ** power)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu() * self.share)


def test_buffers_of_torch_rand_are_drawn_by_it_again() -> None:
    share = mupass.resize(RandomGates(64), 4096, example_inputs=torch.randn(4, 5), seed=0).share.double()
    assert share.shape == (4096,) and 0 <= share.min() and share.max() < 1
    # Moments of a flat law between 0 and 1, within four errors of a sample of 4,096.
    assert abs(share.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / 4096)
    assert abs(share.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / 4096)
    with pytest.raises(mupass.ResizeError, match=r"buffer share grows .* unknown law"):
        mupass.resize(RandomGates(512, 3), 1024, example_inputs=torch.randn(4, 5))


def test_tables_of_sinusoids_are_recomputed_and_drawn_matrices_not_tried() -> None:
    old, new = (7, 12), (9, 20)
    for kind in ("sin cos", "cos sin", "sin|cos", "cos|sin", "cos cos", "sin sin", "cos|cos", "sin|sin"):
        for less in (0, 1):
            table = _table(10000.0, less, kind)
            torch.testing.assert_close(recompute(table(old), new), table(new), rtol=0, atol=0)
    # Every table that is tried costs as much as the matrix is large.
    assert len(list(_formulas(torch.randn(old)))) == 1


class Queues(nn.Module):
    """Experts that take no more than ``size`` tokens of a sequence; those that nobody chose are passed by."""

    def __init__(self, width: int, size: int, loop: bool) -> None:
        super().__init__()
        self.size, self.loop = size, loop
        self.embed, self.gate = nn.Linear(6, width), nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        chosen = F.one_hot(self.gate(hidden).argmax(-1), 4)
        chosen = chosen * (chosen.cumsum(-2) <= self.size)
        out = torch.zeros_like(hidden)
        if self.loop:
            for expert in chosen.sum((0, 1)).nonzero():
                places = torch.where(chosen[..., int(expert)] > 0)
                out = out.index_put(places, self.experts[int(expert)](hidden[places]))
        else:
            for number, expert in enumerate(self.experts):
                out = out + expert(hidden) * chosen[..., number, None]
        return self.head(hidden + out)


def test_a_limit_of_tokens_as_large_as_the_width_stays() -> None:
    x = torch.randn(2, 5, 6)
    copy, native = resize(Queues(8, 8, loop=False), 16, example_inputs=x), Queues(16, 8, loop=False)
    assert copy.size == 8
    native.load_state_dict(copy.state_dict())
    assert torch.equal(copy(x), native(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.export cannot capture")
@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle")  # of an expert that nobody chose
@pytest.mark.parametrize("seed", range(4))
def test_experts_that_values_choose_are_resized(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 6)
    for width, new in ((32, 16), (16, 32)):
        # As many experts are hit as values say, which the copy draws anew.
        copy, native = resize(Queues(width, width, True), new, example_inputs=x), Queues(new, width, True)
        assert copy.size == width
        native.load_state_dict(copy.state_dict())
        assert torch.equal(copy(x), native(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle")
def test_a_deviation_that_a_configuration_computes_from_the_width_follows_it() -> None:
    hf = pytest.importorskip("transformers")

    def llama(width: int) -> nn.Module:
        sizes = dict(hidden_size=width, intermediate_size=3 * width, num_attention_heads=width // 16)
        deviation = (2 / (5 * width)) ** 0.5
        config = hf.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96, initializer_range=deviation)
        return hf.LlamaForCausalLM(config)

    copy = resize(llama(64), 128, example_inputs={"input_ids": torch.randint(96, (2, 8)), "use_cache": False})
    for name, parameter in llama(128).named_parameters():
        if parameter.dim() > 1:
            assert copy.get_parameter(name).std().item() == pytest.approx(parameter.std().item(), rel=0.1), (
                name
            )
