"""PPO with a learnt value model: from a policy and a reward to a better policy.

    python -m easyrl.train_ppo --mesh_dim=1,-1,1
    python -m easyrl.train_ppo --config=configs/X.yaml --output_dir=DIR --load_checkpoint_policy=hf::DIR ...

The first is the bundled quickstart. One step of the loop is one batch of prompts: sample responses, score them once
into a frozen rollout, then update policy and value model from it. docs/ppo.md gives the source of every implementation
detail, docs/metrics.md the formula of every metric.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from easyrl import assets
from easyrl.core.ahead import Call
from easyrl.core.command_line import run
from easyrl.core.config import flag, to_dict
from easyrl.core.distributed import say
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.sharding import check_batch, fetch, make_mesh, num_data_shards, put, replicated
from easyrl.data.dataset import DatasetConfig, HeldOutConfig
from easyrl.data.packing import pack
from easyrl.data.prompts import PromptBatch, PromptDataset
from easyrl.data.tokenizer import pad_id
from easyrl.hf.export import check_replaceable, export_model, generation_settings
from easyrl.hf.frozen import load_frozen
from easyrl.hf.model_card import ModelCard
from easyrl.hf.refs import FoundModel, load_weights
from easyrl.hf.saved import LOWEST, SavedModel
from easyrl.models.branch import join, trained_layers
from easyrl.rewards.held_out import score_held_out
from easyrl.rewards.models import named_sources
from easyrl.rewards.responses import response_batch, sample_rows
from easyrl.rewards.score import Scored, score_responses
from easyrl.rewards.shaping import Moments, RewardConfig
from easyrl.rewards.sources import ResponseBatch
from easyrl.runtime.alarms import nothing_learnt_hook
from easyrl.runtime.checkpoint import open_checkpoints
from easyrl.runtime.flight import FlightRecorder
from easyrl.runtime.guard import check_weights
from easyrl.runtime.metrics import PhaseTimer
from easyrl.runtime.ppo_card import ppo_card, value_card
from easyrl.runtime.ppo_start import find_ppo_start
from easyrl.runtime.progress import compile_programs, warn
from easyrl.runtime.run_config import RunConfig, find_shapes
from easyrl.runtime.run_dir import make_run_dir
from easyrl.runtime.training import Export, Training, run_training
from easyrl.runtime.troubles import Troubles
from easyrl.sampling.decode import DecodingConfig, SamplingConfig
from easyrl.steps.optimizer import make_optimizer, updates_in
from easyrl.steps.packed import place_plans
from easyrl.steps.ppo import PPOState, abstract_ppo_state, branch_specs, make_ppo_schedules, make_update
from easyrl.steps.ppo_config import PPOConfig, resumed_kl_coef
from easyrl.steps.rollout import SampledBatch, calls_ahead, join_samples, run_updates, self_check
from easyrl.steps.sampling import Sampler
from easyrl.steps.scoring import abstract_passes, make_finish, make_forward
from easyrl.steps.state import TrainState, create_train_state


@dataclasses.dataclass(frozen=True)
class Config(PPOConfig, RewardConfig, DecodingConfig, RunConfig):
    """Tune a language model with PPO against a reward, with a learnt value model.

    Without --config, models and prompts this runs the bundled quickstart.
    """

    load_checkpoint_policy: str = flag(
        "", "The policy's start: hf::DIR_OR_HUB_ID, easyrl::DIR, params::FILE@CONFIG (EasyLM's) or "
        "random::PRESET_OR_CONFIG_JSON. Without this, any other model, prompts and --config: the bundled quickstart.",
    )  # fmt: skip
    load_checkpoint_reference: str = flag("", "The model the KL is taken to. Empty: the policy's start.")
    load_checkpoint_value: str = flag(
        "", "The value model's start: a model, `reward` or `policy`. Empty: the reward model if it shares the policy's "
        "tokenizer and --num_layers_unfrozen is not set, else the policy.",
    )  # fmt: skip
    tokenizer: str = flag("", "Folder or hub id of the policy's tokenizer. Empty: that of --load_checkpoint_policy.")
    template: str = flag(
        "tokenizer", "Chat format: tulu, vicuna, chatml, llama3, none, a Jinja file, or the tokenizer's own."
    )
    stop_ids: str = flag("", "Token ids that end a response, separated by commas. Empty: the model's and template's.")

    train_dataset: DatasetConfig = flag(DatasetConfig(), "Prompts; batch_size of them are one step.")
    eval_dataset: HeldOutConfig = flag(HeldOutConfig(), "Held-out prompts, cut and batched as the training prompts.")

    max_continuation_len: int = flag(16, "Tokens a response may have.", least=1)
    min_continuation_len: int = flag(0, "Tokens before which a response may not end.", least=0)
    top_k: int = flag(0, "Sample from the k likeliest tokens. 0: from all.", least=0)
    top_p: float = flag(1.0, "Sample from the likeliest tokens that hold this probability together.", above=0, most=1)
    rollouts_per_prompt: int = flag(1, "Responses to each prompt.", least=1)
    generate_only: bool = flag(False, "Sample and score, but update nothing.")

    total_steps: int = flag(0, "Steps. 0: as many as --num_epochs passes over the prompts take.", least=0)
    max_steps_per_epoch: int = flag(0, "Steps after which an epoch is cut short. 0: none.", least=0)
    ppo_epochs: int = flag(4, "Passes over each batch of rollouts.", least=1)
    mini_batch_size: int = flag(
        1, "Responses in one optimizer step; divides batch_size x rollouts_per_prompt.", least=1
    )
    lr: float = flag(1e-5, "Peak learning rate of the policy.", least=0, below=math.inf)
    value_lr: float = flag(0.0, "Peak learning rate of the value model. 0: --lr.", least=0, below=math.inf)
    lr_schedule: str = flag("constant", "After the warm-up.", choices=("constant", "linear", "cosine"))
    warmup_epochs: float = flag(0.0, "Epochs, or a part of one, over which the learning rate rises from 0.", least=0)
    policy_freeze_epochs: float = flag(0.0, "Epochs, or a part of one, in which only the value model learns.", least=0)
    record_rollouts: int = flag(
        0, "Keep the rollout of every this many steps, in rollouts/step-<n>.safetensors for easyrl.replay. 0: none.",
        least=0, may_change=True,
    )  # fmt: skip
    logged_samples: int = flag(
        2, "Responses of every step, and 4 times as many of an evaluation, in samples.jsonl.", least=0, may_change=True
    )

    def __post_init__(self) -> None:
        PPOConfig.__post_init__(self)
        RewardConfig.__post_init__(self)
        if self.min_continuation_len > self.max_continuation_len:
            raise UserError(
                f"--min_continuation_len={self.min_continuation_len}: "
                f"expected at most --max_continuation_len={self.max_continuation_len}"
            )
        if self.num_responses % self.mini_batch_size:
            raise UserError(
                f"--mini_batch_size={self.mini_batch_size}: does not divide the {self.num_responses} responses of a "
                "step (train_dataset.batch_size x rollouts_per_prompt)"
            )
        if self.kl_target and self.kl_horizon <= (least := 0.2 * self.num_responses):
            raise UserError(
                f"--kl_horizon={self.kl_horizon:g}: expected more than {least:g}, a fifth of the {self.num_responses} "
                "responses of a step (train_dataset.batch_size x rollouts_per_prompt)"
            )

    @staticmethod
    def default_yaml(given: Mapping[str, Any]) -> str:
        """Without --config, models and prompts: the quickstart."""
        own = any(name.startswith("load_checkpoint_") or name == "train_dataset.path" for name in given)
        return "" if own else str(assets.QUICKSTART)

    @property
    def num_responses(self) -> int:
        """Responses in one step."""
        return self.train_dataset.batch_size * self.rollouts_per_prompt

    @property
    def sampling(self) -> SamplingConfig:
        """How responses are drawn."""
        return SamplingConfig(
            max_new_tokens=self.max_continuation_len, min_new_tokens=self.min_continuation_len,
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
        )  # fmt: skip


def main(config: Config) -> None:
    config = assets.fill_in(config)
    # ------------------------------------------------------------ mesh, output
    mesh = make_mesh(config.mesh_dim)
    check_batch(config.train_dataset.batch_size, mesh, config.mesh_dim)
    check_batch(config.decode_rows, mesh, config.mesh_dim, "--decode_rows")
    if config.mini_batch_size < (shards := num_data_shards(mesh)) and not config.generate_only:
        warn(f"--mini_batch_size={config.mini_batch_size}: of the {shards} parts that dp x fsdp of --mesh_dim="
             f"{config.mesh_dim} makes of a batch, some have nothing to do in updates")  # fmt: skip
    whole = replicated(mesh)

    # ------------------------------------------------------------ what there is: everything but the weights
    dtype, param_dtype = DTYPES[config.dtype], DTYPES[config.param_dtype]
    max_length = config.train_dataset.seq_length + config.max_continuation_len
    shapes, update_shapes = (
        find_shapes(config, mesh, max_length, sequences=sequences)
        for sequences in (config.num_responses, config.mini_batch_size)
    )
    begin = find_ppo_start(config, max_length)
    policy, reference, value = begin.policy, begin.reference, begin.value
    tokenizer, template, stop_ids = begin.tokenizer, begin.template, begin.stop_ids

    prompts = PromptDataset(config.train_dataset, template, config.seed)
    held_out = None
    if config.eval_dataset.path:
        like_train = config.eval_dataset.like(config.train_dataset)
        held_out = PromptDataset(like_train, template, config.seed, name="eval_dataset", keep_last=True)
    for name, data in {"train_dataset": prompts, "eval_dataset": held_out}.items():
        if data is not None:
            say(f"--{name}: {data.dataset.summary()}")
            begin.sources.check(data.columns)

    run_dir = make_run_dir(config.output_dir, "train_ppo", config.checkpoint_dir)
    value_dir = run_dir.path / "hf_value"
    for folder in (run_dir.hf, value_dir):
        check_replaceable(folder)
    checkpoints = open_checkpoints(config, run_dir, "train_ppo", prompts.dataset.fingerprint, begin.never_trained)

    # ------------------------------------------------------------ frozen weights
    unfrozen, weights = config.num_layers_unfrozen, begin.sources.weights
    frozen = load_frozen(
        policy, reference, value, unfrozen, mesh, dtype=dtype, param_dtype=param_dtype, seed=config.seed
    )
    sources = begin.sources.load(mesh, dtype=dtype, batch_size=config.num_responses, rows=config.micro_batch_size)

    # ------------------------------------------------------------ schedule, state
    steps_per_epoch = min(prompts.steps_per_epoch, config.max_steps_per_epoch or prompts.steps_per_epoch)
    total_steps = config.total_steps or config.num_epochs * steps_per_epoch
    updates_per_step = config.ppo_epochs * config.num_responses // config.mini_batch_size
    warmup_updates = updates_in(config.warmup_epochs, steps_per_epoch * updates_per_step)
    frozen_steps = updates_in(config.policy_freeze_epochs, steps_per_epoch)

    value_updates = total_steps * updates_per_step
    policy_updates = max(total_steps - frozen_steps, 0) * updates_per_step
    policy_lr, value_lr = make_ppo_schedules(
        config.lr_schedule, config.lr, config.value_lr,
        policy_updates=policy_updates, value_updates=value_updates, warmup_updates=warmup_updates,
    )  # fmt: skip
    policy_optimizer, value_optimizer = (make_optimizer(config.optimizer, lr) for lr in (policy_lr, value_lr))

    def first_state() -> PPOState:
        def create(found: FoundModel, head: str, optimizer: optax.GradientTransformation) -> TrainState:
            params = load_weights(
                found, mesh, head=head, dtype=param_dtype, seed=config.seed, new_head="zeros" if head != "lm" else None,
                layers=trained_layers(found.cfg.num_layers, unfrozen), trained=True,
            )  # fmt: skip
            return create_train_state(params, branch_specs(found.cfg, head, config), optimizer, mesh)

        return PPOState(
            create(policy, "lm", policy_optimizer),
            create(value, "value", value_optimizer),
            put(np.float32(config.kl_coef), whole),
        )

    abstract_state = abstract_ppo_state(
        policy.cfg, value.cfg, config, param_dtype, policy_optimizer, value_optimizer, mesh
    )
    state = checkpoints.restore(abstract_state, first_state)
    if checkpoints.start:
        kl_coef = resumed_kl_coef(float(fetch(state.kl_coef)), checkpoints.flags, config)
        state = state.replace(kl_coef=put(np.float32(kl_coef), whole))

    # ------------------------------------------------------------ device programs
    sample = Sampler(
        policy.cfg, config.sampling, stop_ids=stop_ids, pad_id=pad_id(tokenizer), logprob_space=config.logprob_space,
        num_samples=config.rollouts_per_prompt, decode_rows=config.decode_rows, mesh=mesh,
        rows=config.micro_batch_size,
    )  # fmt: skip
    forward = functools.partial(make_forward(policy.cfg, reference.cfg, value.cfg, config, mesh), bottom=frozen.bottom)
    finish = make_finish(config, mesh)
    policy_rate = jax.jit(policy_lr, out_shardings=whole)
    update_both, update_value = (
        functools.partial(
            make_update(
                policy.cfg, value.cfg, config, policy_optimizer, value_optimizer, mesh, train_policy=train_policy
            ),
            bottom=frozen.bottom,
        )
        for train_policy in (True, False)
    )  # fmt: skip

    sample_ids = np.arange(config.num_responses, dtype=np.int32)

    def expected() -> list[Call]:
        """The calls of device programs that the steps to come will make."""
        some = prompts.batch(0)
        params = join(frozen.bottom, state.policy.params)
        drawing = sample.call(params, some.tokens, some.lengths, jax.random.key(0), sample_ids)
        updates = {"update of the value model": update_value} if checkpoints.start < frozen_steps else {}
        updates |= {"update": update_both} if frozen_steps < total_steps else {}
        passes = abstract_passes(policy.cfg, config, config.num_responses, max_length, mesh)
        learning = calls_ahead(
            forward, finish, {} if config.generate_only else updates, (state, frozen.reference), passes,
            size=config.mini_batch_size, shapes=shapes, update_shapes=update_shapes, mesh=mesh,
            from_sampler={config.old_logprobs == "sampler", False},  # without for the check
        )  # fmt: skip
        return [drawing, *learning, *(call for source in sources for call in source.calls())]

    if checkpoints.start < total_steps:
        compile_programs(expected())

    # ------------------------------------------------------------ one step
    moments, checked, shown = Moments(), False, list[dict[str, Any]]()  # shown: rows for samples.jsonl
    facts = {"policy_updates": policy_updates, "total_updates": value_updates, "warmup_updates": warmup_updates}
    recorder = FlightRecorder(run_dir.path / "rollouts", config.record_rollouts, facts | {"config": to_dict(config)})

    def respond(params: dict, batch: PromptBatch, step: int) -> tuple[SampledBatch, ResponseBatch]:
        """`rollouts_per_prompt` responses to each prompt: as tokens, and as what reward sources read."""
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        samples = sample(join(frozen.bottom, params), batch.tokens, batch.lengths, key, sample_ids)
        sampled = join_samples(batch.tokens, batch.lengths, samples, pad_id=pad_id(tokenizer))
        return sampled, response_batch(batch, sampled, tokenizer)

    def ppo_step(state: PPOState, numbered: tuple[int, PromptBatch]) -> tuple[PPOState, dict[str, Any]]:
        nonlocal checked
        (step, batch), timer = numbered, PhaseTimer()
        with timer.phase("rollout"):
            sampled, responses = respond(state.policy.params, batch, step)

        with timer.phase("score"):
            packing = pack(sampled.lengths, max_length, shapes)
            tokens, mask = put((sampled.tokens, sampled.mask), whole)
            models = (state.policy.params, frozen.reference, state.value.params)
            drawn = (sampled.sampler_logprobs, sampled.sampler_entropies)
            known = put(drawn, whole) if config.old_logprobs == "sampler" else None
            passes = forward(*models, tokens, mask, place_plans(packing, len(tokens), mesh), sampler=known)
            # While the device runs the passes, the host scores.
            scored, moments.value = score_responses(responses, sources, weights, config, moments.value)
            learnt, rewards = put((sampled.mask & scored.keep[:, None], scored.rewards), whole)
            rollout, kl_coef, rollout_metrics = finish(tokens, learnt, passes, rewards, state.kl_coef)

        if not checked and scored.keep.any() and bool(fetch(rollout.finite)):  # of another nothing is learnt
            unpacked = pack(sampled.lengths, max_length, shapes, packed=False)
            again = forward(*models, tokens, mask, place_plans(unpacked, len(tokens), mesh), sampler=None)
            same_start = step == 0 and begin.same_start
            self_check(sampled, rollout, passes, again, same_start=same_start, dtype=dtype, stop_ids=stop_ids)
            checked = True

        policy_waits = step < frozen_steps
        policy_trains = not (policy_waits or config.generate_only)
        learning_rate = policy_rate(state.policy.updates) if policy_trains else 0.0
        recorder.keep(step + 1, rollout, sampled, scored.faults, frozen=policy_waits)
        with timer.phase("update"):
            update = update_value if policy_waits else update_both
            with_hidden = rollout.replace(hidden=passes.hidden)  # large, and gone with this step
            state, update_metrics = run_updates(
                update, state, with_hidden, sampled.lengths, size=config.mini_batch_size,
                epochs=0 if config.generate_only else config.ppo_epochs, key=(config.seed, step),
                shapes=update_shapes, mesh=mesh,
            )  # fmt: skip

        shown.extend(sample_rows("train", responses, scored, config.logged_samples))
        metrics = {**scored.metrics, **rollout_metrics, **update_metrics, **timer.metrics()}
        metrics["tokens/ended_share"] = float(sampled.ended.mean())
        metrics["tokens/padding_share"] = packing.padding_share()
        metrics["ppo/learning_rate"] = learning_rate
        metrics["tokens"] = int(sampled.lengths.sum())
        if policy_trains:  # else no coefficient can change the KL
            state = state.replace(kl_coef=kl_coef)
        return state, metrics

    def evaluate(state: PPOState, step: int) -> dict[str, float]:
        """How the policy does on the held-out prompts, always with the same randomness; {} where that is not due."""
        due = step in (0, total_steps) or (config.eval_freq and step % config.eval_freq == 0)
        if held_out is None or not due:
            return {}
        params = state.policy.params

        def score(batch: PromptBatch, step: int) -> tuple[SampledBatch, ResponseBatch, Scored]:
            sampled, responses = respond(params, batch, step)
            return sampled, responses, score_responses(responses, sources, weights, config, moments.value)[0]

        metrics, responses, scored = score_held_out(held_out, config.train_dataset.batch_size, score)
        shown.extend(sample_rows("eval", responses, scored, 4 * config.logged_samples))
        return metrics

    # ------------------------------------------------------------ the exports
    generation = generation_settings(config.sampling, stop_ids, tokenizer)

    def export(folder: Path, state: PPOState, metrics: dict[str, float]) -> None:
        check_weights(folder, state.policy.params)
        export_model(
            folder, policy.cfg, join(frozen.bottom, state.policy.params), "lm", dtype=param_dtype,
            tokenizer=tokenizer, generation_config=generation, model_card=card(metrics),
        )  # fmt: skip

    def export_value(folder: Path, state: PPOState, metrics: dict[str, float]) -> None:
        check_weights(folder, state.value.params)
        export_model(
            folder, value.cfg, join(frozen.bottom, state.value.params), "value", dtype=param_dtype,
            tokenizer=tokenizer, model_card=value_card(card(metrics), begin.value_ref),
        )  # fmt: skip

    def card(metrics: dict[str, float]) -> ModelCard:
        warmup_ratio = min(warmup_updates / value_updates, 1.0)
        return ppo_card(config, metrics, template, named_sources(config), warmup_ratio)

    # ------------------------------------------------------------ the loop
    def batches() -> Iterator[tuple[int, PromptBatch]]:
        for step in range(checkpoints.start, total_steps):
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            yield step, prompts.batch(epoch * prompts.steps_per_epoch + step_of_epoch)

    troubles = Troubles()
    why = f"no response ended within --max_continuation_len={config.max_continuation_len}, and --missing_eos=mask"
    masked_out = nothing_learnt_hook(lambda metrics: "env/reward_mean" in metrics, why)
    held = {LOWEST: len(begin.shared)} if begin.shared else {}
    training = Training[PPOState](
        name="PPO", batches=batches(), step=ppo_step, evaluate=evaluate,
        exports=[Export("policy", run_dir.hf, export), Export("value model", value_dir, export_value)],
        models=[
            SavedModel("lm", policy.cfg, "policy/params", tokenizer, generation, held, param_dtype),
            SavedModel("value", value.cfg, "value/params", tokenizer, fields=held, dtype=param_dtype),
        ],
        bar={
            "reward": "env/reward_mean", "KL": "objective/kl", "length": "tokens/responses_len_mean",
            "tok/s": "tokens_per_second",
        },
        best_by="eval/reward_mean", guard=recorder.guard(config.max_bad_steps), memories={"moments": moments},
        hooks=[troubles.tolerate(recorder.hook(), "rollouts"), masked_out], samples=shown,
    )  # fmt: skip
    run_training(config, run_dir, checkpoints, troubles, state, training, total_steps)


if __name__ == "__main__":
    run(main, Config)
