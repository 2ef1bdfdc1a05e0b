"""What every test stands on: eight virtual CPU devices, child processes that find this checkout, optional real data."""

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xla import QUICK, keep_programs_of_one_device

# JAX keeps millions of small objects, which Python would go through again and again: a tenth of the tests' time.
gc.set_threshold(100_000, 20, 20)

REPO = Path(__file__).resolve().parents[1]
DEVICES = 8

# All of this is fixed the moment JAX starts, so it is set before any test module can import it. JAX_PLATFORMS given
# from outside stands: `JAX_PLATFORMS=cuda pytest -m hardware` runs the hardware tests.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = f"--xla_force_host_platform_device_count={DEVICES} {QUICK}"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
# Many tests build the same small program anew: it is compiled once a run, and not again in the next one.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
# The source lines of operations, which no test reads, take a tenth of the tests' time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Nothing a test does may reach for a network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "run the models of all tests, where they may choose how to attend, in this way (blocks or splash)"
    parser.addoption("--attention", choices=("blocks", "splash"), help=help)


def pytest_configure(config: pytest.Config) -> None:
    from easyrl.core.platform import give_virtual_devices_threads  # imports JAX: the environment had to be set before

    keep_programs_of_one_device()
    give_virtual_devices_threads()
    if way := config.getoption("--attention"):
        from tests import attention  # starts JAX

        attention.use(way)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data sets, if any: $EASYRL_TEST_DATA, or shared/data beside the checkout."""
    given = os.environ.get("EASYRL_TEST_DATA")
    path = Path(given) if given else REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs real models and data: {path} is not there, and EASYRL_TEST_DATA can name another folder")
    return path


@pytest.fixture
def started() -> None:
    """JAX has started with its eight devices: a plan for fewer would start it with as many as it is for."""
    import jax

    jax.devices()


@pytest.fixture
def stems(request) -> None:
    """Skips a test of packed rows with stems where the way to attend knows of none."""
    if request.config.getoption("--attention") == "splash":
        pytest.skip("the splash kernel knows of no stems")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 3 MB, made of memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root and a system that lets it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
