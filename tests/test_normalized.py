"""Readouts whose output is normalized: named, and the check fails, for no scale keeps every slope flat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

pytestmark = pytest.mark.filterwarnings("ignore::mupass._errors.MupassWarning")


def by_hand(u: Tensor) -> Tensor:
    return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6)


NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda u: F.normalize(u, dim=-1),
    "normalize of relu": lambda u: F.normalize(F.relu(u), dim=-1),
    "normalize of tanh": lambda u: F.normalize(torch.tanh(u), dim=-1),
    "normalize of views": lambda u: F.normalize(u.view(-1, 2, 4), dim=-1).flatten(1),
    "layer norm": lambda u: F.layer_norm(u, u.shape[-1:]),
    "layer norm of sigmoid": lambda u: F.layer_norm(torch.sigmoid(u), u.shape[-1:]),
    "batch norm": lambda u: F.batch_norm(u, None, None, training=True),
    "rms norm": lambda u: F.rms_norm(u, u.shape[-1:]),
    "rms by hand": by_hand,
    "rms by a root": lambda u: u / (u.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
    "rms by a power": lambda u: u * (u.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5),
    "rms by a product": lambda u: u / torch.sqrt((u * u).sum(-1, keepdim=True)),
    "by einsum": lambda u: u / torch.einsum("bi,bi->b", u, u).sqrt()[:, None],
    "standardized": lambda u: (u - u.mean(0)) / (u.std(0) + 1e-5),
    "by variance": lambda u: (u - u.mean(-1, keepdim=True)) / torch.sqrt(u.var(-1, keepdim=True) + 1e-5),
    "sum of sizes": lambda u: u / u.abs().sum(-1, keepdim=True),
    "largest": lambda u: u / u.amax(-1, keepdim=True),
    "norm": lambda u: 10 * u / u.norm(dim=-1, keepdim=True),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda u: u,
    "softmax": lambda u: u.softmax(-1),
    "normalized sigmoid": lambda u: F.normalize(torch.sigmoid(u), dim=-1),  # its constant is what is divided
    "centred": lambda u: u - u.mean(-1, keepdim=True),
    "product": lambda u: u * u.abs(),
    "number": lambda u: u / 8**0.5,
    "log of sums": lambda u: u - u.logsumexp(-1, keepdim=True),
}


class Net(nn.Module):
    """An MLP with something behind its readout."""

    def __init__(self, after: Callable[[Tensor], Tensor], width: int = 64):
        super().__init__()
        self.a, self.b, self.after = nn.Linear(20, width), nn.Linear(width, width), after
        self.c = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


class Masks(nn.Module):
    """As in TabNet: what a normalized readout makes is a mask on the data of the next step."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.shared, self.step, self.head = nn.Linear(20, width), nn.Linear(width, width), nn.Linear(width, 8)
        self.mask, self.norm = nn.Linear(width, 20, bias=False), nn.BatchNorm1d(20)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.norm(self.mask(F.relu(self.shared(x)))).softmax(-1)
        return self.head(F.relu(self.step(F.relu(self.shared(x * mask)))))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 20, generator=generator)
    return [(x, torch.randint(8, (32,), generator=generator))]


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_normalized_readout_is_named(name: str) -> None:
    model = mupass.transform(Net(NORMALIZERS[name]), torch.randn(8, 20), base=32)
    assert model.mupass_plan["c.weight"].geometry.normalized
    assert [w for w in model.mupass_plan.warnings if w.startswith("c.weight: ") and "by its own size" in w]
    assert mupass.Plan.from_json(model.mupass_plan.to_json()) == model.mupass_plan


@pytest.mark.parametrize("name", OTHERS)
def test_other_readouts_are_not(name: str) -> None:
    analysis = mupass.analyze(Net(OTHERS[name]), torch.randn(8, 20), base=32)
    assert not any(g.normalized for g in analysis.geometries)
    assert not any("by its own size" in w for w in analysis.warnings)


def test_an_output_that_is_said_to_grow_is_no_readout() -> None:
    model = Net(NORMALIZERS["normalize"])
    analysis = mupass.analyze(model, torch.randn(8, 20), base=32, dims={r"c\.weight:0": "infinite"})
    assert analysis["c.weight"].role == "hidden"
    assert not any(g.normalized for g in analysis.geometries)


@pytest.mark.thin(3)
@pytest.mark.sample(every=8)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac", "shampoo"])
@pytest.mark.parametrize("name", ["normalize", "layer norm", "batch norm", "rms by hand"])
def test_the_check_fails_a_normalized_readout(name: str, optimizer: str) -> None:
    def build(width: int) -> nn.Module:
        return Net(NORMALIZERS[name], width)

    check = mupass.coord_check(build, data(), optimizer=optimizer, widths=(64, 128, 256), steps=1)
    assert not check.ok
    assert "divides what the readout c.weight puts out" in check.blame


@pytest.mark.sample("kfac")
@pytest.mark.parametrize("optimizer", ["adam", "kfac", "shampoo"])
def test_the_check_fails_a_mask_behind_a_norm(optimizer: str) -> None:
    check = mupass.coord_check(Masks, data(), optimizer=optimizer, widths=(64, 128, 256), steps=1)
    assert not check.ok
    assert "mask.weight" in check.blame


@pytest.mark.slow
def test_the_check_passes_a_readout_of_what_is_normalized() -> None:
    class Before(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.after(torch.tanh(self.b(torch.tanh(self.a(x))))))

    model = Before(lambda h: F.layer_norm(h, h.shape[-1:]))
    for optimizer in ("adam", "kfac"):
        assert mupass.coord_check(model, data(), optimizer=optimizer, widths=(64, 128, 256), steps=1).ok


def slopes(power: float, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> dict[str, float]:
    """Fit powers of width of one step behind ``F.normalize``, the readout's start times a power of width."""
    widths, logs = (64, 128, 256, 512), []
    for width in widths:
        torch.manual_seed(0)
        x, y = torch.randn(16, 20).double(), torch.randn(16, 8).double()
        model = mupass.transform(Net(NORMALIZERS["normalize"], width).double(), x, base=widths[0])
        with torch.no_grad():
            model.c.weight *= (width / widths[0]) ** power
            h = torch.tanh(model.a(x))
            k = torch.tanh(model.b(h))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        made = optimizer(model)
        out = model(x)
        (y * out).mean().backward()
        made.step()
        moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        sizes = [h @ moved["b.weight"].T, k @ moved["c.weight"].T / (k @ before["c.weight"].T).std()]
        sizes.append(model(x).detach() - out.detach())
        logs.append([s.square().mean().sqrt().log().item() for s in sizes])
    x = torch.tensor(widths).double().log()
    y = torch.tensor(logs).double()
    found = ((x - x.mean()) @ (y - y.mean(0))) / (x - x.mean()).square().sum()
    return dict(zip(("hidden", "readout", "output"), found.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_no_start_of_a_normalized_readout_is_flat(power: float) -> None:
    """At 1/m its own step is not, at 1/sqrt(m) the step of the layer below is not, or the output's."""
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "sgd": lambda m: torch.optim.SGD(mupass.param_groups(m, 1e-2, optimizer="sgd")),
        "adam": lambda m: torch.optim.Adam(mupass.param_groups(m, 1e-3, optimizer="adam"), eps=1e-30),
        "kfac": lambda m: mupass.KFAC(m, 1e-2, damping=1e-2, momentum=0, fallback="sgd", damping_floor=0),
    }
    for make in makers.values():
        assert max(map(abs, slopes(power, make).values())) > 0.25
