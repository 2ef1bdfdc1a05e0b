"""Sampling: prefill of the prompts and cached decoding.

python -m easyrl.bench decode
python -m easyrl.bench decode --model=1b --dtype=bf16 --rows=64 --prompt_length=512 --new_tokens=512
"""

import dataclasses

import jax
import numpy as np

from easyrl.bench.config import ModelBenchConfig
from easyrl.bench.measure import Work, run_laps
from easyrl.bench.models import place_model
from easyrl.bench.report import benchmark
from easyrl.bench.workloads import END, w1_prompts, w4_prompts
from easyrl.core.config import flag
from easyrl.core.sharding import check_batch, fetch, make_mesh, num_data_shards
from easyrl.models.llama import LlamaConfig
from easyrl.planning.necessary import ForwardFlops
from easyrl.runtime.metrics import PhaseTimer
from easyrl.sampling.decode import DecodingConfig, SamplingConfig
from easyrl.steps.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Config(ModelBenchConfig, DecodingConfig):
    """Time sampling of responses."""

    rows: int = flag(16, "Prompts, one response each.", least=1)
    prompt_length: int = flag(128, "Tokens of a prompt; of real ones the most.", least=8)
    new_tokens: int = flag(128, "Tokens of a response; of real ones the most.", least=1)
    lengths: str = flag(
        "fixed", "All as long as they may be, or as in w4 of `bench ppo`: log-normal prompts, responses that end with "
        "probability 1 in 60 at every token.", choices=("fixed", "real"),
    )  # fmt: skip


def main(config: Config) -> None:
    mesh, cfg = make_mesh(config.mesh_dim), config.cfg
    check_batch(config.rows, mesh, config.mesh_dim, "--rows")
    check_batch(config.decode_rows, mesh, config.mesh_dim, "--decode_rows")
    check_batch(config.micro_batch_size, mesh, config.mesh_dim, "--micro_batch_size")
    real = config.lengths == "real"
    params = place_model(cfg, "lm", mesh, config.dtype, ends=real)
    draw = w4_prompts if real else w1_prompts
    drawn = draw(1, cfg.vocab_size, config.rows, config.prompt_length)[0]
    lengths = np.array([len(prompt) for prompt in drawn], np.int32)
    prompts = np.stack([np.pad(prompt, (0, config.prompt_length - len(prompt))) for prompt in drawn])
    ids = np.arange(config.rows, dtype=np.int32)

    with benchmark(config, "decode") as bench:
        prefill, sample = (
            Sampler(
                cfg, SamplingConfig(max_new_tokens=length), stop_ids=(END,) if real else (),
                decode_rows=config.decode_rows, mesh=mesh, rows=config.micro_batch_size,
            )
            for length in (1, config.new_tokens)
        )  # fmt: skip

        def step(number: int, timer: PhaseTimer) -> Work:
            samples = sample(params, prompts, lengths, jax.random.key(number), ids)
            drawn_lengths = fetch(samples.lengths_B)
            assert real or (drawn_lengths == config.new_tokens).all()
            rows = config.decode_rows or config.rows
            return _work(cfg, rows, lengths, drawn_lengths, copies=num_data_shards(mesh))

        def first_token(number: int, timer: PhaseTimer) -> Work:
            jax.block_until_ready(prefill(params, prompts, lengths, jax.random.key(number), ids))
            return Work(config.rows, config.rows, 0)

        bench.run(step)
        # What prefill takes is measured by itself: one program does both.
        for lap, first in zip(bench.laps, run_laps(first_token, config.warmup, config.repeats), strict=True):
            lap.phases.update(prefill=first.seconds, decode=lap.seconds - first.seconds)


def _work(cfg: LlamaConfig, rows: int, prompts: np.ndarray, responses: np.ndarray, *, copies: int) -> Work:
    """Every step of so many rows reads the layers' and the head's weights once in each of the copies that the mesh
    keeps (`core.sharding.DECODE_RULES`), and what of the cache is filled.

    The prefill gives first tokens. Of the others there are as many steps as the responses need at least.
    """
    itemsize = np.dtype(cfg.dtype).itemsize
    flops = ForwardFlops(cfg)
    weights = (flops.per_token + flops.head) // 2 * itemsize  # each is multiplied and added once for a token
    token_bytes = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * itemsize
    steps = 1 + max(int(responses.max()) - 1, -(-int((responses - 1).sum()) // rows))
    cached = sum(int(c - 1) * int(p) + int(c) * int(c - 1) // 2 for p, c in zip(prompts, responses, strict=True))
    tokens = float(responses.sum())
    return Work(
        len(responses), tokens,
        flops.sequences(prompts + responses - 1) + tokens * flops.head,
        steps * copies * weights + token_bytes * cached,
    )  # fmt: skip
