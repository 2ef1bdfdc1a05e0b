"""Which programs JAX lowers while a block runs."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def names_of_lowered() -> Iterator[list[str]]:
    """A list that gets the name of every jitted function, as in `jit(update)`, that is lowered in the block."""
    names: list[str] = []

    def listen(event: str, seconds: float, **facts: str | int) -> None:
        if event.endswith("/jaxpr_to_mlir_module_duration"):
            names.append(str(facts["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
