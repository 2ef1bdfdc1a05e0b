"""Batches of tokenised samples, padded in memory and planned for packing, for random access by step."""

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np

from easyrl.core.errors import UserError
from easyrl.data.dataset import Dataset, PackedDatasetConfig
from easyrl.data.order import Order, RowOrder, SampleOrder, Stream
from easyrl.data.packing import Plan, best_fit, most_rows, one_per_row, pack
from easyrl.data.report import table

PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
TRIAL_STEPS = 20  # packed to compare row lengths
SUMMARY_STEPS = 200  # packed for the padding share that is reported
LANES = 128  # row lengths are multiples of it, as matrix units and attention kernels like them


@dataclass(frozen=True)
class Batch:
    """The samples of one step. Sample i has sequence i, or, of a pair, 2i (chosen) and 2i + 1 (rejected): B in all.

    Shapes are the same for every step: a batch that is not full is filled up with sequences of length 0.
    """

    samples: np.ndarray  # int64 [n], their numbers in the dataset, -1 for a filler
    tokens: np.ndarray  # int32 [B, T], right-padded with 0
    lengths: np.ndarray  # int32 [B], tokens of each sequence
    prompt_lengths: np.ndarray  # int32 [B], tokens before the first answer
    mask: np.ndarray  # bool [B, T], True at t where tokens[b, t + 1] is a token that the assistant writes
    values: np.ndarray  # float32 [n], margins or labels
    plan: Plan  # which token goes where in packed rows


class Loader:
    """Batches of a dataset, a pure function of seed and step, the same in every process and on every mesh.

    Args:
      dataset: tokenised samples.
      config: the flags they came from.
      seed: of the shuffles.
      name: the group of those flags, for complaints.
      rows_multiple: packed rows that one pass over the model takes. It decides at most how samples are packed, never
        which samples a step sees.
      keep_last: whether the rest of an epoch makes a last batch, filled up; evaluation wants it, training does not.
      packed: False gives every sample a row of its own, for comparison.

    Raises UserError when an epoch has no batch, or a packed row cannot hold a sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: PackedDatasetConfig,
        seed: int,
        *,
        name: str = "train_dataset",
        rows_multiple: int = 1,
        keep_last: bool = False,
        packed: bool = True,
    ):
        self.dataset = dataset
        self.width = config.seq_length
        self.row_length = config.row_length or config.seq_length * dataset.per_sample
        self.rows_multiple = rows_multiple
        self._packed = packed
        self._totals = dataset.lengths.reshape(-1, dataset.per_sample).sum(axis=1)  # tokens of each sample
        self._longest = int(self._totals.max())
        if self.row_length < self._longest:
            found = f"expected at least {self._longest}, the tokens of the longest sample"
            raise UserError(f"--{name}.row_length={config.row_length}: {found}")
        stream = Stream(dataset.sizes, seed, weights=dataset.weights, shuffle=config.shuffle)
        self.order: Order
        if config.batch_rows:
            self.order = RowOrder(stream, self._totals, config.batch_rows, self.row_length, keep_last=keep_last)
        else:
            self.order = SampleOrder(stream, config.batch_size, keep_last=keep_last)
        if self.order.steps(0) == 0:
            found = f"found {len(dataset)} samples, fewer than --{name}.batch_size={config.batch_size}"
            raise UserError(f"--{name}.path={config.path}: {found}")
        if not (config.row_length or config.batch_rows):
            shortest = -(-self._longest // LANES) * LANES
            self.row_length = min(shortest, 2 * shortest, key=lambda length: self._padding(length, TRIAL_STEPS))

    @property
    def most_rows(self) -> int:
        """The most packed rows that any batch takes."""
        return (
            most_rows(self.order.most_samples, self._longest, self.row_length)
            if self._packed
            else self.order.most_samples
        )

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0 over all epochs."""
        return self.take(self.order.samples(step))

    def take(self, samples: np.ndarray) -> Batch:
        """The batch of the samples with these numbers, -1 standing for a filler; at most as many as in any batch."""
        size, per_sample = self.order.most_samples, self.dataset.per_sample
        samples = np.concatenate([samples, np.full(size - len(samples), -1)])
        tokens = np.zeros((size * per_sample, self.width), np.int32)
        mask = np.zeros(tokens.shape, bool)
        lengths, prompt_lengths = np.zeros((2, len(tokens)), np.int32)
        values = np.where(samples >= 0, self.dataset.values[samples], np.float32(0))
        for place in np.flatnonzero(samples >= 0).tolist():
            for row, sequence in enumerate(self.dataset.sequences(int(samples[place])), place * per_sample):
                lengths[row] = len(sequence.tokens)
                prompt_lengths[row] = sequence.prompt_length
                tokens[row, : lengths[row]] = sequence.tokens
                mask[row, : lengths[row] - 1] = sequence.is_answer[1:]
        return Batch(samples, tokens, lengths, prompt_lengths, mask, values, self._plan(lengths))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of steps [start, stop), or without end; the next ones are made ready in the background."""
        steps = grain.MapDataset.range(start, start + 2**40 if stop is None else stop)
        return iter(steps.map(self.batch).to_iter_dataset(PREFETCH))

    def padding_share(self) -> float:
        """The share of places that hold no token, of those that the model passes over in the first steps.

        A pass takes `rows_multiple` packed rows, so the last ones of a batch may be empty.
        """
        return self._padding(self.row_length, SUMMARY_STEPS)

    def summary(self) -> str:
        """A table of the dataset and of how it is batched."""
        lines = [
            ("steps in an epoch", f"{self.order.steps(0):,}"),
            ("packed rows", f"{self.row_length:,} tokens each, {self.rows_multiple} at a time"),
            ("padding", f"{self.padding_share():.1%}"),
        ]
        return f"{self.dataset.summary()}\n{table('batches', lines)}"

    def _padding(self, row_length: int, steps: int) -> float:
        tokens = places = 0
        for step in range(min(self.order.steps(0), steps)):
            totals = self._totals[self.order.samples(step)]
            rows = len(best_fit(totals, row_length)) if self._packed else len(totals)
            tokens += int(totals.sum())
            places += -(-rows // self.rows_multiple) * self.rows_multiple * row_length
        return 1.0 - tokens / places

    def _plan(self, lengths: np.ndarray) -> Plan:
        together = self.dataset.per_sample
        if self._packed:
            return pack(lengths, self.width, self.row_length, together=together)
        return one_per_row(lengths, self.width, self.row_length, together=together)
