"""Batches of tokenised samples, padded in memory and planned for packing, for random access by step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grain
import numpy as np

from easyrl.core.errors import UserError
from easyrl.data.alike import tokens_alike
from easyrl.data.bins import Units
from easyrl.data.dataset import Dataset, PackedDatasetConfig
from easyrl.data.order import Order, RowOrder, SampleOrder, Stream
from easyrl.data.packing import (
    TRIAL_STEPS,
    Packing,
    Shape,
    choose_shapes,
    group_shapes,
    pack,
    rounded_up,
)
from easyrl.data.report import table

PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
SUMMARY_STEPS = 50  # packed for the padding share that is reported


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
    packing: Packing  # which token goes where in packed rows


class Loader:
    """Batches of a dataset, a pure function of seed and step, the same in every process and on every mesh.

    Args:
      dataset: tokenised samples.
      config: the flags they came from.
      seed: of the shuffles.
      name: the group of those flags, for complaints.
      find_shapes: what of the arguments of `group_shapes` depends on the run is given. They decide how samples are
        packed, never which samples a step sees.
      keep_last: whether the rest of an epoch makes a last batch, filled up; evaluation wants it, training does not.
      stems: whether the model can compute what the sequences of a pair begin with once for both (`core.segments`,
        `models.long_attention.sees_stems`); the flag share_prompts says whether it is to.
      packed: False gives every sequence a row of its own, for comparison.

    Raises UserError when an epoch has no batch, or a packed row cannot hold a sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: PackedDatasetConfig,
        seed: int,
        *,
        name: str = "train_dataset",
        find_shapes: Callable[..., tuple[Shape, ...]] = group_shapes,
        keep_last: bool = False,
        stems: bool = False,
        packed: bool = True,
    ):
        self.dataset = dataset
        self.width = config.seq_length
        self.find_shapes = find_shapes
        self._packed = packed
        self._share = packed and stems and config.share_prompts and dataset.per_sample == 2
        self._lengths = dataset.lengths.reshape(-1, dataset.per_sample)  # of the sequences of each sample
        longest = int(self._lengths.max())
        if config.row_length and config.row_length < longest:
            found = f"expected at least {longest}, the tokens of the longest sequence of --{name}"
            raise UserError(f"--train_dataset.row_length={config.row_length}: {found}")  # of held-out data too
        stream = Stream(dataset.sizes, seed, weights=dataset.weights, shuffle=config.shuffle)
        self.order: Order
        if config.batch_rows:
            totals, length = self._lengths.sum(axis=1), config.row_length or config.seq_length
            self.order = RowOrder(stream, totals, config.batch_rows, length * dataset.per_sample, keep_last=keep_last)
        else:
            self.order = SampleOrder(stream, config.batch_size, keep_last=keep_last)
        if self.order.steps(0) == 0:
            found = f"found {len(dataset)} samples, fewer than --{name}.batch_size={config.batch_size}"
            raise UserError(f"--{name}.path={config.path}: {found}")
        if config.row_length:
            self.shapes = self._shapes(config.row_length)
        else:
            self.shapes = choose_shapes(self._shapes, rounded_up(longest), self._first_batches(TRIAL_STEPS))

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0 over all epochs."""
        return self.take(self.order.samples(step))

    def take(self, samples: np.ndarray) -> Batch:
        """The batch of the samples with these numbers, -1 standing for a filler; at most as many as in any batch."""
        samples = np.concatenate([samples, np.full(self.order.most_samples - len(samples), -1)])
        tokens, mask, lengths, prompt_lengths = self._sequences(samples)
        values = np.where(samples >= 0, self.dataset.values[samples], np.float32(0))
        alike = tokens_alike(tokens, mask, lengths) if self._share else None
        packing = pack(
            lengths, self.width, self.shapes, together=self.dataset.per_sample, alike=alike, packed=self._packed
        )  # fmt: skip
        return Batch(samples, tokens, lengths, prompt_lengths, mask, values, packing)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of steps [start, stop), or without end; the next ones are made ready in the background."""
        steps = grain.MapDataset.range(start, start + 2**40 if stop is None else stop)
        return iter(steps.map(self.batch).to_iter_dataset(PREFETCH))

    def padding_share(self) -> float:
        """The share of places that hold no token, of those that the model passes over in the first steps."""
        packings = [self.batch(step).packing for step in range(min(self.order.steps(0), SUMMARY_STEPS))]
        return 1.0 - sum(one.tokens for one in packings) / sum(one.places for one in packings)

    def summary(self) -> str:
        """A table of the dataset and of how it is batched."""
        shapes = ", ".join(f"{rows} x {length:,}" for rows, length in self.shapes)
        lines = [
            ("steps in an epoch", f"{self.order.steps(0):,}"),
            ("groups of packed rows", f"{shapes} tokens"),
            ("padding", f"{self.padding_share():.1%}"),
        ]
        return f"{self.dataset.summary()}\n{table('batches', lines)}"

    def _shapes(self, longest: int) -> tuple[Shape, ...]:
        together = self.dataset.per_sample
        return self.find_shapes(longest, together=together, sequences=self.order.most_samples * together)

    def _first_batches(self, steps: int) -> list[Units]:
        """What is packed in that many steps."""
        return [self._units(self.order.samples(step)) for step in range(min(self.order.steps(0), steps))]

    def _units(self, samples: np.ndarray) -> Units:
        if not self._share:
            return Units(self._lengths[samples].reshape(-1), self.dataset.per_sample)
        tokens, mask, lengths, _ = self._sequences(samples)
        return Units(lengths, self.dataset.per_sample, tokens_alike(tokens, mask, lengths))

    def _sequences(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, mask, lengths, prompt_lengths) of these samples, as a `Batch` has them."""
        per_sample = self.dataset.per_sample
        tokens = np.zeros((len(samples) * per_sample, self.width), np.int32)
        mask = np.zeros(tokens.shape, bool)
        lengths, prompt_lengths = np.zeros((2, len(tokens)), np.int32)
        for place in np.flatnonzero(samples >= 0).tolist():
            for row, sequence in enumerate(self.dataset.sequences(int(samples[place])), place * per_sample):
                lengths[row] = len(sequence.tokens)
                prompt_lengths[row] = sequence.prompt_length
                tokens[row, : lengths[row]] = sequence.tokens
                mask[row, : lengths[row] - 1] = sequence.is_answer[1:]
        return tokens, mask, lengths, prompt_lengths
