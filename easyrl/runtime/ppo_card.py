"""What the README.md of the models that PPO has tuned say."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from easyrl.data.messages import Message
from easyrl.data.templates import Template
from easyrl.hf.model_card import ModelCard, name_of, template_of
from easyrl.runtime.metrics import timeless
from easyrl.steps.optimizer import optimizer_facts


def ppo_card(
    config: Any, metrics: Mapping[str, float], template: Template, reward: str, warmup_ratio: float
) -> ModelCard:
    """The card of the policy that `train_ppo` exports; `config` is that script's, `reward` names what paid, and
    `warmup_ratio` is the share of the run's updates in which the learning rate rises.
    """
    return ModelCard(
        title=f"{name_of(config.load_checkpoint_policy)} tuned with PPO",
        method="PPO",
        base_model=config.load_checkpoint_policy.partition("::")[2],
        reference_model=config.load_checkpoint_reference.partition("::")[2],
        reward_model=reward,
        datasets=(config.train_dataset.path,),
        template=template_of(config.template),
        input_format=template.render((Message("user", "Your message here!"),), add_generation_prompt=True),
        hyperparameters={
            "learning_rate": config.lr,
            "value learning_rate": config.value_lr or config.lr,
            "total_train_batch_size": config.num_responses,
            "mini_batch_size": config.mini_batch_size,
            **optimizer_facts(config.optimizer),
            "lr_scheduler_type": config.lr_schedule,
            "lr_scheduler_warmup_ratio": warmup_ratio,
            **({"training steps": config.total_steps} if config.total_steps else {"num_epochs": config.num_epochs}),
            "PPO epochs": config.ppo_epochs,
            "KL penalty coefficient": config.kl_coef,
            "KL estimator": config.kl_estimator,
            "missing end of text": config.missing_eos,
            "temperature": config.temperature,
            "discount factor": config.gamma,
            "GAE lambda": config.lam,
            "clip range": config.cliprange,
            "value clip range": config.cliprange_value,
            "value loss coefficient": config.vf_coef,
            "layers trained": config.num_layers_unfrozen if config.num_layers_unfrozen > 0 else "all",
            "maximum prompt length": config.train_dataset.seq_length,
            "maximum response length": config.max_continuation_len,
            "seed": config.seed,
        },
        metrics=timeless(metrics),
    )


def value_card(policy: ModelCard, start: str) -> ModelCard:
    """The card of the value model that was trained beside the policy with this card, from the reference `start`."""
    return dataclasses.replace(
        policy,
        title="Value model",
        summary="Trained by PPO beside the policy: after every token, the reward that is still to be expected.",
        base_model=start.partition("::")[2],
    )
