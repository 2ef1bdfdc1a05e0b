"""From a transformers folder, or a file of EasyLM, straight into sharded arrays.

Every device's part of every parameter is read from the files on its own: a process reads only what its devices hold,
and host memory holds one part of one parameter at a time.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.nn.initializers import zeros
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from easyrl.core.distributed import is_first
from easyrl.core.errors import UserError
from easyrl.core.params import ParamSpec, init_params, map_specs, num_params, shardings
from easyrl.hf.easylm import EasyLMCheckpoint
from easyrl.hf.families import family_of, tensors
from easyrl.hf.layout import HFTensor, Slices, named_leaves
from easyrl.hf.safetensors_io import Checkpoint
from easyrl.models.families import ModelConfig, param_specs

Tensors = Checkpoint | EasyLMCheckpoint

ALIGNED = 64  # bytes; the CPU backend takes an array that starts at a multiple of them without copying it
THREADS = min(8, os.cpu_count() or 1)  # more than memory can feed are of no use
SMALL = 1 << 18  # bytes; less than these is copied faster than threads are started
COMPARED = 1024  # rows of two tensors that are compared at a time
TILE = (64, 1024)  # rows and columns of a tensor that are transposed at a time
PROGRESS_BYTES = 1e9  # a smaller model loads before a bar would be of use


def load_params(
    source: str | Path | Tensors,
    cfg: ModelConfig,
    head: str,
    mesh: Mesh,
    dtype,
    *,
    layers: range | None = None,
    new_head: str | None = None,
    seed: int = 0,
    trained: bool = False,
) -> dict:
    """The parameters of `param_specs(cfg, head, layers)`, cast to `dtype` and sharded over `mesh`.

    `source` is a transformers folder, or the tensors of one or of EasyLM's file, opened.

    A `reward` or `value` head is the weight (and for a value the bias, zero when absent) of whichever the checkpoint
    has, a sequence classifier's or a token classifier's, so a value model can start from a reward model. When it has
    neither, `new_head` says how to start one: `zeros`, or `normal` (the head's own initialiser, drawn from `seed`).

    `trained` parameters are to be donated to steps. On a CPU these write only into memory of the backend's own, so such
    parameters are copied there; others stay in the memory that they were read into.

    Raises UserError naming file and tensor when a tensor is missing, left over, or has the wrong shape or type; all of
    this is known from the files' headers before any weight is read. Where embeddings and a head that config.json ties
    are both there, they are compared.
    """
    checkpoint = Checkpoint(Path(source)) if isinstance(source, str | Path) else source
    sources = _match(checkpoint, cfg, param_specs(cfg, head), head, new_head)
    specs, lowest = param_specs(cfg, head, layers), layers.start if layers else 0
    placed = named_leaves(shardings(specs, mesh))
    total = num_params(specs) * np.dtype(dtype).itemsize
    quiet = total < PROGRESS_BYTES or not is_first()
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {checkpoint.directory}", disable=quiet) as bar:

        def load(name: str, spec: ParamSpec) -> jax.Array:
            if name in sources:
                array = _load_leaf(checkpoint, sources[name], spec, placed[name], dtype, lowest, trained)
            else:
                array = start_leaf(name, spec, new_head, seed, dtype, mesh)
            bar.update(array.nbytes)
            return array

        return map_specs(load, specs)


def start_leaf(name: str, spec: ParamSpec, new_head: str | None, seed: int, dtype, mesh: Mesh) -> jax.Array:
    """A parameter of a head that the checkpoint lacks: zeros, or its own initial values drawn from `seed`."""
    spec = dataclasses.replace(spec, init=zeros) if new_head == "zeros" else spec
    return init_params({name: spec}, jax.random.key(seed), dtype, mesh)[name]


def _match(checkpoint: Tensors, cfg: ModelConfig, specs: dict, head: str, new_head: str | None) -> dict[str, HFTensor]:
    """The tensor each parameter comes from, all checked; a parameter that starts afresh is not in it."""
    assert new_head in (None, "zeros", "normal"), new_head
    family = family_of(cfg)
    flat = named_leaves(specs)
    # The head's own tensors first; the other scalar head's, which may have another name, do as well.
    tables = [tensors(cfg, kind) for kind in (("reward", "value") if head in ("lm", "reward") else ("value", "reward"))]
    found = [table for table in tables if table["head/scalar"].name in checkpoint]
    if head == "lm" and found:
        score = found[0]["head/scalar"].name
        raise UserError(f"{checkpoint.file(score)}: holds a classifier ({score}), expected a language model")
    table = found[0] if found else tables[0]
    if head != "lm" and not found:
        if new_head is None:
            score = table["head/scalar"].name
            raise UserError(f"{checkpoint.directory}: tensor {score} is missing, expected a {head} model's head")
        flat = {name: spec for name, spec in flat.items() if not name.startswith("head/")}
    if table["head/scalar_bias"].name not in checkpoint:
        flat.pop("head/scalar_bias", None)

    sources = {name: tensor for name, tensor in table.items() if name in flat}
    assert sources.keys() == flat.keys(), flat.keys() - sources.keys()
    if _is_bare_trunk(checkpoint, family):
        sources = {name: t._replace(name=t.name.removeprefix(family.TRUNK_PREFIX)) for name, t in sources.items()}
    embed, tied_head = sources["embed/tokens"], family.TENSORS["head/kernel"].name
    if cfg.tied_embeddings and embed.name not in checkpoint and tied_head in checkpoint:
        sources["embed/tokens"] = embed._replace(name=tied_head)  # of two names of one tensor some savers keep this one
    expected = set()
    for name, tensor in sources.items():
        spec = flat[name]
        shape = spec.shape[1:] if tensor.layered else spec.shape
        for i in range(spec.shape[0] if tensor.layered else 1):
            checkpoint.check(tensor.name.format(i=i), tensor.their_shape(shape))
            expected.add(tensor.name.format(i=i))
    if head == "lm" and cfg.tied_embeddings and tied_head in set(checkpoint) - expected:
        _check_tied(checkpoint, embed.name, tied_head, flat["embed/tokens"].shape)
    _check_left_over(checkpoint, cfg, expected, head, table["head/scalar_bias"].name)
    return sources


def _is_bare_trunk(checkpoint: Tensors, family) -> bool:
    """Whether the trunk's names lack their prefix, as when the trunk alone was saved."""
    name = family.TENSORS["embed/tokens"].name
    return name not in checkpoint and name.removeprefix(family.TRUNK_PREFIX) in checkpoint


def _check_tied(checkpoint: Tensors, embed: str, head: str, shape: tuple[int, ...]) -> None:
    """Raise UserError unless the two tensors are one, as config.json says: transformers ties no others."""
    checkpoint.check(head, shape)
    whole = tuple(slice(0, size) for size in shape)
    one, other = checkpoint.read(embed, whole), checkpoint.read(head, whole)
    rows = range(0, shape[0], COMPARED)
    same = all(np.array_equal(one[row : row + COMPARED], other[row : row + COMPARED]) for row in rows)
    checkpoint.release(embed)
    checkpoint.release(head)
    if not same:
        raise UserError(
            f"{checkpoint.file(head)}: tensor {head} differs from {embed}, expected the same (tie_word_embeddings of "
            "config.json, which false would have both read)"
        )


def _check_left_over(checkpoint: Tensors, cfg: ModelConfig, expected: set[str], head: str, bias_name: str) -> None:
    """Raise UserError for tensors that the model has no place for, but for those known to be of no use here."""
    family = family_of(cfg)
    harmless = set()
    if head != "lm" or cfg.tied_embeddings:
        harmless.add(family.TENSORS["head/kernel"].name)
    if head == "reward" and bias_name in checkpoint:
        checkpoint.check(bias_name, (1,))
        bias = checkpoint.read(bias_name, (slice(0, 1),)).item()
        if bias != 0:
            raise UserError(f"{checkpoint.file(bias_name)}: {bias_name} is {bias}, expected 0: a reward has no bias")
        harmless.add(bias_name)
    left = sorted(set(checkpoint) - expected - harmless)
    left = [name for name in left if not re.fullmatch(family.IGNORED, name)]
    if left:
        others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(
            f"{checkpoint.file(left[0])}: tensor {left[0]}{others} is left over: config.json has no place for it"
        )


def _load_leaf(
    checkpoint: Tensors, tensor: HFTensor, spec: ParamSpec, sharding: NamedSharding, dtype, lowest: int, trained: bool
) -> jax.Array:
    """One parameter, each distinct part read once and given to all the local devices that hold it.

    The first of its stacked layers, if it has any, is number `lowest` of the checkpoint.
    """
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, part in sharding.addressable_devices_indices_map(spec.shape).items():
        assert part is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(part, spec.shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in devices_of.items():
        block = _read_part(checkpoint, tensor, spec.shape, tuple(slice(*b) for b in bounds), dtype, lowest, trained)
        arrays += jax.block_until_ready([jax.device_put(block, device) for device in devices])  # so that one is held
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def _read_part(
    checkpoint: Tensors, tensor: HFTensor, shape: tuple[int, ...], part: Slices, dtype, lowest: int, trained: bool
) -> np.ndarray:
    """One part of a parameter, its layers stacked, in our layout and `dtype`.

    Several threads fill it, each a layer or a run of our first axis, so that no two of them write into one page: who
    comes first has it cleared by the system, and of two who come together both have.
    """
    block = _empty([s.stop - s.start for s in part], np.dtype(dtype), trained)
    layers = [(block, tensor.name)]
    if tensor.layered:
        names = (tensor.name.format(i=lowest + i) for i in range(part[0].start, part[0].stop))
        layers, shape, part = list(zip(block, names, strict=True)), shape[1:], part[1:]
    small = block.nbytes < SMALL
    runs = 1 if small or not checkpoint.is_whole(layers[0][1]) else -(-THREADS // len(layers))

    def jobs() -> Iterator[tuple[str, np.ndarray, Slices]]:
        for layer, name in layers:
            if runs == 1:
                yield name, layer, part
                continue
            run = -(-len(layer) // runs)
            for start in range(0, len(layer), run):
                end = min(start + run, len(layer))
                yield name, layer[start:end], (slice(part[0].start + start, part[0].start + end), *part[1:])

    def fill(job: tuple[str, np.ndarray, Slices]) -> None:
        name, into, wanted = job
        for theirs, ours in tensor.pieces(shape, wanted):
            view: Any = (*ours, ...)  # of a single number too
            _copy(into[view], tensor.to_ours(checkpoint.read(name, theirs), into[view].shape))
        checkpoint.release(name)

    if small:
        for job in jobs():
            fill(job)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, jobs()))
    return block


def _empty(shape: list[int], dtype: np.dtype, trained: bool) -> np.ndarray:
    """An array to be filled, in memory that the CPU backend takes as it is; of a `trained` parameter, that it copies.

    Neither is left to chance: where numpy's own arrays start depends on what the process has freed before.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 2 * ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED + (ALIGNED // 4 if trained else 0)
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _copy(into: np.ndarray, view: np.ndarray) -> None:
    """`into[...] = view`, and where the numbers of a row of one are a column of the other, a tile at a time.

    A tile goes through a buffer that stays in the processor's cache, by row into it and by column out of it. Its rows
    are a little longer than the tile's: those of tensors are often a power of two long, and numbers so far apart share
    one place in the cache. On the way into the buffer they are cast, because numpy casts short runs slowly.
    """
    into, view = _merged(into, view)
    along = min(range(view.ndim), key=lambda axis: view.strides[axis], default=0)
    if view.ndim < 2 or along == view.ndim - 1:
        into[...] = view
        return
    into, view = np.moveaxis(into, along, -1), np.moveaxis(view, along, -1)
    rows, columns = TILE
    buffer = np.empty((rows, columns + ALIGNED // into.itemsize), into.dtype)
    for place in np.ndindex(view.shape[:-2]):
        for row, column in itertools.product(range(0, view.shape[-2], rows), range(0, view.shape[-1], columns)):
            tile = (*place, slice(row, row + rows), slice(column, column + columns))
            through = buffer[: view[tile].shape[0], : view[tile].shape[1]]
            through[...] = view[tile]
            into[tile] = through


def _merged(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays, of one shape, with axes made one that follow each other in the memory of all, as heads do."""
    merged = list(arrays)
    for axis in reversed(range(merged[0].ndim - 1)):
        if all(x.strides[axis] == x.strides[axis + 1] * x.shape[axis + 1] for x in merged):
            merged = [
                x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]) for x in merged
            ]
    return merged
