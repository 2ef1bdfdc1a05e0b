import fnmatch
import json
from unittest.mock import Mock

import jax
import numpy as np
import pytest

import easyrl.hf.refs as refs
from easyrl.core.errors import UserError
from easyrl.core.params import num_params
from easyrl.hf.families import config_from_hf
from easyrl.hf.presets import PRESETS
from easyrl.hf.refs import Ref, find_folder, load_model, parse_ref
from easyrl.models.families import param_specs


def test_grammar():
    assert parse_ref("hf::meta-llama/Llama-2-7b-hf") == Ref("hf", "meta-llama/Llama-2-7b-hf")
    assert parse_ref("easyrl::runs/a::b") == Ref("easyrl", "runs/a::b")
    with pytest.raises(UserError, match=r"^--policy: found nothing, expected hf::DIR_OR_HUB_ID, easyrl::DIR, random::"):
        parse_ref("", "--policy")
    for wrong in ("hf::", "llama", "pickle::x", "/data/model", "::x"):
        with pytest.raises(UserError, match=r"--policy=.*: expected hf::DIR_OR_HUB_ID, easyrl::DIR, random::"):
            parse_ref(wrong, "--policy")


def test_deep_nesting_is_one_line(tmp_path):
    deep = '{"a": ' + "[" * 100_000
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(UserError, match=f"^--load_checkpoint: {tmp_path}/config.json: cannot be read as JSON"):
        refs.find_model(f"hf::{tmp_path}")
    with pytest.raises(UserError, match=r"^--load_checkpoint=random::.*: is not JSON"):
        refs.find_model(f"random::{deep}")


def test_stop_ids_are_in_the_vocabulary(folder):
    directory = folder()
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    found = r"generation_config.json: eos_token_id is \[2, 99999\], expected token ids from 0 to"
    with pytest.raises(UserError, match=f"^--load_checkpoint: {directory}/{found}"):
        refs.find_model(f"hf::{directory}")


def test_folder(folder, make, mesh):
    directory = folder()
    loaded = load_model(f"hf::{directory}", mesh, head="lm", compute={"remat": "full"})
    assert loaded.directory == directory
    assert loaded.stop_ids == ()
    assert loaded.cfg.remat == "full"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, make()[1])


def test_random(tiny, tmp_path, mesh, monkeypatch):
    """From JSON, a file or a folder, what is asked for is what is initialised."""
    monkeypatch.setattr(refs, "init_params", lambda *args: args)  # which has tests of its own, and compiles for long
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    for target in (json.dumps(tiny()), tmp_path / "config.json", tmp_path):
        loaded = load_model(f"random::{target}", mesh, head="value", dtype="bfloat16", seed=1)
        assert loaded.cfg == config_from_hf(tiny(), "x")
        assert (loaded.directory, loaded.stop_ids) == (None, ())
        specs, key, dtype, on = loaded.params
        assert jax.tree.map(lambda s: s.shape, specs) == jax.tree.map(
            lambda s: s.shape, param_specs(loaded.cfg, "value")
        )
        assert (key, dtype, on) == (jax.random.key(1), "bfloat16", mesh)


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("llama-7b", 6.738), ("llama2-7b", 6.738), ("llama2-13b", 13.016), ("llama2-70b", 68.977), ("llama3.1-8b", 8.030),
     ("llama3.1-70b", 70.554), ("1m", 0.00098854), ("gpt2", 0.12444), ("gpt2-medium", 0.35482),
     ("gpt2-large", 0.77403), ("gpt2-xl", 1.5576), ("bloom-560m", 0.55921), ("bloom-7b1", 7.0690)],
)  # fmt: skip
def test_presets_have_the_published_sizes(preset, billions):
    cfg = config_from_hf(PRESETS[preset], preset)
    assert num_params(param_specs(cfg, "lm")) == pytest.approx(billions * 1e9, rel=1e-3)


def test_every_preset_is_a_configuration():
    for name, raw in PRESETS.items():
        assert config_from_hf(raw, name).num_layers == raw.get("num_hidden_layers", raw.get("n_layer"))


WHOLE = {"config.json", "tokenizer.json", "model.safetensors"}
SHARDS = {"config.json", "tokenizer.json", "model.safetensors.index.json", *(f"model_0{n}.safetensors" for n in "12")}
SECOND_COPIES = {"pytorch_model.bin", "pytorch_model_01.bin", "consolidated.safetensors", "onnx/model.onnx"}


@pytest.mark.parametrize("needed", [WHOLE, SHARDS])
def test_what_is_fetched_of_the_hub(monkeypatch, tmp_path, needed):
    """Shards by the names that the index has for them, BLOOM's say; pickles never, whatever it names."""
    there = needed | SECOND_COPIES
    index = {"weight_map": {name: name for name in [*there, "*", "[a-z]*.safetensors"] if "/" not in name}}
    index["weight_map"].pop("consolidated.safetensors")

    def snapshot_download(repo, allow_patterns):
        assert repo == "org/model-1b"
        for name in there:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text(json.dumps(index))
        return str(tmp_path)

    monkeypatch.setattr(refs, "snapshot_download", snapshot_download)
    assert find_folder("org/model-1b") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == needed


@pytest.mark.parametrize("error", [OSError("reset"), RuntimeError("peer closed\nthe connection"), ValueError("<html>")])
def test_whatever_goes_wrong_at_the_hub_is_one_line(monkeypatch, error):
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(refs, name, Mock(side_effect=error))
    for find in (refs.find_model, refs.find_config):
        with pytest.raises(
            UserError, match=r"^--x=hf::org/model: no such folder, and not to be had from the Hub \("
        ) as got:
            find("hf::org/model", flag="--x")
        assert f"({type(error).__name__}: {str(error)[:4]}" in str(got.value) and "\n" not in str(got.value)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hf::/no/such/folder", "--policy=hf::/no/such/folder: no such folder"),
        ("hf::runs/missing/hf", "--policy=hf::runs/missing/hf: no such folder"),
        ("hf::org/not-on-this-machine", "no such folder, and not to be had from the Hub"),
        ("easyrl::runs/x", "--policy=easyrl::runs/x: found no whole checkpoint there"),
        ("random::huge", "--policy=random::huge: expected a config.json or one of debug, 1m,"),
        ("random::{", "--policy=random::{: is not JSON"),
        ("params::runs/streaming_params", "--policy=params::runs/streaming_params: expected a config.json or one of"),
        ("params::runs/streaming_params@debug", "--policy: runs/streaming_params: no such file"),
        ("params::runs/streaming_params@gpt2", "model_type is 'gpt2', expected llama, the only one"),
        ('random::{"model_type": "llama"}', "hidden_size is missing, expected a whole number"),
    ],
)
def test_errors(ref, message, mesh):
    with pytest.raises(UserError) as error:
        load_model(ref, mesh, head="lm", flag="--policy")
    assert message in str(error.value)
