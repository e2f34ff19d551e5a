"""K-FAC with width-aware learning rates and damping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._factors import factor_dtype
from mupass._optim._banks import Bank
from mupass._optim._base import PlannedOptimizer, check_choice, check_number, check_period
from mupass._optim._damping import MODES, Sides, damp
from mupass._optim._parallel import sum_over_ranks, world_size
from mupass._plan import OptimizerSpec
from mupass._taps import Tap, Tapped, eligible, tap_of
from mupass._terms import terms_tap_of


class KFAC(PlannedOptimizer):
    """Kronecker-factored approximate curvature, ``dW = -lr (B + rho_B)^-e_b G (A + rho_A)^-e_a``.

    ``A = E[x x^T]`` averages over batch and positions; ``B = E[delta delta^T]`` averages over loss terms and
    sums over the positions that share one, with ``delta`` the gradient of one loss term (Ishikawa & Karakida,
    arXiv 2312.12226, eq. 2). Learning rates carry the width factors of the plan. Biases are blocks of their
    own, with the layer's B and ``A = 1``: folded into A, a hidden bias would learn like 1/width.

    Momentum accumulates preconditioned directions. Factors are moving averages, corrected for their start.
    The loss must be a mean over its terms (the default of PyTorch's losses) unless ``loss_reduction="sum"``.
    It must not be scaled on curvature steps: under a GradScaler, B would carry the square of its scale.

    ``lr`` and ``damping`` are keys of the parameter groups, for schedules. Steps in which a gradient is NaN
    or infinite are skipped and counted in `stats`, and what was due at them is done at the next.

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
            default counted on the model's first output, its class axis left out: samples for a classifier,
            tokens for a language model. Needed where the model returns its loss, or where the loss skips
            many entries (``ignore_index``).
        loss_reduction: ``mean`` or ``sum``.
        strict: Raise when any parameter falls back.
        data_parallel: Whether ranks train on parts of one batch, so that factors are summed over them. By
            default yes where torch.distributed runs with several ranks.

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
        data_parallel: bool | None = None,
    ) -> None:
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
        self._ranks = world_size(data_parallel)
        super().__init__(
            model,
            OptimizerSpec("kfac", e_a=e_a, e_b=e_b),
            lr,
            damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fallback=fallback,
            fallback_lr=fallback_lr,
            strict=strict,
        )
        self._taps = {t.weight: _tap(self.root, t) for t in self._layers}
        self._open()
        self._banks = {side: self._make_banks(side) for side in ("a", "b", "bias")}
        self._bias_rho: dict[str, Tensor] = {}
        self._collecting = self._rooted = False  # factors are due at this step; roots were computed at all
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
            dtype = factor_dtype(weight)
            self._taps[tapped.weight].open(weight.device, dtype, self.spec.e_a > 0, self.spec.e_b > 0)
        terms = terms_tap_of(self.root)
        if terms is None:
            raise OptimizerError("the model has lost its taps; transform it again")
        self._terms = terms
        if self._layers and self.spec.e_b > 0 and self.loss_terms is None:
            terms.open(self._parameters[self._layers[-1].weight].device)

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
        self._collecting |= self._steps % self.factor_every == 0
        self._terms.collect(self._collecting)
        for tap in self._taps.values():
            tap.collect(self._collecting)

    def _discard(self) -> None:
        self._terms.clear()
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
        if self._collecting and self._layers:
            self._collecting = not self._average(self._harvest())
            if not self._collecting and (self._steps % self.root_every == 0 or not self._rooted):
                self._refresh()
        elif self._steps % self.root_every == 0 and self._rooted:
            self._refresh()
        return self._precondition()

    def _harvest(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Turn the raw sums into expectations: A over rows, B over loss terms."""
        sums = {name: found for name, tap in self._taps.items() if (found := tap.take()) is not None}
        if not sums:
            return {}
        terms = self._count_terms() if self.spec.e_b > 0 else 1.0
        if self._ranks > 1:
            sums, terms = self._over_ranks(sums, terms)
        factors = {}
        for name, (a, b, rows) in sums.items():
            if b is not None:
                # Each rank's mean divides by its own share of the terms.
                b = b * terms / self._ranks**2 if self.loss_reduction == "mean" else b / terms
            factors[name] = (None if a is None else a / rows, b)
        return factors

    def _over_ranks(
        self, sums: Mapping[str, tuple[Tensor | None, Tensor | None, Tensor]], terms: Tensor | float
    ) -> tuple[dict[str, tuple[Tensor | None, Tensor | None, Tensor]], Tensor]:
        """Sum raw factors, rows and loss terms over all ranks: the factors of the whole batch."""
        rows = next(iter(sums.values()))[2]
        flat = [x for found in sums.values() for x in found if x is not None]
        *flat, total = sum_over_ranks([*flat, torch.as_tensor(terms, dtype=rows.dtype, device=rows.device)])
        rest = iter(flat)
        summed = {n: tuple(None if x is None else next(rest) for x in found) for n, found in sums.items()}
        return summed, total  # type: ignore[return-value]

    def _count_terms(self) -> Tensor | float:
        if self.loss_terms is not None:
            return float(self.loss_terms() if callable(self.loss_terms) else self.loss_terms)
        counted = self._terms.take()
        if counted is None:
            raise OptimizerError(
                "cannot tell how many terms the loss averages over: the model returns a scalar, or the loss "
                "is not computed from its first output. Pass loss_terms=, a number or a function of no "
                "arguments (samples for a classifier, tokens for a language model)"
            )
        return counted

    def _average(self, factors: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> bool:
        """Add new factors to the averages, and return whether there were any."""
        if not factors:
            self.count("steps_without_factors", "no tapped layer took part in the backward pass")
            return False
        for side, banks in self._banks.items():
            for bank in banks:
                new = {}
                for key in bank.keys:
                    found = factors[key[0]][0 if side == "a" else 1] if key[0] in factors else None
                    if found is not None:
                        new[key] = found if bank.diagonal else found[key[1]]
                for name, _ in bank.average(new, self.factor_decay):
                    self.count("overflowed_factors", f"factor {side.upper()} of {name}")
        return True

    def _refresh(self) -> None:
        """Recompute all inverse roots, each bank at once."""
        rho: dict[tuple[str, Any], Tensor] = {}
        slots = [(t.weight, g) for t in self._layers for g in range(t.layer.groups)]
        for bias in (False, True):
            chosen = [s for s in slots if not bias or s[0] in self._biases]
            if not chosen:
                continue
            rho_a, rho_b = damp(self.damping_mode, self._sides(chosen, bias))
            for slot, a, b in zip(chosen, rho_a, rho_b, strict=True):
                rho["bias_a" if bias else "a", slot] = a
                rho["bias" if bias else "b", slot] = b
        self._bias_rho = {
            t.weight: torch.stack([rho["bias_a", (t.weight, g)] for g in range(t.layer.groups)])
            for t in self._layers
            if t.weight in self._biases
        }
        for side, power in (("a", self.spec.e_a), ("b", self.spec.e_b), ("bias", self.spec.e_b)):
            for bank in self._banks[side]:
                failed = bank.refresh(torch.stack([rho[side, key] for key in bank.keys]), power)
                for i in failed.nonzero().flatten().tolist():
                    self.count("failed_roots", f"factor {side.upper()} of {bank.keys[i][0]}")
        self._rooted = True
        self._warn_zero_traces()

    def _warn_zero_traces(self) -> None:
        for bank in self._banks["b"]:
            for i in ((bank.traces() <= 0) & (bank.weight > 0)).nonzero().flatten().tolist():
                self.count(
                    "zero_traces",
                    f"{bank.keys[i][0]} receives no gradient (is the readout zero?); its update is 0",
                )

    def _sides(self, slots: list[tuple[str, int]], bias: bool) -> Sides:
        weights = [self._parameters[name] for name, _ in slots]
        ones = torch.ones(len(slots), dtype=factor_dtype(weights[0]), device=weights[0].device)
        layers = {t.weight: t.layer for t in self._layers}
        dim_a = ones if bias else ones.new_tensor([layers[n].inputs for n, _ in slots])
        dim_b = ones.new_tensor([layers[n].outputs for n, _ in slots])
        names = [(self._biases[n] or n) if bias else n for n, _ in slots]
        scales, dampings = [self.plan[n].scales for n in names], self._dampings()
        return Sides(
            trace_a=ones if bias else self._traces("a", slots, dim_a),
            trace_b=self._traces("b", slots, dim_b),
            dim_a=dim_a,
            dim_b=dim_b,
            scale_a=ones.new_tensor([s.damping_in for s in scales]),
            scale_b=ones.new_tensor([s.damping_out for s in scales]),
            damping=ones.new_tensor([dampings[n] for n in names]),
        )

    def _traces(self, side: str, slots: list[tuple[str, int]], dims: Tensor) -> Tensor:
        """Return traces; a side with power 0 has no factor, it counts as the identity."""
        found: dict[tuple[str, int], Tensor] = {}
        for bank in self._banks[side]:
            found.update(zip(bank.keys, bank.traces(), strict=True))
        return torch.stack([found.get(slot, dim) for slot, dim in zip(slots, dims, strict=True)])

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
        directions: dict[Tensor, Tensor] = {}
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
            blocks = blocks / (1 + rho.view(-1, 1, 1)) ** self.spec.e_a
        return blocks.reshape(grad.shape).to(grad.dtype)

    def _layout(self) -> Any:
        return {side: [b.layout() for b in banks] for side, banks in self._banks.items()}

    def _extra_state(self) -> dict[str, Any]:
        banks = {side: [b.state_dict() for b in banks] for side, banks in self._banks.items()}
        schedule = {"collecting": self._collecting, "rooted": self._rooted}
        return {"banks": banks, "bias_rho": dict(self._bias_rho), **schedule}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        for side, banks in self._banks.items():
            for bank, saved in zip(banks, state["banks"][side], strict=True):
                bank.load_state_dict(saved)
        self._bias_rho = {name: rho.clone() for name, rho in state["bias_rho"].items()}
        self._collecting, self._rooted = state["collecting"], state["rooted"]


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
