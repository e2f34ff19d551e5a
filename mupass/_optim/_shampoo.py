"""Shampoo with width-aware learning rates and damping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mupass._factors import factor_dtype
from mupass._optim._banks import Bank
from mupass._optim._base import PlannedOptimizer, check_choice, check_number, check_period
from mupass._optim._blocks import Blocking
from mupass._plan import OptimizerSpec

MODES = ("relative", "absolute", "trace")
Slot = tuple[str, int]  # parameter, block


class Shampoo(PlannedOptimizer):
    """Shampoo, ``dW = -lr (L + rho_L)^(-e/2) G (R + rho_R)^(-e/2)``, ``L = avg G G^T``, ``R = avg G^T G``.

    ``e`` is the total power (Ishikawa & Karakida, arXiv 2312.12226, eq. 3): 1/2 is the usual quarter power
    on each side. Matrices are ``[fan_out, fan_in]`` by the plan's axes, kernels flattened into fan_in,
    whatever the layout; fused parameters (qkv) are split into their matrices. Matrices larger than
    ``block_size`` are cut into blocks; the plan's learning rate is corrected by ``(blocks at base width /
    blocks)^e`` (Qiu et al., arXiv 2512.05620, table of learning rates), so keep ``block_size`` the same at
    all widths.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        damping: Damping; by default relative to the largest eigenvalue of each factor.
        e: Total power.
        momentum: Weight of past directions.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        factor_decay: Weight of past factors in their moving average; 1 sums them without forgetting.
        root_every: Steps between recomputations of the roots.
        damping_mode: ``relative``, ``absolute`` (times the plan's factor) or ``trace``.
        block_size: Largest side of a block.
        fallback: ``adamw`` or ``sgd``, for vectors and tables that no activation is contracted with.
        fallback_lr: Learning rate of the fallback at the base width.
        strict: Raise when any parameter falls back.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float = 1e-6,
        *,
        e: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.95,
        root_every: int = 1,
        damping_mode: str = "relative",
        block_size: int = 1024,
        fallback: str = "adamw",
        fallback_lr: float = 1e-3,
        strict: bool = False,
    ) -> None:
        check_number("e", e)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1.0000001)
        self.root_every = check_period("root_every", root_every)
        self.damping_mode = check_choice("damping_mode", damping_mode, MODES)
        self.block_size = check_period("block_size", block_size)
        super().__init__(
            model,
            OptimizerSpec("shampoo", e=e),
            lr,
            damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fallback=fallback,
            fallback_lr=fallback_lr,
            strict=strict,
        )
        self._banks = {side: self._make_banks(side) for side in ("left", "right")} if e > 0 else {}

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        own, reasons, self._blockings = {}, {}, {}
        for name in self.names.values():
            geometry = self.plan[name].geometry
            if not geometry.fan_in_axes or not geometry.fan_out_axes:
                reasons[name] = "it is no matrix: no activation is contracted with it"
                continue
            self._blockings[name] = Blocking(geometry, self.block_size)
            count = len(self._blockings[name].cut(torch.empty(geometry.shape, device="meta")))
            own[name] = f"shampoo x{count}" if count > 1 else "shampoo"
        self._parameters = {n: p for p, n in self.names.items() if n in own}
        return own, reasons

    def _correction(self, name: str) -> float:
        return float(self._blockings[name].growth() ** -self.spec.e)

    def _make_banks(self, side: str) -> list[Bank]:
        shapes: dict[Any, list[Slot]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            dtype = factor_dtype(parameter)
            for i, block in enumerate(self._blockings[name].cut(parameter)):
                n = block.shape[0 if side == "left" else 1]
                shapes[(n, n), dtype, parameter.device].append((name, i))
        return [Bank(slots, *key) for key, slots in shapes.items()]

    def _directions(self) -> dict[Tensor, Tensor]:
        blocks = {
            n: self._blockings[n].cut(p.grad) for n, p in self._parameters.items() if p.grad is not None
        }
        if not self._banks:
            return {self._parameters[n]: self._parameters[n].grad for n in blocks}  # type: ignore[misc]
        for side, banks in self._banks.items():
            for bank in banks:
                self._average(bank, side, blocks)
                if self._steps % self.root_every == 0:
                    self._refresh(bank, side)
        roots = {side: _slots(banks) for side, banks in self._banks.items()}
        directions: dict[Tensor, Tensor] = {}
        for name, pieces in blocks.items():
            parts = []
            for i, g in enumerate(pieces):
                left, right = roots["left"][name, i], roots["right"][name, i]
                parts.append((left @ g.to(left.dtype) @ right).to(g.dtype))
            parameter = self._parameters[name]
            directions[parameter] = self._blockings[name].paste(parts, parameter)
        return directions

    def _average(self, bank: Bank, side: str, blocks: Mapping[str, list[Tensor]]) -> None:
        """Add ``G G^T`` or ``G^T G`` to the averages; a parameter without a gradient keeps its own."""
        new = {}
        for name, i in bank.keys:
            if name in blocks:
                g = blocks[name][i].to(bank.factors.dtype)
                new[name, i] = g @ g.mT if side == "left" else g.mT @ g
        for slot in bank.average(new, self.factor_decay):
            self.count("overflowed_factors", _place(side, slot))

    def _refresh(self, bank: Bank, side: str) -> None:
        dampings = self._dampings()
        damping = bank.weight.new_tensor([dampings[name] for name, _ in bank.keys])
        if self.damping_mode == "trace":
            damping = damping * bank.traces()
        elif self.damping_mode == "absolute":
            scales = [self.plan[name].scales for name, _ in bank.keys]
            factors = [s.damping_out if side == "left" else s.damping_in for s in scales]
            # A block's gradient is one of so many: its factors are smaller by their number.
            blocks = damping.new_tensor([self._blockings[name].growth() for name, _ in bank.keys])
            damping = damping * damping.new_tensor(factors) / blocks
        failed = bank.refresh(damping, self.spec.e / 2, relative=self.damping_mode == "relative")
        for i in failed.nonzero().flatten().tolist():
            self.count("failed_roots", _place(side, bank.keys[i]))

    def _layout(self) -> Any:
        return {side: [b.layout() for b in banks] for side, banks in self._banks.items()}

    def _extra_state(self) -> dict[str, Any]:
        return {"banks": {side: [b.state_dict() for b in banks] for side, banks in self._banks.items()}}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        for side, banks in self._banks.items():
            for bank, saved in zip(banks, state["banks"][side], strict=True):
                bank.load_state_dict(saved)


def _place(side: str, slot: Slot) -> str:
    return f"{side} factor of {slot[0]}, block {slot[1]}"


def _slots(banks: list[Bank]) -> dict[Slot, Tensor]:
    return {key: root for bank in banks for key, root in zip(bank.keys, bank.roots, strict=True)}
