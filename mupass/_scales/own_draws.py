"""What a model's own code would draw, for a model on the meta device: the code runs, no number is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mupass._walks import ancestors


@dataclass(frozen=True)
class Draw:
    """Law of one tensor as code states it.

    Attributes:
        std: Standard deviation; 0 for a constant.
        uniform: Whether all values of a range are as likely.
        constant: The value of a constant.
        bounds: Range of a uniform law before it is bent into a normal one that is cut off.
    """

    std: float
    uniform: bool = False
    constant: float | None = None
    bounds: tuple[float, float] = (0.0, 0.0)


def own_draws(model: nn.Module) -> Mapping[str, Draw]:
    """Run a model's own initialization on a copy without memory, and note what it draws.

    First the modules' ``reset_parameters``, then what Hugging Face, timm and many others call
    ``_init_weights(module)``, then ``init_weights()`` of the model. What a constructor draws by itself is not
    seen. Code that fails, and tensors that are filled in an unknown way, are left out.

    Args:
        model: A model whose parameters are all on the meta device; it is not changed.
    """
    if not all(parameter.is_meta for parameter in model.parameters()):
        return {}
    hollow_copy = deepcopy(model)
    # Random state is left as it was, though only meta tensors are drawn.
    with _Recorder() as recorder, recorder.cut_normals(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for module, code in _own_code(hollow_copy):
            try:
                code()
            except Exception:  # code of others, which is only asked: what it left half done is not known
                recorder.laws.update(dict.fromkeys(map(_key, module.parameters())))
    memory_of = {name: _key(parameter) for name, parameter in hollow_copy.named_parameters()}
    laws = {name: recorder.laws.get(key) for name, key in memory_of.items()}
    return {name: law for name, law in laws.items() if law is not None}


def _own_code(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
    """Yield modules with what a constructor runs, in its order: children first, defaults first."""
    # Children are built before the module that holds them.
    modules = list(reversed(list(model.named_modules())))
    for _, module in modules:
        for name in ("reset_parameters", "_reset_parameters"):
            code: Any = getattr(module, name, None)
            if callable(code):
                yield module, code
    # Hugging Face's _init_weights(module) of the nearest model around each module.
    owners = {path: module for path, module in modules if callable(getattr(module, "_init_weights", None))}
    for path, module in modules:
        owner = next((owners[outer_path] for outer_path in ancestors(path) if outer_path in owners), None)
        if owner is not None:
            yield module, partial(owner._init_weights, module)
    # init_weights() of the whole model; that of Hugging Face (with a config) does more than draw.
    model_code: Any = getattr(model, "init_weights", None)
    if callable(model_code) and not hasattr(model, "config"):
        yield model, model_code


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Takes note of in-place draws on meta tensors, by their memory; all else runs as usual.

    Attributes:
        laws: Memory of a tensor -> its law, None for one that nobody knows.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.laws: dict[int, Draw | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operator does to its first argument.

        Args:
            func: The operator.
            types: Classes of its arguments.
            args: Its arguments.
            kwargs: Its named arguments.

        Returns:
            What the operator gives; on the meta device nothing is computed.
        """
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        target = args[0] if args else None
        if isinstance(target, Tensor) and target.is_meta and name.endswith("_") and not name.endswith("__"):
            key, is_part = _key(target), target.nbytes < target.untyped_storage().nbytes()
            if is_part and name not in ("zero_", "fill_"):  # a part of zeros is padding
                self.laws[key] = None
            elif not is_part:
                self.laws[key] = self._after(name, self.laws.get(key), args[1:], kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def cut_normals(self) -> Iterator[None]:
        """See ``nn.init.trunc_normal_`` too, which leaves meta tensors alone without a call.

        Yields:
            Nothing.
        """
        original = getattr(nn.init, "_no_grad_trunc_normal_", None)

        def note(
            tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
        ) -> Tensor:
            low, high = (math.erf((x - mean) / std / math.sqrt(2)) for x in (a, b))
            if tensor.is_meta and low < 0 < high:
                self.laws[_key(tensor)] = Draw(std * _cut_normal(min(-low, high)))
            return tensor

        if original is None:  # a torch that draws it by operators
            yield
            return
        nn.init._no_grad_trunc_normal_ = note  # type: ignore[assignment]
        try:
            yield
        finally:
            nn.init._no_grad_trunc_normal_ = original

    def _after(
        self, name: str, law: Draw | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Draw | None:
        """Return the law of a tensor after one operator in place; None where nobody knows."""
        # tensor.normal_(mean, std)
        if name == "normal_":
            return Draw(float(_argument(args, kwargs, 1, "std", 1.0)))
        # tensor.uniform_(a, b), whose variance is (b - a)^2 / 12.
        if name == "uniform_":
            low, high = _argument(args, kwargs, 0, "from", 0.0), _argument(args, kwargs, 1, "to", 1.0)
            return Draw((high - low) / math.sqrt(12), True, bounds=(low, high))
        if name in ("zero_", "fill_"):
            value = 0.0 if name == "zero_" else args[0]
            return Draw(0.0, constant=float(value)) if isinstance(value, (int, float)) else None
        if law is None:
            return None
        # tensor.mul_(0.02) scales the law that was there.
        if name in ("mul_", "div_") and isinstance(args[0], (int, float)):
            factor = float(args[0]) if name == "mul_" else 1 / float(args[0])
            constant = None if law.constant is None else law.constant * factor
            return replace(law, std=law.std * abs(factor), constant=constant)
        # trunc_normal_ draws a flat law and bends it by erfinv: a normal that is cut off at both ends.
        if name == "erfinv_" and law.bounds[0] < 0 < law.bounds[1]:
            return Draw(_cut_normal(min(-law.bounds[0], law.bounds[1])) / math.sqrt(2))
        return law if name in ("add_", "clamp_", "requires_grad_", "detach_") else None


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _cut_normal(mass: float) -> float:
    """Return the std of a standard normal that is cut off at both sides, of which this mass is left."""
    if mass >= 1:
        return 1.0
    bound = math.sqrt(2) * torch.erfinv(torch.tensor(mass, dtype=torch.float64)).item()
    return std_of_cut_normal(bound, mass)


def std_of_cut_normal(bound: float, mass: float) -> float:
    """Return the standard deviation of a standard normal that is cut off at both sides.

    Args:
        bound: Where it is cut off.
        mass: What is left of it.
    """
    return math.sqrt(1 - 2 * bound * math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi) / mass)
