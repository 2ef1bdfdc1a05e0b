"""Packing plans: every token once, in order, together, in few rows."""

import numpy as np
import pytest

from easyrl.data.packing import (
    best_fit,
    group_shapes,
    most_rows,
    one_per_row,
    pack,
    pack_groups,
    padding_share,
    row_lengths,
    rows_of_shapes,
)


def random_lengths(seed, together=1):
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 40))
    count = int(rng.integers(0, 30)) * together
    return rng.integers(0, width + 1, count), width, int(width * together * rng.integers(1, 4))


def unpacked(plan, lengths, width):
    """tokens[b][t] for the batch whose token at (b, t) is b * T + t, read back through the plan, segment by segment."""
    found = {}
    for source, positions, segments in zip(*plan, strict=True):
        for segment in range(1, segments.max() + 1):
            places = source[segments == segment]
            assert (np.diff(np.flatnonzero(segments == segment)) == 1).all()
            assert positions[segments == segment].tolist() == list(range(len(places)))
            if len(places):
                found[int(places[0]) // width] = places.tolist()
    return found


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_one_place(seed, together):
    lengths, width, row_length = random_lengths(seed, together)
    plan = pack(lengths, width, row_length, together=together)
    expected = {b: list(range(b * width, b * width + n)) for b, n in enumerate(lengths) if n}
    assert unpacked(plan, lengths, width) == expected
    assert ((plan.source == -1) == (plan.segment_ids == 0)).all()
    assert (plan.positions[plan.segment_ids == 0] == 0).all()
    assert len(plan.source) <= most_rows(len(lengths), width, row_length, together=together)
    assert all(array.dtype == np.int32 and array.shape == (len(plan.source), row_length) for array in plan)


@pytest.mark.parametrize("seed", range(10))
def test_pairs_share_a_row_in_order(seed):
    lengths, width, row_length = random_lengths(seed, 2)
    plan = pack(np.maximum(lengths, 1), width, row_length, together=2)
    for source, segments in zip(plan.source, plan.segment_ids, strict=True):
        sequences = [source[segments == s][0] // width for s in range(1, segments.max() + 1)]
        chosen, rejected = np.array(sequences[::2]), np.array(sequences[1::2])
        assert (chosen % 2 == 0).all() and (rejected == chosen + 1).all()


def test_best_fit_decreasing_by_hand():
    plan = pack(np.array([3, 5, 2, 4]), 5, 8)  # 5 opens row 0, 4 row 1, 3 fills row 0, 2 goes to row 1
    assert plan.source.tolist() == [[5, 6, 7, 8, 9, 0, 1, 2], [15, 16, 17, 18, 10, 11, -1, -1]]
    assert plan.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert plan.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]]
    assert plan.padding_share() == pytest.approx(2 / 16)
    assert plan.padding_share(rows_multiple=4) == pytest.approx(18 / 32)


def test_many_short_sequences_waste_little():
    lengths = np.random.default_rng(0).integers(20, 400, 256)
    assert pack(lengths, 512, 1024).padding_share() < 0.02


def test_one_per_row_packs_nothing():
    plan = one_per_row(np.array([2, 0, 3]), 4, 4)
    assert plan.source.tolist() == [[0, 1, -1, -1], [8, 9, 10, -1]]
    plan = one_per_row(np.array([2, 1, 0, 3]), 3, 6, together=2)
    assert plan.source.tolist() == [[0, 1, 3, -1, -1, -1], [9, 10, 11, -1, -1, -1]]
    assert plan.segment_ids.tolist() == [[1, 1, 2, 0, 0, 0], [2, 2, 2, 0, 0, 0]]


def test_rows_are_halved_down_to_128():
    assert row_lengths(512) == (512, 256, 128)
    assert row_lengths(4096) == (4096, 2048, 1024)
    assert row_lengths(256) == (256, 128)
    assert row_lengths(255) == (255,) and row_lengths(20) == (20,)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"longest": 2048}, [(1, 2048), (1, 1024), (1, 512)]),
        ({"longest": 256}, [(4, 256), (1, 256), (1, 128)]),
        ({"longest": 256, "sequences": 3}, [(3, 256), (1, 256), (1, 128)]),
        ({"longest": 256, "rows": 1}, [(1, 256), (1, 128)]),
        ({"longest": 256, "together": 2}, [(4, 256), (2, 256), (2, 128)]),
        ({"longest": 512, "shards": 8, "rows": 32}, [(32, 512), (8, 512), (8, 256)]),
        ({"longest": 4096, "shards": 8, "together": 2}, [(8, 4096), (8, 2048), (8, 1024)]),
        ({"longest": 40, "sequences": 16}, [(16, 40)]),
    ],
)
def test_groups_have_one_shape_for_the_bulk_and_lesser_ones(arguments, expected):
    assert list(group_shapes(**arguments)) == expected


def test_rows_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match="3 rows: expected a multiple of 2"):
        group_shapes(256, 2, rows=3)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_groups_hold_every_token_once(seed, packed, rows, together):
    lengths = np.random.default_rng(seed).integers(0, 513, 10)
    shapes = group_shapes(512, rows=rows, together=together)
    plans = pack_groups(lengths, 512, shapes, together=together, packed=packed)
    assert [plan.source.shape[1] for plan in plans] == [shape.length for shape in shapes]
    sources = np.concatenate([plan.source[plan.source >= 0] for plan in plans])
    expected = [b * 512 + t for b, length in enumerate(lengths) for t in range(length)]
    assert sorted(sources.tolist()) == expected
    for plan in plans:  # a sequence lies in one piece, and alone where nothing is packed
        inside = plan.source >= 0
        assert ((plan.source - plan.positions)[inside] % 512 == 0).all()
        assert packed or (plan.segment_ids <= 1).all()
    for plan, shape in zip(plans, shapes, strict=True):  # and those that belong together in one group
        units = [
            set((group[group >= 0] // 512 // together).tolist())
            for group in np.split(plan.source, range(shape.rows, len(plan.source), shape.rows))
        ]
        assert sum(map(len, units)) == len(set().union(*units))


def test_the_bulk_goes_into_large_groups_and_the_rest_into_small_ones():
    shapes = group_shapes(256)
    rows = rows_of_shapes(np.full(9, 250), shapes)
    assert [len(some) for some in rows] == [8, 1, 0]
    assert [len(some) for some in rows_of_shapes(np.full(7, 250), shapes)] == [7, 0, 0]  # not three small ones
    assert [len(some) for some in rows_of_shapes(np.array([250, 60, 60]), shapes)] == [0, 1, 1]


def test_sequences_of_a_unit_take_different_rows_of_a_bin():
    lengths = np.array([200, 250, 30, 5, 26, 1])
    assert best_fit(lengths, 256, 2) == [[[0, 2, 4], [1, 3, 5]]]
    assert best_fit(np.array([250, 200, 0, 0]), 256, 2) == [[[0], [1]]]


def test_a_small_minibatch_pads_little():
    """Eight sequences of log-normal lengths, as in a PPO minibatch: rows of one length waste twice as much and more."""
    rng = np.random.default_rng(0)
    shapes = group_shapes(512)
    mixed, single = [], []
    for _ in range(50):
        lengths = np.clip(rng.lognormal(4.8, 0.6, 8), 16, 512).astype(int)
        mixed.append(padding_share(pack_groups(lengths, 512, shapes), shapes))
        single.append(pack(lengths, 512, 512).padding_share())
    assert np.mean(mixed) < 0.13 < np.mean(single) / 1.4
    rows = group_shapes(512, rows=1)
    assert padding_share(pack_groups(lengths, 512, rows), rows) <= mixed[-1]


def test_nothing_to_pack():
    assert pack(np.zeros(4, int), 8, 8).source.shape == (0, 8)
    assert most_rows(0, 8, 8) == 0


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: pack(np.array([9]), 8, 16), "longer than the batch's width"),
        (lambda: pack(np.array([5, 6]), 8, 10, together=2), "10 places, expected at least 11"),
        (lambda: pack(np.array([5, 6, 7]), 8, 16, together=2), "3 sequences"),
        (lambda: most_rows(4, 8, 15, together=2), "cannot hold 2 x 8"),
    ],
)
def test_what_cannot_be_packed(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
