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
from easyrl.bench.workloads import w1_prompts
from easyrl.core.config import flag
from easyrl.core.sharding import fetch, make_mesh
from easyrl.models.llama import LlamaConfig
from easyrl.planning.necessary import ForwardFlops
from easyrl.runtime.metrics import PhaseTimer
from easyrl.sampling.decode import SamplingConfig
from easyrl.steps.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Config(ModelBenchConfig):
    """Time sampling of responses of a fixed length."""

    rows: int = flag(16, "Prompts, one response each.", least=1)
    prompt_length: int = flag(128, "Tokens of a prompt.", least=1)
    new_tokens: int = flag(128, "Tokens of a response.", least=1)


def main(config: Config) -> None:
    mesh, cfg = make_mesh(config.mesh_dim), config.cfg
    params = place_model(cfg, "lm", mesh, config.dtype)
    prompts = np.stack(w1_prompts(1, cfg.vocab_size, config.rows, config.prompt_length)[0])
    lengths = np.full(config.rows, config.prompt_length, np.int32)
    ids = np.arange(config.rows, dtype=np.int32)

    with benchmark(config, "decode") as laps:
        prefill, sample = (
            Sampler(cfg, SamplingConfig(max_new_tokens=length), stop_ids=(), mesh=mesh)
            for length in (1, config.new_tokens)
        )
        work = _work(config, cfg)

        def step(number: int, timer: PhaseTimer) -> Work:
            samples = sample(params, prompts, lengths, jax.random.key(number), ids)
            assert int(fetch(samples.steps)) == config.new_tokens
            return work

        def first_token(number: int, timer: PhaseTimer) -> Work:
            jax.block_until_ready(prefill(params, prompts, lengths, jax.random.key(number), ids))
            return work

        laps += run_laps(step, config.warmup, config.repeats, config.profile)
        # What prefill takes is measured by itself: one program does both.
        for lap, first in zip(laps, run_laps(first_token, config.warmup, config.repeats), strict=True):
            lap.phases.update(prefill=first.seconds, decode=lap.seconds - first.seconds)


def _work(config: Config, cfg: LlamaConfig) -> Work:
    """Every step reads the layers' and the head's weights once, and the part of the cache that is filled."""
    rows, P, C = config.rows, config.prompt_length, config.new_tokens
    itemsize = np.dtype(cfg.dtype).itemsize
    flops = ForwardFlops(cfg)
    weights = (flops.per_token + flops.head) // 2 * itemsize  # each is multiplied and added once for a token
    token_bytes = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * itemsize
    cached = rows * sum(P + step for step in range(1, C))
    return Work(rows, rows * C, rows * flops.sequence(P + C - 1, logits=C), C * weights + token_bytes * cached)
