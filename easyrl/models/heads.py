"""What sits on the trunk: next-token logits, or one number for every token."""

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from easyrl.core.params import ParamSpec

Array = jax.Array


HEADS = ("lm", "reward", "value")


def head_specs(cfg, head: str) -> dict:
    """The head's own parameters.

    `lm`: a [D, V] kernel, or nothing when the embeddings are tied. `reward`: one number read at the last token, without
    a bias, as in transformers' sequence classification. `value`: one number for every token, with a bias, as in
    transformers' token classification.
    """
    assert head in HEADS, head
    if head == "lm":
        if cfg.tied_embeddings:
            return {}
        return {"kernel": ParamSpec((cfg.width, cfg.vocab_size), ("embed", "vocab"), normal(0.02))}
    # 1 / sqrt(D + 1) as in Ziegler et al. 2019, so that fresh outputs are of order one.
    specs = {"scalar": ParamSpec((cfg.width,), ("embed",), normal((cfg.width + 1) ** -0.5))}
    if head == "value":
        specs["scalar_bias"] = ParamSpec((), (), zeros)
    return specs


def lm_logits(params: dict, cfg, hidden: Array) -> Array:
    """Next-token logits, float32 [..., V], from hidden states [..., D].

    The product runs in the compute dtype and accumulates in float32.
    """
    if cfg.tied_embeddings:
        kernel, equation = params["embed"]["tokens"], "...D,VD->...V"
    else:
        kernel, equation = params["head"]["kernel"], "...D,DV->...V"
    return jnp.einsum(equation, hidden, kernel.astype(cfg.dtype), preferred_element_type=jnp.float32)


def scalar(params: dict, cfg, hidden: Array) -> Array:
    """One float32 number for every token, [...], from hidden states [..., D]: a value, or a reward at the last token."""
    head = params["head"]
    out = jnp.einsum("...D,D->...", hidden, head["scalar"].astype(cfg.dtype), preferred_element_type=jnp.float32)
    return out + head["scalar_bias"].astype(jnp.float32) if "scalar_bias" in head else out


def token_logprobs(logits: Array, targets: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """log p(target) and the entropy of p, where p = softmax(logits / temperature).

    The one definition of a log-probability: the sampler, the old, new and reference log-probs, SFT and DPO all end here.
    logits [..., V], targets int [...]; both results float32 [...]. A temperature of 0 (greedy decoding) is taken as 1,
    because the limit puts all mass on one token and has no useful logarithm.
    """
    logits = logits.astype(jnp.float32) / (temperature if temperature > 0 else 1.0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    logprobs = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z
    probs = jnp.exp(logits - log_z[..., None])
    entropy = log_z - jnp.sum(probs * logits, axis=-1)
    return logprobs, entropy
