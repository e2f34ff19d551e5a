"""Every optimizer in every trainer takes the steps of a plain loop."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

STEPS, ROWS, WIDTH = 5, 64, 12
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "kfac": lambda model: mupass.KFAC(model, loss_terms=ROWS),
    "ekfac": lambda model: mupass.KFAC(model, loss_terms=ROWS, ekfac=True),
    "shampoo": lambda model: mupass.Shampoo(model, 0.01),
    "soap": lambda model: mupass.SOAP(model, 0.01),
    "muon": lambda model: mupass.Muon(model, 0.01, fallback_lr=1e-3),
    "adamw": lambda model: torch.optim.AdamW(mupass.param_groups(model, 0.01, weight_decay=0.1)),
}


class Classifier(nn.Module):
    """Returns its loss as well, as models of Hugging Face do.

    All matrices are square, so that factors have full rank: eigenvectors to eigenvalues of zero are rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.hidden = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(F.relu(self.hidden(self.norm(F.relu(self.up(x))))))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def model() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Classifier().double(), torch.randn(2, WIDTH, dtype=torch.float64), base=6)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return [{"x": row, "labels": row.argmax()} for row in x]


def batch() -> dict[str, Tensor]:
    return torch.utils.data.default_collate(rows())


def in_a_loop(net: nn.Module, make: Callable[[nn.Module], Any], folder: Path) -> None:
    optimizer = make(net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(**batch())["loss"].backward()
        optimizer.step()


def by_lightning(net: nn.Module, make: Callable[[nn.Module], Any], folder: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return make(self.net)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=STEPS, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(rows(), batch_size=ROWS))


def by_transformers(net: nn.Module, make: Callable[[nn.Module], Any], folder: Path) -> None:
    import transformers

    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    transformers.Trainer(net, arguments, train_dataset=rows(), optimizers=(make(net), None)).train()


def by_accelerate(net: nn.Module, make: Callable[[nn.Module], Any], folder: Path) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(rows(), batch_size=ROWS)
    prepared, optimizer, loader = accelerator.prepare(net, make(net), loader)
    for _ in range(STEPS):
        for part in loader:
            optimizer.zero_grad()
            accelerator.backward(prepared(**part)["loss"])
            optimizer.step()


TRAINERS = {"lightning": by_lightning, "transformers": by_transformers, "accelerate": by_accelerate}


@pytest.mark.thin(2)
@pytest.mark.zoo
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("library", TRAINERS)
def test_a_trainer_takes_the_steps_of_a_plain_loop(library: str, name: str, tmp_path: Path) -> None:
    needed = [library, "accelerate"] if library == "transformers" else [library]
    if any(importlib.util.find_spec(package) is None for package in needed):
        pytest.skip(f"{' or '.join(needed)} is not installed")
    want, found = model(), model()
    before = {key: value.clone() for key, value in want.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # what these libraries warn of is theirs
        in_a_loop(want, OPTIMIZERS[name], tmp_path)
        TRAINERS[library](found, OPTIMIZERS[name], tmp_path)
    assert not [w for w in caught if issubclass(w.category, mupass.MupassWarning)]
    for key, value in want.state_dict().items():
        assert not torch.equal(value, before[key])
        # Rows may come in another order, which changes sums in the last digits.
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-5, atol=1e-8)
