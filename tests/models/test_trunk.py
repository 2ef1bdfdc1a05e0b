"""The trunk's relations: packing, padding, caching, windows and meshes change the work done and never a number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easyrl.core.params import shardings
from easyrl.core.segments import branch
from easyrl.core.sharding import DATA_AXES, Shard, make_mesh
from easyrl.models.cache import grow_cache, init_cache, repeat_rows
from easyrl.models.families import param_specs
from easyrl.models.trunk import trunk, unstack_layers
from tests.tiny import draw_params, tiny_bloom, tiny_config, tiny_gpt2

TOLERANCE = 1e-5
CASES = {
    "llama": tiny_config(),
    "window": tiny_config(sliding_window=3),
    "window-on-one-layer": tiny_config(sliding_window=3, sliding_layers=(True, False)),
    "switches": tiny_config(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True),
    "gpt2": tiny_gpt2(),
    "bloom": tiny_bloom(),
}


@functools.cache
def run(cfg, mesh=None):
    """The jitted trunk of `cfg`; with a cache it returns the grown cache too."""
    shard = None if mesh is None else Shard(mesh)
    return jax.jit(lambda params, *inputs, cache=None: trunk(params, cfg, *inputs, cache=cache, shard=shard))


def rows(lengths, T, seed=0):
    """Tokens [B, T] with garbage after each row's length; positions; segment ids."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 40, (len(lengths), T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return tokens, positions, (positions < np.array(lengths)[:, None]).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_equal_separate_rows(case):
    cfg = CASES[case]
    params, lengths, T = draw_params(cfg), (5, 7, 3), 16
    tokens, positions, segments = rows(lengths, T)
    separate = np.asarray(run(cfg)(params, tokens, positions, segments)[0])

    packed = np.zeros((3, 1, T), np.int32)
    packed[1] = 999  # positions of padding are garbage too
    start = 0
    for number, length in enumerate(lengths):
        here = slice(start, start + length)
        packed[:, 0, here] = tokens[number, :length], np.arange(length), np.full(length, number + 1)
        start += length
    together = np.asarray(run(cfg)(params, *packed)[0])[0]
    expected = np.concatenate([separate[number, :length] for number, length in enumerate(lengths)])
    np.testing.assert_allclose(together[:start], expected, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_what_sequences_begin_with_may_lie_once(case, stems):
    cfg = CASES[case]
    params, lengths, same, T = draw_params(cfg), (8, 9, 4), 6, 20
    tokens, positions, segments = rows(lengths, T)
    tokens[1, :same] = tokens[0, :same]
    separate = np.asarray(run(cfg)(params, tokens, positions, segments)[0])
    parts = [(0, 0, same, 1), (0, same, 8, branch(1, 1)), (1, same, 9, branch(1, 2)), (2, 0, 4, 2)]

    packed = np.zeros((3, 1, T), np.int32)
    start = 0
    for row, first, end, segment in parts:
        here = slice(start, start + end - first)
        packed[:, 0, here] = tokens[row, first:end], np.arange(first, end), np.full(end - first, segment)
        start = here.stop
    together = np.asarray(run(cfg)(params, *packed)[0])[0]
    expected = np.concatenate([separate[row, first:end] for row, first, end, _ in parts])
    np.testing.assert_allclose(together[:start], expected, atol=TOLERANCE)


def test_neither_padding_nor_what_is_in_it_matters():
    cfg = CASES["llama"]
    params = draw_params(cfg)
    tokens, positions, segments = rows((5, 12), 12)
    expected = np.asarray(run(cfg)(params, tokens, positions, segments)[0])
    other = np.where(segments > 0, tokens, (tokens + 17) % 40)
    garbage = np.asarray(run(cfg)(params, other, positions, segments)[0])
    shorter = np.asarray(run(cfg)(params, tokens[:1, :5], positions[:1, :5], segments[:1, :5])[0])
    np.testing.assert_array_equal(garbage[segments > 0], expected[segments > 0])
    np.testing.assert_allclose(shorter[0], expected[0, :5], atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached(case):
    """A prefill that fills its cache, a chunk into a grown cache, then single tokens through unrolled layers."""
    cfg = CASES[case]
    params, (T, first, chunk) = draw_params(cfg), (9, 4, 3)
    tokens, positions, segments = rows((9, 9), T)
    expected = np.asarray(run(cfg)(params, tokens, positions, segments)[0])

    hidden = []
    cache = init_cache(cfg, batch=2, size=first)
    for start, end in ((0, first), (first, first + chunk), *((t, t + 1) for t in range(first + chunk, T))):
        inputs = (x[:, start:end] for x in (tokens, positions, segments))
        layers = unstack_layers(params, cfg) if end - start == 1 else params
        out, cache = run(cfg)(layers, *inputs, cache=cache)
        hidden.append(out)
        cache = grow_cache(cache, T) if start == 0 else cache
    np.testing.assert_allclose(jnp.concatenate(hidden, axis=1), expected, atol=TOLERANCE)
    assert int(cache.index) == T == cache.size


def test_rows_of_mixed_lengths_go_on_after_right_padding():
    """Prompts of 2 and 5 tokens in 5 slots, then one token each: as if each row had been alone and unpadded."""
    cfg = CASES["llama"]
    params = draw_params(cfg)
    tokens, positions, segments = rows((2, 5), 5)
    new = np.array([[7], [8]], np.int32)
    _, cache = run(cfg)(params, tokens, positions, segments, cache=init_cache(cfg, 2, 5))
    out, _ = run(cfg)(params, new, np.array([[2], [5]]), np.ones((2, 1), np.int32), cache=grow_cache(cache, 8))
    for row, length in enumerate((2, 5)):
        alone = np.append(tokens[row, :length], new[row])[None]
        expected = run(cfg)(params, alone, np.arange(length + 1)[None], np.ones_like(alone))[0]
        np.testing.assert_allclose(out[row, 0], expected[0, -1], atol=TOLERANCE)


def test_repeated_rows_are_copies():
    cfg = CASES["llama"]
    tokens, positions, segments = rows((3, 4), 4)
    _, cache = run(cfg)(draw_params(cfg), tokens, positions, segments, cache=init_cache(cfg, 2, 4))
    repeated = repeat_rows(cache, 3)
    np.testing.assert_array_equal(repeated.keys[1], np.repeat(cache.keys[1], 3, axis=0))
    np.testing.assert_array_equal(repeated.segment_ids_BS, np.repeat(cache.segment_ids_BS, 3, axis=0))
    assert int(repeated.index) == 4


def test_a_window_forgets_what_lies_further_back():
    """With window w and L layers a token's hidden state depends on the L (w - 1) tokens before it and no further."""
    cfg = CASES["window"]
    params, T = draw_params(cfg), 10
    tokens, positions, segments = rows((T,), T)
    reach = cfg.num_layers * (cfg.sliding_window - 1)

    def last_hidden(changed):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % 40
        return np.asarray(run(cfg)(params, other, positions, segments)[0])[0, -1]

    expected = np.asarray(run(cfg)(params, tokens, positions, segments)[0])[0, -1]
    np.testing.assert_array_equal(last_hidden(T - 2 - reach), expected)
    assert np.abs(last_hidden(T - 1 - reach) - expected).max() > 1e-5


def test_a_window_as_wide_as_the_row_is_no_window():
    cfg, wide = CASES["llama"], tiny_config(sliding_window=12)
    params = draw_params(cfg)
    inputs = rows((12,), 12)
    np.testing.assert_allclose(run(wide)(params, *inputs)[0], run(cfg)(params, *inputs)[0], atol=TOLERANCE)


def test_remat_changes_memory_and_no_gradient():
    inputs = rows((6,), 6)

    def grads(remat):
        cfg = tiny_config(remat=remat)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(trunk(params, cfg, *inputs)[0]))))(draw_params(cfg))

    kept = grads("none")
    for remat in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), grads(remat), kept)


def test_compute_dtype_is_the_configs():
    cfg = tiny_config(dtype="bfloat16")
    hidden, cache = run(cfg)(draw_params(cfg), *rows((4,), 4), cache=init_cache(cfg, 1, 4))
    assert hidden.dtype == cache.keys[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make_config", "mesh_dim"),
    [
        *((tiny_config, mesh_dim) for mesh_dim in ("8,1,1", "1,8,1", "1,1,8", "2,2,2")),
        (tiny_gpt2, "2,2,2"),
        (tiny_bloom, "2,2,2"),
    ],
)
def test_every_mesh_gives_the_same_numbers(make_config, mesh_dim):
    cfg = make_config(num_heads=16, num_kv_heads=8 if make_config is tiny_config else 16)
    params, inputs = draw_params(cfg), rows((6, 3, 1, 5, 4, 6, 2, 6), 6)
    expected = run(cfg)(params, *inputs)[0]
    mesh = make_mesh(mesh_dim)
    placed = jax.device_put(params, shardings(param_specs(cfg, "lm"), mesh))
    hidden, _ = run(cfg, mesh)(placed, *jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(DATA_AXES))))
    np.testing.assert_allclose(hidden, expected, atol=TOLERANCE)
    assert not hidden.sharding.is_fully_replicated or mesh_dim == "1,1,8"
