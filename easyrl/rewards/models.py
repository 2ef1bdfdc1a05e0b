"""Reward models as sources: loaded once, frozen, scored on the device."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from easyrl.core.errors import UserError
from easyrl.data.templates import Template, load_template
from easyrl.data.tokenizer import check_vocabulary, fingerprint, load_tokenizer
from easyrl.hf.refs import load_model
from easyrl.rewards.sources import Source, model_source, retokenized_source
from easyrl.steps.reward import SequenceScorer


@dataclasses.dataclass(frozen=True)
class RewardModels:
    """The sources of `--load_checkpoint_reward`, and whether the first model reads the policy's own tokens."""

    sources: list[Source]
    first_shares_tokenizer: bool


def load_reward_models(
    refs: str,
    template_name: str,
    policy_template: Template,
    mesh: Mesh,
    *,
    dtype: str,
    max_length: int,
    batch_size: int,
    rows: int,
) -> RewardModels:
    """The reward models listed in `refs`, separated by commas, in the frozen format `dtype`.

    A model whose tokenizer is the policy's scores the sampled tokens as they are, unless `template_name` asks for another
    chat template; one with a tokenizer of its own gets the conversation rendered with `template_name` (empty: the
    tokenizer's own template) and encoded anew, up to `max_length` tokens. `batch_size` sequences are scored at a time in
    groups of `rows` packed rows. Raises UserError naming --load_checkpoint_reward or the file at fault.
    """
    sources, shares = [], []
    for number, ref in enumerate(_split(refs)):
        flag = "--load_checkpoint_reward"
        model = load_model(ref, mesh, head="reward", dtype=dtype, seed=number, compute={"dtype": dtype}, flag=flag)
        own = policy_template.tokenizer if model.directory is None else load_tokenizer(str(model.directory), flag)
        check_vocabulary(own, model.cfg.vocab_size, flag)
        same_tokens = fingerprint(own) == fingerprint(policy_template.tokenizer)
        length = min(max_length, model.cfg.max_positions)
        scorer = SequenceScorer(model.params, model.cfg, mesh, max_length=length, num_sequences=batch_size, rows=rows)
        name = "reward" if number == 0 else f"reward{number + 1}"
        if same_tokens and not template_name:
            if length < max_length:
                raise UserError(
                    f"{flag}={ref}: reads up to {length} tokens, a prompt and its response take {max_length}"
                )
            sources.append(model_source(name, scorer))
        else:
            template = load_template(template_name or "tokenizer", own, "--reward_template")
            sources.append(retokenized_source(name, template, length, scorer))
        shares.append(same_tokens)
    return RewardModels(sources, bool(shares) and shares[0])


def _split(refs: str) -> Sequence[str]:
    return [ref.strip() for ref in refs.split(",")] if refs.strip() else []
