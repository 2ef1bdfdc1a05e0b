"""Preference steps: every loss against plain code, the same result for every packing, grouping and mesh, references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.algos.dpo import LOSSES, REFERENCE_FREE
from easyrl.core.errors import UserError
from easyrl.core.masking import add_metrics
from easyrl.core.sharding import make_mesh, put, replicated
from easyrl.data.alike import tokens_alike
from easyrl.data.packing import Shape, pack
from easyrl.models.families import param_specs
from easyrl.models.heads import lm_logits
from easyrl.models.trunk import trunk
from easyrl.steps.dpo import (
    DPOConfig,
    make_answer_logprobs,
    make_dpo_eval,
    make_dpo_step,
    place_answers,
    with_total_loss,
)
from easyrl.steps.packed import place_plans
from easyrl.steps.state import create_train_state
from tests.steps.conftest import make_params

# mesh, rows per group, packed row length (0: one pair a row)
LAYOUTS = [("1,1,1", 2, ()), ("1,1,1", 2, (30, 24)), ("2,2,2", 4, (48,))]
OPTIONS = {"sigmoid": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2}, "simpo": {"beta": 2.0}}


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


class Frozen:
    """A ragged batch that jit takes as a constant."""

    def __init__(self, ragged):
        self.tokens, self.lengths, self.mask = ragged.tokens, ragged.lengths, ragged.mask


def plain_answers(params, cfg, ragged):
    """(log-prob of each answer, number of its tokens) from padded sequences one at a time, the softmax written out."""
    T = ragged.tokens.shape[1]

    def of_row(row):
        tokens, length, mask = row
        segments = (jnp.arange(T) < length).astype(jnp.int32)
        hidden, _ = trunk(params, cfg, tokens[None], jnp.arange(T)[None], segments[None])
        logits = lm_logits(params, cfg, hidden)[0]
        logprobs = logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))
        return jnp.sum(logprobs[jnp.arange(T - 1), tokens[1:]] * mask[:-1])

    return jax.lax.map(of_row, (ragged.tokens, ragged.lengths, ragged.mask)), ragged.mask.sum(axis=1)


def plain_loss(config, logprobs, ref, lengths):
    """The losses of docs/dpo.md as they stand there, with means over pairs and over tokens."""
    w = logprobs[::2]
    rw, rl = (logprobs - ref)[::2], (logprobs - ref)[1::2]
    aw, al = (logprobs / lengths)[::2], (logprobs / lengths)[1::2]
    ratio_w, ratio_l = rw / lengths[::2], rl / lengths[1::2]
    b, e = config.beta, config.label_smoothing
    noisy = lambda x: -(1 - e) * jnp.log(sigmoid(x)) - e * jnp.log(sigmoid(-x))
    odds = lambda a: jnp.log(jnp.exp(a) / (1 - jnp.exp(a)))
    loss = {
        "sigmoid": lambda: noisy(b * (rw - rl)),
        "robust": lambda: (
            -(1 - e) * jnp.log(sigmoid(b * (rw - rl))) + e * jnp.log(sigmoid(-b * (rw - rl)))
        ) / (1 - 2 * e),
        "ipo": lambda: (ratio_w - ratio_l - 1 / (2 * b)) ** 2,
        "hinge": lambda: jnp.maximum(0, 1 - b * (rw - rl)),
        "sigmoid_norm": lambda: noisy(b * (ratio_w - ratio_l)),
        "simpo": lambda: noisy(b * (aw - al) - config.simpo_gamma),
        "orpo": lambda: -b * jnp.log(sigmoid(odds(aw) - odds(al))),
        "apo_zero": lambda: 1 - sigmoid(b * rw) + sigmoid(b * rl),
        "apo_down": lambda: sigmoid(b * rw) + 1 - sigmoid(b * (rw - rl)),
        "dpop": lambda: noisy(b * (rw - rl - config.dpop_lambda * jnp.maximum(0, -rw))),
    }[config.loss]()  # fmt: skip
    weight = config.nll_coef + (1.0 if config.loss == "orpo" else 0.0)
    nll = jnp.sum(-w) / jnp.sum(lengths[::2]) if config.nll_per_token else jnp.mean(-w / lengths[::2])
    return jnp.mean(loss) + weight * nll


@pytest.fixture
def reference(ragged):
    """Log-probs of each answer under some reference."""
    rng = np.random.default_rng(3)
    return (-4.6 * ragged.mask.sum(axis=1) + rng.normal(size=8)).astype(np.float32)


def place(ragged, ref_logprobs, mesh, rows, choices, extra=0):
    """The ragged batch as pairs, with `extra` filler sequences behind it."""
    T = ragged.tokens.shape[1]
    tokens, mask = np.pad(ragged.tokens, ((0, extra), (0, 0))), np.pad(ragged.mask, ((0, extra), (0, 0)))
    lengths = np.pad(ragged.lengths, (0, extra))
    shapes = [Shape(rows, length) for length in choices or (T,)]
    alike = tokens_alike(tokens, mask, lengths)
    packing = pack(lengths, T, shapes, together=2, alike=alike, packed=bool(choices))
    ref_logprobs = np.pad(ref_logprobs, (0, extra), constant_values=7.0)
    return place_answers(tokens, mask, ref_logprobs, packing, mesh, paired=True)


def start(cfg, mesh):
    """A state whose next state is the old one minus the gradient."""
    return create_train_state(make_params(cfg, "lm", mesh), param_specs(cfg, "lm"), optax.sgd(1.0), mesh)


def mesh_of(mesh_dim):
    return make_mesh(mesh_dim, jax.devices()[: 1 if mesh_dim == "1,1,1" else 8])


def check(cfg, ragged, config, layouts, reference):
    @jax.jit
    def plain(params):
        def loss(params):
            logprobs, lengths = plain_answers(params, cfg, ragged)
            return plain_loss(config, logprobs, reference, lengths), logprobs

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logprobs), grads = jax.device_get(plain(make_params(cfg, "lm", mesh_of("1,1,1"))))
    for mesh_dim, rows, choices in layouts:
        mesh = mesh_of(mesh_dim)
        state = start(cfg, mesh)
        before = jax.device_get(state.params)
        batch = place(ragged, reference, mesh, rows, choices, extra=2 if choices else 0)

        evaluated = with_total_loss(make_dpo_eval(cfg, mesh, config)(state.params, batch), config)
        state, metrics = make_dpo_step(cfg, optax.sgd(1.0), mesh, config)(state, batch)

        np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-5)
        after = jax.device_get(state.params)
        jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, g, atol=1e-5), before, after, grads)
        spared = ragged.lengths.sum() - metrics["tokens"].value
        assert (spared > 0) == bool(choices and tokens_alike(ragged.tokens, ragged.mask, ragged.lengths).any())
        assert metrics["skipped"].value == 0
        np.testing.assert_allclose(metrics["grad_norm"].value, optax.tree.norm(grads), rtol=1e-4)
        assert evaluated.keys() == metrics.keys() - {"grad_norm", "skipped", "tokens"}
        for name, mean in evaluated.items():
            np.testing.assert_allclose(mean.value, metrics[name].value, atol=1e-5, err_msg=name)
    return logprobs, metrics


def test_loss_and_gradient_are_those_of_single_sequences_in_every_layout(cfg, ragged, reference):
    config = DPOConfig("sigmoid", label_smoothing=0.1, nll_coef=0.7)
    logprobs, metrics = check(cfg, ragged, config, LAYOUTS, reference)
    rewards = 0.1 * (logprobs - reference)
    expected = {
        "rewards/chosen": rewards[::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/margins": (rewards[::2] - rewards[1::2]).mean(),
        "rewards/accuracies": (rewards[::2] > rewards[1::2]).mean(),
        "logps/chosen": logprobs[::2].mean(),
        "logps/rejected": logprobs[1::2].mean(),
        "nll_loss": -logprobs[::2].sum() / ragged.mask[::2].sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert metrics["loss"].value == metrics["preference_loss"].value + np.float32(0.7) * metrics["nll_loss"].value


def test_prompts_that_lie_once_change_nothing(cfg, begun_alike, reference, stems):
    alike = tokens_alike(begun_alike.tokens, begun_alike.mask, begun_alike.lengths)
    assert (alike > 0).all()
    check(cfg, begun_alike, DPOConfig("sigmoid", nll_coef=0.7), LAYOUTS[1:], reference)


def test_every_loss_is_that_of_its_paper(cfg, ragged, reference, one_device):
    params = make_params(cfg, "lm", one_device)
    logprobs, lengths = jax.jit(plain_answers, static_argnums=(1, 2))(params, cfg, Frozen(ragged))
    batch = place(ragged, reference, one_device, 2, (60,), extra=2)
    for loss in LOSSES:
        config = DPOConfig(loss, nll_coef=0.5, nll_per_token=False, **OPTIONS.get(loss, {}))
        found = with_total_loss(make_dpo_eval(cfg, one_device, config)(params, batch), config)["loss"].value
        expected = plain_loss(config, logprobs, reference, lengths)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=loss)


def test_both_terms_have_their_gradient_when_answers_weigh_alike(cfg, ragged, reference):
    check(cfg, ragged, DPOConfig("orpo", nll_per_token=False), LAYOUTS[1:2], reference)


def test_a_policy_equal_to_its_reference_has_loss_log_2(cfg, ragged, one_device):
    state = start(cfg, one_device)
    live = make_answer_logprobs(cfg, one_device)
    batch = place(ragged, np.zeros(8), one_device, 2, (30, 24))
    batch = batch.replace(ref_logprobs=live(state.params, batch.tokens, batch.mask, batch.plans))
    _, metrics = make_dpo_step(cfg, optax.sgd(1.0), one_device, DPOConfig())(state, batch)
    np.testing.assert_allclose(metrics["loss"].value, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"].value, 0.0, atol=1e-6)


def test_reference_logprobs_are_those_of_single_sequences(cfg, ragged, one_device):
    params = make_params(cfg, "lm", one_device, seed=5)
    expected, _ = jax.jit(plain_answers, static_argnums=(1, 2))(params, cfg, Frozen(ragged))
    for mesh_dim, rows, choices in LAYOUTS[1:3]:
        mesh = mesh_of(mesh_dim)
        plan = place_plans(pack(ragged.lengths, 24, [Shape(rows, length) for length in choices]), 8, mesh)
        arrays = put((ragged.tokens, ragged.mask), replicated(mesh))
        logprobs = make_answer_logprobs(cfg, mesh)(make_params(cfg, "lm", mesh, seed=5), *arrays, plan)
        np.testing.assert_allclose(logprobs, expected, rtol=1e-5)


def test_batches_add_up_to_the_data_set(cfg, ragged, reference, one_device):
    config = DPOConfig("sigmoid", nll_coef=1.0)
    evaluate, params = make_dpo_eval(cfg, one_device, config), make_params(cfg, "lm", one_device)
    whole = with_total_loss(evaluate(params, place(ragged, reference, one_device, 2, (30, 24))), config)
    parts = []
    for kept in (slice(0, 2), slice(2, 8)):
        part = Frozen(ragged)
        part.lengths, part.mask = np.zeros(8, np.int64), np.zeros_like(ragged.mask)
        part.lengths[kept], part.mask[kept] = ragged.lengths[kept], ragged.mask[kept]
        parts.append(evaluate(params, place(part, reference, one_device, 2, (30, 24))))
    for name, mean in with_total_loss(add_metrics(*parts), config).items():
        np.testing.assert_allclose(mean.value, whole[name].value, rtol=1e-5, err_msg=name)


def test_a_plan_that_parts_a_pair_is_refused(ragged, reference, one_device):
    apart = pack(ragged.lengths, 24, [Shape(1, 24)], packed=False)
    with pytest.raises(ValueError, match="parts a pair: both its answers must be in one group"):
        place_answers(ragged.tokens, ragged.mask, reference, apart, one_device, paired=True)


def test_only_the_trained_model_has_optimizer_state(cfg, one_device):
    state = start(cfg, one_device)
    adam = create_train_state(state.params, param_specs(cfg, "lm"), optax.adam(1e-3), one_device)
    numbers = sum(x.size for x in jax.tree.leaves(adam.params))
    assert sum(x.size for x in jax.tree.leaves(adam.opt_state)) == 2 * numbers + 1


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "--label_smoothing=0.1: --loss=hinge does not read it"),
        ({"loss": "sigmoid", "dpop_lambda": 5.0}, "--dpop_lambda=5.0: --loss=sigmoid does not read it"),
        ({"loss": "kto", "nll_coef": 1.0}, "--nll_coef=1.0: --loss=kto does not read it"),
        ({"loss": "ipo", "undesirable_weight": 2.0}, "--undesirable_weight=2.0: --loss=ipo does not read it"),
        ({"nll_per_token": False}, "--nll_per_token=False: needs --nll_coef, which is 0"),
        ({"label_smoothing": 0.5}, "--label_smoothing=0.5: expected less than 0.5"),
    ],
)
def test_a_flag_that_the_loss_does_not_read_is_refused(changes, found):
    with pytest.raises(UserError, match=found):
        DPOConfig(**changes)


def test_losses_without_a_reference_say_so():
    assert {name for name in (*LOSSES, "kto") if not DPOConfig(name).reads_reference} == REFERENCE_FREE
