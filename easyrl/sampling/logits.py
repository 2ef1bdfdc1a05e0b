"""What happens to next-token logits before a token is chosen, and the choice.

Pure functions on logits [B, V], in the order and with the conventions of transformers' `generate`: repetition penalty,
suppressed end tokens, temperature, top-k, top-p. A token ruled out has logit -inf.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

BLOCK = 128  # tokens in a block of `choose`: near the square root of a vocabulary, and a TPU's vector length


def penalise_repetition(logits_BV: Array, seen_BV: Array, penalty: float) -> Array:
    """Tokens that `seen_BV` marks become less likely: logit / penalty where positive, logit * penalty where negative.

    Keskar et al. 2019, section 4.1, with transformers' treatment of negative logits. A penalty below 1 rewards.
    """
    penalised = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalised, logits_BV)


def suppress(logits_BV: Array, token_ids: tuple[int, ...], when: Array) -> Array:
    """`token_ids` ruled out for the rows (or, a scalar, for all rows) where `when` is True."""
    V = logits_BV.shape[-1]
    forbidden_V = jnp.isin(jnp.arange(V), jnp.asarray(token_ids, jnp.int32))
    return jnp.where(jnp.asarray(when)[..., None] & forbidden_V, -jnp.inf, logits_BV)


def keep_top_k(logits_BV: Array, k: int) -> Array:
    """Only the k most likely tokens (Fan et al. 2018), and whatever ties with the last of them, as in transformers."""
    return _keep(logits_BV, lambda probs, kept: jnp.sum(kept, axis=-1) >= k)


def keep_top_p(logits_BV: Array, p: float) -> Array:
    """Only the nucleus (Holtzman et al. 2020): the smallest set of most likely tokens whose mass is at least p > 0.

    Tokens that tie with the last one are kept; transformers keeps whichever its sort put first.
    """
    return _keep(logits_BV, lambda probs, kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= p)


def _keep(logits_BV: Array, enough: Callable[[Array, Array], Array]) -> Array:
    """The tokens with probability tau or more, for the largest tau that keeps `enough(probs_BV, kept_BV)`, bool [B].

    Instead of sorting the vocabulary (on a CPU that takes longer than the rest of a decoding step), tau is found
    by bisection over float32 bit patterns, which are ordered as the non-negative numbers they stand for: exact after 30
    halvings.
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)

    def at_least(bits_B):
        return probs_BV >= jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]

    def halve(_, bounds):
        low_B, high_B = bounds  # low keeps enough, high does not
        middle_B = low_B + (high_B - low_B) // 2
        is_enough_B = enough(probs_BV, at_least(middle_B))
        return jnp.where(is_enough_B, middle_B, low_B), jnp.where(is_enough_B, high_B, middle_B)

    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    low_B = jnp.zeros(logits_BV.shape[0], jnp.int32)
    low_B, _ = jax.lax.fori_loop(0, 30, halve, (low_B, jnp.full_like(low_B, above_one)))
    return jnp.where(at_least(low_B), logits_BV, -jnp.inf)


def choose(keys_B: Array, logits_BV: Array) -> Array:
    """One token id for each row, int32 [B], with probability softmax(logits), from that row's key alone.

    The Gumbel-max trick on two levels: a block of `BLOCK` tokens by its total mass, then a token of that block,
    p(token) = p(block) p(token | block). As exact as drawing V Gumbels, and as steady under rounding: noise in the
    logits changes the choice only where two scores nearly tie, while in inverting a cumulative sum it moves every
    boundary. It takes V / BLOCK + BLOCK draws.
    """
    B, V = logits_BV.shape
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    blocks = logits_BV.reshape(B, -1, BLOCK)

    def one(key, blocks, block_logits):
        block_key, token_key = jax.random.split(key)
        block = jax.random.categorical(block_key, block_logits)
        return block * BLOCK + jax.random.categorical(token_key, blocks[block])

    return jax.vmap(one)(keys_B, blocks, jax.nn.logsumexp(blocks, axis=-1)).astype(jnp.int32)
