"""A dataset as flags describe it, tokenised and ready for random access."""

import dataclasses
import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from easyrl.core.config import flag
from easyrl.core.distributed import check_same, quiet
from easyrl.core.errors import UserError
from easyrl.core.files import cache_folder
from easyrl.data.choice import parse_mixture, parse_split
from easyrl.data.formats import EXPECTED
from easyrl.data.messages import BadRow
from easyrl.data.readers import OnBad, Row, Source, open_source, refuse
from easyrl.data.report import DataReport, table
from easyrl.data.sequences import Encoder, Limits, Sample, TokenSequence
from easyrl.data.store import VERSION, Store, Unwritable, open_store, write_store
from easyrl.data.templates import Template
from easyrl.data.tokenizer import fingerprint
from easyrl.data.workers import encode_rows

BATCH_SIZE = "Samples in one batch, over all devices. A pair is one sample."
HELD_OUT = "--eval_dataset"  # the group of flags of held-out data
WORTH_A_PROCESS = 16_000_000  # bytes of text: with less, starting the process takes longer than it saves

C = TypeVar("C", bound="DatasetConfig")


@dataclass(frozen=True)
class DatasetConfig:
    """Where rows come from, and how they are cut and batched. Enough for prompts."""

    path: str = flag(
        "",
        "File (.jsonl, .jsonl.gz, .json, .parquet), folder or hub id (owner/name or owner/name/config) of the data. "
        "Several with commas: A,B uses all rows of both; A:0.7,B:0.3 draws from them with these weights.",
    )
    split: str = flag(
        "", "Part of the data: a split's name, a slice of rows, or both, as in train, [2048:] or test[:100]."
    )
    seq_length: int = flag(
        1024, "Tokens that a sequence may have: a prompt with its answer, or a prompt alone for PPO.", least=1
    )
    batch_size: int = flag(32, BATCH_SIZE, least=1)
    shuffle: bool = flag(True, "Visit the rows in a new random order in every epoch.")
    remove_truncated_samples: bool = flag(
        False, "Leave out samples that would have to be cut, instead of cutting them."
    )
    skip_bad_rows: bool = flag(False, "Leave out and count rows that cannot be used, instead of stopping at the first.")
    num_workers: int = flag(
        0, "Processes that tokenise; 0: one for each core as far as there is enough to do.", least=0, may_change=True
    )
    cache_dir: str = flag(
        "", "Folder for tokenised data; empty: $EASYRL_CACHE, or else ~/.cache/easyrl.", may_change=True
    )

    @property
    def limits(self) -> Limits:
        """The lengths that samples are cut to."""
        return Limits(self.seq_length, remove_truncated=self.remove_truncated_samples)


@dataclass(frozen=True)
class PackedDatasetConfig(DatasetConfig):
    """The same for answered prompts, which are packed."""

    batch_size: int = flag(64, BATCH_SIZE, least=1)  # fills rows better than 32 does
    max_prompt_length: int = flag(
        0,
        "Tokens that the prompt of a sample may have; 0: as many as the answer leaves, at least half of seq_length.",
        least=0,
    )
    row_length: int = flag(
        0,
        "Tokens in the longest packed rows, from 128 on rounded up to a multiple of it. 0: as many as the longest "
        "sequence has, or as the longest pair, or twice the former, where that leaves less padding.",
        least=0,
    )
    batch_rows: int = flag(
        0,
        "Packed rows in one batch, which takes as many samples as fit in; 0: batch_size samples in any number of rows.",
        least=0,
    )
    share_prompts: bool = flag(
        True,
        "Compute the prompt of a pair once for both its answers, where they fit in one row. The splash kernel cannot.",
        may_change=True,
    )

    @property
    def limits(self) -> Limits:
        return Limits(self.seq_length, self.max_prompt_length, self.remove_truncated_samples)


@dataclass(frozen=True)
class HeldOutConfig:
    """Data to evaluate on."""

    path: str = flag("", "File, folder or hub id of the data. Empty: no evaluation.")
    split: str = flag("", "Part of the data, as in --train_dataset.split.")
    skip_bad_rows: bool = flag(False, "Leave out and count rows that cannot be used, instead of stopping at the first.")

    def __post_init__(self) -> None:
        try:
            parts = parse_mixture(self.path) if self.path else []
        except UserError as error:
            raise UserError(f"{HELD_OUT}.path: {error}") from None
        if any(weight is not None for _, weight in parts):
            expected = "expected none: every held-out row counts once"
            raise UserError(f"{HELD_OUT}.path={self.path}: found weights, {expected}")

    def check(self) -> None:
        """Raises UserError for flags that say something about no data. Not earlier than here, since the quickstart has
        data without a path on the command line.
        """
        for name in ("split", "skip_bad_rows"):
            if getattr(self, name) and not self.path:
                raise UserError(f"{HELD_OUT}.{name}={getattr(self, name)}: needs {HELD_OUT}.path, which is not given")

    def like(self, training: C) -> C:
        """These data cut and batched as the training data are, in the order of the file."""
        return dataclasses.replace(training, **vars(self), shuffle=False)


class Dataset:
    """The samples of one or several stores as one list, for random access."""

    def __init__(self, stores: list[Store], weights: list[float] | None):
        self.stores = stores
        self.weights = weights  # None: every sample once an epoch
        self.per_sample = stores[0].per_sample
        self.sizes = [len(store) for store in stores]
        self._ends = np.cumsum(self.sizes)
        self.lengths: np.ndarray = np.concatenate([store.lengths for store in stores])  # int32 [sequences]
        self.values: np.ndarray = np.concatenate([store.values for store in stores])  # float32 [samples]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sequences(self, index: int) -> list[TokenSequence]:
        """The sequences of sample `index`: one, or chosen and rejected."""
        store, index = self._find(index)
        return [store.sequence(index * self.per_sample + side) for side in range(self.per_sample)]

    def columns(self, index: int) -> dict[str, Any]:
        """The columns of its row that sample `index` was not made from; of a prompt, {messages, columns}."""
        store, index = self._find(index)
        return store.columns(index)

    def _find(self, index: int) -> tuple[Store, int]:
        which = bisect_right(self._ends, index)
        return self.stores[which], index - int(self._ends[which]) + self.sizes[which]

    @property
    def fingerprint(self) -> str:
        """A name that other data, or the same cut or tokenised otherwise, would not have."""
        return hashlib.sha256(repr([store.folder.name for store in self.stores]).encode()).hexdigest()

    def summary(self) -> str:
        """A table of what became of the rows of each dataset."""
        return "\n".join(table(store.report.name, store.report.lines()) for store in self.stores)


def load_dataset(config: DatasetConfig, kind: str, template: Template, name: str = "train_dataset") -> Dataset:
    """Reads, tokenises and caches the data that `config` names; a second call finds it in the cache.

    Args:
      config: what the flags say; `name` is the group of flags they belong to, for complaints.
      kind: sft, pair, labelled or prompt (see `easyrl.data.formats`).
      template: the chat format, with its tokenizer.

    Raises UserError, one line that names flag, file and row, for anything that cannot be used.
    """
    if not config.path:
        raise UserError(f"--{name}.path: found nothing, expected a file, a folder or a hub id")
    try:
        encoder = Encoder(kind, template, config.limits)
        split = parse_split(config.split)
    except UserError as error:
        raise UserError(f"--{name}.{error}") from None
    cache = cache_folder(config.cache_dir, f"{name}.cache_dir")
    try:
        parts = parse_mixture(config.path)
        stores = [_load(open_source(path, split), encoder, config, cache) for path, _ in parts]
    except Unwritable as error:
        raise UserError(f"--{name}.cache_dir={config.cache_dir}: {error}") from None
    except UserError as error:
        raise UserError(f"--{name}.path: {error}") from None
    weights = [weight for _, weight in parts if weight is not None]
    dataset = Dataset(stores, weights or None)
    found = [store.checksum for store in stores]
    check_same(f"--{name}.path={config.path}", f"{dataset.sizes} {zlib.crc32(dataset.lengths.tobytes())} {found}")
    return dataset


def _load(source: Source, encoder: Encoder, config: DatasetConfig, cache: Path) -> Store:
    per_sample = 2 if encoder.kind == "pair" else 1
    key = (
        VERSION,
        source.fingerprint,
        encoder.kind,
        encoder.limits,
        encoder.template.jinja,
        fingerprint(encoder.template.tokenizer),
        config.skip_bad_rows,
    )
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    folder = cache / "data" / f"{encoder.kind}-{digest[:32]}"
    store = open_store(folder)
    if store is None:
        report = DataReport(source.path)
        on_bad: OnBad = report.skip if config.skip_bad_rows else refuse
        store = write_store(folder, _samples(source, encoder, report, on_bad, config.num_workers), report, per_sample)
    store.report.name = source.path
    if not len(store):
        raise UserError(
            f"{source.path}: found no row to use ({_what_happened(store.report)}), expected {EXPECTED[encoder.kind]}"
        )
    return store


def _samples(source: Source, encoder: Encoder, report: DataReport, on_bad: OnBad, processes: int) -> Iterator[Sample]:
    def on_broken(error: BadRow) -> None:
        report.rows += 1
        on_bad(error)

    def counted() -> Iterator[Row]:
        for row in source.rows(on_broken):
            report.rows += 1
            yield row

    rows = tqdm(counted(), f"tokenising {Path(source.path).name}", unit=" rows", disable=quiet())
    if not rows.disable:
        rows.total = source.num_rows()
    yield from encode_rows(rows, encoder, on_bad, processes or _worth(source.num_bytes))


def _worth(num_bytes: int) -> int:
    """The processes that tokenising so much text is worth, at most one for each core that this one may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // WORTH_A_PROCESS))


def _what_happened(report: DataReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in (report.skipped + report.left_out).items())
    return f"{report.rows} rows read" + (f", left out: {reasons}" if reasons else "")
