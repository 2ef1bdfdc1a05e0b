"""Batches of prompts for sampling and PPO."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from easyrl.core.errors import UserError
from easyrl.data.dataset import Dataset, DatasetConfig, load_dataset
from easyrl.data.messages import Message, Messages
from easyrl.data.order import SampleOrder, Stream
from easyrl.data.templates import Template
from easyrl.data.tokenizer import pad_id


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one step."""

    samples: np.ndarray  # int64 [B], their numbers in the dataset
    tokens: np.ndarray  # int32 [B, P], right-padded
    lengths: np.ndarray  # int32 [B]
    messages: list[Messages]  # as in the file, before any cut
    texts: list[str]  # rendered with the template, before any cut
    columns: dict[str, list[Any]]  # the rows' other columns; None where a row has not got one


class PromptDataset:
    """Prompts, for random access by step.

    Every process builds the same batch. P is `config.seq_length` for every batch, so that what samples from it compiles
    once.
    """

    def __init__(
        self,
        config: DatasetConfig,
        template: Template,
        seed: int,
        *,
        name: str = "train_dataset",
        keep_last: bool = False,
    ):
        self.dataset: Dataset = load_dataset(config, "prompt", template, name)
        self.template = template
        self.prompt_length = config.seq_length
        stream = Stream(self.dataset.sizes, seed, weights=self.dataset.weights, shuffle=config.shuffle)
        self._order = SampleOrder(stream, config.batch_size, keep_last=keep_last)
        self.steps_per_epoch = self._order.steps_per_epoch
        if self.steps_per_epoch == 0:
            found = f"found {len(self.dataset)} prompts, fewer than --{name}.batch_size={config.batch_size}"
            raise UserError(f"--{name}.path={config.path}: {found}")

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, step: int) -> PromptBatch:
        """The prompts of `step`, counted over all epochs: step i of epoch e is e * steps_per_epoch + i."""
        return self.take(self._order.samples(step))

    def take(self, samples: np.ndarray) -> PromptBatch:
        """The prompts with these numbers."""
        tokens = np.full((len(samples), self.prompt_length), pad_id(self.template.tokenizer), np.int32)
        lengths = np.zeros(len(samples), np.int32)
        messages, columns = [], []
        for row, sample in enumerate(samples):
            (sequence,) = self.dataset.sequences(int(sample))
            lengths[row] = len(sequence.tokens)
            tokens[row, : lengths[row]] = sequence.tokens
            kept = self.dataset.columns(int(sample))
            messages.append(tuple(Message(**message) for message in kept["messages"]))
            columns.append(kept["columns"])
        names = dict.fromkeys(name for one in columns for name in one)
        return PromptBatch(
            samples,
            tokens,
            lengths,
            messages,
            [self.template.render(one, add_generation_prompt=True) for one in messages],
            {name: [one.get(name) for one in columns] for name in names},
        )
