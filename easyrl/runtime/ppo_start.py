"""What PPO starts from, before a weight is read: its models, their tokenizer and template, and what pays."""

import dataclasses
from typing import Any

from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.data.templates import Template, load_template
from easyrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from easyrl.hf.frozen import check_shared
from easyrl.hf.refs import FoundModel, check_length, find_model, stop_ids_of
from easyrl.models.branch import trained_layers
from easyrl.rewards.models import FoundSources, find_sources, value_start
from easyrl.runtime.run_config import compute_settings


@dataclasses.dataclass(frozen=True)
class PPOStart:
    """The models of a PPO run as they were found; `tokenizer` has the template as its chat template, for the export."""

    policy: FoundModel
    reference: FoundModel
    value: FoundModel
    value_ref: str  # where the value model is from
    same_start: bool  # whether policy and reference begin with the same weights
    shared: range  # layers of the frozen bottom that all three stand on, with --num_layers_unfrozen
    sources: FoundSources
    tokenizer: Tokenizer
    template: Template
    stop_ids: tuple[int, ...]

    @property
    def never_trained(self) -> list[FoundModel]:
        """The models that the run reads and does not train, nor its policy where a part of it is never trained."""
        rewards = (model.found for model in self.sources.models)
        return [self.reference, *rewards, *([self.policy] if self.shared else [])]


def find_ppo_start(config: Any, max_length: int) -> PPOStart:
    """What the flags of `train_ppo` name; `max_length` is that of a prompt with its response.

    Raises UserError naming the flag when something cannot be had, or does not fit the rest.
    """

    def find(ref: str, name: str) -> FoundModel:
        head, flag = "value" if name == "value" else "lm", f"--load_checkpoint_{name}"
        found = find_model(ref, head=head, compute=compute_settings(config), flag=flag)
        check_length(found, f"{flag}={ref}", max_length, "--train_dataset.seq_length + --max_continuation_len")
        return found

    policy = find(config.load_checkpoint_policy, "policy")
    tokenizer = load_tokenizer(config.tokenizer or str(policy.directory or ""))
    check_vocabulary(tokenizer, policy.cfg.vocab_size)
    template = load_template(config.template, tokenizer)
    tokenizer.chat_template = template.jinja
    stop_ids = stop_ids_of(policy, template, config.stop_ids)

    reference_ref = config.load_checkpoint_reference or config.load_checkpoint_policy
    reference = find(reference_ref, "reference" if config.load_checkpoint_reference else "policy")
    if reference.cfg.vocab_size != policy.cfg.vocab_size:
        raise UserError(
            f"--load_checkpoint_reference={reference_ref}: has a vocabulary of {reference.cfg.vocab_size}, "
            f"the policy one of {policy.cfg.vocab_size}"
        )

    sources = find_sources(config, template, dtype=DTYPES[config.dtype], max_length=max_length)
    shared = range(trained_layers(policy.cfg.num_layers, config.num_layers_unfrozen).start)
    value_ref = value_start(
        config.load_checkpoint_value, config.load_checkpoint_policy, config.load_checkpoint_reward, sources.models,
        shared=bool(shared),
    )  # fmt: skip
    value = find(value_ref, "value")
    check_vocabulary(tokenizer, value.cfg.vocab_size, "--load_checkpoint_value")
    check_shared(policy, [reference, value], config.num_layers_unfrozen)
    same_start = reference_ref == config.load_checkpoint_policy
    return PPOStart(
        policy, reference, value, value_ref, same_start, shared, sources, tokenizer, template, stop_ids
    )  # fmt: skip
