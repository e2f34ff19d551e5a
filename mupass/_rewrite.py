"""Rewrite: initialization and readout multipliers go into the model. Everything is checked first."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mupass._errors import PlanError, TransformError, some, warn
from mupass._parallel import local
from mupass._records import Ranges, Use
from mupass._scales.marks import mark
from mupass._scales.plan import ATTRIBUTE, Entry, Plan
from mupass._taps.attention import ScaledAttention

READOUTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class InputMultiplier:
    """Forward pre-hook that multiplies a module's input; the module's bias is left alone.

    A plain object rather than a closure, so that the model can still be pickled and deep-copied.

    Attributes:
        factor: What the input is multiplied by.
    """

    factor: float

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Multiply the input, positional or named.

        Args:
            module: Module about to run.
            args: Its positional arguments.
            kwargs: Its named arguments.

        Returns:
            The arguments with the input multiplied.
        """
        # linear(x) and linear(input=x)
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        return args, {**kwargs, "input": kwargs["input"] * self.factor}


@dataclass(frozen=True)
class OutputMultiplier:
    """Forward hook that multiplies what a module puts out (of several results, the first).

    Attributes:
        factor: What the output is multiplied by.
    """

    factor: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Multiply the output.

        Args:
            module: Module that has run.
            args: Its positional arguments.
            output: Its result.

        Returns:
            The result with the output multiplied.
        """
        # nn.LSTM and others return their states as well.
        if isinstance(output, tuple):
            return (output[0] * self.factor, *output[1:])
        return output * self.factor


@dataclass(frozen=True)
class PartMultiplier:
    """Forward hook that multiplies some features of what a module puts out: the queries of a joint layer.

    Attributes:
        factor: What they are multiplied by.
        parts: The features, as (first, behind the last).
        axis: Axis of the features.
    """

    factor: float
    parts: Ranges
    axis: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Multiply the features.

        Args:
            module: Module that has run.
            args: Its positional arguments.
            output: Its result.

        Returns:
            The result with these features multiplied.

        Raises:
            TransformError: The result has fewer features than the plan says, as a shard of it would.
        """
        size = output.shape[self.axis]
        if size < self.parts[-1][1]:
            raise TransformError(
                f"the queries are features {self.parts} of what a {type(module).__name__} puts out, and here "
                f"it puts out {size}: a layer for queries, keys and values cannot be cut over ranks; give "
                "each a layer of its own"
            )
        factors = output.new_ones(size)
        for first, last in self.parts:
            factors[first:last] = self.factor
        if self.axis == 1:  # [batch, channels, *positions]
            factors = factors.view(-1, *[1] * (output.dim() - 2))
        return output * factors


MULTIPLIERS = (InputMultiplier, OutputMultiplier, PartMultiplier, ScaledAttention)
MULTIPLIED = "_mupass_multiplied"  # names of the modules that were given one


@dataclass
class SaveNotice:
    """State-dict hook that says once that the saved weights are right behind live multipliers only.

    Attributes:
        model: Class of the model.
        told: Whether it has been said.
    """

    model: str
    told: bool = False

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Warn once.

        Args:
            module: Module with a multiplier, whose state is being saved.
            prefix: Its name in the state.
            keep_vars: Whether the state keeps graphs alive, as torch.export asks for: nothing is saved then.
        """
        # torch.export reads the state with keep_vars=True; nobody is given those weights.
        if self.told or keep_vars:
            return
        self.told = True
        where = prefix.rstrip(".") or type(module).__name__
        text = (
            f"the weights of this {self.model} are right behind its multipliers only (the one of {where} is "
            "the first): loaded without mupass they compute something else. To give them away, save "
            "mupass.fold(model, inplace=False); as a checkpoint for this transformed model they are right"
        )
        warn([text])


def check_rewritable(model: nn.Module, plan: Plan) -> None:
    """Refuse a model that `rewrite` could not finish.

    Args:
        model: Model that the plan was made for.
        plan: Its plan.

    Raises:
        TransformError: No module can hold the multiplier of a readout use, or a parameter that must
            be rescaled is a view with shared memory.
    """
    if plan.folded:  # the weights hold everything, nothing is rewritten
        return
    for scale in plan.scores:
        module = model.get_submodule(scale.module)
        if scale.attention and not isinstance(module, nn.MultiheadAttention):
            raise TransformError(
                f"the plan multiplies scores inside of {scale.module}, an nn.MultiheadAttention where it was "
                f"made, and here it is a {type(module).__name__}"
            )
    parameters = dict(model.named_parameters())
    for entry in plan.entries:
        parameter = parameters[entry.geometry.name]
        if entry.scales.multiplier != 1:
            for use in entry.geometry.readout_uses:
                _multipliers(model, entry, use)
        # tensor.expand(...) shows one number many times: multiplying it in place would multiply it as often.
        if entry.init_factor != 1 and _overlaps(parameter):
            raise TransformError(
                f"{entry.geometry.name} is an expanded view, which cannot be rescaled in place; "
                "give the module a parameter of its own: nn.Parameter(tensor.clone())"
            )


def rewrite(model: nn.Module, plan: Plan, values: bool = True) -> None:
    """Insert multipliers of readouts, scores and branches, rescale initial values, leave the plan.

    Args:
        model: Model that passed `check_rewritable`.
        plan: Its plan.
        values: Whether the initialization is rescaled.
    """
    # The plan comes first: hooks and optimizers find it on the model.
    setattr(model, ATTRIBUTE, plan)
    mark(model)
    if plan.folded:  # the weights hold everything
        return
    notice = SaveNotice(type(model).__name__)
    for entry in plan.entries:
        if entry.scales.multiplier != 1:
            # One hook a module, however many times its forward reads the weight.
            hooks: dict[tuple[nn.Module, InputMultiplier | OutputMultiplier], None] = {}
            for use in entry.geometry.readout_uses:
                hooks.update(dict.fromkeys(_multipliers(model, entry, use)))
            for module, hook in hooks:
                _put_on(module, hook, notice)
    for scale in plan.scores:
        module = model.get_submodule(scale.module)
        if scale.attention:
            # Scores are computed inside of one function: no hook reaches them.
            assert isinstance(module, nn.MultiheadAttention)
            module.forward = ScaledAttention(module, scale.factor)  # type: ignore[method-assign]
            module.register_state_dict_pre_hook(notice)  # type: ignore[no-untyped-call]
        elif scale.parts:
            _put_on(module, PartMultiplier(scale.factor, scale.parts, scale.axis), notice)
        else:
            _put_on(module, OutputMultiplier(scale.factor), notice)
    if plan.depth != 1:
        for name in plan.branches:
            # After the taps: what a preconditioner sees is the gradient behind the multiplier.
            _put_on(model.get_submodule(name), OutputMultiplier(1 / plan.depth), notice)
    setattr(model, MULTIPLIED, tuple(path for path, module in model.named_modules() if _multiplies(module)))
    if values:
        rescale(model, {entry.geometry.name: entry.init_factor for entry in plan.entries})


def _put_on(
    module: nn.Module, hook: InputMultiplier | OutputMultiplier | PartMultiplier, notice: SaveNotice
) -> None:
    """Put a multiplier on a module, and the notice for when its weights are saved."""
    if isinstance(hook, InputMultiplier):
        module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        module.register_forward_hook(hook)
    module.register_state_dict_pre_hook(notice)  # type: ignore[no-untyped-call]


def tell_lost_multipliers(model: nn.Module) -> bool:
    """Warn of multipliers that went away with their modules, and return whether there are any.

    Args:
        model: The module that holds the plan.
    """
    noted: tuple[str, ...] = vars(model).get(MULTIPLIED, ())
    plan: Plan = vars(model)[ATTRIBUTE]
    if not noted or plan.folded or plan.stage:
        return False
    # An adapter around a module, or a compiled form of it, has it inside; elsewhere it multiplies as well.
    present = [path for path, module in model.named_modules() if _multiplies(module)]
    if len(present) >= len(noted):
        return False
    lost = [path for path in noted if not any(at == path or at.startswith(f"{path}.") for at in present)]
    warn(
        [
            f"{some(lost)} had a multiplier of mupass.transform and was replaced since: outputs lack it, and "
            "the plan's rates are not of this model. Replace modules first, then transform; or keep the "
            "module inside of the new one"
        ]
    )
    return True


def _multiplies(module: nn.Module) -> bool:
    """Return whether a module holds a multiplier."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(isinstance(hook, MULTIPLIERS) for hook in (*hooks, vars(module).get("forward")))


def rescale(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply parameters by their init factors; factors of exactly 1 touch nothing.

    Args:
        model: Model with its user's initialization.
        factors: By parameter name.

    Raises:
        PlanError: A value would be infinite or NaN; nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        # All products first: what can fail (memory, range) fails before the first parameter changes.
        scaled = {name: parameters[name] * factor for name, factor in factors.items() if factor != 1}
        for name, values in scaled.items():
            if not values.is_meta and not bool(local(values).isfinite().all()):
                raise PlanError(f"{name} times {factors[name]:.6g} is not finite in {values.dtype}")
        for name, values in scaled.items():
            parameters[name].copy_(values)


@contextmanager
def hooks_restored_on_error(model: nn.Module) -> Generator[None, None, None]:
    """Undo hooks and attributes on every module if the block raises.

    Args:
        model: Model that the block rewrites.

    Yields:
        Nothing.
    """
    # Attributes and tables of hooks are copied before the first change.
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        tables = {name: table for name, table in attributes.items() if isinstance(table, dict)}
        hooks = {name: table.copy() for name, table in tables.items() if "_hooks" in name}
        before.append((module, attributes, hooks))
    try:
        yield
    except BaseException:
        for module, attributes, hooks in before:
            vars(module).clear()
            vars(module).update(attributes)
            # Tables of hooks are filled anew, not replaced: handles of other hooks hold on to them.
            for name, table in hooks.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)
        raise


def readout_module(model: nn.Module, name: str, use: Use) -> nn.Module | None:
    """Return the module whose only job is a readout, or None where the code calls the operator itself.

    Args:
        model: The model.
        name: Name of the tied parameter.
        use: Its use as a readout.
    """
    try:
        module = model.get_submodule(use.module)
    except AttributeError:
        return None
    # The very tensor: a module with a copy of the weight has a readout of its own.
    if isinstance(module, READOUTS) and module.weight is model.get_parameter(name):
        return module
    return None


def _multipliers(
    model: nn.Module, entry: Entry, use: Use
) -> list[tuple[nn.Module, InputMultiplier | OutputMultiplier]]:
    """Return the modules that hold the multiplier of a readout, each with its hook.

    The readout itself multiplies its input. Where the code calls the operator, what feeds it multiplies its
    output.

    Raises:
        TransformError: There are none.
    """
    name, factor = entry.geometry.name, entry.scales.multiplier
    # The module multiplies its input, so that its bias stays as it is.
    module = readout_module(model, name, use)
    if module is not None:
        return [(module, InputMultiplier(factor))]
    if use.fed_by:
        return [(model.get_submodule(feed), OutputMultiplier(factor)) for feed in use.fed_by]
    first = "a first layer (a weight from data to the width)"
    if any(other.kind == "embedding" for other in entry.geometry.uses):
        first = "an embedding"
    raise TransformError(
        f"{name} is {first} and also the readout, by {use.operator} inside "
        f"{use.module or 'the root module'}. That readout needs a multiplier 1/m on what it reads, and no "
        f"module puts just that out: {use.unfed}. "
        "Let a module of its own do so:\n"
        "    self.end = nn.Dropout(0.0)  # in __init__; nn.Identity leaves nothing in the graph\n"
        "and give the readout self.end(x) in the place of x"
    )


def _overlaps(parameter: torch.Tensor) -> bool:
    # A stride of zero shows the same memory many times, as expand makes it.
    axes = zip(parameter.stride(), parameter.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in axes)
