"""Reading weights: from a safetensors file into arrays on the devices, beside just reading the file.

python -m easyrl.bench load --model=270m
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyrl.bench.config import BenchConfig
from easyrl.bench.machine import measure_limits, peak_bytes, resident_bytes
from easyrl.bench.measure import spread
from easyrl.bench.report import publish
from easyrl.bench.shapes import shape
from easyrl.core.config import flag
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.hf.families import family_of
from easyrl.hf.layout import named_leaves
from easyrl.hf.load import load_params
from easyrl.hf.safetensors_io import WEIGHTS, TensorInfo, write_checkpoint
from easyrl.models.families import ModelConfig, param_specs

CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Config(BenchConfig):
    """Time loading a language model's weights, which are written to a temporary folder first.

    The file was just written, so on a machine with room for it all times are those of reading the page cache, unless
    --cold has it dropped from there before every lap. Any loader has to have memory for what it reads, so the file is
    read in two ways: through one buffer, which leaves nothing behind, and into memory of its own.
    """

    model: str = flag("270m", "Shape of the model: debug, 34m, 270m, 1b, 3b or 8b.")
    mesh_dim: str = flag("1,-1,1", "Sizes of the mesh axes dp,fsdp,mp.")
    file_dtype: str = flag("", "Format of the file's numbers. Empty: that of --dtype.", choices=("", *DTYPES))
    trained: bool = flag(False, "Whether the weights will be trained: on a CPU these are copied once more.")
    cold: bool = flag(False, "Read from the disk every time, as after a start of the machine.")
    repeats: int = flag(5, "Laps.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cold and not hasattr(os, "posix_fadvise"):
            raise UserError("--cold: this system cannot drop a file from its page cache")


def main(config: Config) -> None:
    cfg, mesh = shape(config.model, dtype=DTYPES[config.dtype]), make_mesh(config.mesh_dim)
    dtype = DTYPES[config.dtype]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, cfg, config.file_dtype or config.dtype)
        file = folder / WEIGHTS
        load = lambda: jax.block_until_ready(load_params(folder, cfg, "lm", mesh, dtype, trained=config.trained))
        seconds = lambda call: _seconds(call, file if config.cold else None)
        before, peak = resident_bytes(), 0
        laps: dict[str, list[float]] = {name: [] for name in ("loading", "reading the file", "reading into memory")}
        for _ in range(config.repeats):
            laps["loading"].append(seconds(load))
            peak = peak or peak_bytes()  # of one loading: JAX keeps what was freed until it is called again
            laps["reading the file"].append(seconds(lambda: _read(file)))
            laps["reading into memory"].append(seconds(lambda: np.fromfile(file, np.uint8)))
        figures = {
            "seconds": {name: spread(lap) for name, lap in laps.items()},
            "laps": laps,
            "bytes": file.stat().st_size,
            "peak_bytes": peak,
            "resident_before_bytes": before,
        }
    publish(config, "load", figures | {"limits": measure_limits(config.dtype)})


def _seconds(call: Callable[[], Any], dropped: Path | None) -> float:
    """What the call takes, after this file was dropped from the page cache."""
    if dropped:
        with dropped.open("rb") as file:
            os.fsync(file.fileno())  # what has not reached the disk stays in the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _read(file: Path) -> None:
    """Every byte of the file, through one buffer."""
    buffer = bytearray(CHUNK)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def _write(folder: Path, cfg: ModelConfig, dtype: str) -> None:
    """A checkpoint with the model's tensors, one in memory at a time; their values are of no matter."""
    leaves = named_leaves(param_specs(cfg, "lm"))
    infos = []
    for name, tensor in family_of(cfg).TENSORS.items():
        if name not in leaves:
            continue
        shape = leaves[name].shape[1:] if tensor.layered else leaves[name].shape
        for i in range(leaves[name].shape[0] if tensor.layered else 1):
            infos.append(TensorInfo(tensor.name.format(i=i), tensor.their_shape(shape), np.dtype(DTYPES[dtype])))
    write_checkpoint(folder, [infos], (np.full(info.shape, 0.5, info.dtype) for info in infos))
