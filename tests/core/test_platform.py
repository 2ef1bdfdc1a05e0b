"""Settings made before JAX starts leave what the environment says alone."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from easyrl.core.errors import UserError
from easyrl.core.files import cache_folder
from easyrl.core.platform import CPU_FLAGS, THREADS_A_DEVICE, prepare_platform, set_precision


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The settings of JAX and of the environment as they were."""
    names = (
        "compilation_cache_dir", "persistent_cache_min_compile_time_secs", "enable_compilation_cache",
        "default_matmul_precision",
    )  # fmt: skip
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")  # nothing of this process's virtual devices
    monkeypatch.setattr("easyrl.core.platform.KNOWN", (jax.__version_info__[:2],))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare_platform()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "easyrl" / "jax")


def test_without_a_home_there_is_no_cache(monkeypatch):
    def nobody(_):
        raise KeyError("no such user")

    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "EASYRL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    before = jax.config.jax_compilation_cache_dir
    prepare_platform()
    assert jax.config.jax_compilation_cache_dir == before
    with pytest.raises(UserError, match=r"^--train_dataset.cache_dir or EASYRL_CACHE: expected a folder"):
        cache_folder("", "train_dataset.cache_dir")
    assert cache_folder("elsewhere") == Path("elsewhere")


def test_a_cache_that_the_environment_names_stays(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    before = jax.config.jax_compilation_cache_dir
    prepare_platform()
    assert jax.config.jax_compilation_cache_dir == before


def test_flags_are_set_where_none_are_given_and_the_version_knows_them(monkeypatch):
    prepare_platform()
    assert os.environ["XLA_FLAGS"] == "--xla_something"
    monkeypatch.delenv("XLA_FLAGS")
    prepare_platform()
    assert os.environ["XLA_FLAGS"] == CPU_FLAGS
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr("easyrl.core.platform.KNOWN", ())
    prepare_platform()
    assert "XLA_FLAGS" not in os.environ


def test_virtual_devices_have_threads_to_spare_and_keep_no_programs(monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_something --xla_force_host_platform_device_count=1")
    prepare_platform()
    assert "PJRT_NPROC" not in os.environ
    assert jax.config.jax_enable_compilation_cache
    monkeypatch.setenv("XLA_FLAGS", "--xla_something --xla_force_host_platform_device_count=16 --xla_more")
    prepare_platform()
    assert int(os.environ["PJRT_NPROC"]) >= THREADS_A_DEVICE * 16
    assert not jax.config.jax_enable_compilation_cache
    monkeypatch.setenv("PJRT_NPROC", "3")
    prepare_platform()
    assert os.environ["PJRT_NPROC"] == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_pool_of_threads_is_as_large_as_was_asked_for():
    show = (
        "from easyrl.core.platform import prepare_platform; prepare_platform()\n"
        "import jax, os; jax.devices(); print(len(os.listdir('/proc/self/task')))"
    )
    flags = "--xla_force_host_platform_device_count=20"
    env = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"} | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    threads = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True, check=True).stdout
    assert int(threads) >= THREADS_A_DEVICE * 20


def test_only_a_run_in_float32_multiplies_in_float32_everywhere(monkeypatch):
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    jax.config.update("jax_default_matmul_precision", None)
    set_precision("bf16")
    assert jax.config.jax_default_matmul_precision is None
    set_precision("fp32")
    assert jax.config.jax_default_matmul_precision == "highest"
    jax.config.update("jax_default_matmul_precision", None)
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "tensorfloat32")
    set_precision("fp32")
    assert jax.config.jax_default_matmul_precision is None
