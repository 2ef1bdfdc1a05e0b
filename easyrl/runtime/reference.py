"""What a frozen reference says of every answer: computed once and kept on disk, or asked for batch by batch.

The log-prob of an answer under a model that does not change is one number. Computing the numbers of a whole data set
before training costs one forward pass over it, and the reference need not be in memory while the policy trains; kept on
disk, they serve every later run on the same data, with any loss, learning rate, batch size or mesh.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from easyrl.core.distributed import broadcast, from_first, is_first
from easyrl.core.errors import UserError
from easyrl.core.files import write_atomic
from easyrl.core.fingerprint import fingerprint_params
from easyrl.core.groups import Plans
from easyrl.core.sharding import fetch
from easyrl.data.dataset import Dataset
from easyrl.data.loader import Batch, Loader
from easyrl.models.families import ModelConfig
from easyrl.runtime.progress import SECONDS_BETWEEN_LINES
from easyrl.steps.dpo import AnswerBatch, make_answer_logprobs, place_answers

Array = jax.Array
Logprobs = Callable[[Array, Array, Plans], Array]  # (tokens, mask, plan) -> float32 [B]

VERSION = 2  # of the files, of what a log-prob means and of mismatches: a change of any makes earlier files useless
PART = 1024  # samples in a file, about: what a kill may cost


class ReferenceModel(NamedTuple):
    """A frozen model that says how likely answers are."""

    cfg: ModelConfig
    logprobs: Logprobs
    weights: str  # their fingerprint


def make_reference(cfg: ModelConfig, params: dict, mesh: Mesh) -> ReferenceModel:
    """The model with these parameters as a reference; it holds on to them."""
    return ReferenceModel(cfg, partial(make_answer_logprobs(cfg, mesh), params), fingerprint_params(params))


class Answers:
    """The batches of a loader on the devices, each answer with its log-prob under the reference.

    Args:
      table: float32 [samples, per_sample], the log-probs of the whole data set.
      live: asked for every batch. With neither of the two the log-probs are 0, for losses that read none.
    """

    def __init__(self, loader: Loader, mesh: Mesh, *, table: np.ndarray | None = None, live: Logprobs | None = None):
        self.loader = loader
        self._mesh, self._table, self._live = mesh, table, live

    def __call__(self, batch: Batch) -> AnswerBatch:
        ref_logprobs = np.zeros(len(batch.tokens), np.float32)
        if self._table is not None:
            ref_logprobs = np.where(batch.samples[:, None] >= 0, self._table[batch.samples], 0.0).reshape(-1)
        placed = place_answers(
            batch.tokens, batch.mask, ref_logprobs, batch.packing, self._mesh,
            paired=self.loader.dataset.per_sample == 2,
        )  # fmt: skip
        if self._live is None:
            return placed
        return placed.replace(ref_logprobs=self._live(placed.tokens, placed.mask, placed.plans))


def answers_of(loader: Loader, mesh: Mesh, reference: ReferenceModel | None, *, beforehand: bool, name: str) -> Answers:
    """The loader's batches with the log-probs of `reference`, asked about all data `beforehand` or batch by batch.

    None: there is no reference. `name` is shown with the progress bar. A reference asked beforehand is not held on to.
    """
    unasked = Answers(loader, mesh)
    if reference is None:
        return unasked
    if not beforehand:
        return Answers(loader, mesh, live=reference.logprobs)
    table = precompute(unasked, reference.logprobs, cache_folder(loader.dataset, reference), name)
    return Answers(loader, mesh, table=table)


def cache_folder(dataset: Dataset, reference: ReferenceModel) -> Path:
    """Where the log-probs of `dataset` under `reference` are kept, beside the tokenised data.

    The name is a hash of the model's weights and of how it computes with them, and of the names of the stores, which
    are themselves hashes of the rows, the tokenizer, the template and the lengths.
    """
    how = dataclasses.replace(reference.cfg, remat="none")  # of no matter to a forward pass
    stores = [store.folder.name for store in dataset.stores]
    key = (VERSION, reference.weights, how, type(dataset).__name__, stores)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return dataset.stores[0].folder.parents[1] / "reference" / digest[:32]


def precompute(answers: Answers, logprobs: Logprobs, folder: Path, name: str) -> np.ndarray:
    """float32 [samples, per_sample]: the log-prob of every answer of the loader's data set.

    What earlier calls left in `folder` is read and the rest computed, in the order of the data, with a progress bar
    that shows `name`. Every part is a file, written whole or not at all, so a killed call loses one part at most. Every
    process calls this; process 0 reads and writes. Raises UserError when the folder cannot be written.
    """
    loader = answers.loader
    total, size = len(loader.dataset), loader.order.most_samples
    table = np.zeros((total, loader.dataset.per_sample), np.float32)
    done = _read_parts(folder, table) if is_first() else 0
    done, table = broadcast((np.int64(done), table))
    part = size * max(1, PART // size)
    with tqdm(
        total=total,
        initial=int(done),
        desc=f"reference log-probs of {name}",
        disable=done == total or not is_first(),
        mininterval=0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES,
    ) as bar:
        for first in range(int(done), total, part):
            last = min(first + part, total)
            for start in range(first, last, size):
                stop = min(start + size, last)
                batch = answers(loader.take(np.arange(start, stop)))
                found = fetch(logprobs(batch.tokens, batch.mask, batch.plans))
                table[start:stop] = found.reshape(size, -1)[: stop - start]
                bar.update(stop - start)
            from_first(partial(_write_part, folder, first, table[first:last]))
    return table


def _read_parts(folder: Path, table: np.ndarray) -> int:
    """Fills `table` from its start with the parts that follow each other without a gap; returns how far they reach."""
    done = 0
    while done < len(table):
        try:
            part = np.load(_part_path(folder, done))
        except (OSError, ValueError, EOFError):  # not there, or damaged: from here on everything is computed again
            break
        if part.shape[1:] != table.shape[1:] or not 0 < len(part) <= len(table) - done:
            break
        table[done : done + len(part)] = part
        done += len(part)
    return done


def _write_part(folder: Path, first: int, part: np.ndarray) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomic(_part_path(folder, first)) as path, path.open("wb") as file:
            np.save(file, part)
    except OSError as error:
        raise UserError(f"cache folder {folder}: cannot be written ({error.strerror})") from None


def _part_path(folder: Path, first: int) -> Path:
    """The file of the part that begins with sample `first`."""
    return folder / f"{first:09d}.npy"
