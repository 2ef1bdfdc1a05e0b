"""Timing: laps with phases, warm-up apart, compile time, peak memory and profiles."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from easyrl.runtime.metrics import PhaseTimer

COMPILE_EVENTS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


@dataclass(frozen=True)
class Work:
    """What a lap worked on: samples (pairs, responses), real tokens, the operations that they need, bytes to be read.

    `packed` are the tokens that lie in packed rows, what a pair begins with once, and `places` those that a pass over
    the rows is as long as, padding included; 0: of no interest.
    """

    samples: int
    tokens: float
    flops: float
    read_bytes: float = 0.0
    packed: float = 0.0
    places: float = 0.0


@dataclass(frozen=True)
class Lap:
    """One repetition: its seconds, those of its phases, and its work."""

    seconds: float
    phases: dict[str, float]
    work: Work


def spread(values: list[float]) -> dict[str, float]:
    """Median, least, largest and number of some values."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "n": len(values)}


# step(number, timer) waits for its results and says what it worked on.
Step = Callable[[int, PhaseTimer], Work]


def run_laps(step: Step, warmup: int, repeats: int) -> list[Lap]:
    """Laps of `step`, the warm-up's first."""

    def lap(number: int) -> Lap:
        timer, start = PhaseTimer(), time.perf_counter()
        work = step(number, timer)
        seconds = time.perf_counter() - start
        phases = {name.removeprefix("time/"): phase for name, phase in timer.metrics().items()}
        return Lap(seconds, phases, work)

    laps = []
    for number in range(warmup + repeats):
        laps.append(lap(number))
        if sys.stderr.isatty():
            print(f"\rlap {number + 1} of {warmup + repeats}: {laps[-1].seconds:.3f} s ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return laps


def trace_lap(step: Step, number: int, folder: Path) -> None:
    """Traces one lap into a folder, for XProf and Perfetto."""
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        step(number, PhaseTimer())


class CompileTime:
    """Seconds in which JAX traces, lowers or compiles while this is active; of programs side by side, counted once."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        total, until = 0.0, -math.inf
        for start, end in sorted(self._spans):
            total += max(end - max(start, until), 0.0)
            until = max(until, end)
        return total

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.rpartition("/")[2] in COMPILE_EVENTS:
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    @contextlib.contextmanager
    def active(self) -> Iterator["CompileTime"]:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(self._listen)
