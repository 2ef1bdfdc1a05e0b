"""How often a reward model is right, by subset of the data, beside how often plain length is.

In most preference data the chosen answer is longer than the rejected one more (or less) often than by chance, so a
reward model may be no more than a measure of length: its accuracy means something only beside that of "the longer
answer wins".
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from easyrl.core.text import columns
from easyrl.data.dataset import Dataset

ALL, MEAN = "all", "mean_of_subsets"


class Accuracy(NamedTuple):
    """Over the samples of one subset: the share that the model gets right, and that the rule of length does."""

    subset: str
    samples: int
    accuracy: float
    longer_wins: float | None  # None: the samples are no pairs


def subset_names(dataset: Dataset, samples: Iterable[int], column: str) -> list[str]:
    """What `column` says of each sample, "" for a sample without it."""
    values = (dataset.columns(int(sample)).get(column) for sample in samples)
    return ["" if value is None else str(value) for value in values]


def pair_accuracies(scores: np.ndarray, lengths: np.ndarray, subsets: Sequence[str]) -> list[Accuracy]:
    """Accuracies over all pairs, over each subset by name, and, of several subsets, over their means.

    Args:
      scores: [n, 2], of the chosen and the rejected answer. A tie is wrong, as in `algos.preference`.
      lengths: [n, 2], tokens of the two answers. The rule that the longer one wins flips a coin at a tie.
      subsets: n names; a pair with the name "" belongs to none.
    """
    right = scores[:, 0] > scores[:, 1]
    by_length = 0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])
    return _accuracies(right.astype(float), by_length, subsets)


def label_accuracies(scores: np.ndarray, labels: np.ndarray, subsets: Sequence[str]) -> list[Accuracy]:
    """The same over single answers: a score [n] above 0 says that the label [n] is 1."""
    return _accuracies(((scores > 0) == (labels > 0.5)).astype(float), None, subsets)


def _accuracies(right: np.ndarray, by_length: np.ndarray | None, subsets: Sequence[str]) -> list[Accuracy]:
    of = np.asarray(subsets)

    def over(name: str, chosen: np.ndarray) -> Accuracy:
        length = None if by_length is None else float(by_length[chosen].mean())
        return Accuracy(name, int(chosen.sum()), float(right[chosen].mean()), length)

    whole = over(ALL, np.ones(len(right), bool))
    each = [over(name, of == name) for name in sorted(set(subsets) - {""})]
    if len(each) < 2:
        return [whole, *each]
    length = None if by_length is None else float(np.mean([row.longer_wins for row in each]))
    accuracy = float(np.mean([row.accuracy for row in each]))
    return [whole, *each, Accuracy(MEAN, sum(row.samples for row in each), accuracy, length)]


def accuracy_table(rows: Sequence[Accuracy]) -> str:
    """The accuracies for people to read."""
    head = ["subset", "samples", "accuracy", *["longer wins"] * (rows[0].longer_wins is not None)]
    cells = [
        [row.subset, f"{row.samples:,}", *(f"{share:.1%}" for share in row[2:] if share is not None)] for row in rows
    ]
    return columns(head, cells)
