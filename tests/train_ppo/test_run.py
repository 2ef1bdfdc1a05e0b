"""A run from start to finish, as its user finds it on disk."""

import json

import jax
import numpy as np
import pytest

from easyrl import train_ppo
from easyrl.core.command_line import load_config
from easyrl.core.sharding import make_mesh
from easyrl.hf.refs import load_model
from easyrl.models.heads import scalar
from easyrl.models.trunk import trunk
from easyrl.runtime.jsonl import read_jsonl
from easyrl.runtime.progress import compile_programs
from easyrl.sampling.decode import SamplingConfig
from easyrl.steps.sampling import Sampler
from easyrl.train_ppo import Config
from tests.lowered import names_of_lowered
from tests.offline import facts_of_card
from tests.train_ppo.conftest import STOP_IDS, make_tokenizer

TORCH = "the tests against transformers run its models, and need torch: pip install torch"


@pytest.fixture(scope="module")
def finished(run, materials):
    flags = {"eval_dataset__path": materials.prompts, "eval_dataset__split": "[:10]"}
    return run(report=True, export_freq=1, logged_samples=3, **flags)


def test_everything_that_is_promised_is_there(finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        ".lock",
        "run_id.txt",
        "config.yaml",
        "checkpoints",
        "metrics.jsonl",
        "samples.jsonl",
        "hf-1",
        "hf-2",
        "hf",
        "hf_value",
        "report.html",
    }
    for name, head in (("hf", "LlamaForCausalLM"), ("hf_value", "LlamaForTokenClassification")):
        config = json.loads((finished.path / name / "config.json").read_text())
        assert config["architectures"] == [head]
        assert {"README.md", "tokenizer.json", "chat_template.jinja"} <= {
            p.name for p in (finished.path / name).iterdir()
        }
    policy, value = (facts_of_card(finished.path / name) for name in ("hf", "hf_value"))
    assert policy["KL penalty coefficient"] == "0.05" and policy["Reward model"].endswith("reward")
    assert policy["Base model"].endswith("policy") and value["Base model"].endswith("reward")
    generation = json.loads((finished.path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == STOP_IDS and generation["temperature"] == 1.0 and generation["top_k"] == 0
    assert "Mean reward" in (finished.path / "report.html").read_text()


def test_metrics_and_samples_go_by_step(finished):
    lines = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and all(next(iter(line)) == "step" for line in lines)
    assert [name for name in lines[0] if not name.startswith(("step", "eval/"))] == []
    assert "eval/reward_mean" in lines[2] and "eval/reward_mean" not in lines[1]
    assert all(value is not None for line in lines for value in line.values())
    assert lines[1]["ppo/policy/skipped"] == lines[1]["ppo/val/skipped"] == 0

    found = [(row["step"], row["phase"]) for row in finished.samples]
    evaluated = [(0, "eval")] * 8, [(2, "eval")] * 8  # 4 * logged_samples, but no more than a batch of 8
    assert found == [*evaluated[0], *[(1, "train")] * 3, *[(2, "train")] * 3, *evaluated[1]]


def test_policy_and_value_model_learn(finished, materials):
    start = load_model(f"hf::{materials.policy}", make_mesh("1,1,1", jax.devices()[:1]), head="lm").params
    assert not np.array_equal(finished.weights()["lm_head.weight"].T, start["head"]["kernel"])
    assert not np.array_equal(finished.weights("hf-1")["lm_head.weight"], finished.weights("hf-2")["lm_head.weight"])
    for name, weight in finished.weights("hf-2").items():
        np.testing.assert_array_equal(finished.weights()[name], weight, err_msg=name)
    assert not np.array_equal(finished.weights("hf_value")["score.weight"], np.zeros((1, 16)))


def test_the_config_of_a_run_repeats_it(finished, run):
    config = load_config(Config, [f"--config={finished.path / 'config.yaml'}"])
    assert config.output_dir == "" and config.train_dataset.batch_size == 8
    again = run(config=finished.path / "config.yaml")
    assert again.metrics == finished.metrics
    assert again.samples == finished.samples
    for name in ("hf", "hf_value"):
        for tensor, weight in finished.weights(name).items():
            np.testing.assert_array_equal(again.weights(name)[tensor], weight, err_msg=tensor)


OPTIONS = [
    {},
    {"num_devices": 8, "mesh_dim": "2,2,2", "num_layers_unfrozen": 1, "rollouts_per_prompt": 2, "kl_target": 4.0},
    {"policy_freeze_epochs": 1.0, "old_logprobs": "sampler", "ppo_epochs": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["", "hydra", "freeze"])
def test_all_programs_are_compiled_before_the_first_step(options, run, monkeypatch, capsys):
    """Each once: what was compiled is what is called."""
    ahead = []

    def compile_all(calls):
        compile_programs(calls)
        ahead.extend(names)

    monkeypatch.setattr(train_ppo, "compile_programs", compile_all)
    with names_of_lowered() as names:
        run(max_steps_per_epoch=1, num_epochs=2, **options)
    programs = {f"jit({name})" for name in ("sample", "update", "forward", "finish", "score")}
    assert programs <= set(ahead)
    assert programs.isdisjoint(names[len(ahead) :])
    assert "s; ready after seconds: " in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_keeps_what_the_first_has_written(finished, run, tmp_path):
    for _ in range(2):
        run(output_dir=tmp_path, generate_only=True, max_steps_per_epoch=1, resume="never")
    assert len(read_jsonl(tmp_path / "metrics.1.jsonl")) == len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert (tmp_path / "checkpoints.1" / "1" / "run.json").exists()


def test_the_export_continues_prompts_in_transformers_as_here(finished):
    torch = pytest.importorskip("torch", reason=TORCH)
    transformers = pytest.importorskip("transformers")
    folder, prompts = finished.path / "hf", ["tell me", "sun"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    theirs = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**ids, do_sample=False, max_new_tokens=12)
        theirs.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))

    mesh = make_mesh("1,1,1", jax.devices()[:1])
    ours = load_model(f"hf::{folder}", mesh, head="lm")
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    padded = np.array([ids + [0] * (lengths.max() - len(ids)) for ids in encoded], np.int32)
    greedy = Sampler(ours.cfg, SamplingConfig(max_new_tokens=12, temperature=0.0), stop_ids=ours.stop_ids)
    samples = greedy(ours.params, padded, lengths, jax.random.key(0), np.arange(2))
    answers = [row[:n] for row, n in zip(np.asarray(samples.tokens_BC), np.asarray(samples.lengths_B), strict=True)]
    assert tokenizer.batch_decode(answers, skip_special_tokens=True) == theirs
    assert ours.stop_ids == tuple(STOP_IDS)


def test_the_value_model_gives_the_same_values_in_transformers(finished):
    torch = pytest.importorskip("torch", reason=TORCH)
    transformers = pytest.importorskip("transformers")
    folder, ids = finished.path / "hf_value", np.array([make_tokenizer()("old dog").input_ids], np.int32)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits[..., 0].numpy()
    ours = load_model(f"hf::{folder}", make_mesh("1,1,1", jax.devices()[:1]), head="value")
    hidden, _ = trunk(ours.params, ours.cfg, ids, np.arange(ids.shape[1])[None], np.ones_like(ids))
    np.testing.assert_allclose(scalar(ours.params, ours.cfg, hidden), theirs, atol=1e-4)
