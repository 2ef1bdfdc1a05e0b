"""Named model shapes."""

import dataclasses
from typing import Any

from easyrl.core.errors import UserError
from easyrl.models.layers import RopeScaling
from easyrl.models.llama import LlamaConfig

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_positions": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": RopeScaling("llama3", 32.0),
}


def _llama(
    vocab_size: int, width: int, layers: int, heads: int, head_size: int, mlp_size: int, positions: int, **more: Any
) -> LlamaConfig:
    """A Llama with as many key/value heads as query heads."""
    return LlamaConfig(
        vocab_size=vocab_size, width=width, num_layers=layers, num_heads=heads, num_kv_heads=heads,
        head_size=head_size, mlp_size=mlp_size, max_positions=positions, **more,
    )  # fmt: skip


SHAPES: dict[str, LlamaConfig] = {
    "debug": _llama(512, 64, 2, 4, 16, 128, 1024),
    # What the comparison with other trainers uses (docs/benchmarks.md).
    "34m": _llama(8192, 512, 8, 8, 64, 1376, 2048, norm_eps=1e-6),
    "270m": _llama(32000, 1024, 16, 16, 64, 2816, 2048),
    # The sizes of Llama 3.
    "1b": LlamaConfig(
        width=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_size=64, mlp_size=8192,
        tied_embeddings=True, **_LLAMA3,
    ),
    "3b": LlamaConfig(
        width=3072, num_layers=28, num_heads=24, num_kv_heads=8, head_size=128, mlp_size=8192,
        tied_embeddings=True, **_LLAMA3,
    ),
    "8b": LlamaConfig(
        width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_size=128, mlp_size=14336, **_LLAMA3,
    ),
}  # fmt: skip


def shape(name: str, **compute: Any) -> LlamaConfig:
    """The configuration of a named shape, computed as `compute` says. Raises UserError for an unknown name."""
    if name not in SHAPES:
        raise UserError(f"--model={name}: expected one of {', '.join(SHAPES)}")
    return dataclasses.replace(SHAPES[name], **compute)
