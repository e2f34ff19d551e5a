"""Taps in parameters that FSDP2 shards: in a pass code sees a whole parameter in the place of the shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mupass._parallel import is_sharded


@dataclass(frozen=True)
class WholeHook:
    """Forward pre-hook that changes a parameter where FSDP2 has put the whole one in the place of the shard.

    Attributes:
        owner: Module of the parameter.
        leaf: Its name there.
        change: Called with the whole parameter.
    """

    owner: nn.Module
    leaf: str
    change: Callable[[nn.Parameter], None]

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Change the parameter if it is whole.

        Args:
            module: Module about to run.
            args: Its positional arguments.
        """
        # FSDP2 puts another object there for the pass, and the shard back behind it.
        parameter = getattr(self.owner, self.leaf)
        if isinstance(parameter, nn.Parameter) and not is_sharded(parameter):
            self.change(parameter)


def path_to(root: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules on the way to a parameter, the root first and its owner last.

    Args:
        root: The module that the name is relative to.
        name: Name of the parameter.
    """
    modules = [root]
    for attribute in name.split(".")[:-1]:
        modules.append(modules[-1].get_submodule(attribute))
    return modules


def is_collected(root: nn.Module, name: str) -> bool:
    """Return whether FSDP2 collects a sharded parameter before the code that uses it runs.

    Args:
        root: The module that the name is relative to.
        name: Name of the parameter.
    """
    # Only where a parameter is sharded: not all builds of torch have it.
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in path_to(root, name))


def ranks_of_a_batch(root: nn.Module) -> int:
    """Return how many ranks see the same batch: those of tensor parallelism, or 1.

    Args:
        root: The module.
    """
    for name, parameter in root.named_parameters():
        if not is_sharded(parameter):
            continue
        mesh, shards = parameter.device_mesh, [placed for placed in parameter.placements if placed.is_shard()]  # type: ignore[attr-defined]
        # FSDP2 shards along one axis of a mesh; behind it stands that of tensor parallelism.
        if shards and len(shards) > int(is_collected(root, name)):
            return int(mesh.size(mesh.ndim - 1))
    return 1


def on_whole(root: nn.Module, name: str, change: Callable[[nn.Parameter], None]) -> None:
    """Change the whole parameter wherever code may see it first.

    The module that FSDP2 collects for is the owner or above it, and its own hook runs before this one.

    Args:
        root: The module that the name is relative to.
        name: Name of a sharded parameter.
        change: Called with the whole parameter, before every pass of a module on the way to it.
    """
    modules = path_to(root, name)
    hook = WholeHook(modules[-1], name.rpartition(".")[2], change)
    # A caller may run a submodule by itself, so that only the hooks below it are met.
    for module in modules:
        module.register_forward_pre_hook(hook)
