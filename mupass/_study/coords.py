"""Records of a coordinate check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupass._study.recorder import OUTPUT, Site
from mupass._study.slopes import Slope
from mupass._study.tabular import Tabular

NAMES = {
    "activation": "activation at the start",
    "reach": "attention score of a query along a key",
    "update": "update dW h",
    "share": "update dW h relative to the output that is normalized",
    "aligned": "update dW h along the gradient",
    "change": "change",
}


@dataclass(frozen=True)
class Coordinate:
    """One measured quantity of one operator.

    Attributes:
        site: Where: module, operator, parameter.
        quantity: ``activation`` (RMS of the operator's output before the first step), ``reach`` (score of a
            query and a key that point the same way, as training makes them), ``update`` (RMS of
            dW h: what the parameter's update does to that output, at the activations of the start), ``share``
            (the same relative to the output, for a readout that is normalized afterwards),
            ``aligned`` (RMS of the part of it along the gradient of the loss at the start) or ``change``
            (RMS of all that moved the output since the start).
        step: Number of optimizer steps taken.
        slope: Power of width, its interval and the values.
        rule: ``flat`` when any power but 0 is a fault, ``bounded`` when only growth is, ``shown`` when the
            quantity is not judged, ``relative`` when it was divided by what the size of the gradient explains
            (`dimmed`) and should be flat then.
        verdict: ``ok``, ``FAIL``, ``unclear`` (the estimate lies beyond the tolerance, but not all of its
            interval) or ``""``.
    """

    site: Site
    quantity: str
    step: int
    slope: Slope
    rule: str
    verdict: str


@dataclass(frozen=True)
class CoordCheck(Tabular):
    """Result of a coordinate check; prints as a report.

    Attributes:
        widths: Widths that were trained.
        optimizer: What trained them.
        parameterization: Under which parameterization.
        steps: Number of steps.
        seeds: Number of initializations.
        tolerance: Largest power that counts as flat.
        rows: All quantities; of one step in the order in which the operators ran.
        silent: Places whose parameter did not move its operator's output at some width.
        dimmed: Places below a readout in the middle of the model, where the gradient starts near zero.
        blame: Likely cause of the first fault; empty when there is none.
        notes: What was made of the model given.
    """

    widths: tuple[int, ...]
    optimizer: str
    parameterization: str
    steps: int
    seeds: int
    tolerance: float
    rows: tuple[Coordinate, ...]
    silent: tuple[Site, ...]
    dimmed: tuple[Site, ...]
    blame: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Coordinate, ...]:
        """What failed: the earliest step first, then in the order in which the operators ran."""
        return tuple(sorted((r for r in self.rows if r.verdict == "FAIL"), key=lambda r: r.step))

    @property
    def first(self) -> Coordinate | None:
        """The first offender, or None."""
        return next(iter(self.failures), None)

    def modules(self) -> dict[str, str]:
        """Return the verdict on every module that calls an operator: the worst of its quantities."""
        worst: dict[str, str] = {}
        order = ("", "ok", "unclear", "FAIL")
        for row in self.rows:
            name = OUTPUT if row.site.operator == OUTPUT else row.site.module
            worst[name] = max(worst.get(name, ""), row.verdict, key=order.index)
        return worst

    def verdict(self) -> str:
        """Return one sentence: pass, or the first offending operator with the likely cause."""
        judged = sum(bool(r.verdict) for r in self.rows)
        unclear = sum(r.verdict == "unclear" for r in self.rows)
        doubt = f"; {unclear} unclear, which more seeds or larger widths would settle" if unclear else ""
        row = self.first
        if row is None:
            return f"PASS: none of {judged} quantities scales with width{doubt}"
        return (
            f"FAIL at {row.site}: {NAMES[row.quantity]} scales like width^{row.slope.power:+.2f} "
            f"(+- {row.slope.error:.2f}) at step {row.step}. {len(self.failures)} of {judged} quantities "
            f"fail{doubt}. Likely cause: {self.blame}"
        )

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each quantity."""
        return [
            {
                "module": row.site.module,
                "operator": row.site.operator,
                "parameter": row.site.parameter,
                "quantity": row.quantity,
                "step": row.step,
                "power": row.slope.power,
                "error": row.slope.error,
                "rule": row.rule,
                "verdict": row.verdict,
                **{f"width {w}": v for w, v in zip(self.widths, row.slope.values, strict=True)},
            }
            for row in self.rows
        ]

    def _tables(self) -> list[str]:
        from mupass._study.coords_report import table_of

        return [table_of(self).html()]

    def __str__(self) -> str:
        """Return the report as text."""
        from mupass._study.coords_report import text

        return text(self)

    def report(self, path: str | Path | None = None) -> str:
        """Return the report as text, or write it.

        Args:
            path: File to write: ``.html`` for one self-contained page, ``.png`` or ``.svg`` for the picture
                (needs matplotlib), else text.

        Returns:
            The text, or the path that was written.

        Raises:
            StudyError: A picture without matplotlib.
        """
        from mupass._study.coords_report import figure, page
        from mupass._study.page import write

        return write(path, lambda: str(self), lambda: page(self), lambda: figure(self))
