"""The numbers of PPO that its device programs are made with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from easyrl.core.config import flag
from easyrl.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The algorithm's own numbers. Inherited by the script's config, so the flags carry EasyLM's plain names."""

    temperature: float = flag(0.7, "Sampling temperature of the rollouts.", above=0)
    logprob_space: str = flag(
        "sampling",
        "Distribution whose log-probs enter ratio and KL: after the temperature, or the model's own at temperature 1.",
        choices=("sampling", "model"),
    )
    old_logprobs: str = flag(
        "trainer",
        "Who computes the log-probs before the update, which the ratio starts from: the trainer, in a pass of its own, "
        "or the sampler, which saves that pass; the first ratios are then 1 up to what the two round differently.",
        choices=("trainer", "sampler"),
    )
    kl_coef: float = flag(0.05, "Weight of the KL penalty; the starting weight when --kl_target is set.", least=0)
    kl_estimator: str = flag("k1", "Per-token KL estimator of the penalty.", choices=("k1", "k2", "k3"))
    kl_in: str = flag(
        "reward",
        "Where the KL penalty goes; in the loss --kl_estimator has to be k2 or k3.",
        choices=("reward", "loss"),
    )
    kl_target: float = flag(
        0.0, "Sequence KL, in nats, that the adaptive controller aims for. 0: --kl_coef stays fixed.", least=0
    )
    kl_horizon: float = flag(10000.0, "Samples over which the adaptive controller acts.", above=0)
    gamma: float = flag(1.0, "Discount per token.", least=0, most=1)
    lam: float = flag(0.95, "Lambda of generalised advantage estimation.", least=0, most=1)
    cliprange: float = flag(0.2, "The ratio is clipped to [1 - cliprange, 1 + cliprange].", above=0, most=1)
    cliprange_high: float = flag(
        0.0, "Upper clip when it differs from the lower (clip-higher). 0: --cliprange.", least=0
    )
    dual_clip: float = flag(0.0, "Bound on the ratio for negative advantages (Ye et al. 2020), above 1. 0: off.")
    cliprange_value: float = flag(0.2, "Values are clipped to old value +- cliprange_value.", above=0)
    vf_coef: float = flag(0.1, "Weight of the value loss.", least=0)
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    whiten_rewards: bool = flag(False, "Scale the token rewards to unit variance (their mean is kept).")
    whiten_advantages: bool = flag(True, "Whiten the advantages once over the whole batch of rollouts.")
    target_kl: float = flag(
        0.0, "Stop updating on a batch once its approximate KL from the sampler exceeds this. 0: never.", least=0
    )
    num_layers_unfrozen: int = flag(
        0, "Hydra: train this many top layers of policy and value model, over one frozen bottom that they share with "
        "the reference. 0 or -1: all layers of each model.", least=-1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.dual_clip != 0 and not self.dual_clip > 1:
            raise UserError(f"--dual_clip={self.dual_clip:g}: expected 0 (off) or more than 1")
        if self.kl_target and not self.kl_coef:
            raise UserError("--kl_coef=0: it is the starting weight of --kl_target, expected more than 0")
        if not self.kl_target and self.kl_horizon != PPOConfig.kl_horizon:
            raise UserError(f"--kl_horizon={self.kl_horizon:g}: needs --kl_target, which is not given")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError("--kl_in=loss: the gradient of --kl_estimator=k1 is 0 on average, expected k2 or k3")

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which every log-prob of a run is taken."""
        return self.temperature if self.logprob_space == "sampling" else 1.0


def resumed_kl_coef(saved: float, then: Mapping[str, Any], now: PPOConfig) -> float:
    """The KL coefficient of a run that goes on from a checkpoint, whose state has `saved` and whose flags were `then`.

    The adaptive controller goes on where it was, unless it was off until then or --kl_coef is another now. Without
    --kl_target the coefficient is --kl_coef, also where a controller has moved it before.
    """
    adapted = now.kl_target and then["kl_target"] and then["kl_coef"] == now.kl_coef
    return saved if adapted else now.kl_coef
