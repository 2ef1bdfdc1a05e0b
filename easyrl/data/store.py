"""Tokenised samples on disk: ragged arrays that are memory-mapped, found again by a hash of everything that made them.

A store is a folder of plain files. It is written beside its final name and moved there when whole and on the disk, so a
reader never meets half of one and several processes may build the same one at a time.
"""

import contextlib
import json
import os
import secrets
import shutil
import time
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from easyrl.core.errors import UserError
from easyrl.core.files import sync
from easyrl.data.report import DataReport
from easyrl.data.sequences import Sample, TokenSequence

VERSION = 6  # of the files below and of how rows become tokens: a change of either makes old stores useless
FORGOTTEN = 86_400  # seconds after which what is left of a killed process is removed
TOKENS = ("tokens.bin", np.int32)
MARKS = ("is_answer.bin", np.bool_)
COLUMNS = ("columns.bin", np.uint8)


class Unwritable(UserError):
    """Nothing can be written into the cache."""


class Store:
    """The samples of one dataset, for random access. Nothing is in memory but a few numbers for each sample.

    Sample i holds the sequences [i * per_sample, (i + 1) * per_sample): two for a pair, chosen before rejected.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.report = DataReport.from_dict(meta["report"])
        self.per_sample: int = meta["per_sample"]
        self.checksum: int = meta["checksum"]  # of all tokens, and of which of them are an answer's
        arrays = np.load(folder / "samples.npz")
        self.values: np.ndarray = arrays["values"]  # float32 [samples]: margins or labels
        self.prompt_lengths: np.ndarray = arrays["prompt_lengths"]  # int32 [sequences]
        self._starts: np.ndarray = arrays["starts"]  # int64 [sequences + 1]
        self._column_starts: np.ndarray = arrays["column_starts"]  # int64 [samples + 1]
        self.lengths: np.ndarray = np.diff(self._starts).astype(np.int32)  # int32 [sequences]
        self._tokens = _map(folder, TOKENS, int(self._starts[-1]))
        self._marks = _map(folder, MARKS, int(self._starts[-1]))
        self._columns = _map(folder, COLUMNS, int(self._column_starts[-1]))

    def __len__(self) -> int:
        return len(self.values)

    def sequence(self, index: int) -> TokenSequence:
        """Sequence `index`, counted over the whole store."""
        part = slice(self._starts[index], self._starts[index + 1])
        return TokenSequence(self._tokens[part], self._marks[part], int(self.prompt_lengths[index]))

    def columns(self, index: int) -> dict[str, Any]:
        """The columns kept of sample `index`."""
        part = slice(self._column_starts[index], self._column_starts[index + 1])
        return json.loads(self._columns[part].tobytes())


def _map(folder: Path, what: tuple[str, Any], length: int) -> np.ndarray:
    name, dtype = what
    if length == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(folder / name, dtype, mode="r", shape=(length,))


def open_store(folder: Path) -> Store | None:
    """The store in `folder`, or None when there is none, or only what is left of one."""
    try:
        return Store(folder)
    except Exception:  # a damaged file: each of numpy, zip and JSON has several of its own
        return None


def write_store(folder: Path, samples: Iterable[Sample], report: DataReport, per_sample: int) -> Store:
    """Writes `samples` as the store `folder`, counting them in `report`, and opens it.

    `report` is complete only when `samples` has been used up, and is written last. Raises Unwritable when the folder
    cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_forgotten(folder.parent)
        beside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
        beside.mkdir()  # for others to read as the umask has it, where several people share a cache
    except OSError as error:
        raise Unwritable(f"cache folder {folder.parent}: cannot be written ({error.strerror})") from None
    try:
        _write(beside, samples, report, per_sample)
        return _move(beside, folder)
    except OSError as error:
        raise Unwritable(f"cache folder {folder.parent}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _remove_forgotten(cache: Path) -> None:
    """Removes what killed processes were writing: nothing in it has changed for a day."""
    for path in cache.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process was quicker, or it is somebody else's
            if time.time() - max(part.stat().st_mtime for part in (path, *path.iterdir())) > FORGOTTEN:
                shutil.rmtree(path, ignore_errors=True)


def _move(beside: Path, folder: Path) -> Store:
    for path in (*beside.iterdir(), beside):
        sync(path)
    for _ in range(2):
        try:
            os.rename(beside, folder)
            sync(folder.parent)
        except OSError:
            if (store := open_store(folder)) is not None:  # another process was quicker, with the same contents
                return store
            shutil.rmtree(folder)  # what is left of a store
    return Store(folder)


def _write(folder: Path, samples: Iterable[Sample], report: DataReport, per_sample: int) -> None:
    starts, column_starts = array("q", [0]), array("q", [0])
    prompt_lengths, values = array("i"), array("f")
    checksum = 0
    with (
        open(folder / TOKENS[0], "wb") as tokens,
        open(folder / MARKS[0], "wb") as marks,
        open(folder / COLUMNS[0], "wb") as columns,
    ):
        for sample in samples:
            if not sample.sequences:
                report.left_out[sample.left_out] += 1
                continue
            for sequence in sample.sequences:
                for file, found, (_, dtype) in ((tokens, sequence.tokens, TOKENS), (marks, sequence.is_answer, MARKS)):
                    part = found.astype(dtype).tobytes()
                    file.write(part)
                    checksum = zlib.crc32(part, checksum)
                starts.append(starts[-1] + len(sequence.tokens))
                prompt_lengths.append(sequence.prompt_length)
                report.tokens += len(sequence.tokens)
                report.answer_tokens += int(sequence.is_answer.sum())
                report.longest = max(report.longest, len(sequence.tokens))
            text = sample.columns.encode()
            columns.write(text)
            column_starts.append(column_starts[-1] + len(text))
            values.append(sample.value)
            report.samples += 1
            report.prompts_cut += sample.prompt_cut
            report.answers_cut += sample.answer_cut
            report.rewritten += sample.rewritten
    np.savez(
        folder / "samples.npz",
        starts=np.asarray(starts, np.int64),
        column_starts=np.asarray(column_starts, np.int64),
        prompt_lengths=np.asarray(prompt_lengths, np.int32),
        values=np.asarray(values, np.float32),
    )
    meta = {"per_sample": per_sample, "checksum": checksum, "report": report.to_dict()}
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
