"""Reward models as sources: found first, which costs nothing, then loaded once, frozen, scored on the device.

`find_sources` does so for all that a command line names, Python functions included.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

from jax.sharding import Mesh

from easyrl.core.distributed import say
from easyrl.core.errors import UserError
from easyrl.data.messages import Message
from easyrl.data.templates import Template, load_template, own_jinja
from easyrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, same_ids
from easyrl.hf.refs import FoundModel, find_model, load_weights
from easyrl.rewards.shaping import ScoreConfig, parse_weights
from easyrl.rewards.sources import Source, function_sources, model_source, retokenized_source
from easyrl.steps.reward import SequenceScorer

FLAG = "--load_checkpoint_reward"
# A text has as many tokens at most, as a rule, for a reward model's tokenizer as for the policy's, times this.
TOKENS_FOR_ONE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a reward model reads: with which `template`, None for the sampled tokens as they are; whether the policy's
    tokenizer is its own; and how many tokens of a conversation at most.
    """

    template: Template | None
    shares_tokenizer: bool
    max_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(Reading):
    """A reward model before its weights are read."""

    name: str
    found: FoundModel


def scored_length(ref: str, max_length: int, max_positions: int, written: int | None) -> int:
    """The most tokens that the reward model `ref`, which reads up to `max_positions`, scores.

    `max_length` are the policy's, of a prompt with its response. `written` are those of a template for a conversation
    that is encoded anew, None where the policy's tokens are read as they are. Raises UserError where these do not fit.
    """
    if written is not None:
        return min(TOKENS_FOR_ONE * max_length + written, max_positions)
    if max_positions < max_length:
        raise UserError(
            f"{FLAG}={ref}: reads up to {max_positions} tokens, a prompt and its response take {max_length}"
        )
    return max_length


def find_reading(
    ref: str, own: Tokenizer, policy: Tokenizer, template_name: str, *, max_length: int, max_positions: int
) -> Reading:
    """How the reward model `ref` with its `own` tokenizer reads what a policy with another one says.

    Arguments as of `scored_length`, `template_name` as of `find_reward_models`; raises UserError as these do.
    """
    same = same_ids(own, policy)
    template, written = None, None
    if template_name or not same:
        template = load_template(template_name or "tokenizer", own, "--reward_template")
        written = len(template.encode_prompt((Message("user", "a"),)))
    length = scored_length(ref, max_length, max_positions, written)
    return Reading(template=template, shares_tokenizer=same, max_length=length)


def find_reward_models(
    refs: str, template_name: str, policy_template: Template, *, dtype: str, max_length: int
) -> list[RewardModel]:
    """The reward models listed in `refs`, separated by commas.

    A model whose tokenizer is the policy's scores the sampled tokens as they are, unless `template_name` asks for
    another chat template; that it has another one itself is said. One with a tokenizer of its own gets the conversation
    rendered with `template_name` (empty: the tokenizer's own template) and encoded anew. `max_length` is the policy's:
    of a prompt with its response. Encoded anew these may be longer: there is room for `TOKENS_FOR_ONE` times as many
    tokens beside those of the template, as far as the model reads. Raises UserError naming --load_checkpoint_reward or
    the file at fault.
    """
    models = []
    for number, ref in enumerate(ref.strip() for ref in refs.split(",") if refs.strip()):
        found = find_model(ref, head="reward", compute={"dtype": dtype}, flag=FLAG)
        own = policy_template.tokenizer if found.directory is None else load_tokenizer(str(found.directory), FLAG)
        check_vocabulary(own, found.cfg.vocab_size, f"{FLAG}={ref}")
        reading = find_reading(
            ref, own, policy_template.tokenizer, template_name, max_length=max_length,
            max_positions=found.cfg.max_positions,
        )  # fmt: skip
        if not reading.template and found.directory and own_jinja(own) not in (None, policy_template.jinja):
            say(
                f"note: {FLAG}={ref} has a chat template of its own, and reads what the policy reads, with the "
                f"template {policy_template.name!r}; --reward_template=tokenizer gives it its own"
            )
        models.append(RewardModel(name=f"reward{number + 1 if number else ''}", found=found, **vars(reading)))
    return models


def load_reward_model(
    model: RewardModel, mesh: Mesh, *, dtype: str, seed: int, batch_size: int, rows: int = 0
) -> Source:
    """The model as a source, frozen in the format `dtype`.

    `batch_size` sequences are scored at a time, `rows` as of `SequenceScorer`. Raises UserError naming the file at
    fault; `seed` is for a random model.
    """
    params = load_weights(model.found, mesh, head="reward", dtype=dtype, seed=seed)
    scorer = SequenceScorer(
        params,
        model.found.cfg,
        mesh,
        max_length=model.max_length,
        num_sequences=batch_size,
        rows=rows,
        pad_id=model.found.pad_id,
    )
    if model.template is None:
        source = model_source(model.name, scorer)
    else:
        source = retokenized_source(model.name, model.template, model.max_length, scorer)
    return dataclasses.replace(source, calls=lambda: [scorer.call(name=model.name)])


@dataclasses.dataclass(frozen=True)
class FoundSources:
    """All sources of reward that a command line names, before weights are read; `weights` has one number for each."""

    models: list[RewardModel]
    functions: list[Source]
    weights: tuple[float, ...]

    def check(self, columns: Callable[[], Collection[str]]) -> None:
        """Raises UserError when data lack a column that a function needs; `columns()` are their other ones."""
        for function in self.functions:
            function.check(columns())

    def load(self, mesh: Mesh, *, dtype: str, batch_size: int, rows: int = 0) -> list[Source]:
        """The sources, models first, in the order of `weights`. See `load_reward_model`."""
        models = (
            load_reward_model(model, mesh, dtype=dtype, seed=number, batch_size=batch_size, rows=rows)
            for number, model in enumerate(self.models)
        )
        return [*models, *self.functions]


def find_sources(config: ScoreConfig, policy_template: Template, *, dtype: str, max_length: int) -> FoundSources:
    """The sources that --load_checkpoint_reward and --reward_function name.

    Raises UserError when there is none, and for a template of reward models where there is no such model.
    """
    models = find_reward_models(
        config.load_checkpoint_reward, config.reward_template, policy_template, dtype=dtype, max_length=max_length
    )
    functions = function_sources(config.reward_function)
    if functions and not models and config.reward_template:
        raise UserError(f"--reward_template={config.reward_template}: needs --load_checkpoint_reward, which is empty")
    return FoundSources(models, functions, parse_weights(config, len(models), len(functions)))


def named_sources(config: ScoreConfig) -> str:
    """The sources of reward that a command line names, for people to read."""
    refs = (ref.strip().partition("::")[2] for ref in config.load_checkpoint_reward.split(","))
    return ", ".join(name for name in (*refs, *config.reward_function.split(",")) if name.strip())


def value_start(named: str, policy: str, rewards: str, models: Sequence[Reading], *, shared: bool) -> str:
    """The reference that PPO's value model starts from.

    `named` is --load_checkpoint_value: a reference, `reward`, `policy`, or empty: the first of the `rewards` if it
    reads the policy's tokens, else the policy. With `shared`, where the value model stands on the policy's lower
    layers, empty is the policy: a reward model has as a rule lower layers of its own. Raises UserError for a reward
    model that does not read the policy's tokens.
    """
    shares_tokenizer = bool(models) and models[0].shares_tokenizer
    named = named or ("reward" if shares_tokenizer and not shared else "policy")
    if named == "reward" and not shares_tokenizer:
        found = "does not read the policy's tokens" if models else "is empty"
        raise UserError(f"--load_checkpoint_value=reward: --load_checkpoint_reward {found}, expected policy or a model")
    return {"reward": rewards.split(",")[0].strip(), "policy": policy}.get(named, named)
