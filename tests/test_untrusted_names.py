"""Names that come with data, models and checkpoints lead nowhere: nothing is written but where the flags say."""

import json

import datasets
import huggingface_hub
import pytest
import transformers

from easyrl import convert, evaluate, train_rm
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.readers import open_source
from easyrl.data.templates import load_template
from easyrl.data.tokenizer import load_tokenizer
from easyrl.hf import refs
from easyrl.hf.refs import find_model, load_model
from easyrl.runtime import training
from tests.offline import TINY, run_script, write_rows
from tests.train_ppo.conftest import make_tokenizer, write_model

STRAY = "stray"  # in every name, so that a file of that name anywhere has come from one
LEADING_OUT = (f"../{STRAY}", f"../../../{STRAY}", f"{STRAY}/../../../{STRAY}", f"..\\{STRAY}")


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """A working directory from which the names above lead to places that the test looks at."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EASYRL_CACHE", str(folder / "cache"))
    yield folder
    assert not [path for path in tmp_path.rglob("*") if STRAY in path.name]


def test_columns_are_no_places(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "write_report", lambda *_: None)
    names = [*LEADING_OUT, str(tmp_path / STRAY)]
    columns = ("id", "subset", "dataset", "source", "category", "path", "file_name")
    pairs = [
        {"prompt": "why", "chosen": " good", "rejected": " bad"} | dict.fromkeys(columns, names[k % len(names)])
        for k in range(16)
    ]
    rows = write_rows(deep / "rows.jsonl", pairs)
    run = deep / "run"
    run_script(train_rm, TINY | {
        "load_checkpoint": f"hf::{write_model(deep / 'model')}", "train_dataset.path": rows,
        "logger.tensorboard": True, "output_dir": run,
    })  # fmt: skip
    flags = {"load_checkpoint_reward": f"hf::{run / 'hf'}", "dataset": rows, "template": "none", "mesh_dim": "1,1,1"}
    run_script(evaluate, flags | {"output": deep / "results.json"})
    assert {row["subset"] for row in json.loads((deep / "results.json").read_text())["subsets"]} > set(names)
    known = {"cache", "model", "run", "rows.jsonl", "results.json"}
    assert {path.name for path in deep.iterdir()} == known and [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_chat_template_is_no_place(name, deep):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(deep / "tokenizer")
    config = json.loads((deep / "tokenizer" / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "x"}, {"name": name, "template": "x"}]
    (deep / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has a chat template called .*, expected the name of a file"):
        load_tokenizer(str(deep / "tokenizer"))


def test_no_code_of_a_tokenizers_folder_is_run_and_nobody_is_asked(deep, monkeypatch):
    folder = deep / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    (folder / "tok.py").write_text(f"open({str(deep / STRAY)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tok.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    with pytest.raises(UserError, match=r"^--tokenizer=.*: no tokenizer can be loaded \(ValueError: .*custom code"):
        load_tokenizer(str(folder))
    assert not asked and not (deep / STRAY).exists()


@pytest.mark.parametrize("name", [*LEADING_OUT, ".."])
def test_an_index_names_files_of_its_folder(name, deep):
    folder = write_model(deep / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match=r"has tensor lm_head.weight in .*, expected a file of this folder"):
        load_model(f"hf::{folder}", make_mesh("1,-1,1"), head="lm")


@pytest.mark.parametrize("name", [*LEADING_OUT, "owner/..", "../name", "owner/../name", "owner/name/..", "a..b"])
def test_a_hub_id_leads_to_the_hub_alone(name, deep, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError(f"asked for {args} {kwargs}")

    monkeypatch.setattr(refs, "snapshot_download", asked)
    monkeypatch.setattr(refs, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    for find in (refs.find_folder, open_source, load_tokenizer):
        with pytest.raises(UserError, match=r"no such (file or )?folder|nothing there"):
            find(name)


def test_a_checkpoint_says_nothing_of_places(deep):
    """`easyrl_place` names the weights within the state, and no file."""
    write_model(deep / "model")
    run_script(convert, {"load_checkpoint": f"hf::{deep / 'model'}", "format": "easyrl", "output_dir": deep / "run"})
    config = deep / "run" / "checkpoints" / "models" / "lm" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"easyrl_place": f"../../../{STRAY}"}))
    with pytest.raises(UserError, match=r"cannot be restored: has no \.\./\.\./"):
        load_model(f"easyrl::{deep / 'run'}", make_mesh("1,-1,1"), head="lm")
    assert find_model(f"easyrl::{deep / 'run'}").directory == config.parent


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{{ messages.clear() }}",
    ],
)
def test_a_chat_template_reaches_nothing(template, deep):
    (deep / "template.jinja").write_text(template)
    with pytest.raises(UserError, match="refuses the messages"):
        load_template(str(deep / "template.jinja"), make_tokenizer())
