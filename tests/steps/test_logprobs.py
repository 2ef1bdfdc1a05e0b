"""Log-probs: the shift, packing, chunking, and no logits of a whole batch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.params import abstract, shardings
from easyrl.core.sharding import Shard, make_mesh, stand_in
from easyrl.models.families import param_specs
from easyrl.models.heads import lm_logits
from easyrl.models.trunk import trunk
from easyrl.steps import logprobs as logprobs_module
from easyrl.steps.logprobs import CHUNKS, next_token_logprobs, target_mask
from easyrl.steps.state import with_shardings
from tests.steps.conftest import make_params


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_target_mask_stops_at_segment_ends_and_padding():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    assert target_mask(segments).tolist() == [[True, True, False, True, False, False, False]]


def test_logprobs_score_the_following_token_at_the_given_temperature(cfg, one_device):
    params = make_params(cfg, "lm", one_device)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, cfg.vocab_size)
    positions, segments = jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32)
    rows = (tokens, positions, segments)
    logits = jax.jit(lambda params: lm_logits(params, cfg, trunk(params, cfg, *rows)[0]))(params)
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / 0.7))

    logprobs, entropies = jax.jit(lambda params: next_token_logprobs(params, cfg, *rows, temperature=0.7))(params)

    for b in range(2):
        for t in range(8):
            np.testing.assert_allclose(logprobs[b, t], np.log(p[b, t, tokens[b, t + 1]]), atol=1e-5)
            np.testing.assert_allclose(entropies[b, t], -(p[b, t] * np.log(p[b, t])).sum(), atol=1e-5)
    assert (logprobs[:, -1] == 0).all() and (entropies[:, -1] == 0).all()


def test_chunking_changes_neither_values_nor_gradients(cfg, one_device, monkeypatch):
    params = make_params(cfg, "lm", one_device)
    tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, cfg.vocab_size)
    positions, segments = jnp.broadcast_to(jnp.arange(11), (2, 11)), jnp.ones((2, 11), jnp.int32)

    def loss(params):
        logprobs, entropies = next_token_logprobs(params, cfg, tokens, positions, segments)
        return jnp.sum(jnp.sin(logprobs) + 0.1 * entropies)

    whole, whole_grads = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(logprobs_module, "CHUNK", 4)
    monkeypatch.setattr(logprobs_module, "CHUNK_TOKENS", 8)
    chunked, chunked_grads = jax.jit(jax.value_and_grad(loss))(params)

    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked_grads, whole_grads)


@pytest.mark.parametrize("chunk", [3, 4, 16])
def test_only_what_is_wanted_is_computed_and_it_is_the_same(cfg, one_device, monkeypatch, chunk):
    params = make_params(cfg, "lm", one_device)
    tokens = jax.random.randint(jax.random.key(1), (3, 11), 0, cfg.vocab_size)
    positions, segments = jnp.broadcast_to(jnp.arange(11), (3, 11)), jnp.ones((3, 11), jnp.int32)
    wanted = jnp.array([[False] * 4 + [True] * 3 + [False] + [True] * 3, [False] * 11, [True] * 11])
    mask = wanted & target_mask(segments)

    def loss(params, wanted):
        found = next_token_logprobs(params, cfg, tokens, positions, segments, wanted=wanted, temperature=0.7)
        logprobs, entropies = (jnp.where(mask, x, 0.0) for x in found)
        return jnp.sum(jnp.sin(logprobs) + 0.1 * entropies), found

    (_, whole), whole_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, None)
    monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
    monkeypatch.setattr(logprobs_module, "CHUNK_TOKENS", chunk)
    (_, some), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, wanted)

    for a, b in zip(some, whole, strict=True):
        np.testing.assert_allclose(a, jnp.where(mask, b, 0.0), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, whole_grads)


def test_no_logits_of_the_whole_batch_exist_in_the_gradient(cfg, one_device):
    B, T, V = 2, 1024, 16384
    cfg = dataclasses.replace(cfg, vocab_size=V, max_positions=T, num_heads=2, num_kv_heads=1)
    params = abstract(param_specs(cfg, "lm"), jnp.float32)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def loss(params, tokens, positions, segments):
        return jnp.sum(next_token_logprobs(params, cfg, tokens, positions, segments)[0])

    compiled = jax.jit(jax.grad(loss)).lower(params, ids, ids, ids).compile()

    assert not re.search(rf"f32\[{B},{T},{V}\]|f32\[{B * T},{V}\]", compiled.as_text())


COLLECTIVE = re.compile(r" = (.*) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh_dim", ["1,8,1", "2,4,1"])
def test_head_and_embeddings_cross_the_mesh_once_a_pass(cfg, mesh_dim, tied):
    """A head is gathered for all chunks, its gradient added up after them; a table of embeddings stays in place."""
    B, T, V = 8, 1024, 640
    cfg = dataclasses.replace(cfg, vocab_size=V, max_positions=T, tied_embeddings=tied)
    mesh = make_mesh(mesh_dim)
    specs, shard = param_specs(cfg, "lm"), Shard(mesh)
    params = with_shardings(abstract(specs, jnp.float32), shardings(specs, mesh))
    ids = stand_in(mesh, jnp.int32, B, T)

    def loss(params, *rows):
        return jnp.sum(next_token_logprobs(params, cfg, *(shard(x, "batch", "time") for x in rows), shard=shard)[0])

    gradient = jax.jit(jax.grad(loss), out_shardings=shardings(specs, mesh))
    text = gradient.lower(params, ids, ids, ids).compile().as_text()
    exchanged = [found[1] for found in map(COLLECTIVE.search, text.splitlines()) if found]
    whole = [
        shape for result in exchanged for shape in re.findall(rf"f32\[{V},{cfg.width}\]|f32\[{cfg.width},{V}\]", result)
    ]
    assert len(whole) == 2, exchanged  # the head on its way out, its gradient on its way back
    assert not re.search(rf"{COLLECTIVE.pattern}.*{CHUNKS}\)*/while/body", text)
