"""Packing plans: every token once, in order, together, in few rows."""

import numpy as np
import pytest

from easyrl.core.segments import branch, stem_of
from easyrl.data.alike import tokens_alike
from easyrl.data.bins import Units, best_fit, fit_into
from easyrl.data.packing import (
    MOST_SETS,
    Shape,
    _likely_groups,
    choose_shapes,
    group_shapes,
    pack,
    pack_parts,
    rows_of_shapes,
)


def random_lengths(seed, together=1):
    """(lengths, width of the batch, shapes of groups)."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 40))
    count = int(rng.integers(0, 30)) * together
    longest = int(width * rng.integers(1, 4))
    shapes = [Shape(together * int(rng.integers(1, 4)), length) for length in (longest, longest // 2 + 1)]
    return rng.integers(0, width + 1, count), width, shapes


def unpacked(packing, width):
    """tokens[b][t] for the batch whose token at (b, t) is b * T + t, read back through the plans, by segment."""
    found = {}
    for source, positions, segments in (row for plan in packing.plans for row in zip(*plan, strict=True)):
        for segment in range(1, segments.max(initial=0) + 1):
            places = source[segments == segment]
            assert (np.diff(np.flatnonzero(segments == segment)) == 1).all()
            assert positions[segments == segment].tolist() == list(range(len(places)))
            assert int(places[0]) // width not in found
            found[int(places[0]) // width] = places.tolist()
    return found


def groups(packing, width):
    """The sequences of every group."""
    for plan, shape in zip(packing.plans, packing.shapes, strict=True):
        for first in range(0, len(plan.source), shape.rows):
            group = plan.source[first : first + shape.rows]
            yield set((group[group >= 0] // width).tolist())


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_one_place_and_units_one_group(seed, together):
    lengths, width, shapes = random_lengths(seed, together)
    for packed in (True, False):
        packing = pack(lengths, width, shapes, together=together, packed=packed)
        assert unpacked(packing, width) == {
            b: list(range(b * width, b * width + n)) for b, n in enumerate(lengths) if n
        }
        for plan, shape in zip(packing.plans, packing.shapes, strict=True):
            assert ((plan.source == -1) == (plan.segment_ids == 0)).all()
            assert (plan.positions[plan.segment_ids == 0] == 0).all()
            assert len(plan.source) <= len(lengths)
            assert packed or (plan.segment_ids <= 1).all()
            assert all(array.dtype == np.int32 and array.shape == (len(plan.source), shape.length) for array in plan)
        units = [{b // together for b in group} for group in groups(packing, width)]
        assert sum(map(len, units)) == len(set().union(*units))


def test_best_fit_decreasing_by_hand():
    (plan,) = pack(np.array([3, 5, 2, 4]), 5, [Shape(1, 8)]).plans  # 5 opens row 0, 4 row 1, 3 fills row 0, 2 row 1
    assert plan.source.tolist() == [[5, 6, 7, 8, 9, 0, 1, 2], [15, 16, 17, 18, 10, 11, -1, -1]]
    assert plan.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert plan.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]]


def test_the_last_group_pads_whole_rows():
    lengths = np.array([3, 5, 2, 4])
    assert pack(lengths, 5, [Shape(1, 8)]).padding_share() == pytest.approx(2 / 16)
    assert pack(lengths, 5, [Shape(4, 8)]).padding_share() == pytest.approx(18 / 32)


def test_many_short_sequences_waste_little():
    lengths = np.random.default_rng(0).integers(20, 400, 256)
    assert pack(lengths, 512, [Shape(1, 1024)]).padding_share() < 0.02


def test_sequences_that_nearly_fill_rows_waste_little():
    """Half of them cut at 1024, the others a little shorter: nothing fits beside them in rows of that length."""
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(128) < 0.5, 1024, rng.integers(600, 1024, 128))
    shares = [
        pack(lengths, 1024, group_shapes(longest, together=2), together=2).padding_share() for longest in (1024, 2048)
    ]
    assert shares[1] < 0.06 < shares[0]


def test_unpacked_every_sequence_has_a_row():
    (plan,) = pack(np.array([2, 0, 3]), 4, [Shape(1, 4)], packed=False).plans
    assert plan.source.tolist() == [[0, 1, -1, -1], [8, 9, 10, -1]]
    (plan,) = pack(np.array([2, 1, 0, 3]), 3, [Shape(2, 4)], together=2, packed=False).plans
    assert plan.source.tolist() == [[0, 1, -1, -1], [3, -1, -1, -1], [-1, -1, -1, -1], [9, 10, 11, -1]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # A row a device: one a little shorter, for what nothing fits beside, and less.
        ({"longest": 2048}, [(1, 2048), (1, 1792), (1, 1536), (1, 1024), (1, 768)]),
        ({"longest": 4096, "shards": 8, "together": 2}, [(8, 4096), (8, 3584), (8, 3072), (8, 2048), (8, 1536)]),
        ({"longest": 565}, [(1, 640), (1, 512), (1, 384), (1, 256)]),
        ({"longest": 256, "rows": 1}, [(1, 256), (1, 128)]),
        # Several: fewer rows, or shorter ones where fewer would be too few.
        ({"longest": 512}, [(2, 512), (2, 384), (1, 512), (1, 384)]),
        ({"longest": 256}, [(4, 256), (3, 256), (2, 256)]),
        ({"longest": 256, "sequences": 3}, [(3, 256), (2, 256)]),
        ({"longest": 256, "sequences": 6}, [(3, 256), (2, 256)]),
        ({"longest": 256, "sequences": 6, "rows": 4}, [(4, 256), (3, 256), (2, 256)]),
        ({"longest": 256, "together": 2}, [(4, 256), (2, 256)]),
        ({"longest": 512, "shards": 8, "rows": 32}, [(32, 512), (24, 512), (16, 512), (16, 384)]),
        ({"longest": 40, "sequences": 16}, [(16, 40), (12, 40), (8, 40), (6, 40)]),
        # Of many groups what the last leaves empty counts less, and each shape is one more loop to compile.
        ({"longest": 2048, "sequences": 8}, [(1, 2048), (1, 1792), (1, 1536), (1, 1024), (1, 768)]),
        ({"longest": 2048, "sequences": 9}, [(1, 2048), (1, 1792), (1, 1024)]),
        ({"longest": 512, "sequences": 17}, [(2, 512), (2, 384)]),
    ],
)
def test_groups_have_one_shape_for_the_bulk_and_lesser_ones(arguments, expected):
    assert list(group_shapes(**arguments)) == expected


def test_rows_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match="3 rows: expected a multiple of 2"):
        group_shapes(256, 2, rows=3)


def test_the_bulk_goes_into_large_groups_and_the_rest_into_small_ones():
    shapes = [Shape(4, 256), Shape(1, 256), Shape(1, 128)]
    counts = lambda lengths: [len(some) for some in rows_of_shapes(Units(lengths), shapes)]
    assert counts([250] * 9) == [8, 1, 0]
    assert counts([250] * 7) == [7, 0, 0]  # not three small ones
    assert counts([250, 60, 60]) == [0, 1, 1]


def test_bins_that_are_given_hold_everything_or_there_is_no_packing():
    assert fit_into(Units([5, 3, 4]), [7, 5]) == [[[2, 1]], [[0]]]
    assert fit_into(Units([5, 4, 4]), [7, 5]) is None


def test_rows_of_several_lengths_fit_closer_than_the_best_of_them():
    """1024 + 896 hold what needs two rows of 1024, and 1024 + 512 what would fill neither."""
    shapes = [Shape(1, length) for length in (1024, 896, 512)]
    counts = lambda lengths: [len(some) for some in rows_of_shapes(Units(lengths), shapes)]
    assert counts([600, 424, 500, 390]) == [1, 1, 0]
    assert counts([600, 424, 300, 200]) == [1, 0, 1]


def test_sequences_of_a_unit_take_different_rows_of_a_bin():
    assert best_fit(Units([200, 250, 30, 5, 26, 1], 2), 256) == [[[0, 2, 4], [1, 3, 5]]]
    assert best_fit(Units([250, 200, 0, 0], 2), 256) == [[[0], [1]]]


def test_a_small_minibatch_pads_little():
    """Sequences of log-normal lengths, as in a PPO minibatch, eight on one device and 64 on 16: rows of one length
    waste about twice as much.
    """
    rng = np.random.default_rng(0)
    for sequences, shards, longest, most, single in ((8, 1, 512, 0.095, 0.19), (64, 16, 2048, 0.14, 0.35)):
        shapes, plain = group_shapes(longest, shards, sequences=sequences), [Shape(shards, longest)]
        found = []
        for _ in range(50):
            lengths = np.clip(rng.lognormal(4.8, 0.6, sequences) * longest / 512, 16, longest).astype(int)
            found.append([pack(lengths, longest, some).padding_share() for some in (shapes, plain)])
        means = np.mean(found, axis=0)
        assert means[0] < most and single < means[1], means


def test_few_sets_of_groups_are_tried_however_large_the_batch():
    """All of them hold the batch: as many groups of one shape as it takes, and few of the others."""
    for longest in (256, 512, 2048):
        for sequences in (16, 2048):
            shapes = group_shapes(longest, sequences=8)
            sets = _likely_groups(longest * sequences, shapes)
            assert 0 < len(sets) <= 2 * len(shapes) * MOST_SETS
            sizes = [shape.rows * shape.length for shape in shapes]
            assert min(sets @ sizes) >= longest * sequences


def test_nothing_to_pack():
    (plan,) = pack(np.zeros(4, int), 8, [Shape(2, 8)]).plans
    assert plan.source.shape == (0, 8)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: pack(np.array([9]), 8, [Shape(1, 16)]), "longer than the batch's width"),
        (
            lambda: pack(np.array([5, 6]), 8, [Shape(1, 4), Shape(1, 5)]),
            "5 places, expected at least 6, to hold sequence 1",
        ),
        (lambda: pack(np.array([5, 6, 7]), 8, [Shape(2, 16)], together=2), "3 sequences"),
    ],
)
def test_what_cannot_be_packed(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


@pytest.mark.parametrize("seed", range(20))
def test_what_sequences_begin_with_lies_once_in_a_row_that_holds_them(seed):
    """Every token sees what it would in a row of its own: those of its sequence, or their likes, up to itself."""
    rng = np.random.default_rng(seed)
    lengths, width, shapes = random_lengths(seed, 2)
    lengths[rng.random(len(lengths)) < 0.8] += 1  # few fillers
    width += 1
    shapes = [Shape(shape.rows, shape.length + 1) for shape in shapes]
    least = lengths.reshape(-1, 2).min(axis=1)
    alike = np.where(least > 0, rng.integers(0, np.maximum(least, 1)), 0)
    packing = pack(lengths, width, shapes, together=2, alike=alike)
    found, spared = {}, 0
    for plan in packing.plans:
        for source, positions, segments in zip(*plan, strict=True):
            for place in np.flatnonzero(source >= 0):
                b, t = divmod(int(source[place]), width)
                assert (b, t) not in found
                own = (segments == segments[place]) | (segments == stem_of(segments[place]))
                seen = np.flatnonzero(own & (positions <= positions[place]) & (source >= 0))
                assert seen.max() == place
                assert positions[seen].tolist() == list(range(t + 1))
                assert {(int(k) // width // 2, int(k) % width) for k in source[seen]} == {
                    (b // 2, k) for k in range(t + 1)
                }
                assert all(int(k) // width == b for k in source[seen] if k % width >= alike[b // 2])
                found[b, t] = place
            stems = segments[(segments > 0) & (segments == stem_of(segments))]
            spared += sum(int(np.sum(stems == stem)) for stem in set(stems) if branch(int(stem), 1) in segments)
    assert len(found) == lengths.sum() - spared
    # What finds no row that holds both is there twice.
    fitting = Units(lengths, 2, alike).totals <= max(shape.length for shape in shapes)
    assert bool(alike[fitting].any()) <= bool(spared) <= bool(alike.any())
    assert spared <= alike[fitting].sum()


def test_pairs_that_begin_alike_by_hand():
    (plan,) = pack(np.array([5, 4, 3, 3]), 5, [Shape(2, 7)], together=2, alike=np.array([2, 0])).plans
    assert plan.source.tolist() == [[0, 1, 2, 3, 4, 7, 8], [10, 11, 12, 15, 16, 17, -1]]
    assert plan.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 0, 1, 2, 0]]
    one, two = branch(1, 1), branch(1, 2)
    assert plan.segment_ids.tolist() == [[1, 1, one, one, one, two, two], [1, 1, 1, 2, 2, 2, 0]]
    # Where a row does not hold both they lie apart, each whole.
    (plan,) = pack(np.array([5, 4]), 5, [Shape(2, 6)], together=2, alike=np.array([2])).plans
    assert plan.source.tolist() == [[0, 1, 2, 3, 4, -1], [5, 6, 7, 8, -1, -1]]
    assert plan.segment_ids.max() == 1


def test_rows_become_as_long_as_pairs_that_begin_alike():
    pairs = Units(np.full(16, 256), 2, np.full(8, 128))
    shapes_for = lambda longest: group_shapes(longest, together=2, sequences=16)
    assert choose_shapes(shapes_for, 256, [pairs])[0] == Shape(2, 384)
    assert choose_shapes(shapes_for, 256, [Units(np.full(16, 256), 2)])[0] == Shape(4, 256)


def test_tokens_are_alike_before_the_answers_only():
    tokens = np.array([[5, 6, 7, 8, 9], [5, 6, 7, 8, 1], [5, 6, 0, 0, 0], [5, 7, 3, 0, 0], [5, 6, 7, 0, 0], [0] * 5])
    lengths = np.array([5, 5, 2, 3, 3, 0])
    mask = np.zeros(tokens.shape, bool)
    mask[:2, 2:4], mask[2, 0], mask[3, 1:2], mask[4, :2] = True, True, True, True
    assert tokens_alike(tokens, mask, lengths).tolist() == [2, 0, 0]
    mask[:] = False
    assert tokens_alike(tokens, mask, lengths).tolist() == [4, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_packed_by_themselves_into_the_same_groups(seed):
    """Every token has one place in its part's plans, and no part alone makes all of them run more than it needs."""
    _, width, shapes = random_lengths(seed)
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, width + 1, (int(rng.integers(1, 5)), int(rng.integers(1, 12))))
    packings = pack_parts(parts, width, shapes)
    for lengths, packing in zip(parts, packings, strict=True):
        assert packing.shapes == tuple(shapes)
        assert unpacked(packing, width) == {
            b: list(range(b * width, b * width + n)) for b, n in enumerate(lengths) if n
        }

    def cost(each):
        """Of the groups of every shape that any of these takes."""
        rows = (max(len(packing.plans[i].source) for packing in each) for i in range(len(shapes)))
        groups = [-(-number // shape.rows) for number, shape in zip(rows, shapes, strict=True)]
        return sum(number * (shape.rows * shape.length + 128) for number, shape in zip(groups, shapes, strict=True))

    alone = [pack(lengths, width, shapes) for lengths in parts]
    assert max(cost([packing]) for packing in alone) <= cost(alone)
    assert cost(packings) <= cost(alone)
    if len(parts) == 1:
        for ours, theirs in zip(packings[0].plans, alone[0].plans, strict=True):
            np.testing.assert_array_equal(ours.source, theirs.source)


def test_parts_that_want_different_groups_get_groups_that_hold_both():
    """Two sequences of 500 take a group of two rows; 740 tokens would take rows of 512 and 256, but fit into it."""
    shapes = (Shape(2, 512), Shape(1, 512), Shape(1, 256))
    parts = np.array([[500, 500, 0, 0], [300, 200, 190, 50]])
    rows = lambda packing: [len(plan.source) for plan in packing.plans]
    assert [rows(pack(lengths, 512, shapes)) for lengths in parts] == [[2, 0, 0], [0, 1, 1]]
    assert [rows(packing) for packing in pack_parts(parts, 512, shapes)] == [[2, 0, 0], [2, 0, 0]]
