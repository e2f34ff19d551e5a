"""Readable names for dimensions: by the part they play, else by configuration, else by first carrier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from mupass._dims.infer import Inference
from mupass._dims.space import Space

# Attributes by which models call the width of their feed-forward layers.
D_FF = ("d_ff", "intermediate_size", "ffn_dim", "n_inner", "dim_feedforward", "decoder_ffn_dim", "mlp_dim")


@dataclass(frozen=True)
class DimNames:
    """Names of dimension classes; repeated blocks share a name.

    Attributes:
        space: The solved constraints.
        table: Representative -> name.
    """

    space: Space
    table: dict[int, str]

    def of(self, dim: int) -> str | None:
        """Return the name of a dimension, if it has one."""
        return self.table.get(self.space.find(dim))

    def find(self, name: str) -> list[int]:
        """Return the dimensions of that name."""
        return [d for d, n in self.table.items() if n == name]

    def all(self) -> Iterator[str]:
        """Yield all names."""
        return iter(dict.fromkeys(self.table.values()))

    def term(self, dim: int, depth: int = 4) -> str:
        """Return a name, or else the product or sum that the dimension is, or its size.

        Equal parts are counted: ``3*heads*head_dim`` for query, key and value in one.

        Args:
            dim: Any dimension.
            depth: How far to look into parts of parts.
        """
        known = self.of(dim)
        if known or not depth:
            return known or str(self.space.size(dim))
        for members in self.space.terms_of(dim, "product"):
            return "*".join(_bracketed(self.term(m, depth - 1)) for m in members)
        for members in self.space.terms_of(dim, "sum"):
            runs = [(part, len(list(run))) for part, run in groupby(self.term(m, depth - 1) for m in members)]
            if len(runs) == 1 and runs[0][0].isdigit():
                break  # parts about which only their size is known
            return "+".join(part if n == 1 else f"{n}*{_bracketed(part)}" for part, n in runs)
        return str(self.space.size(dim))


def _bracketed(term: str) -> str:
    return f"({term})" if "+" in term else term


def name_dims(model: nn.Module, solved: Inference, alone: Inference | None = None) -> DimNames:
    """Name the dimensions that grow, and those that a policy keeps fixed.

    The part a dimension plays in the graph decides first: batch and inner axes of attention are heads and
    head_dim, the axis that most parameters carry is d_model. Attributes are consulted by size only to choose
    a label: a wrong match mislabels, it decides nothing.

    Args:
        model: The module, searched for a ``config`` and for attributes.
        solved: The inference.
        alone: Inference without the caller's verdicts, whose policies tell heads from head_dim.

    Returns:
        The names.
    """
    space = solved.engine.space
    table: dict[int, str] = {}
    order = _carried(solved)
    known = [d for d in order if (v := solved.verdicts.get(d)) and (v.infinite or v.policy)]
    _name_attention(alone or solved, table)
    grown = [d for d in known if solved.verdicts.get(d).infinite and d not in table]  # type: ignore[union-attr]
    if table and grown:
        table.setdefault(grown[0], "d_model")
    ff = _config_sizes(model)
    for dim in known:
        if dim in table or space.terms_of(dim, "product") or space.terms_of(dim, "sum"):
            continue
        table[dim] = "d_ff" if space.size(dim) in ff else _first_carrier(solved, dim)
    return DimNames(space, table)


def _carried(solved: Inference) -> list[int]:
    """Return the classes that parameters carry, the most frequent first, then their members."""
    space = solved.engine.space
    count = Counter(space.find(d) for dims in solved.dims.values() for d in dims)
    order = [d for d, _ in count.most_common()]
    members = [
        m for d in order for kind in ("product", "sum") for term in space.terms_of(d, kind) for m in term
    ]
    return [d for d in dict.fromkeys([*order, *members]) if space.size(d) > 1]


def _name_attention(solved: Inference, table: dict[int, str]) -> None:
    space = solved.engine.space
    for product in solved.engine.facts.bilinear:
        inner = [space.find(d) for d in product.inner if (v := solved.verdicts.get(d)) and v.policy]
        heads = [space.find(d) for d in product.batch if (v := solved.verdicts.get(d)) and v.infinite]
        if not inner or not heads:
            continue
        table.update(dict.fromkeys(inner, "head_dim"))
        for head in heads:
            if not _is_batched(solved, head):
                table.setdefault(head, "heads")
            shared = [m for term in space.terms_of(head, "product") for m in term]
            table.update(
                {m: "kv_heads" for m in shared if solved.verdicts.grows(m) and not _is_batched(solved, head)}
            )


def _is_batched(solved: Inference, head: int) -> bool:
    """Whether the axis is batch x heads in one."""
    space = solved.engine.space
    terms = [m for term in space.terms_of(head, "product") for m in term]
    return any((v := solved.verdicts.get(m)) and not v.infinite and v.why.startswith("axis") for m in terms)


def _config_sizes(model: nn.Module) -> set[int]:
    sources: Iterable[Any] = (getattr(model, "config", None), model)
    found = (getattr(s, name, None) for s in sources for name in D_FF)
    return {v for v in found if isinstance(v, int) and not isinstance(v, bool)}


def _first_carrier(solved: Inference, dim: int) -> str:
    """Name a dimension after the parameter that makes it, else the first that carries it."""
    space = solved.engine.space
    carriers = [(n, i) for n, dims in solved.dims.items() for i, d in enumerate(dims) if space.find(d) == dim]
    if not carriers:
        return str(space.size(dim))
    made = [(n, i) for n, i in carriers for u in solved.uses.get(n, ()) if i in u.fan_out]
    name, axis = (made or carriers)[0]
    return f"{name.removesuffix('.weight')}.{'out' if made else axis}"
