"""train_dpo --online: the step is DPO's on the pairs that were drawn, whatever the layout; it learns; wrong input."""

import json

import jax
import numpy as np
import optax
import pytest

from easyrl import assets, train_dpo
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.dataset import DatasetConfig
from easyrl.data.packing import Shape, pack
from easyrl.data.prompts import PromptDataset
from easyrl.data.templates import load_template
from easyrl.hf.refs import load_model
from easyrl.models.families import param_specs
from easyrl.rewards.sources import Source, function_source
from easyrl.runtime.jsonl import read_jsonl
from easyrl.runtime.metrics import timeless
from easyrl.runtime.online import OnlineConfig, OnlinePairs, PromptNumbers
from easyrl.sampling.decode import Samples
from easyrl.steps.dpo import DPOConfig, make_answer_logprobs, make_dpo_step, place_answers
from easyrl.steps.packed import place_plans
from easyrl.steps.sampling import Sampler
from easyrl.steps.state import create_train_state
from tests.offline import TINY, facts_of_card, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import FUNCTIONS, STOP_IDS, make_tokenizer, write_model

WORDS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on"]
B, P, C = 8, 12, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    write_model(folder / "policy")
    write_model(folder / "foreign", "reward", seed=2, tokenizer=make_tokenizer("<end>", 9))
    write_rows(folder / "prompts.jsonl", [{"prompt": word} for word in WORDS * 2])
    (folder / "online_test_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("EASYRL_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def flags(folder):
    return TINY | {
        "load_checkpoint": f"hf::{folder / 'policy'}", "train_dataset.path": folder / "prompts.jsonl", "online": True,
        "train_dataset.seq_length": P, "train_dataset.row_length": 0, "max_continuation_len": C, "lr": 1e-2,
        "reward_function": "online_test_functions:length", "stop_ids": ",".join(map(str, STOP_IDS)),
        "lr_schedule": "constant",
    }  # fmt: skip


def pairs_for(folder, mesh, missing_eos="none"):
    """(OnlinePairs that keeps scores of its own, model, reference log-probs)."""
    model = load_model(f"hf::{folder / 'policy'}", mesh, head="lm")
    other = load_model(f"hf::{write_model(folder / 'other', seed=3)}", mesh, head="lm")
    template = load_template("none", make_tokenizer())
    config = OnlineConfig(online=True, max_continuation_len=C, missing_eos=missing_eos)
    data = DatasetConfig(path=str(folder / "prompts.jsonl"), seq_length=P, batch_size=B)
    sample = Sampler(
        model.cfg, config.sampling, stop_ids=tuple(STOP_IDS), logprob_space="model", num_samples=2, mesh=mesh
    )
    logprobs = make_answer_logprobs(other.cfg, mesh)
    reference = lambda *batch: logprobs(other.params, *batch)
    source = function_source("online_test_functions:length")
    pairs = OnlinePairs(
        config, PromptDataset(data, template, 0), sample, [source], (1.0,), reference, template.tokenizer, mesh,
        seed=5, shapes=(Shape(2, 2 * (P + C)),), share_prompts=True,
    )  # fmt: skip
    return pairs, model, reference


@pytest.mark.parametrize("missing_eos", ["none", "mask"])
def test_a_step_is_that_of_dpo_on_the_same_pairs(folder, missing_eos):
    """The pairs are read off the tokens, laid out one by one in another way, and given to the offline step."""
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    pairs, model, reference = pairs_for(folder, mesh, missing_eos)
    numbers = PromptNumbers(np.arange(B), np.asarray(3))
    online, metrics = pairs.draw(model.params, numbers)

    tokens, mask = np.asarray(online.tokens), np.asarray(online.mask)
    starts = [mask[row].argmax() + 1 if mask[row].any() else 0 for row in range(2 * B)]
    prompts, answers = (
        [tokens[row, part].tolist() for row, part in enumerate(parts)]
        for parts in (
            [slice(0, start) for start in starts],
            [slice(start, start + mask[row].sum()) for row, start in enumerate(starts)],
        )
    )
    decode = make_tokenizer().decode
    kept = [row for row in range(0, 2 * B, 2) if starts[row]]
    assert metrics["online/told_share"] == len(kept) / B and 1 < len(kept) < B  # some are told and some are not
    for row in kept:
        assert prompts[row] == prompts[row + 1] and decode(prompts[row]) == WORDS[row // 2]
        lengths = [len(decode(answers[one], skip_special_tokens=True)) for one in (row, row + 1)]
        assert lengths[0] > lengths[1]
        if missing_eos == "mask":
            assert all(answers[one][-1] in STOP_IDS for one in (row, row + 1))

    width = P + C + 3
    again, again_mask = np.zeros((2 * len(kept), width), np.int32), np.zeros((2 * len(kept), width), bool)
    lengths = np.zeros(2 * len(kept), np.int32)
    for place, one in enumerate(one for row in kept for one in (row, row + 1)):
        text = prompts[one] + answers[one]
        again[place, : len(text)], lengths[place] = text, len(text)
        again_mask[place, len(prompts[one]) - 1 : len(text) - 1] = True
    packing = pack(lengths, width, [Shape(2, width)], together=2, packed=False)
    ref = np.asarray(reference(*jax.device_put((again, again_mask)), place_plans(packing, len(lengths), mesh)))
    offline = place_answers(again, again_mask, ref, packing, mesh, paired=True)

    results = []
    for batch in (online, offline):
        step = make_dpo_step(model.cfg, optax.sgd(1.0), mesh, DPOConfig())
        params = jax.tree.map(lambda x: x.copy(), model.params)
        state = create_train_state(params, param_specs(model.cfg, "lm"), optax.sgd(1.0), mesh)
        state, metrics = step(state, batch)
        gradient = jax.tree.map(lambda old, new: np.asarray(old - new), model.params, state.params)
        results.append((float(metrics["loss"].value), gradient))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), results[0][1], results[1][1])


def drawn(letters):
    """Samples that say one token of `letters` [2B] all the time."""
    zeros, lengths = np.zeros((2 * B, C), np.float32), np.full(2 * B, C, np.int32)
    answers = np.repeat(letters[:, None], C, axis=1).astype(np.int32)
    return Samples(answers, lengths, zeros, zeros, lengths < 0, np.int32(C))


def test_other_held_out_data_have_a_start_of_their_own(folder, tmp_path):
    """A run that goes on with a longer file is not compared with answers to other prompts."""
    pairs, model, _ = pairs_for(folder, make_mesh("1,1,1", jax.devices()[:1]))
    pairs._sample = lambda *given: drawn(np.full(2 * B, 5))
    shares = []
    for count, score in ((4, 1.0), (4, 2.0), (6, 3.0), (6, 4.0)):
        rows = write_rows(tmp_path / "eval.jsonl", [{"prompt": word} for word in WORDS[:count]])
        data = DatasetConfig(path=str(rows), seq_length=P, batch_size=B)
        held_out = PromptDataset(data, pairs._prompts.template, 0, keep_last=True)
        pairs._sources = [Source("score", lambda batch, score=score: (np.full(len(batch), score), {}))]
        shares.append(pairs.measure(model.params, held_out)["win_share"])
        pairs.recall(json.loads(json.dumps(pairs.remember())))
    assert shares == [0.5, 1.0, 0.5, 1.0]


def test_another_reward_has_a_start_of_its_own(folder, tmp_path):
    """A run that goes on with another reward is not compared with what the one before said."""
    pairs, model, _ = pairs_for(folder, make_mesh("1,1,1", jax.devices()[:1]))
    pairs._sample = lambda *given: drawn(np.full(2 * B, 5))
    shares = []
    for reward, score in (("one", 1.0), ("one", 2.0), ("other", 9.0), ("other", 10.0)):
        pairs._measured_by = reward
        pairs._sources = [Source("score", lambda batch, score=score: (np.full(len(batch), score), {}))]
        shares.append(pairs.measure(model.params, pairs._prompts)["win_share"])
        pairs.recall(json.loads(json.dumps(pairs.remember())))
    assert shares == [0.5, 1.0, 0.5, 1.0]
    del pairs._start["measured_by"]  # a checkpoint of an earlier version
    pairs._measured_by = "another"
    assert pairs.measure(model.params, pairs._prompts)["win_share"] == 1.0


def test_what_an_answer_scores_is_named_by_all_that_decides_it():
    online = {"online": True, "reward_function": "f:g"}
    settings: list[tuple[dict, dict]] = [
        ({}, {}), ({"beta": 0.2}, {}), ({"loss": "ipo"}, {}), ({}, {"load_checkpoint": "weights"}),
        (online, {}), (online | {"reward_weights": "2"}, {}), (online | {"missing_eos": "replace:-1"}, {}),
        (online | {"reward_function": "f:h"}, {}), (online | {"load_checkpoint_reward": "random::debug"}, {}),
        (online, {"load_checkpoint_reward": "weights"}),
    ]  # fmt: skip
    named = [train_dpo.measured_by(train_dpo.Config(**flags), frozen) for flags, frozen in settings]
    assert len(set(named)) == len(named)
    for flags, same in (({}, {"lr": 1.0}), (online, {"lr": 1.0, "logged_samples": 9, "decode_rows": 8})):
        one, other = (train_dpo.Config(**flags, **more) for more in ({}, same))
        assert train_dpo.measured_by(one, {}) == train_dpo.measured_by(other, {})


def test_equal_answers_make_no_pair(folder):
    """Though their scores differ by rounding."""
    pairs, model, _ = pairs_for(folder, make_mesh("1,1,1", jax.devices()[:1]))
    pairs._sample = lambda *given: drawn(np.where(np.arange(2 * B) == 1, 4, 5))  # those of the first differ
    pairs._sources = [Source("noise", lambda batch: (1 + 1e-6 * np.arange(len(batch)), {}))]
    pairs._reference = None
    batch, metrics = pairs.draw(model.params, PromptNumbers(np.arange(B), np.asarray(0)))
    assert metrics["online/told_share"] == 1 / B
    assert np.asarray(batch.mask).any(axis=1).tolist() == [True, True] + [False] * (2 * B - 2)


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    more = {"eval_dataset.path": flags["train_dataset.path"], "num_epochs": 10, "eval_freq": 10}
    run_script(train_dpo, flags | more | {"output_dir": out})
    return out


def test_the_reward_rises(trained):
    rows = metrics_of(trained)
    assert rows[1]["loss"] == pytest.approx(np.log(2), abs=1e-5) and rows[1]["objective/kl"] == pytest.approx(
        0, abs=1e-4
    )
    assert rows[0]["eval/win_share"] == 0.5
    last = rows[-1]
    assert last["eval/reward_mean"] > rows[0]["eval/reward_mean"] + 0.3
    assert last["eval/win_share"] > 0.5 and last["objective/kl"] > 0.05
    assert json.loads((trained / "best.json").read_text())["eval/reward_mean"] >= last["eval/reward_mean"]
    samples = read_jsonl(trained / "samples.jsonl")
    assert {row["phase"] for row in samples} == {"train", "eval"} and {row["step"] for row in samples} == set(range(21))
    facts = facts_of_card(trained / "hf")
    assert facts["Trained with"] == "easyrl, online DPO" and facts["Reward model"] == "online_test_functions:length"
    assert facts["max new tokens"] == str(C) and facts["responses per prompt"] == "2"
    assert json.loads((trained / "hf" / "generation_config.json").read_text())["eos_token_id"] == STOP_IDS


EXACT = ("loss", "env/reward_mean", "rewards/margins", "logps/chosen", "grad_norm", "objective/kl", "online/told_share")


def test_eight_devices_give_the_same_run(trained, flags, tmp_path):
    more = {"mesh_dim": "2,2,2", "micro_batch_size": 8, "total_steps": 3, "output_dir": tmp_path}
    run_script(train_dpo, flags | more, num_devices=8)
    for one, eight in zip(metrics_of(trained)[1:], metrics_of(tmp_path), strict=False):
        assert {name: eight[name] for name in EXACT} == pytest.approx({name: one[name] for name in EXACT}, abs=2e-5)


def test_a_run_that_broke_off_goes_on(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("easyrl.runtime.training.write_report", lambda *_: None)
    short = flags | {"eval_dataset.path": flags["train_dataset.path"], "total_steps": 4, "save_model_freq": 1}
    run_script(train_dpo, short | {"output_dir": tmp_path / "unbroken"})
    run_script(train_dpo, short | {"output_dir": tmp_path / "broken"}, dies_before=3)
    run_script(train_dpo, short | {"output_dir": tmp_path / "broken"})
    broken, unbroken = ([timeless(row) for row in metrics_of(tmp_path / name)] for name in ("broken", "unbroken"))
    assert broken == unbroken and "eval/win_share" in broken[-1]


def test_a_reward_model_of_another_tokenizer_and_a_loss_without_reference(flags, folder, tmp_path):
    more = {
        "reward_function": "", "load_checkpoint_reward": f"hf::{folder / 'foreign'}", "reward_template": "none",
        "loss": "simpo", "beta": 2, "total_steps": 1, "output_dir": tmp_path,
    }  # fmt: skip
    run_script(train_dpo, flags | more)
    (row,) = metrics_of(tmp_path)
    assert np.isfinite(row["loss"]) and "objective/kl" not in row and row["online/told_share"] == 1


def test_a_step_without_a_pair_changes_nothing(flags, folder, tmp_path):
    more = {
        "reward_function": "online_test_functions:length", "stop_ids": "103", "max_continuation_len": 2,
        "missing_eos": "mask", "total_steps": 3, "output_dir": tmp_path,
    }  # fmt: skip
    run_script(train_dpo, flags | more)
    rows = metrics_of(tmp_path)
    assert [row["online/told_share"] for row in rows] == [0, 0, 0] == [row["skipped"] for row in rows]
    assert [row["objective/kl"] for row in rows] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"online": False}, "--reward_function=online_test_functions:length: needs --online, which is not given"),
        ({"loss": "kto"}, "--loss=kto: learns from single answers"),
        ({"reward_function": ""}, "--load_checkpoint_reward and --reward_function are both empty"),
        ({"reward_function": "online_test_functions:wants_column"}, "needs the column 'solution'"),
        ({"train_dataset.batch_rows": 4}, "--train_dataset.batch_rows=4: --online does not read it"),
        (
            {"micro_batch_size": 3},
            "--micro_batch_size=3: expected a multiple of 2: dp x fsdp = 1 of --mesh_dim=1,1,1, and the 2 rows of a",
        ),
        ({"train_dataset.row_length": 19}, "--train_dataset.row_length=19: expected at least 20"),
        ({"train_dataset.seq_length": 41}, "48 tokens, --train_dataset.seq_length + --max_continuation_len is 49"),
        ({"train_dataset.batch_size": 3, "mesh_dim": "2,1,1"}, "--train_dataset.batch_size=3: does not divide by dp"),
        ({"decode_rows": 3, "mesh_dim": "2,1,1"}, "--decode_rows=3: does not divide by dp x fsdp = 2"),
        ({"missing_eos": "never"}, "--missing_eos=never: expected none, mask"),
    ],
)
def test_what_is_wrong_is_one_line(flags, tmp_path, more, complaint):
    with pytest.raises(UserError) as caught:
        run_script(
            train_dpo, flags | {"output_dir": tmp_path / "run"} | more, num_devices=2 if "mesh_dim" in more else 1
        )
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_bundled_models_learn(tmp_path):
    """docs/dpo.md records this run."""
    run_script(train_dpo, {
        "online": True, "load_checkpoint": f"hf::{assets.POLICY}",
        "load_checkpoint_reward": f"hf::{assets.REWARD_MODEL}",
        "train_dataset.path": assets.TRAIN_PROMPTS, "eval_dataset.path": assets.EVAL_PROMPTS,
        "train_dataset.seq_length": 24, "train_dataset.batch_size": 32, "max_continuation_len": 56,
        "dtype": "fp32", "lr": 1e-4, "total_steps": 24, "eval_freq": 12, "micro_batch_size": 8, "mesh_dim": "1,1,1",
        "output_dir": tmp_path,
    })  # fmt: skip
    rows = metrics_of(tmp_path)
    assert rows[-1]["eval/reward_mean"] > rows[0]["eval/reward_mean"] + 0.1
    assert rows[-1]["eval/win_share"] > 0.53
