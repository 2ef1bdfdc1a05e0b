"""AdamW and learning-rate schedules, by EasyLM's names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.params import path_str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) after clipping the gradient's global norm."""

    b1: float = flag(0.9, "Adam's decay rate of the first moment.", least=0, below=1)
    b2: float = flag(0.999, "Adam's decay rate of the second moment.", least=0, below=1)
    eps: float = flag(1e-8, "Added to the root of Adam's second moment.", above=0)
    weight_decay: float = flag(0.0, "Decoupled weight decay; never applied to biases and norms.", least=0)
    clip_gradient: float = flag(
        1.0, "Largest global norm of the gradient; larger ones are scaled down. 0: no limit.", least=0
    )
    bf16_momentum: bool = flag(False, "Keep Adam's first moment in bfloat16: half its memory.")


def make_schedule(
    kind: str, lr: float, total_updates: int, warmup_updates: int = 0, end_lr: float = 0.0
) -> optax.Schedule:
    """Learning rate by update number: linear warm-up from 0, then `constant`, `linear` or `cosine` to `end_lr`.

    The update after `warmup_updates` updates is the first at the full rate, as in transformers' schedules.
    """
    remaining = max(total_updates - warmup_updates, 1)
    above_end = optax.cosine_decay_schedule(lr - end_lr, remaining)  # its own end is a share of lr, which may be 0
    after_warmup: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, end_lr, remaining),
        "cosine": lambda update: above_end(update) + end_lr,
    }
    if kind not in after_warmup:
        raise UserError(f"--lr_schedule={kind}: expected one of {', '.join(after_warmup)}")
    if not warmup_updates:
        return after_warmup[kind]
    warmup = optax.linear_schedule(0.0, lr, warmup_updates)
    return optax.join_schedules([warmup, after_warmup[kind]], [warmup_updates])


def updates_in(share: float, of: int) -> int:
    """The least number of updates, or steps, that make up this `share` of so many."""
    return math.ceil(round(share * of, 6))  # 0.07 * 100 is 7.000000000000001


def decayed(params: dict) -> dict:
    """True for the parameters weight decay applies to: not biases, not norms."""

    def matters(path: tuple, _) -> bool:
        return not path_str(path).endswith(("bias", "norm", "norm/scale"))

    return jax.tree_util.tree_map_with_path(matters, params)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The gradient transformation that `config` describes. Its state has one structure, with a limit to the gradient or
    without, so that a run may go on with another limit.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.bfloat16 if config.bf16_momentum else None,
        mask=decayed,
    )
    clip = optax.clip_by_global_norm(config.clip_gradient) if config.clip_gradient else optax.identity()
    return optax.chain(clip, adamw)


def optimizer_facts(config: OptimizerConfig) -> dict[str, str | float]:
    """The optimizer in the words model cards use."""
    return {
        "optimizer": f"AdamW with betas=({config.b1},{config.b2}) and epsilon={config.eps}",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip_gradient or "none",
    }
