"""K-FAC of standardized kernels: which are told, one step against a dense formula, scale, slopes in width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

pytestmark = [
    pytest.mark.filterwarnings("ignore::mupass._errors.MupassWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
# What one step does by itself.
PLAIN: dict[str, Any] = {
    "momentum": 0.0,
    "factor_decay": 0.0,
    "damping_floor": 0.0,
    "damping_memory": 0.0,
    "step_bound": None,
    "kl_clip": None,
}
LR, RHO = 0.1, 1e-2


def by_batch_norm(w: Tensor, gain: Tensor) -> Tensor:
    """As StdConv2d of timm."""
    rows = w.reshape(1, w.shape[0], -1)
    return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-12).reshape_as(w)


def by_scaled_batch_norm(w: Tensor, gain: Tensor) -> Tensor:
    """As ScaledStdConv2d of timm."""
    scaled = (gain * w[0].numel() ** -0.5).view(-1)
    rows = w.reshape(1, w.shape[0], -1)
    return F.batch_norm(rows, None, None, scaled, training=True, momentum=0.0, eps=1e-12).reshape_as(w)


def by_var_mean(w: Tensor, gain: Tensor) -> Tensor:
    """As in the code of BiT."""
    var, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (w - mean) / torch.sqrt(var + 1e-12)


def by_hand(w: Tensor, gain: Tensor) -> Tensor:
    """As in the code of weight standardization."""
    w = w - w.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    deviation = w.view(w.shape[0], -1).std(dim=1).view(-1, 1, 1, 1) + 1e-12
    return w / deviation.expand_as(w)


def by_rsqrt(w: Tensor, gain: Tensor) -> Tensor:
    """As in the code of NFNets."""
    mean, var = w.mean(dim=(1, 2, 3), keepdim=True), w.var(dim=(1, 2, 3), keepdim=True)
    scale = torch.rsqrt(torch.clamp(var * w[0].numel(), min=1e-12)) * gain
    return w * scale - mean * scale


def by_layer_norm(w: Tensor, gain: Tensor) -> Tensor:
    return gain * F.layer_norm(w.flatten(1), [w[0].numel()], eps=1e-12).view(w.shape)


WAYS = [by_batch_norm, by_scaled_batch_norm, by_var_mean, by_hand, by_rsqrt, by_layer_norm]
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one deviation of all rows": lambda w, gain: (w - w.mean((1, 2, 3), keepdim=True)) / w.std(),
    "one mean of all rows": lambda w, gain: (w - w.mean()) / w.std((1, 2, 3), keepdim=True),
    "no mean": lambda w, gain: w / w.square().sum((1, 2, 3), keepdim=True).sqrt(),
    "no deviation": lambda w, gain: w - w.mean((1, 2, 3), keepdim=True),
    "by columns": lambda w, gain: (w - w.mean(0)) / w.std(0),
    "bent": lambda w, gain: torch.tanh(by_var_mean(w, gain)),
    "masked": lambda w, gain: by_var_mean(w, gain) * (torch.arange(w[0].numel()) % 2).view(w[0].shape),
    "without gradient": lambda w, gain: (
        (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True).detach()
    ),
    "of the weight itself": lambda w, gain: by_var_mean(w, gain) * w.mean((1, 2, 3), keepdim=True),
}


class Standard(nn.Conv2d):
    """A convolution with a kernel that is computed of its parameter and of a gain."""

    def __init__(
        self, make: Callable[[Tensor, Tensor], Tensor], inputs: int, outputs: int, size: int, **more: Any
    ):
        super().__init__(inputs, outputs, size, **more)
        self.make, self.gain = make, nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def kernel(self) -> Tensor:
        return self.make(self.weight, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)


def build(make: Callable[[Tensor, Tensor], Tensor] = by_rsqrt, **more: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), Standard(make, 4, 6, 3, **more), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def data(samples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 2, 6, 6, generator=generator).double()
    return x, torch.randint(3, (samples,), generator=generator)


def treatment(model: nn.Module, name: str, **options: Any) -> Any:
    return {covered.parameter: covered for covered in mupass.KFAC(model, **options).coverage()}[name]


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("make", WAYS)
def test_standardized_kernels_are_told_however_they_are_written(make: Any) -> None:
    net = mupass.transform(build(make), data()[0])
    assert treatment(net, "2.weight").treatment == "kfac standardized"
    assert treatment(net, "2.bias").treatment == "kfac shift"
    # Nothing runs past the tap: a parameter with a gradient that no tap saw raises.
    optimizer = mupass.KFAC(net)
    F.cross_entropy(net(data()[0]), data()[1]).backward()
    optimizer.step()
    assert optimizer.stats() == {"steps": 1}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_kernels_fall_back_by_name(make: Any) -> None:
    covered = treatment(mupass.transform(build(make), data()[0]), "2.weight")
    assert not covered.treatment.startswith("kfac")
    assert covered.reason


def test_copies_of_a_tapped_parameter_are_plain_tensors(tmp_path: Any) -> None:
    net = mupass.transform(build(), data()[0])
    optimizer = mupass.KFAC(net)
    kernel = net[2].weight
    with torch.no_grad():
        copies = [kernel.clone(), kernel.detach() * 2, kernel.data.flatten(1)]
    assert all(type(copied) is Tensor for copied in (*copies, kernel.detach().clone()))
    torch.save((copy.deepcopy(net), kernel), tmp_path / "saved.pt")
    # A penalty that the training loop adds is no use of the kernel.
    (F.cross_entropy(net(data()[0]), data()[1]) + kernel.square().sum()).backward()
    optimizer.step()
    assert optimizer.stats() == {"steps": 1}


class ReadElsewhere(nn.Module):
    """Its output holds a penalty of the kernel as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.body[2].kernel().square().mean()


def test_a_kernel_that_is_read_elsewhere_falls_back() -> None:
    covered = treatment(mupass.transform(ReadElsewhere().double(), data()[0]), "body.2.weight")
    assert not covered.treatment.startswith("kfac")


def test_a_readout_of_standardized_rows_falls_back() -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), Standard(by_rsqrt, 8, 3, 4), nn.Flatten()).double()
    covered = treatment(mupass.transform(net, data()[0]), "2.weight")
    assert "readout of standardized rows" in covered.reason


def directions(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of mean 0 and length 1, and their lengths."""
    rows = v.flatten(1) - v.flatten(1).mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True), rows.norm(dim=1, keepdim=True)


def per_sample(net: nn.Module, layer: Standard, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return patches ``[samples, positions, groups, n]`` and gradients ``[samples, positions, channels]``."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen["x"], seen["y"] = args[0].detach(), output

    handle = layer.register_forward_hook(keep)
    F.cross_entropy(net(x), y, reduction="sum").backward()
    handle.remove()
    patches = F.unfold(seen["x"], layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    assert seen["y"].grad is not None
    return patches.unflatten(-1, (layer.groups, -1)), seen["y"].grad.flatten(2).mT


def dense_step(net: nn.Module, layer: Standard, x: Tensor, y: Tensor, powers: tuple[float, float]) -> Tensor:
    """Return the change of a standardized parameter by one step, by a basis of all that may change.

    The kernel is ``diag(c) U``. In the metric of K-FAC's factors for U, the steepest direction is
    ``Z (Z^T F Z)^-1 Z^T g``, where Z spans the changes of U that keep means and lengths of rows.
    """
    patches, gradients = per_sample(net, layer, x, y)
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert layer.weight.grad is not None
    u, lengths = directions(layer.weight.detach())
    c = (layer.kernel().detach().flatten(1) * u).sum(1)
    gradient = layer.weight.grad.flatten(1) * lengths
    moved = torch.zeros_like(gradient)
    own = len(u) // layer.groups
    for group in range(layer.groups):
        of = slice(group * own, (group + 1) * own)
        inputs = patches[:, :, group].flatten(0, 1)
        inputs = inputs - inputs.mean(1, keepdim=True)
        a = inputs.T @ inputs / len(inputs)
        delta = (gradients[..., of] * c[of]).flatten(0, 1)
        b = delta.T @ delta / len(x)
        metric = torch.kron(power(b, powers[1]), power(a, powers[0]))
        n = u.shape[1]
        constraints = []
        for row, direction in enumerate(u[of]):
            for fixed in (torch.ones_like(direction), direction):
                constraint = torch.zeros(own, n, dtype=u.dtype)
                constraint[row] = fixed
                constraints.append(constraint.flatten())
        basis = torch.linalg.svd(torch.stack(constraints))[2][len(constraints) :].T
        inside = torch.linalg.solve(basis.T @ metric @ basis, basis.T @ gradient[of].flatten())
        moved[of] = (basis @ inside).view(own, n)
    return (-LR * moved * lengths).view_as(layer.weight)


def power(factor: Tensor, exponent: float) -> Tensor:
    """Return a damped factor to a power."""
    values, vectors = torch.linalg.eigh(factor)
    return vectors @ torch.diag((values + RHO * factor.trace()) ** exponent) @ vectors.T


CASES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "plain": ({}, (1.0, 1.0)),
    "padded, from correlations": ({"padding": 1}, (1.0, 1.0)),
    "groups, strides": ({"groups": 2, "stride": 2, "bias": False}, (1.0, 1.0)),
    "roots": ({}, (0.5, 0.5)),
    "A alone": ({}, (1.0, 0.0)),
    "B alone": ({}, (0.0, 1.0)),
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("make", [by_rsqrt, by_batch_norm])
def test_one_step_is_steepest_among_those_that_keep_rows_standardized(
    make: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mupass._taps.forms.CHANNELS", 1)
    options, powers = CASES[name]
    (x, y), net = data(), mupass.transform(build(make, **options), data()[0])
    with torch.no_grad():  # rows of other lengths and signs
        net[2].gain.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1, 1.0]).view(-1, 1, 1, 1))
        net[2].weight.mul_(torch.rand(6, 1, 1, 1) + 0.5).add_(0.1)
    plain = copy.deepcopy(net)
    optimizer = mupass.KFAC(net, LR, RHO, e_a=powers[0], e_b=powers[1], **PLAIN)
    before = net[2].weight.detach().clone()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    want = dense_step(plain, plain[2], x, y, powers)
    assert want.norm() > 0
    torch.testing.assert_close(net[2].weight.detach() - before, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"block_size": 8}, {"sharing": "reduce"}, {"ekfac": True}])
def test_means_and_lengths_of_rows_stay(options: dict[str, Any]) -> None:
    """To first order: a step is orthogonal to each row, and in whole factors its mean is 0 as well."""
    (x, y), net = data(), mupass.transform(build(), data()[0])
    optimizer = mupass.KFAC(net, LR, RHO, **options)
    for _ in range(3):
        before = net[2].weight.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    step, (u, _) = (net[2].weight.detach() - before).flatten(1), directions(before)
    assert (step * u).sum(1).abs().max() < 1e-10 * step.norm()
    if "block_size" not in options:
        assert step.mean(1).abs().max() < 1e-10 * step.norm()


@pytest.mark.sample("eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_size_and_mean_of_rows_do_not_matter(compiled: bool) -> None:
    """The same function, with rows of V longer and shifted, is trained alike: damping and bounds included."""
    (x, y), outputs = data(), []
    for factor, shift in ((1.0, 0.0), (7.0, 0.5)):
        torch.manual_seed(0)
        net = build()
        with torch.no_grad():
            net[2].weight.mul_(factor).add_(shift)
        net = mupass.transform(net, x, trained=True)
        optimizer = mupass.KFAC(net, 1.0, weight_decay=0.0, root_every=2)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
        outputs.append(net(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_compiled_factors_are_the_eager_ones() -> None:
    (x, y), steps = data(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = mupass.transform(build(by_scaled_batch_norm, padding=1), x)
        optimizer = mupass.KFAC(net, LR, RHO, **PLAIN)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        before = net[2].weight.detach().clone()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
        steps.append(net[2].weight.detach() - before)
    assert steps[0].norm() > 0
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("ekfac", [False, True])
def test_compiled_steps_are_the_eager_ones_while_sizes_move(ekfac: bool) -> None:
    """From the second size on the graph has sizes that are not known when it is made."""
    torch._dynamo.reset()  # other tests have compiled the same code, and Dynamo counts
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = mupass.transform(build(), data()[0])
        optimizer = mupass.KFAC(net, LR, RHO, ekfac=ekfac)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        for size in (5, 6, 7):
            x, y = data(size)
            optimizer.zero_grad()
            F.cross_entropy(run(x[..., : size - 1, :size]), y).backward()
            optimizer.step()
        weights.append(net[2].weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-8, atol=1e-12)


def test_curvature_along_a_move_is_that_of_the_kernel() -> None:
    """``d^T F d``, with F of the same factors, by what the move does to the kernel (by autograd)."""
    (x, y), net = data(), mupass.transform(build(), data()[0])
    patches, gradients = per_sample(net, net[2], x, y)
    net.zero_grad()
    optimizer = mupass.KFAC(net, 0.0, RHO, **PLAIN)
    F.cross_entropy(net(x), y).backward()
    move = torch.randn_like(net[2].weight)
    changed = torch.func.jvp(lambda v: by_rsqrt(v, net[2].gain), (net[2].weight,), (move,))[1].flatten(1)
    inputs, delta = patches.flatten(0, 2), gradients.flatten(0, 1)
    a, b = inputs.T @ inputs / len(inputs), delta.T @ delta / len(x)
    want = ((b @ changed @ a) * changed).sum().item()
    optimizer.step()
    assert optimizer.curvature_along({"2.weight": move}) == pytest.approx(want, rel=1e-8)


def metric_cosine(step: Tensor, gradient: Tensor, metric: Tensor) -> float:
    """Return how much of the decrease of a quadratic model along the best direction a direction has."""
    best = gradient @ torch.linalg.solve(metric, gradient)
    return float((gradient @ step) / (step @ metric @ step * best).sqrt())


def test_directions_are_nearer_to_the_exact_natural_gradient_than_those_of_adam() -> None:
    """The exact empirical Fisher matrix of V, sample by sample, with the damping that K-FAC adds."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = data(64)
        net = mupass.transform(build(), x)
        plain = copy.deepcopy(net)
        u, lengths = directions(net[2].weight.detach())
        rows = []
        for sample, label in zip(x, y, strict=True):
            loss = F.cross_entropy(plain(sample[None]), label[None])
            (g,) = torch.autograd.grad(loss, plain[2].weight)
            rows.append((g.flatten(1) * lengths).flatten())
        samples = torch.stack(rows)
        patches, gradients = per_sample(plain, plain[2], x, y)
        inputs = patches.flatten(0, 2)
        inputs = inputs - inputs.mean(1, keepdim=True)
        c = (plain[2].kernel().detach().flatten(1) * u).sum(1)
        delta = (gradients * c).flatten(0, 1)
        a, b = inputs.T @ inputs / len(inputs), delta.T @ delta / len(x)
        added = torch.kron(power(b, 1), power(a, 1)) - torch.kron(b, a)
        optimizer = mupass.KFAC(net, 1.0, RHO, **PLAIN)
        before = net[2].weight.detach().clone()
        F.cross_entropy(net(x), y).backward()
        gradient = net[2].weight.grad.flatten(1) * lengths
        optimizer.step()
        kfac = (before - net[2].weight.detach()).flatten(1) / lengths
        # Adam's first step, less what does not move the kernel
        adam = gradient.sign() - gradient.sign().mean(1, keepdim=True)
        adam = adam - (adam * u).sum(1, keepdim=True) * u
        metric = samples.T @ samples / len(x) + added
        found.append([metric_cosine(d.flatten(), gradient.flatten(), metric) for d in (kfac, adam)])
    kfac_cosine, adam_cosine = torch.tensor(found).mean(0)
    assert kfac_cosine > adam_cosine + 0.1
    assert kfac_cosine > 0.7


# Of width w: an input and a hidden kernel, as BiT has them (behind them norms) and as NFNets have them.
def wide(w: int, make: Callable[[Tensor, Tensor], Tensor]) -> nn.Sequential:
    def norm() -> nn.Module:
        return nn.GroupNorm(1, w, affine=False) if make is by_batch_norm else nn.Identity()

    return nn.Sequential(
        Standard(make, 2, w, 2, stride=2), norm(), nn.Tanh(),
        Standard(make, w, w, 1, stride=2), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(w, 4),
    ).double()  # fmt: skip


def moved(net: nn.Sequential, x: Tensor, y: Tensor, ekfac: bool) -> list[float]:
    """Return log RMS(dW h) over RMS(W h) of both standardized layers by one step."""
    bounds = {"momentum": 0.0, "step_bound": None, "kl_clip": None}
    optimizer = mupass.KFAC(net, 1e-2, RHO, ekfac=ekfac, **bounds)  # type: ignore[arg-type]
    layers = [net[0], net[3]]
    inputs = [x, net[:3](x).detach()]
    before = [layer.kernel().detach().clone() for layer in layers]
    (y * net(x)).mean().backward()
    optimizer.step()
    logs = []
    for layer, h, kernel in zip(layers, inputs, before, strict=True):
        change = F.conv2d(h, layer.kernel().detach() - kernel, stride=2)
        size = F.conv2d(h, kernel, stride=2)
        logs.append((change.square().mean() / size.square().mean()).log().item() / 2)
    return logs


def slopes(
    make: Callable[[Tensor, Tensor], Tensor], ekfac: bool, parameterization: str, widths: tuple[int, ...]
) -> Tensor:
    table = []
    for width in widths:
        logs = []
        for seed in range(2):
            torch.manual_seed(seed)
            x, y = torch.randn(8, 2, 4, 4).double(), 1 + 0.5 * torch.randn(8, 4).double()
            net = mupass.transform(wide(width, make), x, base=widths[0], parameterization=parameterization)
            logs.append(moved(net, x, y, ekfac))
        table.append(torch.tensor(logs).mean(0))
    at = torch.tensor(widths).log()
    values = torch.stack(table)
    return ((at - at.mean()) @ (values - values.mean(0))) / (at - at.mean()).square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("ekfac", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("make", [by_batch_norm, by_scaled_batch_norm])
def test_steps_of_standardized_layers_are_flat_in_width(make: Any, ekfac: bool) -> None:
    found = slopes(make, ekfac, "mup", (64, 128, 256, 512))
    assert found.abs().max() < 0.1, found


@pytest.mark.slow
@pytest.mark.parametrize("make", [by_batch_norm, by_scaled_batch_norm])
def test_steps_are_not_flat_under_the_standard_parameterization(make: Any) -> None:
    found = slopes(make, False, "standard", (64, 128, 256))
    assert found.max() < -0.2, found


@pytest.mark.parametrize("ekfac", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("make", [by_batch_norm, by_scaled_batch_norm])
@pytest.mark.long
def test_steps_are_flat_up_to_width_1024(make: Any, ekfac: bool) -> None:
    found = slopes(make, ekfac, "mup", (64, 128, 256, 512, 1024))
    assert found.abs().max() < 0.1, found


def test_hypergradients_refuse_standardized_kernels() -> None:
    net = mupass.transform(build(), data()[0])
    with pytest.raises(mupass.MupassError, match=r"standardized kernel.*exclude=\['2.weight'\]"):
        mupass.hypergradient(
            net, [data()], {"lr": 0.1, "damping": RHO, "momentum": 0.0}, optimizer=mupass.KFAC, steps=2
        )


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["timm_nfnet", "timm_resnet_v2"])
def test_kernels_of_timm_are_covered(name: str) -> None:
    pytest.importorskip("timm")
    from zoo.vision import CASES as VISION

    case = VISION[name]
    positional, named = case.inputs()
    net = mupass.transform(case.build(1), (positional, named))
    coverage = mupass.KFAC(net).coverage()
    kernels = [covered for covered in coverage if covered.treatment == "kfac standardized"]
    assert len(kernels) >= 13
    sizes = dict(net.named_parameters())
    left = [c.parameter for c in coverage if not c.treatment.startswith("kfac")]
    assert all(max(sizes[name].shape) == sizes[name].numel() for name in left)  # no matrix
