"""Which samples a step sees: a pure function of the seed and the step.

It does not depend on the number of processes or devices, nor on the steps asked for before, so a run's place in its
data is the number of its step.
"""

import itertools
from typing import Protocol

import grain
import numpy as np
from tqdm import tqdm

from easyrl.core.distributed import quiet
from easyrl.data.bins import rows_needed

# A batch of packed rows may hold this many times the samples that fill its rows on average. The bound gives batches a
# fixed size in memory; only a stretch of uncommonly short samples meets it.
MOST_SAMPLES = 2.0
MOST_ALIKE = 8  # samples of about one length in a row: up to so many, their number alone tells that a batch is full
PLANNED = 2000  # samples that the plan of an epoch draws at a time
QUIET_SECONDS = 2  # of planning, before its progress is shown


class Order(Protocol):
    """What a loader asks."""

    most_samples: int  # in any batch

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""

    def steps(self, epoch: int) -> int:
        """The number of steps in `epoch`."""

    def samples(self, step: int) -> np.ndarray:
        """The samples of `step`, int64."""


class Stream:
    """Samples in the order in which epochs visit them, for random access.

    Without weights an epoch visits every sample once, shuffled anew for each. With weights, dataset k makes up the
    share `weights[k]` of any longer stretch; each dataset is exhausted before it starts again in a new order, and an
    epoch is as long as all datasets together.

    Args:
      sizes: samples of each dataset; they are numbered through.
      seed: of the shuffles.
    """

    def __init__(self, sizes: list[int], seed: int, *, weights: list[float] | None = None, shuffle: bool = True):
        self.length = sum(sizes)  # of an epoch

        def visit(start: int, stop: int, seed: int) -> grain.MapDataset:
            samples = grain.MapDataset.range(start, stop)
            return samples.seed(seed % 2**32).shuffle() if shuffle else samples

        if weights is None:
            self._order = visit(0, self.length, seed)
        else:
            bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
            parts = [visit(start, stop, seed + part).repeat() for part, (start, stop) in enumerate(bounds)]
            self._order = grain.MapDataset.mix(parts, weights)

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at places [start, stop) of `epoch`, int64."""
        base = epoch * self.length  # grain counts on from one epoch to the next
        return np.asarray([self._order[base + place] for place in range(start, stop)], np.int64)


class SampleOrder:
    """Batches of a fixed number of samples. The rest of an epoch makes a smaller batch, or is left out."""

    def __init__(self, stream: Stream, batch_size: int, *, keep_last: bool = False):
        self.most_samples = batch_size
        self._stream = stream
        self.steps_per_epoch = stream.length // batch_size
        if keep_last and stream.length % batch_size:
            self.steps_per_epoch += 1

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def steps(self, epoch: int) -> int:
        return self.steps_per_epoch

    def samples(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.most_samples
        return self._stream.samples(epoch, start, min(start + self.most_samples, self._stream.length))


class RowOrder:
    """Batches of as many samples, in the stream's order, as fit into a fixed number of packed rows.

    The rest of an epoch makes a smaller batch, or is left out. Epochs may differ in their number of steps: to find a
    step's place, the epochs before it are planned, from lengths alone.

    Args:
      stream: the order of samples.
      totals: int [samples], the tokens of each sample, of all its sequences together.
      rows: packed rows in a batch.
      row_length: tokens in a row.
    """

    def __init__(self, stream: Stream, totals: np.ndarray, rows: int, row_length: int, *, keep_last: bool = False):
        self.most_samples = int(np.ceil(MOST_SAMPLES * rows * row_length / totals.mean()))
        self._stream, self._totals, self._rows, self._row_length = stream, totals, rows, row_length
        self._keep_last = keep_last
        self._planned: dict[int, list[int]] = {}

    def epoch(self, step: int) -> int:
        return self._place(step)[0]

    def steps(self, epoch: int) -> int:
        return len(self._bounds(epoch)) - 1

    def samples(self, step: int) -> np.ndarray:
        epoch, index = self._place(step)
        start, stop = self._bounds(epoch)[index : index + 2]
        return self._stream.samples(epoch, start, stop)

    def _place(self, step: int) -> tuple[int, int]:
        epoch = 0
        while step >= self.steps(epoch):
            step -= self.steps(epoch)
            epoch += 1
        return epoch, step

    def _bounds(self, epoch: int) -> list[int]:
        """Batch i of an epoch has the stream's places [bounds[i], bounds[i + 1])."""
        if epoch not in self._planned:
            self._planned[epoch] = self._plan(epoch)
        return self._planned[epoch]

    def _plan(self, epoch: int) -> list[int]:
        length = self._stream.length
        starts = tqdm(
            range(0, length, PLANNED), f"planning epoch {epoch}", leave=False, delay=QUIET_SECONDS, disable=quiet()
        )
        drawn = [self._stream.samples(epoch, start, min(start + PLANNED, length)) for start in starts]
        totals = self._totals[np.concatenate(drawn)]
        # What no batch can hold more of than so much, summed over the stream: tokens, and samples of more than a k-th
        # of a row, of which a row holds less than k.
        limits = [(np.cumsum(totals), self._rows * self._row_length)]
        for k in range(2, MOST_ALIKE + 2):
            limits.append((np.cumsum(k * totals > self._row_length), (k - 1) * self._rows))
        bounds = [0]
        while (start := bounds[-1]) < length:
            stop = start + self.most_samples
            for sums, most in limits:
                before = sums[start - 1] if start else 0
                stop = min(stop, int(np.searchsorted(sums, before + most, side="right")))
            # One by one: best fit may find room for some number of samples and not for fewer.
            while rows_needed(totals[start:stop], self._row_length) > self._rows:
                stop -= 1
            if stop == length and not self._keep_last and len(bounds) > 1:
                break
            bounds.append(stop)
        return bounds
