"""Readable names for dimensions: by the part they play, else by configuration, else by first carrier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby

from torch import nn

from mupass._dims.infer import Inference
from mupass._dims.space import Space
from mupass._dims.verdicts import Verdict

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
        return [dim for dim, its_name in self.table.items() if its_name == name]

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
        own_name = self.of(dim)
        if own_name or not depth:
            return own_name or str(self.space.size(dim))
        for members in self.space.terms_of(dim, "product"):
            factors = [self.term(member, depth - 1) for member in members]
            return "*".join(map(_bracketed, factors))
        for members in self.space.terms_of(dim, "sum"):
            parts = [self.term(member, depth - 1) for member in members]
            if parts[0].isdigit() and len(set(parts)) == 1:
                break  # parts about which only their size is known
            return "+".join(_counted(part, len(list(equal_parts))) for part, equal_parts in groupby(parts))
        return str(self.space.size(dim))


def _bracketed(term: str) -> str:
    return f"({term})" if "+" in term else term


def _counted(part: str, count: int) -> str:
    return part if count == 1 else f"{count}*{_bracketed(part)}"


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
    _name_attention(alone or solved, table)
    widths, to_be_named = [], []
    for dim in _carried(solved):
        verdict = solved.verdicts.get(dim)
        if verdict and (verdict.infinite or verdict.policy):
            to_be_named.append(dim)
            if verdict.infinite and dim not in table:
                widths.append(dim)
    if table and widths:
        table.setdefault(widths[0], "d_model")  # the most frequent width of a transformer
    ff_sizes = _config_sizes(model)
    for dim in to_be_named:
        if dim in table or space.members_of(dim, "product", "sum"):
            continue
        table[dim] = "d_ff" if space.size(dim) in ff_sizes else _first_carrier(solved, dim)
    return DimNames(space, table)


def _carried(solved: Inference) -> list[int]:
    """Return the classes that parameters carry, the most frequent first, then their members."""
    space = solved.engine.space
    # The width of the residual stream is carried by most parameters.
    carriers_of = Counter(map(space.find, chain.from_iterable(solved.dims.values())))
    by_frequency = [dim for dim, _ in carriers_of.most_common()]
    for dim in tuple(by_frequency):
        by_frequency += space.members_of(dim, "product", "sum")
    return [dim for dim in dict.fromkeys(by_frequency) if space.size(dim) > 1]


def _name_attention(solved: Inference, table: dict[int, str]) -> None:
    """Name heads and head_dim: the batch of a product of activations, and what it is contracted along."""
    space, verdicts = solved.engine.space, solved.verdicts
    for product in solved.engine.facts.bilinear:
        inner = [space.find(dim) for dim in product.inner if _is_policy(verdicts.get(dim))]
        # scores[b, h, l, s]: the batch b is data, h grows, the inner axis is fixed by a policy
        heads = [space.find(dim) for dim in product.batch if verdicts.grows(dim)]
        if not inner or not heads:
            continue
        table.update(dict.fromkeys(inner, "head_dim"))
        for head in heads:
            if _is_batched(solved, head):
                continue
            table.setdefault(head, "heads")
            # heads = kv_heads x queries that share one
            shared = filter(verdicts.grows, space.members_of(head, "product"))
            table.update(dict.fromkeys(shared, "kv_heads"))


def _is_policy(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.policy


def _is_batched(solved: Inference, head: int) -> bool:
    """Whether the axis is batch x heads in one."""
    for member in solved.engine.space.members_of(head, "product"):
        verdict = solved.verdicts.get(member)
        if verdict and not verdict.infinite and verdict.why.startswith("axis"):  # of an input or output
            return True
    return False


def _config_sizes(model: nn.Module) -> set[int]:
    """Return the widths of feed-forward layers that a model's attributes tell."""
    sizes = set()
    for source in (getattr(model, "config", None), model):
        for name in D_FF:
            size = getattr(source, name, None)
            if isinstance(size, int) and not isinstance(size, bool):
                sizes.add(size)
    return sizes


def _first_carrier(solved: Inference, dim: int) -> str:
    """Name a dimension after the parameter that makes it, else the first that carries it."""
    space = solved.engine.space
    first_carrier = None
    for name, dims in solved.dims.items():
        for axis, carried_dim in enumerate(dims):
            if space.find(carried_dim) != dim:
                continue
            layer = name.removesuffix(".weight")
            # The parameter that makes a dimension is the better name: conv1.out, and not norm.0.
            if any(axis in use.fan_out for use in solved.uses.get(name, ())):
                return f"{layer}.out"
            first_carrier = first_carrier or f"{layer}.{axis}"
    return first_carrier or str(space.size(dim))
