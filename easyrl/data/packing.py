"""Plans that put ragged sequences side by side in rows of one length. Host arithmetic on lengths alone.

A batch lies padded in memory, [B, T] with sequence b in row b. A plan says which of its tokens go where in packed rows
[R, S]: `steps.packed` gathers by it on the device and scatters results back, so no token is copied on the host.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_SHAPES = 3  # of the groups that a batch is packed into: each is one more loop to compile
SHORTEST_ROW = 128
GROUP_TOKENS = 1024  # a device's share of a group, unless the flags say otherwise
GROUP_COST = 128  # what a group costs whatever its tokens (adding up its gradients), in tokens a device

Row = list[int]  # the sequences that lie in a packed row, in order


class Plan(NamedTuple):
    """Packed rows, each array int32 [R, S]."""

    source: np.ndarray  # b * T + t, the place in the flattened padded batch, or -1 for padding
    positions: np.ndarray  # t, counted within each sequence
    segment_ids: np.ndarray  # 1, 2, ... along a row, 0 for padding

    def padding_share(self, rows_multiple: int = 1) -> float:
        """The share of the places that no token takes, once rows are filled up to a multiple of `rows_multiple`."""
        rows, length = self.source.shape
        places = -(-rows // rows_multiple) * rows_multiple * length
        return 1.0 - float(np.count_nonzero(self.segment_ids)) / max(places, 1)


def pack(lengths: np.ndarray, width: int, row_length: int, *, together: int = 1) -> Plan:
    """Packs a padded batch by best fit decreasing: the longest sequence first, each into the fullest row that has room.

    Args:
      lengths: int [B], tokens of each sequence; 0 for a filler, which takes no place.
      width: T of the padded batch.
      row_length: S of the packed rows.
      together: this many consecutive sequences share a row, in their order: 2 for pairs, so that a pair is never
        parted, however rows are split over devices and micro-batches.

    The plan depends on the lengths alone, and uses at most `most_rows` rows. Raises ValueError when sequences that
    belong together do not fit into one row.
    """
    lengths = _checked(lengths, width, together)
    bins = best_fit(lengths.reshape(-1, together).sum(axis=1), row_length)
    rows = [[unit * together + k for unit in row for k in range(together)] for (row,) in bins]
    return _lay_out(rows, lengths, width, row_length)


def best_fit(lengths: np.ndarray, row_length: int, together: int = 1) -> list[list[Row]]:
    """Bins of `together` rows, filled by best fit decreasing: the longest unit first, into the fullest bin with room.

    A unit is `together` consecutive sequences, which go into one bin, each into the fullest row that has room for it.
    Empty sequences are nowhere. Depends on the lengths alone. Raises ValueError for a sequence longer than a row.
    """
    if lengths.size and lengths.max() > row_length:
        raise ValueError(
            f"a row has {row_length} places, expected at least {lengths.max()}, to hold sequence {lengths.argmax()}"
        )
    sizes = lengths.tolist()
    totals = lengths.reshape(-1, together).sum(axis=1)
    bins: list[list[Row]] = []
    free: list[list[int]] = []  # places of every bin's rows that are free
    room: list[tuple[int, int]] = []  # (free places, bin), ascending
    for unit in np.argsort(-totals, kind="stable").tolist():
        total = int(totals[unit])
        if total == 0:
            break
        sequences = [k for k in range(unit * together, (unit + 1) * together) if sizes[k]]
        for place in range(bisect_left(room, (total, -1)), len(room)):
            number = room[place][1]
            if (rows := _fit(sequences, sizes, free[number])) is not None:
                del room[place]
                break
        else:
            number, rows = len(bins), list(range(len(sequences)))
            bins.append([[] for _ in range(together)])
            free.append([row_length] * together)
        for sequence, row in zip(sequences, rows, strict=True):
            bins[number][row].append(sequence)
            free[number][row] -= sizes[sequence]
        insort(room, (sum(free[number]), number))
    return bins


def _fit(sequences: Sequence[int], sizes: Sequence[int], free: Sequence[int]) -> list[int] | None:
    """The row for each sequence, the longest first into the fullest row that has room; None if one finds none."""
    left, rows = list(free), dict[int, int]()
    for sequence in sorted(sequences, key=lambda k: -sizes[k]):
        fitting = [row for row, places in enumerate(left) if places >= sizes[sequence]]
        if not fitting:
            return None
        rows[sequence] = min(fitting, key=left.__getitem__)
        left[rows[sequence]] -= sizes[sequence]
    return [rows[sequence] for sequence in sequences]


def one_per_row(lengths: np.ndarray, width: int, row_length: int, *, together: int = 1) -> Plan:
    """The plan that packs nothing: each sequence (or `together` of them) has its own row. Arguments as in `pack`."""
    lengths = _checked(lengths, width, together)
    rows = [list(range(first, first + together)) for first in range(0, len(lengths), together)]
    return _lay_out([row for row in rows if lengths[row].any()], lengths, width, row_length)


class Shape(NamedTuple):
    """The shape of a group, which is what a model is run on at once: so many packed rows of so many tokens."""

    rows: int
    length: int


def row_lengths(longest: int) -> tuple[int, ...]:
    """The lengths of rows for sequences up to `longest`: it, and its halves down to 128."""
    lengths = [longest]
    while lengths[-1] % 2 == 0 and lengths[-1] >= 2 * SHORTEST_ROW and len(lengths) < MOST_SHAPES:
        lengths.append(lengths[-1] // 2)
    return tuple(lengths)


def group_shapes(
    longest: int, shards: int = 1, *, rows: int = 0, together: int = 1, sequences: int | None = None
) -> tuple[Shape, ...]:
    """The shapes of groups for sequences up to `longest` tokens: one for the bulk of a batch, and lesser ones for what
    it leaves over, so that a small batch pads little.

    Args:
      shards: devices that share the rows of a group: every shape has a multiple of so many rows, and of `together`.
      rows: rows of the first shape; 0: enough for GROUP_TOKENS tokens a device.
      together: sequences that are to be in one group, each in a row.
      sequences: how many there are at most; no shape has more rows than they need.

    Raises ValueError when `rows` is not such a multiple.
    """
    least = math.lcm(shards, together)
    bulk = rows or least * max(1, GROUP_TOKENS * shards // (least * longest))
    if bulk % least:
        raise ValueError(f"{rows} rows: expected a multiple of {least}")
    if sequences is not None:
        bulk = min(bulk, least * max(1, -(-sequences // least)))
    lengths = row_lengths(longest)
    if bulk == least:
        return tuple(Shape(least, length) for length in lengths)
    worth = SHORTEST_ROW * shards // least  # a lesser group would cost more than it spares
    return (Shape(bulk, longest), *(Shape(least, length) for length in lengths[:2] if length >= worth))


def rows_of_shapes(
    lengths: np.ndarray, shapes: Sequence[Shape], *, together: int = 1, packed: bool = True
) -> list[list[Row]]:
    """The rows of every shape that hold sequences of these `lengths`; consecutive ones are a group.

    Bins of `together` rows are filled to each of the shapes' lengths in turn (a unit with a longer sequence has a bin
    of its own), every bin shrinks to the least length that holds its rows, and the length is taken that leaves the
    least to compute. With `packed=False` every sequence has a row of its own.
    """
    units = lengths.reshape(-1, together)
    choices = sorted({shape.length for shape in shapes})
    least = min(shape.rows for shape in shapes)

    def cost(shape: Shape, num_rows: int) -> int:
        return -(-num_rows // shape.rows) * (shape.rows * shape.length + GROUP_COST * least)

    def fill(target: int) -> list[list[Row]]:
        shared = packed & (units.max(axis=1, initial=0) <= target)
        bins = best_fit(np.where(shared[:, None], units, 0).reshape(-1), target, together)
        alone = np.flatnonzero(~shared & units.any(axis=1))
        bins += [[[k] for k in range(unit * together, (unit + 1) * together)] for unit in alone.tolist()]
        by_length: dict[int, list[Row]] = {length: [] for length in choices}
        for rows in bins:
            longest = max(int(lengths[row].sum()) for row in rows)
            by_length[min(length for length in choices if length >= longest)] += rows
        found = []
        for shape in shapes:
            rows = by_length[shape.length]
            rest = len(rows) % shape.rows
            lesser = [other for other in shapes if other.length == shape.length and other.rows < shape.rows]
            keep = len(rows) - rest if lesser and cost(lesser[0], rest) < cost(shape, rest) else len(rows)
            found.append(rows[:keep])
            by_length[shape.length] = rows[keep:]
        return found

    total = lambda found: sum(cost(shape, len(rows)) for shape, rows in zip(shapes, found, strict=True))
    return min(map(fill, choices), key=total)


def pack_groups(
    lengths: np.ndarray, width: int, shapes: Sequence[Shape], *, together: int = 1, packed: bool = True
) -> tuple[Plan, ...]:
    """A padded batch packed into groups of these `shapes`: a plan for each. The arguments are those of `pack` and
    `rows_of_shapes`.
    """
    lengths = _checked(lengths, width, together)
    rows = rows_of_shapes(lengths, shapes, together=together, packed=packed)
    return tuple(_lay_out(some, lengths, width, shape.length) for shape, some in zip(shapes, rows, strict=True))


def padding_share(plans: Sequence[Plan], shapes: Sequence[Shape]) -> float:
    """The share of the places that no token takes, in the groups of these `shapes` that the plans need."""
    tokens = sum(int(np.count_nonzero(plan.segment_ids)) for plan in plans)
    places = sum(
        -(-len(plan.source) // shape.rows) * shape.rows * shape.length
        for plan, shape in zip(plans, shapes, strict=True)
    )
    return 1.0 - tokens / max(places, 1)


def most_rows(num_sequences: int, width: int, row_length: int, *, together: int = 1) -> int:
    """The most rows that `pack` can need for sequences of up to `width` tokens.

    A row is opened only when no other has room, so every row but the last holds as many units as of the longest fit.
    """
    per_row = row_length // (width * together)
    if per_row == 0:
        raise ValueError(f"rows of {row_length} tokens cannot hold {together} x {width}")
    return -(-num_sequences // together // per_row) if num_sequences else 0


def _checked(lengths: np.ndarray, width: int, together: int) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.size and lengths.max() > width:
        raise ValueError(f"a sequence of {lengths.max()} tokens is longer than the batch's width, {width}")
    if len(lengths) % together:
        raise ValueError(f"{len(lengths)} sequences cannot be kept together by {together}")
    return lengths


def _lay_out(rows: list[list[int]], lengths: np.ndarray, width: int, row_length: int) -> Plan:
    source = np.full((len(rows), row_length), -1, np.int32)
    positions = np.zeros((len(rows), row_length), np.int32)
    segment_ids = np.zeros((len(rows), row_length), np.int32)
    for row, sequences in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(sequences, 1):
            stop = start + int(lengths[sequence])
            positions[row, start:stop] = np.arange(stop - start)
            source[row, start:stop] = sequence * width + positions[row, start:stop]
            segment_ids[row, start:stop] = segment
            start = stop
    return Plan(source, positions, segment_ids)
