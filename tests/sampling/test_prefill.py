"""The prefill: what packed prompts leave in the cache is what each leaves that is alone in its row."""

import jax
import numpy as np
import pytest

from easyrl.core.params import shardings
from easyrl.core.sharding import Shard, make_mesh, num_data_shards
from easyrl.models.cache import init_cache
from easyrl.models.families import param_specs
from easyrl.models.heads import lm_logits
from easyrl.models.trunk import trunk
from easyrl.sampling.decode import SamplingConfig
from easyrl.sampling.prefill import prefill
from easyrl.steps.sampling import Sampler, plan_prompts
from tests.tiny import draw_params, tiny_config

P = 300
CFG = tiny_config(num_heads=16, num_kv_heads=8, max_positions=512)  # divides by 8 devices
PARAMS = draw_params(CFG)
LENGTHS = np.array([300, 1, 0, 120, 90, 299, 40, 200])  # some share a row, some do not
PROMPTS = np.random.default_rng(0).integers(0, 39, (8, P)).astype(np.int32)


def place(mesh_dim):
    """(mesh, parameters on it)."""
    mesh = make_mesh(mesh_dim, jax.devices()[: np.prod([int(size) for size in mesh_dim.split(",")])])
    return mesh, jax.device_put(PARAMS, shardings(param_specs(CFG, "lm"), mesh))


def prefilled(mesh_dim, lengths=LENGTHS):
    """(hidden, cache) by the prefill on these devices, and the compiled program."""
    mesh, params = place(mesh_dim)
    shards = num_data_shards(mesh)

    @jax.jit
    def run(params, **prompts):
        hidden, left = prefill(params, CFG, **prompts, shards=shards, shard=Shard(mesh))
        return hidden, left.cache()

    arguments = {"prompts_BP": PROMPTS, "lengths_B": lengths, "plans": plan_prompts(lengths, P, shards)}
    return jax.device_get(run(params, **arguments)), run.lower(params, **arguments).compile().as_text()


@pytest.fixture(scope="module")
def padded():
    """(hidden states [B, P, D], cache) of the padded batch, a prompt in each row."""
    positions = np.broadcast_to(np.arange(P), PROMPTS.shape)
    segments = (positions < LENGTHS[:, None]).astype(np.int32)
    run = jax.jit(lambda cache: trunk(PARAMS, CFG, PROMPTS, positions, segments, cache=cache))
    return jax.device_get(run(init_cache(CFG, *PROMPTS.shape)))


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2", "1,8,1", "8,1,1"])
def test_packed_prompts_leave_what_padded_ones_do(mesh_dim, padded):
    (hidden, cache), program = prefilled(mesh_dim)
    expected, slots = padded
    real = np.arange(P) < LENGTHS[:, None]
    for ours, theirs in zip((*cache.keys, *cache.values), (*slots.keys, *slots.values), strict=True):
        assert ours.shape == theirs.shape
        ours, theirs = (np.where(real[:, None, :, None], x, 0) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(cache.segment_ids_BS, real)
    np.testing.assert_array_equal(np.where(real, cache.positions_BS, 0), np.where(real, np.arange(P), 0))
    assert cache.index == P
    rows = np.flatnonzero(LENGTHS)
    np.testing.assert_allclose(hidden[rows], expected[rows, LENGTHS[rows] - 1], atol=1e-5)
    if mesh_dim == "8,1,1":  # no weight has to come from another device, and no token's keys or values either
        assert "all-gather" not in program and "all-to-all" not in program and "permute(" not in program


def test_a_batch_of_nothing_but_filler_is_empty():
    (hidden, cache), _ = prefilled("1,1,1", np.zeros(8, int))
    assert not hidden.any() and not cache.segment_ids_BS.any() and not any(keys.any() for keys in cache.keys)


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2"])
def test_samples_of_packed_prompts_have_the_log_probs_of_whole_sequences(mesh_dim):
    """Two to each prompt, of which none is the filler's."""
    (mesh, params), C, n = place(mesh_dim), 3, 2
    sample = Sampler(CFG, SamplingConfig(max_new_tokens=C), stop_ids=(), num_samples=n, mesh=mesh)
    out = jax.device_get(sample(params, PROMPTS, LENGTHS, jax.random.key(1), np.arange(8 * n)))
    np.testing.assert_array_equal(out.lengths_B, np.repeat(np.where(LENGTHS, C, 0), n))

    lengths = np.repeat(LENGTHS, n)
    tokens = np.pad(np.repeat(PROMPTS, n, axis=0), ((0, 0), (0, C)))
    for row, start in enumerate(lengths):
        tokens[row, start : start + C] = out.tokens_BC[row]
    positions = np.broadcast_to(np.arange(P + C), tokens.shape)
    hidden, _ = jax.jit(trunk, static_argnums=1)(PARAMS, CFG, tokens, positions, np.ones_like(tokens))
    logits = lm_logits(PARAMS, CFG, hidden)
    logprobs = jax.nn.log_softmax(np.asarray(logits, np.float64))
    for row in np.flatnonzero(lengths):
        at = lengths[row] - 1 + np.arange(C)
        np.testing.assert_allclose(out.logprobs_BC[row], logprobs[row, at, out.tokens_BC[row]], atol=1e-5)
