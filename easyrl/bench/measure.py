"""Timing: laps with phases, warm-up apart, compile time, peak memory and profiles."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


def run_laps(step: Callable[[int, PhaseTimer], Work], warmup: int, repeats: int, profile: str = "") -> list[Lap]:
    """Laps of `step(number, timer)`, which waits for its results and says what it worked on; the warm-up's first.

    With `profile`, one more lap is traced into that folder, for XProf and Perfetto; it is not among the laps.
    """

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
    if profile:
        with jax.profiler.trace(profile, create_perfetto_trace=True):
            lap(warmup + repeats)
    return laps


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
