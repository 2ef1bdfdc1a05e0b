"""Do two ways of running a model agree? Outputs here and in transformers, on the same random tokens."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from easyrl.core.errors import RunFailed
from easyrl.models.families import ModelConfig
from easyrl.models.heads import lm_logits, scalar
from easyrl.models.trunk import trunk

ROWS, LENGTH = 2, 64


def has_torch() -> bool:
    """Whether transformers' models can be run here."""
    return importlib.util.find_spec("torch") is not None


def random_tokens(cfg: ModelConfig) -> np.ndarray:
    """int32 [ROWS, at most LENGTH], the same at every call. No row ends with an id that a config.json names."""
    shape = (ROWS, min(LENGTH, cfg.max_positions))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape).astype(np.int32)
    tokens[:, -1] = cfg.vocab_size - 2  # pad and end tokens are the first ids, or the last
    return tokens


def our_outputs(params: dict, cfg: ModelConfig, head: str, tokens: np.ndarray) -> np.ndarray:
    """float32: logits [B, T, V] of a language model, scores [B] of a reward model, values [B, T] of a value model."""
    cfg = dataclasses.replace(cfg, dtype="float32", remat="none", attention="xla")

    @jax.jit
    def run(params: dict) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = trunk(params, cfg, jnp.asarray(tokens), positions, jnp.ones_like(tokens))
        return lm_logits(params, cfg, hidden) if head == "lm" else scalar(params, cfg, hidden)

    with jax.default_matmul_precision("highest"):
        outputs = np.asarray(run(params))
    return outputs[:, -1] if head == "reward" else outputs


def transformers_outputs(folder: Path, head: str, tokens: np.ndarray) -> np.ndarray:
    """The same by the transformers class that the folder's config.json names, on torch, one row at a time.

    Raises RunFailed when it misses a tensor in the folder, or finds one too many.
    """
    import torch
    import transformers

    auto = {
        "lm": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
        "value": transformers.AutoModelForTokenClassification,
    }[head]
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise RunFailed(
                f"{folder}: {type(model).__name__} finds {what.replace('_', ' ')}: {sorted(info[what])[:3]}"
            )
    with torch.no_grad():
        rows = [model.eval()(input_ids=torch.tensor(row[None], dtype=torch.long)).logits[0].numpy() for row in tokens]
    outputs = np.stack(rows).astype(np.float32)
    return outputs if head == "lm" else outputs[..., 0]
