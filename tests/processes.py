"""Scripts run by several real processes that meet on 127.0.0.1, each with virtual devices of its own."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.source import REPO
from tests.xla import QUICK


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    status: int
    out: str
    err: str


class Processes:
    """`python -m MODULE FLAGS`, started `count` times; as a context, whatever still runs at its end is killed.

    Every process has `devices` virtual devices. With `count` 1 the script is started as anyone would, alone.
    """

    def __init__(self, module: str, flags: dict, count: int, devices: int, folder: Path, env: dict | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"initialize_jax_distributed": True, "coordinator_address": f"127.0.0.1:{port}"}
        xla = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        environment = {**os.environ, "XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **(env or {})}
        environment.pop("PJRT_NPROC", None)  # was chosen for the devices of this process
        folder.mkdir(parents=True, exist_ok=True)
        self.started = []
        for number in range(count):
            mine = together | {"num_processes": count, "process_id": number} if count > 1 else {}
            argv = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
            argv += [f"--jax_distributed.{name}={value}" for name, value in mine.items()]
            out, err = self._files(folder, number)
            with out.open("w") as out_file, err.open("w") as err_file:
                command = [sys.executable, "-m", module, *argv]
                self.started.append(
                    subprocess.Popen(command, stdout=out_file, stderr=err_file, cwd=REPO, env=environment)
                )
        self._folder = folder

    @staticmethod
    def _files(folder: Path, number: int) -> tuple[Path, Path]:
        return folder / f"out{number}.txt", folder / f"err{number}.txt"

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    def wait(self, seconds: float) -> list[Ended]:
        """How they have all ended, within so many seconds from now."""
        deadline = time.monotonic() + seconds
        ended = []
        for number, process in enumerate(self.started):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {number} still runs after {seconds} s: {self.told()}") from None
        for number, process in enumerate(self.started):
            out, err = (path.read_text(errors="replace") for path in self._files(self._folder, number))
            ended.append(Ended(process.returncode, out, err))
        return ended

    def told(self) -> str:
        """The end of what each process has written so far, for a failing test."""
        files = [self._files(self._folder, number)[1] for number in range(len(self.started))]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


def run_processes(
    module: str, flags: dict, count: int, devices: int, folder: Path, seconds: float = 240
) -> list[Ended]:
    """Starts the processes and waits for them; each must end with status 0."""
    with Processes(module, flags, count, devices, folder) as processes:
        ended = processes.wait(seconds)
        assert [process.status for process in ended] == [0] * count, processes.told()
    return ended


def told(text: str) -> list[str]:
    """The lines of a process, without those of the library that carries messages between CPUs.

    Its threads write at once, so one of its lines may have lost its start, or all but its end, to another.
    """
    lines = [line for line in text.splitlines() if line]
    return [line for line in lines if "peer ranks" not in line and not line.startswith("[Gloo]")]
