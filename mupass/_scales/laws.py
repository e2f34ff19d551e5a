"""Which initialization law a model's weights follow, read off their values.

One tensor alone often fits several laws (in a square layer fan_in, fan_out and a constant are the same
thing), so all tensors are judged together: the law that explains most of them, with a gain that people
really use, wins, and what it explains is set aside before the next law is sought.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import hypot, prod, sqrt

DEFAULT_GAIN = 1 / sqrt(3)  # U(+-1/sqrt(fan_in)): nn.Linear, nn.Conv, recurrent layers, and their biases
UNIT_GAIN = 1 / sqrt(12)  # U(0, 1): torch.rand

# Law -> gains that PyTorch and common code produce. The order settles ties.
CANONICAL = {
    "fan_in": (DEFAULT_GAIN, 1.0, sqrt(2)),  # PyTorch's default; LeCun; Kaiming with ReLU
    "constant": (1.0, 0.02, 0.01),  # nn.Embedding; GPT-2, BERT; older CNNs
    "fan_out": (DEFAULT_GAIN, 1.0, sqrt(2)),  # default of transposed convolutions; Kaiming mode="fan_out"
    "fan_avg": (1.0, sqrt(2)),  # Xavier, Xavier with ReLU gain
}
# Laws that code has here and there: for what none of those above explains, at differing sizes or by a bound.
RARE = {
    "fan_stack": (DEFAULT_GAIN, 1.0, sqrt(2)),  # nn.init's Kaiming of a stack [experts, in, out]: in * out
    "fan_in_root": (1.0, sqrt(2)),  # fan_in ** -0.25: TabNet
    "fan_in": (UNIT_GAIN,),
    "constant": (UNIT_GAIN,),
    "fan_in_squared": (1.0, UNIT_GAIN),  # randn(fan_in, n) / fan_in
    "fan_out_squared": (1.0, UNIT_GAIN),  # of a vector: rand(n) / n
    "fan_product": (1.0, UNIT_GAIN),  # rand(fan_in, fan_out) / (fan_in * fan_out): Fourier neural operators
}
# Law -> fans whose product, to a power, divides the variance.
FANS: dict[str, tuple[tuple[str, ...], float]] = {
    "fan_in": (("fan_in",), 1),
    "constant": ((), 1),
    "fan_out": (("fan_out",), 1),
    "fan_avg": (("average",), 1),
    "fan_stack": (("stack",), 1),
    "fan_in_root": (("fan_in",), 0.5),
    "fan_in_squared": (("fan_in",), 2),
    "fan_out_squared": (("fan_out",), 2),
    "fan_product": (("fan_in", "fan_out"), 2),
}
KINDS = tuple(FANS)
SMALL_GAINS = (sqrt(2 / 5), sqrt(4 / 5))  # one constant for all weights: sqrt(2 / (5 d_model))
ROUNDING = 4e-3  # of half precision
MANY = 1024  # entries of which the largest tells a bound to 2 %
CERTAIN = 192  # entries that are not flat by chance
FEW = 64  # a tensor with fewer entries follows the others rather than speaking for a law


def tolerance(count: int) -> float:
    """Return four standard errors of a std measured on ``count`` normal entries, relative to it."""
    return 4 / sqrt(2 * count) + 1e-3


@dataclass(frozen=True)
class Fans:
    """Fans that a law can divide by, and how they grow.

    Attributes:
        fan_in: Size now; None if the parameter has no fan_in.
        fan_out: Size now, kernel included; None if the parameter has no fan_out to speak of.
        m_in: fan_in relative to the base width.
        m_out: fan_out relative to the base width.
        partner: Weight whose fan_in this is, where it is not the parameter's own (biases, recurrent layers).
        average: Mean of both fans as `torch.nn.init` counts them, by the first two axes, whatever these are;
            None for a vector.
        m_average: The same relative to the base width.
        stack: What `torch.nn.init` takes for the fan_in of a stack of matrices; None for all else.
        m_stack: The same relative to the base width.
    """

    fan_in: int | None
    fan_out: int | None
    m_in: float
    m_out: float
    partner: str | None = None
    average: float | None = None
    m_average: float = 1.0
    stack: float | None = None
    m_stack: float = 1.0

    def denominator(self, kind: str) -> float | None:
        """Return ``gain**2 / variance`` under a law, or None if the law cannot be stated."""
        names, power = FANS[kind]
        sizes = [getattr(self, name) for name in names]
        return None if None in sizes else prod(sizes, start=1.0) ** power

    def ratio(self, kind: str) -> float:
        """Return the variance at the base width relative to the variance now, under a law."""
        growth = {
            "fan_in": self.m_in,
            "fan_out": self.m_out,
            "average": self.m_average,
            "stack": self.m_stack,
        }
        names, power = FANS[kind]
        return prod([growth[name] for name in names], start=1.0) ** power


@dataclass(frozen=True)
class Sample:
    """Statistics of one tensor: number of entries, std (None on the meta device), flat distribution.

    The ``bound`` is the largest of its entries by size, where it was measured; half of it for entries that
    are flat from zero on.

    A tensor that the forward pass does not read has no fans, so it ``speaks`` for no law. What a tensor
    without values will hold may be ``promised`` by the model's own code.
    """

    name: str
    count: int
    std: float | None
    uniform: bool
    fans: Fans
    speaks: bool = True
    promised: bool = False
    bound: float = 0.0
    from_zero: bool = False

    def gain(self, kind: str) -> float | None:
        """Return the gain that the law needs to give this tensor's std."""
        denominator = self.fans.denominator(kind)
        # Without a value or a fan the law cannot be tried.
        return None if self.std is None or denominator is None else self.std * sqrt(denominator)

    @property
    def flat(self) -> bool:
        """Whether it is flat for certain, by a bound that was measured: a few normal entries look so too."""
        return self.uniform and self.count >= CERTAIN and self.bound > 0

    @property
    def drawn_by_default(self) -> bool:
        """Whether the std is that of ``U(+-1/sqrt(fan_in))``."""
        return _Hypothesis("fan_in", DEFAULT_GAIN, True, 0.0).explains(self)

    @property
    def drawn_exactly(self) -> bool:
        """Whether its largest entry is the bound of PyTorch's default, ``1/sqrt(fan_in)``."""
        flat = self.uniform and self.count >= MANY and not self.from_zero
        return flat and self.reaches("fan_in", DEFAULT_GAIN)

    def reaches(self, kind: str, gain: float) -> bool:
        """Tell whether the largest entry is the bound of a flat law.

        The largest of n entries is within 20/n of the bound (but for once in 10^8 times), which tells more
        than their std where there are many.

        Args:
            kind: The law.
            gain: Its gain.
        """
        denominator = self.fans.denominator(kind)
        if denominator is None:
            return False
        share = self.bound * sqrt(denominator / 3) / gain
        return 1 - 20 / self.count - ROUNDING <= share <= 1 + ROUNDING


@dataclass(frozen=True)
class Finding:
    """A law with its gain for one tensor, and how it was decided."""

    sample: Sample
    kind: str
    gain: float | None
    note: str = ""
    doubtful: bool = False

    @property
    def std(self) -> float | None:
        """Std that the law gives the tensor now."""
        denominator = self.sample.fans.denominator(self.kind)
        return None if self.gain is None or denominator is None else self.gain / sqrt(denominator)

    @property
    def text(self) -> str:
        """The law in words."""
        if self.gain is None:
            return f"unknown (meta): {self.kind} taken"
        partner = (
            f" of {self.sample.fans.partner}" if self.sample.fans.partner and self.kind == "fan_in" else ""
        )
        law_text = (
            "constant std" if self.kind == "constant" else f"{self.kind}{partner}, gain {self.gain:.3g}"
        )
        distribution = " (uniform)" if self.sample.uniform else ""
        promised = "; as the model's own code draws (meta)" if self.sample.promised else ""
        return f"{law_text}{distribution}{'; ' if self.note else ''}{self.note}{promised}"


@dataclass(frozen=True)
class _Hypothesis:
    kind: str
    gain: float
    canonical: bool
    slack: float  # error of the gain itself, when it was measured
    rare: bool = False

    @property
    def usual(self) -> bool:
        """Whether people use it often."""
        return self.canonical and not self.rare

    def explains(self, sample: Sample) -> bool:
        """Whether the values of a tensor may be drawn by the law."""
        if not self.canonical:
            # The bound of a flat law says more than a std that others happen to have.
            return not sample.drawn_exactly and self._gives_std(sample)
        # torch.rand has a gain of its own, and a bound by which it is told.
        if self.gain == UNIT_GAIN or sample.from_zero:
            return self.gain == UNIT_GAIN and sample.from_zero and sample.reaches(self.kind, self.gain)
        # A gain of 1/sqrt(3) makes the bound of a flat law 1/sqrt(fan); no one draws normal numbers so.
        if self.gain == DEFAULT_GAIN and not sample.uniform and sample.count >= FEW:
            return False
        if sample.flat and not sample.reaches(self.kind, self.gain):
            return False
        return self._gives_std(sample)

    def _gives_std(self, sample: Sample) -> bool:
        """Whether the standard deviation of a tensor is that of the law, but for chance.

        Within four standard errors of a standard deviation measured on so many entries, and of the gain: both
        are independent.
        """
        gain = sample.gain(self.kind)
        return gain is not None and abs(gain / self.gain - 1) <= hypot(tolerance(sample.count), self.slack)

    def rank(self, explained: Collection[Sample]) -> tuple[float, bool]:
        """Return how many tensors it explains (one less if the gain was fitted), and if people use it."""
        # A tensor of few entries breaks ties and outvotes none.
        weight = sum(1 if sample.count >= FEW else 0.01 for sample in explained)
        if self.usual:
            return weight, True
        # Tensors of one shape agree on every law, so they are evidence for none.
        if self.rare:
            large = [sample for sample in explained if sample.count >= FEW]
            # The bound of a flat one is evidence.
            bound_told = any(sample.flat or sample.from_zero for sample in explained)
            return (weight if bound_told or len(_shapes(large)) > 1 else 0.0), False
        return (weight - 1 if len(_shapes(explained)) > 1 else 0.0), False


def _shapes(samples: Collection[Sample]) -> set[tuple[int | None, int | None]]:
    """Return the pairs of fans that there are."""
    return {(sample.fans.fan_in, sample.fans.fan_out) for sample in samples}


def find_laws(samples: Sequence[Sample]) -> Iterator[Finding]:
    """Decide on a law for every tensor.

    Args:
        samples: Statistics of all tensors that hold random values (or none yet: meta).

    Yields:
        One finding for each sample, in no particular order.
    """
    with_values, with_partner, silent, unseen = [], [], [], []
    for sample in samples:
        # On the meta device there are no values.
        if sample.std is None:
            unseen.append(sample)
        elif sample.fans.partner is not None:
            with_partner.append(sample)
        elif sample.speaks:
            with_values.append(sample)
        else:
            silent.append(sample)
    yield from _explained(with_values)
    # A parameter that nothing reads has no fans to divide by.
    for sample in silent:
        yield _unsettled(sample, "constant")
    # PyTorch draws biases and recurrent weights from U(+-1/sqrt(fan_in)) of their partner.
    for sample in with_partner:
        yield Finding(sample, "fan_in", DEFAULT_GAIN)
    for sample in unseen:
        yield _unseen(sample)


def _explained(samples: list[Sample]) -> Iterator[Finding]:
    """Yield the laws of tensors with values and fans of their own, the law of most of them first."""
    hypotheses = list(_hypotheses(samples))
    usual = [law for law in hypotheses if law.usual]
    # Rare laws are for these alone: what a usual one explains follows another by chance.
    odd = {sample for sample in samples if not any(law.explains(sample) for law in usual)}
    findings: list[Finding] = []
    unexplained = samples
    while unexplained:
        explained = {law: _of_law(law, unexplained, odd) for law in hypotheses}
        # The law that weights of growing fan_in have followed so far is the likelier one among equals.
        best, rivals = _best_of(explained, _majority(findings) if findings else None)
        if best is None:
            break
        roots = _roots(best, usual, unexplained)
        for sample in explained[best]:
            # A gain that others suggest, and that is off by more than this tensor's own error.
            is_near = best.canonical or replace(best, slack=0.0).explains(sample)
            findings.append(_settled(sample, best, rivals if is_near else [*rivals, *usual], roots))
        settled = set(explained[best])
        unexplained = [sample for sample in unexplained if sample not in settled]
    yield from findings
    for sample in unexplained:
        yield _unsettled(sample, _majority(findings))


def _best_of(
    explained: Mapping[_Hypothesis, Sequence[Sample]], leading: str | None
) -> tuple[_Hypothesis | None, list[_Hypothesis]]:
    """Return the law that explains most, if any does, and the laws of other kinds that explain as much."""
    ranks = {law: (*law.rank(samples), law.kind == leading) for law, samples in explained.items()}
    best = max(ranks, key=lambda law: ranks[law])  # the first of equals: order of CANONICAL
    if ranks[best][0] <= 0:
        return None, []
    return best, [law for law in ranks if ranks[law] == ranks[best] and law.kind != best.kind]


def _of_law(law: _Hypothesis, samples: Sequence[Sample], odd: Set[Sample]) -> list[Sample]:
    """Return what a law explains; a rare one only among the odd ones, that no usual law explains."""
    return [sample for sample in samples if law.explains(sample) and (not law.rare or sample in odd)]


def _hypotheses(samples: Sequence[Sample]) -> Iterator[_Hypothesis]:
    # Gains that people use come first, then those that the tensors themselves suggest.
    for kind, gains in CANONICAL.items():
        yield from (_Hypothesis(kind, gain, True, 0.0) for gain in gains)
    for kind, gains in RARE.items():
        yield from (_Hypothesis(kind, gain, True, 0.0, rare=True) for gain in gains)
    for kind in CANONICAL:
        hypotheses: list[_Hypothesis] = []
        for sample in sorted(samples, key=lambda s: -s.count):
            gain = sample.gain(kind)
            if (
                gain is not None
                and sample.count >= FEW
                and not any(hypothesis.explains(sample) for hypothesis in hypotheses)
            ):
                hypotheses.append(_Hypothesis(kind, gain, False, tolerance(sample.count)))
        yield from hypotheses


def _roots(best: _Hypothesis, usual: Sequence[_Hypothesis], samples: Sequence[Sample]) -> list[str]:
    """Return the laws of a fan that grows by which most of what a fitted constant explains may be drawn.

    ``std = d_model ** -0.5`` for all weights: those that read another width tell the law from LeCun's.
    """
    if best.canonical or best.kind != "constant":
        return []
    grown = [
        sample for sample in filter(best.explains, samples) if sample.fans.m_in != 1 and sample.count >= FEW
    ]
    kinds = []
    small = [_Hypothesis("fan_in", gain, True, 0.0) for gain in SMALL_GAINS]
    for law in (*usual, *small):
        if law.kind != "constant" and 2 * sum(map(law.explains, grown)) > len(grown):
            kinds.append(law.kind)
    return kinds


def _settled(
    sample: Sample, law: _Hypothesis, rivals: Sequence[_Hypothesis], roots: Sequence[str] = ()
) -> Finding:
    # A rival matters only where it would scale this tensor otherwise.
    others = {
        rival.kind
        for rival in rivals
        if rival.explains(sample) and sample.fans.ratio(rival.kind) != sample.fans.ratio(law.kind)
    }
    if sample.fans.m_in != 1 or sample.fans.m_out != 1:
        others.update(roots)
    note = f"ambiguous with {', '.join(sorted(others))}: {law.kind} taken" if others else ""
    return Finding(sample, law.kind, law.gain, note, bool(others))


def _majority(found: Sequence[Finding]) -> str:
    """Return the law of most weights whose fan_in grows; fan_in if none is ahead."""
    kinds = [finding.kind for finding in found if finding.sample.fans.m_in != 1]
    return max(CANONICAL, key=kinds.count)  # the first of equals, fan_in


def _unsettled(sample: Sample, majority: str) -> Finding:
    """Return the majority's law for a tensor that shares its gain with no other, in doubt if it matters."""
    kind = majority if sample.fans.denominator(majority) is not None else "constant"
    # Where all laws give one ratio there is nothing to doubt.
    ratios = {
        sample.fans.ratio(other_kind)
        for other_kind in CANONICAL
        if sample.fans.denominator(other_kind) is not None
    }
    doubtful = len(ratios) > 1 and sample.fans.fan_in is not None  # vectors are drawn without looking at fans
    return Finding(sample, kind, sample.gain(kind), f"ambiguous: {kind} taken" if doubtful else "", doubtful)


def _unseen(sample: Sample) -> Finding:
    """Return the law taken for a tensor without values."""
    return Finding(sample, "constant" if sample.fans.fan_in is None else "fan_in", None)
