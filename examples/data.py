"""Real data without a hub: Fashion-MNIST from wherever it lies, and text from Python's own sources."""

from __future__ import annotations

import gzip
import math
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path.home() / ".cache" / "mupass" / "fashion-mnist"
FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
HELP = """Fashion-MNIST was not found. Get it in one of these ways:
  apt-get install dataset-fashion-mnist                                          (Debian, Ubuntu)
  python -c "import torchvision as t; t.datasets.FashionMNIST('data', download=True)"   (then --data data)
  --data FOLDER with the four *-ubyte or *-ubyte.gz files"""


class DataError(RuntimeError):
    """The data is not there or not what it should be."""


@dataclass(frozen=True)
class Images:
    """Standardized images ``[n, 1, 28, 28]`` and labels ``[n]``, for training and test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device | str, flat: bool = False) -> Images:
        """Move to a device; ``flat`` turns images into rows of pixels."""
        xs = (x.flatten(1) if flat else x for x in (self.train_x, self.test_x))
        train_x, test_x = (x.to(device) for x in xs)
        return Images(train_x, self.train_y.to(device), test_x, self.test_y.to(device))


def fashion_mnist(folder: str | Path | None = None, train: int = 60_000, test: int = 10_000) -> Images:
    """Load the first images of Fashion-MNIST.

    Looks into ``folder`` (the files themselves, or a torchvision root), or if it is left out into Debian's
    package, ``./data`` and the cache. If none has it, it is fetched into the cache: as Debian's package where
    there is ``apt-get`` (no root needed), else by torchvision where that is installed.

    Args:
        folder: Where to look, and nowhere else.
        train: Number of training images.
        test: Number of test images.

    Returns:
        The images, standardized by the mean and deviation of all training pixels.

    Raises:
        DataError: It is nowhere, and the message says how to get it; or the files are damaged.
    """
    places = (Path(folder),) if folder else (DEBIAN, Path("data"), CACHE)
    found = next(filter(None, map(_find, places)), None)
    if found is None and folder is None and (_fetch_debian() or _fetch_torchvision()):
        found = _find(CACHE)
    if found is None:
        raise DataError(f"{folder}: no Fashion-MNIST files there\n{HELP}" if folder else HELP)
    parts = {key: read_idx(found[key]) for key in FILES}
    for split in ("train", "test"):
        if len(parts[f"{split}_images"]) != len(parts[f"{split}_labels"]):
            raise DataError(f"{found[f'{split}_images'].parent}: as many {split} images as labels expected")
    mean, std = 0.2860, 0.3530
    xs = [
        (parts[k][:n].float() / 255 - mean).div(std).unsqueeze(1)
        for k, n in (("train_images", train), ("test_images", test))
    ]
    return Images(xs[0], parts["train_labels"][:train].long(), xs[1], parts["test_labels"][:test].long())


def _find(root: Path) -> dict[str, Path] | None:
    """Return the four files below a folder, or None."""
    for folder in (root, root / "FashionMNIST" / "raw"):
        found = {k: p for k, n in FILES.items() for p in (folder / n, folder / f"{n}.gz") if p.is_file()}
        if len(found) == len(FILES):
            return found
    return None


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes, compressed or not.

    Args:
        path: The file.

    Returns:
        Its values, of type uint8.

    Raises:
        DataError: The file is damaged.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            blob = stream.read()
        zero, kind, rank = struct.unpack_from(">HBB", blob)
        shape = struct.unpack_from(f">{rank}I", blob, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    body = blob[4 + 4 * rank :]
    if zero or kind != 8 or not body or len(body) != math.prod(shape):
        raise DataError(f"{path} is not a whole idx file of bytes")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)


def _fetch_debian() -> bool:
    """Download and unpack Debian's package into the cache; say so, and tell whether it worked."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return False
    print(f"fetching Debian's dataset-fashion-mnist (30 MB) into {CACHE} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for command in (["apt-get", "download", "dataset-fashion-mnist"], None):
            if command is None:  # package lists may be missing or old: root can renew them
                subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
                command = ["apt-get", "download", "dataset-fashion-mnist"]
            if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0:
                break
        packages = list(Path(folder).glob("*.deb"))
        if not packages:
            return False
        subprocess.run(["dpkg", "-x", packages[0], folder], check=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        for path in (Path(folder) / DEBIAN.relative_to("/")).glob("*.gz"):
            shutil.copy(path, CACHE / path.name)
    return True


def _fetch_torchvision() -> bool:
    """Download with torchvision into the cache, where it is installed; tell whether it worked."""
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError:
        return False
    print(f"fetching Fashion-MNIST with torchvision (30 MB) into {CACHE} ...", flush=True)
    try:
        FashionMNIST(CACHE, download=True)
    except (OSError, RuntimeError):
        return False
    return True


def python_text(characters: int = 1_000_000) -> tuple[Tensor, list[str]]:
    """Return text of Python's standard library as character ids, and the alphabet.

    Characters outside ASCII are left out.
    """
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += "".join(c for c in path.read_text(encoding="utf-8", errors="ignore") if c.isascii())
        if len(text) >= characters:
            break
    alphabet = sorted(set(text))
    code = {c: i for i, c in enumerate(alphabet)}
    return torch.tensor([code[c] for c in text[:characters]]), alphabet


def signs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``n`` rows of 128 random signs, and ``(x1 + x1 x2 + x1 x2 x3) / sqrt(3)`` of each.

    A linear fit leaves two thirds of it, and kernels need many more samples than a network that learns which
    of the signs count.
    """
    x = 2.0 * torch.randint(2, (n, 128), generator=generator) - 1
    return x, x[:, :3].cumprod(1).sum(1, keepdim=True) / math.sqrt(3)
