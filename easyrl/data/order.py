"""Which samples a step sees: a pure function of the seed and the step."""

import itertools

import grain
import numpy as np


class SampleOrder:
    """The order in which samples are visited, for random access by step.

    It depends on the sizes of the datasets, the weights, the batch size and the seed, and on nothing else: not on the
    number of processes or devices, nor on the steps asked for before. A run's place in its data is therefore its step.

    Without weights an epoch visits every sample at most once, in an order that is new for every epoch; its steps are
    the whole batches, and also the rest under `keep_last`. With weights, dataset k makes up the share `weights[k]` of
    any longer stretch of samples; each dataset is exhausted before it starts again in a new order; an epoch is as many
    whole batches as the datasets have samples.
    """

    def __init__(
        self,
        sizes: list[int],
        batch_size: int,
        seed: int,
        *,
        weights: list[float] | None = None,
        shuffle: bool = True,
        keep_last: bool = False,
    ):
        starts = np.cumsum([0, *sizes])
        self.batch_size = batch_size
        self.num_samples = int(starts[-1])
        self._mixed = weights is not None
        if weights is None:
            self._order = _order(0, self.num_samples, seed, shuffle)
        else:
            bounds = enumerate(itertools.pairwise(starts.tolist()))
            parts = [_order(start, stop, seed + k, shuffle).repeat() for k, (start, stop) in bounds]
            self._order = grain.MapDataset.mix(parts, weights)
        rest = self.num_samples % batch_size
        self.steps_per_epoch = self.num_samples // batch_size + bool(rest and keep_last and not self._mixed)

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def samples(self, step: int) -> np.ndarray:
        """The samples of `step`, int64 [batch_size], or fewer in the last batch of an epoch that keeps its rest."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        stop = min(start + self.batch_size, self.num_samples)
        # Epochs lie behind each other in grain's index; in a mixture they follow without a gap.
        base = epoch * (self.steps_per_epoch * self.batch_size if self._mixed else self.num_samples)
        return np.asarray([self._order[base + place] for place in range(start, stop)], np.int64)


def _order(start: int, stop: int, seed: int, shuffle: bool) -> grain.MapDataset:
    order = grain.MapDataset.range(start, stop)
    return order.seed(seed % 2**32).shuffle() if shuffle else order
