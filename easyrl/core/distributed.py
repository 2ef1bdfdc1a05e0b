"""Several processes as one run: how they meet, what they agree on, and how they part.

Every process runs the same script with the same flags on the same data, and computes the same on the host. Process 0
alone writes, prints and calls what may answer differently each time it is asked (`from_first`). Nothing here does
anything in a run of one process.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easyrl.core.config import flag, flag_values
from easyrl.core.errors import RunFailed, RunStopped, UserError, tell
from easyrl.core.platform import keep_no_programs
from easyrl.core.sharding import fetch

T = TypeVar("T")

GROUP = "--jax_distributed"
MEETING_SECONDS = 300  # for all processes to start
SILENCE_SECONDS = 60  # after which a process counts as dead, and the others are ended
FAILING_SECONDS = 20  # that a process with an error waits for the others to have theirs
ENDING_SECONDS = 3600  # that a process which is done waits for the others: process 0 may have much to write


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; as a context, the time in which they are joined."""

    initialize_jax_distributed: bool = flag(
        False, "Run as one of several processes. On TPU pods and under srun they find each other without any flag."
    )
    coordinator_address: str = flag("", "Address and free port of process 0, as in 10.0.0.1:1234. Empty: detected.")
    num_processes: int = flag(0, "Processes in all. 0: detected.", least=0)
    process_id: int = flag(-1, "Number of this process, from 0. -1: detected.", least=-1)
    local_device_ids: str = flag("", "Devices of this machine that this process uses, as in 0,1. Empty: detected.")

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value != type(self).__dict__[name]}
        given.pop("initialize_jax_distributed", None)
        if given and not self.initialize_jax_distributed:
            name, value = next(iter(given.items()))
            raise UserError(f"{GROUP}.{name}={value}: needs {GROUP}.initialize_jax_distributed, which is not given")
        if self.num_processes and self.process_id >= self.num_processes:
            raise UserError(
                f"{GROUP}.process_id={self.process_id}: expected 0 to {self.num_processes - 1}, "
                f"one less than {GROUP}.num_processes"
            )
        host, _, port = self.coordinator_address.rpartition(":")
        is_port = port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
        if self.coordinator_address and not (host and is_port):
            raise UserError(
                f"{GROUP}.coordinator_address={self.coordinator_address}: expected ADDRESS:PORT, "
                "with a port from 1 to 65535"
            )
        self._devices()

    @contextlib.contextmanager
    def joined(self, config: Any) -> Iterator[None]:
        """Joins the other processes, if there are any, and parts from them when the block ends.

        `config` is that of the script, which must be the same everywhere. A block that raises ends the process, once it
        has told why: with the status that `core.command_line.run` promises, and without the others if they do not end
        too. They then end within SILENCE_SECONDS, when JAX misses this one. Raises UserError when the processes do not
        meet.
        """
        self._start()
        if not several():
            yield
            return
        if jax.default_backend() == "cpu":
            keep_no_programs()
        try:
            check_same_flags(config)
            yield
        except BaseException as error:
            _part(error)
        _everyone_ends(ENDING_SECONDS)

    def _start(self) -> None:
        if jax.distributed.is_initialized() or not (self.initialize_jax_distributed or _among_others()):
            return
        if self.coordinator_address and self.process_id == 0:
            self._check_port()
        try:
            jax.distributed.initialize(
                coordinator_address=self.coordinator_address or None,
                num_processes=self.num_processes or None,
                process_id=None if self.process_id < 0 else self.process_id,
                local_device_ids=self._devices(),
                initialization_timeout=MEETING_SECONDS,
                heartbeat_timeout_seconds=SILENCE_SECONDS,
            )
        except (ValueError, OSError) as error:  # JAX has found no cluster
            if self.initialize_jax_distributed:
                raise UserError(f"{GROUP}.initialize_jax_distributed: {error}") from None
        except RuntimeError as error:
            raise UserError(f"{GROUP}: the processes have not met: {str(error).splitlines()[0]}") from None
        # JAX's own answer to SIGTERM is to go on. Until there is something to save (runtime/interrupt.py), it ends us.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _check_port(self) -> None:
        """Raises UserError when the port of process 0 cannot be had, with which JAX would crash."""
        try:
            # As JAX does, on all addresses.
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            port = int(self.coordinator_address.rpartition(":")[2])
            socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise UserError(
                f"{GROUP}.coordinator_address={self.coordinator_address}: expected a free port: {reason}"
            ) from None

    def _devices(self) -> list[int] | None:
        try:
            return [int(number) for number in self.local_device_ids.split(",")] if self.local_device_ids else None
        except ValueError:
            raise UserError(
                f"{GROUP}.local_device_ids={self.local_device_ids}: expected numbers, separated by commas"
            ) from None


def _among_others() -> bool:
    """Whether this looks like one of several processes that JAX can find by itself: on a TPU pod, or under srun."""
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]  # JAX adds its options at run time
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "tpu" in platforms.split(",")


def several() -> bool:
    """Whether the run has more than one process. Starts no device where there is one."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which writes and prints. Starts no device where there is one process."""
    return not several() or jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on process 0."""
    if is_first():
        print(text, flush=True)


def quiet() -> bool | None:
    """`disable` of a tqdm bar that is only for people: shown on process 0, in a terminal."""
    return None if is_first() else True


def from_first(compute: Callable[[], T]) -> T:
    """What `compute()` gives on process 0, on every process; the others do not call it.

    For what may differ from process to process or must happen once. The result is numbers (exact, also float64), text,
    or lists and dicts of these; a UserError is raised everywhere.
    """
    if not several():
        return compute()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": compute()}
        except UserError as error:
            outcome = {"error": str(error)}
    text = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    outcome = json.loads(multihost_utils.broadcast_one_to_all(_padded(text[:size], size)).tobytes()[:size])
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def broadcast(tree):
    """Arrays of process 0 as numpy arrays on every process, which must have some of these shapes and types."""
    if not several():
        return tree
    return jax.tree.map(np.array, multihost_utils.broadcast_one_to_all(tree))


def meet(name: str) -> None:
    """Waits until every process has come to the place called `name`."""
    if several():
        multihost_utils.sync_global_devices(name)


def anywhere(condition: bool) -> bool:
    """Whether `condition` holds on any process."""
    return any(gather_texts("x" if condition else ""))


def gather_texts(text: str) -> list[str]:
    """The `text` of every process, in their order, on every process."""
    if not several():
        return [text]
    encoded = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
    found = multihost_utils.process_allgather(_padded(encoded, int(sizes.max())))
    return [row.tobytes()[:size].decode() for row, size in zip(found, sizes, strict=True)]


class Ballot:
    """A wish of any process becomes what all do, at the same call, and nobody waits for a device.

    `ballot(wish)` gives the greatest wish of all processes, of the call before: the votes of this one are counted on
    the devices, behind what they have been given to do. In a run of one process it gives `wish`.
    """

    def __init__(self) -> None:
        self._votes: jax.Array | None = None
        if several():
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._each = NamedSharding(mesh, PartitionSpec("devices"))
            self._count = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wish: int) -> int:
        if not several():
            return wish
        shape = (jax.device_count(),)
        mine = jax.make_array_from_callback(shape, self._each, lambda _: np.array([wish], np.int32))
        votes, self._votes = self._votes, self._count(mine)
        return 0 if votes is None else int(fetch(votes))


def _padded(text: bytes, size: int) -> np.ndarray:
    """The bytes with zeros behind them, up to a power of two: every length would be a program of its own."""
    padded = np.zeros(max(256, 1 << (size - 1).bit_length()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return padded


def check_same_flags(config: Any) -> None:
    """Raises UserError, the same everywhere, when a process has another value of a flag than process 0."""
    flags = {name: value for name, value in flag_values(config).items() if not name.startswith("jax_distributed.")}
    first, *others = map(json.loads, gather_texts(json.dumps(flags)))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                found = f"process 0 has {value!r}, process {number} has {other.get(name)!r}"
                raise UserError(f"--{name}: {found}, expected the same")


def check_same(what: str, fingerprint: str) -> None:
    """Raises UserError, the same everywhere, when a process has another `fingerprint` of something than process 0."""
    first, *others = gather_texts(fingerprint)
    for number, other in enumerate(others, 1):
        if other != first:
            raise UserError(f"{what}: process {number} reads something else than process 0, expected the same")


def _part(error: BaseException) -> NoReturn:
    """Ends this process: with the others if they end too, otherwise without them."""
    if not isinstance(error, UserError | RunFailed | RunStopped | KeyboardInterrupt | SystemExit):
        traceback.print_exception(error)
    status = tell(error, show=is_first() or not isinstance(error, RunStopped))
    waits: dict[type[BaseException], int] = {
        UserError: FAILING_SECONDS, RunFailed: FAILING_SECONDS, RunStopped: ENDING_SECONDS,
    }  # fmt: skip
    patience = waits.get(type(error), 0)
    if patience and _everyone_ends(patience):
        raise SystemExit(status)
    print(f"easyrl: process {jax.process_index()} of {jax.process_count()} ends before the others", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what Python does at its end would wait for the others


def _everyone_ends(seconds: float) -> bool:
    """Waits until every process is here; False when they have not come in time."""
    # JAX has no public way to wait for processes without a collective, which the others may never join.
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None  # there are several processes
    try:
        client.wait_at_barrier("easyrl_end", int(1000 * seconds))
    except Exception:
        return False
    return True
