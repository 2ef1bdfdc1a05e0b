"""Who may attend to whom, and attention itself.

Axes: B batch, T query time, S key time, N query heads, K key/value heads, G = N / K, M = G x T, H head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from easyrl.core.segments import stem_of
from easyrl.models.layers import PRODUCT

Array = jax.Array

Alibi = tuple[np.ndarray | Array, Array]  # slopes [N] and distances [B, T, S] of the bias -slope x distance


def attention_mask(
    q_positions: Array, q_segments: Array, k_positions: Array, k_segments: Array, window: int | None = None
) -> Array:
    """The boolean mask [B, T, S]: True where query t may attend to key s.

    A token attends to the tokens of its own segment, and of its stem (`core.segments`), at positions no later than its
    own and, with a sliding `window`, fewer than `window` positions back (transformers' convention: itself and
    window - 1 tokens before). Segment 0 is padding; it attends to itself only among padding, and nobody attends to it.
    """
    k_segments = k_segments[:, None, :]
    own_or_stem = (q_segments[:, :, None] == k_segments) | (stem_of(q_segments)[:, :, None] == k_segments)
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    mask = own_or_stem & (distance >= 0)
    if window is not None:
        mask &= distance < window
    return mask


def grouped_queries(q_BTNH: Array, num_kv_heads: int) -> Array:
    """The queries scaled by 1 / sqrt(H), by the key/value head that they share: [B, K, G, T, H]."""
    B, T, N, H = q_BTNH.shape
    scaled = q_BTNH * (H**-0.5)
    return scaled.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def ungrouped(x_BKGTH: Array) -> Array:
    """What `grouped_queries` has grouped, as [B, T, N, H] again."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def masked_scores(q_BKGTH: Array, k_BKSH: Array, mask_BTS: Array, alibi: Alibi | None) -> Array:
    """q k^T + bias where the mask is True, and a finite floor elsewhere; float32 [B, K, G, T, S]."""
    B, K, G, T, H = q_BKGTH.shape
    # The queries of a group as rows of one matrix: the same product, and up to twice as fast on a CPU.
    q_BKMH = q_BKGTH.reshape(B, K, G * T, H)
    scores = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, -1)
    if alibi is not None:
        slopes_N, distance_BTS = alibi
        scores -= slopes_N.reshape(K, G, 1, 1) * distance_BTS[:, None, None].astype(jnp.float32)
    # A finite floor keeps rows with nothing to attend to (padding) free of NaN.
    return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)


def attend(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array, *, alibi: Alibi | None = None) -> Array:
    """softmax(q k^T / sqrt(H) + bias) v, grouped query heads, softmax in float32. Returns [B, T, N, H] in q's dtype.

    Without `alibi` there is no bias. What holds less in memory is in `models.long_attention`, which also chooses.
    """
    scores = masked_scores(grouped_queries(q_BTNH, k_BKSH.shape[1]), k_BKSH, mask_BTS, alibi)
    B, K, G, T, S = scores.shape
    weights_BKMS = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    out_BKMH = checkpoint_name(jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH), PRODUCT)
    return ungrouped(out_BKMH.reshape(B, K, G, T, -1))
