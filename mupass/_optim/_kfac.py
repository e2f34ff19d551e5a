"""K-FAC with width-aware learning rates and damping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim._banks import Bank
from mupass._optim._base import PlannedOptimizer, check_choice, check_number, check_period
from mupass._optim._damping import MODES, Sides, damp
from mupass._plan import OptimizerSpec
from mupass._taps import Tap, Tapped, eligible, tap_of


class KFAC(PlannedOptimizer):
    """Kronecker-factored approximate curvature, ``dW = -lr (B + rho_B)^-e_b G (A + rho_A)^-e_a``.

    ``A = E[x x^T]`` averages over batch and positions; ``B = E[delta delta^T]`` averages over loss terms and
    sums over the positions that share one, with ``delta`` the gradient of one loss term (Ishikawa & Karakida,
    arXiv 2312.12226, eq. 2). Learning rates carry the width factors of the plan. Biases are blocks of their
    own, with the layer's B and ``A = 1``: folded into A, a hidden bias would learn like 1/width.

    Momentum accumulates preconditioned directions. Factors are moving averages, corrected for their start.
    The loss must be a mean over its terms (the default of PyTorch's losses) unless ``loss_reduction="sum"``.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        damping: Damping; by default relative to the trace of each factor, so it means the same at all widths.
        e_a: Power of A; 0 leaves the input side out (and does not collect it).
        e_b: Power of B; ``e_a=1, e_b=0`` is FOOF.
        momentum: Weight of past directions.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        factor_decay: Weight of past factors in the moving averages.
        factor_every: Steps between collections of factors; steps in between run the cheap graph.
        root_every: Steps between recomputations of the inverses.
        damping_mode: ``trace``, ``absolute`` or ``pi`` (`mupass` docs: scale table).
        fallback: ``adamw`` or ``sgd``, for parameters that K-FAC does not take (see `coverage`).
        fallback_lr: Learning rate of the fallback at the base width.
        loss_terms: Number of terms that the loss averages over, or a function of no arguments giving it. By
            default the rows of the last readout layer: samples for a classifier, tokens for a language model.
        loss_reduction: ``mean`` or ``sum``.
        strict: Raise when any parameter falls back.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float = 1e-3,
        *,
        e_a: float = 1.0,
        e_b: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.95,
        factor_every: int = 1,
        root_every: int = 1,
        damping_mode: str = "trace",
        fallback: str = "adamw",
        fallback_lr: float = 1e-3,
        loss_terms: int | Callable[[], int] | None = None,
        loss_reduction: str = "mean",
        strict: bool = False,
    ) -> None:
        self.damping = check_number("damping", damping)
        check_number("e_a", e_a)
        check_number("e_b", e_b)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1)
        self.factor_every = check_period("factor_every", factor_every)
        self.root_every = check_period("root_every", root_every)
        self.damping_mode = check_choice("damping_mode", damping_mode, MODES)
        self.loss_reduction = check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        if loss_terms is not None and not callable(loss_terms):
            check_period("loss_terms", loss_terms)
        self.loss_terms = loss_terms
        super().__init__(
            model,
            OptimizerSpec("kfac", e_a=e_a, e_b=e_b),
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            fallback=fallback,
            fallback_lr=fallback_lr,
            strict=strict,
        )
        self._taps = {t.weight: _tap(self.root, t) for t in self._layers}
        self._open()
        self._banks = {side: self._make_banks(side) for side in ("a", "b", "bias")}
        self._prepare_next()

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        layers, reasons = eligible(self.root, self.plan)
        trained = set(self.names.values())
        self._layers = [t for t in layers if t.weight in trained]
        self._parameters = {n: p for p, n in self.names.items()}
        own = {t.weight: f"kfac {t.layer.kind}" for t in self._layers}
        own |= {
            t.bias: "kfac bias"
            for t in self._layers
            if t.bias in trained and t.bias not in reasons and t.bias
        }
        self._biases = {t.weight: t.bias for t in self._layers if t.bias in own}
        frozen = {t.bias: "its weight is frozen, and with it the factors" for t in layers if t.bias}
        return own, frozen | dict(reasons)

    def _open(self) -> None:
        for tapped in self._layers:
            weight = self._parameters[tapped.weight]
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self._taps[tapped.weight].open(weight.device, dtype, self.spec.e_a > 0, self.spec.e_b > 0)

    def _make_banks(self, side: str) -> list[Bank]:
        """Put factors of equal shape, precision and device together.

        Biases take B with a damping of their own, so they have roots of their own, on copies of B.
        """
        shapes: dict[Any, list[tuple[str, int]]] = defaultdict(list)
        if (self.spec.e_a if side == "a" else self.spec.e_b) == 0:
            return []
        for tapped in self._layers:
            tap = self._taps[tapped.weight]
            if side == "bias" and (tapped.weight not in self._biases or self.damping_mode != "pi"):
                continue  # trace and absolute damping give weight and bias the same rho_B
            leaf = tap.a if side == "a" else tap.b
            assert leaf is not None
            diagonal = leaf.dim() == 1
            shape = tuple(leaf.shape) if diagonal else tuple(leaf.shape[1:])
            slots = [(tapped.weight, g) for g in range(1 if diagonal else leaf.shape[0])]
            shapes[shape, leaf.dtype, leaf.device] += slots
        return [Bank(slots, *key) for key, slots in shapes.items()]

    def _prepare_next(self) -> None:
        """Collect factors in the passes before a step that uses them."""
        for tap in self._taps.values():
            tap.collect(self._steps % self.factor_every == 0)

    def _discard(self) -> None:
        for tap in self._taps.values():
            tap.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the factors that were collected with them.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        if hasattr(self, "_taps"):
            self._discard()

    def _directions(self) -> dict[Tensor, Tensor]:
        if self._steps % self.factor_every == 0:
            self._average(self._harvest())
        if self._steps % self.root_every == 0 or self._steps == 0:
            self._refresh()
        return self._precondition()

    def _harvest(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Turn the raw sums into expectations: A over rows, B over loss terms."""
        sums = {name: found for name, tap in self._taps.items() if (found := tap.take()) is not None}
        if not sums:
            return {}
        terms = self._loss_terms({name: rows for name, (_, _, rows) in sums.items()})
        factors = {}
        for name, (a, b, rows) in sums.items():
            if b is not None:
                b = b * terms if self.loss_reduction == "mean" else b / terms
            factors[name] = (None if a is None else a / rows, b)
        return factors

    def _loss_terms(self, rows: Mapping[str, Tensor]) -> Tensor | float:
        if self.loss_terms is not None:
            return float(self.loss_terms() if callable(self.loss_terms) else self.loss_terms)
        readouts = [name for name in rows if self.plan[name].geometry.role == "output"]
        return rows[(readouts or list(rows))[-1]]

    def _average(self, factors: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
        if not factors:
            self.count("steps_without_factors", "no tapped layer took part in the backward pass")
            return
        for side, banks in self._banks.items():
            for bank in banks:
                bank.average(self._stack(bank, 0 if side == "a" else 1, factors), self.factor_decay)

    def _stack(self, bank: Bank, index: int, factors: Mapping[str, Any]) -> Tensor:
        """Stack the new factors of one bank; a layer that took no part adds its present average."""
        rows, present = [], bank.value() if bank.weight else bank.factors
        for i, (name, group) in enumerate(bank.keys):
            new = factors[name][index] if name in factors else None
            rows.append(present[i] if new is None else new if bank.diagonal else new[group])
        return torch.stack(rows)

    def _refresh(self) -> None:
        """Recompute all inverse roots, each bank at once."""
        rho: dict[tuple[str, Any], Tensor] = {}
        slots = [(t.weight, g) for t in self._layers for g in range(t.layer.groups)]
        for bias in (False, True):
            chosen = [s for s in slots if not bias or s[0] in self._biases]
            if not chosen or not any(b.weight for banks in self._banks.values() for b in banks):
                continue
            rho_a, rho_b = damp(self.damping_mode, self.damping, self._sides(chosen, bias))
            for slot, a, b in zip(chosen, rho_a, rho_b, strict=True):
                rho["bias_a" if bias else "a", slot] = a
                rho["bias" if bias else "b", slot] = b
        self._bias_rho = {s[0]: r for (side, s), r in rho.items() if side == "bias_a" and s[1] == 0}
        for side, power in (("a", self.spec.e_a), ("b", self.spec.e_b), ("bias", self.spec.e_b)):
            for bank in self._banks[side]:
                failed = bank.refresh(torch.stack([rho[side, key] for key in bank.keys]), power)
                for i in failed.nonzero().flatten().tolist():
                    self.count("failed_roots", f"factor {side.upper()} of {bank.keys[i][0]}")
        self._warn_zero_traces()

    def _warn_zero_traces(self) -> None:
        for bank in self._banks["b"]:
            for i in (bank.traces() <= 0).nonzero().flatten().tolist():
                self.count(
                    "zero_traces",
                    f"{bank.keys[i][0]} receives no gradient (is the readout zero?); its update is 0",
                )

    def _sides(self, slots: list[tuple[str, int]], bias: bool) -> Sides:
        weights = [self._parameters[name] for name, _ in slots]
        dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        like = {"dtype": dtype, "device": weights[0].device}
        ones = torch.ones(len(slots), **like)
        layers = {t.weight: t.layer for t in self._layers}
        scales = [self.plan[self._biases[n] if bias else n].scales for n, _ in slots]
        return Sides(
            trace_a=ones if bias else self._traces("a", slots, ones),
            trace_b=self._traces("b", slots, ones),
            dim_a=ones if bias else torch.tensor([float(layers[n].inputs) for n, _ in slots], **like),
            dim_b=torch.tensor([float(layers[n].outputs) for n, _ in slots], **like),
            scale_a=torch.tensor([s.damping_in for s in scales], **like),
            scale_b=torch.tensor([s.damping_out for s in scales], **like),
        )

    def _traces(self, side: str, slots: list[tuple[str, int]], ones: Tensor) -> Tensor:
        found: dict[tuple[str, int], Tensor] = {}
        for bank in self._banks[side]:
            found.update(zip(bank.keys, bank.traces(), strict=True))
        # An embedding has one A for its single group; a side with power 0 has no factor and no damping.
        return torch.stack(
            [found.get(s, found.get((s[0], 0), one)) for s, one in zip(slots, ones, strict=True)]
        )

    def _root(self, side: str, name: str) -> Tensor | None:
        """Return the roots of one layer: ``[groups, n, n]``, or ``[n]`` for an embedding's A."""
        for bank in self._banks[side]:
            at = bank.slot.get((name, 0))
            if at is not None:
                if bank.diagonal:
                    return bank.roots[at]
                count = next(t.layer.groups for t in self._layers if t.weight == name)
                return bank.roots[at : at + count]
        return None

    def _precondition(self) -> dict[Tensor, Tensor]:
        directions = {}
        for tapped in self._layers:
            weight = self._parameters[tapped.weight]
            if weight.grad is not None:
                a, b = self._root("a", tapped.weight), self._root("b", tapped.weight)
                directions[weight] = _apply_roots(weight.grad, tapped, a, b)
            bias = self._parameters.get(self._biases.get(tapped.weight) or "")
            if bias is not None and bias.grad is not None:
                b = self._root("bias" if self._banks["bias"] else "b", tapped.weight)
                directions[bias] = self._bias_direction(bias.grad, tapped, b)
        return directions

    def _bias_direction(self, grad: Tensor, tapped: Tapped, b: Tensor | None) -> Tensor:
        blocks = grad.reshape(tapped.layer.groups, -1, 1)
        if b is not None:
            blocks = b @ blocks.to(b.dtype)
        rho = self._bias_rho.get(tapped.weight)
        if self.spec.e_a > 0 and rho is not None:
            blocks = blocks / (1 + rho) ** self.spec.e_a
        return blocks.reshape(grad.shape).to(grad.dtype)

    def _extra_state(self) -> dict[str, Any]:
        banks = {side: [b.state_dict() for b in banks] for side, banks in self._banks.items()}
        return {"banks": banks, "bias_rho": dict(getattr(self, "_bias_rho", {}))}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        for side, banks in self._banks.items():
            for bank, saved in zip(banks, state["banks"][side], strict=True):
                bank.load_state_dict(saved)
        self._bias_rho = dict(state["bias_rho"])


def _tap(root: nn.Module, tapped: Tapped) -> Tap:
    tap = tap_of(root.get_submodule(tapped.module))
    if tap is None:
        raise OptimizerError(f"{tapped.module} has lost its tap; transform the model again")
    return tap


def _apply_roots(grad: Tensor, tapped: Tapped, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Multiply a weight's gradient with the roots of its factors."""
    dtype = next((r.dtype for r in (a, b) if r is not None), grad.dtype)
    if tapped.layer.kind == "embedding":  # the weight is [table, features]: A on the left
        g = grad.to(dtype)
        g = g if a is None else a[:, None] * g
        return (g if b is None else g @ b[0]).to(grad.dtype)
    blocks = grad.reshape(tapped.layer.groups, tapped.layer.outputs, tapped.layer.inputs).to(dtype)
    if b is not None:
        blocks = b @ blocks
    if a is not None:
        blocks = blocks @ a
    return blocks.reshape(grad.shape).to(grad.dtype)
