"""Models and tokenizers that train_ppo cannot use, and the line that says why.

Each entry is what the flags of a good run are changed to, made on the `Bench` of the test, and what stands in the
complaint; FOLDER there is the test's own folder, MATERIALS that of the good models.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

from tests.train_ppo.conftest import write_model

WEIGHTS = "model.safetensors"


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


MODELS = {
    "missing folder": (
        lambda b: {"load_checkpoint_policy": "hf::/no/such/model"},
        "--load_checkpoint_policy=hf::/no/such/model: no such folder",
    ),
    "no policy": (
        lambda b: {"load_checkpoint_policy": ""},
        "--load_checkpoint_policy: found nothing, expected hf::DIR_OR_HUB_ID",
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
        "--load_checkpoint_policy: FOLDER/model/config.json: no such file",
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
        "--load_checkpoint_reference: FOLDER/model/model.safetensors: cut short or not a safetensors file",
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
        "--load_checkpoint_reward: MATERIALS/policy: tensor score.weight is missing, expected a reward model's head",
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
    "a template without a reward model": (
        lambda b: {**b.function("vowels"), "reward_template": "none"},
        "--reward_template=none: needs --load_checkpoint_reward, which is empty",
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
