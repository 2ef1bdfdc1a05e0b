"""`pytest --attention=blocks` or `--attention=splash`: the same tests with another way to attend.

Rows of tests are so short that plain attention is chosen for them. Here blocks become small enough for several to a
row, and rows are padded to the multiple of 128 tokens that the splash kernel takes. What neither can do (one step of
decoding, queries against a cache; for splash also ALiBi, and windows in some layers only) stays as it is.
"""

import jax.numpy as jnp

from easyrl.models import long_attention

BLOCK = 4  # queries
CHOOSE, ATTEND_BY_SPLASH = long_attention.choose, long_attention.attend_by_splash


def use(way: str) -> None:
    """Makes every model of this process that may choose how to attend do so in this way."""
    if way == "blocks":
        long_attention.LONG_BLOCK = long_attention.LANES = BLOCK
        long_attention.LONG = 0
        return
    long_attention.sees_stems = lambda attention, device: False
    long_attention.choose = choose_splash
    long_attention.attend_by_splash = attend_padded


def choose_splash(attention, device, *, queries, keys, biased, mixed, **others):
    if attention == "auto" and queries == keys > 1 and not (biased or mixed):
        return "splash"
    return CHOOSE(attention, device, queries=queries, keys=keys, biased=biased, mixed=mixed, **others)


def attend_padded(q_BTNH, k_BKTH, v_BKTH, segments_BT, **options):
    """The kernel on rows with padding behind them."""
    T = q_BTNH.shape[1]

    def pad(x, axis):
        return jnp.pad(x, [(0, -T % long_attention.LANES if a == axis else 0) for a in range(x.ndim)])

    padded = pad(q_BTNH, 1), pad(k_BKTH, 2), pad(v_BKTH, 2), pad(segments_BT, 1)
    return ATTEND_BY_SPLASH(*padded, **options)[:, :T]
