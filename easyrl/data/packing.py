"""Plans that put ragged sequences side by side in rows of a few lengths. Host arithmetic on lengths alone.

A batch lies padded in memory, [B, T] with sequence b in row b. A plan says which of its tokens go where in packed rows
[R, S]: `core.groups` gathers by it on the device and scatters results back, so no token is copied on the host. Rows
are run in groups, each of one of a few shapes that are known beforehand.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from easyrl.core.segments import branch
from easyrl.data.bins import Row, Units, best_fit, check_room, fit_into

ROW_MULTIPLE = 128  # of the lengths of rows: so matrix units and attention kernels like it
GROUP_TOKENS = 1024  # a device's share of a group, unless the flags say otherwise
# The sizes of lesser groups against the bulk's, where that has one row a device, and where it has several. Each is one
# more loop to compile. The first ones are for every batch: a row a little shorter, for what nothing fits beside, and
# half a row, for a sequence cut where rows are twice as long. The others are besides them for a batch of up to
# FEW_GROUPS groups, in which what the last one leaves empty counts for more.
SHARES_OF_ROW, SHARES_OF_ROWS = ((7 / 8, 1 / 2), (3 / 4, 3 / 8)), ((3 / 4,), (3 / 8, 1 / 2))
FEW_GROUPS = 8
GROUP_COST = 128  # what a group costs whatever its tokens (adding up its gradients), in tokens a device
LITTLE_PADDING = 0.03  # a share with which the first packing that is found will do
TIGHT = 0.02  # places more than tokens, as a share, with which packing hardly ever succeeds
TRIAL_STEPS = 10  # that many batches say what rows to take
MUCH_PADDING = 0.05  # from which on longer rows, in which attention costs more, are worth it
MOST_TRIES, MOST_SHORT = 32, 3  # sets of groups that are tried; groups of short rows in one
MOST_SETS = 256  # ways to choose groups of every shape but one, about, of which those are the cheapest


class Shape(NamedTuple):
    """The shape of a group, which is what a model is run on at once: so many packed rows of so many tokens."""

    rows: int
    length: int


class Plan(NamedTuple):
    """Packed rows, each array int32 [R, S]."""

    source: np.ndarray  # b * T + t, the place in the flattened padded batch, or -1 for padding
    positions: np.ndarray  # t, counted within each sequence
    segment_ids: np.ndarray  # 1, 2, ... along a row, 0 for padding, and of branches (core.segments)


class Packing(NamedTuple):
    """A batch packed into groups: for each shape that a group may have, the plan of the rows in such groups.

    A plan's rows follow each other into groups; what is missing from the last one is padding.
    """

    shapes: tuple[Shape, ...]
    plans: tuple[Plan, ...]

    @property
    def places(self) -> int:
        """The tokens for which the groups that are needed have room."""
        return _places((len(plan.source) for plan in self.plans), self.shapes)

    @property
    def tokens(self) -> int:
        """Those that the rows hold: of what a pair begins with each once where it lies once."""
        return sum(int(np.count_nonzero(plan.segment_ids)) for plan in self.plans)

    def padding_share(self) -> float:
        """The share of these places that no token takes."""
        return 1.0 - self.tokens / max(self.places, 1)


def rounded_up(length: int) -> int:
    """The least length of a row that holds so many tokens and is a multiple of ROW_MULTIPLE."""
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE


def group_shapes(
    longest: int, shards: int = 1, *, rows: int = 0, together: int = 1, sequences: int | None = None
) -> tuple[Shape, ...]:
    """The shapes of groups for sequences up to `longest` tokens: one for the bulk of a batch, and lesser ones for what
    it leaves over, so that a small batch pads little. Rows longer than ROW_MULTIPLE are a multiple of it.

    Args:
      shards: devices that share the rows of a group: every shape has a multiple of so many rows, and of `together`.
      rows: rows of the first shape; 0: enough for GROUP_TOKENS tokens a device.
      together: sequences that are to be in one group, each in a row.
      sequences: how many there are at most. No shape has more rows than they need, and unless `rows` says otherwise
        so many of the longest ones fill all groups alike. None: taken for few.

    Raises ValueError when `rows` is not such a multiple.
    """
    longest = rounded_up(longest) if longest > ROW_MULTIPLE else longest
    least = math.lcm(shards, together)
    bulk = rows or least * max(1, GROUP_TOKENS * shards // (least * longest))
    if bulk % least:
        raise ValueError(f"{rows} rows: expected a multiple of {least}")
    groups = FEW_GROUPS
    if sequences is not None:
        most = max(1, -(-sequences // least))
        groups = -(-most * least // bulk)
        bulk = min(bulk, least * (most if rows else -(-most // groups)))
    times = bulk // least
    always, besides = SHARES_OF_ROW if times == 1 else SHARES_OF_ROWS
    found = {Shape(bulk, longest)}
    for share in (*always, *besides) if groups <= FEW_GROUPS else always:
        fewer = math.ceil(share * times)
        found.add(Shape(fewer * least, min(rounded_up(math.ceil(share * times / fewer * longest)), longest)))
    return tuple(sorted(found, key=lambda shape: (shape.rows * shape.length, shape.length), reverse=True))


def choose_shapes(
    shapes_for: Callable[[int], tuple[Shape, ...]], longest: int, trials: Sequence[Units]
) -> tuple[Shape, ...]:
    """Groups of rows of `longest` tokens, or of longer ones where those leave much padding in batches like `trials`.

    Rows may become twice as long, or so long that the sequences of every unit that begin alike lie in one, but no
    longer: attention costs more in them, and memory. Tokens that begin alike and lie in a row each count as padding.
    """
    longer = {2 * longest}
    if any(units.alike.any() for units in trials):
        longer.add(min(rounded_up(max(int(units.totals.max()) for units in trials)), 2 * longest))
    chosen = shapes_for(longest)
    spare = spare_share(trials, chosen)
    if spare <= MUCH_PADDING:
        return chosen
    for length in sorted(length for length in longer if length > longest):
        shapes = shapes_for(length)
        if (less := spare_share(trials, shapes)) < spare:
            chosen, spare = shapes, less
    return chosen


def spare_share(batches: Sequence[Units], shapes: Sequence[Shape]) -> float:
    """The share of places in groups of these shapes that could be spared: what no token takes, and what tokens take
    that begin alike, but for one of them.
    """
    places = sum(_places(map(len, rows_of_shapes(units, shapes)), shapes) for units in batches)
    return 1.0 - sum(int(units.totals.sum()) for units in batches) / places


def pack(
    lengths: np.ndarray,
    width: int,
    shapes: Sequence[Shape],
    *,
    together: int = 1,
    alike: np.ndarray | None = None,
    packed: bool = True,
) -> Packing:
    """Packs a padded batch into groups of these `shapes`, of which one must hold the longest sequence.

    Args:
      lengths: int [B], tokens of each sequence; 0 for a filler, which takes no place.
      width: T of the padded batch.
      together: this many consecutive sequences are in one group: 2 for pairs, which their loss needs at once. Every
        shape has a multiple of so many rows.
      alike: int [B / together], the tokens with which all of these sequences begin alike, fewer than any of them has.
        Where they find room in one row, these tokens lie there once. None: none are shared.
      packed: False gives every sequence a row of its own, for comparison.

    The outcome depends on the lengths and shapes alone; no shape gets more rows than B. Raises ValueError for lengths
    that no row or batch has.
    """
    units = Units(lengths, together, alike if packed else None)
    if units.lengths.size and units.lengths.max() > width:
        raise ValueError(f"a sequence of {units.lengths.max()} tokens is longer than the batch's width, {width}")
    return _packing(rows_of_shapes(units, shapes, packed=packed), units, width, shapes)


def pack_parts(parts: np.ndarray, width: int, shapes: Sequence[Shape]) -> list[Packing]:
    """Packs each of the equal parts of a padded batch by itself, so that all of them take the same groups: those of
    devices that have a part each and run group after group together.

    Args as in `pack`, with the lengths [parts, B] of the parts' sequences; every plan counts its part's from 0. Of the
    groups that some part takes when it is alone, and of those with room for whatever any takes, they are the cheapest
    that hold every part.
    """
    units = [Units(lengths) for lengths in parts]
    alone = [rows_of_shapes(one, shapes) for one in units]
    taken = {tuple(_whole_groups(map(len, rows), shapes)) for rows in alone}
    taken.add(tuple(map(max, zip(*taken, strict=True))))

    def rows_within(most: tuple[int, ...]) -> Iterator[list[list[Row]] | None]:
        for one, rows in zip(units, alone, strict=True):
            enough = all(len(some) <= room for some, room in zip(rows, most, strict=True))
            yield rows if enough else _fit_rows(one, most, shapes)

    for most in sorted(taken, key=lambda most: (_cost(most, shapes), most)):
        fitting = [rows for rows in rows_within(most) if rows is not None]
        if len(fitting) == len(parts):
            break
    return [_packing(rows, one, width, shapes) for rows, one in zip(fitting, units, strict=True)]


def rows_of_shapes(units: Units, shapes: Sequence[Shape], *, packed: bool = True) -> list[list[Row]]:
    """The rows of every shape that hold these sequences; consecutive ones are a group.

    Bins are filled to each of the shapes' lengths in turn, and the length is taken that leaves the least to compute.
    Then fewer or shorter groups are looked for into which everything fits, too. With `packed=False` every sequence has
    a row of its own.
    """
    targets = sorted({shape.length for shape in shapes})
    check_room(units, targets[-1])
    ways = [_fill(units, target, shapes, packed) for target in targets]
    found = min(ways, key=lambda rows: _cost(map(len, rows), shapes))
    return _fit_tighter(units, found, shapes) if packed else found


def _whole_groups(rows: Iterable[int], shapes: Sequence[Shape]) -> Iterator[int]:
    """The rows of the groups that so many rows of each shape need."""
    return (-(-number // shape.rows) * shape.rows for number, shape in zip(rows, shapes, strict=True))


def _places(rows: Iterable[int], shapes: Sequence[Shape]) -> int:
    """The tokens for which these groups have room."""
    return sum(number * shape.length for number, shape in zip(_whole_groups(rows, shapes), shapes, strict=True))


def _prices(shapes: Sequence[Shape]) -> list[int]:
    """What a group of each shape costs, in tokens."""
    least = min(shape.rows for shape in shapes)
    return [shape.rows * shape.length + GROUP_COST * least for shape in shapes]


def _cost(rows: Iterable[int], shapes: Sequence[Shape]) -> int:
    """What the groups cost, in tokens, that so many rows of each shape need."""
    groups = (-(-number // shape.rows) for number, shape in zip(rows, shapes, strict=True))
    return sum(number * price for number, price in zip(groups, _prices(shapes), strict=True))


def _fill(units: Units, target: int, shapes: Sequence[Shape], packed: bool) -> list[list[Row]]:
    """Bins of `together` rows, filled to the length `target`, as rows of every shape.

    A unit with a longer sequence has a bin of its own, and every bin shrinks to the least length that holds its rows.
    """
    grid, together = units.grid, units.together
    beside_others = packed & (grid.max(axis=1, initial=0) <= target)
    bins = best_fit(units.only(beside_others), target)
    alone = np.flatnonzero(~beside_others & grid.any(axis=1))
    bins += [[[k] for k in range(unit * together, (unit + 1) * together)] for unit in alone.tolist()]
    by_length: dict[int, list[Row]] = {shape.length: [] for shape in shapes}
    for rows in bins:
        longest = max(map(units.places, rows))
        by_length[min(length for length in by_length if length >= longest)] += rows
    found: list[list[Row]] = []
    for number, shape in enumerate(shapes):
        rows = by_length[shape.length]
        rest = len(rows) % shape.rows
        # What does not fill a group may go into lesser ones.
        lesser = [i for i, other in enumerate(shapes) if other.length == shape.length and other.rows < shape.rows]
        with_rest_in = lambda i, rest=rest: _cost([rest if k == i else 0 for k in range(len(shapes))], shapes)
        kept = len(rows) - rest if lesser and with_rest_in(lesser[0]) < with_rest_in(number) else len(rows)
        found.append(rows[:kept])
        by_length[shape.length] = rows[kept:]
    return found


def _fit_tighter(units: Units, found: list[list[Row]], shapes: Sequence[Shape]) -> list[list[Row]]:
    """The rows of cheaper groups, if some are found that hold everything; otherwise those that there are."""
    tokens, cost = int(units.totals.sum()), _cost(map(len, found), shapes)
    if tokens >= (1 - LITTLE_PADDING) * _places(map(len, found), shapes):
        return found
    likely = _likely_groups(tokens, shapes)
    prices = likely @ _prices(shapes)
    cheapest = np.argsort(prices, kind="stable")[:MOST_TRIES]
    for groups in likely[cheapest[prices[cheapest] < cost]].tolist():
        rows = [number * shape.rows for number, shape in zip(groups, shapes, strict=True)]
        if fitting := _fit_rows(units, rows, shapes):
            return fitting
    return found


def _fit_rows(units: Units, most: Sequence[int], shapes: Sequence[Shape]) -> list[list[Row]] | None:
    """Rows of every shape, so many at most, that hold everything; None if one unit finds no room."""
    bins_of = [rows // units.together for rows in most]
    bins = fit_into(units, [shape.length for shape, number in zip(shapes, bins_of, strict=True) for _ in range(number)])
    if bins is None:
        return None
    parts = (bins[start:end] for start, end in itertools.pairwise(itertools.accumulate(bins_of, initial=0)))
    return [[row for rows in part if any(rows) for row in rows] for part in parts]


def _likely_groups(tokens: int, shapes: Sequence[Shape]) -> np.ndarray:
    """int [sets, shapes]: groups of each shape that could hold so many tokens, as many as it takes of one large shape,
    and few of the others, the fewer the more shapes there are. Sets that leave hardly any padding are not worth a try.
    """
    sizes = np.array([shape.rows * shape.length for shape in shapes])
    few = int(MOST_SETS ** (1 / max(len(shapes) - 1, 1)))
    found = []
    for main in np.flatnonzero(2 * sizes > sizes[0]).tolist():
        most = [MOST_SHORT + 1 if 2 * shape.length <= shapes[0].length else few for shape in shapes]
        most[main] = 1
        groups = np.indices(most).reshape(len(shapes), -1).T
        left = tokens * (1 + TIGHT) - groups @ sizes
        groups[:, main] = np.maximum(np.ceil(left / sizes[main]), 0)
        more = groups.copy()
        more[:, main] += 1
        found += [groups, more]
    return np.unique(np.concatenate(found), axis=0)


def _packing(rows: list[list[Row]], units: Units, width: int, shapes: Sequence[Shape]) -> Packing:
    """The plans of these rows of every shape."""
    plans = (_lay_out(some, units, width, shape.length) for shape, some in zip(shapes, rows, strict=True))
    return Packing(tuple(shapes), tuple(plans))


def _lay_out(rows: list[Row], units: Units, width: int, row_length: int) -> Plan:
    source = np.full((len(rows), row_length), -1, np.int32)
    positions = np.zeros((len(rows), row_length), np.int32)
    segment_ids = np.zeros((len(rows), row_length), np.int32)
    for number, row in enumerate(rows):
        end = 0
        for sequence, start, stop, segment in _segments(row, units):
            places = slice(end, end + stop - start)
            positions[number, places] = np.arange(start, stop)
            source[number, places] = sequence * width + positions[number, places]
            segment_ids[number, places] = segment
            end = places.stop
    return Plan(source, positions, segment_ids)


def _segments(row: Row, units: Units) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, first token, token after the last, segment id) of what follows each other in a row."""
    segment = 0
    for alike, sequences in units.stems(row):
        if alike:
            segment += 1
            yield sequences[0], 0, alike, segment
        for number, sequence in enumerate(sequences, 1):
            segment += not alike
            yield sequence, alike, int(units.lengths[sequence]), branch(segment, number) if alike else segment
