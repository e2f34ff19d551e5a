"""Alignment exponents of a model in training (Everett et al., arXiv 2407.05872, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mupass._errors import MupassError
from mupass._scales.plan import plan_of

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Alignment:
    """How far the terms of a layer's sums add up: 1 when fully aligned, 1/2 when they are independent.

    With n the fan_in, ``RMS(A z) = n^p RMS(A) RMS(z)`` defines the exponent p of a matrix and its inputs. NaN
    where one of the two is zero, as the change of the weights before the first step.

    Attributes:
        alpha: Of the change of the weights and the inputs at the start, ``dW z0``.
        omega: Of the weights at the start and the change of the inputs, ``W0 dz``.
        both: Of both changes, ``dW dz``.
        total: Of the weights and the inputs as they are now, ``W z``.
    """

    alpha: float
    omega: float
    both: float
    total: float


class AlignmentProbe:
    """Measures `Alignment` of every layer against the weights at the time the probe was made."""

    def __init__(self, model: nn.Module) -> None:
        self.root, plan = plan_of(model)
        # Where fan_in does not grow there is nothing to align.
        grows = {entry.geometry.name for entry in plan.entries if entry.geometry.role in {"hidden", "output"}}
        self.layers = {
            name: layer
            for name, layer in self.root.named_modules()
            if isinstance(layer, LAYERS) and _weight_of(name) in grows
        }
        if not self.layers:
            raise MupassError("no nn.Linear or nn.Conv layer of this model has a fan_in that grows")
        self.start = {n: parameter.detach().clone() for n, parameter in self.root.named_parameters()}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Alignment]:
        """Run the model twice, with its weights as they are and as they were, and compare.

        The model runs in evaluation mode, so that dropout does not count as a change.

        Args:
            *args: As the model takes them.
            **kwargs: As the model takes them.

        Returns:
            Name of the layer -> exponents.
        """
        # Every module keeps its own mode: a part of the model may be in evaluation mode already.
        training = {module: module.training for module in self.root.modules()}
        self.root.eval()
        try:
            inputs = self._inputs({}, args, kwargs)
            first_inputs = self._inputs(self.start, args, kwargs)
        finally:
            for module, mode in training.items():
                module.training = mode
        return {
            name: self._compare(name, first_inputs[name], inputs[name])
            for name in self.layers
            if inputs.get(name)
        }

    def _inputs(self, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
        """Return the inputs of every call of every layer."""
        inputs_of: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, to=inputs_of[name]: to.append(inputs[0]))
            for name, layer in self.layers.items()
        ]
        try:
            functional_call(self.root, dict(weights), args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return inputs_of

    def _compare(self, name: str, before: list[Tensor], now: list[Tensor]) -> Alignment:
        layer = self.layers[name]
        start = self.start[_weight_of(name)]
        # W z = W0 z0 + dW z0 + W0 dz + dW dz: each term has an exponent of its own.
        change = layer.weight - start
        changes = [z - z0 for z, z0 in zip(now, before, strict=True)]
        return Alignment(
            alpha=_exponent(layer, change, before),
            omega=_exponent(layer, start, changes),
            both=_exponent(layer, change, changes),
            total=_exponent(layer, layer.weight, now),
        )


def alignment(model: nn.Module) -> AlignmentProbe:
    """Return a probe of how updates and activations align while a model trains.

    ``probe = mupass.alignment(model)`` before training, ``probe(x)`` at any time. The result is also an
    ``alignment=`` of `param_groups`. Rates for ``none`` are larger by the root of the width, and are stable
    only where alpha is near 1/2 (Everett et al., arXiv 2407.05872).

    Args:
        model: A transformed model, compiled or wrapped or not; its weights now are the start.

    Raises:
        MupassError: It has no layer with a fan_in that grows.
        PlanError: It was not transformed.
    """
    return AlignmentProbe(model)


def measured_exponents(found: Mapping[str, Alignment]) -> dict[str, float]:
    """Return the alignment of updates with activations by parameter, for rates that follow it.

    It is ``alpha``, kept between 1/2 (independent terms) and 1 (all of one sign), where theory has rates.

    Args:
        found: What a probe measured, after a few steps of training.

    Raises:
        MupassError: It is nothing that a probe measured; a layer has not moved, or was given zeros.
    """
    if not all(isinstance(key, str) and isinstance(layer, Alignment) for key, layer in found.items()):
        raise MupassError("alignment= takes what a probe of mupass.alignment measured, by layer")
    unknown = [name for name, layer in found.items() if math.isnan(layer.alpha)]
    if unknown:
        raise MupassError(
            f"no alignment was measured for {', '.join(unknown)}: the weight has not moved since the probe "
            "was made, or its inputs are zero; call the probe after a few steps of training"
        )
    # Theory has rates for exponents from 1/2 to 1; measured ones may lie outside by chance.
    return {_weight_of(name): min(max(layer.alpha, 0.5), 1.0) for name, layer in found.items()}


def _weight_of(layer: str) -> str:
    """Return the name of a layer's weight; the layer may be the model itself, whose name is empty."""
    return f"{layer}.weight".removeprefix(".")


def _exponent(layer: nn.Module, weight: Tensor, inputs: list[Tensor]) -> float:
    """Return log of RMS(A z) / (RMS(A) RMS(z)) to the base fan_in, over all calls of the layer."""
    replaced = {"layer.weight": weight}
    # Without the bias: the exponent is of the product alone.
    if layer.bias is not None:
        replaced["layer.bias"] = torch.zeros_like(layer.bias)  # type: ignore[arg-type]
    outputs = [functional_call(_Bare(layer), replaced, z) for z in inputs]
    out_size, weight_size, in_size = _rms(outputs), _rms([weight]), _rms(inputs)
    if min(out_size, weight_size, in_size) == 0:
        return math.nan
    # RMS(A z) = n^p RMS(A) RMS(z), solved for p, with n the fan_in.
    return math.log(out_size / (weight_size * in_size)) / math.log(weight[0].numel())


class _Bare(nn.Module):
    """A layer without its hooks and taps, which are for the model's own passes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> Tensor:
        return self.layer.forward(z)  # type: ignore[no-any-return]


def _rms(tensors: list[Tensor]) -> float:
    squares = sum(float(tensor.abs().double().square().sum()) for tensor in tensors)
    return math.sqrt(squares / sum(tensor.numel() for tensor in tensors))
