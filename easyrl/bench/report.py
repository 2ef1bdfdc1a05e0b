"""A benchmark's figures, as JSON and as a table."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyrl.bench.config import BenchConfig, ModelBenchConfig
from easyrl.bench.machine import measure_limits, peak_bytes
from easyrl.bench.measure import CompileTime, Lap, Step, run_laps, spread, trace_lap
from easyrl.core.files import write_atomic

PACKAGES = ("easyrl", "jax", "jaxlib", "flax", "optax", "numpy")


class Benchmark:
    """What is timed as a config says: its laps, and the step that they are laps of."""

    def __init__(self, config: ModelBenchConfig):
        self.laps: list[Lap] = []
        self.step: Step | None = None
        self._config = config

    def run(self, step: Step) -> None:
        """Times the laps of `step`, the warm-up's first."""
        self.step, self.laps = step, run_laps(step, self._config.warmup, self._config.repeats)


@contextlib.contextmanager
def benchmark(config: ModelBenchConfig, name: str) -> Iterator[Benchmark]:
    """A benchmark to run; when the block ends, its figures are printed and written, with the block's compile time.

    The limits of the machine are measured afterwards, in the same process. With --profile one more lap is traced in the
    end, when no trouble with that can cost the figures.
    """
    bench = Benchmark(config)
    with CompileTime().active() as compiling:
        yield bench
    memory = peak_bytes()  # before the measurement of limits takes its own
    publish(config, name, figures(bench.laps, config, compiling.seconds) | {"peak_bytes": memory})
    if config.profile and bench.step:
        trace_lap(bench.step, len(bench.laps), Path(config.profile).expanduser())


def figures(laps: list[Lap], config: ModelBenchConfig, compile_seconds: float) -> dict[str, Any]:
    """What the laps amount to; their warm-up enters `first_seconds` only.

    `mfu` is the share of the measured matrix rate of all devices that the operations a lap needs make up, without any
    that padding or recomputation adds; `bandwidth_share`, where a benchmark says what must be read, likewise.
    `flops_per_second` are those of one device.
    """
    limits = measure_limits(config.dtype)
    counted = laps[config.warmup :]
    seconds = {"total": [lap.seconds for lap in counted]}
    for phase in counted[0].phases:
        seconds[phase] = [lap.phases[phase] for lap in counted]
    rate, read = (
        float(np.median([amount(lap.work) / lap.seconds for lap in counted]))
        for amount in (lambda work: work.flops, lambda work: work.read_bytes)
    )
    # The virtual devices of a process share the processor, of which the measurement on one of them takes all.
    limited = jax.device_count() // (jax.local_device_count() if jax.default_backend() == "cpu" else 1)
    found = {
        "seconds": {phase: spread(values) for phase, values in seconds.items()},
        "laps": seconds,
        "first_seconds": laps[0].seconds,
        "compile_seconds": compile_seconds,
        "tokens": spread([lap.work.tokens for lap in counted]),
        "tokens_per_second": sum(lap.work.tokens for lap in counted) / sum(seconds["total"]),
        "samples_per_second": sum(lap.work.samples for lap in counted) / sum(seconds["total"]),
        "flops_per_second": rate / jax.device_count(),
        "mfu": rate / limited / limits["flops_per_second"],
        "limits": limits,
    }
    if places := sum(lap.work.places for lap in counted):
        found["padding_share"] = 1 - sum(lap.work.packed for lap in counted) / places
    if read:
        found["bandwidth_share"] = read / limited / limits["bytes_per_second"]
    return found


def publish(config: BenchConfig, name: str, figures: dict[str, Any]) -> None:
    """Prints the figures as a table and writes them, with the flags and the versions, where --json says."""
    device = jax.devices()[0]
    where = {
        "platform": device.platform, "device": device.device_kind, "devices": jax.device_count(),
        "python": platform.python_version(), **_versions(),
    }  # fmt: skip
    print(_table(name, config, where, figures), flush=True)
    if config.json:
        everything = {"benchmark": name, "where": where, "flags": dataclasses.asdict(config), **figures}
        with write_atomic(Path(config.json).expanduser()) as path:
            path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _table(name: str, config: BenchConfig, where: dict[str, Any], figures: dict[str, Any]) -> str:
    label = " ".join(filter(None, (name, getattr(config, "workload", ""))))
    lines = [("benchmark", f"{label}, {config.dtype}, jax {where.get('jax')}, {where['devices']} x {where['device']}")]
    for phase, values in figures.get("seconds", {}).items():
        between = f"{values['min']:.3f} to {values['max']:.3f}, {values['n']} laps"
        lines.append((f"{phase}, s", f"{values['median']:.3f}  ({between})"))
    for key, label, form in _ROWS:
        if key in figures:
            lines.append((label, form(figures[key])))
    limits = figures["limits"]
    lines.append(("limits", f"{_si(limits['flops_per_second'])}FLOP/s, {_si(limits['bytes_per_second'])}B/s"))
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def _si(number: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


_ROWS = (
    ("tokens", "tokens a lap", lambda tokens: f"{tokens['median']:,.0f}"),
    ("tokens_per_second", "tokens per second", lambda rate: f"{rate:,.1f}"),
    ("samples_per_second", "samples per second", lambda rate: f"{rate:.3f}"),
    ("padding_share", "padding", lambda share: f"{share:.1%}"),
    ("flops_per_second", "model operations", lambda rate: f"{_si(rate)}FLOP/s a device"),
    ("mfu", "share of the matrix rate", lambda share: f"{share:.1%}"),
    ("bandwidth_share", "share of the bandwidth", lambda share: f"{share:.1%}"),
    ("bytes", "size of the file", lambda size: f"{size / 2**30:.2f} GiB"),
    ("first_seconds", "first lap, s", lambda seconds: f"{seconds:.2f}"),
    ("compile_seconds", "compiling, s", lambda seconds: f"{seconds:.2f}"),
    ("peak_bytes", "peak memory", lambda size: f"{size / 2**30:.2f} GiB"),
)  # fmt: skip
