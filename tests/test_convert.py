"""convert: every family and head, both formats and back, what --verify sees, and what is wrong."""

import json
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyrl import convert
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.tokenizer import load_tokenizer
from easyrl.hf.export import export_model
from easyrl.hf.refs import load_model
from easyrl.hf.safetensors_io import WEIGHTS
from easyrl.hf.verify import has_torch
from tests.hf.test_easylm import easylm_params, write_stream
from tests.offline import run_script
from tests.tiny import draw_params, tiny_bloom, tiny_config, tiny_gpt2
from tests.train_ppo.conftest import make_tokenizer

CONFIGS = {"llama": tiny_config, "gpt2": tiny_gpt2, "bloom": tiny_bloom}
SMALL = {"vocab_size": 104, "num_layers": 1}
DIFFERENCE = "verified: largest difference "


@pytest.fixture
def model(tmp_path):
    """`model(family, head)`: a folder to convert, its parameters in float32 unless told otherwise."""

    def write(family="llama", head="lm", dtype=None, pad_id=5, **changes):
        cfg = CONFIGS[family](**{**SMALL, **changes})
        tokenizer = make_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
        generation = {"temperature": "0.5", "top_k": None, "eos_token_id": [0, 3], "transformers_version": "4.40.0"}
        return export_model(
            tmp_path / "source", cfg, draw_params(cfg, head, 0.2), head,
            tokenizer=tokenizer, dtype=dtype, generation_config=generation if head == "lm" else None,
            config_fields={"pad_token_id": pad_id, "reward_std": 2.5} if head == "reward" else None,
        )  # fmt: skip

    return write


def run(source, target, **flags):
    run_script(convert, {"load_checkpoint": source, "output_dir": target, "mesh_dim": "1,1,1", **flags})


def params_of(ref, head, dtype="float32"):
    return load_model(ref, make_mesh("1,1,1", jax.devices()[:1]), head=head, dtype=dtype).params


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("head", ["lm", "reward", "value"])
@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back(model, tmp_path, capsys, family, head):
    """A folder to a checkpoint and back: the same weights, texts and class, and each step verified."""
    source = model(family, head)
    run(f"hf::{source}", tmp_path / "run", format="easyrl", verify=True)
    run(f"easyrl::{tmp_path / 'run'}", tmp_path / "back", verify=True)
    assert capsys.readouterr().out.count(DIFFERENCE) == 2
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == load_file(source / WEIGHTS).keys()
    assert_same(load_file(tmp_path / "back" / WEIGHTS), load_file(source / WEIGHTS))
    for name in ("config.json", "tokenizer.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (source, tmp_path / "back"))
        assert before == {key: value for key, value in after.items() if key in before}, name
    if head == "lm":  # as it is, whatever it says
        before, after = ((folder / "generation_config.json").read_text() for folder in (source, tmp_path / "back"))
        assert before == after


def test_the_format_is_kept_or_named(model, tmp_path):
    source = model(dtype="bfloat16")
    run(f"hf::{source}", tmp_path / "same")
    run(f"hf::{source}", tmp_path / "run", format="easyrl")
    run(f"easyrl::{tmp_path / 'run'}", tmp_path / "back")
    run(f"hf::{source}", tmp_path / "wide", dtype="fp32")
    folders = [tmp_path / name for name in ("same", "back", "wide")]
    names = [{x.dtype.name for x in load_file(folder / WEIGHTS).values()} for folder in folders]
    assert names == [{"bfloat16"}, {"bfloat16"}, {"float32"}]
    texts = [json.loads((folder / "config.json").read_text())["torch_dtype"] for folder in folders]
    assert texts == ["bfloat16", "bfloat16", "float32"]
    assert load_tokenizer(str(tmp_path / "back")).chat_template.keys() == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("family", "buffer"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.0.attn.bias")],
)
def test_a_buffer_decides_no_format(model, tmp_path, family, buffer):
    source = model(family, dtype="bfloat16")
    weights = load_file(source / WEIGHTS)
    save_file(weights | {buffer: np.ones(4, np.float32)}, source / WEIGHTS, metadata={"format": "pt"})
    run(f"hf::{source}", tmp_path / "out")
    assert {x.dtype.name for x in load_file(tmp_path / "out" / WEIGHTS).values()} == {"bfloat16"}


def test_a_reward_model_becomes_a_value_model(model, tmp_path):
    source = model("gpt2", "reward")
    run(f"hf::{source}", tmp_path / "value", head="value")
    written = load_file(tmp_path / "value" / WEIGHTS)
    np.testing.assert_array_equal(written["classifier.weight"], load_file(source / WEIGHTS)["score.weight"])
    assert json.loads((tmp_path / "value" / "config.json").read_text())["architectures"] == [
        "GPT2ForTokenClassification"
    ]


def pad_of(folder):
    return json.loads((folder / "config.json").read_text())["pad_token_id"]


def test_a_reward_model_gets_no_pad_token_from_its_tokenizer(model, tmp_path):
    """It would read the score of a text that ends there before the end."""
    source = model(head="reward", pad_id=None, num_layers=2)
    run(f"hf::{source}", tmp_path / "hf", verify=True)
    run(f"hf::{source}", tmp_path / "run", format="easyrl")
    run(f"easyrl::{tmp_path / 'run'}", tmp_path / "back")
    write_stream(tmp_path / "streaming_params", easylm_params(source))
    run(f"params::{tmp_path / 'streaming_params'}@{source}", tmp_path / "from_easylm", tokenizer=source)
    folders = [tmp_path / "hf", tmp_path / "run" / "checkpoints" / "models" / "reward"]
    for folder in (*folders, tmp_path / "back", tmp_path / "from_easylm"):
        assert pad_of(folder) is None and load_tokenizer(str(folder)).pad_token_id == 0


@pytest.mark.parametrize("format", ["hf", "easyrl"])
def test_a_pad_token_near_the_end_of_the_vocabulary(model, tmp_path, capsys, format):
    """As in a vocabulary of 32,002 with two tokens added for ChatML and a pad token before them."""
    run(f"hf::{model(head='reward', pad_id=102)}", tmp_path / "out", format=format, verify=True)
    assert DIFFERENCE in capsys.readouterr().out


def test_an_easylm_file(model, tmp_path, capsys):
    source = model(num_layers=2)
    write_stream(tmp_path / "streaming_params", easylm_params(source))
    run(f"params::{tmp_path / 'streaming_params'}@{source}", tmp_path / "out", verify=True)
    assert DIFFERENCE in capsys.readouterr().out
    assert_same(load_file(tmp_path / "out" / WEIGHTS), load_file(source / WEIGHTS))


def test_a_random_model(tmp_path):
    run("random::bloom-debug", tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert_same(params_of(f"hf::{tmp_path / 'out'}", "lm"), params_of("random::bloom-debug", "lm"))


@pytest.mark.parametrize(("flags", "head"), [({"dtype": "bf16"}, "lm"), ({"head": "value"}, "reward")])
def test_a_checkpoint_of_another_format_or_head_is_verified(model, tmp_path, capsys, flags, head):
    """The folder it came from computes something else."""
    run(f"hf::{model(head=head)}", tmp_path / "run", format="easyrl", verify=True, **flags)
    assert f"{DIFFERENCE}0," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "head", "more"),
    [
        ("gpt2", "lm", {"transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}),
        ("llama", "reward", {"lm_head.weight": np.ones((104, 16), np.float32), "score.bias": np.zeros(1, np.float32)}),
    ],
)
def test_what_nobody_reads_in_the_source_is_no_failure(model, tmp_path, capsys, family, head, more):
    source = model(family, head)
    save_file(load_file(source / WEIGHTS) | more, source / WEIGHTS, metadata={"format": "pt"})
    run(f"hf::{source}", tmp_path / "run", format="easyrl", verify=True)
    assert DIFFERENCE in capsys.readouterr().out


def test_verify_sees_a_pad_token(model, tmp_path, monkeypatch):
    """Of what was written: the tokenizer's is in config.json."""
    source, write = model(head="reward"), convert.write_transformers

    def write_wrong(*arguments):
        write(*arguments)
        path = tmp_path / "out" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 0}))

    monkeypatch.setattr(convert, "write_transformers", write_wrong)
    for torch in (True, False):
        monkeypatch.setattr(convert, "has_torch", lambda torch=torch: torch and has_torch())
        with pytest.raises(RunFailed, match=r"--verify: largest difference .* expected at most 0\.0001"):
            run(f"hf::{source}", tmp_path / "out", verify=True)


def test_verify_sees_a_change(model, tmp_path, monkeypatch):
    """Of what was written: one weight is another."""
    source, write = model(), convert.write_transformers

    def write_wrong(*arguments):
        write(*arguments)
        weights = load_file(tmp_path / "out" / WEIGHTS)
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.5
        save_file(weights, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})

    monkeypatch.setattr(convert, "write_transformers", write_wrong)
    with pytest.raises(RunFailed, match=r"--verify: largest difference .* expected at most 0\.0001"):
        run(f"hf::{source}", tmp_path / "out", verify=True)
    monkeypatch.setattr(convert, "has_torch", lambda: False)
    with pytest.raises(RunFailed, match=r"from what was written, read back: expected at most 0\.0001"):
        run(f"hf::{source}", tmp_path / "out", verify=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output_dir": ""}, "--output_dir: found nothing, expected a folder"),
        ({"load_checkpoint": ""}, "--load_checkpoint: found nothing, expected a model"),
        ({"load_checkpoint": "hf::nowhere/at/all"}, "--load_checkpoint=hf::nowhere/at/all: no such folder"),
        ({"head": "reward"}, "score.weight is missing, expected a reward model's head"),
        ({"tokenizer": "nowhere/at/all"}, "--tokenizer=nowhere/at/all: found"),
    ],
)
def test_what_is_wrong_is_one_line(model, tmp_path, flags, message):
    with pytest.raises(UserError) as caught:
        run(**{"source": flags.pop("load_checkpoint", f"hf::{model()}"),
               "target": flags.pop("output_dir", tmp_path / "out"), **flags})  # fmt: skip
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["hf", "easyrl"])
@pytest.mark.parametrize("place", ["/dev/null/x", "/dev/null/x/y", "/proc/xx"])
def test_a_place_that_cannot_be_written_is_known_before_anything_is_read(monkeypatch, format, place):
    monkeypatch.setattr(convert, "find_model", None)
    with pytest.raises(UserError, match=rf"^--output_dir={place}: cannot be written \("):
        run("hf::nowhere", place, format=format)


def test_a_link_and_the_working_folder_are_places(model, tmp_path, monkeypatch):
    """What a link names is replaced, also a second time, when the first has another name; the link stays."""
    source = model()
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "large" / "disk")
    for _ in range(2):
        run(f"hf::{source}", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large" / "disk" / WEIGHTS).exists()
    assert {path.name for path in (tmp_path / "large").iterdir()} == {"disk", "disk.1"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--output_dir: .*: holds files that are not an earlier export"):
        run("random::bloom-debug", ".")


def test_a_disk_that_fails_is_one_line(model, tmp_path, monkeypatch):
    source = model()
    monkeypatch.setattr("easyrl.hf.export.write_checkpoint", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"^--output_dir=.*out: cannot be written \(No space left on device\)"):
        run(f"hf::{source}", tmp_path / "out")


@pytest.mark.parametrize("format", ["hf", "easyrl"])
def test_what_is_there_already_stays(model, tmp_path, format):
    source = model()
    place = tmp_path / "out" / ("checkpoints" if format == "easyrl" else "")
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("chapter 1")
    with pytest.raises(UserError, match="holds files that are not an earlier export"):
        run(f"hf::{source}", tmp_path / "out", format=format)
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("ref", "output_dir", "format"),
    [
        ("hf::source", "source", "hf"),
        ("hf::link", "source", "hf"),
        ("hf::source", "link", "hf"),
        ("hf::source", "source", "easyrl"),
        ("hf::source/inner", "source", "hf"),
        ("easyrl::run", "run", "hf"),
        ("easyrl::run", "run", "easyrl"),
        ("easyrl::run/checkpoints/0", "run", "easyrl"),
        ("params::source/streaming_params@easylm-7b", "source", "hf"),
        ("params::streaming_params@source", "source", "hf"),
        ("params::streaming_params@source/config.json", "source", "hf"),
    ],
)
def test_a_model_is_not_written_where_it_lies(tmp_path, monkeypatch, ref, output_dir, format):
    """In one line that names both flags, before anything is read."""
    monkeypatch.setattr(convert, "find_model", None)
    monkeypatch.chdir(tmp_path)
    for folder in ("source/inner", "run/checkpoints/0"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("source/config.json", "source/streaming_params", "streaming_params"):
        (tmp_path / file).write_text('{"trained_with": "easyrl"}')
    (tmp_path / "link").symlink_to("source")
    message = f"--output_dir={output_dir}: is where --load_checkpoint={ref} lies, expected another folder"
    with pytest.raises(UserError, match=f"^{message}$"):
        run(ref, output_dir, format=format)


def test_beside_the_source_is_another_place(tmp_path, monkeypatch):
    """What is no file here is not where a model lies, nor is a folder that is named as a preset is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "easylm-7b").mkdir()
    assert convert.sources("easyrl::run") == [tmp_path / "run", tmp_path / "run" / "checkpoints"]
    text = json.dumps({"a": "b" * 300})
    for ref in ("params::x@easylm-7b", f"params::x@{text}", "random::easylm-7b", "hf::org/name", "easyrl::gs://x/run"):
        assert convert.sources(ref) == []


def test_an_earlier_export_gets_another_name(model, tmp_path, capsys):
    source, out = model(), tmp_path / "out"
    run(f"hf::{source}", out)
    assert "an earlier export" not in capsys.readouterr().out
    for name in ("out.1", "out.2"):
        run(f"hf::{source}", out, dtype="bf16")
        assert f"an earlier export in {out} is in {tmp_path / name} now\n" in capsys.readouterr().out
    assert_same(load_file(tmp_path / "out.1" / WEIGHTS), load_file(source / WEIGHTS))
    for folder in (out, tmp_path / "out.2"):
        assert {x.dtype.name for x in load_file(folder / WEIGHTS).values()} == {"bfloat16"}


def test_a_model_that_cannot_be_read_leaves_the_earlier_export_where_it_is(model, tmp_path):
    run(f"hf::{model()}", tmp_path / "out")
    with pytest.raises(UserError, match=r"score\.weight is missing"):
        run(f"hf::{tmp_path / 'source'}", tmp_path / "out", head="reward")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
