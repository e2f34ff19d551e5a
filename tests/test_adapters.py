"""Fine-tuning of a frozen model by adapters, gains, prompts and biases: scales, slopes in width, silence."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

BASE, RANK, STEPS, SEEDS = 64, 4, 3, 6
WIDTHS = (64, 128, 256, 512)


class Lora(nn.Module):
    """``W x + (alpha / r) B A x`` as PEFT writes it: W is frozen, A is drawn, B is zero."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), 8 / rank
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.b(self.a(x))


class Summed(Lora):
    """The two weights are added before they meet the data, as a parametrization does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.scale * self.b.weight @ self.a.weight, self.base.bias)


class Dora(Lora):
    """The sum of both weights is divided by the lengths of its rows, which are learned."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.length = nn.Parameter(base.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scale * self.b.weight @ self.a.weight
        lengths = weight.norm(dim=1).detach()
        return F.linear(x, weight / lengths[:, None] * self.length[:, None], self.base.bias)


class Gained(nn.Module):
    """A gain on what a frozen layer makes, as (IA)^3 has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.gain = base.requires_grad_(False), nn.Parameter(torch.ones(base.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.gain.flatten()


class Bottleneck(nn.Module):
    """A narrow network behind a frozen layer that adds to what this makes (Houlsby et al.)."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.out_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return h + self.up(F.relu(self.down(h)))


class Net(nn.Module):
    """Learned tokens before the data's, and residual blocks of which one has square layers alone.

    The frozen weights are of the size that training under mup leaves: the readout's are smaller by the root
    of the width.
    """

    def __init__(self, width: int, adapt: Callable[[nn.Linear], nn.Module] = Lora, tokens: int = 0) -> None:
        super().__init__()
        self.enter, self.norm, self.head = nn.Linear(10, width), nn.LayerNorm(width), nn.Linear(width, 4)
        with torch.no_grad():
            self.head.weight.mul_(math.sqrt(BASE / width))
        for module in (self.enter, self.norm, self.head):
            module.requires_grad_(False)
        self.up, self.down = adapt(nn.Linear(width, 2 * width)), adapt(nn.Linear(2 * width, width))
        self.square = adapt(nn.Linear(width, width))
        if tokens:
            self.prompt = nn.Embedding(tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        if hasattr(self, "prompt"):
            learned = self.prompt(torch.arange(self.prompt.num_embeddings))
            h = torch.cat([learned.expand(len(h), -1, -1), h], 1)
        h = h + self.down(F.relu(self.up(self.norm(h))))
        if h.dim() == 3:
            h = h.mean(1)
        h = h + self.square(h)
        return self.head(h)


def plain(layer: nn.Linear) -> nn.Linear:
    return layer.requires_grad_(False)


def biased(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


def prompted(width: int) -> nn.Module:
    return Net(width, plain, tokens=5)


ADAPTED: dict[str, Callable[[int], nn.Module]] = {
    "lora": Net,
    "gains": lambda width: Net(width, Gained),
    "biases": lambda width: Net(width, biased),
    "prompt": prompted,
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(mupass.param_groups(model, 0.5, optimizer="sgd")),
    "adam": lambda model: torch.optim.Adam(mupass.param_groups(model, 3e-3, optimizer="adam")),
    "kfac": lambda model: mupass.KFAC(model),
    "shampoo": lambda model: mupass.Shampoo(model, 3e-3),
    "soap": lambda model: mupass.SOAP(model, 3e-3),
    "muon": lambda model: mupass.Muon(model, 0.02, roles=("input", "output"), fallback_lr=3e-3),
}


def data(rows: int = 64) -> tuple[Tensor, Tensor]:
    """Return inputs and targets; one class is by far the most frequent, so that mean errors do not vanish."""
    x = torch.randn(rows, 3, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return x, (x[:, 0, :4] + torch.tensor([2.0, 0.0, 0.0, 0.0])).argmax(1)


def inputs_of(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the data as the model wants it: tokens only where it has learned ones before them."""
    rows, targets = data()
    return (rows if hasattr(model, "prompt") else rows[:, 0]), targets


def changes(build: Callable[[int], nn.Module], optimizer: str, width: int, seed: int, **options: Any) -> Any:
    """Return for every trained parameter, step by step, the size of what its change does to its layer."""
    torch.manual_seed(seed)
    model = build(width).double()
    x, y = inputs_of(model, data()[0])
    mupass.transform(model, x, base=BASE, trained=True, **options)
    made = OPTIMIZERS[optimizer](model)
    met: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, name=name: met.update({name: args[0].detach()}) if args else None
        )
    found: dict[str, list[float]] = {n: [] for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(STEPS):
        made.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made.step()
        for name, p in model.named_parameters():
            if name in found:
                moved, owner = p.detach() - before[name], name.rpartition(".")[0]
                if moved.dim() == 2 and moved.shape[1] > 1 and owner != "prompt":
                    moved = met[owner] @ moved.T
                found[name].append(moved.square().mean().sqrt().item())
    return found


def slope(values: list[float]) -> float:
    """Return the slope of a line through logarithms of values against those of the widths."""
    x, y = torch.tensor(WIDTHS).log2(), torch.tensor(values).log2()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def slopes(build: Callable[[int], nn.Module], optimizer: str, **options: Any) -> dict[str, float]:
    """Return the slope of every trained parameter, in the first step in which it moves.

    Sizes of SGD's steps differ by orders between seeds: means are geometric.
    """
    sizes: dict[str, list[float]] = {}
    for width in WIDTHS:
        runs = [changes(build, optimizer, width, seed, **options) for seed in range(SEEDS)]
        for name in runs[0]:
            step = next(i for i, size in enumerate(runs[0][name]) if size > 0)
            logs = [math.log(run[name][step]) for run in runs]
            sizes.setdefault(name, []).append(math.exp(sum(logs) / SEEDS))
    return {name: slope(values) for name, values in sizes.items()}


@pytest.mark.thin(3)
@pytest.mark.filterwarnings("ignore:mupass.* can take no parameter of this model")
@pytest.mark.sample("lora-adam")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ADAPTED)
def test_what_is_trained_moves_its_layer_by_as_much_at_every_width(kind: str, optimizer: str) -> None:
    found = slopes(ADAPTED[kind], optimizer)
    if optimizer == "soap":  # its first basis is one of a gradient of zero where B is still zero
        found = {name: power for name, power in found.items() if ".a." not in name}
    bound = 0.25 if optimizer == "sgd" else 0.15
    assert found and max(map(abs, found.values())) < bound, found


@pytest.mark.slow
def test_without_scales_an_adapter_moves_its_layer_more_the_wider_it_is() -> None:
    found = slopes(Net, "adam", parameterization="standard")
    for name, power in found.items():
        assert power == pytest.approx(1.0 if ".a." in name else 0.0, abs=0.15), name


def roles(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    plan = mupass.transform(
        model, data()[0].float()[:, 0] if x is None else x, base=32, trained=True
    ).mupass_plan
    return {n: plan[n].geometry.role for n, p in model.named_parameters() if p.requires_grad}


def test_the_rank_of_an_adapter_is_fixed() -> None:
    for adapt in (Lora, Summed, Dora):
        found = roles(Net(128, adapt))
        for layer in ("up", "down", "square"):
            assert found.pop(f"{layer}.a.weight") == "output"
            assert found.pop(f"{layer}.b.weight") == "input"
        # A length multiplies rows of a weight: it is part of the weight's output.
        assert set(found.values()) <= {"input"}
    found = roles(Net(128, Bottleneck))
    assert found["up.down.weight"] == "output" and found["up.up.weight"] == "input"
    assert found["up.down.bias"] == "scalar" and found["up.up.bias"] == "vector"


class Tokens(nn.Module):
    """Low ranks beside a lookup table and beside a readout."""

    def __init__(self, width: int = 128, vocabulary: int = 20) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.table_a, self.table_b = nn.Embedding(vocabulary, RANK), nn.Linear(RANK, width, bias=False)
        self.mix, self.head = plain(nn.Linear(width, width)), Lora(nn.Linear(width, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.table_b(self.table_a(ids))
        return self.head(F.relu(self.mix(h)))


def test_ranks_beside_tables_and_readouts_are_fixed() -> None:
    assert roles(Tokens(), torch.arange(10)[None]) == {
        "table_a.weight": "scalar",
        "table_b.weight": "input",
        "head.a.weight": "output",
        "head.b.weight": "scalar",
    }


def test_a_new_readout_on_a_frozen_model_has_a_width() -> None:
    model = Net(128, plain)
    model.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
    found = roles(model)
    assert found["head.0.weight"] == "hidden" and found["head.2.weight"] == "output"


def test_a_bottleneck_that_is_trained_with_the_rest_stays_a_width() -> None:
    """Where its size is an argument; one that the code writes out is a number of the author's own."""
    model = Net(128, Bottleneck).requires_grad_(True)
    assert roles(model)["up.down.weight"] == "hidden"


def test_the_caller_settles_a_rank_otherwise() -> None:
    model = Net(128)
    x = data()[0].float()[:, 0]
    plan = mupass.transform(
        model, x, base=32, trained=True, dims={r"up\.a\.weight:0": "infinite"}
    ).mupass_plan
    assert plan["up.a.weight"].geometry.role == "hidden" == plan["up.b.weight"].geometry.role


# Frozen weights cost nothing and say nothing ---------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(20, width), Lora(nn.Linear(width, width))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.table(ids))))


def test_a_frozen_tie_is_no_matter_and_a_trained_one_is() -> None:
    ids = torch.arange(10)[None]
    frozen = Tied()
    frozen.table.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mupass.transform(frozen, ids, base=32, trained=True)
    with pytest.warns(mupass.MupassWarning, match="table.weight is embedding and readout of a trained model"):
        mupass.transform(Tied(), ids, base=32, trained=True)


def test_only_what_is_trained_is_tapped_and_moves() -> None:
    model = Net(128)
    x, y = data()
    x = x[:, 0].float()
    with torch.no_grad():
        expected = model(x)
    mupass.transform(model, x, base=BASE, trained=True)
    assert torch.equal(model(x), expected)
    optimizer = mupass.KFAC(model, strict=True)
    assert {covered.parameter for covered in optimizer.coverage()} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    before = copy.deepcopy(model.state_dict())
    # B is zero, so A has no gradient in the first step, and moves from the second on: that is no incident.
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        collected = {
            name for name, module in model.named_modules() for tap in optimizer.taps if tap is module
        }
        assert not collected & {"enter", "head", "up.base", "down.base", "square.base"}
        optimizer.step()
        moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
        wanted = {f"{layer}.b.weight" for layer in ("up", "down", "square")}
        if step:
            wanted |= {f"{layer}.a.weight" for layer in ("up", "down", "square")}
        assert moved == wanted
    assert optimizer.stats() == {"steps": 2}


def test_an_adapter_without_any_gradient_is_named() -> None:
    model = Net(128)
    x, y = data()
    x = x[:, 0].float()
    mupass.transform(model, x, base=BASE, trained=True)
    optimizer = mupass.KFAC(model, overrides={"up.b.weight": {"lr": 0.0}})
    with pytest.warns(mupass.MupassWarning, match="up.a.weight receives no gradient"):
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


# PEFT ------------------------------------------------------------------------------------------------------

LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FACTORS = {"lora_A": "output", "lora_B": "input"}
PEFT: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": LAYERS}, FACTORS),
    "rank of half the width": (
        "LoraConfig",
        {"r": 32, "target_modules": LAYERS, "use_rslora": True, "lora_dropout": 0.1},
        FACTORS,
    ),
    "dora": (
        "LoraConfig",
        {"r": 4, "target_modules": LAYERS, "use_dora": True},
        {**FACTORS, "magnitude": "vector"},
    ),
    "table": (
        "LoraConfig",
        {"r": 4, "target_modules": ["embed_tokens"]},
        {"embedding_A": "scalar", "embedding_B": "input"},
    ),
    "vera": (
        "VeraConfig",
        {"r": 4, "target_modules": ["q_proj"]},
        {"lambda_b": "vector", "lambda_d": "scalar"},
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"ia3_l": "vector"},
    ),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}, {"embedding": "input"}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}, {"embedding": "input"}),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", PEFT)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*past_key_values:UserWarning")
def test_adapters_of_peft_have_their_roles(name: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": name != "table"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, **heads))
    kind, options, wanted = PEFT[name]
    adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    inputs: dict[str, Any] = {"input_ids": torch.arange(24).reshape(2, 12)}
    if name != "prefix":
        inputs["use_cache"] = False
    adapted.eval()
    expected = adapted(**inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", mupass.MupassWarning)
        plan = mupass.transform(adapted, inputs, base=32, trained=True).mupass_plan
    assert torch.equal(adapted(**inputs).logits, expected)
    trained = [parameter for parameter, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    for parameter in trained:
        (role,) = (role for part, role in wanted.items() if part in parameter)
        assert plan[parameter].geometry.role == role, parameter
