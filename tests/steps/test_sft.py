"""Supervised fine-tuning: the loss against plain code, and the same result for every packing, grouping and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.core.masking import Mean, add_means
from easyrl.core.sharding import make_mesh
from easyrl.data.packing import Shape, pack
from easyrl.models.families import param_specs
from easyrl.models.heads import lm_logits
from easyrl.models.trunk import trunk
from easyrl.steps.sft import make_sft_eval, make_sft_step, perplexity, place_sft_batch
from easyrl.steps.state import create_train_state
from tests.steps.conftest import make_params

# mesh, rows per group, lengths of packed rows (none: one sequence a row)
LAYOUTS = [("1,1,1", 1, ()), ("8,1,1", 8, (24,)), ("1,2,4", 4, (60, 30))]


def place(ragged, mask, mesh, rows, choices):
    T = ragged.tokens.shape[1]
    packing = pack(ragged.lengths, T, [Shape(rows, length) for length in choices or (T,)], packed=bool(choices))
    return place_sft_batch(ragged.tokens, mask, packing, mesh)


@pytest.fixture
def expected(cfg, one_device, ragged):
    """Loss and gradient from padded sequences one at a time, softmax and mean written out."""
    T = ragged.tokens.shape[1]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        def of_row(row):
            tokens, length, mask = row
            segments = (jnp.arange(T) < length).astype(jnp.int32)
            hidden, _ = trunk(params, cfg, tokens[None], jnp.arange(T)[None], segments[None])
            logits = lm_logits(params, cfg, hidden)[0]
            logprobs = logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))
            return jnp.sum(-logprobs[jnp.arange(T - 1), tokens[1:]] * mask[:-1])

        return jnp.sum(jax.lax.map(of_row, (ragged.tokens, ragged.lengths, ragged.mask))) / ragged.mask.sum()

    return jax.device_get(loss(make_params(cfg, "lm", one_device)))


def test_loss_and_gradient_are_those_of_single_sequences_in_every_layout(cfg, ragged, expected):
    loss, grads = expected
    for mesh_dim, rows, choices in LAYOUTS:
        mesh = make_mesh(mesh_dim, jax.devices()[: 1 if mesh_dim == "1,1,1" else 8])
        optimizer = optax.sgd(1.0)  # the update is the gradient
        params = make_params(cfg, "lm", mesh)
        before = jax.device_get(params)
        state = create_train_state(params, param_specs(cfg, "lm"), optimizer, mesh)
        step = make_sft_step(cfg, optimizer, mesh)

        state, metrics = step(state, place(ragged, np.zeros_like(ragged.mask), mesh, rows, choices))
        assert metrics["loss"].value == 0 and metrics["loss"].count == 0
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))

        state, metrics = step(state, place(ragged, ragged.mask, mesh, rows, choices))
        np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-5)
        after = jax.device_get(state.params)
        jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, g, atol=1e-5), before, after, grads)
        np.testing.assert_allclose(metrics["grad_norm"].value, optax.tree.norm(grads), rtol=1e-4)
        assert metrics["loss"].count == ragged.mask.sum()
        assert metrics["tokens"].value == ragged.lengths.sum()
        assert metrics["skipped"].value == 0 and state.updates == 2


def test_evaluation_gives_the_loss_and_its_perplexity(cfg, ragged, expected):
    mesh = make_mesh("2,2,2")
    batch = place(ragged, ragged.mask, mesh, rows=4, choices=(48, 24))
    metrics = make_sft_eval(cfg, mesh)(make_params(cfg, "lm", mesh), batch)
    np.testing.assert_allclose(metrics["loss"].value, expected[0], rtol=1e-5)
    assert metrics["loss"].count == metrics["entropy"].count == ragged.mask.sum()
    assert 0 < metrics["entropy"].value < np.log(cfg.vocab_size)
    np.testing.assert_allclose(perplexity(metrics["loss"]), np.exp(expected[0]), rtol=1e-5)


def test_perplexity_weighs_tokens_not_batches():
    short, long = Mean(jnp.float32(3.0), jnp.float32(1.0)), Mean(jnp.float32(1.0), jnp.float32(7.0))
    assert perplexity(add_means(short, long)) == pytest.approx(np.exp((3.0 + 1.0) / (1 + 7)))
