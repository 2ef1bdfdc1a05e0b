"""Reward models: losses against plain code, one result for every packing and mesh, scores of the last real token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.core.sharding import make_mesh
from easyrl.data.alike import tokens_alike
from easyrl.data.packing import Shape, pack
from easyrl.models.families import param_specs
from easyrl.models.heads import scalar
from easyrl.models.trunk import trunk
from easyrl.steps.reward import (
    RewardLossConfig,
    SequenceScorer,
    make_reward_eval,
    make_reward_step,
    place_reward_batch,
)
from easyrl.steps.segments import pairs_together
from easyrl.steps.state import create_train_state
from tests.steps.conftest import make_params

PAIRWISE = RewardLossConfig("pairwise", label_smoothing=0.1, center_coef=0.05)
POINTWISE = RewardLossConfig("pointwise")
MARGINS = np.array([0.0, 0.5, 2.0, -0.25], np.float32)
LABELS = np.array([1, 0, 0, 1, 1, 1, 0, 0], np.float32)
# mesh, rows per group, lengths of packed rows (none: one sequence a row)
LAYOUTS = {
    "pairwise": [("1,1,1", 2, ()), ("8,1,1", 8, (48,)), ("1,2,4", 2, (40, 24))],
    "pointwise": [("2,2,2", 4, (48, 24))],
}


def log_sigmoid(x):
    return -jnp.log1p(jnp.exp(-x))


def plain_scores(params, cfg, tokens, lengths):
    """The scalar at the last real token of padded sequences, one sequence at a time."""
    T = tokens.shape[1]

    def of_row(row):
        tokens, length = row
        segments = (jnp.arange(T) < length).astype(jnp.int32)
        hidden, _ = trunk(params, cfg, tokens[None], jnp.arange(T)[None], segments[None])
        return scalar(params, cfg, hidden)[0, length - 1]

    return jax.lax.map(of_row, (tokens, lengths))


def plain_loss(scores, config):
    if config.loss == "pointwise":
        return -jnp.mean(LABELS * log_sigmoid(scores) + (1 - LABELS) * log_sigmoid(-scores))
    chosen, rejected = scores[::2], scores[1::2]
    x = chosen - rejected - MARGINS
    smooth = config.label_smoothing
    preference = -(1 - smooth) * log_sigmoid(x) - smooth * log_sigmoid(-x)
    return jnp.mean(preference + config.center_coef * (chosen + rejected) ** 2)


def place(ragged, config, mesh, rows, choices, extra=0):
    """The ragged batch, with `extra` filler sequences behind it."""
    T = ragged.tokens.shape[1]
    tokens = np.pad(ragged.tokens, ((0, extra), (0, 0)))
    lengths = np.pad(ragged.lengths, (0, extra))
    together = 2 if config.loss == "pairwise" else 1
    targets = np.pad(MARGINS if together == 2 else LABELS, (0, extra // together), constant_values=9.0)
    shapes = [Shape(rows, length) for length in choices or (T,)]
    mask = np.pad(ragged.mask, ((0, extra), (0, 0)))
    alike = tokens_alike(tokens, mask, lengths) if together == 2 else None
    packing = pack(lengths, T, shapes, together=together, alike=alike, packed=bool(choices))
    return place_reward_batch(tokens, lengths, targets, packing, mesh)


@pytest.mark.parametrize("config", [PAIRWISE, POINTWISE], ids=lambda config: config.loss)
def test_loss_and_gradient_are_those_of_single_sequences_in_every_layout(cfg, ragged, one_device, config):
    check(cfg, ragged, one_device, config, LAYOUTS[config.loss])


def test_prompts_that_lie_once_change_nothing(cfg, begun_alike, one_device, stems):
    check(cfg, begun_alike, one_device, PAIRWISE, LAYOUTS["pairwise"][1:])


def check(cfg, ragged, one_device, config, layouts):
    @jax.jit
    def plain(params):
        def loss(params):
            scores = plain_scores(params, cfg, ragged.tokens, ragged.lengths)
            return plain_loss(scores, config), scores

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, scores), grads = jax.device_get(plain(make_params(cfg, "reward", one_device)))
    better = scores[::2] > scores[1::2] if config is PAIRWISE else (scores > 0) == LABELS
    for mesh_dim, rows, choices in layouts:
        mesh = make_mesh(mesh_dim, jax.devices()[: 1 if mesh_dim == "1,1,1" else 8])
        optimizer = optax.sgd(1.0)  # the update is the gradient
        params = make_params(cfg, "reward", mesh)
        before = jax.device_get(params)
        state = create_train_state(params, param_specs(cfg, "reward"), optimizer, mesh)
        batch = place(ragged, config, mesh, rows, choices, extra=2 if choices else 0)

        state, metrics = make_reward_step(cfg, optimizer, mesh, config)(state, batch)

        np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-5)
        after = jax.device_get(state.params)
        jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, g, atol=1e-5), before, after, grads)
        assert metrics["loss"].count == len(better)
        shared = choices and config is PAIRWISE and tokens_alike(ragged.tokens, ragged.mask, ragged.lengths).any()
        assert (metrics["tokens"].value < ragged.lengths.sum()) == bool(shared)
        np.testing.assert_allclose(metrics["accuracy"].value, better.mean())
        np.testing.assert_allclose(metrics["mean_reward"].value, scores.mean(), atol=1e-5)
    # The last layout also serves for the evaluation; the step has taken its parameters.
    evaluated, evaluated_scores = make_reward_eval(cfg, mesh, config)(make_params(cfg, "reward", mesh), batch)
    np.testing.assert_allclose(evaluated_scores, np.pad(scores, (0, 2)), atol=1e-5)
    assert evaluated.keys() == metrics.keys() - {"grad_norm", "skipped", "tokens"}
    for name, mean in evaluated.items():
        np.testing.assert_allclose(mean.value, metrics[name].value, atol=1e-5, err_msg=name)


def test_a_step_with_one_label_alone_has_no_reward_of_the_other(cfg, ragged, one_device):
    batch = place(ragged, POINTWISE, one_device, 8, ())
    params, optimizer = make_params(cfg, "reward", one_device), optax.sgd(1.0)
    state = create_train_state(params, param_specs(cfg, "reward"), optimizer, one_device)
    step = make_reward_step(cfg, optimizer, one_device, POINTWISE)
    _, metrics = step(state, batch.replace(targets=jnp.ones_like(batch.targets)))
    assert metrics["rewards/chosen"].value == metrics["mean_reward"].value
    assert jnp.isnan(metrics["rewards/rejected"].value)


def test_a_plan_that_parts_a_pair_is_refused(cfg, ragged, one_device):
    T = ragged.tokens.shape[1]
    together = pack(ragged.lengths, T, [Shape(2, 60), Shape(2, 40)], together=2)
    apart = pack(ragged.lengths, T, [Shape(1, T)], packed=False)
    assert pairs_together(together, ragged.tokens.shape) and not pairs_together(apart, ragged.tokens.shape)
    with pytest.raises(ValueError, match="parts a pair: both its sequences must be in one group"):
        place_reward_batch(ragged.tokens, ragged.lengths, MARGINS, apart, one_device)


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2"])
def test_scorer_gives_the_score_of_the_last_token_with_one_program(cfg, ragged, one_device, mesh_dim):
    mesh = make_mesh(mesh_dim, jax.devices()[: 1 if mesh_dim == "1,1,1" else 8])
    plain = jax.jit(plain_scores, static_argnums=1)
    expected = plain(make_params(cfg, "reward", one_device), cfg, ragged.tokens, ragged.lengths)
    scorer = SequenceScorer(make_params(cfg, "reward", mesh), cfg, mesh, max_length=24, num_sequences=3, rows=4)
    sequences = [tokens[:length] for tokens, length in zip(ragged.tokens, ragged.lengths, strict=True)]

    scores = scorer(sequences)  # in three batches: 3, 3 and 2

    assert scores.dtype == np.float32 and scores.shape == (8,)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(scorer(sequences[:1]), expected[:1], atol=1e-5)
    assert scorer._score._cache_size() == 1
    assert scorer([]).shape == (0,)


def test_no_score_is_read_at_the_pad_token(cfg, one_device):
    """As transformers' classifiers do it: at the last token that is another, wherever the pad token stands."""
    params = make_params(cfg, "reward", one_device)
    scorer = SequenceScorer(params, cfg, one_device, max_length=8, num_sequences=3, rows=1, pad_id=9)
    text = np.array([5, 9, 7, 3], np.int32)
    plain, ended, padded = scorer([text, np.append(text, 9), np.append(text, [9, 9, 9])])
    assert plain == pytest.approx(ended, abs=1e-6) and plain == pytest.approx(padded, abs=1e-6)
    without = SequenceScorer(params, cfg, one_device, max_length=8, num_sequences=3, rows=1)
    assert abs(without([np.append(text, 9)])[0] - plain) > 1e-4


@pytest.mark.parametrize("length", [0, 25])
def test_scorer_refuses_sequences_it_cannot_hold(cfg, one_device, length):
    scorer = SequenceScorer(
        make_params(cfg, "reward", one_device), cfg, one_device, max_length=24, num_sequences=2, rows=1
    )
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens, expected 1 to 24"):
        scorer([np.ones(3, np.int32), np.ones(length, np.int32)])
