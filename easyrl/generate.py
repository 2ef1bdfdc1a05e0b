"""Answers to the prompts of a file: one or several to each, the best of several, or training data made of them.

    python -m easyrl.generate --load_checkpoint=hf::DIR --prompts=PROMPTS.jsonl --output=ANSWERS.jsonl
    python -m easyrl.generate ... --best_of=8 --load_checkpoint_reward=hf::REWARD_DIR [--make=preferences]

Every answer is a function of the weights, its prompt, --seed and its number, and of neither batch size nor mesh.
Finished answers are on disk at once: a job that is killed and started again goes on. docs/generate.md has more.
"""

import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.distributed import DistributedConfig, from_first, is_first, say
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.files import check_writable
from easyrl.core.fingerprint import fingerprint_params
from easyrl.core.sharding import check_batch, make_mesh, num_data_shards
from easyrl.data.choice import parse_split
from easyrl.data.generations import Candidate, best_row, demonstration_row, generation_rows, preference_row
from easyrl.data.prompts import PromptRow, prompt_batch, read_prompts
from easyrl.data.readers import open_source
from easyrl.data.templates import Template, load_template
from easyrl.data.tokenizer import check_vocabulary, fingerprint, load_tokenizer, pad_id
from easyrl.hf.refs import find_model, load_weights, stop_ids_of
from easyrl.rewards.models import find_sources
from easyrl.rewards.responses import response_batch
from easyrl.rewards.score import judge_responses
from easyrl.rewards.shaping import ScoreConfig
from easyrl.runtime.partial import PartialFile
from easyrl.runtime.progress import SECONDS_BETWEEN_LINES, short
from easyrl.sampling import best_of_n
from easyrl.sampling.decode import DecodingConfig, SamplingConfig
from easyrl.steps.rollout import join_samples
from easyrl.steps.sampling import Sampler, lay_out_for_decoding

MOST_SAMPLES = 1024  # answers to a prompt: answer j to prompt i is number i * MOST_SAMPLES + j, whatever N is
MOST_PROMPTS = 2**32 // MOST_SAMPLES
# Tokens that prompts are padded to, or to twice, four times, ... as many, so that few programs are compiled.
NARROWEST = 32
# Flags that decide how and where a job computes and not what comes out.
LAYOUT = ("prompts", "output", "batch_size", "decode_rows", "mesh_dim", "jax_distributed")


@dataclasses.dataclass(frozen=True)
class Config(SamplingConfig, DecodingConfig, ScoreConfig):
    """Answer the prompts of a file with a model, and keep the best of several answers if asked to."""

    load_checkpoint: str = flag(
        "",
        "The model: hf::DIR_OR_HUB_ID, easyrl::DIR, params::FILE@CONFIG (EasyLM's) or random::PRESET_OR_CONFIG_JSON.",
    )
    tokenizer: str = flag("", "Folder or hub id of the tokenizer. Empty: that of --load_checkpoint.")
    template: str = flag(
        "tokenizer", "Chat format: tulu, vicuna, chatml, llama3, none, a Jinja file, or the tokenizer's own."
    )
    prompts: str = flag("", "The prompts: a file (.jsonl, .jsonl.gz, .json, .parquet), a folder or a hub id.")
    split: str = flag("", "Part of the prompts: a split's name, a slice of rows, or both, as in [:100] or test[:100].")
    output: str = flag("", "JSON lines file for the answers. While the job runs they are in this name with .part.")

    num_samples: int = flag(1, "Answers to each prompt, a row for each.", least=1, most=MOST_SAMPLES)
    best_of: int = flag(
        0, "Answers to each prompt of which the one with the highest score gets a row. 0: all are kept.",
        least=0, most=MOST_SAMPLES,
    )  # fmt: skip
    make: str = flag(
        "answers",
        "What a row is: answers, or, of the --best_of answers, sft (prompt and best answer, for train_sft) or "
        "preferences (the best and a worse one, for train_rm and train_dpo).",
        choices=("answers", "sft", "preferences"),
    )
    rejected: str = flag(
        "worst", "The worse one of --make=preferences: the worst, or a random one that scores lower than the best.",
        choices=best_of_n.REJECTED,
    )  # fmt: skip
    max_continuation_len: int = flag(
        0, "--max_new_tokens by the name that train_ppo has for it. 0: as --max_new_tokens says.", least=0
    )
    max_prompt_length: int = flag(
        0, "Tokens of a prompt that are read; a longer one loses its beginning. 0: all that the model has room for.",
        least=0,
    )  # fmt: skip
    stop_ids: str = flag("", "Token ids that end an answer, separated by commas. Empty: the model's and template's.")
    seed: int = flag(42, "Seed of the answers.", least=0, most=2**32 - 1)
    batch_size: int = flag(32, "Prompts answered at a time, over all devices.", least=1)
    mesh_dim: str = flag("1,-1,1", "Sizes of the mesh axes dp,fsdp,mp; also dp:1,fsdp:-1,mp:1. -1: what is left, once.")
    dtype: str = flag("bf16", "Format of the models.", choices=tuple(DTYPES))
    jax_distributed: DistributedConfig = flag(DistributedConfig(), "Several processes (docs/reliability.md).")

    def __post_init__(self) -> None:
        ScoreConfig.__post_init__(self)
        for name in ("prompts", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name}: found nothing, expected a file")
        if self.max_continuation_len and self.max_new_tokens not in (
            self.max_continuation_len,
            SamplingConfig.max_new_tokens,  # not given, as far as can be seen
        ):
            raise UserError(
                f"--max_continuation_len={self.max_continuation_len}: --max_new_tokens={self.max_new_tokens} is the "
                "same flag, expected one of them"
            )
        if self.best_of and self.num_samples > 1:
            raise UserError(f"--num_samples={self.num_samples}: does not go with --best_of={self.best_of}")
        if self.best_of and not self.scored:
            raise UserError(
                f"--best_of={self.best_of}: nothing scores, expected --load_checkpoint_reward or --reward_function"
            )
        if self.make != "answers" and self.best_of < 2:
            raise UserError(f"--make={self.make}: --best_of={self.best_of}, expected 2 or more answers to choose from")
        if self.sampling.temperature == 0 and self.each > 1:
            found = "best_of" if self.best_of else "num_samples"
            raise UserError(f"--{found}={self.each}: --temperature=0 gives the same answer every time, expected more")

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are drawn."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingConfig)}
        try:
            return SamplingConfig(**values | {"max_new_tokens": self.max_continuation_len or self.max_new_tokens})
        except UserError as error:
            raise UserError(f"--{error}") from None

    @property
    def each(self) -> int:
        """Answers that are drawn for each prompt."""
        return self.best_of or self.num_samples

    @property
    def scored(self) -> bool:
        """Whether something scores the answers."""
        return bool(self.load_checkpoint_reward.strip() or self.reward_function.strip())


def main(config: Config) -> None:
    # ------------------------------------------------------------ what there is: everything but the weights
    from_first(lambda: check_writable(config.output, "--output"))
    mesh = make_mesh(config.mesh_dim)
    check_batch(config.batch_size, mesh, config.mesh_dim, "--batch_size")
    check_batch(config.decode_rows, mesh, config.mesh_dim, "--decode_rows")
    shards = num_data_shards(mesh)
    dtype, sampling = DTYPES[config.dtype], config.sampling
    model = find_model(config.load_checkpoint, compute={"dtype": dtype})
    room = model.cfg.max_positions - sampling.max_new_tokens
    if room < max(config.max_prompt_length, 1):
        raise UserError(
            f"--load_checkpoint={config.load_checkpoint}: reads up to {model.cfg.max_positions} tokens, of which "
            f"--max_new_tokens={sampling.max_new_tokens} leaves {max(room, 0)} for a prompt, expected at least "
            f"{max(config.max_prompt_length, 1)}"
        )
    tokenizer = load_tokenizer(config.tokenizer or str(model.directory or ""))
    check_vocabulary(tokenizer, model.cfg.vocab_size)
    template = load_template(config.template, tokenizer)
    stop_ids = stop_ids_of(model, template, config.stop_ids)
    prompts, digest = load_prompts(config, template, room)
    longest = max(len(prompt.tokens) for prompt in prompts)
    size = min(config.batch_size, -(-len(prompts) // shards) * shards)
    found = None
    if config.scored:
        found = find_sources(config, template, dtype=dtype, max_length=longest + sampling.max_new_tokens)
        found.check(lambda: dict.fromkeys(name for prompt in prompts for name in prompt.columns))

    # ------------------------------------------------------------ weights, device programs, what is done already
    params = load_weights(model, mesh, head="lm", dtype=dtype, seed=config.seed)
    sources = found.load(mesh, dtype=dtype, batch_size=size * config.each) if found else []
    sample = Sampler(
        model.cfg, sampling, stop_ids=stop_ids, pad_id=pad_id(tokenizer), num_samples=config.each,
        decode_rows=config.decode_rows, unstacked=True, mesh=mesh,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    answers: PartialFile | None = None  # process 0 has it
    job = {"prompts": digest, "weights": fingerprint_params(params), **decisive_flags(config)}
    # Of both, what they say: files may change while their names stay.
    template_digest = hashlib.sha256(template.jinja.encode()).hexdigest()
    job |= {"the template's text": template_digest, "the tokenizer's": fingerprint(tokenizer)}

    def answered() -> list[int]:
        nonlocal answers
        answers = PartialFile(Path(config.output).expanduser(), len(prompts), job)
        return answers.done

    left = items_left(prompts, from_first(answered))
    params = lay_out_for_decoding(params, model.cfg, mesh)

    # ------------------------------------------------------------ batch after batch, the longest prompts first
    def answer(items: np.ndarray) -> list[list[Candidate]]:
        """The candidates for each of these prompts."""
        batch = prompt_batch([prompts[item] for item in items], items, template, width_for(prompts, items, longest))
        fill = size - len(items)  # rows of length 0: the last batch runs in the program of the others
        numbers = np.pad(items, (0, fill)).astype(np.uint32)[:, None] * MOST_SAMPLES + np.arange(
            config.each, dtype=np.uint32
        )
        tokens, lengths = np.pad(batch.tokens, ((0, fill), (0, 0))), np.pad(batch.lengths, (0, fill))
        samples = sample(params, tokens, lengths, key, numbers.reshape(-1))
        sampled = join_samples(tokens, lengths, samples, pad_id=pad_id(tokenizer)).take(slice(len(items) * config.each))
        responses = response_batch(batch, sampled, tokenizer)
        scores: Sequence[float | None] = [None] * len(responses)
        if found:
            judged = judge_responses(responses, sources, found.weights, config.missing_eos)
            faults.extend(judged.faults)
            scores = [float(score) if keep else None for score, keep in zip(judged.scores, judged.keep, strict=True)]
        flat = list(map(Candidate, responses.responses, sampled.ended.tolist(), scores))
        drawn.append(int(sampled.response_lengths.sum()))
        return [flat[start : start + config.each] for start in range(0, len(flat), config.each)]

    faults, drawn, begun = list[str](), list[int](), time.perf_counter()
    with progress_bar(len(prompts), len(prompts) - len(left)) as bar:
        for start in range(0, len(left), size):
            items = left[start : start + size]
            for item, candidates in zip(items.tolist(), answer(items), strict=True):
                if answers is not None:
                    made = make_rows(config, item, prompts[item], candidates)
                    answers.add(item, made.rows, {"dropped": made.dropped, **facts_of(candidates)})
            bar.set_postfix_str(f"{short(sum(drawn) / (time.perf_counter() - begun))} tok/s", refresh=False)
            bar.update(len(items))
    if answers is not None:
        say(summary(config, answers.finish(), faults))


# ---------------------------------------------------------------- prompts


def load_prompts(config: Config, template: Template, room: int) -> tuple[list[PromptRow], str]:
    """The rows of --prompts and a fingerprint of them; says how many lose their beginning."""
    try:
        split = parse_split(config.split)
    except UserError as error:
        raise UserError(f"--{error}") from None
    try:
        source = open_source(config.prompts, split)
    except UserError as error:
        raise UserError(f"--prompts: {error}") from None
    prompts = read_prompts(source, template, config.max_prompt_length or room, "--prompts")
    if len(prompts) > MOST_PROMPTS:
        raise UserError(
            f"--prompts={config.prompts}: found {len(prompts):,} prompts, expected at most {MOST_PROMPTS:,}"
        )
    cut = sum(prompt.cut for prompt in prompts)
    say(f"{len(prompts):,} prompts" + (f", {cut:,} of them cut from the left" if cut else ""))
    return prompts, source.fingerprint


def items_left(prompts: list[PromptRow], answered: list[int]) -> np.ndarray:
    """int64: the prompts not answered yet, the longest first, so that neighbours are alike in length."""
    done = np.isin(np.arange(len(prompts)), answered)
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    order = np.argsort(-lengths, kind="stable")
    return order[~done[order]]


def width_for(prompts: list[PromptRow], items: np.ndarray, longest: int) -> int:
    """The width that a batch is padded to: one of a few, so that few programs are compiled."""
    need = max(len(prompts[item].tokens) for item in items)
    return min(NARROWEST * 2 ** max(0, math.ceil(math.log2(need / NARROWEST))), longest)


def decisive_flags(config: Config) -> dict[str, Any]:
    """The flags that decide what the answers are."""
    return {name: value for name, value in vars(config).items() if name not in LAYOUT}


# ---------------------------------------------------------------- rows


class Made(NamedTuple):
    """The rows that a prompt gives, and if none, why."""

    rows: list[dict[str, Any]]
    dropped: str = ""


def make_rows(config: Config, item: int, prompt: PromptRow, candidates: list[Candidate]) -> Made:
    """What becomes of the candidates for prompt number `item`."""
    if not config.best_of:
        return Made(generation_rows(prompt, candidates))
    scores = np.array([-np.inf if one.score is None else one.score for one in candidates])
    usable = np.isfinite(scores)
    if config.make == "answers":
        chosen = best_of_n.best(scores, usable)
        return Made([best_row(prompt, candidates, 0 if chosen is None else chosen)])
    usable &= [bool(one.response.strip()) for one in candidates]  # no trainer takes an empty answer
    if not usable.any():
        return Made([], "every answer is empty, cut off or without a score")
    if config.make == "sft":
        chosen = best_of_n.best(scores, usable)
        assert chosen is not None
        return Made([demonstration_row(prompt, candidates[chosen])])
    texts = [one.response for one in candidates]
    pair = best_of_n.pair(scores, usable, texts, rejected=config.rejected, seed=(config.seed, item))
    if pair is None:
        return Made([], "no answer scores lower than the best")
    return Made([preference_row(prompt, *(candidates[one] for one in pair))])


def facts_of(candidates: list[Candidate]) -> dict[str, Any]:
    """What the summary needs to know of a prompt's candidates."""
    return {"scores": [one.score for one in candidates], "ended": sum(one.ended for one in candidates)}


def summary(config: Config, facts: list[dict[str, Any]], faults: list[str]) -> str:
    """What a job says at its end: how many answers ended, how good they are, what was left out."""
    answers = len(facts) * config.each
    dropped = [one["dropped"] for one in facts if one["dropped"]]
    ended = sum(one["ended"] for one in facts) / answers
    lines = [f"{config.output}: {len(facts):,} prompts, {ended:.1%} of {answers:,} answers ended by themselves"]
    scores = [[score for score in one["scores"] if score is not None] for one in facts]
    full = [np.array(of) for of in scores if len(of) == config.each]
    if config.scored and full:
        sizes = [n for n in (2**power for power in range(11)) if n < config.each] + [config.each]
        means = (f"{n} {np.mean([best_of_n.expected_best(of, n) for of in full]):.4g}" for n in sizes)
        lines.append(f"mean score of the best of n answers: {', '.join(means)}")
    lines += [f"left out: {dropped.count(why):,} prompts: {why}" for why in dict.fromkeys(dropped)]
    if faults:
        lines.append(f"{len(faults):,} scores are not finite and were passed over; the first: {faults[0]}")
    return "\n".join(lines)


def progress_bar(total: int, done: int) -> tqdm:
    """A bar over the prompts, on process 0: one line in a terminal, a line now and then in a log file."""
    return tqdm(
        total=total, initial=done, desc="generating", unit=" prompts", dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES, disable=not is_first(),
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config)
