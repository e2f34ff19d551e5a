"""Probe: what every operator of a model makes, and what the update of its parameter does to that.

An operator of the first pass is run again on its inputs of then with a parameter's new values: the difference
is ``dW h`` of that parameter alone, at the activations of the start. Faults of other layers are not in it.

Its part along the gradient of the loss is measured too. With more rows (samples times positions) than width,
``dW h`` is mostly a sum of unrelated terms, which shrinks like ``1/sqrt(width)`` however right the learning
rate is; that sum is orthogonal to the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import StudyError
from mupass._runs.batches import Batch, Loss, logits_of
from mupass._study.recorder import OUTPUT, Recorder, Site

Seen = tuple[Site, str, float]  # place, quantity, RMS


class Probe:
    """Measures one model, before and while it is trained.

    Args:
        model: The model, at its start.
        batch: What it is run on, always the same.
        loss: Of its output and the batch's targets.
    """

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.names = {module: name for name, module in model.named_modules()}
        self.first = Recorder(model)
        self.gradients = self._pass(self.first, slopes=True)
        self.start, self.head_dims = self.first.made, self.first.head_dims
        self.slopes = dict(self.first.slopes)

    def dimmed(self, readouts: set[Site], weights: set[Site]) -> set[Site]:
        """Return the places below a readout whose output goes on to other weights.

        Readouts start near zero, so at the start the gradient behind two of them nearly cancels.

        Args:
            readouts: All readouts.
            weights: All places where a weight is read.
        """
        # Readouts behind which another weight stands, and all that lies below these.
        return self.first.before(readouts & self.first.before(weights, True), False)

    def at_start(self) -> Iterator[Seen]:
        """Yield (place, quantity, RMS) before the first step.

        ``activation`` is an operator's output, ``input`` the largest activation that it was given, ``weight``
        its parameter, ``gradient`` that of its parameter. ``entries`` is the number of the output's entries,
        ``reach`` the size of attention scores of aligned queries and keys.
        """
        for site, value in self.start.items():
            yield site, "activation", rms(value)
            yield site, "entries", float(value.numel())
            if site in self.first.reach:
                yield site, "reach", self.first.reach[site]
        for call in self.first.calls.values():
            # What the operator was given besides its parameters.
            activations = [
                given
                for index, given in enumerate(call.given)
                if index not in call.at and _is_activation(given)
            ]
            for index, site in call.at.items():
                yield site, "weight", rms(call.given[index])
                if activations:
                    yield site, "input", max(map(rms, activations))
                if site.parameter in self.gradients:
                    yield site, "gradient", self.gradients[site.parameter]

    def now(self) -> Iterator[Seen]:
        """Yield (place, quantity, RMS) of how an operator's output moved since the start.

        ``update`` is dW h, ``aligned`` the part of it along the gradient at the start, ``change`` all of it.
        Behind zeros (of a readout, of the last gain of a branch) the gradient at the start is zero: there it
        is that of the first step with one, and ``gradient`` is yielded for that step too.

        Raises:
            StudyError: The model calls other operators than at the start.
        """
        # Behind a gain or a readout of zero there is no gradient yet.
        idle = {site for site, slope in self.slopes.items() if not slope.any()}
        later = Recorder(self.model, self.first)
        gradients = self._pass(later, slopes=bool(idle))
        if later.made.keys() != self.start.keys():
            differing = later.made.keys() ^ self.start.keys()
            raise StudyError(
                f"the model calls other operators than before the first step: {next(iter(differing))}"
            )
        for site, update in later.updates.items():
            yield site, "update", rms(update)
            if site in self.slopes:
                yield site, "aligned", _along(update, self.slopes[site])
        for site, value in later.made.items():
            yield site, "change", rms(value - self.start[site])
        for site in idle & later.slopes.keys():
            # The first step that has a gradient there tells its direction.
            self.slopes[site] = later.slopes[site]
            if site.parameter in gradients:
                yield site, "gradient", gradients[site.parameter]

    def _pass(self, recorder: Recorder, slopes: bool) -> dict[str, float]:
        """Run the model under a recorder; with slopes, find them and return sizes of gradients."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        handles = []
        for module, name in self.names.items():
            handles.append(module.register_forward_pre_hook(recorder.enter(name)))
            handles.append(module.register_forward_hook(recorder.leave, always_call=True))
        devices = {tensor.device for tensor in self.model.parameters() if tensor.is_cuda}
        # The pass leaves no trace: not in random numbers, nor in buffers such as running means.
        try:
            with torch.set_grad_enabled(slopes), torch.random.fork_rng(devices=list(devices)):
                torch.manual_seed(0)
                with recorder:
                    output = self.batch.run(self.model)
                gradients = self._gradients(self.loss(output, self.batch.targets)) if slopes else {}
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])
        # The output of the whole model is a place of its own.
        recorder.made[Site("", OUTPUT)] = logits_of(output).detach().clone()
        return gradients

    def _gradients(self, error: Tensor) -> dict[str, float]:
        """Return the RMS of parameters' gradients; hooks of the recorder find those at outputs on the way."""
        if not error.requires_grad:
            return {}
        parameters = dict(self.model.named_parameters())
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        gradients = torch.autograd.grad(error, list(trained.values()), allow_unused=True)
        sizes = {}
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                sizes[name] = rms(gradient)
        return sizes


def rms(x: Tensor) -> float:
    """Root mean square of all entries.

    Args:
        x: Any tensor.
    """
    # Of complex numbers the absolute values count.
    return x.abs().double().square().mean().sqrt().item()


def _along(update: Tensor, slope: Tensor) -> float:
    """RMS of the part of an update along a direction."""
    length = slope.abs().double().norm().item()
    if not length:
        return 0.0
    # |<update, slope>| / |slope| is the length of that part; its RMS is that over sqrt(entries).
    product = (_reals(update) * _reals(slope)).sum().abs().item()
    return product / length / update.numel() ** 0.5


def _reals(x: Tensor) -> Tensor:
    """Return a tensor in double precision, complex numbers as two real ones."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double()


def _is_activation(x: Any) -> bool:
    """Whether an argument of an operator is a tensor of numbers with a derivative."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and x.numel() > 0
