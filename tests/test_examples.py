"""The example, the sweep by hand beside it and the data loader, on files written here in the idx format."""

import gzip
import math
import re
import sqlite3
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import grid
from examples import data, fashion_mnist
from examples.data import DataError, read_idx


def idx(values: torch.Tensor) -> bytes:
    """Encode bytes as an idx file."""
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    return header + values.numpy().tobytes()


def write(folder: Path, compressed: bool, train: int = 96, test: int = 40) -> Path:
    """Write the four files; images of class k have their k-th pair of rows lit, so they can be learned."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", train), ("test", test)):
        labels = torch.arange(n, dtype=torch.uint8) % 10
        images = torch.randint(0, 60, (n, 28, 28), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label : 2 * label + 2] = 255
        for kind, values in (("images", images), ("labels", labels)):
            blob, name = idx(values), data.FILES[f"{split}_{kind}"]
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(blob) if compressed else blob)
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine that has no data and no way to fetch it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "_fetch_debian", lambda: False)
    monkeypatch.setattr(data, "_fetch_torchvision", lambda: False)
    return tmp_path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw"])
def test_folder_holds_files_or_is_a_torchvision_root(tmp_path, compressed, inside):
    write(tmp_path / "root" / inside, compressed)
    images = data.fashion_mnist(tmp_path / "root", train=50, test=20)
    assert images.train_x.shape == (50, 1, 28, 28) and images.test_x.shape == (20, 1, 28, 28)
    assert images.train_y.dtype == torch.long and images.train_y.tolist() == [i % 10 for i in range(50)]
    lit = (1 - 0.2860) / 0.3530
    assert torch.allclose(images.train_x[3, 0, 6:8], torch.full((2, 28), lit))
    assert images.train_x.max() <= lit + 1e-6
    flat = images.to("cpu", flat=True)
    assert flat.train_x.shape == (50, 784) and torch.equal(flat.train_x[7], images.train_x[7].flatten())


@pytest.mark.parametrize("place", ["debian", "data/FashionMNIST/raw", "cache"])
def test_usual_places_are_searched(nowhere, place):
    write(nowhere / place, compressed=True)
    assert len(data.fashion_mnist().train_y) == 96


def test_debian_comes_first_and_a_named_folder_alone(nowhere):
    write(nowhere / "debian", True, train=30)
    write(nowhere / "cache", True, train=60)
    assert len(data.fashion_mnist().train_y) == 30
    assert len(data.fashion_mnist(nowhere / "cache").train_y) == 60
    with pytest.raises(DataError, match="elsewhere: no Fashion-MNIST"):
        data.fashion_mnist(nowhere / "elsewhere")


def test_missing_data_names_all_ways(nowhere):
    with pytest.raises(DataError) as caught:
        data.fashion_mnist()
    assert all(way in str(caught.value) for way in ("apt-get install", "torchvision", "--data FOLDER"))


@pytest.mark.parametrize("way", ["_fetch_debian", "_fetch_torchvision"])
def test_what_is_fetched_is_used(nowhere, monkeypatch, way):
    monkeypatch.setattr(data, way, lambda: bool(write(nowhere / "cache", True)))
    assert len(data.fashion_mnist().train_y) == 96


def test_incomplete_folder_is_not_taken(nowhere):
    folder = write(nowhere / "some", True)
    (folder / f"{data.FILES['test_labels']}.gz").unlink()
    with pytest.raises(DataError, match="no Fashion-MNIST"):
        data.fashion_mnist(folder)


GOOD = idx(torch.arange(6, dtype=torch.uint8).reshape(2, 3))
DAMAGED = {
    "short body": GOOD[:-1],
    "long body": GOOD + b"x",
    "no header": b"\0\0",
    "half a header": GOOD[:7],
    "other type": GOOD.replace(b"\x08", b"\x0d", 1),
    "no idx at all": b"<!DOCTYPE html>",
}


def test_idx(tmp_path):
    (tmp_path / "good").write_bytes(GOOD)
    assert read_idx(tmp_path / "good").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("blob", DAMAGED.values(), ids=DAMAGED)
def test_damaged_idx(tmp_path, blob):
    (tmp_path / "bad").write_bytes(blob)
    with pytest.raises(DataError, match="bad"):
        read_idx(tmp_path / "bad")


@pytest.mark.parametrize("blob", [b"no gzip", gzip.compress(GOOD)[:-4]], ids=["no gzip", "cut off"])
def test_damaged_gzip(tmp_path, blob):
    (tmp_path / "bad.gz").write_bytes(blob)
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "bad.gz")


def test_images_and_labels_must_match(tmp_path):
    folder = write(tmp_path / "root", compressed=False)
    (folder / data.FILES["train_labels"]).write_bytes(idx(torch.zeros(5, dtype=torch.uint8)))
    with pytest.raises(DataError, match="train images"):
        data.fashion_mnist(folder)


def test_text_is_ascii_of_this_python():
    ids, alphabet = data.python_text(5000)
    assert len(ids) == 5000 and ids.max() < len(alphabet)
    text = "".join(alphabet[i] for i in ids.tolist())
    assert text.isascii() and "import" in text


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
def test_example_checks_sweeps_and_transfers(tmp_path, capsys, optimizer):
    pytest.importorskip("matplotlib")
    folder, store = write(tmp_path / "root", compressed=True, train=256), tmp_path / "runs.db"
    words = (
        f"--data {folder} --out {tmp_path / 'curves.png'} --optimizer {optimizer} --quick --batch 64 "
        f"--store {store}"
    )
    code = fashion_mnist.main(words.split())
    printed = capsys.readouterr().out
    verdicts = re.findall(r"^(mup|standard): (PASS|FAIL)", printed, re.M)
    assert code == 0 and verdicts == [("mup", "PASS"), ("standard", "FAIL")]
    assert re.search(
        r"held-out loss with lr = 0\.007812, .*\n +width +mup +standard\n +64 .*\n +256 ", printed
    )
    assert len(re.findall(r"width 64 +width 256", printed)) == 2
    assert "tuned at width 64, for a model of width 128" in printed
    assert float(re.search(r"test accuracy ([\d.]+) %", printed)[1]) > 20
    for parameterization in ("mup", "standard"):
        assert (tmp_path / f"curves_{parameterization}.png").read_bytes().startswith(b"\x89PNG")
    # Three rates, two widths, two parameterizations, and one rate of the first study; the proxy is known.
    with sqlite3.connect(store) as runs:
        assert runs.execute("select count(*) from runs").fetchone() == (12 + 4,)


def losses_at(widths: dict[int, float], lr: float) -> SimpleNamespace:
    """A sweep over one rate."""
    return SimpleNamespace(best=lambda width: {"lr": lr}, curve=lambda width, name: {lr: [widths[width]]})


@pytest.mark.parametrize(
    ("mup", "standard", "holds"),
    [
        ({64: 0.001, 256: 0.002, 1024: 0.0012}, {64: 0.001, 256: 0.002, 1024: 0.0025}, True),
        ({64: 0.001, 256: 0.001, 1024: 0.0009}, {64: 0.001, 256: 0.01, 1024: math.inf}, True),
        ({64: 0.001, 256: 0.001, 1024: 0.0013}, {64: 0.001, 256: 0.01, 1024: 0.01}, False),  # mup is worse
        ({64: 0.001, 256: 0.001, 1024: 0.0010}, {64: 0.001, 256: 0.01, 1024: 0.0019}, False),  # both are good
    ],
)
def test_example_tells_whether_the_rate_transfers(monkeypatch, capsys, mup, standard, holds):
    found = {"mup": losses_at(mup, 2.0**-7), "standard": losses_at(standard, 2.0**-6)}
    monkeypatch.setattr(
        fashion_mnist.mupass, "sweep", lambda *_, parameterization, **__: found[parameterization]
    )
    monkeypatch.setattr(found["standard"], "curve", lambda width, name: {2.0**-7: [standard[width]]})
    options = fashion_mnist.parse([])
    options.signs_steps = 1
    assert fashion_mnist.same_rate(options)[1] == holds
    printed = capsys.readouterr().out
    assert ("diverged" in printed) == math.isinf(standard[1024])


def test_example_without_data_ends_with_code_2(tmp_path, capsys):
    assert fashion_mnist.main(["--data", str(tmp_path), "--quick"]) == 2
    assert "apt-get install" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "optimizer", "widths"),
    [("mlp", "kfac", "16 32"), ("cnn", "shampoo", "4 8"), ("mlp", "adam", "16 32"), ("mlp", "sgd", "16 32")],
)
def test_the_sweep_by_hand_runs_end_to_end(tmp_path, capsys, model, optimizer, widths):
    pytest.importorskip("matplotlib")
    folder, out = write(tmp_path / "root", compressed=True), tmp_path / "curves.png"
    lrs = {
        "kfac": "2^-9 2^-4 2^20",
        "shampoo": "2^-9 2^-4 2^20",
        "adam": "2^-14 2^-7 2^20",
        "sgd": "2^-9 2^-4 2^20",
    }
    code = grid.main(
        f"--data {folder} --out {out} --model {model} --optimizer {optimizer} --widths {widths} --epochs 2 "
        f"--batch 32 --lrs {lrs[optimizer]}".split()
    )
    printed = capsys.readouterr().out
    assert code == 0 and out.read_bytes().startswith(b"\x89PNG")
    assert printed.count("best lr by width") == 2
    assert re.findall(r"^\w+: training loss", printed, re.M) == [
        "mup: training loss",
        "standard: training loss",
    ]
    # 2^20 blows up at every width and is shown, not raised; the minimum inside is bracketed and starred.
    # The bounds on K-FAC's step hold at any rate.
    assert printed.count("diverged") == (0 if optimizer == "kfac" else 4)
    assert "edge of the grid" not in printed
    rows = re.findall(r"^ +2\^-[47] .*$", printed, re.M)
    assert len(rows) == 2 and all(row.count("*") == 2 for row in rows)
    # At the base width, the first, both parameterizations are one and the same.
    assert rows[0].split("*")[0] == rows[1].split("*")[0]


@pytest.mark.slow
def test_all_runs_diverging_still_gives_a_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, out = write(tmp_path / "root", compressed=True), tmp_path / "curves.png"
    words = (
        f"--data {folder} --out {out} --optimizer sgd --widths 16 32 --lrs 2^30 2^31 --epochs 2 --batch 32"
    )
    assert grid.main(words.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("diverged") == 8 and printed.count("16: none, 32: none") == 2
    assert "*" not in printed and out.exists()


@pytest.mark.slow
def test_missing_data_ends_with_code_2(tmp_path, capsys):
    pytest.importorskip("tqdm")
    assert grid.main(["--data", str(tmp_path), "--quick"]) == 2
    assert "apt-get install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--lrs 0", "--lrs nan", "--lrs -1", "--lrs 2^x", "--widths 0", "--epochs -1", "--optimizer sophia"],
)
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as caught:
        grid.parse(words.split())
    assert caught.value.code == 2 and words.split()[0] in capsys.readouterr().err


def run(width: int, lr: float, loss: float) -> grid.Run:
    return grid.Run("mup", width, lr, loss, 0.5)


def test_best_knows_the_edges_of_the_grid():
    runs = [
        run(8, 0.1, 3.0),
        run(8, 0.4, 2.0),
        run(8, 0.2, 1.0),
        run(16, 0.1, 1.0),
        run(16, 0.2, 2.0),
        run(16, 0.4, 3.0),
    ]
    assert grid.best(runs, "mup", 8) == (runs[2], True)
    assert grid.best(runs, "mup", 16) == (runs[3], False)
    assert grid.steps_moved(runs, "mup") == 1
