"""Safetensors files: a checkpoint of one or many files read slice by slice, and written tensor by tensor."""

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, before safetensors looks for it)
import numpy as np
from safetensors import SafetensorError, safe_open

from easyrl.core.errors import UserError
from easyrl.core.text import is_file_name
from easyrl.hf.fields import read_json
from easyrl.hf.layout import Slices

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# numpy's name of a type -> the name in a safetensors header
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NUMPY_NAMES = {theirs: ours for ours, theirs in FLOATS.items()}


class Stored(NamedTuple):
    """A tensor in a file: its type in the header's words, and the byte of the file where its numbers start."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


class Checkpoint:
    """The tensors of a folder with model.safetensors, or with an index and its shards.

    Opening it reads the files' headers only. Raises UserError naming the file that is missing, cut short or not a
    safetensors file, and the tensor that a shard lacks.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._tensors: dict[str, Stored] = {}
        self._bytes: dict[Path, mmap.mmap] = {}
        for path, expected in _files(directory):
            try:
                tensors = _read_header(path)
                with path.open("rb") as opened:
                    self._bytes[path] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                raise UserError(f"{path}: no such file, though {INDEX} names it") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: cut short or not a safetensors file ({error})") from None
            for name in expected - tensors.keys():
                raise UserError(f"{path}: tensor {name} is missing, though {INDEX} says it is here")
            self._tensors |= tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._tensors[name].file

    def dtype(self, name: str) -> str:
        """numpy's name of a tensor's type; of a type that holds no floats the name in the file."""
        stored = self._tensors[name].dtype
        return NUMPY_NAMES.get(stored, stored)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless the tensor `name` is there, of float type and of this shape."""
        if name not in self:
            raise UserError(f"{self.directory}: tensor {name} is missing, expected shape {list(shape)}")
        found = self._tensors[name].shape
        if found != shape:
            raise UserError(
                f"{self.file(name)}: tensor {name} has shape {list(found)}, expected {list(shape)} from config.json"
            )
        dtype = self._tensors[name].dtype
        if dtype not in FLOATS.values():
            raise UserError(
                f"{self.file(name)}: tensor {name} has type {dtype}, expected one of {', '.join(FLOATS.values())}"
            )

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """One slice of a tensor, as a view of the file: its bytes are read as they are used."""
        file, shape, stored, start = self._tensors[name]
        return np.frombuffer(self._bytes[file], NUMPY_NAMES[stored], math.prod(shape), start).reshape(shape)[slices]

    def is_whole(self, name: str) -> bool:
        """Whether the file has a tensor in one piece, so that a part of it can be read without the rest: always."""
        return True

    def release(self, name: str) -> None:
        """Give back the memory of what was read of a tensor, whose pages count as this process's until then."""
        file, shape, stored, start = self._tensors[name]
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        end = start + math.prod(shape) * np.dtype(NUMPY_NAMES[stored]).itemsize
        if end > start:
            self._bytes[file].madvise(mmap.MADV_DONTNEED, page, end - page)


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, once the library has opened it and so found its header sound.

    The library does not say where in the file a tensor lies, and copies what it reads, so the offsets are read here.
    """
    with safe_open(path, framework="numpy"), path.open("rb") as file:
        begin = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, tuple(info["shape"]), info["dtype"], begin + info["data_offsets"][0])
        for name, info in header.items()
    }


def _files(directory: Path) -> list[tuple[Path, set[str]]]:
    """The folder's weight files, each with the tensors that the index promises in it."""
    if (directory / WEIGHTS).exists():
        return [(directory / WEIGHTS, set())]
    if not (directory / INDEX).exists():
        others = sorted(path.name for pattern in ("*.bin", "*.safetensors") for path in directory.glob(pattern))
        found = f"found only {', '.join(others[:3])}" if others else "found no weights"
        raise UserError(f"{directory}: {found}, expected {WEIGHTS} or {INDEX}")
    return [(directory / file, tensors) for file, tensors in sorted(indexed(directory).items())]


def indexed(directory: Path) -> dict[str, set[str]]:
    """The files that the folder's index names, each with the tensors that are promised in it."""
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{directory / INDEX}: weight_map is missing, expected an object from tensor to file")
    expected: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not is_file_name(str(file)):
            raise UserError(
                f"{directory / INDEX}: has tensor {tensor} in {str(file)!r}, expected a file of this folder"
            )
        expected.setdefault(str(file), set()).add(tensor)
    return expected


class TensorInfo(NamedTuple):
    """A tensor that is about to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(infos: Iterable[TensorInfo], max_bytes: float) -> list[list[TensorInfo]]:
    """The tensors in their order, cut into runs of at most `max_bytes`; a larger tensor gets a run of its own."""
    shards: list[list[TensorInfo]] = []
    room = 0.0
    for info in infos:
        if not shards or info.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(info)
        room -= info.nbytes
    return shards


def write_checkpoint(directory: Path, shards: list[list[TensorInfo]], tensors: Iterable[np.ndarray]) -> None:
    """Write `tensors`, which come in the order of the plan; one of them is in memory at a time.

    One shard becomes model.safetensors; several become numbered files and an index.
    """
    tensors = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard, tensors)
        weight_map |= {info.name: file for info in shard}
    if len(shards) > 1:
        total = sum(info.nbytes for shard in shards for info in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, shard: list[TensorInfo], tensors: Iterator[np.ndarray]) -> None:
    """One safetensors file, whose tensors are taken from `tensors` as they are written.

    The library's `save_file` wants every tensor of the file at once and copies them all, so the layout is written here:
    the header's length as 8 bytes, a JSON header padded to 8 bytes, then the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in shard:
        header[info.name] = {
            "dtype": FLOATS[info.dtype.name],
            "shape": info.shape,
            "data_offsets": (offset, offset + info.nbytes),
        }
        offset += info.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in shard:
            array = np.ascontiguousarray(next(tensors))
            assert (array.shape, array.dtype) == (info.shape, info.dtype), info
            file.write(array.view(np.uint8).data)
