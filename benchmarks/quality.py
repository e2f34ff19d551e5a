"""The losses that our optimizers and their peers reach, each tuned on the same grid: paired by seed.

    OMP_NUM_THREADS=1 python -m benchmarks.quality --peers FOLDER --jobs 2  # what is not done, then tables
    python -m benchmarks.quality --peers FOLDER --estimate                  # CPU minutes that are left
    python -m benchmarks.quality --peers FOLDER --table                     # tables of what was run
    python -m benchmarks.quality --peers FOLDER --only-time --out FILE      # times of steps, on this machine

Tasks: character GPTs of two blocks, 64 and 128 wide, 8 sequences of 64; a plain CNN and an MLP on
Fashion-MNIST at 28 x 28, batch 64. `benchmarks.peers` says where the peers come from and how they are set up;
one that is missing is left out by name.

Decided before the first run:

* 300 steps at a constant rate. Every batch is new to the model; the *final loss* is the mean over the last
  50. A loss that is NaN, infinite or above 100 ends the run, and its final loss is infinite.
* Tuning: on seed 0, from a start on a grid of powers of 2, until the best rate has worse ones on both sides.
  Then seeds 1 to 5 at that rate: none of them chose it. Weights and batches of a seed are the same for all.
* A *pair* holds if the mean over seeds of the difference, ours minus the peer's, is at most the larger of 1 %
  of the peer's loss and two standard errors of that mean.
* All rates but the tuned one are equal on both sides. SOAP and Shampoo with Adam's graft give Adam the tuned
  rate for what they do not precondition, as the peers do; beside Muon and K-FAC AdamW has 2^-8. Roots, bases
  and inverses are due every 10 steps everywhere. SOAP has blocks of 1024, which cut nothing here: its peers
  have none. Everything else is what each package has by default or `benchmarks.peers` says. kfac-pytorch is
  there as it is by default, and with damping 1e-2, unclipped.
* *Steps to AdamW*: the first step at which the mean over the last 50 is at AdamW's final loss of that seed;
  seconds are these steps times the time of a step.
* Time of a step: forward, backward and optimizer, all contestants interleaved in one process on one thread,
  process time, the median over periods of 10 steps of the mean within, after a warm-up of 11.

A run is one line of JSON, under a key that holds the contestant's arguments; a benchmark that was killed goes
on where it was. ``--set NAME.argument=value`` changes an argument of one of ours, in a key of its own.
"""

from __future__ import annotations

import argparse
import inspect
import math
import multiprocessing
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mupass
from benchmarks import peers
from benchmarks.char_transfer import search
from benchmarks.defaults import literal
from benchmarks.log import RESULTS, Log, commit, digest
from benchmarks.tasks import Task, task, training

STEPS, LAST, BUCKET = 300, 50, 10
SEEDS = (1, 2, 3, 4, 5)
BLOWN_UP = 100.0
REST_LR = 2.0**-8
WHOLE = 1024  # SOAP's peers cut no blocks
TIMED_LR = 1e-4  # small: what is timed should not diverge
PERIODS, WARM = 6, peers.PERIOD + 1
TASKS = {"gpt_64": 8, "gpt_128": 8, "cnn_28": 64, "mlp_28": 64}  # with their batches
KEY = ("kind", "task", "contestant", "lr", "seed", "settings")
PERIOD = peers.PERIOD


@dataclass(frozen=True)
class Contestant:
    """An optimizer that takes part.

    Attributes:
        start: Power of 2 at which its tuning starts.
        make: One of ours, a class; or a function of `benchmarks.peers`.
        settings: What it is told beyond its defaults.
        rivals: For ours, the peers that it is compared with.
        same_rate: For ours, whether what it does not precondition has the tuned rate too.
        package: What it needs, by a name that `peers.missing` knows.
    """

    start: int
    make: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()
    same_rate: bool = True
    package: str | None = None

    @property
    def ours(self) -> bool:
        return isinstance(self.make, type)

    def build(self, model: nn.Module, lr: float, **changes: Any) -> peers.Optimizers:
        """Build the optimizers; ours need a transformed model."""
        if self.ours:
            rest = {"fallback_lr": lr if self.same_rate else REST_LR}
            return [self.make(model, lr, **{**rest, **self.settings, **changes})]
        return self.make(model, lr, **{**self.settings, **changes})

    def digest(self, steps: int) -> str:
        """Hash what its runs depend on, the defaults of all arguments too."""
        parameters = inspect.signature(self.make).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        rest = {"same rate": self.same_rate, "number of steps": steps}
        return digest({**defaults, **self.settings, **rest})


def adamw(model: nn.Module, lr: float) -> peers.Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, foreach=True)]


def unclipped(step: int) -> None:
    """Return what kfac-pytorch takes for no clipping; it refuses None itself."""


KFAC_PEERS = ("kfac-pytorch", "kfac-pytorch # damping 1e-2, unclipped")
CONTESTANTS = {
    "AdamW": Contestant(-8, adamw),
    "mupass SOAP": Contestant(
        -8,
        mupass.SOAP,
        {"basis_every": PERIOD, "block_size": WHOLE},
        rivals=("official SOAP", "HeavyBall SOAP"),
    ),
    "official SOAP": Contestant(-8, peers.official_soap, package="official SOAP"),
    "HeavyBall SOAP": Contestant(-8, peers.heavyball_soap, {"compiled": False}, package="HeavyBall SOAP"),
    "mupass Shampoo": Contestant(
        -8, mupass.Shampoo, {"graft": "adam", "root_every": PERIOD}, rivals=("Distributed Shampoo",)
    ),
    "Distributed Shampoo": Contestant(-8, peers.distributed_shampoo, package="Distributed Shampoo"),
    "mupass Muon": Contestant(-5, mupass.Muon, rivals=("torch Muon",), same_rate=False),
    "torch Muon": Contestant(-5, peers.torch_muon, {"rest_lr": REST_LR}, package="torch Muon"),
    "mupass KFAC": Contestant(-6, mupass.KFAC, {"root_every": PERIOD}, rivals=KFAC_PEERS, same_rate=False),
    KFAC_PEERS[0]: Contestant(-5, peers.kfac_pytorch, {"rest_lr": REST_LR}, package="kfac-pytorch"),
    KFAC_PEERS[1]: Contestant(
        -6,
        peers.kfac_pytorch,
        {"rest_lr": REST_LR, "damping": 1e-2, "kl_clip": unclipped},
        package="kfac-pytorch",
    ),
}


@dataclass(frozen=True)
class Setup:
    """What the command line chose."""

    contestants: Mapping[str, Contestant]
    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    data: str | None = None
    folder: str | None = None
    out: Path = RESULTS / "quality.jsonl"

    def log(self) -> Log:
        return Log(self.out, KEY)

    def key(self, kind: str, name: str, who: str, lr: float | None, seed: int | None) -> dict[str, Any]:
        settings = self.contestants[who].digest(self.steps)
        return {
            "kind": kind, "task": name, "contestant": who, "lr": lr, "seed": seed, "settings": settings,
        }  # fmt: skip


def seeded(work: Task, contestant: Contestant, seed: int) -> nn.Module:
    """Return the same weights for all: at its base width `mupass.transform` changes none."""
    torch.manual_seed(seed)
    model = work.build(work.base)
    if contestant.ours:
        mupass.transform(model, work.test[0][:2], base=work.base)
    return model


def train(name: str, who: str, lr: float, seed: int, setup: Setup) -> dict[str, Any]:
    """Do one run and return its line."""
    work, contestant = task(name, setup.data), setup.contestants[who]
    model = seeded(work, contestant, seed)
    optimizers = contestant.build(model, lr)
    start = time.process_time()
    batches = work.batches(TASKS[name], seed)
    losses = list(training(model, optimizers, work, batches, setup.steps, BLOWN_UP))
    seconds = time.process_time() - start
    final, curve = outcome(losses, setup.steps)
    return {
        **setup.key("run", name, who, lr, seed),
        "final": final,
        "test": work.evaluate(model) if math.isfinite(final) else math.inf,
        "curve": curve,
        "cpu_seconds": round(seconds, 2),
        "commit": commit(),
    }


def done_or_train(name: str, who: str, lr: float, seed: int, setup: Setup) -> dict[str, Any]:
    log = setup.log()
    row = log.get(**setup.key("run", name, who, lr, seed))
    if row is None:
        row = train(name, who, lr, seed, setup)
        log.add(row)
    return row


class Late(RuntimeError):
    """Time is up."""


def finish(pair: tuple[str, str], setup: Setup, until: float) -> str:
    """Tune one contestant on one task, then train the seeds; say how it went."""
    name, who = pair
    peers.look_into(setup.folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def run(lr: float, seed: int) -> float:
        if time.time() > until:
            raise Late
        return done_or_train(name, who, lr, seed, setup)["final"]

    try:
        found = search(lambda lr: run(lr, 0), 2.0 ** setup.contestants[who].start, 2)
        if not math.isfinite(found.losses[found.best]):
            return f"{name} {who}: every rate diverged, down to {min(found.losses):g}"
        finals = [run(found.best, seed) for seed in setup.seeds]
    except Late:
        return f"{name} {who}: to be continued"
    tuned = "  ".join(f"2^{math.log2(lr):.0f} {loss:.3f}" for lr, loss in sorted(found.losses.items()))
    return f"{name} {who}: {tuned}; seeds: {' '.join(f'{x:.3f}' for x in finals)}"


def tuned_rate(log: Log, name: str, who: str, setup: Setup) -> tuple[float, bool] | None:
    """Return the best rate of seed 0, and whether the grid brackets it; None where nothing converged."""
    fields = setup.key("run", name, who, None, 0)
    del fields["lr"]
    losses = {row["lr"]: row["final"] for row in log.some(**fields)}
    if not any(map(math.isfinite, losses.values())):
        return None
    best = min(losses, key=lambda lr: (losses[lr], lr))
    return best, {best / 2, best * 2} <= losses.keys()


def measure_time(name: str, setup: Setup) -> None:
    """Time all contestants on one task, interleaved, and log a line for each."""
    work, log = task(name, setup.data), setup.log()
    clocked: dict[str, tuple[nn.Module, peers.Optimizers, list[float]]] = {}
    for who, contestant in setup.contestants.items():
        model = seeded(work, contestant, 0)
        changes = {"compiled": True} if "compiled" in contestant.settings else {}
        clocked[who] = model, contestant.build(model, TIMED_LR, **changes), []
    count = WARM + PERIODS * PERIOD
    rounds = work.batches(TASKS[name], 0)
    for _ in range(count):
        batch = next(rounds)
        for model, optimizers, times in clocked.values():
            start = time.process_time()
            for _ in training(model, optimizers, work, iter([batch]), 1, math.inf):
                pass
            times.append(time.process_time() - start)
    together = f"{commit()} {time.time():.0f}"
    for who, (_, _, times) in clocked.items():
        parts = [times[i : i + PERIOD] for i in range(WARM, count, PERIOD)]
        means = [1e3 * statistics.fmean(part) for part in parts]
        row = {"milliseconds": statistics.median(means), "worst": 1e3 * max(times[WARM:]), "run": together}
        log.add({**setup.key("time", name, who, None, None), **row, "commit": commit()})


def times_of(log: Log, name: str, setup: Setup) -> dict[str, float]:
    """Return milliseconds a step, of contestants that were timed in one run; the last run counts."""
    rows = {who: log.get(**setup.key("time", name, who, None, None)) for who in setup.contestants}
    runs = [row["run"] for row in rows.values() if row]
    last = max(runs, key=lambda run: float(run.split()[-1]), default=None)
    return {who: row["milliseconds"] for who, row in rows.items() if row and row["run"] == last}


def seeds_of(log: Log, name: str, who: str, setup: Setup) -> dict[int, dict[str, Any]]:
    """Return the runs of the seeds at the tuned rate."""
    tuned = tuned_rate(log, name, who, setup)
    if tuned is None:
        return {}
    found = {seed: log.get(**setup.key("run", name, who, tuned[0], seed)) for seed in setup.seeds}
    return {seed: row for seed, row in found.items() if row is not None}


@dataclass(frozen=True)
class Comparison:
    """Differences by seed, ours minus the peer's."""

    mean: float
    error: float
    peer: float

    @classmethod
    def of(cls, mine: Sequence[float], theirs: Sequence[float]) -> Comparison:
        differences = [a - b for a, b in zip(mine, theirs, strict=True)]
        error = (
            statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        )
        return cls(statistics.fmean(differences), error, statistics.fmean(theirs))

    @property
    def holds(self) -> bool:
        """Whether ours is at most as much worse as chance or 1 % allow."""
        return self.mean <= max(0.01 * self.peer, 2 * self.error)

    def __str__(self) -> str:
        word = "yes" if self.holds else "NO"
        return f"{self.mean:+8.4f} +- {self.error:.4f} ({100 * self.mean / self.peer:+5.1f} %) {word:>4}"


def outcome(losses: Sequence[float], steps: int) -> tuple[float, list[float]]:
    """Return the final loss of a run, infinite where it ended early, and its mean losses by buckets."""
    curve = [statistics.fmean(losses[i : i + BUCKET]) for i in range(0, len(losses), BUCKET)]
    whole = len(losses) == steps and losses[-1] <= BLOWN_UP
    return trailing(curve, len(curve)) if whole else math.inf, curve


def trailing(curve: Sequence[float], end: int) -> float:
    """Return the mean over the last 50 steps before the end of a bucket."""
    return statistics.fmean(curve[end - LAST // BUCKET : end])


def reaches(row: Mapping[str, Any], target: float) -> int | None:
    """Return the first step at which the mean over the last 50 losses is at the target."""
    for end in range(LAST // BUCKET, len(row["curve"]) + 1):
        if trailing(row["curve"], end) <= target:
            return end * BUCKET
    return None


def to_target(
    rows: Mapping[int, Mapping[str, Any]], adam: Mapping[int, Mapping[str, Any]]
) -> tuple[str, float]:
    """Return mean steps to AdamW's final loss as text and as a number, NaN if a seed does not get there."""
    steps = [reaches(row, adam[seed]["final"]) for seed, row in rows.items() if seed in adam]
    there = [n for n in steps if n is not None]
    if not there or len(there) < len(steps):
        return f"{len(there)} of {len(steps)}", math.nan
    return f"{statistics.fmean(there):.0f}", statistics.fmean(there)


def task_table(log: Log, name: str, setup: Setup) -> list[str]:
    """Return the losses, times and pairs of one task."""
    lines = ["", f"{name}, batch {TASKS[name]}, {setup.steps} steps"]
    lines.append(
        f"{'':<40}{'rate':>7}{'final +- deviation':>20}{'test':>8}{'to AdamW':>10}{'CPU s':>8}{'ms':>8}"
    )
    times = times_of(log, name, setup)
    runs = {who: seeds_of(log, name, who, setup) for who in setup.contestants}
    for who, rows in runs.items():
        tuned = tuned_rate(log, name, who, setup)
        if tuned is None or not rows:
            lines.append(f"{who:<40}{'nothing is done, or all diverged':>40}")
            continue
        finals = [row["final"] for row in rows.values()]
        spread = statistics.stdev(finals) if len(finals) > 1 else math.nan
        steps, number = to_target(rows, runs.get("AdamW", {}))
        ms = times.get(who, math.nan)
        rate = f"2^{math.log2(tuned[0]):.0f}" + ("" if tuned[1] else "!")
        test = statistics.fmean(row["test"] for row in rows.values())
        lines.append(
            f"{who:<40}{rate:>7}{statistics.fmean(finals):>11.4f} +- {spread:.4f}{test:>8.4f}{steps:>10}"
            f"{number * ms / 1e3:>8.2f}{ms:>8.1f}"
        )
    lines.append(f"{'pair':<56}{'difference by seed +- its error, holds':>38}{'time':>8}")
    for who, rival in compared(setup):
        seeds = [seed for seed in runs[who] if seed in runs[rival]]
        if not seeds:
            continue
        comparison = Comparison.of(*([runs[x][seed]["final"] for seed in seeds] for x in (who, rival)))
        ratio = times[who] / times[rival] if {who, rival} <= times.keys() else math.nan
        lines.append(f"{who + ' / ' + rival:<56}{comparison!s:>38}{ratio:>8.2f}")
    return lines


def compared(setup: Setup) -> list[tuple[str, str]]:
    """Return the pairs: ours with each of its peers, and with AdamW."""
    found = []
    for who, contestant in setup.contestants.items():
        rivals = (*contestant.rivals, "AdamW") if contestant.ours else ()
        found += [(who, rival) for rival in rivals if rival in setup.contestants]
    return found


def table(names: Sequence[str], setup: Setup) -> str:
    log = setup.log()
    commits = sorted({row["commit"] for row in log.rows.values()})
    lines = [f"commit {', '.join(commits) or 'none'}; torch {torch.__version__}; {bfloat16()}"]
    for name in names:
        lines += task_table(log, name, setup)
    lines.append(
        "!: the grid does not bracket the rate; time: ours / the peer's; k of n: so many seeds get there"
    )
    return "\n".join(lines)


def time_table(names: Sequence[str], setup: Setup) -> str:
    """Return milliseconds a step on every task; of ours beside the time of each rival."""
    times = {name: times_of(setup.log(), name, setup) for name in names}
    lines = [f"| {bfloat16()} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for who in setup.contestants:
        cells = [f"{times[name][who]:.1f}" for name in names]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    for who, rival in compared(setup):
        cells = [f"{times[name][who] / times[name][rival]:.2f}" for name in names]
        lines.append(f"| {who} / {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bfloat16() -> str:
    """Say whether this CPU multiplies in bfloat16: torch's Muon does nothing else."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "a CPU of unknown kind"
    return f"a CPU with{'' if 'avx512_bf16' in flags or 'amx_bf16' in flags else 'out'} bfloat16 products"


def left(name: str, who: str, setup: Setup) -> tuple[float, float]:
    """Return seconds that a contestant has taken on a task, and that it will take, by a few steps."""
    log, contestant, work = setup.log(), setup.contestants[who], task(name, setup.data)
    fields = {"kind": "run", "task": name, "contestant": who, "settings": contestant.digest(setup.steps)}
    rows = log.some(**fields)
    spent = sum(row["cpu_seconds"] for row in rows)
    tuned = tuned_rate(log, name, who, setup)
    more = 0 if tuned and tuned[1] else max(1, 5 - len(rows))
    more += len(setup.seeds) - len(seeds_of(log, name, who, setup))
    if not more or rows:
        return spent, more * spent / max(1, len(rows))
    model = seeded(work, contestant, 0)
    optimizers = contestant.build(model, TIMED_LR)
    ends = [time.process_time()]
    for _ in training(model, optimizers, work, work.batches(TASKS[name], 0), PERIOD + 1, math.inf):
        ends.append(time.process_time())
    return spent, more * setup.steps * (ends[-1] - ends[1]) / PERIOD


def estimate(names: Sequence[str], setup: Setup) -> str:
    """Return minutes by task and contestant; timing takes a few minutes more."""
    lines = [f"{'CPU minutes left':<42}" + "".join(f"{name:>10}" for name in names)]
    total = done = 0.0
    for who in setup.contestants:
        cells = [left(name, who, setup) for name in names]
        lines.append(f"{who:<42}" + "".join(f"{rest / 60:>10.1f}" for _, rest in cells))
        total += sum(rest for _, rest in cells) / 60
        done += sum(spent for spent, _ in cells) / 60
    return "\n".join([*lines, f"spent {done:.1f}, left {total:.1f}"])


def chosen(options: argparse.Namespace) -> dict[str, Contestant]:
    """Return who takes part, with the arguments of ``--set``; say who is missing.

    Raises:
        ValueError: An argument for nobody, or for a peer.
    """
    found = {who: c for who, c in CONTESTANTS.items() if not options.only or matches(who, options.only)}
    for who, reason in peers.missing([c.package for c in found.values() if c.package]).items():
        print(f"left out: {who} ({reason})")
        found = {name: c for name, c in found.items() if c.package != who}
    for word in options.set:
        name, dot, rest = word.partition(".")
        argument, sign, text = rest.partition("=")
        who = f"mupass {name}"
        if not (dot and sign and who in found):
            raise ValueError(f"--set {word}: NAME.argument=value, with a NAME of SOAP, Shampoo, Muon, KFAC")
        settings = {**found[who].settings, argument: literal(text)}
        found[who] = replace(found[who], settings=settings)
    return found


def matches(text: str, words: Sequence[str]) -> bool:
    return any(re.search(word, text) for word in words)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", metavar="FOLDER", help="whose subfolders hold what is not installed")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="+", default=[], help="regular expressions of contestants")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME.key=VALUE")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Setup.out)
    parser.add_argument("--estimate", action="store_true", help="print CPU minutes and do nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of what was run")
    parser.add_argument("--no-time", action="store_true", help="do not time steps")
    parser.add_argument("--only-time", action="store_true", help="time steps, train nothing to its end")
    return parser.parse_args(arguments)


def work_off(names: Sequence[str], setup: Setup, options: argparse.Namespace) -> None:
    """Do what is missing: the runs first, on several processes, then the times, alone."""
    until = time.time() + 60 * options.minutes
    pairs = [(name, who) for name in names for who in setup.contestants]
    work = partial(finish, setup=setup, until=until)
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for line in pool.imap_unordered(work, pairs):
                print(line, flush=True)
    else:
        for line in map(work, pairs):
            print(line, flush=True)
    for name in names:
        if not options.no_time and time.time() < until:
            if times_of(setup.log(), name, setup).keys() != setup.contestants.keys():
                measure_time(name, setup)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.steps % BUCKET or options.steps < LAST:
        print(f"--steps {options.steps}: a multiple of {BUCKET}, from {LAST}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    peers.look_into(options.peers)
    try:
        contestants = chosen(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    setup = Setup(contestants, options.steps, tuple(options.seeds), options.data, options.peers, options.out)
    if options.estimate:
        print(estimate(options.tasks, setup))
        return 0
    if options.only_time:
        for name in options.tasks:
            measure_time(name, setup)
        print(time_table(options.tasks, setup))
        return 0
    if not options.table:
        work_off(options.tasks, setup, options)
    print(table(options.tasks, setup))
    return 0


if __name__ == "__main__":
    sys.exit(main())
