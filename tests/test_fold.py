"""fold: the same outputs from plain weights, the same training afterwards, readable without mupass."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

IDS = torch.arange(24).reshape(2, 12) % 23
BASE = 24  # of widths of 64: no factor is a power of two


class Block(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d, bias=False)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (-1, 8)).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gain(nn.Module):
    """RMS norm whose gain is stored as its distance from 1."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class Tied(nn.Module):
    def __init__(self, d: int = 64, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.tokens = nn.Embedding(23, d)
        self.blocks = nn.Sequential(Block(d), Block(d))
        self.norm, self.head = norm(d), nn.Linear(d, 23)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids))))


class TwoHeads(Tied):
    """A second readout, which is not tied, reads what the norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(64, 1)

    def forward(self, ids: Tensor) -> Any:
        x = self.norm(self.blocks(self.tokens(ids)))
        return self.head(x), self.value(x)


class HeadFirst(nn.Module):
    """Nothing but the tied weight can hold the multiplier; the readout is registered first."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.head, self.tokens, self.up = nn.Linear(d, 23, bias=False), nn.Embedding(23, d), nn.Linear(d, d)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(torch.tanh(self.up(x)))


class Gated(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.gate, self.value = nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.value(x)


class Residual(nn.Module):
    """Branches that end with a convolution, a norm, and a product of activations of which one is linear."""

    def __init__(self, d: int = 48):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, d, 3), nn.Conv2d(d, d, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(d, d, 1, bias=False), nn.BatchNorm2d(d)
        self.gated, self.head = Gated(d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(x.relu())
        x = x + self.norm(self.inner(x))
        x = x + self.gated(x)
        return self.head(x.mean((2, 3)))


class Square(nn.Module):
    """All matrices are square, so that their gradients can have full rank."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.first, self.up, self.down, self.head = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(self.up(x).tanh())
        return self.head(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, float | None]] = {
    "tied": (Tied, IDS, None),
    "tied and deep": (Tied, IDS, 1.5),
    "gain of one plus": (lambda: Tied(norm=Gain), IDS, 1.5),
    "two heads": (TwoHeads, IDS, None),
    "convolutions": (Residual, torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8), 2),
    "square": (Square, torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), 0.3),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, x, depth = CASES[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # gains and shifts that are no constants
    return mupass.transform(model, x, base=BASE, depth=depth, init="fan_in"), x


def first(output: Any) -> Tensor:
    return torch.cat([t.flatten() for t in output]) if isinstance(output, tuple) else output


def hooks(model: nn.Module) -> list[Any]:
    return [h for m in model.modules() for k, t in vars(m).items() if "_hooks" in k for h in t.values()]


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", CASES)
def test_outputs_keys_and_class_stay_and_hooks_go(name: str) -> None:
    model, x = made(name)
    kind, keys = type(model), list(model.state_dict(keep_vars=True))
    before = first(model(x)).detach()
    multipliers = [h for h in hooks(model) if type(h).__name__ in {"InputMultiplier", "OutputMultiplier"}]
    assert multipliers, "the case has nothing to fold"
    assert mupass.fold(model) is model
    assert type(model) is kind and list(model.state_dict()) == keys
    assert not hooks(model)
    assert torch.allclose(first(model(x)), before, atol=1e-6 * float(before.abs().max()), rtol=1e-5)
    plain = CASES[name][0]()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(first(plain(x)), first(model(x)))
    values = {n: t.clone() for n, t in model.state_dict().items()}
    mupass.fold(model)  # nothing is left to fold
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(
        mupass.param_groups(m, lr=0.02, optimizer="sgd", weight_decay=0.1), momentum=0.9
    ),
    "adam": lambda m: torch.optim.Adam(
        mupass.param_groups(m, lr=3e-3, optimizer="adam", eps=1e-3, weight_decay=0.1)
    ),
    "adamw": lambda m: torch.optim.AdamW(mupass.param_groups(m, lr=3e-3, eps=1e-3, weight_decay=0.1)),
    "kfac": lambda m: mupass.KFAC(m, lr=0.01, fallback_lr=1e-3),
    "kfac half": lambda m: mupass.KFAC(m, lr=0.01, e_a=0.5, e_b=0.5, damping_mode="absolute"),
    "shampoo": lambda m: mupass.Shampoo(m, lr=0.01, fallback_lr=1e-3),
    "soap": lambda m: mupass.SOAP(m, lr=3e-3, roles=("input", "hidden", "output")),
    "muon": lambda m: mupass.Muon(m, lr=0.01, fallback_lr=1e-3),
}


@pytest.mark.thin(2)
@pytest.mark.sample(every=8)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["tied and deep", "two heads", "convolutions", "square"])
def test_a_folded_model_trains_as_before(name: str, optimizer: str) -> None:
    if optimizer == "soap" and name != "square":
        pytest.skip("eigenvectors of a gradient without full rank are not unique")
    model, x = made(name)
    x = x.double() if x.is_floating_point() else x
    model = model.double()
    folded = mupass.fold(model, inplace=False)
    both = []
    for one in (model, folded):
        made_optimizer = OPTIMIZERS[optimizer](one)
        start = first(one(x)).detach()
        for _ in range(4):
            made_optimizer.zero_grad()
            first(one(x)).square().mean().backward()
            made_optimizer.step()
        both.append(first(one(x)).detach() - start)
    moved = float(both[0].abs().max())
    assert moved > 1e-3
    assert float((both[0] - both[1]).abs().max()) < 1e-6 * moved


def test_a_readout_is_untied_only_where_nothing_else_holds_and_it_is_said() -> None:
    torch.manual_seed(0)
    model = mupass.transform(HeadFirst(), IDS, base=BASE)
    before, table = model(IDS).detach(), model.tokens.weight.detach().clone()
    with pytest.warns(mupass.MupassWarning, match=r"head has a weight of its own now.*tanh"):
        mupass.fold(model)
    assert torch.allclose(model(IDS), before, atol=1e-6)
    assert torch.equal(model.tokens.weight, table) and model.head.weight is not model.tokens.weight
    plan = model.mupass_plan
    plan.check(model)
    assert [plan[n].geometry.role for n in ("head.weight", "tokens.weight")] == ["output", "input"]
    groups = mupass.param_groups(model, lr=1.0)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rates[id(model.head.weight)] == pytest.approx(BASE / 64)  # Adam's readout row
    assert rates[id(model.tokens.weight)] == 1
    for make in (mupass.KFAC, mupass.Shampoo):
        make(model, lr=0.01)


class Pooled(nn.Module):
    """A branch without a parameter that is linear in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.end = nn.Linear(7, 64), nn.Linear(64, 64), nn.Tanh()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.end(self.up(x)) + 0.0)


def test_what_no_weight_can_hold_is_refused_and_nothing_changes() -> None:
    x = torch.randn(4, 7)
    model = mupass.transform(Pooled(), x, base=BASE, depth=0.5)
    before, values, count = model(x), copy.deepcopy(list(model.parameters())), len(hooks(model))
    with pytest.raises(mupass.TransformError, match=r"tanh in end.*nn\.Linear\(width"):
        mupass.fold(model)
    assert torch.equal(model(x), before) and len(hooks(model)) == count
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
    with pytest.raises(mupass.PlanError, match="no plan"):
        mupass.fold(Pooled())


def test_a_copy_leaves_the_model_in_training_alone() -> None:
    model, x = made("tied and deep")
    optimizer = mupass.KFAC(model, lr=0.01)
    before, count = model(x).detach(), len(hooks(model))
    copied = mupass.fold(model, inplace=False)
    assert torch.equal(model(x), before) and len(hooks(model)) == count
    first(model(x)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), before) and torch.allclose(copied(x), before, atol=1e-4)


@pytest.mark.slow
def test_saving_with_live_multipliers_warns_once_and_only_then() -> None:
    model, x = made("tied and deep")
    with pytest.warns(mupass.MupassWarning, match=r"mupass\.fold"):
        model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
        made("tied")[0].state_dict(keep_vars=True)  # as torch.export asks for it
        mupass.fold(made("tied")[0]).state_dict()
        mupass.transform(Tied(), x, base=64).state_dict()
    inner = made("tied and deep")[0]
    with pytest.warns(mupass.MupassWarning, match="blocks|0"):
        inner.blocks.state_dict()


def test_the_plan_of_a_folded_model_goes_on_in_another_process() -> None:
    model, x = made("two heads")
    mupass.fold(model)
    plan = mupass.Plan.from_json(model.mupass_plan.to_json())
    assert plan == model.mupass_plan and plan.folded
    again = TwoHeads()
    again.load_state_dict(model.state_dict())
    mupass.transform(again, plan=plan)
    assert torch.equal(first(again(x)), first(model(x)))  # nothing is scaled a second time
    lrs = [g["lr"] for g in mupass.param_groups(again, lr=1.0)]
    assert lrs == [g["lr"] for g in mupass.param_groups(model, lr=1.0)]


@pytest.mark.slow
def test_a_compiled_model_follows() -> None:
    model, x = made("tied and deep")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x).detach()
    assert mupass.fold(compiled) is compiled
    assert not hooks(model)
    assert torch.allclose(compiled(x), before, atol=1e-4)


READ = """
import sys, torch
sys.modules["mupass"] = None  # importing it fails
model = torch.load("model.pt", weights_only=False)
x, y = torch.load("data.pt")
assert torch.allclose(model(x), y, atol=1e-5), (model(x) - y).abs().max()
"""


@pytest.mark.slow
def test_without_the_plan_the_whole_module_is_read_where_mupass_is_missing(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Embedding(23, 64), nn.LayerNorm(64), nn.Linear(64, 23, bias=False))
    model[2].weight = model[0].weight
    mupass.transform(model, IDS, base=BASE)
    y = model(IDS).detach()
    torch.save(mupass.fold(model, keep_plan=False), tmp_path / "model.pt")
    torch.save((IDS, y), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", READ], cwd=tmp_path, check=True)


LOAD = textwrap.dedent("""
    import sys, torch, transformers
    sys.modules["mupass"] = None  # importing it fails
    x, logits = torch.load("data.pt")
    model = getattr(transformers, sys.argv[1]).from_pretrained("saved").eval()
    found = model(**x).logits
    assert torch.allclose(found, logits, atol=1e-5), (found - logits).abs().max()
""")
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
LLAMA = {**SMALL, "vocab_size": 97, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
GPT2 = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 97, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], float | None]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, None),
    "gpt2 deep": ("GPT2Config", "GPT2LMHeadModel", GPT2, 3),
    "llama tied": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, 3),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA, 3),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**LLAMA, "head_dim": 16}, None),
    "vit": ("ViTConfig", "ViTForImageClassification", {**SMALL, "image_size": 32, "patch_size": 8}, None),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, 4),
}


@pytest.mark.thin(2)
@pytest.mark.zoo
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_saves_and_loads_without_mupass(name: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config, kind, settings, depth = HUGGING_FACE[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    ids = torch.arange(24).reshape(2, 12)
    x = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else {"input_ids": ids}
    if name == "t5":
        x["decoder_input_ids"] = ids
    quiet = {} if name == "vit" else {"use_cache": False}
    # Their code multiplies by a power of the width.
    told = (
        pytest.warns(mupass.MupassWarning, match="multiplies by")
        if name in ("gemma", "t5")
        else nullcontext()
    )
    with told:
        mupass.transform(model, {**x, **quiet}, base=BASE, depth=depth)
    optimizer = torch.optim.AdamW(mupass.param_groups(model, lr=1e-2))
    model(**x).logits.square().mean().backward()
    optimizer.step()
    logits = model(**x).logits.detach()
    mupass.fold(model)
    assert (model(**x).logits - logits).abs().max() < 1e-6 * max(1.0, float(logits.abs().max()))
    model.save_pretrained(tmp_path / "saved")
    torch.save((x, logits), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", LOAD, kind], cwd=tmp_path, check=True)
