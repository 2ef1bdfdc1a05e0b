"""Accuracy of scores on pairs and labels, worked by hand."""

import numpy as np
import pytest

from easyrl.rewards.accuracy import accuracy_table, label_accuracies, pair_accuracies

SCORES = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [3.0, -1.0]], np.float32)  # right, wrong, a tie, right
LENGTHS = np.array([[5, 4], [7, 3], [2, 2], [1, 9]])  # longer, longer, a tie, shorter
SUBSETS = ["easy", "hard", "hard", ""]


def test_accuracies_of_pairs_by_hand():
    rows = pair_accuracies(SCORES, LENGTHS, SUBSETS)
    assert rows == [
        ("all", 4, 0.5, (1 + 1 + 0.5 + 0) / 4),
        ("easy", 1, 1.0, 1.0),
        ("hard", 2, 0.0, 0.75),
        ("mean_of_subsets", 3, 0.5, 0.875),
    ]


def test_one_subset_needs_no_mean():
    assert [row.subset for row in pair_accuracies(SCORES, LENGTHS, ["x"] * 4)] == ["all", "x"]
    assert [row.subset for row in pair_accuracies(SCORES, LENGTHS, [""] * 4)] == ["all"]


def test_accuracies_of_labels_by_hand():
    rows = label_accuracies(np.array([1.0, -1.0, 0.0, 2.0]), np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"])
    assert rows == [
        ("all", 4, 0.5, None), ("a", 2, 0.5, None), ("b", 2, 0.5, None), ("mean_of_subsets", 4, 0.5, None),
    ]  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
def test_accuracy_does_not_depend_on_order(sign):
    order = np.array([3, 1, 0, 2])[::sign]
    shuffled = pair_accuracies(SCORES[order], LENGTHS[order], [SUBSETS[i] for i in order])
    assert shuffled == pair_accuracies(SCORES, LENGTHS, SUBSETS)


def test_the_table_has_a_column_for_length_only_where_there_are_pairs():
    table = accuracy_table(pair_accuracies(SCORES, LENGTHS, SUBSETS)).splitlines()
    assert table[0].split() == ["subset", "samples", "accuracy", "longer", "wins"]
    assert table[3].split() == ["hard", "2", "0.0%", "75.0%"]
    assert len({len(line) for line in table}) == 1
    labels = accuracy_table(label_accuracies(np.ones(2), np.ones(2), ["", ""]))
    assert labels.split() == ["subset", "samples", "accuracy", "all", "2", "100.0%"]
