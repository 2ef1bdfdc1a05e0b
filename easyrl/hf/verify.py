"""Do two ways of running a model agree? Outputs here and in transformers, on the same random tokens."""

import dataclasses
import importlib.util
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from easyrl.core.errors import RunFailed
from easyrl.models.families import ModelConfig
from easyrl.models.heads import lm_logits, scalar
from easyrl.models.trunk import trunk
from easyrl.steps.segments import last_tokens

ROWS, LENGTH = 2, 64


def has_torch() -> bool:
    """Whether transformers' models can be run here."""
    return importlib.util.find_spec("torch") is not None


def random_tokens(cfg: ModelConfig, ends: Collection[int]) -> np.ndarray:
    """int32 [ROWS + len(ends), at most LENGTH], the same at every call; each of `ends` ends one of the last rows."""
    shape = (ROWS + len(ends), min(LENGTH, cfg.max_positions))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape).astype(np.int32)
    tokens[ROWS:, -1] = sorted(ends)
    return tokens


def our_outputs(params: dict, cfg: ModelConfig, head: str, tokens: np.ndarray, pad_id: int | None) -> np.ndarray:
    """float32: logits [B, T, V] of a language model, scores [B] of a reward model, values [B, T] of a value model.

    `pad_id` is the pad token of the model's config.json, which no score is read at.
    """
    cfg = dataclasses.replace(cfg, dtype="float32", remat="none", attention="xla")

    @jax.jit
    def run(params: dict) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = trunk(params, cfg, jnp.asarray(tokens), positions, jnp.ones_like(tokens))
        return lm_logits(params, cfg, hidden) if head == "lm" else scalar(params, cfg, hidden)

    with jax.default_matmul_precision("highest"):
        outputs = np.asarray(run(params))
    if head != "reward":
        return outputs
    return outputs[np.asarray(last_tokens(jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1]), pad_id))]


def transformers_outputs(folder: Path, head: str, tokens: np.ndarray, *, written: bool) -> np.ndarray:
    """The same by the transformers class that the folder's config.json names, on torch, one row at a time.

    Raises RunFailed when it misses a tensor in the folder, or finds one too many in a folder `written` here: those of
    others may hold what nobody reads.
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
    for what in ("missing_keys", "mismatched_keys", *["unexpected_keys"] * written):
        if info[what]:
            raise RunFailed(
                f"{folder}: {type(model).__name__} finds {what.replace('_', ' ')}: {sorted(info[what])[:3]}"
            )
    with torch.no_grad():
        rows = [model.eval()(input_ids=torch.tensor(row[None], dtype=torch.long)).logits[0].numpy() for row in tokens]
    outputs = np.stack(rows).astype(np.float32)
    return outputs if head == "lm" else outputs[..., 0]
