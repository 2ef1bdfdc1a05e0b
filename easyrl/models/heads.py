"""What sits on the trunk: next-token logits, or one number for every token."""

import functools

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from easyrl.core.params import ParamSpec
from easyrl.models.layers import OutputsFirst

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

    The product runs in the compute dtype and accumulates in float32, and so do those of its gradient. `params` without
    a kernel of the head are those of a model whose embeddings are tied.
    """
    if "head" not in params:
        kernel, equation = params["embed"]["tokens"], "...D,VD->...V"
    elif isinstance(params["head"]["kernel"], OutputsFirst):
        return params["head"]["kernel"].product(hidden, dtype=jnp.float32)
    else:
        kernel, equation = params["head"]["kernel"], "...D,DV->...V"
    return _logits(equation, hidden, kernel.astype(cfg.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(equation: str, hidden: Array, kernel: Array) -> Array:
    return jnp.einsum(equation, hidden, kernel, preferred_element_type=jnp.float32)


def _logits_backward(equation: str, saved: tuple[Array, Array], of_logits: Array) -> tuple[Array, Array]:
    """Left to itself, a float32 gradient of the logits would have hidden states and kernel widened to be multiplied."""
    hidden, kernel = saved
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), hidden, kernel)
    return pull(of_logits.astype(hidden.dtype))


_logits.defvjp(lambda equation, *saved: (_logits(equation, *saved), saved), _logits_backward)


def lm_head(params: dict, cfg) -> dict:
    """The part of a language model's parameters that `lm_logits` reads."""
    return {"embed": {"tokens": params["embed"]["tokens"]}} if cfg.tied_embeddings else {"head": params["head"]}


def scalar(params: dict, cfg, hidden: Array) -> Array:
    """One float32 number for every token, [...], from hidden states [..., D]: a value, or a reward at the last."""
    head = params["head"]
    out = jnp.einsum("...D,D->...", hidden, head["scalar"].astype(cfg.dtype), preferred_element_type=jnp.float32)
    return out + head["scalar_bias"].astype(jnp.float32) if "scalar_bias" in head else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_logprobs(logits: Array, targets: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """log p(target) and the entropy of p, where p = softmax(logits / temperature).

    The one definition of a log-probability: the sampler, old, new and reference log-probs, SFT and DPO all end here.
    logits [..., V], targets int [...]; both results float32 [...]. A temperature of 0 (greedy decoding) is taken as 1,
    because the limit puts all mass on one token and has no useful logarithm.

    The gradient is written out, so that the backward pass holds the logits and their gradient, and nothing else of
    size V. With z = logits / temperature:

        d log p(target) / d z_v = [v = target] - p_v        d H / d z_v = -p_v (log p_v + H)
    """
    return _token_logprobs_forward(logits, targets, temperature)[0]


def _centred(logits: Array, temperature: float) -> Array:
    """logits / temperature less their largest, float32: what follows then keeps its digits, however large they are."""
    logits = logits.astype(jnp.float32) / (temperature or 1.0)
    return logits - jnp.max(logits, axis=-1, keepdims=True)


def _token_logprobs_forward(logits: Array, targets: Array, temperature: float):
    centred = _centred(logits, temperature)
    log_z = jnp.log(jnp.sum(jnp.exp(centred), axis=-1))
    logprobs = jnp.take_along_axis(centred, targets[..., None], axis=-1)[..., 0] - log_z
    entropy = log_z - jnp.sum(jnp.exp(centred - log_z[..., None]) * centred, axis=-1)
    return (logprobs, entropy), (logits, targets, log_z, entropy)


def _token_logprobs_backward(temperature: float, saved, gradients):
    logits, targets, log_z, entropy = saved
    of_logprobs, of_entropy = (gradient[..., None] for gradient in gradients)
    logp = _centred(logits, temperature) - log_z[..., None]
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    of_all = jnp.exp(logp) * (of_logprobs + of_entropy * (logp + entropy[..., None]))
    of_scaled = jnp.where(is_target, of_logprobs, 0.0) - of_all
    return (of_scaled / (temperature or 1.0)).astype(logits.dtype), None


token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)
