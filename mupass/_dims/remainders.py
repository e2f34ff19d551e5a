"""Remainders: what is a fixed number less than a width, so that both make up the whole width side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mupass._dims.space import Members
from mupass._dims.verdicts import Verdicts


@dataclass(frozen=True)
class Remainder:
    """A dimension that is a width without some fixed parts.

    Attributes:
        width: The width.
        fixed: The parts that are joined to it.
        certain: Whether a weight makes the joined whole as well; else only its size tells.
    """

    width: int
    fixed: Members
    certain: bool


def find_remainders(verdicts: Verdicts) -> Mapping[int, Remainder]:
    """Find what is joined to fixed features, and only read together with them.

    ``Linear(d, d - 3)``, then ``cat([h, xyz])`` into layers of width d: a skip connection of a signed
    distance network, coordinates among the channels of optical flow.

    Args:
        verdicts: All verdicts, made.

    Returns:
        Dimension -> what it is less than.
    """
    space, facts = verdicts.space, verdicts.facts
    made = space.find_all(facts.fan_out)
    read = space.find_all(facts.fan_in)
    widths = sorted(filter(verdicts.is_firm, made | read))
    remainders: dict[int, Remainder] = {}
    for whole, part, fixed in _joined(verdicts):
        # Made by a weight and read beside the fixed parts alone: the sum has the author's number, not it.
        is_free = part in made and part not in read and part not in remainders
        if not is_free or any(space.terms_of(part, kind) for kind in ("product", "sum")):
            continue
        if whole in made:  # cat([h, xyz]) + up(x)
            remainders[part] = Remainder(whole, fixed, True)
            continue
        same_size = [dim for dim in widths if space.size(dim) == space.size(whole) and dim != whole]
        like_part = [dim for dim in widths if space.size(dim) == space.size(part) and dim != part]
        if same_size and not like_part:
            remainders[part] = Remainder(same_size[0], fixed, False)
    return remainders


def _joined(verdicts: Verdicts) -> Iterator[tuple[int, int, Members]]:
    """Yield concatenations of one part that grows and others that do not: whole, that part, the others."""
    space = verdicts.space
    cuts = {(space.find(whole), tuple(map(space.find, parts))) for whole, parts in space.cuts}
    for whole, members in space.terms("sum"):
        growing = list(filter(verdicts.grows, members))
        # What is cut follows from its parts, x = split(up(h), [d, 3, 3]), and what is joined may not.
        if len(growing) == 1 and (whole, members) not in cuts:
            yield whole, growing[0], tuple(member for member in members if member != growing[0])
