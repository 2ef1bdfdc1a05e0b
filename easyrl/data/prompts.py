"""Batches of prompts for sampling and PPO."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from easyrl.core.errors import UserError
from easyrl.data.dataset import Dataset, DatasetConfig, load_dataset
from easyrl.data.messages import BadRow, Message, Messages
from easyrl.data.order import SampleOrder, Stream
from easyrl.data.readers import Source
from easyrl.data.sequences import Encoder, Limits
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
    step: int = -1  # whose batch it is; -1: of none


@dataclass(frozen=True)
class PromptRow:
    """A row that asks something."""

    row: dict[str, Any]  # as it is in the file
    messages: Messages  # the conversation to answer
    tokens: np.ndarray  # int32 [length], what of it the model reads
    columns: dict[str, Any]  # the columns that the prompt was not read from
    cut: bool = False  # whether the prompt has lost its beginning


def read_prompts(source: Source, template: Template, max_length: int, flag: str) -> list[PromptRow]:
    """Every row of a file as a prompt of up to `max_length` tokens, in file order.

    Raises UserError naming `flag`, file and row.
    """
    found = []
    try:
        encoder = Encoder("prompt", template, Limits(max_length))
        for row in source.rows():
            try:
                (sample,) = encoder.encode(row)
            except BadRow as error:
                raise error.at(row.where) from None
            kept = json.loads(sample.columns)
            tokens = sample.sequences[0].tokens
            found.append(PromptRow(dict(row.value), _messages(kept), tokens, kept["columns"], sample.prompt_cut))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if not found:
        raise UserError(f"{flag}: found no row, expected prompts")
    return found


def prompt_batch(prompts: Sequence[PromptRow], samples: np.ndarray, template: Template, width: int) -> PromptBatch:
    """Prompts side by side, padded to `width` tokens; `samples` [B] are their numbers."""
    tokens = np.full((len(prompts), width), pad_id(template.tokenizer), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return PromptBatch(
        samples,
        tokens,
        np.array([len(prompt.tokens) for prompt in prompts], np.int32),
        [prompt.messages for prompt in prompts],
        [template.render(prompt.messages, add_generation_prompt=True) for prompt in prompts],
        {name: [prompt.columns.get(name) for prompt in prompts] for name in names},
    )


def _messages(kept: dict[str, Any]) -> Messages:
    """The messages among the columns that a tokenised prompt is kept with."""
    return tuple(Message(**message) for message in kept["messages"])


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
        self.order = SampleOrder(stream, config.batch_size, keep_last=keep_last)
        self.steps_per_epoch = self.order.steps_per_epoch
        if self.steps_per_epoch == 0:
            found = f"found {len(self.dataset)} prompts, fewer than --{name}.batch_size={config.batch_size}"
            raise UserError(f"--{name}.path={config.path}: {found}")

    def __len__(self) -> int:
        return len(self.dataset)

    def columns(self) -> Collection[str]:
        """The names of the other columns, those that any of the rows has."""
        return dict.fromkeys(name for sample in range(len(self)) for name in self.dataset.columns(sample)["columns"])

    def batch(self, step: int) -> PromptBatch:
        """The prompts of `step`, counted over all epochs: step i of epoch e is e * steps_per_epoch + i."""
        return dataclasses.replace(self.take(self.order.samples(step)), step=step)

    def batches(self, start: int, stop: int) -> Iterator[PromptBatch]:
        """The batches of steps [start, stop)."""
        return (self.batch(step) for step in range(start, stop))

    def take(self, samples: np.ndarray) -> PromptBatch:
        """The prompts with these numbers."""
        prompts = []
        for sample in samples:
            (sequence,) = self.dataset.sequences(int(sample))
            kept = self.dataset.columns(int(sample))
            prompts.append(PromptRow({}, _messages(kept), sequence.tokens, kept["columns"]))
        return prompt_batch(prompts, samples, self.template, self.prompt_length)
