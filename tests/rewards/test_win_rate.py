"""Win rates by category, worked by hand."""

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.rewards.win_rate import win_rate_table, win_rates

POINTS = np.array([1.0, 0.0, 0.5, 1.0, 0.25, 0.75, 1.0])
CATEGORIES = ["math", "math", "math", "code", "others", "others", ""]


def test_win_rates_by_hand():
    rows = win_rates(POINTS, CATEGORIES, ["others"])
    assert rows == [
        ("all", 7, 4, 1, 2, pytest.approx(4.5 / 7)),
        ("code", 1, 1, 0, 0, 1.0),
        ("math", 3, 1, 1, 1, 0.5),
        ("others", 2, 1, 0, 1, 0.5),
        ("mean_of_categories", 6, 3, 1, 2, pytest.approx(2 / 3)),
        ("mean_of_categories_without_others", 4, 2, 1, 1, 0.75),
    ]


def test_without_categories_there_is_one_row():
    assert [row.category for row in win_rates(POINTS, [""] * 7)] == ["all"]
    assert [row.category for row in win_rates(POINTS, ["a"] * 7)] == ["all", "a"]


@pytest.mark.parametrize(
    ("excluded", "complaint"),
    [
        (["other"], "--exclude_category=other: no such category, found code, math, others"),
        (["code", "math", "others"], "--exclude_category=code,math,others: no category is left"),
    ],
)
def test_categories_that_cannot_be_left_out(excluded, complaint):
    with pytest.raises(UserError, match=complaint):
        win_rates(POINTS, CATEGORIES, excluded)


def test_both_sets_share_the_points():
    ours = {row.category: row for row in win_rates(POINTS, CATEGORIES)}
    theirs = {row.category: row for row in win_rates(1 - POINTS, CATEGORIES)}
    for name, row in ours.items():
        assert row.win_rate + theirs[name].win_rate == pytest.approx(1)
        assert (row.wins, row.ties, row.losses) == (theirs[name].losses, theirs[name].ties, theirs[name].wins)


def test_the_table_can_be_read():
    table = win_rate_table(win_rates(POINTS, CATEGORIES)).splitlines()
    assert table[2].split() == ["code", "1", "1", "0", "0", "100.0%"]
