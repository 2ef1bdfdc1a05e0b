"""The digest of a model's files: another one for other weights in the same place."""

import shutil

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.hf import identity
from easyrl.hf.identity import digest_models
from easyrl.hf.refs import find_model
from tests.train_ppo.conftest import write_model


def digest(*folders, flag="--load_checkpoint_reward"):
    return digest_models([find_model(f"hf::{folder}", flag=flag) for folder in folders])["load_checkpoint_reward"]


def test_it_is_that_of_the_weights_and_of_all_models_of_a_flag(tmp_path):
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other", seed=1)
    assert digest(one) == digest(shutil.copytree(one, tmp_path / "copy")) != digest(other)
    assert len({digest(one), digest(one, other), digest(other, one)}) == 3
    assert digest_models([find_model("random::debug")]) == digest_models([find_model("random::debug")])


def test_of_a_large_file_pieces_count(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    before = digest(folder)
    path = folder / "model.safetensors"
    content = np.fromfile(path, np.uint8)
    monkeypatch.setattr(identity, "PIECE", 16)
    pieces = digest(folder)
    content[-(len(content) // 2) :] ^= 1  # half of the layers
    content.tofile(path)
    assert pieces != before and digest(folder) != pieces


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model-2.safetensors").symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"^--load_checkpoint_reward: .*model-2.safetensors: cannot be read \(No such file"
    ):
        digest(folder)
