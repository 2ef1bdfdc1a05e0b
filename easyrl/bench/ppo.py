"""An iteration of PPO: rollout, scores of four models, one epoch of updates of policy and value model.

    python -m easyrl.bench ppo --workload=w1
    python -m easyrl.bench ppo --workload=w4
    python -m easyrl.bench ppo --workload=fixed --model=1b --dtype=bf16 --prompts=64 --prompt_length=512

The calls of one iteration are those of `easyrl/train_ppo.py`, without text: the reward is the reward model's score.
"""

import dataclasses

import jax
import numpy as np

from easyrl.bench.config import TrainingBenchConfig
from easyrl.bench.measure import Work
from easyrl.bench.models import place_model
from easyrl.bench.report import benchmark
from easyrl.bench.workloads import END, w1_prompts, w4_prompts
from easyrl.core.ahead import compile_ahead
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.sharding import check_batch, make_mesh, put, replicated
from easyrl.data.packing import pack
from easyrl.models.families import param_specs
from easyrl.models.llama import LlamaConfig
from easyrl.planning.necessary import ForwardFlops
from easyrl.runtime.metrics import PhaseTimer
from easyrl.runtime.run_config import find_shapes
from easyrl.sampling.decode import DecodingConfig, SamplingConfig
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.packed import place_plans
from easyrl.steps.ppo import PPOState, make_update
from easyrl.steps.ppo_config import PPOConfig
from easyrl.steps.reward import SequenceScorer
from easyrl.steps.rollout import SampledBatch, calls_ahead, join_samples, run_updates
from easyrl.steps.sampling import Sampler
from easyrl.steps.scoring import abstract_passes, make_finish, make_forward
from easyrl.steps.state import create_train_state

PPO = PPOConfig(temperature=1.0)


@dataclasses.dataclass(frozen=True)
class Config(TrainingBenchConfig, DecodingConfig):
    """Time iterations of PPO with four models of one shape."""

    workload: str = flag(
        "w1", "w1: fixed lengths, w4: real lengths (docs/benchmarks.md), fixed: of your own.",
        choices=("w1", "w4", "fixed"),
    )  # fmt: skip
    prompts: int = flag(16, "Prompts of an iteration, for --workload=fixed.", least=1)
    prompt_length: int = flag(128, "Tokens of a prompt, for --workload=fixed.", least=1)
    new_tokens: int = flag(128, "Tokens of a response, for --workload=fixed.", least=1)
    mini_batch_size: int = flag(8, "Responses in one optimizer step.", least=1)
    old_logprobs: str = flag(
        "trainer", "Who computes the log-probs before the update, as in train_ppo.", choices=("trainer", "sampler")
    )
    lr: float = flag(1e-6, "Learning rate.", least=0)


def main(config: Config) -> None:
    # ------------------------------------------------------------ prompts
    mesh, cfg = make_mesh(config.mesh_dim), config.cfg
    whole = replicated(mesh)
    iterations = config.warmup + config.repeats + 1
    real = config.workload == "w4"
    if real:
        batches, longest = w4_prompts(iterations, cfg.vocab_size), 256
    elif config.workload == "w1":
        batches, longest = w1_prompts(iterations, cfg.vocab_size), 128
    else:
        batches, longest = (
            w1_prompts(iterations, cfg.vocab_size, config.prompts, config.prompt_length), config.prompt_length
        )  # fmt: skip
    from_sampler = config.old_logprobs == "sampler"
    new_tokens = {"w1": 128, "w4": 256}.get(config.workload, config.new_tokens)
    num_samples, width = len(batches[0]), longest + new_tokens
    if num_samples % config.mini_batch_size:
        size = f"--mini_batch_size={config.mini_batch_size}"
        raise UserError(f"{size}: expected a divisor of {num_samples}, the responses of an iteration")
    check_batch(config.decode_rows, mesh, config.mesh_dim, "--decode_rows")
    shapes, update_shapes = (
        find_shapes(config, mesh, width, sequences=sequences) for sequences in (num_samples, config.mini_batch_size)
    )
    ids = np.arange(num_samples, dtype=np.int32)

    # ------------------------------------------------------------ models
    policy, value = (
        place_model(cfg, head, mesh, config.param_dtype, ends=real, head_seed=2) for head in ("lm", "value")
    )
    reference = place_model(cfg, "lm", mesh, config.dtype, ends=real)
    scorer = SequenceScorer(
        place_model(cfg, "reward", mesh, config.dtype), cfg, mesh,
        max_length=width, num_sequences=num_samples, rows=config.micro_batch_size,
    )  # fmt: skip

    with benchmark(config, "ppo") as bench:
        # ------------------------------------------------------------ device programs
        optimizer = make_optimizer(OptimizerConfig(clip_gradient=0.0), make_schedule("constant", config.lr, 1))
        sample = Sampler(
            cfg, SamplingConfig(max_new_tokens=new_tokens), stop_ids=(END,) if real else (),
            decode_rows=config.decode_rows, mesh=mesh, rows=config.micro_batch_size,
        )  # fmt: skip
        forward, finish = make_forward(cfg, cfg, cfg, PPO, mesh), make_finish(PPO, mesh)
        update = make_update(cfg, cfg, PPO, optimizer, optimizer, mesh)
        state = PPOState(
            create_train_state(policy, param_specs(cfg, "lm"), optimizer, mesh),
            create_train_state(value, param_specs(cfg, "value"), optimizer, mesh),
            put(np.float32(PPO.kl_coef), whole),
        )
        del policy, value
        expected = calls_ahead(
            forward, finish, {"update": update}, (state, reference),
            abstract_passes(cfg, PPO, num_samples, width, mesh), size=config.mini_batch_size,
            shapes=shapes, update_shapes=update_shapes, mesh=mesh, from_sampler={from_sampler},
        )  # fmt: skip
        drawing = sample.call(state.policy.params, *_padded(batches[0], longest), jax.random.key(0), ids)
        compile_ahead([drawing, *expected, scorer.call()])

        # ------------------------------------------------------------ one iteration
        def step(number: int, timer: PhaseTimer) -> Work:
            nonlocal state
            prompts, lengths = _padded(batches[number], longest)
            with timer.phase("rollout"):
                samples = sample(state.policy.params, prompts, lengths, jax.random.key(number), ids)
                sampled = join_samples(prompts, lengths, samples, pad_id=0)
            with timer.phase("score"):
                tokens, mask = put((sampled.tokens, sampled.mask), whole)
                plans = place_plans(pack(sampled.lengths, width, shapes), num_samples, mesh)
                drawn = (sampled.sampler_logprobs, sampled.sampler_entropies)
                known = put(drawn, whole) if from_sampler else None
                models = (state.policy.params, reference, state.value.params)
                passes = forward(*models, tokens, mask, plans, sampler=known)
                scores = scorer([row[:length] for row, length in zip(sampled.tokens, sampled.lengths, strict=True)])
                rollout, _, metrics = finish(tokens, mask, passes, put(scores, whole), state.kl_coef)
                jax.block_until_ready(rollout)
            with timer.phase("update"):
                state, metrics = run_updates(
                    update, state, rollout, sampled.lengths, size=config.mini_batch_size, epochs=1, key=(0, number),
                    shapes=update_shapes, mesh=mesh,
                )  # fmt: skip
                jax.block_until_ready((state, metrics))
            return _work(cfg, sampled, from_sampler=from_sampler)

        bench.run(step)


def _padded(prompts: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [B, width], padded on the right, and their lengths."""
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, np.array([len(prompt) for prompt in prompts], np.int32)


def _work(cfg: LlamaConfig, sampled: SampledBatch, *, from_sampler: bool) -> Work:
    """Rollout: one pass over prompts and responses. Scores: four, but for the policy's when its log-probs are
    `from_sampler`. Updates: three times one pass, of two models.

    The head's logits are needed of response tokens alone, by the rollout, two scores, and the policy's update.
    """
    flops = ForwardFlops(cfg)
    trunk, head = flops.sequences(sampled.lengths), flops.head * int(sampled.response_lengths.sum())
    needed = (1 + 4 + 6 - from_sampler) * trunk + (1 + 2 + 3 - from_sampler) * head
    return Work(len(sampled.lengths), float(sampled.lengths.sum()), needed)
