"""Programs compiled before their first call, side by side.

A jitted function compiles when it is first called, and so one function after another, each while the others' results
are waited for. What a run will call is known before it starts: here every function is traced in turn, and compiled
while the next is traced. The first calls then find their programs, as a function that is called remembers what it was
compiled for.
"""

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of a jitted function, or of a `functools.partial` of one.

    Where it is only to be compiled, jax.ShapeDtypeStruct may stand for arrays, with the sharding that they will have.
    """

    name: str  # for people
    function: Any
    arguments: tuple
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """What the function returns."""
        return self.function(*self.arguments, **self.keywords)

    def lower(self) -> Any:
        """Its `jax.stages.Lowered`."""
        if isinstance(self.function, functools.partial):
            keywords = {**self.function.keywords, **self.keywords}
            return Call(self.name, self.function.func, self.arguments, keywords).lower()
        return self.function.lower(*self.arguments, **self.keywords)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Python looks for garbage a hundred times less often, and where it does not look at all goes on so.

    Tracing makes millions of objects, nearly all of which are kept: to go through them again and again is a fifth of
    its time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def compile_ahead(calls: Sequence[Call], done: Callable[[str], None] = lambda name: None) -> dict[str, float]:
    """Compiles the programs of these calls, and returns the seconds from the start until each was ready.

    The one that takes longest should come first. `done(name)` is told of each. Raises what the compiler raises.
    """
    begun = time.perf_counter()
    if not calls:
        return {}
    with ThreadPoolExecutor(len(calls)) as pool, rare_collections():
        compiling: dict[Future, str] = {pool.submit(call.lower().compile): call.name for call in calls}
        seconds = {}
        for future in as_completed(compiling):
            future.result()
            seconds[compiling[future]] = time.perf_counter() - begun
            done(compiling[future])
    return seconds
