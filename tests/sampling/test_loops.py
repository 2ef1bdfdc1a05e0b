"""The loops of decoding: their shapes, the rows that each computes, and that responses do not depend on them."""

import jax
import numpy as np
import pytest

from easyrl.core.params import shardings
from easyrl.core.sharding import make_mesh
from easyrl.models.families import param_specs
from easyrl.sampling import decode, loops
from easyrl.sampling.decode import SamplingConfig
from easyrl.sampling.loops import (
    Loop,
    cache_sizes,
    decode_loops,
    overwrite_rows,
    put_rows,
    take_rows,
    unfinished_first,
)
from easyrl.steps.sampling import Sampler
from tests.tiny import draw_params, tiny_config

CFG = tiny_config(num_heads=16, num_kv_heads=8)
PARAMS = draw_params(CFG)
PAD = 39
LENGTHS = np.array([3, 9, 1, 6, 9, 2, 5, 8] * 2)
PROMPTS = np.random.default_rng(0).integers(0, PAD, (16, 9)).astype(np.int32)
SETTINGS = SamplingConfig(max_new_tokens=48, temperature=1.5, repetition_penalty=1.2)
STOPS = (5, 17, 30)


def sample(mesh_dim):
    mesh = make_mesh(mesh_dim, jax.devices()[: np.prod([int(size) for size in mesh_dim.split(",")])])
    params = jax.device_put(PARAMS, shardings(param_specs(CFG, "lm"), mesh))
    sampler = Sampler(CFG, SETTINGS, stop_ids=STOPS, pad_id=PAD, mesh=mesh)
    samples = jax.tree.map(np.asarray, sampler(params, PROMPTS, LENGTHS, jax.random.key(7), np.arange(16)))
    jax.effects_barrier()
    return samples


@pytest.fixture(scope="module")
def wide():
    """Samples of one loop: 48 tokens are few."""
    return sample("1,1,1")


def test_caches_grow_by_64_slots_or_more_to_what_is_needed():
    assert cache_sizes(100, 16) == [116]
    assert cache_sizes(128, 128) == [192, 256]
    assert cache_sizes(100, 1000) == [384, 640, 1100]
    assert cache_sizes(7, 130) == [128, 137]
    assert cache_sizes(100, 70) == [170]


def test_rows_become_a_quarter_of_each_devices():
    wide = [Loop(64, 192, until=2), Loop(64, 228, until=2)]
    assert decode_loops(64, 8, 100, 128, may_end=True) == [*wide, Loop(16, 228, until=0)]
    assert decode_loops(32, 1, 100, 64, may_end=True) == [Loop(32, 164, until=8), Loop(8, 164, until=0)]
    assert decode_loops(8, 4, 100, 64, may_end=True) == [Loop(8, 164, until=1), Loop(4, 164, until=0)]


@pytest.mark.parametrize(("rows", "tokens", "may_end"), [(8, 64, True), (64, 63, True), (64, 64, False)])
def test_one_row_a_device_few_tokens_and_fixed_lengths_stay_as_they_are(rows, tokens, may_end):
    assert decode_loops(rows, 8, 100, tokens, may_end=may_end) == [Loop(rows, 100 + tokens, until=0)]


TREE = {"rows": np.arange(16).reshape(8, 2), "step": np.int32(5)}


def test_rows_are_taken_from_every_device():
    done = np.array([True, False, True, False, False, True, True, True])
    places = unfinished_first(done, 2, 4)
    np.testing.assert_array_equal(places, [[1, 3], [0, 1]])
    some = take_rows(TREE, places)
    np.testing.assert_array_equal(some["rows"], TREE["rows"][[1, 3, 4, 5]])
    assert some["step"] == 5


@pytest.mark.parametrize("put", [put_rows, overwrite_rows])
@pytest.mark.parametrize(
    ("places", "sources"),
    [
        ([[1, 3], [0, 1]], {1: 0, 3: 1, 4: 2, 5: 3}),
        ([[4, 3], [0, 4]], {3: 1, 4: 2}),  # behind a device's last row there is none
    ],
)
def test_rows_are_put_back(put, places, sources):
    some = {"rows": -np.arange(8).reshape(4, 2), "step": np.int32(9)}
    expected = TREE["rows"].copy()
    expected[list(sources)] = some["rows"][list(sources.values())]
    back = put(TREE, some, np.array(places))
    np.testing.assert_array_equal(back["rows"], expected)
    assert back["step"] == 9


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2"])
def test_loops_change_no_response(mesh_dim, wide, monkeypatch):
    """And as many rows are computed at each step as the devices' unfinished ones need."""
    computed, trunk = [], decode.trunk

    def watched(params, cfg, tokens, *rest, **options):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: computed.append(tokens.shape[0]))
        return trunk(params, cfg, tokens, *rest, **options)

    monkeypatch.setattr(loops, "MIN_GROWTH", 8)
    monkeypatch.setattr(loops, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(decode, "trunk", watched)
    out = sample(mesh_dim)
    np.testing.assert_array_equal(out.tokens_BC, wide.tokens_BC)
    np.testing.assert_array_equal(out.lengths_B, wide.lengths_B)
    np.testing.assert_allclose(out.logprobs_BC, wide.logprobs_BC, atol=1e-5)
    np.testing.assert_allclose(out.entropies_BC, wide.entropies_BC, atol=1e-5)
    assert out.steps == wide.steps

    shards = {"1,1,1": 1, "2,2,2": 4}[mesh_dim]
    most = [(wide.lengths_B > step).reshape(shards, -1).sum(1).max() for step in range(1, wide.steps)]
    each = 16 // shards
    counts = sorted({each, -(-each // 4)})
    expected = [shards * next(count for count in counts if n <= count) for n in most]
    assert {shards * count for count in counts} == set(expected)
    assert sorted(computed, reverse=True) == expected
