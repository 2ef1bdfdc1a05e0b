"""PPO's device side against a plain loop, and its invariances."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.models.families import param_specs
from easyrl.steps.logprobs import CHUNK_TOKENS
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.ppo import PPOState, make_update
from easyrl.steps.ppo_config import PPOConfig, resumed_kl_coef
from easyrl.steps.scoring import Passes, make_finish, make_forward
from easyrl.steps.state import create_train_state
from tests.steps.conftest import everywhere, make_params, plan_shapes, rollout_shapes, state_shapes

OPTIMIZER = OptimizerConfig(weight_decay=0.01)
SCORES = np.random.default_rng(1).normal(size=8).astype(np.float32)


def optimizer(lr=3e-4):
    return make_optimizer(OPTIMIZER, make_schedule("constant", lr, 10))


def start(cfg, value_cfg, mesh, kl_coef=0.05):
    specs, value_specs = param_specs(cfg, "lm"), param_specs(value_cfg, "value")
    policy = create_train_state(make_params(cfg, "lm", mesh, 0), specs, optimizer(), mesh)
    value = create_train_state(make_params(value_cfg, "value", mesh, 1), value_specs, optimizer(), mesh)
    return PPOState(policy, value, everywhere(np.float32(kl_coef), mesh))


def roll_out(state, cfg, value_cfg, ppo, mesh, ragged, plan, ref_seed=2):
    tokens, mask, scores = everywhere((ragged.tokens, ragged.mask, SCORES), mesh)
    ref = make_params(cfg, "lm", mesh, ref_seed)
    forward = make_forward(cfg, cfg, value_cfg, ppo, mesh)
    passes = forward(state.policy.params, ref, state.value.params, tokens, mask, plan)
    rollout, _, metrics = make_finish(ppo, mesh)(tokens, mask, passes, scores, state.kl_coef)
    return rollout, metrics


def not_stopped(mesh):
    return everywhere(np.zeros((), bool), mesh)


def values_of(metrics):
    return {name: float(metric.value) for name, metric in metrics.items()}


def run_iteration(cfg, value_cfg, ppo, mesh, ragged, plan, updates=2):
    state = start(cfg, value_cfg, mesh)
    rollout, metrics = roll_out(state, cfg, value_cfg, ppo, mesh, ragged, plan)
    update, stopped = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), mesh), not_stopped(mesh)
    for _ in range(updates):
        state, stopped, update_metrics = update(state, rollout, plan, stopped)
    weights = jax.device_get((state.policy.params, state.value.params))
    return jax.device_get(rollout), values_of(metrics) | values_of(update_metrics), weights


@pytest.fixture(scope="module")
def reference_run(cfg, value_cfg, ragged, one_device):
    """An iteration on one device, all samples in one group, one sample a row."""
    return run_iteration(cfg, value_cfg, PPOConfig(), one_device, ragged, ragged.rows_plan(one_device, 8, 1))


def assert_same(a, b, atol=1e-5):
    (rollout_a, metrics_a, weights_a), (rollout_b, metrics_b, weights_b) = a, b
    assert metrics_a.keys() == metrics_b.keys()
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], atol=atol, rtol=atol, err_msg=name)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=atol)
    jax.tree.map(close, rollout_a, rollout_b)
    jax.tree.map(close, weights_a, weights_b)


# The last has all three axes; the others say which of them is at fault when it fails.
@pytest.mark.parametrize(
    "mesh_dim", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("8,1,1", "1,8,1", "1,1,8")), "2,2,2"]
)
def test_an_iteration_is_the_same_on_every_mesh(mesh_dim, cfg, value_cfg, ragged, reference_run):
    mesh = make_mesh(mesh_dim, jax.devices()[:8])
    many = run_iteration(cfg, value_cfg, PPOConfig(), mesh, ragged, ragged.rows_plan(mesh, 8, 1))
    assert_same(reference_run, many)


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_change_nothing(rows, cfg, value_cfg, ragged, one_device, reference_run):
    plan = ragged.rows_plan(one_device, rows, 8 // rows)
    assert_same(reference_run, run_iteration(cfg, value_cfg, PPOConfig(), one_device, ragged, plan))


def test_packing_changes_nothing(cfg, value_cfg, ragged, one_device, reference_run):
    plan = ragged.packed_plan(one_device, rows=1, groups=8, length=48)
    assert 1 < int(plan[0].count) < 8  # the trip count is what the samples need, not what the buffer holds
    assert_same(reference_run, run_iteration(cfg, value_cfg, PPOConfig(), one_device, ragged, plan))


def test_padding_is_never_read(cfg, value_cfg, ragged, one_device, reference_run):
    plan, clean = ragged.rows_plan(one_device, 8, 1), reference_run
    real = np.arange(ragged.tokens.shape[1]) < ragged.lengths[:, None]
    other = dataclasses.replace(ragged, tokens=np.where(real, ragged.tokens, 95 - ragged.tokens))
    changed = run_iteration(cfg, value_cfg, PPOConfig(), one_device, other, plan)
    assert_same((clean[0].replace(tokens=0), *clean[1:]), (changed[0].replace(tokens=0), *changed[1:]), atol=0)


def test_ratio_is_one_on_the_first_minibatch_and_moves_on_the_second(cfg, value_cfg, ragged, one_device):
    ppo, plan = PPOConfig(cliprange=0.001), ragged.rows_plan(one_device, 8, 1)
    state = start(cfg, value_cfg, one_device)
    rollout, _ = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, plan)
    update, stopped = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), one_device), not_stopped(one_device)

    state, stopped, first = update(state, rollout, plan, stopped)
    state, stopped, second = update(state, rollout, plan, stopped)

    first, second = values_of(first), values_of(second)
    assert first["ppo/policy/ratios_mean"] == pytest.approx(1, abs=1e-6)
    assert first["ppo/policy/clipfrac"] == 0 and first["ppo/policy/approxkl"] == pytest.approx(0, abs=1e-9)
    assert first["ppo/loss/policy"] == pytest.approx(-first["ppo/policy/advantages_mean"], abs=1e-6)
    assert abs(second["ppo/policy/ratios_mean"] - 1) > 1e-4
    assert second["ppo/policy/clipfrac"] > 0 and second["ppo/policy/approxkl"] > 0
    assert second["ppo/loss/policy"] < first["ppo/loss/policy"]


def test_kl_is_zero_when_policy_and_reference_are_equal_at_any_temperature(cfg, value_cfg, ragged, one_device):
    plan = ragged.rows_plan(one_device, 8, 1)
    for space in ("sampling", "model"):
        ppo = PPOConfig(temperature=0.5, logprob_space=space)
        state = start(cfg, value_cfg, one_device)
        rollout, metrics = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, plan, ref_seed=0)
        assert values_of(metrics)["objective/kl"] == 0
        np.testing.assert_array_equal(rollout.penalties, 0)


def test_rollout_against_a_plain_loop(cfg, value_cfg, ragged, one_device):
    ppo = PPOConfig(gamma=0.95, lam=0.9, kl_coef=0.3)
    state = start(cfg, value_cfg, one_device, kl_coef=0.3)
    rollout, metrics = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, ragged.rows_plan(one_device, 8, 1))
    r = jax.device_get(rollout)

    advantages, returns = np.zeros(r.mask.shape), np.zeros(r.mask.shape)
    for b in range(8):
        live = np.flatnonzero(r.mask[b])
        rewards = -0.3 * (r.old_logprobs[b] - r.ref_logprobs[b])
        rewards[live[-1]] += SCORES[b]
        np.testing.assert_allclose(r.rewards[b, live], rewards[live], atol=1e-5)
        following = 0.0
        for t in live[::-1]:
            next_value = r.values[b, t + 1] if t + 1 in live else 0.0
            delta = rewards[t] + 0.95 * next_value - r.values[b, t]
            following = advantages[b, t] = delta + 0.95 * 0.9 * following
            returns[b, t] = advantages[b, t] + r.values[b, t]
    live = advantages[r.mask]
    np.testing.assert_allclose(r.returns[r.mask], returns[r.mask], atol=1e-5)
    np.testing.assert_allclose(r.advantages[r.mask], (live - live.mean()) / live.std(ddof=1), atol=1e-4)
    kl = np.where(r.mask, r.old_logprobs - r.ref_logprobs, 0).sum(1).mean()
    assert values_of(metrics)["objective/kl"] == pytest.approx(kl, rel=1e-5)
    assert (r.advantages[~r.mask] == 0).all() and (r.rewards[~r.mask] == 0).all()


def test_critic_warm_up_leaves_the_policy_alone(cfg, value_cfg, ragged, one_device):
    ppo, plan = PPOConfig(), ragged.rows_plan(one_device, 8, 1)
    state = start(cfg, value_cfg, one_device)
    before = jax.device_get((state.policy, state.value.params))
    rollout, _ = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, plan)
    update = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), one_device, train_policy=False)
    state, _, metrics = update(state, rollout, plan, not_stopped(one_device))

    jax.tree.map(np.testing.assert_array_equal, before[0], jax.device_get(state.policy))
    assert np.abs(before[1]["final_norm"] - state.value.params["final_norm"]).max() > 0
    assert "ppo/loss/policy" not in metrics


def test_target_kl_stops_the_rest_of_the_batch(cfg, value_cfg, ragged, one_device):
    ppo, plan = PPOConfig(target_kl=1e-6), ragged.rows_plan(one_device, 8, 1)
    state = start(cfg, value_cfg, one_device)
    rollout, _ = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, plan)
    update, stopped = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), one_device), not_stopped(one_device)
    state, stopped, _ = update(state, rollout, plan, stopped)
    assert not stopped and int(state.policy.updates) == 1
    state, stopped, metrics = update(state, rollout, plan, stopped)
    assert stopped and int(state.policy.updates) == 1 and values_of(metrics)["ppo/policy/skipped"] == 1
    assert values_of(metrics)["ppo/val/grad_norm"] > 0
    state, stopped, metrics = update(state, rollout, plan, stopped)
    computed = {name for name, metric in metrics.items() if metric.count > 0}
    assert computed == {f"ppo/{model}/{name}" for model in ("policy", "val") for name in ("skipped", "not_finite")}


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(cfg, value_cfg, ragged, one_device):
    ppo, plan = PPOConfig(), ragged.rows_plan(one_device, 8, 1)
    state = start(cfg, value_cfg, one_device)
    rollout, _ = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, plan)
    poisoned = rollout.replace(advantages=rollout.advantages.at[0].set(jnp.nan))
    before = jax.device_get(state.policy)
    update = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), one_device)
    state, _, metrics = update(state, poisoned, plan, not_stopped(one_device))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.policy))
    metrics = values_of(metrics)
    assert metrics["ppo/policy/skipped"] == metrics["ppo/policy/not_finite"] == 1
    assert metrics["ppo/val/skipped"] == metrics["ppo/val/not_finite"] == 0


@pytest.mark.parametrize("term", ["scores", "policy", "ref", "value"])
def test_nothing_is_learnt_from_a_rollout_with_a_number_that_is_not_finite(term, cfg, value_cfg, ragged, one_device):
    ppo, plan = PPOConfig(kl_target=0.1), ragged.rows_plan(one_device, 8, 1)
    state, mesh = start(cfg, value_cfg, one_device), one_device
    ref, scores = make_params(cfg, "lm", mesh, 2), SCORES.copy()
    poison = lambda params: params | {"final_norm": params["final_norm"].at[0].set(jnp.nan)}
    if term == "scores":
        scores[3] = np.inf
    elif term == "ref":
        ref = poison(ref)
    else:
        state = state.replace(**{term: (part := getattr(state, term)).replace(params=poison(part.params))})
    tokens, mask, scores = everywhere((ragged.tokens, ragged.mask, scores), mesh)
    passes = make_forward(cfg, cfg, value_cfg, ppo, mesh)(
        state.policy.params, ref, state.value.params, tokens, mask, plan
    )
    rollout, kl_coef, metrics = make_finish(ppo, mesh)(tokens, mask, passes, scores, state.kl_coef)
    assert not rollout.finite and values_of(metrics)["ppo/not_finite"] == 1 and kl_coef == state.kl_coef

    before = jax.device_get((state.policy, state.value))
    update = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), mesh)
    state, _, metrics = update(state, rollout, plan, not_stopped(mesh))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.policy, state.value)))
    assert values_of(metrics)["ppo/policy/not_finite"] == values_of(metrics)["ppo/val/not_finite"] == 1


def test_the_adaptive_coefficient_counts_only_responses_that_are_learnt_from(one_device):
    B, T = 4, 6
    zeros = jnp.zeros((B, T))
    passes = Passes(old_logprobs=zeros + 0.5, ref_logprobs=zeros, values=zeros, entropies=zeros)
    finish = make_finish(PPOConfig(kl_target=1.0, kl_horizon=10), one_device)
    tokens, scores, kl_coef = jnp.zeros((B, T), int), jnp.ones(B), jnp.float32(0.1)
    for kept in (4, 1, 0):  # their KL is 0.5 * 6: an error that saturates at 0.2
        learnt = jnp.broadcast_to((jnp.arange(B) < kept)[:, None], (B, T))
        _, adapted, _ = finish(tokens, learnt, passes, scores, kl_coef)
        assert adapted == pytest.approx(0.1 * (1 + 0.2 * kept / 10), rel=1e-6)


def test_a_coefficient_of_0_cannot_be_steered():
    with pytest.raises(UserError, match="--kl_coef=0: it is the starting weight of --kl_target, expected more than 0"):
        PPOConfig(kl_coef=0, kl_target=1.0)


def test_going_on_the_coefficient_is_the_flag_s_unless_a_controller_has_moved_it_from_there():
    fixed, steered = ({"kl_coef": 0.1, "kl_target": target} for target in (0.0, 2.0))
    for then, now, expected in (
        (fixed, {"kl_coef": 0.1}, 0.1),
        (fixed, {"kl_coef": 5.0}, 5.0),
        (steered, {"kl_coef": 0.1}, 0.1),
        (fixed, {"kl_coef": 0.1, "kl_target": 2.0}, 0.1),
        (steered, {"kl_coef": 0.1, "kl_target": 2.0}, 0.3),
        (steered, {"kl_coef": 0.1, "kl_target": 4.0}, 0.3),
        (steered, {"kl_coef": 5.0, "kl_target": 2.0}, 5.0),
    ):
        assert resumed_kl_coef(0.3, then, PPOConfig(**now)) == expected


def test_update_compiles_once(cfg, value_cfg, ragged, one_device):
    plan = ragged.rows_plan(one_device, 8, 1)
    ppo, state = PPOConfig(), start(cfg, value_cfg, one_device)
    rollout, _ = roll_out(state, cfg, value_cfg, ppo, one_device, ragged, plan)
    update, stopped = make_update(cfg, value_cfg, ppo, optimizer(), optimizer(), one_device), not_stopped(one_device)
    for _ in range(2):
        state, stopped, _ = update(state, rollout, plan, stopped)
    assert update._cache_size() == 1


def lower_update(cfg, mesh, batch, rows, length):
    """The update of policy and value model of one configuration, lowered on shapes alone."""
    ppo = PPOConfig(entropy_coef=0.01)
    update = make_update(cfg, cfg, ppo, optimizer(), optimizer(), mesh)
    state, rollout = state_shapes(cfg, ppo, optimizer(), mesh), rollout_shapes(batch, length)
    return update.lower(state, rollout, plan_shapes(batch, rows, length), jax.ShapeDtypeStruct((), bool))


def test_update_holds_no_logits_of_a_whole_batch(cfg, one_device):
    rows, length, vocab = 2, 1024, 16384
    cfg = dataclasses.replace(cfg, vocab_size=vocab, max_positions=length, num_heads=2, num_kv_heads=1)
    compiled = lower_update(cfg, one_device, 4, rows, length).compile()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
    assert CHUNK_TOKENS * vocab in sizes and max(sizes) < rows * length * vocab / 2


def test_the_program_does_not_grow_with_depth(cfg, one_device):
    shallow, deep = (
        len(lower_update(dataclasses.replace(cfg, num_layers=depth), one_device, 4, 2, 32).as_text().splitlines())
        for depth in (4, 32)
    )
    assert deep == shallow
