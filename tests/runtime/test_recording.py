"""Batches kept in files: what is read is what was written, and nothing else is read."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from easyrl.core.config import from_dict, to_dict
from easyrl.core.errors import UserError
from easyrl.runtime.recording import as_tree, load_recording, save_recording
from easyrl.steps.ppo_config import PPOConfig


class Inner(flax.struct.PyTreeNode):
    ids: jax.Array


class Outer(flax.struct.PyTreeNode):
    values: jax.Array
    inner: Inner


BATCH = Outer(jnp.array([0.5, jnp.nan, -jnp.inf]), Inner(np.arange(6).reshape(2, 3).T))
FACTS = {"step": 3, "config": {"lr": 0.1, "a": {"b": "ü"}}, "metrics": {"loss": float("nan"), "kl": np.float32(0.1)}}


def test_a_recording_comes_back_as_it_was(tmp_path):
    path = save_recording(tmp_path / "new" / "step-3.safetensors", BATCH, FACTS)
    assert [p.name for p in path.parent.iterdir()] == ["step-3.safetensors"]  # nothing half-written beside it
    arrays, facts = load_recording(path)
    assert facts["kind"] == "Outer" and facts["step"] == 3 and facts["config"] == FACTS["config"]
    assert facts["metrics"] == {"loss": None, "kl": float(np.float32(0.1))}
    again = as_tree(Outer, arrays)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(BATCH), again)
    assert isinstance(again.inner, Inner)


def test_infinite_flags_come_back(tmp_path):
    config = PPOConfig(cliprange_value=math.inf)
    path = save_recording(tmp_path / "x", BATCH, FACTS | {"config": to_dict(config)})
    assert from_dict(PPOConfig, load_recording(path)[1]["config"]) == config


def test_a_file_that_is_something_else_is_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("hello")
    save_file({"a": np.zeros(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(save_recording(tmp_path / "x", BATCH, FACTS).read_bytes()[:-5])
    for name in ("text", "plain.safetensors", "cut.safetensors", "nothing"):
        with pytest.raises(UserError, match=f"{name}: (cannot be read as|expected) a (recorded batch|batch recorded)"):
            load_recording(tmp_path / name)
    arrays, _ = load_recording(tmp_path / "x")
    del arrays["inner/ids"]
    with pytest.raises(UserError, match="lacks inner/ids"):
        as_tree(Outer, arrays)
