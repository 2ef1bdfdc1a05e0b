"""Settings made before JAX starts leave what the environment says alone."""

import os
from pathlib import Path

import jax
import pytest

from easyrl.core.errors import UserError
from easyrl.core.files import cache_folder
from easyrl.core.platform import CPU_FLAGS, prepare_platform


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The settings of JAX and of the environment as they were."""
    before = (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    monkeypatch.setattr("easyrl.core.platform.KNOWN", (jax.__version_info__[:2],))
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


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
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    prepare_platform()
    assert os.environ["XLA_FLAGS"] == "--xla_something"
    monkeypatch.delenv("XLA_FLAGS")
    prepare_platform()
    assert os.environ["XLA_FLAGS"] == CPU_FLAGS
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr("easyrl.core.platform.KNOWN", ())
    prepare_platform()
    assert "XLA_FLAGS" not in os.environ
