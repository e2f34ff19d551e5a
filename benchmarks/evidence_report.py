"""What the runs of `benchmarks.evidence` say: tables, what counts against us, and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import (
    BASE,
    DESIGNS,
    KERNELS,
    OPTIMIZERS,
    PARAMETERIZATIONS,
    Row,
    Setup,
    Tuned,
    kernel_key,
    tuned,
)
from benchmarks.log import Log
from benchmarks.quality import Comparison, reaches, trailing

# Two-sided 95 % points of Student's t, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
OCTAVE = 1.0  # by which the optimum of mup may move before that counts against us
STEADY_FEATURES = 0.5  # share of the base width's change of features below which it has fallen
Lines = Mapping[int, Mapping[str, Any]]


def loss_of(line: Mapping[str, Any]) -> float:
    """Return a run's loss; one that diverged leaves its user with the untrained network's."""
    return line["final"] if math.isfinite(line["final"]) else line["initial"]


def vertex(losses: Sequence[float]) -> float:
    """Return where the optimum is, in factors of 2 from the middle of three rates, from -1 to 1.

    Args:
        losses: At half the rate, at the rate and at twice the rate; all positive.
    """
    below, middle, above = map(math.log, losses)
    if below < middle or above < middle:
        return -1.0 if below <= above else 1.0
    bend = below - 2 * middle + above
    return 0.0 if bend == 0 else (below - above) / (2 * bend)


@dataclass(frozen=True)
class Cell:
    """What was run of one row at one width.

    Attributes:
        row: Optimizer, task, parameterization.
        width: The width.
        narrow: What was tuned at the base width.
        own: What was tuned at this width.
        by_power: Runs of the fresh seeds by rate and seed, of the rates that all seeds have.
        steps: Steps of a run that does not diverge.
    """

    row: Row
    width: int
    narrow: Tuned
    own: Tuned
    by_power: Mapping[int, Lines]
    steps: int

    def __str__(self) -> str:
        return f"{self.row.task}, {self.row.optimizer}, {self.width}"

    @classmethod
    def read(cls, log: Log, row: Row, width: int, setup: Setup) -> Cell | None:
        """Return what is in the log; None where seeds at either rate are missing."""
        narrow, own = tuned(log, row, BASE, setup), tuned(log, row, width, setup)
        if narrow is None or own is None:
            return None
        powers = {}
        for power in {narrow.power, own.power - 1, own.power, own.power + 1}:
            found = {seed: log.get(**setup.key(row, width, power, seed)) for seed in setup.fresh_seeds()}
            lines = {seed: line for seed, line in found.items() if line is not None}
            if len(lines) == setup.seeds:
                powers[power] = lines
        if not {narrow.power, own.power} <= powers.keys():
            return None
        return cls(row, width, narrow, own, powers, setup.steps)

    @property
    def transferred(self) -> Lines:
        """The runs at the rate tuned at the base width."""
        return self.by_power[self.narrow.power]

    @property
    def retuned(self) -> Lines:
        """The runs at the width's own rate."""
        return self.by_power[self.own.power]

    def regret(self) -> Comparison:
        """Return the loss at the base width's rate minus that at the own one."""
        return paired(self.transferred, self.retuned)

    def regret_in_steps(self) -> float:
        """Return by how many steps the runs at their own rate are earlier, as the mean over seeds."""
        found = []
        for seed, line in self.transferred.items():
            if not math.isfinite(line["final"]):
                diverged_too = not math.isfinite(self.retuned[seed]["final"])
                found.append(0 if diverged_too else self.steps)
                continue
            reached = reaches(self.retuned[seed], trailing(line["curve"], len(line["curve"])))
            found.append(0 if reached is None else self.steps - reached)
        return statistics.fmean(found)

    def optima(self) -> dict[int, float] | None:
        """Return each seed's best rate, as a power of 2 times the default; None without neighbours."""
        middle = self.own.power
        powers = (middle - 1, middle, middle + 1)
        if not self.by_power.keys() >= set(powers):
            return None
        found = {}
        for seed in self.retuned:
            losses = [loss_of(self.by_power[power][seed]) for power in powers]
            found[seed] = middle + vertex(losses)
        return found

    def change(self) -> float:
        """Return the mean change of features at the base width's rate."""
        return statistics.fmean(line["change"] for line in self.transferred.values())


def paired(first: Lines, second: Lines) -> Comparison:
    """Return the difference of two sets of runs, first minus second, by seed."""
    losses = [[loss_of(lines[seed]) for seed in sorted(first)] for lines in (first, second)]
    return Comparison.of(*losses)


def shift(narrow: Cell, wide: Cell) -> tuple[float, float] | None:
    """Return by how many factors of 2 the optimum moves, and half its 95 % interval; None if not run."""
    first, second = narrow.optima(), wide.optima()
    if first is None or second is None:
        return None
    moves = [second[seed] - first[seed] for seed in sorted(first)]
    if len(moves) not in STUDENT:
        return statistics.fmean(moves), math.nan
    return statistics.fmean(moves), STUDENT[len(moves)] * statistics.stdev(moves) / math.sqrt(len(moves))


def read_all(setup: Setup) -> dict[Row, dict[int, Cell]]:
    """Return what was run, by row and width; rows without anything are left out."""
    log, found = setup.log(), {}
    for row in setup.rows():
        cells = {width: Cell.read(log, row, width, setup) for width in setup.widths_of(row.task)}
        there = {width: cell for width, cell in cells.items() if cell is not None}
        if there:
            found[row] = there
    return found


# Tables ----------------------------------------------------------------------------------------------------


def mean_text(lines: Lines) -> str:
    """Write the mean loss and its standard error, and how many runs diverged."""
    losses = [loss_of(line) for line in lines.values()]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    lost = sum(not math.isfinite(line["final"]) for line in lines.values())
    return f"{statistics.fmean(losses):.4f} ± {error:.4f}" + (f" ({lost} diverged)" if lost else "")


def rate_text(found: Tuned) -> str:
    return f"2^{found.power}" + ("" if found.bracketed else " !")


def cell_line(cell: Cell) -> str:
    regret = cell.regret()
    own_change = statistics.fmean(line["change"] for line in cell.retuned.values())
    parts = [
        cell.row.optimizer,
        cell.row.parameterization,
        str(cell.width),
        rate_text(cell.narrow),
        mean_text(cell.transferred),
        rate_text(cell.own),
        mean_text(cell.retuned),
        f"{regret.mean:+.4f} ± {regret.error:.4f}",
        f"{cell.regret_in_steps():.0f}",
        f"{cell.change():.2f}",
        f"{own_change:.2f}",
    ]
    return "| " + " | ".join(parts) + " |"


HEADS = (
    "optimizer",
    "parameterization",
    "width",
    "rate of width 64",
    "loss at it",
    "own rate",
    "loss at it",
    "regret, loss",
    "regret, steps",
    "features' change",
    "at own rate",
)


def heading(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def task_table(name: str, found: Mapping[Row, Mapping[int, Cell]]) -> list[str]:
    """Return the markdown table of one task, empty where nothing was run."""
    lines = [cell_line(cell) for row, cells in found.items() if row.task == name for cell in cells.values()]
    return ["", f"### {name}", "", *heading(HEADS), *lines] if lines else []


def shift_table(found: Mapping[Row, Mapping[int, Cell]]) -> list[str]:
    """Return the markdown table of the shifts of the optimum."""
    lines = []
    for row, cells in found.items():
        narrow, wide = (cells.get(width) for width in DESIGNS[row.task].spread)
        moved = shift(narrow, wide) if narrow is not None and wide is not None else None
        if moved is not None and wide is not None:
            names = f"{row.task} | {row.optimizer} | {row.parameterization} | {BASE} to {wide.width}"
            lines.append(f"| {names} | {moved[0]:+.2f} ± {moved[1]:.2f} |")
    heads = ("task", "optimizer", "parameterization", "widths", "shift of the optimum, factors of 2")
    return ["", "### Shift of the optimum", "", *heading(heads), *lines] if lines else []


def kernel_losses(log: Log, name: str) -> dict[tuple[str, int], float]:
    """Return the losses of kernel regression by kernel and number of samples."""
    found = {}
    for samples in KERNELS:
        for kernel in ("nngp", "ntk"):
            line = log.get(**kernel_key(name, kernel, samples))
            if line is not None:
                found[kernel, samples] = line["final"]
    return found


def kernel_table(log: Log) -> list[str]:
    lines = []
    for name in DESIGNS:
        for (kernel, samples), loss in kernel_losses(log, name).items():
            lines.append(f"| {name} | {kernel.upper()} | {samples} | {loss:.4f} |")
    heads = ("task", "kernel", "samples", "loss")
    return ["", "### Kernel regression", "", *heading(heads), *lines] if lines else []


# What counts against us ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One criterion, applied.

    Attributes:
        number: Of the criterion in `CRITERIA`.
        where: Task, optimizer and width.
        figures: What was measured.
        against: Whether that counts against us.
    """

    number: int
    where: str
    figures: str
    against: bool


CRITERIA = {
    1: "at the rate tuned at width 64, standard is not worse than mup by two paired standard errors",
    2: "at the rate tuned at width 64, mup's loss is higher than at width 64 by two paired standard errors",
    3: "the optimum of mup moves by more than one factor of 2",
    4: "mup's regret in loss is not below standard's",
    5: "standard, retuned, is better than mup, retuned, by two paired standard errors",
    6: "the features of mup change by less than half of what they do at width 64",
    7: "kernel regression on the most samples that were run is no worse than mup",
    8: "with constant damping mup's regret in loss is not above that with relative damping",
}


def text(comparison: Comparison) -> str:
    return f"{comparison.mean:+.4f} ± {comparison.error:.4f}"


def judge(mup: Mapping[int, Cell], standard: Mapping[int, Cell]) -> Iterator[Finding]:
    """Apply the first six criteria to one optimizer on one task, at the widest width that both have."""
    wider = [width for width in mup if width in standard and width > BASE]
    if not wider or BASE not in mup:
        return
    ours, theirs, start = mup[max(wider)], standard[max(wider)], mup[BASE]
    here = str(ours)
    gain = paired(theirs.transferred, ours.transferred)
    # The error of one seed is not a number and tells nothing: that counts against us too.
    yield Finding(1, here, f"standard - mup {text(gain)}", not gain.mean > 2 * gain.error)
    rise = paired(ours.transferred, start.transferred)
    yield Finding(2, here, f"{ours.width} - {BASE} {text(rise)}", not rise.mean <= 2 * rise.error)
    far = mup.get(DESIGNS[ours.row.task].spread[-1])
    moved = shift(start, far) if far is not None else None
    if moved is not None:
        yield Finding(3, str(far), f"{moved[0]:+.2f} ± {moved[1]:.2f}", abs(moved[0]) > OCTAVE)
    regrets = ours.regret(), theirs.regret()
    both = f"mup {text(regrets[0])}, standard {text(regrets[1])}"
    yield Finding(4, here, both, regrets[0].mean >= regrets[1].mean)
    best = paired(theirs.retuned, ours.retuned)
    yield Finding(5, here, f"standard - mup {text(best)}", best.mean < -2 * best.error)
    ratio = ours.change() / start.change()
    yield Finding(6, here, f"{ratio:.2f} times", not ratio >= STEADY_FEATURES)


def judge_kernels(log: Log, found: Mapping[Row, Mapping[int, Cell]]) -> Iterator[Finding]:
    """Compare mup at its widest with kernel regression."""
    for row, cells in found.items():
        losses = kernel_losses(log, row.task)
        if row.parameterization != "mup" or not losses:
            continue
        most = max(samples for _, samples in losses)
        kernel = min(loss for (_, samples), loss in losses.items() if samples == most)
        cell = cells[max(cells)]
        ours = statistics.fmean(loss_of(line) for line in cell.transferred.values())
        figures = f"kernel {kernel:.4f}, mup {ours:.4f}"
        yield Finding(7, str(cell), figures, kernel <= ours)


def judge_damping(found: Mapping[Row, Mapping[int, Cell]]) -> Iterator[Finding]:
    """Compare relative with constant damping under mup, at the widest width that both have."""
    for row, relative in found.items():
        constant = found.get(replace(row, optimizer=f"{row.optimizer}_constant"), {})
        common = [width for width in relative if width in constant and width > BASE]
        if row.parameterization != "mup" or not common:
            continue
        width = max(common)
        ours, theirs = relative[width].regret(), constant[width].regret()
        figures = f"relative {text(ours)}, constant {text(theirs)}"
        yield Finding(8, str(relative[width]), figures, theirs.mean <= ours.mean)


def findings(log: Log, found: Mapping[Row, Mapping[int, Cell]]) -> list[Finding]:
    """Apply all criteria to what was run."""
    every: list[Finding] = []
    for row, cells in found.items():
        standard = found.get(replace(row, parameterization="standard"))
        if row.parameterization == "mup" and standard is not None:
            every += judge(cells, standard)
    every += [*judge_kernels(log, found), *judge_damping(found)]
    return sorted(every, key=lambda finding: finding.number)


def findings_table(every: Sequence[Finding]) -> list[str]:
    if not every:
        return []
    lines = []
    for finding in every:
        word = "**against**" if finding.against else "for"
        lines.append(f"| {finding.number} | {finding.where} | {finding.figures} | {word} |")
    count = sum(finding.against for finding in every)
    heads = ("criterion", "task, optimizer, width", "measured", "counts")
    end = f"{count} of {len(every)} count against us."
    return ["", "### What counts against us", "", *heading(heads), *lines, "", end]


def tables(setup: Setup) -> str:
    """Return all tables as markdown, of what was run with these numbers of steps and seeds."""
    whole = replace(setup, long=True, widths=None)
    log, found = whole.log(), read_all(whole)
    commits = sorted({line["commit"] for line in log.rows.values()})
    minutes = sum(line["cpu_seconds"] for line in log.rows.values()) / 60
    lines = [
        f"Commit {', '.join(commits) or 'none'}; torch {torch.__version__}; {len(log.rows)} lines, "
        f"{minutes:.0f} CPU minutes. Losses: mean ± standard error of {setup.seeds} seeds. "
        "Rates: times the default. !: not bracketed.",
    ]
    for name in DESIGNS:
        lines += task_table(name, found)
    lines += shift_table(found) + kernel_table(log) + findings_table(findings(log, found))
    return "\n".join(lines)


# The picture -----------------------------------------------------------------------------------------------


COLUMNS = 5  # panels beside each other
COLORS = {"mup": "#1f77b4", "standard": "#d62728", "ntk": "#7f7f7f"}


def draw(setup: Setup, path: Path, name: str = "staircase") -> None:
    """Draw loss against width at the rate tuned at width 64: a panel an optimizer, all seeds as a band.

    Raises:
        ValueError: Nothing was run.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # By name: run as a script, `benchmarks.evidence` has a class of rows of its own.
    found = {str(row): cells for row, cells in read_all(replace(setup, long=True, widths=None)).items()}
    shown = [optimizer for optimizer in OPTIMIZERS if f"{name}/{optimizer}/mup" in found]
    if not shown:
        raise ValueError(f"{setup.out} has no complete rows of {name} under mup: run them first")
    columns = min(len(shown), COLUMNS)
    rows = math.ceil(len(shown) / columns)
    size = (3.2 * columns + 0.8, 2.9 * rows + 0.5)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for empty in axes.flat[len(shown) :]:
        empty.set_axis_off()
    for axis, optimizer in zip(axes.flat, shown, strict=False):
        for kind in PARAMETERIZATIONS:
            cells = found.get(f"{name}/{optimizer}/{kind}", {})
            losses = {w: [loss_of(line) for line in c.transferred.values()] for w, c in cells.items()}
            if not losses:
                continue
            means = [statistics.fmean(values) for values in losses.values()]
            low, high = ([end(values) for values in losses.values()] for end in (min, max))
            axis.plot(list(losses), means, marker="o", color=COLORS[kind], label=kind)
            axis.fill_between(list(losses), low, high, color=COLORS[kind], alpha=0.2, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(optimizer)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("width")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out loss")
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{name}: same rate, tuned at width {BASE}, in wider networks")
    figure.savefig(path)
    plt.close(figure)
