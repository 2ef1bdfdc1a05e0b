"""The small parts models are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis; the statistics in float32 (Zhang and Sennrich 2019, eq. 4)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    kind `linear`: every frequency divided by `factor` (position interpolation, Chen et al. 2023).
    kind `llama3`: as in Llama 3.1: wavelengths longer than original_max_positions / low_freq_factor are stretched by
    `factor`, those shorter than original_max_positions / high_freq_factor are left, with a smooth step between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def rope_frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """The head_size / 2 rotary frequencies, in radians per position (Su et al. 2021, section 3.2.2)."""
    freqs = 1.0 / theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    wavelengths = 2 * np.pi / freqs
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)  # 0: stretched in full, 1: left alone
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def rope_tables(positions_BT: Array, freqs: np.ndarray) -> tuple[Array, Array]:
    """cos and sin of every token's angles, each float32 [B, T, H/2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotate each head's (first half, second half) pairs by the tokens' angles: Hugging Face's pairing, not Meta's."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
