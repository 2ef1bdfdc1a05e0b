"""Online preference pairs: two responses of the policy as it is to each prompt, ranked by any source of reward.

Source: Guo et al. 2024, Direct language model alignment from online AI feedback (arXiv:2402.04792), algorithm 1, with
any judge that gives a score. What follows is the step of `steps.dpo`, the same as on pairs from a file.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.sharding import fetch
from easyrl.data.alike import tokens_alike
from easyrl.data.packing import Shape, pack
from easyrl.data.prompts import PromptBatch, PromptDataset
from easyrl.data.tokenizer import Tokenizer, pad_id
from easyrl.rewards.held_out import score_held_out
from easyrl.rewards.responses import response_batch, sample_rows
from easyrl.rewards.score import Judged, judge_responses
from easyrl.rewards.shaping import ScoreConfig
from easyrl.rewards.sources import ResponseBatch, Source
from easyrl.runtime.metrics import PhaseTimer
from easyrl.runtime.reference import Logprobs
from easyrl.sampling.best_of_n import rank_two
from easyrl.sampling.decode import DecodingConfig, SamplingConfig
from easyrl.steps.dpo import AnswerBatch, place_answers
from easyrl.steps.rollout import LOGPROB_TOLERANCE, SampledBatch, join_samples

EACH = 2  # responses to a prompt


@dataclasses.dataclass(frozen=True)
class OnlineConfig(ScoreConfig, DecodingConfig):
    """How pairs are drawn and judged. Inherited by the script's config, so the flags carry PPO's plain names."""

    online: bool = flag(
        False, "The data are prompts: every step draws two responses to each from the policy as it is, and the better "
        "one by --load_checkpoint_reward or --reward_function is the chosen one.",
    )  # fmt: skip
    max_continuation_len: int = flag(128, "--online: tokens a response may have.", least=1)
    temperature: float = flag(1.0, "--online: sampling temperature. The loss takes log-probs at 1.", above=0)
    top_k: int = flag(0, "--online: sample from the k likeliest tokens. 0: from all.", least=0)
    top_p: float = flag(
        1.0, "--online: sample from the likeliest tokens that hold this probability together.", above=0, most=1
    )
    stop_ids: str = flag("", "--online: token ids that end a response. Empty: the model's and template's.")
    logged_samples: int = flag(
        2, "--online: responses of every step, and 4 times as many of an evaluation, in samples.jsonl.", least=0,
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        ScoreConfig.__post_init__(self)
        for field in dataclasses.fields(OnlineConfig):
            value = getattr(self, field.name)
            if not self.online and value != field.default:
                raise UserError(f"--{field.name}={value}: needs --online, which is not given")

    @property
    def sampling(self) -> SamplingConfig:
        """How responses are drawn."""
        return SamplingConfig(
            max_new_tokens=self.max_continuation_len, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


class PromptNumbers(flax.struct.PyTreeNode):
    """The prompts of a step, by number. With the weights before the step they decide its pairs."""

    samples: np.ndarray  # int64 [B]
    step: np.ndarray  # int scalar: the step, from 0


class OnlinePairs:
    """What `train_dpo --online` does in place of reading pairs: draws, judges and lays them out.

    Args:
      prompts: B of them are a step.
      sample: `Sampler`'s, with two responses a prompt and log-probs in the space `model`.
      sources, weights: what judges.
      reference: log-probs of answers under the frozen reference; None: the loss needs none.
      shapes: of the groups of packed rows that pairs are learnt from.
      share_prompts: whether what the two responses begin with is computed once.
      check_in: if given, policy and reference have the same weights and compute in this format: the first step checks
        that the sampler's log-probs are the reference's.
      measured_by: a name of the settings that decide how an answer scores.
    """

    def __init__(
        self,
        config: OnlineConfig,
        prompts: PromptDataset,
        sample: Callable[..., Any],
        sources: Sequence[Source],
        weights: Sequence[float],
        reference: Logprobs | None,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        seed: int,
        shapes: tuple[Shape, ...],
        share_prompts: bool,
        check_in: str = "",
        measured_by: str = "",
    ):
        self._config, self._prompts, self._sample, self._tokenizer = config, prompts, sample, tokenizer
        self._sources, self._weights, self._reference = sources, weights, reference
        self._mesh, self._shapes, self._share_prompts, self._check_in = mesh, shapes, share_prompts, check_in
        self._key = jax.random.key(seed)
        self._batch_size = len(prompts.batch(0).samples)
        self._width = prompts.prompt_length + config.max_continuation_len
        self._measured_by = measured_by
        self._start: dict[str, Any] = {}  # of the first evaluation: the fingerprint of its data, `measured_by`, scores
        self._faults: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=2)  # the last steps, counted from 1, and theirs
        self.samples: list[dict[str, Any]] = []  # rows for samples.jsonl; whoever writes them empties it

    def remember(self) -> dict[str, Any]:
        """The scores of the policy's first evaluation, of which data, and by which settings, for a checkpoint."""
        return self._start

    def recall(self, remembered: dict[str, Any]) -> None:
        """Goes on from what `remember` gave."""
        self._start = remembered

    def place(self, batch: PromptBatch) -> PromptNumbers:
        """What of a batch decides its pairs."""
        return PromptNumbers(np.asarray(batch.samples), np.asarray(batch.step))

    def step(self, update: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """`step(state, numbers) -> (state, metrics)`: `update` (of `steps.dpo`) on pairs drawn from `state`."""

        def step(state: Any, numbers: PromptNumbers) -> tuple[Any, dict[str, Any]]:
            answers, own = self.draw(state.params, numbers)
            state, metrics = update(state, answers)
            return state, metrics | own

        return step

    def faults(self, step: int) -> tuple[str, ...]:
        """What the sources of reward did wrong in one of the last two steps: a step's metrics come during the next."""
        return dict(self._faults).get(step, ())

    def draw(self, params: dict, numbers: PromptNumbers) -> tuple[AnswerBatch, dict[str, Any]]:
        """The pairs of a step, chosen before rejected, with the reference's log-probs; and metrics of all responses.

        A prompt whose two responses are the same or score alike, or have one that may not be learnt from, has no pair:
        its rows are filler to the loss. The same response may score differently by what rounding makes of its place.
        """
        timer = PhaseTimer()
        with timer.phase("rollout"):
            batch = self._prompts.take(np.asarray(numbers.samples))
            sampled, responses = self._respond(params, batch, int(numbers.step))
        with timer.phase("score"):
            judged = judge_responses(responses, self._sources, self._weights, self._config.missing_eos)
            scores = judged.scores.reshape(-1, EACH)
            sides = zip(responses.sequences[::EACH], responses.sequences[1::EACH], strict=True)
            differ = np.array([not np.array_equal(one, other) for one, other in sides])
            better, told = rank_two(scores, judged.keep.reshape(-1, EACH) & differ[:, None])
            order = EACH * np.arange(len(better))[:, None] + np.stack([better, 1 - better], axis=1)
            answers, kl, padding = self._lay_out(sampled.take(order.reshape(-1)), np.repeat(told, EACH))
        self.samples += sample_rows("train", responses, judged, self._config.logged_samples)
        self._faults.append((int(numbers.step) + 1, judged.faults))
        gaps = np.abs(scores[:, 0] - scores[:, 1])[told]
        metrics = {
            **judged.metrics,
            **kl,
            "online/score_margin": float(gaps.mean()) if gaps.size else 0.0,
            "online/told_share": float(told.mean()),
            "online/not_finite": len(judged.faults),
            **({"skipped": 1.0} if judged.faults and not told.any() else {}),  # the update knows of no fault
            "tokens/responses_len_mean": float(sampled.response_lengths.mean()),
            "tokens/ended_share": float(sampled.ended.mean()),
            "tokens/padding_share": padding,
            **timer.metrics(),
        }
        return answers, metrics

    def _respond(self, params: dict, batch: PromptBatch, step: int) -> tuple[SampledBatch, ResponseBatch]:
        """Two responses to each prompt: as tokens, and as what reward sources read."""
        ids = np.arange(EACH * len(batch.tokens), dtype=np.int32)
        samples = self._sample(params, batch.tokens, batch.lengths, jax.random.fold_in(self._key, step), ids)
        sampled = join_samples(batch.tokens, batch.lengths, samples, pad_id=pad_id(self._tokenizer))
        return sampled, response_batch(batch, sampled, self._tokenizer)

    def _lay_out(self, sampled: SampledBatch, told: np.ndarray) -> tuple[AnswerBatch, dict[str, float], float]:
        """(the pairs that are told, KL from the reference over all responses, share of padding)."""

        def place(chosen: np.ndarray, ref_logprobs: np.ndarray) -> tuple[AnswerBatch, float]:
            lengths = np.where(chosen, sampled.lengths, 0)
            mask = sampled.mask & chosen[:, None]
            alike = tokens_alike(sampled.tokens, mask, lengths) if self._share_prompts else None
            packing = pack(lengths, self._width, self._shapes, together=EACH, alike=alike)
            placed = place_answers(sampled.tokens, mask, ref_logprobs, packing, self._mesh, paired=True)
            return placed, packing.padding_share()

        nothing = np.zeros(len(told), np.float32)
        if self._reference is None:
            answers, padding = place(told, nothing)
            return answers, {}, padding
        everything, _ = place(np.ones(len(told), bool), nothing)
        ref_logprobs = fetch(self._reference(everything.tokens, everything.mask, everything.plans))
        logprobs = sampled.sampler_logprobs.sum(axis=1, where=sampled.mask)
        self._check(logprobs - ref_logprobs, sampled.response_lengths)
        answers, padding = place(told, ref_logprobs)
        return answers, {"objective/kl": float(np.mean(logprobs - ref_logprobs))}, padding

    def _check(self, differences: np.ndarray, lengths: np.ndarray) -> None:
        """Refuses to train wrong: at first the sampler's log-probs of responses must be those of an equal reference."""
        if not self._check_in:
            return
        found, (allowed, _) = float(np.abs(differences).sum() / lengths.sum()), LOGPROB_TOLERANCE[self._check_in]
        if not found <= allowed:
            raise UserError(
                f"self-check: the sampler's and the reference's log-probs differ by {found:.2g} a token (allowed "
                f"{allowed:g} in {self._check_in}), though both have the same weights: they do not see the same text"
            )
        self._check_in = ""

    def measure(self, params: dict, held_out: PromptDataset) -> dict[str, float]:
        """How the policy does on held-out prompts, with the same randomness every time.

        `win_share` is the share of responses that score higher than that of the policy's first evaluation to the same
        prompt, ties counted half. A run that went on with other held-out data or another reward compares with its first
        evaluation by these.
        """
        scores: list[float] = []

        def score(batch: PromptBatch, step: int) -> tuple[SampledBatch, ResponseBatch, Judged]:
            sampled, responses = self._respond(params, batch, step)
            judged = judge_responses(responses, self._sources, self._weights, self._config.missing_eos)
            scores.extend(judged.scores.tolist())
            return sampled, responses, judged

        metrics, responses, judged = score_held_out(held_out, self._batch_size, score)
        self.samples += sample_rows("eval", responses, judged, 4 * self._config.logged_samples)
        data = held_out.dataset.fingerprint
        by = self._start.get("measured_by", self._measured_by)  # checkpoints from before this was kept do not say
        if self._start.get("data") != data or by != self._measured_by:
            self._start = {"data": data, "measured_by": self._measured_by, "scores": scores}
        wins = 0.5 + 0.5 * np.sign(np.subtract(scores, self._start["scores"]))[: EACH * len(held_out)]
        metrics["eval/win_share"] = float(np.nanmean(wins))
        return {name.removeprefix("eval/"): value for name, value in metrics.items()}  # the caller names them so
