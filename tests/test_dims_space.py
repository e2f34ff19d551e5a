"""The union-find of dimensions: equalities, products, sums, slices, derivations."""

import pytest

from mupass._dims.space import SizeConflict, Space


def same(space: Space, a: int, b: int) -> bool:
    return space.find(a) == space.find(b)


def test_equal_sizes_alone_state_nothing() -> None:
    space = Space()
    a, b = space.new(8), space.new(8)
    assert not same(space, a, b)
    space.unify(a, b)
    assert same(space, a, b)


def test_sizes_must_agree() -> None:
    space = Space()
    with pytest.raises(SizeConflict, match="sizes 8 and 9"):
        space.unify(space.new(8), space.new(9))


@pytest.mark.parametrize("kind", ["product", "sum"])
def test_the_same_split_of_one_dimension_gives_the_same_members(kind: str) -> None:
    space = Space()
    sizes, total = ((2, 4), 8) if kind == "product" else ((3, 5), 8)
    whole, left, right = space.new(total), [space.new(s) for s in sizes], [space.new(s) for s in sizes]
    getattr(space, kind)(whole, tuple(left))
    getattr(space, kind)(whole, tuple(right))
    assert all(same(space, a, b) for a, b in zip(left, right, strict=True))


def test_unifying_wholes_unifies_their_members() -> None:
    space = Space()
    a, b = space.new(6), space.new(6)
    x, y = [space.new(2), space.new(3)], [space.new(2), space.new(3)]
    space.product(a, tuple(x))
    space.product(b, tuple(y))
    assert not same(space, x[0], y[0])
    space.unify(a, b)
    assert same(space, x[0], y[0]) and same(space, x[1], y[1])


def test_products_align_at_common_boundaries() -> None:
    space = Space()
    whole = space.new(24)
    three, heads, inner = space.new(3), space.new(2), space.new(4)
    space.product(whole, (three, heads, inner))
    third, rest = space.new(3), space.new(8)
    space.product(whole, (third, rest))
    assert same(space, three, third)
    assert space.terms_of(rest, "product") == [(space.find(heads), space.find(inner))]


def test_products_that_cross_stay_apart() -> None:
    space = Space()
    whole = space.new(24)
    a, b = (space.new(4), space.new(6)), (space.new(6), space.new(4))
    space.product(whole, a)
    space.product(whole, b)
    assert not same(space, a[0], b[1]) and not same(space, a[1], b[0])


def test_factors_of_one_and_empty_parts_drop_out() -> None:
    space = Space()
    whole, factor, part = space.new(5), space.new(5), space.new(5)
    space.product(whole, (space.new(1), factor))
    space.sum(whole, (space.new(0), part))
    assert same(space, whole, factor) and same(space, whole, part)


def test_one_span_is_one_dimension_also_after_unification() -> None:
    space = Space()
    a, b = space.new(9), space.new(9)
    first, second = space.part(a, 0, 4), space.part(b, 0, 4)
    assert space.part(a, 0, 4) == first and not same(space, first, second)
    space.unify(a, b)
    assert same(space, first, second)
    assert space.part(a, 0, 9) == a


def test_slices_close_into_sums_with_the_uncovered_rest() -> None:
    space = Space()
    whole = space.new(10)
    left, right = space.part(whole, 0, 3), space.part(whole, 5, 10)
    space.close_slices()
    ((members),) = space.terms_of(whole, "sum")
    assert [space.size(m) for m in members] == [3, 2, 5]
    assert same(space, members[0], left) and same(space, members[2], right)
    assert space.rests == {members[1]}


def test_overlapping_slices_keep_a_complement_each() -> None:
    space = Space()
    whole = space.new(10)
    space.part(whole, 0, 6)
    space.part(whole, 4, 10)
    space.close_slices()
    assert sorted([space.size(m) for m in term] for term in space.terms_of(whole, "sum")) == [[4, 6], [6, 4]]


def test_derived_dimensions_follow_but_are_not_equal() -> None:
    space = Space()
    source = space.new(8)
    other = space.derive(source, 4)
    assert space.derived == [(other, source)] and not same(space, source, other)
    one = space.new(1)
    assert space.derive(one, 1) == one


def test_conflicts_tell_where_they_were_met() -> None:
    space = Space()
    space.where = "aten.add in block"
    with pytest.raises(SizeConflict, match="aten.add in block: sizes 3 and 4"):
        space.unify(space.new(3), space.new(4))
