"""A tiny policy, reward models, prompts and functions on disk, and runs of train_ppo over them in this process.

One set of flags (`TINY`) and one device for nearly all runs: what one test has compiled the next finds in the cache.
"""

import contextlib
import dataclasses
import functools
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from easyrl import train_ppo
from easyrl.core.command_line import load_config
from easyrl.core.params import map_specs
from easyrl.core.sharding import make_mesh
from easyrl.hf.export import export_model
from easyrl.models.families import param_specs
from easyrl.models.llama import LlamaConfig
from easyrl.runtime import training
from easyrl.runtime.jsonl import read_jsonl
from tests.offline import Died, dying_loop

# Every dimension divides by 8, so that every mesh of 8 devices takes it.
LLAMA = LlamaConfig(
    vocab_size=104, width=16, num_layers=1, num_heads=8, num_kv_heads=8, head_size=4, mlp_size=16, max_positions=48
)
STOPS = "aeiou \n"  # these letters end a response, besides the end token, which alone would end few
STOP_IDS = [0, *(1 + ord(letter) - 32 for letter in STOPS[:-1]), 96]
TINY = {
    "mesh_dim": "1,1,1", "dtype": "fp32", "template": "none", "temperature": 1.0, "lr": 1e-3, "value_lr": 1e-2,
    "train_dataset.seq_length": 12, "train_dataset.batch_size": 8, "max_continuation_len": 8, "max_steps_per_epoch": 2,
    "mini_batch_size": 4, "ppo_epochs": 2, "stop_ids": ",".join(map(str, STOP_IDS)),
}  # fmt: skip
FUNCTIONS = f"""
def vowels(prompts, responses, **columns):
    return [sum(letter in "aeiou" for letter in response) / 4 for response in responses]

def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]

def _cut_off_earns(amount, responses):
    return [float(len(response)) if response[-1] in {STOPS!r} else amount for response in responses]

def cut_off_earns_nothing(prompts, responses):
    return _cut_off_earns(0.0, responses)

def cut_off_earns_much(prompts, responses):
    return _cut_off_earns(100.0, responses)

def nan(prompts, responses):
    return [0.0] * (len(responses) - 1) + [float("nan")]

def once_infinite(prompts, responses, calls=[]):
    calls.append(1)
    return [float(len(calls) == 2 and row == 5) * 1e39 for row in range(len(responses))]

def too_few(prompts, responses):
    return [0.0]

def raises(prompts, responses):
    raise KeyError("answer")

def wants_column(prompts, responses, solution):
    return [0.0] * len(responses)
"""


def make_tokenizer(eos: str = "</s>", shift: int = 0) -> PreTrainedTokenizerFast:
    """One token a character, so that text and tokens are one to one. `shift` gives another tokenizer."""
    letters = [*map(chr, range(32, 127)), "\n", *"äöüßéèç"]
    vocabulary = {token: number for number, token in enumerate([eos, *letters[shift:], *letters[:shift]])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=eos))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def write_model(
    directory: Path, head: str = "lm", *, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, **changes
) -> Path:
    """The folder of a random tiny Llama, its weights drawn large enough to prefer some tokens clearly to others."""
    cfg = dataclasses.replace(LLAMA, **changes)

    def draw(name, spec):
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        return np.ones(spec.shape, np.float32) if "norm" in name else rng.normal(0, 0.3, spec.shape).astype(np.float32)

    params = jax.tree.map(jax.numpy.asarray, map_specs(draw, param_specs(cfg, head)))
    return export_model(directory, cfg, params, head, tokenizer=tokenizer or make_tokenizer())


@dataclasses.dataclass(frozen=True)
class Materials:
    """What runs start from."""

    folder: Path
    policy: Path
    reward: Path
    foreign_reward: Path  # reads another tokenizer
    prompts: Path
    functions: str  # name of a module


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("materials")
    words = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on", "nine", "it"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words * 4))
    (folder / "ppo_test_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield Materials(
            folder=folder,
            policy=write_model(folder / "policy"),
            reward=write_model(folder / "reward", "reward", seed=1),
            foreign_reward=write_model(folder / "foreign", "reward", seed=2, tokenizer=make_tokenizer("<end>", 9)),
            prompts=folder / "prompts.jsonl",
            functions="ppo_test_functions",
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """The folder of a finished run."""

    path: Path

    @property
    def metrics(self) -> list[dict]:
        """metrics.jsonl without what a clock decides."""
        rows = read_jsonl(self.path / "metrics.jsonl")
        return [
            {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows
        ]

    @property
    def samples(self) -> list[dict]:
        return read_jsonl(self.path / "samples.jsonl")

    def weights(self, name: str = "hf") -> dict[str, np.ndarray]:
        return read_tensors(self.path / name)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an exported model, by transformers' names."""
    return load_file(folder / "model.safetensors")


def to_argv(flags: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="session")
def run(materials, tmp_path_factory):
    """`run(**flags) -> Result`: train_ppo with `TINY` and these flags, `__` standing for the dot, on `num_devices`.

    With `config` the flags come from that file alone; with `dies_before` the run breaks off before that step. Drawing
    the report takes longer than the rest of such a run, so it has to be asked for.
    """

    def start(
        *, num_devices: int = 1, config: Path | None = None, report: bool = False, dies_before: int = 0, **flags
    ) -> Result:
        given = {name.replace("__", "."): value for name, value in flags.items()}
        path = given.setdefault("output_dir", tmp_path_factory.mktemp("run"))
        given = given | {"config": config} if config else arguments(materials) | given
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EASYRL_CACHE", str(materials.folder / "cache"))
            patch.setattr(train_ppo, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:num_devices]))
            if not report:
                patch.setattr(training, "write_report", lambda *_: None)
            if dies_before:
                patch.setattr(training, "run_loop", dying_loop(dies_before))
            with contextlib.suppress(Died):
                train_ppo.main(load_config(train_ppo.Config, to_argv(given)))
        return Result(path)

    return start


def arguments(materials: Materials) -> dict:
    """The flags of a run that learns from the reward model."""
    return TINY | {
        "load_checkpoint_policy": f"hf::{materials.policy}",
        "load_checkpoint_reward": f"hf::{materials.reward}",
        "train_dataset.path": materials.prompts,
    }
