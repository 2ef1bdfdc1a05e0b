"""Every prompt before an answer to another one: what KTO's reference point is estimated on."""

import dataclasses
import hashlib

import numpy as np

from easyrl.core.distributed import say
from easyrl.data.dataset import Dataset, PackedDatasetConfig
from easyrl.data.loader import Loader
from easyrl.data.sequences import TokenSequence
from easyrl.data.store import Store

MOST_TRIED = 1000  # distances


class Mismatched(Dataset):
    """Sample i is the prompt of row i and the answer of row i + distance, modulo the n rows of its file.

    The pairing is that of the data, not of a batch, so that what a reference says of it can be kept on disk. The
    distance is the first from n // 2 on at which no two prompts are equal, or the fewest: rows that follow each other
    often share their prompt (the two sides of a pair, read as labelled answers, do), and so do the halves of a file
    that has all good answers before all bad ones. Says for how many rows it found no other prompt. Ethayarajh et al.
    2024 (arXiv:2402.01306) pair the rows of a micro-batch; the expectation is the same.

    A prompt that does not fit before the answer, within `seq_length` tokens, loses its start.
    """

    def __init__(self, dataset: Dataset, seq_length: int):
        super().__init__(dataset.stores, dataset.weights)
        if self.per_sample != 1:
            raise ValueError(f"found {self.per_sample} sequences a sample, expected single answers")
        self.seq_length = seq_length
        self._distances: dict[Store, int] = {}
        lengths = []
        for store in self.stores:
            distance, equal = find_distance(prompt_ids(store, seq_length))
            if equal:
                say(
                    f"note: {store.report.name}: {equal:,} of {len(store):,} rows have no answer to another prompt: "
                    "KTO's z0 takes theirs to the same one"
                )
            self._distances[store] = distance
            answers = np.roll(store.lengths - store.prompt_lengths, -distance)
            lengths.append(answers + np.minimum(store.prompt_lengths, seq_length - answers))
        self.lengths = np.concatenate(lengths)

    def sequences(self, index: int) -> list[TokenSequence]:
        store, index = self._find(index)
        asked, answered = store.sequence(index), store.sequence((index + self._distances[store]) % len(store))
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


def prompt_ids(store: Store, seq_length: int) -> np.ndarray:
    """uint64 [n]: a number for the prompt of every row, the same for equal prompts.

    Only the end counts, as much as every prompt keeps that is cut for its answer: of equal prompts before answers of
    different lengths, different beginnings are cut.
    """
    end = seq_length // 2 - 1  # the first token kept may be the beginning-of-text token, set before the cut
    hashes = []
    for index in range(len(store)):
        tokens, _, length = store.sequence(index)
        hashes.append(hashlib.blake2b(tokens[:length][-end:].tobytes(), digest_size=8).digest())
    return np.frombuffer(b"".join(hashes), np.uint64)


def find_distance(prompts: np.ndarray) -> tuple[int, int]:
    """(how far apart rows are paired, how many of the pairs have equal prompts) for the prompts [n] of a file's rows.

    The first distance from n // 2 on with the fewest equal prompts, of `MOST_TRIED` at most. A shorter distance d pairs
    the same prompts as n - d.
    """
    n = len(prompts)
    best, fewest = n // 2, n
    for distance in range(n // 2, n)[:MOST_TRIED]:
        equal = int(np.count_nonzero(prompts == np.roll(prompts, -distance)))
        if equal < fewest:
            best, fewest = distance, equal
        if not fewest:
            break
    return best, fewest


def mismatched_loader(loader: Loader, config: PackedDatasetConfig, seed: int) -> Loader:
    """Takes (`Loader.take`) the mismatches to the samples of any batch of `loader`, whose flags are `config`."""
    config = dataclasses.replace(config, batch_size=loader.order.most_samples, batch_rows=0, row_length=0)
    dataset = Mismatched(loader.dataset, config.seq_length)
    return Loader(dataset, config, seed, find_shapes=loader.find_shapes, keep_last=True)
