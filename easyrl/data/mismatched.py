"""Every prompt before an answer to another one: what KTO's reference point is estimated on."""

import dataclasses

import numpy as np

from easyrl.data.dataset import Dataset, PackedDatasetConfig
from easyrl.data.loader import Loader
from easyrl.data.sequences import TokenSequence


class Mismatched(Dataset):
    """Sample i is the prompt of row i and the answer of row i + n // 2, modulo the n rows of its file.

    The pairing is that of the data, not of a batch, so that what a reference says of it can be kept on disk. Half a
    file apart, because rows that follow each other often share their prompt: the two sides of a pair, read as labelled
    answers, do. Ethayarajh et al. 2024 (arXiv:2402.01306) pair the rows of a micro-batch; the expectation is the same.

    A prompt that does not fit before the answer, within `seq_length` tokens, loses its start.
    """

    def __init__(self, dataset: Dataset, seq_length: int):
        super().__init__(dataset.stores, dataset.weights)
        if self.per_sample != 1:
            raise ValueError(f"found {self.per_sample} sequences a sample, expected single answers")
        self.seq_length = seq_length
        lengths = []
        for store in self.stores:
            answers = np.roll(store.lengths - store.prompt_lengths, -(len(store) // 2))
            lengths.append(answers + np.minimum(store.prompt_lengths, seq_length - answers))
        self.lengths = np.concatenate(lengths)

    def sequences(self, index: int) -> list[TokenSequence]:
        store, index = self._find(index)
        asked, answered = store.sequence(index), store.sequence((index + len(store) // 2) % len(store))
        answer = slice(answered.prompt_length, None)
        room = self.seq_length - len(answered.tokens[answer])
        prompt = asked.tokens[max(asked.prompt_length - room, 0) : asked.prompt_length]
        return [
            TokenSequence(
                np.concatenate([prompt, answered.tokens[answer]]),
                np.concatenate([np.zeros(len(prompt), bool), answered.is_answer[answer]]),
                len(prompt),
            )
        ]


def mismatched_loader(loader: Loader, config: PackedDatasetConfig, seed: int) -> Loader:
    """Takes (`Loader.take`) the mismatches to the samples of any batch of `loader`, whose flags are `config`."""
    config = dataclasses.replace(config, batch_size=loader.order.most_samples, batch_rows=0, row_length=0)
    dataset = Mismatched(loader.dataset, config.seq_length)
    return Loader(dataset, config, seed, find_shapes=loader.find_shapes, keep_last=True)
