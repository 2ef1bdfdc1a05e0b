"""Whatever is wrong with what train_ppo is given is one line that names it, and costs nothing on disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from easyrl.core.errors import UserError
from tests.train_ppo.conftest import Materials, arguments, to_argv, write_model
from tests.xla import QUICK

WEIGHTS = "model.safetensors"
FOLDER, MATERIALS = "FOLDER", "MATERIALS"  # stand in messages for places that no table can know


class Bench:
    """Makes wrong things out of good ones, in a folder of the test's own."""

    def __init__(self, materials: Materials, folder: Path):
        self.materials, self.folder = materials, folder

    def model(self, damage: Callable[[Path], object], source: Path | None = None) -> str:
        """A copy of a model's folder, the policy's if nothing is said, after `damage(folder)`."""
        shutil.copytree(source or self.materials.policy, self.folder / "model")
        damage(self.folder / "model")
        return f"hf::{self.folder / 'model'}"

    def other_model(self, head: str = "lm", **changes) -> str:
        """Another random model, with fields of its configuration changed."""
        return f"hf::{write_model(self.folder / 'model', head, **changes)}"

    def rows(self, *rows: object) -> Path:
        """A file of JSON lines; a string is a line as it is."""
        path = self.folder / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def file(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def function(self, name: str) -> dict:
        return {"load_checkpoint_reward": "", "reward_function": f"{self.materials.functions}:{name}"}


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)


def set_field(name: str, value: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))

    return change


PROMPTS = [{"prompt": "sun"}] * 6
# What the flags of a good run are changed to, and the line that says what is wrong with them.
MODELS = {
    "missing folder": (
        lambda b: {"load_checkpoint_policy": "hf::/no/such/model"},
        "--load_checkpoint_policy=hf::/no/such/model: no such folder",
    ),
    "not a reference": (
        lambda b: {"load_checkpoint_policy": "/no/such/model"},
        "--load_checkpoint_policy=/no/such/model: expected hf::DIR_OR_HUB_ID, easyrl::DIR, random::",
    ),
    "unknown preset": (
        lambda b: {"load_checkpoint_policy": "random::huge"},
        "--load_checkpoint_policy=random::huge: expected a config.json or one of debug,",
    ),
    "no config.json": (
        lambda b: {"load_checkpoint_policy": b.model(lambda folder: (folder / "config.json").unlink())},
        f"--load_checkpoint_policy: {FOLDER}/model/config.json: no such file",
    ),
    "a hub id without a network": (
        lambda b: {"load_checkpoint_policy": "hf::owner/name"},
        "--load_checkpoint_policy=hf::owner/name: no such folder, and not to be had from the Hub (",
    ),
    "a field of config.json": (
        lambda b: {"load_checkpoint_policy": b.model(set_field("num_hidden_layers", "two"))},
        "config.json: num_hidden_layers is 'two', expected a whole number of 1 or more",
    ),
    "another kind of model": (
        lambda b: {"load_checkpoint_policy": b.model(set_field("model_type", "t5"))},
        "config.json: model_type is 't5', expected one of llama",
    ),
    "no weights": (
        lambda b: {"load_checkpoint_policy": b.model(lambda folder: (folder / WEIGHTS).unlink())},
        "found no weights, expected model.safetensors",
    ),
    "weights cut short": (
        lambda b: {"load_checkpoint_policy": b.model(cut_short)},
        "model.safetensors: cut short or not a safetensors file",
    ),
    "weights that are not weights": (
        lambda b: {"load_checkpoint_reference": b.model(lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99))},
        f"--load_checkpoint_reference: {FOLDER}/model/model.safetensors: cut short or not a safetensors file",
    ),
    "a tensor missing": (
        lambda b: {"load_checkpoint_policy": b.model(without_tensor)},
        "tensor model.layers.0.mlp.up_proj.weight is missing, expected shape [16, 16]",
    ),
    "a tensor of another shape": (
        lambda b: {"load_checkpoint_policy": b.model(set_field("intermediate_size", 24))},
        "has shape [16, 16], expected [24, 16] from config.json",
    ),
    "a reward model as policy": (
        lambda b: {"load_checkpoint_policy": f"hf::{b.materials.reward}"},
        "holds a classifier (score.weight), expected a language model",
    ),
    "a policy as reward model": (
        lambda b: {"load_checkpoint_reward": f"hf::{b.materials.policy}"},
        f"--load_checkpoint_reward: {MATERIALS}/policy: tensor score.weight is missing, expected a reward model's head",
    ),
    "a reference with another vocabulary": (
        lambda b: {"load_checkpoint_reference": b.other_model(vocab_size=112)},
        "has a vocabulary of 112, the policy one of 104",
    ),
    "a reward model too small for its tokenizer": (
        lambda b: {"load_checkpoint_reward": b.other_model("reward", vocab_size=96)},
        "the tokenizer's ids go up to 103, the model has embeddings for 0 to 95: expected the model's own tokenizer",
    ),
    "a value model too small for the tokenizer": (
        lambda b: {"load_checkpoint_value": b.other_model("value", vocab_size=96)},
        "--load_checkpoint_value: the tokenizer's ids go up to 103, the model has embeddings for 0 to 95",
    ),
    "value from a reward model that is not there": (
        lambda b: {**b.function("vowels"), "load_checkpoint_value": "reward"},
        "--load_checkpoint_value=reward: --load_checkpoint_reward is empty, expected policy or a model",
    ),
    "value from a reward model with another tokenizer": (
        lambda b: {
            "load_checkpoint_reward": f"hf::{b.materials.foreign_reward}", "reward_template": "none",
            "load_checkpoint_value": "reward",
        },
        "--load_checkpoint_value=reward: --load_checkpoint_reward does not read the policy's tokens",
    ),
    "more unfrozen layers than there are": (
        lambda b: {"num_layers_unfrozen": 2},
        "--num_layers_unfrozen=2: expected at most 1, the layers of the model",
    ),
    "a value model of another shape on the policy's lower layers": (
        lambda b: {
            "load_checkpoint_policy": b.other_model(num_layers=2), "num_layers_unfrozen": 1,
            "load_checkpoint_value": f"hf::{b.materials.reward}",
        },
        "--load_checkpoint_value: has num_layers=1, the policy num_layers=2; with --num_layers_unfrozen=1 it stands on",
    ),
    "a reference with other lower layers": (
        lambda b: {
            "load_checkpoint_policy": b.other_model(num_layers=2), "num_layers_unfrozen": 1,
            "load_checkpoint_reference": f"hf::{write_model(b.folder / 'reference', seed=5, num_layers=2)}",
        },
        "--load_checkpoint_reference: its embeddings or lower layers are not the policy's, on which",
    ),
    "more tokens than positions": (
        lambda b: {"max_continuation_len": 40},
        "reads up to 48 tokens, --train_dataset.seq_length + --max_continuation_len is 52",
    ),
    "checkpoints of a run that is not there": (
        lambda b: {"load_checkpoint_policy": "easyrl::runs/none"},
        "--load_checkpoint_policy=easyrl::runs/none: ",
    ),
}  # fmt: skip
TEXT = {
    "no tokenizer": (
        lambda b: {"load_checkpoint_policy": b.model(lambda folder: [path.unlink() for path in folder.glob("token*")])},
        "found no tokenizer in this folder, expected tokenizer.json",
    ),
    "a broken tokenizer": (
        lambda b: {"load_checkpoint_policy": b.model(lambda folder: (folder / "tokenizer.json").write_text("{"))},
        "no tokenizer can be loaded",
    ),
    "a tokenizer with more tokens than the model": (
        lambda b: {"load_checkpoint_policy": b.other_model(vocab_size=96)},
        "--tokenizer: the tokenizer's ids go up to 103, the model has embeddings for 0 to 95",
    ),
    "the tokenizer of another model": (
        lambda b: {"load_checkpoint_policy": b.other_model(vocab_size=4096)},
        "--tokenizer: the tokenizer has 104 tokens, the model 4096: expected the model's own tokenizer",
    ),
    "a random model without tokenizer": (
        lambda b: {"load_checkpoint_policy": "random::debug"},
        "--tokenizer: found nothing, expected a folder with a tokenizer or a hub id",
    ),
    "unknown template": (
        lambda b: {"template": "alpaca"},
        "--template=alpaca: found no such template or file, expected one of tulu, vicuna, chatml, llama3, none",
    ),
    "a template whose tokens are missing": (
        lambda b: {"template": "chatml"},
        "--template=chatml: the tokenizer has no token <|im_start|>",
    ),
    "no template of the tokenizer's own": (
        lambda b: {"template": "tokenizer"},
        "--template=tokenizer: the tokenizer has no chat template, expected one of tulu,",
    ),
    "unknown template of a reward model": (
        lambda b: {"reward_template": "alpaca"},
        "--reward_template=alpaca: found no such template or file",
    ),
    "stop ids that are words": (
        lambda b: {"stop_ids": "2,end"},
        "--stop_ids=2,end: expected token ids separated by commas",
    ),
    "stop ids outside the vocabulary": (
        lambda b: {"stop_ids": "2,104"},
        "--stop_ids=2,104: ",
    ),
}  # fmt: skip
DATA = {
    "no prompts": (lambda b: {"train_dataset.path": ""}, "--train_dataset.path: found nothing, expected a file"),
    "prompts that are not there": (
        lambda b: {"train_dataset.path": "/no/such/prompts.jsonl"},
        "--train_dataset.path: /no/such/prompts.jsonl: no such file or folder",
    ),
    "an empty file": (lambda b: {"train_dataset.path": b.rows()}, "rows.jsonl: the file is empty"),
    "broken JSON": (
        lambda b: {"train_dataset.path": b.rows(*PROMPTS, '{"prompt": "sun')},
        f"--train_dataset.path: {FOLDER}/rows.jsonl line 7: broken JSON at column 12",
    ),
    "no column for the prompt": (
        lambda b: {"train_dataset.path": b.rows(*PROMPTS, {"question": "why"})},
        "rows.jsonl line 7: found `question`, expected `messages`, `turns`, `instruction`, `prompt`",
    ),
    "a prompt that is no text": (
        lambda b: {"train_dataset.path": b.rows({"prompt": 7}, *PROMPTS)},
        "rows.jsonl line 1: column `prompt`: found 7",
    ),
    "nothing short enough": (
        lambda b: {
            "train_dataset.path": b.rows(*[{"prompt": "far too long to be kept"}] * 9),
            "train_dataset.remove_truncated_samples": True,
        },
        "rows.jsonl: found no row to use (9 rows read, left out: 9 too long)",
    ),
    "fewer prompts than a batch": (
        lambda b: {"train_dataset.path": b.rows(*PROMPTS)},
        "found 6 prompts, fewer than --train_dataset.batch_size=8",
    ),
    "held-out prompts that are not there": (
        lambda b: {"eval_dataset.path": "/no/such/prompts.jsonl"},
        "--eval_dataset.path: /no/such/prompts.jsonl: no such file or folder",
    ),
    "held-out prompts with a batch of their own": (
        lambda b: {"eval_dataset.batch_size": 8},
        "unknown flag --eval_dataset.batch_size: did you mean --train_dataset.batch_size",
    ),
    "a split that is none": (lambda b: {"train_dataset.split": "[7"}, "--train_dataset.split"),
}  # fmt: skip
REWARDS = {
    "no reward": (
        lambda b: {"load_checkpoint_reward": ""},
        "--load_checkpoint_reward and --reward_function are both empty, expected a source of reward",
    ),
    "a function that is not there": (
        lambda b: b.function("no_such"),
        "--reward_function=ppo_test_functions:no_such: found no such name in ppo_test_functions",
    ),
    "a module that is not there": (
        lambda b: {"reward_function": "no_such_module:f"},
        "--reward_function=no_such_module:f: no module no_such_module in the working directory or on PYTHONPATH",
    ),
    "not a function's name": (
        lambda b: {"reward_function": "os.system"},
        "--reward_function=os.system: expected package.module:function",
    ),
    "a column that the function needs": (
        lambda b: b.function("wants_column"),
        "--reward_function=ppo_test_functions:wants_column needs the column 'solution', the data have messages",
    ),
    "a function that gives too few": (
        lambda b: b.function("too_few"),
        "--reward_function=ppo_test_functions:too_few returned numbers of shape (1,), expected one for each of the 8",
    ),
    "a function that raises": (
        lambda b: b.function("raises"),
        "--reward_function=ppo_test_functions:raises raised KeyError: 'answer'",
    ),
    "more weights than rewards": (
        lambda b: {"reward_weights": "1,2"},
        "--reward_weights=1,2: expected 1 numbers separated by commas",
    ),
    "weights that are words": (lambda b: {"reward_weights": "much"}, "--reward_weights=much: expected 1 number"),
    "a rule for a missing end": (
        lambda b: {"missing_eos": "replace"},
        "--missing_eos=replace: expected none, mask, subtract:VALUE (VALUE above 0) or replace:VALUE",
    ),
}  # fmt: skip
FLAGS = {
    "misspelt flag": (lambda b: {"kl_coeff": 0.1}, "unknown flag --kl_coeff: did you mean --kl_coef"),
    "misspelt key in YAML": (
        lambda b: {"config": b.file("c.yaml", "lr: 0.1\ngama: 1\n")},
        "c.yaml, line 2: unknown key gama: did you mean gamma",
    ),
    "wrong type": (lambda b: {"ppo_epochs": "two"}, "--ppo_epochs=two: expected an integer"),
    "wrong type in YAML": (
        lambda b: {"config": b.file("c.yaml", "optimizer:\n  b1: high\n")},
        "c.yaml, line 2: optimizer.b1=high: expected a number",
    ),
    "YAML that is not there": (lambda b: {"config": "/no/such.yaml"}, "--config=/no/such.yaml: No such file"),
    "YAML that is none": (lambda b: {"config": b.file("c.yaml", "lr: [1\n")}, "c.yaml, line 2: not YAML"),
    "not one of the choices": (lambda b: {"lr_schedule": "step"}, "expected one of constant, linear, cosine"),
    "temperature 0": (lambda b: {"temperature": 0}, "--temperature=0: expected more than 0"),
    "negative temperature": (lambda b: {"temperature": -1}, "--temperature=-1: expected more than 0"),
    "top_p above 1": (lambda b: {"top_p": 1.5}, "--top_p=1.5: expected more than 0, at most 1"),
    "negative learning rate": (lambda b: {"lr": -1e-5}, "--lr=-1e-05: expected 0 or more"),
    "a clip range of 0": (lambda b: {"cliprange": 0}, "--cliprange=0: expected more than 0, at most 1"),
    "a dual clip of 1": (lambda b: {"dual_clip": 1}, "--dual_clip=1: expected 0 (off) or more than 1"),
    "a second moment that never forgets": (
        lambda b: {"optimizer.b2": 1}, "--optimizer.b2=1: expected 0 or more, less than 1"
    ),
    "a horizon within one step": (
        lambda b: {"kl_target": 1, "kl_horizon": 3.2, "rollouts_per_prompt": 2},
        "--kl_horizon=3.2: expected more than 3.2, a fifth of the 16 responses of a step",
    ),
    "fewer than no unfrozen layers": (
        lambda b: {"num_layers_unfrozen": -2}, "--num_layers_unfrozen=-2: expected -1 or more"
    ),
    "no number": (lambda b: {"gamma": "nan"}, "--gamma=nan: expected a number"),
    "a least above the most": (
        lambda b: {"min_continuation_len": 9},
        "--min_continuation_len=9: expected at most --max_continuation_len=8",
    ),
    "no responses": (lambda b: {"train_dataset.batch_size": 0}, "--train_dataset.batch_size=0: expected 1 or more"),
    "a minibatch that does not divide": (
        lambda b: {"mini_batch_size": 3},
        "--mini_batch_size=3: does not divide the 8 responses of a step",
    ),
}  # fmt: skip
LAYOUT = {
    "two sizes": (lambda b: {"mesh_dim": "1,1"}, "--mesh_dim=1,1: expected three sizes as in 1,-1,1"),
    "sizes that are words": (lambda b: {"mesh_dim": "1,all,1"}, "--mesh_dim=1,all,1: the size of fsdp is 'all'"),
    "not the number of devices": (
        lambda b: {"mesh_dim": "1,-1,3"},
        "--mesh_dim=1,-1,3: the sizes do not make up the 8 devices there are",
    ),
    "a batch that does not divide": (
        lambda b: {"mesh_dim": "1,8,1", "train_dataset.batch_size": 12},
        "=12: does not divide by dp x fsdp = 8 of --mesh_dim=1,8,1",
    ),
    "prompts that do not divide, though their responses do": (
        lambda b: {"mesh_dim": "1,8,1", "train_dataset.batch_size": 4, "rollouts_per_prompt": 2},
        "--train_dataset.batch_size=4: does not divide by dp x fsdp = 8 of --mesh_dim=1,8,1",
    ),
    "a micro-batch that does not divide": (
        lambda b: {"mesh_dim": "2,2,2", "micro_batch_size": 6},
        "--micro_batch_size=6: does not divide by dp x fsdp = 4 of --mesh_dim=2,2,2",
    ),
    "heads that do not divide": (
        lambda b: {"mesh_dim": "1,1,8", "load_checkpoint_policy": b.other_model(num_heads=4, num_kv_heads=4)},
        "--load_checkpoint_policy: --mesh_dim: parameter layers/attn/k has kv_heads=4, which does not divide by mp=8",
    ),
    "a width that does not divide": (
        lambda b: {"mesh_dim": "1,8,1", "load_checkpoint_policy": b.other_model(width=20, num_heads=4, num_kv_heads=4)},
        "has embed=20, which does not divide by fsdp=8",
    ),
}  # fmt: skip
PLACES = {
    "a file": (lambda b: {"output_dir": b.file("taken", "mine")}, "expected a folder, found a file of that name"),
    "in a file": (lambda b: {"output_dir": b.file("taken", "mine") / "run"}, "cannot write there: Not a directory"),
    "a bucket": (lambda b: {"output_dir": "gs://bucket/run"}, "expected a local folder, found the address of a store"),
    "a folder whose export is something else": (
        lambda b: {"output_dir": b.file("hf", "mine").parent},
        "hf: is a file, expected a new folder to export to",
    ),
}  # fmt: skip
TABLE = MODELS | TEXT | DATA | REWARDS | FLAGS | LAYOUT | PLACES


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TABLE)
def test_it_is_one_line_and_nothing_is_lost(name, run, materials, tmp_path):
    change, message = TABLE[name]
    earlier = tmp_path / "run"
    shutil.copytree(materials.policy, earlier / "hf")
    (earlier / "config.yaml").write_text("lr: 1\n")
    (earlier / "metrics.jsonl").write_text('{"step": 1}\n')
    flags = {"output_dir": earlier, **change(Bench(materials, tmp_path))}
    before = contents(tmp_path)

    num_devices = 8 if name in LAYOUT else 1
    message = message.replace(FOLDER, str(tmp_path)).replace(MATERIALS, str(materials.folder))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run(num_devices=num_devices, **{key.replace(".", "__"): value for key, value in flags.items()})

    assert "\n" not in str(caught.value)
    assert before <= contents(tmp_path)


def test_the_table_is_long_enough():
    assert len(TABLE) >= 25


@pytest.mark.parametrize(
    "name", ["misspelt flag", "weights cut short", "a column that the function needs", "a function that raises"]
)
def test_a_process_prints_the_line_and_exits_with_2(name, materials, tmp_path):
    change, message = TABLE[name]
    flags = arguments(materials) | {"output_dir": tmp_path / "run", **change(Bench(materials, tmp_path))}
    path = os.pathsep.join((str(materials.folder), os.environ["PYTHONPATH"]))
    ended = subprocess.run(
        [sys.executable, "-m", "easyrl.train_ppo", *to_argv(flags)],
        env=os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": path, "EASYRL_CACHE": str(materials.folder / "cache")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("easyrl: error: ") and message in line
    assert "Traceback" not in ended.stdout
