"""Taps of modules that are one operator: forward hooks that hang leaves on their output.

Where a parameter is used by other code, the tap sits in the parameter itself (`mupass._taps.intercept`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code
from torch.nn.modules.module import _global_forward_hooks

from mupass._taps.forms import CONVOLUTIONS, TRANSPOSED, Convolution, Elementwise, Features, Form, Lookup
from mupass._taps.functions import is_made_of
from mupass._taps.leaves import Tap, is_trained
from mupass._taps.terms import TermsTap, is_terms_hook, terms_hook, terms_tap_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS, *INSTANCE_NORMS)
HOOKED = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED, *NORMS)


class ModuleTap(Tap):
    """Forward hook on a module that is one operator."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.form = _form_of(module)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Send the output through the tap.

        Args:
            module: The module.
            args: Its positional arguments.
            kwargs: Its named arguments.
            output: Its output.
        """
        # Weights that are frozen for a while, or lent by functional_call, have no statistics.
        if self.idle or not is_trained(module.parameters(recurse=False)):
            return None
        if self._is_told_another(module, output):
            return None
        source = args[0] if args else kwargs["input"]
        # Only factors that can be differentiated need a derivative of this.
        with torch.set_grad_enabled(self.uses is not None):
            inputs = normalized(module, source)
        return self.through(output, inputs, self.form)

    def _is_told_another(self, module: nn.Module, output: Tensor) -> bool:
        """Return whether a hook that ran before has changed the output, and say so.

        Hooks of all modules run first (`register_module_forward_hook`), and those that were put in front
        since the last step.
        """
        if torch.compiler.is_compiling() or (
            next(iter(module._forward_hooks.values())) is self and not _global_forward_hooks
        ):
            return False
        if not output.requires_grad or is_made_of(output, list(module.parameters(recurse=False))):
            return False
        if self.passes is not None:
            self.passes.miss(self, "by a module whose output a hook changes before K-FAC sees it")
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get idle taps."""
        return {**super().__getstate__(), "form": self.form}


def _form_of(module: nn.Module) -> Form:
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return Convolution.of(module)
    if isinstance(module, nn.Embedding):
        return Lookup(-1 if module.padding_idx is None else module.padding_idx)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return Elementwise(-len(module.normalized_shape), len(module.normalized_shape))
    # Batch, group and instance norms have gains by channel, on axis 1.
    return Elementwise(1) if isinstance(module, NORMS) else Features()


def normalized(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm's gain multiplies; for other modules the input itself.

    Args:
        module: Any module of `HOOKED`.
        x: Its input.
    """
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        # Batch norm in training, or without running statistics, uses those of the batch.
        of_batch = module.training or module.running_mean is None
        # Running statistics are kept from this second run: the module has updated them already.
        statistics = (None, None) if of_batch else (module.running_mean, module.running_var)
        norm = F.instance_norm if isinstance(module, INSTANCE_NORMS) else F.batch_norm
        return norm(x, *statistics, None, None, of_batch, 0.0, module.eps)
    return x


def hookable(module: nn.Module) -> bool:
    """Return whether a module's whole forward is one operator that a hook can tap.

    Args:
        module: Any module; subclasses that keep the forward of a class of `HOOKED` count.
    """
    matching = [cls for cls in HOOKED if isinstance(module, cls)]
    # A subclass with a forward of its own may compute anything.
    if not matching or type(module).forward is not matching[0].forward:
        return False
    # Sparse gradients have no rows to multiply; max_norm writes into the table as it is read.
    return not isinstance(module, nn.Embedding) or (not module.sparse and module.max_norm is None)


def attach(model: nn.Module) -> None:
    """Hang an idle tap on every module that is one operator.

    Before the model is compiled: torch.compile does not notice hooks that come later.

    Args:
        model: The module that the plan's names are relative to.
    """
    forget_compiled(model)
    for module in model.modules():
        if hookable(module) and tap_of(module) is None:
            # In front of hooks of the caller's, which may change the output.
            module.register_forward_hook(ModuleTap(module), with_kwargs=True, prepend=True)
    if terms_tap_of(model) is None:
        model.register_forward_hook(terms_hook(TermsTap()))


def forget_compiled(model: nn.Module) -> None:
    """Make torch.compile tell a model with hooks from one without.

    By default Dynamo guards on no hooks, and finds compiled code by the code of ``forward``: it would run a
    transformed model by the graph of a plain one of the same class, without taps and multipliers. Guards on
    hooks are switched on, and what was compiled without them is dropped.

    Args:
        model: The module whose hooks have changed.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for cls in {type(module) for module in model.modules()}:
        code = getattr(cls.forward, "__code__", None)
        if code is not None:
            reset_code(code)


def tap_of(module: nn.Module) -> ModuleTap | None:
    """Return the tap that hangs on a module, or None.

    Args:
        module: Any module.
    """
    for hook in module._forward_hooks.values():
        if isinstance(hook, ModuleTap):
            return hook
    return None


def keep_in_front(module: nn.Module) -> None:
    """Let the tap of a module see its output before hooks that were put in front of it since.

    Args:
        module: A module with a tap.
    """
    hooks = module._forward_hooks
    # Nearly always it is in front.
    if type(next(iter(hooks.values()), None)) is ModuleTap:
        return
    for key, hook in hooks.items():
        if type(hook) is ModuleTap:
            hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]
            return


def detach(model: nn.Module) -> None:
    """Take all hooks off a model.

    Args:
        model: The module that `attach` was given.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, ModuleTap) or is_terms_hook(hook):
                del module._forward_hooks[key]
                # Hooks that are given named arguments are listed a second time.
                module._forward_hooks_with_kwargs.pop(key, None)
