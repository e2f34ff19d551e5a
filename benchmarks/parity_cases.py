"""Cases of K-FAC coverage, each with its model written out as plain matrix products.

A case holds a small model as users write it, and the same computation with every weight use of interest
routed through a `Tape`: as rows that a stack of matrices multiplies. The tape keeps the rows and adds a
zero to the product; the derivative of each sample's loss by that zero is the ``delta`` of the rows. Nothing
here knows a K-FAC package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacrev

WIDTH, SAMPLES, POSITIONS, FEATURES, CLASSES, WORDS = 8, 6, 4, 5, 3, 11
Stack = Callable[[Tensor], Tensor]  # parameter -> [matrices, out, in]


@dataclass
class Use:
    """One use of a parameter: ``rows [matrices, samples, positions, in]``; ``delta`` likewise, with out."""

    name: str
    stack: Stack
    rows: Tensor
    transposed: bool
    slot: int
    gain: Tensor | None = None


@dataclass
class Tape:
    """Takes the weight uses of one forward pass down.

    Attributes:
        p: Parameters by name.
        zeros: What is added to the products, one tensor each; made as they are met when None.
    """

    p: dict[str, Tensor]
    zeros: list[Tensor] | None = None
    uses: list[Use] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)

    def product(
        self,
        weight: str,
        rows: Tensor,
        stack: Stack = lambda w: w[None],
        bias: str = "",
        transposed: bool = False,
    ) -> Tensor:
        """Return ``[matrices, samples, positions, out]`` of rows ``[(matrices,) samples, positions, in]``."""
        matrices = stack(self.p[weight])
        rows = rows.expand(len(matrices), *rows.shape[-3:])
        y = torch.einsum("knpi,koi->knpo", rows, matrices)
        if bias:
            y = y + self.p[bias].view(len(matrices), 1, 1, -1)
        y = self._add_zero(y)
        self.uses.append(Use(weight, stack, rows, transposed, len(self.made) - 1))
        if bias:
            ones = rows.new_ones(*rows.shape[:-1], 1)
            count = len(matrices)
            self.uses.append(Use(bias, lambda b: b.view(count, -1, 1), ones, False, len(self.made) - 1))
        return y

    def affine(self, weight: str, bias: str, x: Tensor) -> Tensor:
        """Return ``x * gain + shift`` for ``[samples, positions, features]``."""
        y = self._add_zero((x * self.p[weight] + self.p[bias])[None])
        ones = x.new_ones(1, *x.shape[:-1], 1)
        for name, gain in ((weight, x[None]), (bias, None)):
            self.uses.append(Use(name, lambda v: v[None, :, None], ones, False, len(self.made) - 1, gain))
        return y[0]

    def _add_zero(self, y: Tensor) -> Tensor:
        at = len(self.made)
        self.made.append(torch.zeros_like(y))
        return y if self.zeros is None else y + self.zeros[at]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: What it shows.
        build: The model, as users write it.
        inputs: Its batch.
        plain: The same computation on a tape: (tape, batch) -> logits.
        subject: Parameters that the row is about.
        reduce: Whether it is about the reduce setting for shared weights.
        classes: Size of the output.
        tied: Another module that holds the subject's weight transposed; peers may know it by that.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    plain: Callable[[Tape, Tensor], Tensor]
    subject: tuple[str, ...]
    reduce: bool = False
    classes: int = CLASSES
    tied: str = ""


class Net(nn.Module):
    """``inp -> tanh -> body -> mean over positions -> out``; subclasses give the body."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        for name, module in modules.items():
            setattr(self, name, module)

    def body(self, h: Tensor) -> Tensor:
        return torch.tanh(self.mid(h))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(torch.tanh(self.inp(x)))
        return self.out(h.mean(1) if h.dim() == 3 else h)


def around(body: Callable[[Tape, Tensor], Tensor]) -> Callable[[Tape, Tensor], Tensor]:
    """Return the plain form of a `Net` from that of its body on ``[samples, positions, width]``."""

    def plain(t: Tape, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x if x.dim() == 3 else x[:, None], t.p["inp.weight"], t.p["inp.bias"]))
        return F.linear(body(t, h).mean(1), t.p["out.weight"], t.p["out.bias"])

    return plain


def features(*positions: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *positions, FEATURES, dtype=torch.float64)


def words() -> Tensor:
    return torch.randint(WORDS, (SAMPLES, POSITIONS))


# Modules ---------------------------------------------------------------------------------------------------


def middle(t: Tape, h: Tensor) -> Tensor:
    return torch.tanh(t.product("mid.weight", h, bias="mid.bias")[0])


class InPlace(Net):
    def body(self, h: Tensor) -> Tensor:
        return F.relu(self.mid(h), inplace=True)  # type: ignore[operator]


def in_place(t: Tape, h: Tensor) -> Tensor:
    return F.relu(t.product("mid.weight", h, bias="mid.bias")[0])


class Twice(Net):
    def body(self, h: Tensor) -> Tensor:
        return torch.tanh(self.mid(torch.tanh(self.mid(h))))  # type: ignore[operator]


class Normed(Net):
    def body(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(h))  # type: ignore[operator]


def normed(t: Tape, h: Tensor) -> Tensor:
    return torch.tanh(t.affine("norm.weight", "norm.bias", F.layer_norm(h, (WIDTH,))))


class Attentive(Net):
    def body(self, h: Tensor) -> Tensor:
        return self.attn(h, h, h, need_weights=False)[0]  # type: ignore[operator, no-any-return]


def attentive(t: Tape, h: Tensor) -> Tensor:
    thirds = lambda w: w.view(3, WIDTH, -1)  # noqa: E731
    qkv = t.product("attn.in_proj_weight", h, thirds, "attn.in_proj_bias")
    q, k, v = qkv.unflatten(-1, (2, -1)).transpose(2, 3)  # [samples, heads, positions, head]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return t.product("attn.out_proj.weight", mixed, bias="attn.out_proj.bias")[0]


class Tokens(nn.Module):
    """Embedding, mean over positions, readout; or with the embedding as the readout too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.mid = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(torch.tanh(self.tokens(ids))))).mean(1)


def tokens(tied: bool) -> Callable[[Tape, Tensor], Tensor]:
    def plain(t: Tape, ids: Tensor) -> Tensor:
        rows = F.one_hot(ids, WORDS).to(t.p["tokens.weight"].dtype)
        h = torch.tanh(t.product("tokens.weight", rows, lambda w: w.T[None])[0])
        h = torch.tanh(F.linear(h, t.p["mid.weight"], t.p["mid.bias"]))
        if tied:
            return t.product("tokens.weight", h, transposed=True)[0].mean(1)
        return F.linear(h, t.p["head.weight"]).mean(1)

    return plain


# Convolutions ----------------------------------------------------------------------------------------------


class Convolved(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.out = conv, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(x)).flatten(2).mean(2))


def convolved(conv: Callable[[], Any], transposed: bool = False) -> Callable[[Tape, Tensor], Tensor]:
    """The convolution as a product, its rows read off the Jacobian of the output by the kernel."""

    layer = conv().double()
    groups, out = layer.groups, layer.out_channels

    def plain(t: Tape, x: Tensor) -> Tensor:
        bare = lambda w: torch.func.functional_call(layer, {"weight": w, "bias": t.p["conv.bias"] * 0}, x)  # noqa: E731
        by_kernel = jacrev(bare)(t.p["conv.weight"]).detach()  # [samples, out, *positions, *kernel shape]
        rank = x.dim() - 2
        rows = []
        for first in range(0, out, out // groups):  # all outputs of a group see the same rows
            one = by_kernel[:, first].flatten(1, rank)
            one = one[:, :, :, first % (out // groups)] if transposed else one[:, :, first]
            rows.append(one.flatten(2))
        stack = (
            (lambda w: w.transpose(0, 1).flatten(1)[None])
            if transposed
            else (lambda w: w.reshape(groups, out // groups, -1))
        )
        y = t.product("conv.weight", torch.stack(rows), stack, "conv.bias")
        y = torch.tanh(y.permute(1, 2, 0, 3).flatten(2))  # [samples, positions, channels]
        return F.linear(y.mean(1), t.p["out.weight"], t.p["out.bias"])

    return plain


def convolution(name: str, conv: Callable[[], Any], *shape: int, transposed: bool = False) -> Case:
    return Case(
        name,
        lambda: Convolved(conv()),
        lambda: torch.randn(SAMPLES, *shape, dtype=torch.float64),
        convolved(conv, transposed),
        ("conv.weight", "conv.bias"),
    )


# Raw parameters --------------------------------------------------------------------------------------------


class Raw(Net):
    """A bare parameter under one operator."""

    def __init__(self, operator: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.raw, self.operator = nn.Parameter(torch.randn(shape) / WIDTH**0.5), operator

    def body(self, h: Tensor) -> Tensor:
        return torch.tanh(self.operator(h, self.raw))


def raw(name: str, operator: Callable[[Tensor, Tensor], Tensor], turned: bool) -> Case:
    def body(t: Tape, h: Tensor) -> Tensor:
        return torch.tanh(t.product("raw", h, (lambda w: w.T[None]) if turned else (lambda w: w[None]))[0])

    return Case(name, lambda: Raw(operator, WIDTH, WIDTH), features(POSITIONS), around(body), ("raw",))


class Experts(Net):
    """A soft mixture: every token goes through every expert, weighted by a gate."""

    def __init__(self, dispatch: Callable[[Tensor, Tensor], Tensor], count: int = 3) -> None:
        super().__init__(gate=nn.Linear(WIDTH, count))
        self.experts, self.dispatch = nn.Parameter(torch.randn(count, WIDTH, WIDTH) / WIDTH**0.5), dispatch

    def body(self, h: Tensor) -> Tensor:
        made = torch.tanh(self.dispatch(h, self.experts))
        return torch.einsum("enth,nte->nth", made, self.gate(h).softmax(-1))  # type: ignore[operator]


def batched(h: Tensor, weight: Tensor) -> Tensor:
    """Give every expert a batch of its own."""
    rows = h.flatten(0, 1).expand(len(weight), -1, -1)
    return torch.bmm(rows, weight).unflatten(1, h.shape[:2])


def experts(t: Tape, h: Tensor) -> Tensor:
    made = torch.tanh(t.product("experts", h, lambda w: w.mT))
    gate = F.linear(h, t.p["gate.weight"], t.p["gate.bias"]).softmax(-1)
    return torch.einsum("enth,nte->nth", made, gate)


class InOut(nn.Module):
    """A dense layer with its weight as (in, out), computed by addmm, as Hugging Face's GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5),
            nn.Parameter(torch.zeros(WIDTH)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(x.shape)


def in_out(t: Tape, h: Tensor) -> Tensor:
    return torch.tanh(t.product("mid.weight", h, lambda w: w.T[None], "mid.bias")[0])


def net(
    name: str,
    build: Callable[[], nn.Module],
    body: Callable[[Tape, Tensor], Tensor],
    *subject: str,
    sequence: bool = True,
    reduce: bool = False,
) -> Case:
    inputs = features(POSITIONS) if sequence else features()
    return Case(name, build, inputs, around(body), subject, reduce)


def dense(cls: type[Net] = Net) -> Callable[[], nn.Module]:
    return lambda: cls(mid=nn.Linear(WIDTH, WIDTH))


def attention() -> nn.Module:
    return Attentive(attn=nn.MultiheadAttention(WIDTH, 2, batch_first=True))


def conv_transpose() -> nn.Module:
    return nn.ConvTranspose2d(2, WIDTH, 3, 2, 1)


def expert_einsum(h: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("ntd,edh->enth", h, weight)


MID = ("mid.weight", "mid.bias")
ATTENTION = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias")
CASES = (
    net("Linear", dense(), middle, *MID[:1], sequence=False),
    net("Linear on sequences, expand", dense(), middle, *MID[:1]),
    net("Linear on sequences, reduce", dense(), middle, *MID[:1], reduce=True),
    net("biases", dense(), middle, *MID[1:]),
    convolution("Conv1d, stride, padding", lambda: nn.Conv1d(2, WIDTH, 3, 2, 1), 2, 7),
    convolution("Conv2d, stride, padding", lambda: nn.Conv2d(2, WIDTH, 3, 2, 1), 2, 6, 5),
    convolution("Conv2d, padding 'same'", lambda: nn.Conv2d(2, WIDTH, 3, padding="same"), 2, 4, 5),
    convolution("Conv2d, dilation", lambda: nn.Conv2d(2, WIDTH, 3, dilation=2), 2, 7, 6),
    convolution("Conv2d, 16 channels", lambda: nn.Conv2d(16, WIDTH, 3, padding=1), 16, 4, 5),
    convolution("Conv2d, groups", lambda: nn.Conv2d(4, WIDTH, 3, groups=2), 4, 5, 4),
    convolution("Conv3d, stride", lambda: nn.Conv3d(2, WIDTH, 2, 2), 2, 4, 4, 4),
    convolution("transposed convolution", conv_transpose, 2, 3, 3, transposed=True),
    Case("Embedding", lambda: Tokens(False), words, tokens(False), ("tokens.weight",), classes=WORDS),
    net(
        "norm gains and biases", lambda: Normed(norm=nn.LayerNorm(WIDTH)), normed, "norm.weight", "norm.bias"
    ),
    net("nn.MultiheadAttention", attention, attentive, *ATTENTION),
    net("reused module", dense(Twice), lambda t, h: middle(t, middle(t, h)), *MID),
    Case("tied weights", lambda: Tokens(True), words, tokens(True), ("tokens.weight",), False, WORDS, "head"),
    net("in-place activation", dense(InPlace), in_place, *MID, sequence=False),
    net("in-place, on sequences", dense(InPlace), in_place, *MID),
    raw("raw parameter, matmul", lambda h, w: h @ w, True),
    raw("raw parameter, einsum", lambda h, w: torch.einsum("ntd,dk->ntk", h, w), True),
    raw("raw parameter, F.linear", F.linear, False),
    net("mixture of experts, bmm", lambda: Experts(batched), experts, "experts"),
    net("mixture of experts, einsum", lambda: Experts(expert_einsum), experts, "experts"),
    net("addmm, (in, out) layout", lambda: Net(mid=InOut()), in_out, *MID),
)
