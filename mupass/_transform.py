"""transform: the whole pass, from a model as its author wrote it to one whose hyperparameters transfer."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, TypeVar

from torch import nn

from mupass._analyze import analyze
from mupass._capture.copying import deepcopy
from mupass._errors import PlanError, TransformError, check_flags, is_number, kind_of, some, warn
from mupass._optim.schedules import watch_models
from mupass._parallel import shared_memory
from mupass._records import Carrier, Geometry, ScoreScale
from mupass._report import Analysis
from mupass._rewrite import check_rewritable, hooks_restored_on_error, rewrite
from mupass._scales.entry import Entry, entry_scales
from mupass._scales.init import Init, InitChoice, Values, plan_init
from mupass._scales.learned import has_a_mean, learned_of, looks_trained
from mupass._scales.marks import marked_models
from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.other_width import at_width_of, scores_at
from mupass._scales.own_draws import own_draws
from mupass._scales.parameterizations import row
from mupass._scales.plan import ATTRIBUTE, VERSION, Plan, shapes_of
from mupass._taps.taps import attach, tap_of

Model = TypeVar("Model", bound=nn.Module)
UNDECIDED = "kfac"  # whose scales a plan holds while no optimizer is named
# Words of warnings about the values of one instance.
OF_VALUES = ("initialization law in doubt", "on the meta device", "initial values with a mean")
WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def transform(
    model: Model,
    example_inputs: Any = None,
    *,
    base: Any = None,
    optimizer: str | OptimizerSpec | None = None,
    parameterization: str = "mup",
    dims: Mapping[str, str] | None = None,
    init: InitChoice = "auto",
    inplace: bool = True,
    depth: float | None = None,
    plan: Plan | None = None,
    strict: bool = True,
    trained: bool = False,
) -> Model:
    """Rewrite a model to a parameterization in which hyperparameters keep their optimum across widths.

    The class and the ``state_dict`` keys stay. Parameters are rescaled, tied readouts get a multiplier,
    K-FAC taps are attached (idle until `mupass.KFAC` uses them) and the plan is left on the model as
    ``model.mupass_plan``. At the base width not one bit of a parameter or an output changes. If
    anything is refused, the model is as it was. What changes a result or asks for an answer is raised as a
    `MupassWarning`; all of it stays in the plan's ``warnings``.

    Args:
        model: Module with its initial weights, not compiled and not wrapped.
        example_inputs: A batch for capture; may be left out where the model tells its input.
        base: Reference width: at this width everything equals PyTorch's standard parameterization, and
            hyperparameters mean what they mean there. Also sizes by dimension name, another model, or the
            path of a file of base shapes from microsoft/mup. If left out 256, or the model's own width where
            that is less: then nothing is scaled. Name the width at which hyperparameters were tuned;
            ``print(model.mupass_plan)`` says which it is.
        optimizer: ``sgd``, ``adam``, ``adamw``, ``kfac``, ``foof``, ``shampoo`` or an `OptimizerSpec`
            with its powers. It only chooses what the plan shows: the rewritten model is the same for all,
            and optimizers take their own scales from the plan. If left out the plan shows the rates of
            all, until an optimizer is made; then those of that one.
        parameterization: ``mup``, ``standard`` (nothing is scaled), ``ntk`` or ``mean_field``.
        dims: Verdicts that you settle, such as ``{"d_head": "finite"}``.
        init: ``"auto"`` reads the initialization law off the values; or ``"fan_in"``, ``"fan_out"``,
            ``"fan_avg"``, ``"constant"`` (rarer ones are ``"fan_in_squared"``, for ``std = gain / fan_in``,
            ``"fan_out_squared"``, ``"fan_product"``, ``"fan_in_root"`` and ``"fan_stack"``), or
            ``{name pattern: law}``.
        inplace: Rewrite this very module (default), or a deep copy and leave this one alone.
        depth: Number of residual branches ``x + f(x)`` at which hyperparameters mean what they say (two for
            each layer of a transformer). The model's own are counted in its graph; with L times as many each
            is multiplied by ``1/L``, and rates, damping and epsilon inside follow. None leaves depth alone.
        plan: A saved plan of this model; it stands instead of ``example_inputs``, ``base``, ``dims``,
            ``parameterization``, ``init`` and ``depth``. The plan of a folded model leaves the weights as
            they are: they hold everything already, see `mupass.fold`. A plan of a narrower or wider instance
            serves too: its verdicts and base sizes hold, factors are those of this model's sizes, and
            initialization laws are read off this model's values, or told by ``init``. Nothing is captured.
        strict: Refuse operators without a rule; otherwise report them as ambiguous.
        trained: The weights were trained elsewhere and are to be fine-tuned: values and outputs stay as they
            are, and only scales of rates, damping, epsilon and decay are attached. A tied readout then gets
            no multiplier but the scales of a readout. With ``plan=`` the values are those that were trained
            under that plan, multipliers included.

    Returns:
        The rewritten model, the same object unless ``inplace=False``.

    Raises:
        PlanError: ``plan`` comes with an argument that it settles, or is of another architecture. An unknown
            optimizer, parameterization or law raises it too; a model that is transformed already,
            compiled or wrapped, or has no module to hold a multiplier, raises TransformError.

    Example:
        >>> import mupass, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> model = mupass.transform(model, base=16)
        >>> model.mupass_plan["2.weight"].init_factor  # a readout starts smaller, by (16/64)^(1/2)
        0.5
    """
    check_flags(TransformError, inplace=inplace, strict=strict, trained=trained)
    _refuse(model)
    if plan is None:
        row(parameterization)  # a misspelt name is told before the model is captured
        spec = OptimizerSpec.of(optimizer or UNDECIDED)
        analysis = analyze(model, example_inputs, base=base, dims=dims, strict=strict)
        if trained and depth is not None:
            raise PlanError("depth= multiplies branches, which would change what a trained model computes")
        plan = make_plan(model, analysis, spec, parameterization, init, depth, trained)
        plan = replace(plan, decided=optimizer is not None)
        alerts = _alerts_of(plan)
    else:
        given = {"example_inputs": example_inputs, "dims": dims, "depth": depth, "base": base}
        _refuse_settled(plan, given, parameterization)
        if optimizer is not None:
            plan = plan.for_optimizer(optimizer)
        plan, alerts = _fitted(plan, model, init, trained)
    check_rewritable(model, plan)  # what is refused is not warned of as well
    if not trained:
        alerts += _learned(model, plan, init)
    # At the base width nothing is scaled, so that no doubt matters.
    if any(entry.geometry.shape != entry.geometry.base_shape for entry in plan.entries):
        warn(alerts)
    target = model if inplace else deepcopy(model)
    _apply(target, plan, trained)
    return target


def make_plan(
    model: nn.Module,
    analysis: Analysis,
    optimizer: OptimizerSpec,
    parameterization: str = "mup",
    init: InitChoice = "auto",
    depth: float | None = None,
    trained: bool = False,
) -> Plan:
    """Put geometry, initialization and scales of every parameter into one record.

    Args:
        model: The analysed model, with its initial weights; not changed.
        analysis: Result of `mupass.analyze`.
        optimizer: Family and powers.
        parameterization: ``mup``, ``standard``, ``ntk`` or ``mean_field``.
        init: Law of the present values, see `transform`.
        depth: Number of residual branches at which hyperparameters mean what they say; None leaves depth
            alone.
        trained: Whether values and outputs are to stay, see `transform`.

    Returns:
        The plan.

    Raises:
        TransformError: Depth is to be scaled, and there is no branch, or one has no module at its end.
    """
    ratio = 1.0
    # The standard parameterization leaves depth alone, as it leaves width.
    if depth is not None and row(parameterization).readout_power is not None:
        analysis, ratio = _deepened(analysis, depth)
    entries, of_values = _entries(model, analysis.geometries, optimizer, parameterization, init, trained)
    warnings = [*analysis.warnings, *of_values]
    # Frozen parameters take no steps, so that no rate of theirs can be wrong.
    stepped = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    warnings += _ties(analysis, parameterization, trained, stepped)
    scores: tuple[ScoreScale, ...] = ()
    # Features are learned where the readout starts at 1/fan_in; a trained model's outputs are left alone.
    if row(parameterization).readout_power == 1 and not trained:
        scores = analysis.scores
    else:
        warnings += [scale.note() for scale in analysis.scores]
    branches: list[str] = []
    # At the base depth branches are not multiplied, and need no hook.
    if ratio != 1:
        for branch in analysis.branches:
            branches += branch.modules
    return Plan(
        version=VERSION,
        optimizer=optimizer,
        parameterization=parameterization,
        width=analysis.width,
        base_width=analysis.base_width,
        capture=analysis.capture,
        warnings=tuple(warnings),
        entries=tuple(entries),
        notes=analysis.notes,
        depth=ratio,
        branches=tuple(branches),
        carriers=_carriers(analysis, entries, ratio),
        trained=trained,
        scores=scores,
        open_output=analysis.open_output,
    )


def _entries(
    model: nn.Module,
    geometries: Sequence[Geometry],
    optimizer: OptimizerSpec,
    parameterization: str,
    init: InitChoice,
    trained: bool,
) -> tuple[list[Entry], list[str]]:
    """Return an entry for every parameter, and what is to be said of their present values."""
    tensors = dict(model.named_parameters())
    if trained:
        # Values of a trained model are left alone, whatever law they once had.
        inits = {name: Init("trained: left as it is", None, 1.0) for name in tensors}
    else:
        inits = plan_init(tensors, geometries, parameterization, init, own_draws(model))
    entries = []
    for geometry in geometries:
        law = inits[geometry.name]
        factors = entry_scales(geometry, optimizer, parameterization, trained)
        entries.append(Entry(geometry, law.law, law.std, law.factor, factors))
    warnings = list(_doubts(inits))
    if not trained:
        warnings += _late(model, entries)
        warnings += _one_sided(tensors, geometries)
    return entries, warnings


def _alerts_of(plan: Plan) -> list[str]:
    """Return the warnings of a new plan that are not for a report alone."""
    return [warning for warning in plan.warnings if warning not in plan.notes]


def _fitted(plan: Plan, model: nn.Module, init: InitChoice, trained: bool) -> tuple[Plan, list[str]]:
    """Return a given plan for a model of its own width or of another, and what is to be warned of.

    Raises:
        PlanError: It is of another architecture, or settles what was given besides.
    """
    # Another width: sizes are those of this model, and verdicts those of the plan.
    if _is_resized(plan, model):
        plan = _at_width_of(plan, model, init, trained)
        return plan, _alerts_of(plan)
    if init != "auto":
        raise PlanError("plan= settles init; leave out one or the other")
    plan.check(model)
    return plan, [] if trained else list(_late(model, plan.entries))


def _is_resized(plan: Plan, model: nn.Module) -> bool:
    """Return whether a plan is of an instance with other sizes, as far as names agree."""
    shapes = shapes_of(model)
    return any(
        shapes.get(entry.geometry.name, entry.geometry.shape) != entry.geometry.shape
        for entry in plan.entries
    )


def _at_width_of(plan: Plan, model: nn.Module, init: InitChoice, trained: bool) -> Plan:
    """Return the plan for another instance of its architecture; values of that one are its own.

    Raises:
        PlanError: The model is no such instance, or ``trained`` is asked for with multipliers of another
            width.
    """
    geometries, width = at_width_of(plan, model)
    if trained and not plan.trained:
        raise PlanError(
            "trained=True with plan= is for values that were trained under that very plan, and this one is "
            "of another width; give the plan of a narrower model that was made with trained=True"
        )
    entries, warnings = _entries(model, geometries, plan.optimizer, plan.parameterization, init, plan.trained)
    # Warnings about values were of the other model's values.
    warnings_kept = [warning for warning in plan.warnings if not any(mark in warning for mark in OF_VALUES)]
    return replace(
        plan,
        width=width,
        entries=tuple(entries),
        warnings=(*warnings_kept, *warnings),
        scores=scores_at(plan, geometries),
    )


def _ties(
    analysis: Analysis, parameterization: str, trained: bool, stepped: Collection[str]
) -> Iterator[str]:
    """Say of tied embeddings what the readout's multiplier cannot do; of trained ones, if steps move them."""
    tied = [geometry.name for geometry in analysis.geometries if geometry.readout_uses]
    if trained:
        tied = [name for name in tied if name in stepped]
    if tied and trained:
        yield (
            f"{some(tied)} is embedding and readout of a trained model, whose logits a multiplier would "
            "change: it takes the smaller rates of a readout; untie the two for a rate of each"
        )
    elif tied and parameterization == "ntk":
        yield (
            f"{some(tied)} is embedding and readout: where a residual path joins the two, logits hold "
            "|embedding|^2/sqrt(m), which grows as sqrt(width) under ntk; untie them for a lazy limit"
        )


def _deepened(analysis: Analysis, depth: float) -> tuple[Analysis, float]:
    """Return the analysis with the relative depth of every parameter, and that depth.

    Raises:
        PlanError: ``depth`` is no positive number.
        TransformError: There is no branch, or one has no module at its end.
    """
    if not is_number(depth) or not 0 < depth < inf:
        raise PlanError(f"depth must be a positive number of residual branches, not {depth!r}")
    if not analysis.branches:
        raise TransformError("depth= scales residual branches, and this model has no sum x + f(x)")
    # Two branches for each layer of a transformer, counted in the graph.
    ratio = len(analysis.branches) / depth
    for number, branch in enumerate(analysis.branches):
        if branch.reason and ratio != 1:
            raise TransformError(
                f"residual branch {number} ({some(branch.parameters) or 'shared weights'}) takes no "
                f"multiplier: {branch.reason}. Let a module of its own put out what is added, for example "
                "self.end = nn.Dropout(0.0) and x + self.end(f(x)) (nn.Identity leaves nothing in the graph)"
            )
    # Parameters inside of a branch act through it alone; those of the stream do not.
    inside: set[str] = set()
    for branch in analysis.branches:
        inside.update(branch.parameters)
    geometries = []
    for geometry in analysis.geometries:
        if geometry.name in inside:
            geometry = replace(geometry, depth=ratio)
        geometries.append(geometry)
    return replace(analysis, geometries=tuple(geometries)), ratio


def _carriers(analysis: Analysis, entries: Sequence[Entry], depth: float) -> tuple[Carrier, ...]:
    """Return what can hold the multipliers that this plan has."""
    multiplied = {entry.geometry.name for entry in entries if entry.scales.multiplier != 1}
    carriers = [carrier for carrier in analysis.carriers if carrier.tied in multiplied]
    if depth != 1:
        carriers += [branch.carrier for branch in analysis.branches]
    return tuple(carriers)


def _refuse(model: nn.Module) -> None:
    """Refuse what cannot be transformed, before anything is captured.

    Raises:
        TransformError: Not a module; compiled or wrapped; transformed already; with parameters that share
            their memory, and are not one.
    """
    if not isinstance(model, nn.Module):
        raise TransformError(f"transform takes a model (an nn.Module), not {kind_of(model)}")
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if type(module).__name__ in WRAPPERS:
            where = path or "the model"
            raise TransformError(f"{where} is compiled or wrapped; transform first, then compile and wrap")
    for path, module in modules.items():
        if ATTRIBUTE in vars(module):
            raise TransformError(
                f"{path or 'the model'} is transformed already; a second pass would scale twice. Build the "
                "model anew, or use model.mupass_plan.for_optimizer(...) for another optimizer. To put "
                "adapters on its trained weights, take the plan off before: fold(model, keep_plan=False)"
            )
    shared = shared_memory(dict(model.named_parameters()))
    if shared:
        first, second = shared
        raise TransformError(
            f"{first} and {second} are two parameters in one memory (weight.data, or the Parameter of a "
            "detached weight, was assigned): each factor and each step would be taken twice. Tie them as one "
            f"(model.{second} = model.{first}), or give one of them a clone()"
        )


def _refuse_settled(plan: object, given: Mapping[str, object], parameterization: str) -> None:
    """Refuse arguments that a saved plan settles; None, or the default, is none.

    Raises:
        PlanError: There are some, or the plan is none.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a mupass.Plan (Plan.load reads a file), not {kind_of(plan)}")
    settled_by_plan = [name for name, value in given.items() if value is not None]
    if parameterization not in ("mup", plan.parameterization):
        settled_by_plan.append("parameterization")
    if settled_by_plan:
        raise PlanError(f"plan= settles {', '.join(settled_by_plan)}; leave out one or the other")


def _apply(model: nn.Module, plan: Plan, trained: bool) -> None:
    check_rewritable(model, plan)
    if not trained and not plan.folded:
        _refuse_scaled(model, plan)
    # Hooks that were put on are taken off again where something fails later.
    with hooks_restored_on_error(model):
        attach(model)
        rewrite(model, plan, values=not trained)
    watch_models()


def _refuse_scaled(model: nn.Module, plan: Plan) -> None:
    """Refuse to scale anew what was scaled as a part of another model.

    Raises:
        TransformError: A parameter belongs to a transformed model that is alive, or its module has the tap
            that one left there.
    """
    others: set[int] = set()  # identities of the parameters of other transformed models
    for root in marked_models():
        if root is not model:
            others.update(map(id, root.parameters()))
    again = []
    for entry in plan.entries:
        if entry.init_factor == 1 and entry.scales.multiplier == 1:
            continue
        name = entry.geometry.name
        module = model.get_submodule(name.rpartition(".")[0])
        if id(model.get_parameter(name)) in others or tap_of(module) is not None:
            again.append(name)
    if again:
        raise TransformError(
            f"{some(again)} belong to another model that is transformed already, or to a part or a copy of "
            "one: a second pass would scale them twice. Transform one module whose forward runs both models; "
            "or build them anew; or give trained=True to leave all values as they are"
        )


def _doubts(inits: Mapping[str, Init]) -> Iterator[str]:
    """Say whose initialization law one cannot read off the values."""
    doubtful = [name for name, init in inits.items() if init.doubtful]
    if doubtful:
        yield (
            f"{OF_VALUES[0]} for {some(doubtful)}: settle it with init={{pattern: law}}, "
            "or transform a model of the base width, where it does not matter"
        )


def _one_sided(tensors: Values, geometries: Iterable[Geometry]) -> Iterator[str]:
    """Say which weights start with a mean, so that their sums follow no root of the number of terms."""
    names = []
    for geometry in geometries:
        values = tensors[geometry.name]
        # Trained values have means of their own, and are told as trained.
        if geometry.sums_change and has_a_mean(values, geometry) and not looks_trained(values, geometry):
            names.append(geometry.name)
    if names:
        yield (
            f"{OF_VALUES[2]} in {some(names)}: a sum over a side that grows goes with the width, not with "
            "its root, for which initialization and rates are scaled; draw values around zero"
        )


def _late(model: nn.Module, entries: Iterable[Entry]) -> Iterator[str]:
    """Say which parameters have no values yet that could be rescaled."""
    parameters = dict(model.named_parameters())
    # At base shapes nothing is scaled, so that missing values do not matter.
    scaled = [entry.geometry.name for entry in entries if entry.geometry.shape != entry.geometry.base_shape]
    late = [name for name in scaled if parameters[name].is_meta]
    if late:
        yield (
            f"{some(late)} {OF_VALUES[1]}: the initialization is still to be scaled. Once they have initial "
            "values (to_empty, then the model's own initialization), call mupass.initialize(model)"
        )


def _learned(model: nn.Module, plan: Plan, init: InitChoice) -> Iterator[str]:
    """Say which values look trained, where they would be rescaled."""
    # Values that no factor changes may be trained or not.
    if all(entry.init_factor == 1 for entry in plan.entries):
        return
    suspects = learned_of(plan, dict(model.named_parameters()), init)
    if suspects:
        yield (
            f"{some(suspects)} look trained: no initialization law draws such values, and they are rescaled "
            "with what was learned. Transform the model as it is built and load the checkpoint after that; "
            "or give trained=True to fine-tune it as it is; or init={pattern: law} if these are initial "
            "values"
        )
