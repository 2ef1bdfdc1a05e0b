"""The order of samples: a function of seed and step, every sample once an epoch, mixtures in their shares."""

import numpy as np
import pytest

import easyrl.data.order as order_module
from easyrl.data.bins import Units, best_fit, rows_needed
from easyrl.data.order import RowOrder, SampleOrder, Stream


def epoch_of(order, epoch):
    first = sum(order.steps(e) for e in range(epoch))
    return [order.samples(step).tolist() for step in range(first, first + order.steps(epoch))]


def flat(batches):
    return [sample for batch in batches for sample in batch]


def test_every_epoch_has_each_sample_at_most_once_in_a_new_order():
    order = SampleOrder(Stream([7, 6], seed=3), 4)
    epochs = [epoch_of(order, epoch) for epoch in range(4)]
    assert order.steps(0) == 3
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 4]
        assert len(set(flat(batches))) == 12 and set(flat(batches)) <= set(range(13))
    assert len({tuple(flat(batches)) for batches in epochs}) == 4
    assert [order.epoch(step) for step in (0, 2, 3, 11)] == [0, 0, 1, 3]


def test_the_rest_can_be_kept():
    order = SampleOrder(Stream([10], 0, shuffle=False), 4, keep_last=True)
    assert epoch_of(order, 0) == epoch_of(order, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_seeds_differ_and_repeat():
    samples = [SampleOrder(Stream([50], seed), 50).samples(0).tolist() for seed in (0, 1, 0, -1)]
    assert samples[0] == samples[2] and samples[0] != samples[1] and samples[3] not in samples[:2]


def test_mixtures_keep_their_shares_and_exhaust_each_part():
    order = SampleOrder(Stream([30, 10], 0, weights=[0.5, 0.5]), 8)
    drawn = np.concatenate([order.samples(step) for step in range(10)])
    first, second = drawn[drawn < 30], drawn[drawn >= 30]
    assert len(first) == len(second) == 40
    assert sorted(first[:30]) == list(range(30))
    for start in range(0, 40, 10):
        assert sorted(second[start : start + 10]) == list(range(30, 40))
    assert order.steps(0) == 5


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_filled(seed):
    rng = np.random.default_rng(seed)
    totals = rng.integers(1, 40, 300)
    order = RowOrder(Stream([300], seed), totals, rows=4, row_length=128)
    for epoch in range(2):
        batches = epoch_of(order, epoch)
        assert len(set(flat(batches))) == len(flat(batches))
        for batch in batches:
            assert len(best_fit(Units(totals[batch]), 128)) <= 4
            assert len(batch) <= order.most_samples
        assert totals[flat(batches)].sum() / (len(batches) * 4 * 128) > 0.95
        following = [batch[0] for batch in batches[1:]]
        for batch, extra in zip(batches, following, strict=False):
            assert len(best_fit(Units(totals[[*batch, extra]]), 128)) > 4 or len(batch) == order.most_samples
    assert order.epoch(order.steps(0)) == 1


@pytest.mark.parametrize(("least", "most"), [(1, 40), (30, 44), (60, 128)])
def test_a_batch_is_the_longest_stretch_that_best_fit_finds_room_for(least, most):
    totals = np.random.default_rng(most).integers(least, most, 200)
    batches = epoch_of(RowOrder(Stream([200], 0, shuffle=False), totals, rows=6, row_length=128, keep_last=True), 0)
    start = 0
    for batch in batches:
        stops = range(min(start + 2 * len(batch) + 6, 200), start, -1)
        stop = next(stop for stop in stops if len(best_fit(Units(totals[start:stop]), 128)) <= 6)
        assert batch == list(range(start, stop))
        start = stop
    assert start == 200


def test_rows_needed_are_those_of_best_fit():
    rng = np.random.default_rng(0)
    for most in (20, 60, 100):
        lengths = rng.integers(0, most, 200)
        assert rows_needed(lengths, 100) == len(best_fit(Units(lengths), 100))
    with pytest.raises(ValueError, match="a row has 9 places, expected at least 10"):
        rows_needed(np.array([3, 10]), 9)


def test_long_samples_are_planned_with_few_tries(monkeypatch):
    """Of 40 rows' tokens half as many fit, one in a row: not one try for each of the others."""
    tries = []
    monkeypatch.setattr(order_module, "rows_needed", lambda *args: tries.append(args) or rows_needed(*args))
    assert RowOrder(Stream([400], 0), np.full(400, 65), rows=40, row_length=128, keep_last=True).steps(0) == 10
    assert len(tries) == 10


def test_random_access_to_rows_equals_reading_on():
    totals = np.random.default_rng(0).integers(1, 40, 100)

    def make():
        return RowOrder(Stream([100], 7), totals, rows=2, row_length=64)

    straight = make()
    batches = [straight.samples(step).tolist() for step in range(40)]
    assert [make().samples(step).tolist() for step in (39, 17, 3)] == [batches[39], batches[17], batches[3]]


def test_the_last_rows_can_be_kept():
    totals = np.full(10, 30)
    assert len(flat(epoch_of(RowOrder(Stream([10], 0), totals, 2, 64), 0))) == 8
    assert len(flat(epoch_of(RowOrder(Stream([10], 0), totals, 2, 64, keep_last=True), 0))) == 10
    assert len(flat(epoch_of(RowOrder(Stream([3], 0), totals[:3], 2, 64), 0))) == 3  # the only batch stays
