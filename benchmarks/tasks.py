"""Small training tasks, deterministic by seed, that `defaults`, `quality` and `evidence` share.

A task gives a model of any width, endless batches of any size, and the loss on held-out data. Images are
Fashion-MNIST, characters the sources of Python's standard library; the others make their data:

* ``regression``: a fixed random network of two layers on 32 Gaussian inputs, with noise of deviation 0.1;
* ``staircase``: ``y = (x1 + x1 x2 + x1 x2 x3) / sqrt(3)`` of 128 signs (Abbe et al., arXiv 2202.08658);
* ``image_pairs``: two images of Fashion-MNIST side by side, each with a sign by its class; the target is the
  product of the signs, which no sum of something of each image tells.

All three are half mean squared errors. Widths are those of hidden layers, channels, or token vectors, in
which heads keep their size of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import GPT, CharacterLSTM, ViT, cnn, mlp, plain_cnn, resnet
from examples.data import fashion_mnist, python_text, signs

HEAD = 16
IMAGES = 32_000  # more than any run here sees
CHUNK = 256  # samples that are evaluated at once
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        build: Width -> model.
        batches: Batch size, seed -> endless batches; images and text come once before any comes again.
        loss: Outputs, targets -> mean loss.
        test: Inputs and targets that are in no batch.
        base: Width at which hyperparameters mean what they say.
    """

    build: Callable[[int], nn.Module]
    batches: Callable[[int, int], Batches]
    loss: Callable[[Tensor, Tensor], Tensor]
    test: tuple[Tensor, Tensor]
    base: int

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Return the mean loss on held-out data in evaluation mode; the model's mode stays."""
        training = model.training
        model.eval()
        total = 0.0
        for x, y in zip(*(data.split(CHUNK) for data in self.test), strict=True):
            total += len(x) * self.loss(model(x), y).item()
        model.train(training)
        return total / len(self.test[0])


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples, or over all tokens of all sequences."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(outputs, targets)


def shuffled(x: Tensor, y: Tensor, batch: int, generator: torch.Generator) -> Batches:
    """One pass in random order."""
    for rows in torch.randperm(len(x), generator=generator).split(batch):
        yield x[rows], y[rows]


def passes(x: Tensor, y: Tensor, batch: int, seed: int) -> Batches:
    """Pass after pass, each in an order of its own, whole batches only."""
    generator = torch.Generator().manual_seed(seed)
    if batch > len(x):
        raise ValueError(f"a batch of {batch} from {len(x)} samples")
    while True:
        for rows, targets in shuffled(x, y, batch, generator):
            if len(rows) == batch:
                yield rows, targets


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut text into sequences, with the next character of each position as its target."""
    rows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    return rows[:, :-1], rows[:, 1:]


def images(
    folder: str | None,
    build: Callable[[int], nn.Module],
    base: int,
    size: int = 14,
    flat: bool = False,
    tests: int = 512,
) -> Task:
    """Fashion-MNIST, at 28 x 28 or averaged to 14 x 14."""
    data = fashion_mnist(folder, IMAGES, tests)
    halves = [F.avg_pool2d(x, 28 // size) for x in (data.train_x, data.test_x)]
    train, test = (x.flatten(1) if flat else x for x in halves)
    return Task(build, partial(passes, train, data.train_y), cross_entropy, (test, data.test_y), base)


def characters(
    build: Callable[[int, int], nn.Module], base: int, length: int = 16, tests: int = 2048
) -> Task:
    """Text; ``build`` takes the width and the size of the alphabet, ``tests`` counts characters."""
    ids, alphabet = python_text(1_000_000)
    train, (x, y) = windows(ids[:900_000], length), windows(ids[900_000:], length)
    # Held-out sequences from all over the end of the text: neighbours are much alike.
    rows = torch.linspace(0, len(x) - 1, tests // length).long()
    return Task(
        lambda width: build(width, len(alphabet)),
        partial(passes, *train),
        cross_entropy,
        (x[rows], y[rows]),
        base,
    )


def made(
    sample: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    build: Callable[[int], nn.Module],
    base: int,
    tests: int = 4096,
) -> Task:
    """Data that is made as it is needed, so that no sample comes twice."""
    test = sample(tests, torch.Generator().manual_seed(2**31))
    return Task(build, partial(endless, sample), half_squares, test, base)


def endless(
    sample: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], batch: int, seed: int
) -> Batches:
    """Batch after batch of new samples."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sample(batch, generator)


def noisy_teacher(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian inputs and what a fixed random network says of them, plus noise."""
    fixed = torch.Generator().manual_seed(0)
    first, second = torch.randn(32, 64, generator=fixed), 2 * torch.randn(64, 4, generator=fixed)
    x = torch.randn(n, 32, generator=generator)
    y = torch.tanh(2 * x @ first / sqrt(32)) @ second / sqrt(64)
    return x, y + 0.1 * torch.randn(n, 4, generator=generator)


def pairs_of(x: Tensor, signs: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pairs of images side by side ``[n, 2 d]``, and the products of their signs ``[n, 1]``."""
    left, right = torch.randint(len(x), (2, n), generator=generator)
    return torch.cat([x[left], x[right]], 1), signs[left, None] * signs[right, None]


def image_pairs(folder: str | None, base: int, tests: int = 4096) -> Task:
    """Pairs at 14 x 14 pixels; the sign is +1 for even classes (tops, bags) and -1 for odd ones.

    Images of a batch are training images, those of held-out pairs are test images.
    """
    data = fashion_mnist(folder, IMAGES, 10_000)
    train, test = (F.avg_pool2d(x, 2).flatten(1) for x in (data.train_x, data.test_x))
    train_signs, test_signs = (1.0 - 2.0 * (y % 2) for y in (data.train_y, data.test_y))
    held_out = pairs_of(test, test_signs, tests, torch.Generator().manual_seed(2**31))
    build = partial(mlp, inputs=2 * train.shape[1], outputs=1)
    return Task(build, partial(endless, partial(pairs_of, train, train_signs)), half_squares, held_out, base)


def gpt(width: int, vocabulary: int, layers: int = 1, length: int = 16, tied: bool = False) -> nn.Module:
    return GPT(width, layers, vocabulary, length, HEAD, tied)


def training(
    model: nn.Module, optimizers: Sequence[Any], task: Task, batches: Batches, steps: int, bound: float
) -> Iterator[float]:
    """Train, and yield each batch's loss from before its step; end at one that is above the bound or NaN."""
    for x, y in islice(batches, steps):
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Optimizer):  # kfac-pytorch's preconditioner is none
                optimizer.zero_grad()
        loss = task.loss(model(x), y)
        value = loss.item()
        if not value <= bound:
            yield value
            return
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        yield value


def vit(width: int) -> nn.Module:
    return ViT(width, 1, 28, 7, HEAD)


# Base width; and the task, of the base width and a folder with Fashion-MNIST (None: look for it). The first
# ten are those of `defaults`, the next four those of `quality`; `evidence` has one more.
TASKS: dict[str, tuple[int, Callable[[int, str | None], Task]]] = {
    "mlp": (32, lambda base, folder: images(folder, partial(mlp, inputs=196), base, flat=True)),
    "cnn": (8, lambda base, folder: images(folder, plain_cnn, base)),
    "cnn_norm": (4, lambda base, folder: images(folder, cnn, base)),
    "resnet": (8, lambda base, folder: images(folder, resnet, base)),
    "gpt": (32, lambda base, folder: characters(gpt, base)),
    "gpt_tied": (32, lambda base, folder: characters(partial(gpt, tied=True), base)),
    "vit": (32, lambda base, folder: images(folder, vit, base, size=28)),
    "lstm": (32, lambda base, folder: characters(CharacterLSTM, base)),
    "regression": (32, lambda base, folder: made(noisy_teacher, partial(mlp, inputs=32, outputs=4), base)),
    "staircase": (64, lambda base, folder: made(signs, partial(mlp, inputs=128, outputs=1), base)),
    "mlp_28": (128, lambda base, folder: images(folder, mlp, base, size=28, flat=True)),
    "cnn_28": (32, lambda base, folder: images(folder, plain_cnn, base, size=28)),
    "gpt_64": (64, lambda base, folder: characters(partial(gpt, layers=2, length=64), base, 64)),
    "gpt_128": (128, lambda base, folder: characters(partial(gpt, layers=2, length=64), base, 64)),
    "image_pairs": (64, lambda base, folder: image_pairs(folder, base)),
}


@cache
def task(name: str, folder: str | None = None) -> Task:
    """Return a task with its data, which is read once a process."""
    base, make = TASKS[name]
    return make(base, folder)
