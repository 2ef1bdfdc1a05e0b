"""What is set for the platform before JAX starts: where compiled programs are kept, and how a CPU is programmed."""

import contextlib
import os
from pathlib import Path

import jax

# XLA's library of fused CPU kernels (YNNPACK) runs two kernels side by side on one thread each rather than one on both,
# which is slower for products as large as a model's (docs/performance.md). Only KNOWN versions of JAX are known to have
# the flag, and an unknown flag ends the process.
CPU_FLAGS = "--xla_cpu_experimental_ynn_fusion_type="
KNOWN = ((0, 10),)


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
