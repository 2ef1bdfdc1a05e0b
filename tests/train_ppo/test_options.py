"""What the flags of train_ppo do, seen from outside: from samples.jsonl, metrics.jsonl and the exported weights."""

import json

import jax
import numpy as np
import pytest

from easyrl.core.sharding import make_mesh
from easyrl.hf.refs import load_model
from easyrl.models.heads import scalar
from easyrl.models.trunk import trunk
from tests.train_ppo.conftest import STOP_IDS, make_tokenizer, read_tensors


def scores_of(folder, tokenizer, samples, end=None):
    """The reward model's scores of prompt + response, one at a time; `end` is appended to responses that ended."""
    model = load_model(f"hf::{folder}", make_mesh("1,1,1", jax.devices()[:1]), head="reward")
    at = np.arange(32)  # as long as any of them, so that one program serves all

    @jax.jit
    def score(params, ids, length):
        hidden, _ = trunk(params, model.cfg, ids[None], at[None], (at < length)[None].astype(np.int32))
        return scalar(params, model.cfg, hidden)[0, length - 1]

    scores = []
    for sample in samples:
        ids = tokenizer(sample["prompt"] + sample["response"]).input_ids + [end] * (end is not None and sample["ended"])
        scores.append(float(score(model.params, np.pad(ids, (0, len(at) - len(ids))), len(ids))))
    return scores


def rewards_of(samples):
    return [sample["reward"] for sample in samples]


def assert_same_weights(a, b, *, same=True):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]) is same or "norm" in name, name


def test_the_reward_models_score_is_that_of_prompt_and_response(run, materials):
    result = run(max_steps_per_epoch=1, logged_samples=8, generate_only=True)
    samples = result.samples
    assert len(samples) == 8 and any(sample["ended"] for sample in samples)
    # The end token is cut from the text; the letters that end a response too are not.
    whole = [sample for sample in samples if not sample["ended"] or sample["response"][-1:] in list("aeiou \n")]
    np.testing.assert_allclose(rewards_of(whole), scores_of(materials.reward, make_tokenizer(), whole), atol=1e-4)
    assert result.metrics[0]["env/reward_mean"] == pytest.approx(np.mean(rewards_of(samples)))


def test_a_reward_model_and_a_function_with_weights(run, materials):
    flags = {"reward_function": f"{materials.functions}:vowels", "reward_weights": "2,-0.5", "reward_gain": 3.0}
    result = run(max_steps_per_epoch=1, logged_samples=8, generate_only=True, **flags)
    vowels = [sum(letter in "aeiou" for letter in sample["response"]) / 4 for sample in result.samples]
    metrics = result.metrics[0]
    assert metrics["env/reward/vowels"] == pytest.approx(np.mean(vowels))
    expected = 2 * metrics["env/reward/reward"] - 0.5 * np.mean(vowels)
    assert metrics["env/reward_mean"] == pytest.approx(expected)
    assert metrics["ppo/mean_scores"] == pytest.approx(3 * expected, rel=1e-5)
    assert metrics["env/reward_mean"] == pytest.approx(np.mean(rewards_of(result.samples)))


def test_a_reward_model_with_another_tokenizer(run, materials):
    result = run(
        load_checkpoint_reward=f"hf::{materials.foreign_reward}", reward_template="none",
        max_steps_per_epoch=1, logged_samples=8, ppo_epochs=1, mini_batch_size=8,
    )  # fmt: skip
    own = make_tokenizer("<end>", 9)
    expected = scores_of(materials.foreign_reward, own, result.samples, end=own.eos_token_id)
    np.testing.assert_allclose(rewards_of(result.samples), expected, atol=1e-4)
    assert result.metrics[0]["env/reward/reward_cut"] == 0
    # The value model cannot start from weights that know other tokens: it starts from the policy, which the one update
    # made here leaves alone, as no gradient passes a head of zeros.
    value, policy = result.weights("hf_value"), read_tensors(materials.policy)
    np.testing.assert_array_equal(value["model.embed_tokens.weight"], policy["model.embed_tokens.weight"])
    assert value["score.weight"].any()


def test_generating_only_changes_no_weight(run, materials):
    result = run(generate_only=True, kl_target=0.5, kl_horizon=16)
    assert_same_weights(result.weights(), read_tensors(materials.policy))
    assert len(result.metrics) == 2
    for metrics in result.metrics:
        assert metrics["objective/kl_coef"] == pytest.approx(0.05)  # a KL of 0 would lower it
        assert metrics["objective/kl"] == 0 and not any("loss" in name for name in metrics)


def test_the_policy_waits_while_it_is_frozen(run, materials):
    result = run(policy_freeze_epochs=0.5, export_freq=1, kl_target=0.5, kl_horizon=16)
    assert_same_weights(result.weights("hf-1"), read_tensors(materials.policy))
    assert_same_weights(result.weights("hf-2"), result.weights("hf-1"), same=False)
    frozen, free = result.metrics
    assert frozen["ppo/loss/value"] > 0 and frozen["ppo/val/grad_norm"] > 0 and "ppo/loss/policy" not in frozen
    assert free["objective/kl_coef"] == frozen["objective/kl_coef"]  # a KL of 0 would lower it
    assert free["objective/kl"] == 0  # the second batch was still drawn from the policy's start
    assert "ppo/loss/policy" in free


def test_a_masked_response_teaches_nothing(run, materials):
    function = f"{materials.functions}:cut_off_earns"
    little, much = (
        run(
            load_checkpoint_reward="", reward_function=f"{function}_{earns}", missing_eos="mask", max_steps_per_epoch=1,
            logged_samples=8,
        )
        for earns in ("nothing", "much")
    )  # fmt: skip
    assert 0 < little.metrics[0]["tokens/ended_share"] < 1
    assert max(rewards_of(much.samples)) == 100 and max(rewards_of(little.samples)) < 10
    for name in ("hf", "hf_value"):
        assert_same_weights(much.weights(name), little.weights(name))
    assert much.metrics == little.metrics


def test_a_batch_of_masked_responses_changes_nothing(run, materials):
    result = run(missing_eos="mask", stop_ids=STOP_IDS[0], max_steps_per_epoch=1, optimizer__weight_decay=0.1)
    assert result.metrics[0]["tokens/ended_share"] == 0
    assert_same_weights(result.weights(), read_tensors(materials.policy))


def test_several_rollouts_of_a_prompt(run):
    result = run(rollouts_per_prompt=4, train_dataset__batch_size=2, logged_samples=8, max_steps_per_epoch=1)
    prompts, responses = ([sample[name] for sample in result.samples] for name in ("prompt", "response"))
    assert len(prompts) == 8 and prompts[0] != prompts[4]
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
    assert len(set(responses[:4])) > 1


def test_the_kl_coefficient_follows_the_target(run):
    result = run(kl_target=0.5, kl_horizon=16, kl_coef=0.1, lr=1e-2, num_epochs=2)
    coefs, kls = ([metrics[f"objective/{name}"] for metrics in result.metrics] for name in ("kl_coef", "kl"))
    assert coefs[0] == pytest.approx(0.1) and len(coefs) == 4
    for old, new, kl in zip(coefs[:-1], coefs[1:], kls[:-1], strict=True):
        error = np.clip(kl / 0.5 - 1, -0.2, 0.2)
        assert new == pytest.approx(old * (1 + error * 8 / 16), rel=1e-5)


def test_rewards_are_normalised_with_all_scores_so_far(run):
    first, second = run(normalize_rewards=True, logged_samples=8).metrics
    assert first["env/reward_running_mean"] == pytest.approx(first["env/reward_mean"])
    assert second["env/reward_running_mean"] == pytest.approx(
        (first["env/reward_mean"] + second["env/reward_mean"]) / 2
    )
    assert first["ppo/mean_scores"] == pytest.approx(0, abs=1e-5) and first["ppo/std_scores"] == pytest.approx(
        1, rel=1e-4
    )


def test_bfloat16_passes_the_self_check_and_learns(run, materials):
    result = run(dtype="bf16", param_dtype="bf16", optimizer__bf16_momentum=True)
    assert {str(weight.dtype) for weight in result.weights().values()} == {"bfloat16"}
    saved = (result.path / "checkpoints" / "models" / "value" / "config.json").read_text()
    assert json.loads(saved)["torch_dtype"] == "bfloat16"  # what convert then writes
    assert result.metrics[0]["ppo/policy/ratios_mean"] == pytest.approx(1, abs=0.2)
    assert result.metrics[1]["objective/kl"] != 0
    assert all(np.isfinite(value) for metrics in result.metrics for value in metrics.values())


def test_weights_in_less_than_what_computes_have_an_equal_reference(run):
    assert run(param_dtype="bf16", max_steps_per_epoch=1).metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_total_steps_go_on_over_the_prompts(run):
    result = run(total_steps=3, max_steps_per_epoch=2, warmup_epochs=0.75)
    assert [metrics["step"] for metrics in result.metrics] == [1, 2, 3]
    card = (result.path / "hf" / "README.md").read_text()
    assert "- lr_scheduler_warmup_ratio: 0.5\n" in card and "- training steps: 3\n" in card


def test_sampling_flags_reach_the_sampler(run):
    result = run(top_k=1, min_continuation_len=3, rollouts_per_prompt=2, train_dataset__batch_size=4,
                 max_steps_per_epoch=1, logged_samples=8, generate_only=True)  # fmt: skip
    responses = [sample["response"] for sample in result.samples]
    assert responses[::2] == responses[1::2]  # the likeliest token leaves no choice
    assert result.metrics[0]["tokens/responses_len_min"] >= 3


def test_a_random_policy_with_a_tokenizer_from_elsewhere(run, materials):
    config = json.loads((materials.policy / "config.json").read_text())
    result = run(
        load_checkpoint_policy=f"random::{json.dumps(config)}", tokenizer=materials.policy, load_checkpoint_reward="",
        reward_function=f"{materials.functions}:length", max_steps_per_epoch=1,
    )  # fmt: skip
    assert result.metrics[0]["env/reward_mean"] > 0
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in (result.path / "hf").iterdir()
    }
