"""The plan: for every parameter of one model its geometry, its initialization and its scales."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from mupass._errors import PlanError, kind_of
from mupass._files import write_text
from mupass._records import Carrier, ScoreScale, Shape
from mupass._scales.checks import check_plan, check_scores, read_plan
from mupass._scales.entry import Entry, entry_scales
from mupass._scales.multipliers import by_pattern, multiplier_rows
from mupass._scales.optimizers import OPTIMIZERS, OptimizerSpec
from mupass._scales.scales import Scales
from mupass._scales.table import explanation, table

__all__ = ["ATTRIBUTE", "VERSION", "Entry", "OptimizerSpec", "Plan", "Scales", "plan_of"]

VERSION = 11
ATTRIBUTE = "mupass_plan"  # plain attribute of the transformed root module


@dataclass(frozen=True)
class Plan:
    """Frozen answers to every width question about one model, keyed by parameter name.

    Attributes:
        version: Format of the JSON form.
        optimizer: Optimizer that the scales are for.
        parameterization: ``mup``, ``standard``, ``ntk`` or ``mean_field``.
        width: Size of the dimension that names the model's width.
        base_width: Width at which the plan equals standard parameterization.
        capture: How the graph was obtained.
        warnings: What the reader must know.
        notes: Those of them that are for a report alone.
        entries: One for each parameter, in the order of ``named_parameters()``.
        depth: Number of residual branches relative to the base depth; 1 where depth is not scaled.
        branches: Modules whose outputs are multiplied by ``1 / depth``.
        carriers: What can hold the forward multipliers in the place of hooks, see `mupass.fold`.
        folded: Whether the weights hold all multipliers already.
        decided: Whether an optimizer was named or made; until then the print shows the rates of all.
        trained: Whether values and outputs of a trained model were left as they are.
        stage: Whether it is of a part of the model, see `mupass.stage`.
        scores: Factors on attention scores whose head_dim grows.
        open_output: Whether what the model puts out first grows with its width, as features do.

    Raises:
        PlanError: A factor is NaN, zero, negative or beyond all bounds, fields contradict each other, a name
            comes twice, or the optimizer's alignment names a parameter that has no entry.
    """

    version: int
    optimizer: OptimizerSpec
    parameterization: str
    width: int
    base_width: float
    capture: str
    warnings: tuple[str, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    depth: float = 1.0
    branches: tuple[str, ...] = ()
    carriers: tuple[Carrier, ...] = ()
    folded: bool = False
    decided: bool = field(default=True, compare=False)
    trained: bool = False
    stage: bool = False
    scores: tuple[ScoreScale, ...] = ()
    open_output: bool = False

    def __post_init__(self) -> None:
        check_plan(
            self.parameterization, self.width, self.base_width, self.depth, self.branches, self.entries
        )
        check_scores(self.scores)
        for name, _ in self.optimizer.exponents:
            self[name]  # an alignment measured on a parameter that is not there is refused

    def __getitem__(self, name: str) -> Entry:
        """Entry of a parameter, by its name or by any name it is tied under.

        Args:
            name: Qualified name.

        Returns:
            The entry.

        Raises:
            PlanError: No parameter of that name.
        """
        if name in self._index:
            return self._index[name]
        similar = get_close_matches(str(name), list(self._index), n=3)
        hint = f"; near: {', '.join(similar)}" if similar else ""
        raise PlanError(f"the plan has no parameter {name!r}{hint}")

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over names, in the order of ``named_parameters()``; aliases left out."""
        return (entry.geometry.name for entry in self.entries)

    def __len__(self) -> int:
        """Return the number of distinct parameters."""
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        """Return whether a parameter goes by that name."""
        return name in self._index

    @cached_property
    def _index(self) -> dict[str, Entry]:
        entry_of: dict[str, Entry] = {}
        for entry in self.entries:
            entry_of.update(dict.fromkeys(entry.geometry.names, entry))
        return entry_of

    def __str__(self) -> str:
        """Return the table of all parameters."""
        rates = {}
        # Until an optimizer is decided, the rates of the usual ones stand beside each other.
        if not self.decided:
            shown = [name for name, known_row in OPTIMIZERS.items() if known_row.in_summary]
            rates = {name: [entry.scales.lr for entry in self.for_optimizer(name).entries] for name in shown}
        text = table(
            self.entries,
            self.optimizer,
            self.parameterization,
            self.width,
            self.base_width,
            self.depth,
            rates,
            self.warnings,
        )
        return "\n".join([text, *(scale.explanation() for scale in self.scores)])

    def explain(self, name: str) -> str:
        """Why the scales of one parameter are what they are.

        Args:
            name: Qualified name, an alias included.

        Returns:
            Evidence operator by operator, then each scale with its formula and source.
        """
        lines = [explanation(self[name], self.optimizer, self.parameterization)]
        for scale in self.scores:
            made_by = {own for own, _ in scale.rows} | set(scale.carrier.parameters)
            if not made_by.isdisjoint(self[name].geometry.names):
                lines.append(scale.explanation())
        return "\n".join(lines)

    def for_optimizer(self, optimizer: str | OptimizerSpec) -> "Plan":
        """The same plan with the scales of another optimizer.

        Initialization and forward multipliers do not depend on the optimizer, so a model that was
        transformed for one can be trained with another.

        Args:
            optimizer: Name, or name with its powers.

        Returns:
            A new plan; this one is unchanged.
        """
        spec = OptimizerSpec.of(optimizer)
        if spec == self.optimizer:
            return self if self.decided else replace(self, decided=True)
        entries = tuple(
            replace(entry, scales=entry_scales(entry.geometry, spec, self.parameterization, self.trained))
            for entry in self.entries
        )
        return replace(self, optimizer=spec, entries=entries, decided=True)

    def check(self, model: nn.Module) -> None:
        """Make sure that the plan is one of this model.

        Args:
            model: Module whose parameter names are those of the plan (no wrapper around it).

        Raises:
            PlanError: A name, a shape or a tie differs.
        """
        shapes = shapes_of(model)
        faults = []
        for entry in self.entries:
            name, shape = entry.geometry.name, entry.geometry.shape
            if shapes.get(name, shape) != shape:
                faults.append(f"{name}: planned with shape {shape}, has {shapes[name]}")
        refuse([*faults, *self.other_names(model)])

    def other_names(self, model: nn.Module) -> list[str]:
        """Say which names and ties of a model are not those of the plan.

        Args:
            model: Module whose parameter names are those of the plan (no wrapper around it).

        Returns:
            One line for each.
        """
        names = dict(model.named_parameters())
        faults = [f"{name}: missing from the model" for name in self if name not in names]
        planned = set(self)
        for name in names:
            if name in planned:
                continue
            # The plan takes both names for one tensor; this model has two.
            if name in self:
                root = self[name].geometry.name
                faults.append(f"{name}: the plan ties it to {root}, here it is a tensor of its own")
            else:
                faults.append(f"{name}: not in the plan")
        modules = {name for name, _ in model.named_modules()}
        faults += [f"branch {name!r}: no such module" for name in self.branches if name not in modules]
        for scale in self.scores:
            if scale.module not in modules:
                faults.append(f"queries of {scale.module!r}: no such module")
        return faults

    def multipliers(self) -> dict[str, Any]:
        """Return the scales by name pattern, for trainers that build their own groups (Megatron, torchtitan).

        ``json.dumps(plan.for_optimizer("adamw").multipliers())`` writes them.

        Returns:
            The optimizer and widths; under ``parameters`` for every regular expression, of which exactly one
            fits (``re.fullmatch``) each name and alias, the role and the factors on values at the base width:
            ``init``, ``multiplier`` (forward, on the input of the readout use of a tied embedding), ``lr``,
            damping, ``epsilon``, ``weight_decay`` for decoupled decay without the learning rate, and
            ``weight_decay_times_lr`` for decay that the optimizer multiplies by the learning rate, as
            torch's AdamW does. Under ``branches`` the factor on the output of the modules at the ends of
            residual branches. Under ``scores`` the factor on attention scores whose head_dim grows, by the
            module that puts out the queries.
        """
        return {
            "optimizer": str(self.optimizer),
            "parameterization": self.parameterization,
            "width": self.width,
            "base_width": self.base_width,
            "parameters": by_pattern(multiplier_rows(self.entries)),
            "branches": by_pattern({name: {"multiplier": 1 / self.depth} for name in self.branches}),
            "scores": by_pattern({scale.module: {"multiplier": scale.factor} for scale in self.scores}),
        }

    def to_json(self) -> str:
        """Return the plan as JSON text; `from_json` gives back an equal plan."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read a plan written by `to_json`.

        Args:
            text: JSON text.

        Returns:
            A plan equal to the one written.

        Raises:
            PlanError: Not JSON, another version, or fields missing.
        """
        return read_plan(Plan, text, VERSION)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, as a whole: a kill leaves the old file or the new one.

        Args:
            path: The file.

        Raises:
            PlanError: It cannot be written.
        """
        write_text(path, self.to_json(), PlanError)

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan written by `save`.

        Args:
            path: The file.

        Returns:
            A plan equal to the one written.

        Raises:
            PlanError: There is no such file, or it holds no plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError, TypeError) as error:
            raise PlanError(f"{path!r} cannot be read: {error}") from error
        return Plan.from_json(text)


def plan_of(model: nn.Module) -> tuple[nn.Module, Plan]:
    """Find the plan that `transform` left on a model, through any wrapper.

    Args:
        model: Transformed model, or ``torch.compile``, DDP or another module around it.

    Returns:
        ``(root, plan)``: the module that the plan's names are relative to, and the plan.

    Raises:
        PlanError: No module; no plan, or more than one, in the module tree.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"pass the model itself, which mupass.transform returned, not {kind_of(model)}: "
            "mupass.KFAC(model, lr=0.1), not mupass.KFAC(model.parameters(), lr=0.1)"
        )
    # vars, not getattr: OptimizedModule forwards attribute reads and would pose as the root.
    planned = [(module, vars(module)[ATTRIBUTE]) for module in model.modules() if ATTRIBUTE in vars(module)]
    if not planned:
        raise PlanError("the model carries no plan; call mupass.transform(model, ...) first")
    if len(planned) > 1:
        raise PlanError("the model holds several transformed models; give them one by one")
    return planned[0]


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Return the shape of every parameter by its name.

    Args:
        model: Any module.
    """
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def refuse(faults: Sequence[str]) -> None:
    """Refuse a model that a plan does not fit.

    Args:
        faults: What does not fit, a line each.

    Raises:
        PlanError: There are some; the first eight are named.
    """
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise PlanError("plan of another model:\n  " + "\n  ".join(faults[:8]) + more)
