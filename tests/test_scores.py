"""Attention whose head_dim grows: where the factor on scores goes, what it does to steps, and its way out."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from statistics import linear_regression
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
HEADS, WIDTH, BASE, LR, RHO = 2, 16, 8, 0.1, 1e-2


class Conv1D(nn.Module):
    """A linear layer with an (in, out) weight, as in Hugging Face's GPT-2."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) * fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], -1)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions."""
    positions, half = x.shape[-2], x.shape[-1] // 2
    angles = torch.arange(positions, dtype=x.dtype)[:, None] * torch.ones(x.shape[-1], dtype=x.dtype)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


def turned(x: Tensor) -> Tensor:
    """Rotary positions as products of complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.ones(pairs.shape[-1], dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Attention(nn.Module):
    """Attention, with ``extra`` as a factor on scores that the code itself has.

    Its kinds are how queries are made, and how they are compared with keys.
    """

    def __init__(self, width: int, made: str = "apart", compared: str = "fused", extra: float = 1.0) -> None:
        super().__init__()
        self.made, self.compared, self.extra = made, compared, extra
        if made in ("joint", "heads", "rotary", "complex"):
            self.qkv = nn.Linear(width, 3 * width)
        elif made == "transposed":
            self.qkv = Conv1D(width, 3 * width)
        elif made == "convolved":
            self.qkv = nn.Conv1d(width, 3 * width, 1)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        if made == "normed":
            self.q_norm, self.k_norm = nn.LayerNorm(width // HEADS), nn.LayerNorm(width // HEADS)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> list[Tensor]:
        batch, positions, _ = x.shape
        match self.made:
            case "heads":  # queries, keys and values of one head stand together
                packed = self.qkv(x).view(batch, positions, HEADS, -1).transpose(1, 2)
                return list(packed.chunk(3, -1))
            case "convolved":
                parts = self.qkv(x.mT).mT.chunk(3, -1)
            case "joint" | "rotary" | "complex" | "transposed":
                parts = self.qkv(x).chunk(3, -1)
            case "called":  # the code itself multiplies by the weight
                parts = F.linear(x, self.q.weight), self.k(x), self.v(x)
            case "one":  # queries are keys
                parts = self.q(x), self.q(x), self.v(x)
            case "shared":
                q = self.q(x)
                parts = q, self.k(x), self.v(x) + q
            case "limited":
                parts = self.q(x).clamp(-0.1, 0.1), self.k(x), self.v(x)
            case _:
                parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.view(batch, positions, HEADS, -1).transpose(1, 2) for part in parts)
        if self.made == "rotary":
            q, k = rotated(q), rotated(k)
        if self.made == "complex":
            q, k = turned(q), turned(k)
        if self.made == "normed":
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        size = q.shape[-1]
        match self.compared:
            case "fused":
                y = F.scaled_dot_product_attention(q, k, v, scale=self.extra * size**-0.5)
            case "behind":
                y = (q @ k.mT / math.sqrt(size) * self.extra).softmax(-1) @ v
            case "ahead":
                y = ((q * size**-0.5) @ k.mT * self.extra).softmax(-1) @ v
            case "einsum":
                scores = torch.einsum("bhte,bhse->bhts", q, k) * size**-0.5
                y = torch.einsum("bhts,bhse->bhte", (scores * self.extra).softmax(-1), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """nn.MultiheadAttention, with or without weights of scores."""

    def __init__(self, width: int, needed: bool = False, cross: bool = False, **more: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True, **more)
        self.needed, self.cross = needed, cross

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1) if self.cross else x
        return self.attention(x, other, other, need_weights=self.needed)[0]


class Net(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module], width: int = WIDTH) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.attend, self.last = make(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + self.attend(self.norm(h))
        return self.head(self.last(h).mean(1))


PACKED: dict[str, dict[str, Any]] = {
    "packed": {},
    "weights of scores": {"needed": True},
    "cross": {"cross": True},
    "no bias": {"bias": False},
    "keys of its own": {"add_bias_kv": True},
}


def build(make: Callable[[int], nn.Module], width: int = WIDTH) -> Net:
    torch.manual_seed(0)
    return Net(make, width).double()


def batch(samples: int = 4, positions: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, positions, 6, generator=generator).double()
    return x, torch.randint(3, (samples,), generator=generator)


def make_of(kind: str, extra: float = 1.0) -> Callable[[int], nn.Module]:
    """Return what makes an attention of a kind: a word of `PACKED`, or how it is made and compared."""
    if kind in PACKED:
        return lambda width: Packed(width, **PACKED[kind])
    made, _, compared = kind.partition(", ")
    return lambda width: Attention(width, made, compared or "fused", extra)


@cache
def _transformed(kind: str, width: int) -> Net:
    make = make_of(kind)
    return mupass.transform(build(make, width), batch()[0], base=build(make, BASE))


def transformed(kind: str, width: int = WIDTH) -> Net:
    """Return a model of growing head_dim: the number of heads is that of its base."""
    return copy.deepcopy(_transformed(kind, width))


# How it is made and compared -> the module with the factor, and which of its features have it.
REACHED: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "apart": ("attend.q", ()),
    "apart, behind": ("attend.q", ()),
    "apart, ahead": ("attend.q", ()),
    "apart, einsum": ("attend.q", ()),
    "normed": ("attend.q_norm", ()),
    "joint": ("attend.qkv", ((0, WIDTH),)),
    "joint, behind": ("attend.qkv", ((0, WIDTH),)),
    "rotary": ("attend.qkv", ((0, WIDTH),)),
    "complex": ("attend.qkv", ((0, WIDTH),)),
    "heads": ("attend.qkv", ((0, 8), (24, 32))),
    "transposed": ("attend.qkv", ((0, WIDTH),)),
    "convolved, ahead": ("attend.qkv", ((0, WIDTH),)),
}
# How it is made -> why no module can give the factor.
UNREACHED = {
    "called": "no module puts out|is none on the scores|reads the queries too|other values",
    "one": "reads the queries too|other values",
    "shared": "reads the queries too",
    "limited": "is none on the scores",
}


def like(net: Net, make: Callable[[int], nn.Module]) -> Net:
    """Return an untouched model with the weights that another has now."""
    plain = build(make)
    plain.load_state_dict(net.state_dict())
    return plain


def take_off(net: nn.Module) -> None:
    """Take the factor on scores off a transformed model; its plan stays."""
    for module in net.modules():
        vars(module).pop("forward", None)
        for key, hook in list(module._forward_hooks.items()):
            if "Multiplier" in type(hook).__name__:
                del module._forward_hooks[key]


def told(net: Net) -> list[str]:
    """Return what the plan says of head_dim."""
    return [warning for warning in net.mupass_plan.warnings if "head_dim grows" in warning]


def run_of(net: Net, compiled: bool) -> nn.Module:
    return torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net


@pytest.mark.sample(*(f"{kind}-False" for kind in list(REACHED)[::2]), "convolved, ahead-True")
@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [*((kind, False) for kind in REACHED), ("apart", True), ("heads", True), ("convolved, ahead", True)],
)
def test_scores_are_multiplied_where_a_module_puts_out_queries(kind: str, compiled: bool) -> None:
    """From ``1/sqrt(d)`` to ``sqrt(base)/d``: the model with that written in its code gives the same."""
    net = transformed(kind)
    (scale,) = net.mupass_plan.scores
    assert (scale.module, scale.parts) == REACHED[kind]
    assert scale.factor == pytest.approx(0.5**0.5) and told(net) == []
    written = like(net, make_of(kind, extra=0.5**0.5))
    torch.testing.assert_close(run_of(net, compiled)(batch()[0]), written(batch()[0]))
    name = (scale.rows or ((scale.carrier.parameters[0], 0),))[0][0]
    assert f"{scale.module} puts out is multiplied by 0.707107" in net.mupass_plan.explain(name)


def scaled_scores(net: Net) -> Net:
    """Put the factor into the rows of queries, by hand."""
    attention = net.attend.attention
    with torch.no_grad():
        for parameter in (attention.in_proj_weight, attention.in_proj_bias):
            if parameter is not None:
                parameter[:WIDTH] *= 0.5**0.5
    return net


@pytest.mark.sample(every=2)
@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
@pytest.mark.parametrize(("kind", "compiled"), [*((kind, False) for kind in PACKED), ("packed", True)])
def test_scores_inside_of_multihead_attention_are_multiplied(kind: str, compiled: bool) -> None:
    net = transformed(kind)
    (scale,) = net.mupass_plan.scores
    assert scale.attention and scale.module == "attend.attention" and told(net) == []
    want = scaled_scores(like(net, make_of(kind)))(batch()[0])
    torch.testing.assert_close(run_of(net, compiled)(batch()[0]), want)
    # torch has another kernel for evaluation.
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(batch()[0]), want)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(copied(batch()[0]), want)


def test_masks_of_multihead_attention_are_kept() -> None:
    plain = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.0).double()
    net = nn.ModuleDict({"attend": Packed(WIDTH)})
    net.attend.attention = copy.deepcopy(plain)
    from mupass._taps.attention import ScaledAttention

    net.attend.attention.forward = ScaledAttention(net.attend.attention, 0.5**0.5)
    scaled_scores(nn.ModuleDict({"attend": nn.ModuleDict({"attention": plain})}))
    x = torch.randn(5, 4, WIDTH).double()
    causal, padded = torch.ones(5, 5).triu(1).bool(), torch.zeros(4, 5).bool()
    padded[1, 3:] = True
    for options in (
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"key_padding_mask": padded, "average_attn_weights": False},
    ):
        got, want = net.attend.attention(x, x, x, **options), plain(x, x, x, **options)
        torch.testing.assert_close(got, want)
        got, want = net.attend.attention(*[x[:, 0]] * 3), plain(*[x[:, 0]] * 3)
        torch.testing.assert_close(got, want)


def anew(kind: str, **options: Any) -> Net:
    make = make_of(kind)
    return mupass.transform(build(make), batch()[0], base=build(make, BASE), **options)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("made", UNREACHED)
def test_scores_that_no_module_reaches_are_named_and_left_alone(made: str) -> None:
    with pytest.warns(mupass.MupassWarning, match="head_dim grows, so logits must scale as 1/head_dim"):
        net = anew(made)
    (note,) = told(net)
    assert not net.mupass_plan.scores and "mupass cannot put that there: " in note
    assert any(reason in note for reason in UNREACHED[made].split("|")), note
    torch.testing.assert_close(net(batch()[0]), like(net, make_of(made))(batch()[0]))


@pytest.mark.parametrize("options", [{"parameterization": "ntk"}, {"parameterization": "standard"}], ids=str)
def test_scores_are_left_alone_where_features_are_not_learned(options: dict[str, Any]) -> None:
    with pytest.warns(mupass.MupassWarning, match="head_dim grows"):
        net = anew("apart", **options)
    assert not net.mupass_plan.scores


@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
def test_outputs_of_a_trained_model_are_left_alone() -> None:
    net = anew("apart", trained=True)
    assert not net.mupass_plan.scores
    assert torch.equal(net(batch()[0]), build(Attention)(batch()[0]))


def test_more_heads_of_one_size_have_no_factor() -> None:
    class Wider(Attention):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.heads = width // 4

        def split(self, x: Tensor) -> list[Tensor]:
            return [
                layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
            ]

    net = mupass.transform(build(Wider), batch()[0], base=build(Wider, BASE))
    assert not net.mupass_plan.scores and told(net) == []


PLAIN: dict[str, Any] = {"momentum": 0.0, "step_bound": None, "kl_clip": None, "factor_decay": 0.0}


@pytest.mark.sample("apart-kfac", "joint-ekfac", "packed-kfac", "packed-shampoo", "cross-kfac")
@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        *((kind, "kfac") for kind in ("apart", "joint", "normed", "packed", "cross")),
        *(("joint", "ekfac"), ("packed", "ekfac"), ("joint", "shampoo"), ("packed", "shampoo")),
    ],
)
def test_steps_are_those_of_a_model_that_is_written_so(kind: str, optimizer: str) -> None:
    """Statistics are of the gradient in front of the factor: all rates and damping stay what they are."""
    net = transformed(kind)
    # The same model with the factor in its code has the plan of the first, without it.
    make = make_of(kind, extra=0.5**0.5)
    written = mupass.transform(build(make), batch()[0], base=build(make, BASE))
    take_off(written)
    if kind in PACKED:
        attention = written.attend.attention
        taken = type(attention).forward

        # Fused attention takes the factor as a scale: an independent way to the same scores.
        def forward(*args: Any, **kwargs: Any) -> Any:
            with watching(lambda products, scale: 0.5**0.5 * scale):
                return taken(attention, *args, **kwargs)

        attention.forward = forward
    written.load_state_dict(net.state_dict())
    # Enough samples that the bases of EKFAC are told by data, not by rounding.
    x, y = batch(64, 7)
    torch.testing.assert_close(net(x), written(x))
    for model in (net, written):
        if optimizer == "shampoo":
            steps: Any = mupass.Shampoo(model, LR)
        else:
            steps = mupass.KFAC(model, LR, RHO, ekfac=optimizer == "ekfac", **PLAIN)
        for _ in range(2):
            steps.zero_grad()
            F.cross_entropy(model(x), y).backward()
            steps.step()
    # Rounding chooses bases where eigenvalues are nearly equal.
    tolerance = 1e-2 if optimizer == "ekfac" else 1e-8
    for (name, ours), theirs in zip(net.named_parameters(), written.parameters(), strict=True):
        assert (ours - theirs).norm() < tolerance * ours.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("made", ["apart", "normed", "joint", "heads", "transposed", "convolved", "packed"])
def test_folded_weights_hold_the_factor(made: str) -> None:
    net = transformed(made)
    want = net(batch()[0])
    joint = made not in ("apart", "normed")
    if joint:
        with pytest.warns(mupass.MupassWarning, match="make queries, keys and values"):
            folded = mupass.fold(net, inplace=False)
    else:
        folded = mupass.fold(net, inplace=False)
    assert not folded.mupass_plan.scores
    torch.testing.assert_close(like(folded, make_of(made))(batch()[0]), want)
    torch.testing.assert_close(folded(batch()[0]), want)
    # Folding again changes nothing.
    torch.testing.assert_close(mupass.fold(folded)(batch()[0]), want)
    if not joint:
        assert folded.mupass_plan["attend.out.weight"] == net.mupass_plan["attend.out.weight"]


@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
def test_a_folded_model_trains_on_as_before() -> None:
    """Adam's step does not depend on the size of a gradient: the rate of folded queries follows."""
    net = transformed("apart")
    folded = mupass.fold(net, inplace=False)
    x, y = batch()
    for model in (net, folded):
        steps = torch.optim.Adam(mupass.param_groups(model, 1e-2, optimizer="adam"))
        for _ in range(3):
            steps.zero_grad()
            F.cross_entropy(model(x), y).backward()
            steps.step()
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
def test_tied_queries_have_no_way_into_plain_weights() -> None:
    """Two layers with one joint weight, of which one makes queries: it is not changed for the other."""

    class Twice(Attention):
        def __init__(self, width: int) -> None:
            super().__init__(width, "joint")
            self.other = nn.Linear(width, 3 * width)
            self.other.weight = self.qkv.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.other(x)[..., : x.shape[-1]]

    net = mupass.transform(build(Twice), batch()[0], base=build(Twice, BASE))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(mupass.TransformError, match="no parameters that could hold the factor"):
        mupass.fold(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.mupass_plan.scores


def test_saving_says_that_a_factor_is_live() -> None:
    with pytest.warns(mupass.MupassWarning, match=r"right behind its multipliers only \(the one of attend.q"):
        transformed("apart").state_dict()


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("made", ["apart", "joint", "heads", "packed"])
def test_a_plan_serves_an_instance_of_another_width(made: str) -> None:
    small = mupass.Plan.from_json(transformed(made).mupass_plan.to_json())
    found = mupass.transform(build(make_of(made), 32), plan=small).mupass_plan.scores
    want = transformed(made, 32).mupass_plan.scores
    assert found == want and found[0].factor == pytest.approx(0.5)


def test_a_stage_keeps_the_factors_of_its_modules() -> None:
    net = transformed("apart")
    first, last = copy.deepcopy(net), copy.deepcopy(net)
    first.head, last.attend = nn.Identity(), nn.Identity()
    assert mupass.stage(first).mupass_plan.scores == net.mupass_plan.scores
    assert mupass.stage(last).mupass_plan.scores == ()


@pytest.mark.parametrize(
    "change",
    [
        {"growth": 0.0},
        {"growth": -1.0},
        {"growth": math.nan},
        {"parts": [[4, 2]]},
        {"parts": [[-1, 2]]},
        {"axis": 3},
        {"module": "nowhere"},
    ],
    ids=str,
)
def test_damaged_plans_are_refused(change: dict[str, Any]) -> None:
    import json

    content = json.loads(transformed("apart").mupass_plan.to_json())
    content["scores"][0].update(change)
    fresh = build(Attention)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(mupass.MupassError):
        mupass.transform(fresh, plan=mupass.Plan.from_json(json.dumps(content)))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_multipliers_for_others_name_the_factor() -> None:
    rows = transformed("apart").mupass_plan.multipliers()["scores"]
    assert rows == {r"attend\.q": {"multiplier": pytest.approx(0.5**0.5)}}


@contextmanager
def watching(take: Callable[[Tensor, float], float]) -> Iterator[None]:
    """Show every call of fused attention, those inside of other functions too, and change its scale.

    Args:
        take: Gets the product of queries and keys and its scale; returns the scale to be used.
    """
    real = F.scaled_dot_product_attention

    def watched(
        q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
    ) -> Any:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return real(q, k, v, *args, scale=take(q @ k.mT, scale), **kwargs)

    F.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def scores_of(net: Net, x: Tensor) -> Tensor:
    """Return what the softmax of attention gets."""
    found = []

    def take(products: Tensor, scale: float) -> float:
        found.append(products * scale)
        return scale

    with watching(take), torch.no_grad():
        net(x)
    return found[0]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adam": lambda net: torch.optim.Adam(mupass.param_groups(net, 1e-3, optimizer="adam")),
    "kfac": lambda net: mupass.KFAC(net, 1e-2),
    "shampoo": lambda net: mupass.Shampoo(net, 1e-3),
    "muon": lambda net: mupass.Muon(net, 1e-2),
}
FORMS: dict[str, Callable[[int], nn.Module]] = {
    "fused": Attention,
    "joint": lambda width: Attention(width, "joint"),
    "packed": Packed,
}


def slopes(make: Callable[[int], nn.Module], optimizer: str, scaled: bool) -> tuple[float, float]:
    """Return powers of width of the change of scores and of outputs over three steps."""
    widths, seeds = (64, 128, 256), 3
    changes: list[list[float]] = [[], []]
    for width in widths:
        sums, plan = [0.0, 0.0], None
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(16, 8, 6, generator=generator).double()
            y = torch.randint(3, (16,), generator=generator)
            torch.manual_seed(seed)
            net = Net(make, width).double()
            # The first seed's plan serves the others.
            settled = {"plan": plan} if plan else {"example_inputs": x, "base": Net(make, 32)}
            net = mupass.transform(net, **settled)
            plan = net.mupass_plan
            if not scaled:
                take_off(net)
            steps = OPTIMIZERS[optimizer](net)
            before = scores_of(net, x), net(x).detach()
            for _ in range(3):
                steps.zero_grad()
                F.cross_entropy(net(x), y).backward()
                steps.step()
            for number, (old, new) in enumerate(
                zip(before, (scores_of(net, x), net(x).detach()), strict=True)
            ):
                sums[number] += (new - old).square().mean().sqrt().item() / seeds
        for number, change in enumerate(sums):
            changes[number].append(math.log(change))
    logs = [math.log(width) for width in widths]
    scores, logits = (linear_regression(logs, change).slope for change in changes)
    return scores, logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_scores_and_logits_change_by_the_same_at_every_width(form: str, optimizer: str) -> None:
    scores, logits = slopes(FORMS[form], optimizer, scaled=True)
    assert scores < 0.15 and abs(logits) < 0.15, (scores, logits)
    # Gradients of scores are small at first. K-FAC's floor of damping then makes their steps shorter than
    # elsewhere, the more so the wider the model; without it they would grow.
    assert scores > (-0.45 if optimizer == "kfac" else -0.25), scores
    if form == "fused":
        without, _ = slopes(FORMS[form], optimizer, scaled=False)
        assert without - scores > 0.3, (without, scores)
