"""What is set for the platform before JAX starts: where compiled programs are kept, how a CPU is programmed, and how
exactly matrices are multiplied.
"""

import contextlib
import os
import re
from pathlib import Path

import jax

# XLA's library of fused CPU kernels (YNNPACK) runs two kernels side by side on one thread each rather than one on both,
# which is slower for products as large as a model's (docs/performance.md). KNOWN are the versions of JAX that have the
# flag and gain by it: 0.12 is faster with the library, and an unknown flag ends the process.
CPU_FLAGS = "--xla_cpu_experimental_ynn_fusion_type="
KNOWN = ((0, 10),)

# XLA runs all virtual CPU devices on one pool, of as many threads as there are devices. A device can need more than one
# (a layer's collective and one beside the loop), and where all wait for members that find no thread, the run is stuck.
THREADS_A_DEVICE = 4
VIRTUAL_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def prepare_platform() -> None:
    """Settings for the process, as far as the environment has not made them: call it before the first device is used.

    Compiled programs are kept in ~/.cache/easyrl/jax (JAX_COMPILATION_CACHE_DIR says otherwise; empty, or without a
    home: not at all), so a second start does not compile again. XLA_FLAGS that are given stay as they are.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RuntimeError):  # there is no home
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easyrl" / "jax"
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.__version_info__[:2] in KNOWN:
        os.environ.setdefault("XLA_FLAGS", CPU_FLAGS)
    if give_virtual_devices_threads():
        keep_no_programs()


def set_precision(dtype: str) -> None:
    """Where a run computes in float32 (`dtype`: its --dtype), has products of matrices be those of float32 numbers.

    By default TPUs round what they multiply to bfloat16, and GPUs to TensorFloat-32. JAX_DEFAULT_MATMUL_PRECISION stays
    as it is given; in bfloat16 nothing is set, because TPU kernels refuse it.
    """
    if dtype == "fp32" and "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ:
        jax.config.update("jax_default_matmul_precision", "highest")


def give_virtual_devices_threads() -> bool:
    """Makes XLA's pool of threads large enough where XLA_FLAGS asks for virtual CPU devices; whether it does."""
    virtual = VIRTUAL_DEVICES.search(os.environ.get("XLA_FLAGS", ""))
    if virtual is None or int(virtual[1]) == 1:
        return False
    threads = max(os.cpu_count() or 1, THREADS_A_DEVICE * int(virtual[1]))
    os.environ.setdefault("PJRT_NPROC", str(threads))
    return True


def keep_no_programs() -> None:
    """Has nothing read from or written to the cache of compiled programs: for runs on several CPU devices, and plans.

    A CPU program that XLA reads back has lost the order of its collectives (jaxlib 0.10), and devices that come to two
    of them in different orders wait for each other for ever.
    """
    jax.config.update("jax_enable_compilation_cache", False)
