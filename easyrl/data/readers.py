"""Reads rows from files, folders and the Hugging Face hub, one at a time, each with the place it came from.

A path is a file (.jsonl, .jsonl.gz, .json, .parquet), a folder that `datasets.save_to_disk` wrote, a folder of such
files, or a hub id (`owner/name`, `owner/name/config`). Whatever is wrong with a file or one of its rows is one
UserError that names both. Only a .json list is held in memory as a whole.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from easyrl.core.errors import UserError
from easyrl.core.text import is_hub_id
from easyrl.data.choice import WHOLE, Split
from easyrl.data.messages import BadRow, show

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of a dataset, beside its files
BEHIND_SPLIT = re.compile(r"-\d+-of-\d+|\.(?:jsonl?|parquet)")  # what follows a split's name in that of its file
PARQUET_ROWS = 256  # rows decoded at a time
UNREADABLE = (ValueError, OverflowError)  # what a value raises that Python cannot hold, and text that is no UTF-8
ZIPPED = 3  # bytes of text in a byte of a compressed file, roughly


class Row(NamedTuple):
    """A row and its place: `train.jsonl line 7`, or `train.parquet row 7` where there are no lines; from 1."""

    where: str
    value: Any


OnBad = Callable[[BadRow], None]


def refuse(error: BadRow) -> None:
    """What to do with a bad row by default: stop."""
    raise error


@dataclass(frozen=True)
class Source:
    """One dataset, opened: where it is, what it holds, and a fingerprint of its contents."""

    path: str
    split: Split
    fingerprint: str  # changes whenever a byte of the data or the choice of rows does
    num_bytes: int  # of text, roughly
    _read: Callable[[], Iterator[Row | BadRow]]
    _count: Callable[[int | None], int | None]  # of the first so many rows, all for None

    def num_rows(self) -> int | None:
        """The number of rows, if there is a quick way to tell. Reads lines, but none behind the slice."""
        total = self._count(self.split.stop)
        return None if total is None else max(0, total - self.split.start)

    def rows(self, on_bad: OnBad = refuse) -> Iterator[Row]:
        """The rows of the split in file order. A row that cannot be decoded goes to `on_bad`, which may raise it.

        It takes its place in a slice all the same, and outside of one nothing is said of it.

        Raises UserError for what is wrong with a whole file: cut short, not of the kind its name says.
        """
        for row in islice(self._read(), self.split.start, self.split.stop):
            if isinstance(row, BadRow):
                on_bad(row)
            else:
                yield row


def open_source(path: str, part: Split = WHOLE) -> Source:
    """Opens one path of a mixture. Raises UserError when there is nothing to read there."""
    local = Path(path).expanduser()
    if os.path.isfile(local):
        if part.name:
            raise UserError(
                f"{path}: no split {part.name!r}, a file has none; expected a slice of its rows, as in [:100]"
            )
        return _open_files(path, [local], part)
    if os.path.isdir(local):
        if any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            return _open_saved(path, local, part)
        return _open_files(path, _files_in(path, local, part.name), part)
    repo, config = _hub_names(path)
    if path.endswith(SUFFIXES) or not is_hub_id(repo) or not (config is None or is_hub_id(config)):
        raise UserError(f"{path}: no such file or folder")
    return _open_hub(path, part)


def _hub_names(path: str) -> tuple[str, str | None]:
    """`owner/name/config` as the id of a dataset and the name of its configuration, if one is given."""
    repo, _, config = path.rpartition("/") if path.count("/") == 2 else (path, "", None)
    return repo, config


def _files_in(path: str, folder: Path, name: str) -> list[Path]:
    """The data files of a folder that belong to the split `name`, in the order of their names; without one, all.

    A split's files are called by its name, or lie in a folder that is. Where none does, they are those that have it as
    a word in their path.
    """
    files = sorted(
        entry
        for entry in folder.rglob("*")
        if entry.name.endswith(SUFFIXES) and entry.name not in DESCRIPTIONS and entry.is_file()
        if not any(part.startswith(".") for part in entry.relative_to(folder).parts)  # editors keep copies there
    )
    if not files:
        raise UserError(f"{path}: found no data file in this folder, expected one of {', '.join(SUFFIXES)}")
    if not name:
        return files
    places = [(file, file.relative_to(folder)) for file in files]
    chosen = [file for file, place in places if name in (*place.parts[:-1], BEHIND_SPLIT.split(place.name)[0])]
    chosen = chosen or [file for file, place in places if name in re.split(r"[^A-Za-z0-9]+", str(place))]
    if not chosen:
        found = ", ".join(file.name for file in files[:6])
        raise UserError(f"{path}: no file belongs to split {name!r}, found {found}")
    return chosen


def _open_files(path: str, files: list[Path], part: Split) -> Source:
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: found a file of unknown kind, expected one of {', '.join(SUFFIXES)}")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")

    def read() -> Iterator[Row | BadRow]:
        for file in files:
            yield from _read_parquet(file) if file.name.endswith(".parquet") else _read_json(file)

    num_bytes = sum(file.stat().st_size * (1 if file.name.endswith((".json", ".jsonl")) else ZIPPED) for file in files)
    return Source(path, part, _fingerprint(files, part), num_bytes, read, lambda most: _count(files, most))


def _fingerprint(files: list[Path], part: Split) -> str:
    """A hash of the files' names and bytes and of the choice of rows."""
    digest = hashlib.sha256(repr((part, [file.name for file in files])).encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise _unreadable(file, error) from None
    return digest.hexdigest()


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: the file cannot be read ({error.strerror})")


def _count(files: list[Path], most: int | None) -> int | None:
    """The lines of JSON lines, up to `most`. Rows of other files are not worth a pass of their own."""
    if not all(file.name.endswith((".jsonl", ".jsonl.gz")) for file in files):
        return None
    try:
        return sum(1 for _ in islice((1 for file in files for _, line in _lines(file) if line.strip()), most))
    except UserError:  # said again when the rows are read
        return None


def _read_json(file: Path) -> Iterator[Row | BadRow]:
    """Rows of JSON lines, or of one JSON list when the name says .json and the text starts with a bracket."""
    lines = _lines(file)
    if file.name.endswith((".json", ".json.gz")):
        first = next(((number, line) for number, line in lines if line.strip()), None)
        if first is not None and first[1].lstrip().startswith(b"["):
            yield from _read_list(file, b"\n" * (first[0] - 1) + first[1] + b"".join(line for _, line in lines))
            return
        lines = _lines(file)
    for number, line in lines:
        where = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            row = _loads(line.rstrip(b"\r\n"))
        except BadRow as error:
            yield error.at(where)
        else:
            yield Row(where, row)


def _read_list(file: Path, text: bytes) -> Iterator[Row]:
    try:
        rows = _loads(text)
    except BadRow as error:
        raise UserError(f"{file}: {error}") from None
    for number, row in enumerate(rows, 1):
        yield Row(f"{file} row {number}", row)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, with the faults of a whole file told apart."""
    number = 0
    try:
        with file.open("rb") as raw:
            _check_kind(file, raw.read(4))
            raw.seek(0)
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except EOFError:
        raise UserError(f"{file}: the gzip file is cut short after line {number}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is damaged after line {number} ({error})") from None
    except OSError as error:
        raise _unreadable(file, error) from None
    if number == 0:
        raise UserError(f"{file}: the file is empty")


def _check_kind(file: Path, start: bytes) -> None:
    zipped = file.name.endswith(".gz")
    if zipped != start.startswith(b"\x1f\x8b"):
        found, wanted = ("plain data", "gzip") if zipped else ("gzip data", "plain text (or a name ending in .gz)")
        raise UserError(f"{file}: found {found}, expected {wanted}")
    if start.startswith(b"PAR1"):
        raise UserError(f"{file}: found parquet data, expected JSON (or a name ending in .parquet)")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: found UTF-16 text, expected UTF-8")


def _loads(text: bytes) -> Any:
    try:
        row = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
        if b"\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError:
        raise BadRow("found half of a surrogate pair, expected whole characters", "wrong encoding") from None
    except UnicodeDecodeError as error:
        found = f"byte 0x{text[error.start]:02x} at column {error.start + 1}"
        raise BadRow(f"found {found}, expected UTF-8 text", "wrong encoding") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise BadRow(f"broken JSON at {line}column {error.colno} ({error.msg})", "broken JSON") from None
    except RecursionError:
        raise BadRow("broken JSON (nested too deeply)", "broken JSON") from None
    except ValueError:  # what else Python refuses to read
        raise BadRow("broken JSON (a number of too many digits)", "broken JSON") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise BadRow(f"column {show(twice)} is given twice, expected once", "contradicting columns")
    return row


def _read_parquet(file: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for row in _rows_of(batch):
                    number += 1
                    where = f"{file} row {number}"
                    yield row.at(where) if isinstance(row, BadRow) else Row(where, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a whole parquet file ({_first_line(error)})") from None
    if number == 0:
        raise UserError(f"{file}: the file has no row")


def _rows_of(batch: Any) -> list[Any]:
    """The rows of a batch of pyarrow's. One with a value that Python cannot hold, or text that is none, is a BadRow."""
    with contextlib.suppress(*UNREADABLE):
        return batch.to_pylist()
    return [_row_of(batch.slice(number, 1)) for number in range(len(batch))]


def _row_of(batch: Any) -> Any:
    row = {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = values[0].as_py()
        except UNREADABLE as error:
            return _unreadable_row(f"column `{name}`", error)
    return row


def _unreadable_row(what: str, error: Exception) -> BadRow:
    if isinstance(error, UnicodeDecodeError):
        return BadRow(f"{what}: found byte 0x{error.object[error.start]:02x}, expected UTF-8 text", "wrong encoding")
    return BadRow(f"{what}: found a value that cannot be read ({_first_line(error)})", "wrong value")


def _open_saved(path: str, folder: Path, part: Split) -> Source:
    """A folder that `datasets.save_to_disk` wrote: one dataset, or a dict of splits."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises what its many readers raise
        raise UserError(f"{path}: not a whole `datasets` folder ({_first_line(error)})") from None
    if isinstance(saved, datasets.DatasetDict):
        name = part.name or ("train" if "train" in saved else next(iter(saved), ""))
        if name not in saved:
            raise UserError(f"{path}: no split {name!r}, found {', '.join(saved) or 'none'}")
        saved = saved[name]
    elif part.name not in ("", str(saved.split)):
        raise UserError(f"{path}: no split {part.name!r}, this folder holds one dataset without splits")
    # `datasets` has a fingerprint of how the data were made, which other data may share.
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return _open_table(path, saved, part, _fingerprint(files, part))


def _open_hub(path: str, part: Split) -> Source:
    """A dataset of the Hugging Face hub, from its cache when there is no network."""
    import datasets

    repo, config = _hub_names(path)
    try:
        table = datasets.load_dataset(repo, config, split=part.name or "train")
    except Exception as error:  # network, names, configs and splits each raise a class of their own
        found = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{path}: no such file or folder, and the hub gives no such dataset ({found})") from None
    return _open_table(path, table, part, f"{table._fingerprint}{part}")


def _open_table(path: str, table: Any, part: Split, fingerprint: str) -> Source:
    """A `datasets.Dataset`, which is memory-mapped. Its columns of images and sounds are left out."""
    if len(table) == 0:
        raise UserError(f"{path}: the dataset has no row")
    wanted = [name for name in table.format["columns"] if not _is_media(table.features[name])]
    table = table.with_format(None, columns=wanted)  # plain values, whatever format it was saved with

    def read() -> Iterator[Row | BadRow]:
        number = 0
        while number < len(table):
            try:
                for row in table.select(range(number, len(table))):
                    number += 1
                    yield Row(f"{path} row {number}", row)
            except UNREADABLE as error:  # the row behind the last one
                number += 1
                yield _unreadable_row("a column", error).at(f"{path} row {number}")

    def count(most: int | None) -> int:
        return len(table) if most is None else min(most, len(table))

    return Source(path, part, fingerprint, table.data.nbytes, read, count)


def _is_media(feature: Any) -> bool:
    """Whether a column holds images, sounds or the like, or lists of them, which `datasets` decodes row by row."""
    if (of_list := getattr(feature, "feature", None)) is not None:
        return _is_media(of_list)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
