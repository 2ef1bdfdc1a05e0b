"""Bins of rows, and which sequences go into them: best fit decreasing, by lengths alone.

A bin is as many rows as a unit has sequences, so that a unit, which is to be in one group of rows, fits into one bin.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

Row = list[int]  # the sequences that lie in a packed row, in order


class Units:
    """The sequences of a batch, so many consecutive ones of which are a unit that is to be in one group.

    Args:
      lengths: int [B], tokens of each sequence; 0 for a filler, which takes no place.
      together: the sequences of a unit: 2 for pairs, which their loss needs at once.
      alike: int [B / together], the tokens with which all sequences of a unit begin alike, fewer than any of them has:
        in a row with several of them these tokens lie once. None: none do.

    Raises ValueError when the sequences do not make whole units.
    """

    def __init__(self, lengths: np.ndarray, together: int = 1, alike: np.ndarray | None = None):
        self.lengths, self.together = np.asarray(lengths), together
        if len(self.lengths) % together:
            raise ValueError(f"{len(self.lengths)} sequences cannot be kept together by {together}")
        self.alike = np.zeros(len(self.lengths) // together, int) if alike is None else np.asarray(alike)

    @property
    def grid(self) -> np.ndarray:
        """The lengths, [units, together]."""
        return self.lengths.reshape(-1, self.together)

    @property
    def totals(self) -> np.ndarray:
        """int [units], the places that each takes in one row."""
        grid = self.grid
        return grid.sum(axis=1) - self.alike * np.maximum(np.count_nonzero(grid, axis=1) - 1, 0)

    def sequences(self, unit: int) -> Row:
        """Those of a unit that have any tokens."""
        first = unit * self.together
        return [k for k in range(first, first + self.together) if self.lengths[k]]

    def places(self, row: Row) -> int:
        """The places that these sequences take in one row."""
        spared = sum(alike * (len(sequences) - 1) for alike, sequences in self.stems(row))
        return int(self.lengths[row].sum()) - spared

    def only(self, which: np.ndarray) -> "Units":
        """The same without the tokens of other units than those of which a bool [units] is True."""
        return Units(np.where(which[:, None], self.grid, 0).reshape(-1), self.together, np.where(which, self.alike, 0))

    def stems(self, row: Row) -> Iterator[tuple[int, Row]]:
        """(tokens that lie once, sequences that have them) along a row; of a sequence on its own there are none."""
        for unit, sequences in itertools.groupby(row, lambda k: k // self.together):
            branches = list(sequences)
            yield int(self.alike[unit]) if len(branches) > 1 else 0, branches


def best_fit(units: Units, row_length: int) -> list[list[Row]]:
    """Bins of `together` rows, filled by best fit decreasing: the longest unit first, into the fullest bin with room.

    A unit goes into one bin, as a whole into the fullest row that has room where that spares tokens, else each of its
    sequences into the fullest row with room for it. Empty sequences are nowhere. Depends on the lengths alone. Raises
    ValueError for a sequence longer than a row.
    """
    check_room(units, row_length)
    bins = _Bins(units)
    for unit in bins.units:
        if not bins.add(unit):
            bins.open(row_length, unit)
    return bins.rows


def rows_needed(lengths: np.ndarray, row_length: int) -> int:
    """The rows that `best_fit` takes for sequences that are each a unit, without saying what lies where."""
    check_room(Units(lengths), row_length)
    rooms: list[int] = []  # free places of every row, ascending
    for length in sorted(filter(None, lengths.tolist()), reverse=True):
        fullest = bisect_left(rooms, length)
        room = rooms.pop(fullest) if fullest < len(rooms) else row_length
        insort(rooms, room - length)
    return len(rooms)


def fit_into(units: Units, row_lengths: Sequence[int]) -> list[list[Row]] | None:
    """As `best_fit`, into bins that are given by the lengths of their rows; None if one unit finds no room."""
    bins = _Bins(units)
    for row_length in row_lengths:
        bins.open(row_length)
    return bins.rows if all(map(bins.add, bins.units)) else None


class _Bins:
    """Bins of rows, and the places in them that are free.

    `units` are the numbers of those units that have any tokens, the longest first.
    """

    def __init__(self, units: Units):
        totals = units.totals
        self.units = [unit for unit in np.argsort(-totals, kind="stable").tolist() if totals[unit]]
        self.rows: list[list[Row]] = []
        self._of, self._sizes, self._totals = units, units.lengths.tolist(), totals.tolist()
        self._alike: list[int] = units.alike.tolist()
        self._free: list[list[int]] = []  # places of every bin's rows
        self._room: list[tuple[int, int]] = []  # (free places, bin), ascending

    def open(self, row_length: int, unit: int | None = None) -> None:
        """One more bin, empty, or with a unit: in one row, or each of its sequences in a row of its own."""
        number, together = len(self.rows), self._of.together
        self.rows.append([[] for _ in range(together)])
        self._free.append([row_length] * together)
        if unit is None:
            self._put([], [], number)
            return
        sequences = self._of.sequences(unit)
        self._put(sequences, self._in_one_row(unit, self._free[number]) or list(range(len(sequences))), number)

    def add(self, unit: int) -> bool:
        """Puts the unit into the fullest bin with room, into one row if that spares tokens; False if there is none."""
        sequences = self._of.sequences(unit)
        for find in (self._in_one_row, self._apart):
            for place in range(bisect_left(self._room, (self._totals[unit], -1)), len(self._room)):
                number = self._room[place][1]
                if rows := find(unit, self._free[number]):
                    del self._room[place]
                    self._put(sequences, rows, number)
                    return True
        return False

    def _in_one_row(self, unit: int, free: Sequence[int]) -> list[int] | None:
        """For each sequence of the unit the same row, the fullest with room for all of it, if that spares tokens."""
        if not self._alike[unit]:
            return None
        fitting = [row for row, places in enumerate(free) if places >= self._totals[unit]]
        return [min(fitting, key=free.__getitem__)] * len(self._of.sequences(unit)) if fitting else None

    def _apart(self, unit: int, free: Sequence[int]) -> list[int] | None:
        """The row for each sequence, the longest first into the fullest row that has room; None if one finds none."""
        left, rows = list(free), dict[int, int]()
        sequences = self._of.sequences(unit)
        for sequence in sorted(sequences, key=lambda k: -self._sizes[k]):
            fitting = [row for row, places in enumerate(left) if places >= self._sizes[sequence]]
            if not fitting:
                return None
            rows[sequence] = min(fitting, key=left.__getitem__)
            left[rows[sequence]] -= self._sizes[sequence]
        return [rows[sequence] for sequence in sequences]

    def _put(self, sequences: list[int], rows: list[int], number: int) -> None:
        """Into these rows of a bin that is not in `_room`, which then has it with what is left."""
        free = self._free[number]
        for row, group in itertools.groupby(zip(rows, sequences, strict=True), lambda pair: pair[0]):
            together = [sequence for _, sequence in group]
            self.rows[number][row] += together
            free[row] -= self._of.places(together)
        insort(self._room, (sum(free), number))


def check_room(units: Units, row_length: int) -> None:
    """Raises ValueError for a sequence that is longer than a row."""
    lengths = units.lengths
    if lengths.size and lengths.max() > row_length:
        raise ValueError(
            f"a row has {row_length} places, expected at least {lengths.max()}, to hold sequence {lengths.argmax()}"
        )
