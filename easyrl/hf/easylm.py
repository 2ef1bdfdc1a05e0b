"""Llama checkpoints of EasyLM, read in place: `params::FILE`, `trainstate_params::FILE`, `flax_params::FILE`.

EasyLM streams a model into one msgpack file: for every parameter a pair (key, value), the key a list of names and the
value what flax.serialization.to_bytes makes of the array: an extension that holds (shape, type, bytes). Values of more
than 2 GiB are split over several pairs whose keys end in `chunk_0`, `chunk_1`, ...; flax itself splits arrays of more
than 1 GiB. A train state is streamed likewise, its parameters under (params, params); `flax_params` is one nested map
instead of pairs.

Only the headers are parsed, here, and the bytes of an array stay in the file until a device's part of it is wanted.
Nothing in such a file is ever executed.

EasyLM's kernels are [in, out], and its rotary embedding turns neighbouring numbers of a head where transformers' turns
its halves. So `EasyLMCheckpoint` speaks of tensors as transformers names and lays them out, and everything above it is
shared with safetensors.
"""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import ml_dtypes
import numpy as np

from easyrl.core.errors import UserError
from easyrl.hf.layout import Slices
from easyrl.hf.safetensors_io import FLOATS

KINDS = ("params", "trainstate_params", "flax_params")

# EasyLM's name -> transformers'. Of a kernel they have the transpose.
_LAYER = {
    "attention.wq.kernel": "self_attn.q_proj.weight",
    "attention.wk.kernel": "self_attn.k_proj.weight",
    "attention.wv.kernel": "self_attn.v_proj.weight",
    "attention.wo.kernel": "self_attn.o_proj.weight",
    "feed_forward.w1.kernel": "mlp.gate_proj.weight",
    "feed_forward.w2.kernel": "mlp.down_proj.weight",
    "feed_forward.w3.kernel": "mlp.up_proj.weight",
    "attention_norm.kernel": "input_layernorm.weight",
    "ffn_norm.kernel": "post_attention_layernorm.weight",
}
_OTHERS = {
    "transformer.wte.embedding": "model.embed_tokens.weight",
    "transformer.ln_f.kernel": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
    "score.kernel": "score.weight",
    "score.bias": "score.bias",
}
_ARRAY, _CHUNKED = 1, "__msgpack_chunked_array__"  # flax's extension type of an array; its mark of one in pieces


class EasyLMFile(NamedTuple):
    """Where a model's weights are: see `EasyLMCheckpoint`."""

    path: Path
    kind: str
    neighbours: bool


def config_to_hf(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration of EasyLM's in the words of a config.json; one that is a config.json already stays as it is."""
    renamed = {"model_type": "llama"}
    if "max_sequence_length" in raw:
        renamed["max_position_embeddings"] = raw["max_sequence_length"]
    return renamed | raw


class Stored(NamedTuple):
    """An array in the file: where its numbers start; or, of one in pieces, the msgpack of the whole."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    pieces: tuple[tuple[int, int], ...] = ()  # (start, end) of each


class EasyLMCheckpoint:
    """The tensors of an EasyLM file of a Llama, as `hf.safetensors_io.Checkpoint` shows those of a folder.

    `head_size` is needed to undo EasyLM's rotary pairing; `file.neighbours` says whether there is any to undo (there is
    not in models trained with its `use_hf_rotary_emb`). Raises UserError naming the file when it is missing, cut short
    or something else.
    """

    def __init__(self, file: EasyLMFile, head_size: int):
        path, kind, self._neighbours = file
        self.directory, self._head_size = path, head_size
        try:
            with path.open("rb") as opened:
                self._bytes: Any = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # a ValueError for an empty file
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        reader = _Reader(path, self._bytes)
        prefix = ("params", "params") if kind == "trainstate_params" else ()
        leaves = reader.walk(0, ()) if kind == "flax_params" else reader.pairs(prefix)
        try:
            arrays = dict(leaves)
        except RecursionError:
            raise UserError(f"{path}: is nested too deeply, expected an EasyLM {kind} file") from None
        self._tensors = {_their_name(key): stored for key, stored in _put_together(path, arrays, self._bytes)}
        if not self._tensors:
            raise UserError(f"{path}: holds no {'.'.join(prefix) or 'parameters'}, expected an EasyLM {kind} file")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.directory

    def dtype(self, name: str) -> str:
        """numpy's name of a tensor's type."""
        return self._tensors[name].dtype

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless the tensor `name` is there, of float type and of this shape."""
        if name not in self:
            raise UserError(f"{self.directory}: tensor {name} is missing, expected shape {list(shape)}")
        stored = self._tensors[name]
        found = stored.shape if _is_embedding(name) else stored.shape[::-1]
        if found != shape:
            raise UserError(f"{self.directory}: tensor {name} has shape {list(found)}, expected {list(shape)}")
        if stored.dtype not in FLOATS:
            raise UserError(f"{self.directory}: tensor {name} has type {stored.dtype}, expected {', '.join(FLOATS)}")

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """One slice of a tensor in transformers' layout; of `q_proj` and `k_proj` in whole heads."""
        stored = self._tensors[name]
        if stored.pieces:
            whole = _restore(self._bytes, stored.pieces)
        else:
            count = int(np.prod(stored.shape, dtype=np.int64))
            whole = np.frombuffer(self._bytes, _dtype(stored.dtype), count, stored.start).reshape(stored.shape)
        part = whole[slices] if _is_embedding(name) else whole[slices[::-1]].T
        if self._neighbours and re.search(r"\.(q|k)_proj\.", name):
            heads = part.reshape(-1, self._head_size // 2, 2, part.shape[1])
            part = heads.swapaxes(1, 2).reshape(part.shape)
        return part

    def is_whole(self, name: str) -> bool:
        """Whether the file has a tensor in one piece, so that a part of it can be read without the rest."""
        return not self._tensors[name].pieces

    def release(self, name: str) -> None:
        """Give back the memory of what was read of a tensor's file, whose pages count as this process's until then."""
        self._bytes.madvise(mmap.MADV_DONTNEED)


def _is_embedding(name: str) -> bool:
    return "embed_tokens" in name


def _their_name(key: tuple[str, ...]) -> str:
    """transformers' name of EasyLM's parameter; one that it does not have keeps its own."""
    name = re.sub(r"^(params\.)+", "", ".".join(key))
    if layer := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name):
        number, rest = layer.groups()
        return f"model.layers.{number}.{_LAYER[rest]}" if rest in _LAYER else name
    return _OTHERS.get(name, name)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _restore(buffer: Any, pieces: tuple[tuple[int, int], ...]) -> np.ndarray:
    """An array that the file has in pieces, whole."""
    return flax.serialization.msgpack_restore(b"".join(buffer[start:end] for start, end in pieces))


def _put_together(
    path: Path, leaves: dict[tuple[str, ...], Stored], buffer: Any
) -> Iterator[tuple[tuple[str, ...], Stored]]:
    """(key, array) of all leaves, those that come as `chunk_0`, `chunk_1`, ... as one."""
    chunks: dict[tuple[str, ...], dict[int, tuple[int, int]]] = {}
    for key, stored in leaves.items():
        if not stored.pieces:
            yield key, stored
        elif found := re.fullmatch(r"chunk_(\d+)", key[-1]):
            chunks.setdefault(key[:-1], {})[int(found[1])] = stored.pieces[0]
        else:
            chunks[key] = {0: stored.pieces[0]}
    for key, numbered in chunks.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise UserError(f"{path}: {'.'.join(key)} lacks a chunk, found {sorted(numbered)}")
        pieces = tuple(numbered[number] for number in sorted(numbered))
        try:
            array = _restore(buffer, pieces)
            yield key, Stored(array.shape, array.dtype.name, 0, pieces)
        except Exception as error:  # msgpack and flax raise what they like
            raise UserError(f"{path}: {'.'.join(key)} is damaged ({type(error).__name__}: {error})") from None


class _Reader:
    """The part of msgpack (github.com/msgpack/msgpack/blob/master/spec.md) that these files use."""

    def __init__(self, path: Path, buffer: Any):
        self._path, self._bytes, self._size = path, buffer, len(buffer)

    def pairs(self, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Stored]]:
        """(key without `prefix`, array) of those pairs of a stream whose key begins with it."""
        at = 0
        while at < self._size:
            kind, length, inside = self._head(at)
            if (kind, length) != ("array", 2):
                raise self._fail(at, "a (key, value) pair")
            key, at = self._key(inside)
            name = ".".join(key)
            kind, length, start = self._head(at)
            if kind not in ("bin", "str"):
                raise self._fail(at, f"the bytes of {name}")
            at = start + length
            if at > self._size:
                raise UserError(f"{self._path}: cut short inside {name}: {at - self._size} bytes are missing")
            if key[: len(prefix)] != prefix:
                continue  # the optimizer's
            if key[-1].startswith("chunk_"):
                yield key[len(prefix) :], Stored((), "", 0, ((start, at),))
            else:
                yield from self.walk(start, key[len(prefix) :])

    def walk(self, at: int, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Stored]]:
        """(key, array) of all arrays in the value at `at`, which is one or a map of such."""
        begin, name = at, ".".join(key)
        kind, length, at = self._head(at)
        if kind == "ext":
            yield key, self._array(at, length, name)
        elif kind != "map":
            raise self._fail(begin, f"an array or a map for {name or 'the parameters'}")
        for _ in range(length if kind == "map" else 0):
            inner, at = self._text(at)
            if inner == _CHUNKED:  # by flax, which reads it
                yield key, Stored((), "", 0, ((begin, self._end(begin)),))
                return
            yield from self.walk(at, (*key, inner))
            at = self._end(at)

    def _array(self, at: int, length: int, name: str) -> Stored:
        """The array whose extension's payload of `length` bytes starts at `at`: (shape, type, bytes)."""
        end = at + length
        if self._bytes[at - 1] != _ARRAY:
            raise self._fail(at, f"an array for {name}")
        kind, count, at = self._head(at)
        if (kind, count) != ("array", 3):
            raise self._fail(at, f"shape, type and numbers of {name}")
        kind, rank, at = self._head(at)
        shape = []
        for _ in range(rank):
            kind, size, at = self._head(at)
            if kind != "int":
                raise self._fail(at, f"the shape of {name}")
            shape.append(size)
        dtype, at = self._text(at)
        kind, size, at = self._head(at)
        try:
            expected = int(np.prod(shape, dtype=np.int64)) * _dtype(dtype).itemsize
        except TypeError:
            raise self._fail(at, f"the type of {name}") from None
        if kind not in ("bin", "str") or size != expected or at + size != end or end > self._size:
            raise self._fail(at, f"the {expected} bytes of {name} ({dtype}{shape})")
        return Stored(tuple(shape), dtype, at)

    def _key(self, at: int) -> tuple[tuple[str, ...], int]:
        begin = at
        kind, length, at = self._head(at)
        if kind != "array" or length == 0:
            raise self._fail(begin, "a key")
        names = []
        for _ in range(length):
            name, at = self._text(at)
            names.append(name)
        return tuple(names), at

    def _text(self, at: int) -> tuple[str, int]:
        kind, length, start = self._head(at)
        if kind not in ("str", "bin") or start + length > self._size:
            raise self._fail(at, "a name")
        try:
            return self._bytes[start : start + length].decode(), start + length
        except UnicodeDecodeError:
            raise self._fail(at, "a name") from None

    def _end(self, at: int) -> int:
        """Where the value at `at` ends."""
        kind, length, at = self._head(at)
        if kind in ("str", "bin", "ext"):
            if at + length > self._size:
                raise UserError(f"{self._path}: cut short: {at + length - self._size} bytes are missing")
            return at + length
        for _ in range({"array": length, "map": 2 * length}.get(kind, 0)):
            at = self._end(at)
        return at

    def _head(self, at: int) -> tuple[str, int, int]:
        """(kind, length or number, where what follows starts) of the value at `at`."""
        if at >= self._size:
            raise UserError(f"{self._path}: cut short at byte {at}")
        first = self._bytes[at]
        for kind, low, high in (("map", 0x80, 0x8F), ("array", 0x90, 0x9F), ("str", 0xA0, 0xBF), ("int", 0x00, 0x7F)):
            if low <= first <= high:
                return kind, first - low, at + 1
        if first in (0xC0, 0xC2, 0xC3):  # nil, false, true
            return "constant", 0, at + 1
        if 0xD4 <= first <= 0xD8:  # an extension of 1, 2, 4, 8 or 16 bytes, behind its type
            return "ext", 1 << (first - 0xD4), at + 2
        kind, width = _SIZED.get(first, ("", 0))
        if not kind:
            raise self._fail(at, "msgpack")
        number = int.from_bytes(self._bytes[at + 1 : at + 1 + width], "big")
        return kind, number, at + 1 + width + (kind == "ext")

    def _fail(self, at: int, expected: str) -> UserError:
        found = self._bytes[at : at + 4].hex()
        return UserError(f"{self._path}: byte {at}: found {found}, expected {expected}: not an EasyLM file")


# first byte -> kind and bytes of the length or number that follows
_SIZED = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
