"""What the benchmarks of SFT, reward models and DPO share: samples, packed as trainers pack them, and timed steps."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from easyrl.bench.config import TrainingBenchConfig
from easyrl.bench.measure import Work
from easyrl.bench.report import Benchmark
from easyrl.bench.workloads import w1_prompts, w2_pairs, w3_pairs
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.data.alike import tokens_alike
from easyrl.data.bins import Units
from easyrl.data.packing import TRIAL_STEPS, Packing, choose_shapes, pack, rounded_up
from easyrl.models.llama import LlamaConfig
from easyrl.models.long_attention import sees_stems
from easyrl.planning.necessary import ForwardFlops
from easyrl.runtime.metrics import PhaseTimer
from easyrl.runtime.run_config import find_shapes


@dataclasses.dataclass(frozen=True)
class OfflineBenchConfig(TrainingBenchConfig):
    """What an optimizer step works on."""

    workload: str = flag(
        "w2", "w2: fixed lengths, w3: real lengths (docs/benchmarks.md), fixed: of your own.",
        choices=("w2", "w3", "fixed"),
    )  # fmt: skip
    batch_size: int = flag(8, "Samples of a step.", least=1)
    seq_length: int = flag(2048, "Tokens of a sequence, for --workload=fixed.", least=2)
    row_length: int = flag(0, "Tokens of the longest packed rows. 0: as a trainer chooses them.", least=0)
    share_prompts: bool = flag(True, "Compute the prompt of a pair once for both its answers.")
    lr: float = flag(1e-6, "Learning rate.", least=0)


class HostBatch(NamedTuple):
    """The sequences of a step, `per_sample` a sample, padded on the right, and how they are packed."""

    tokens: np.ndarray  # int32 [B, T]
    lengths: np.ndarray  # int32 [B]
    prompt_lengths: np.ndarray  # int32 [B]
    mask: np.ndarray  # bool [B, T], True at t where tokens[b, t + 1] is one of an answer
    alike: np.ndarray  # int [samples], tokens with which the sequences of each begin alike and which are computed once
    packing: Packing


class HostBatches:
    """The workload's batches, in order and over again.

    Args:
      per_sample: sequences of a sample: 2 for pairs, 1 for the chosen answers alone.
    """

    def __init__(self, config: OfflineBenchConfig, cfg: LlamaConfig, mesh: Mesh, per_sample: int):
        self._size, self._per_sample = config.batch_size, per_sample
        self._share = config.share_prompts and sees_stems(cfg.attention, mesh.devices.flat[0])
        self._sequences = _sequences(config, cfg.vocab_size, per_sample)
        self.number = len(self._sequences) // config.batch_size
        if not self.number:
            found = f"--workload={config.workload} has {len(self._sequences)} samples"
            raise UserError(f"--batch_size={config.batch_size}: {found}, expected at most as many")
        self._width = max(len(tokens) for sample in self._sequences for tokens, _ in sample)
        if config.row_length and config.row_length < self._width:
            raise UserError(f"--row_length={config.row_length}: expected at least {self._width}, the longest sequence")
        shapes_for = partial(find_shapes, config, mesh, together=per_sample, sequences=per_sample * config.batch_size)
        if config.row_length:
            self._shapes = shapes_for(config.row_length)
        else:
            arrays = [self._arrays(number) for number in range(min(self.number, TRIAL_STEPS))]
            trials = [Units(lengths, per_sample, alike) for _, lengths, _, _, alike in arrays]
            self._shapes = choose_shapes(shapes_for, rounded_up(self._width), trials)

    def __getitem__(self, number: int) -> HostBatch:
        tokens, lengths, prompt_lengths, mask, alike = self._arrays(number)
        packing = pack(lengths, self._width, self._shapes, together=self._per_sample, alike=alike)
        return HostBatch(tokens, lengths, prompt_lengths, mask, alike, packing)

    def _arrays(self, number: int) -> tuple[np.ndarray, ...]:
        """A `HostBatch` but for its packing."""
        start = number % self.number * self._size
        sequences = [sequence for sample in self._sequences[start : start + self._size] for sequence in sample]
        tokens = np.zeros((len(sequences), self._width), np.int32)
        mask = np.zeros(tokens.shape, bool)
        lengths, prompt_lengths = np.zeros((2, len(sequences)), np.int32)
        for row, (ids, prompt_length) in enumerate(sequences):
            lengths[row], prompt_lengths[row] = len(ids), prompt_length
            tokens[row, : len(ids)] = ids
            mask[row, prompt_length - 1 : len(ids) - 1] = True
        shared = self._share and self._per_sample == 2
        alike = tokens_alike(tokens, mask, lengths) if shared else np.zeros(self._size, int)
        return tokens, lengths, prompt_lengths, mask, alike


def _sequences(config: OfflineBenchConfig, vocab_size: int, per_sample: int) -> list[list[tuple[np.ndarray, int]]]:
    """For every sample its sequences, each with the length of its prompt."""
    if config.workload == "fixed":
        half = config.seq_length // 2
        samples = w1_prompts(4 * config.batch_size, vocab_size, per_sample, config.seq_length)
        return [[(tokens, half) for tokens in sample] for sample in samples]
    pairs = w2_pairs(64, vocab_size) if config.workload == "w2" else w3_pairs(vocab_size)
    sides = lambda pair: (pair.chosen, pair.rejected)[:per_sample]
    return [[(np.concatenate([pair.prompt, side]), len(pair.prompt)) for side in sides(pair)] for pair in pairs]


def time_steps(
    bench: Benchmark,
    config: OfflineBenchConfig,
    cfg: LlamaConfig,
    batches: HostBatches,
    state: Any,
    update: Callable,
    place: Callable,
    *,
    lm_head: bool = True,
) -> None:
    """Times `state, metrics = update(state, place(batch))`, every step waited for.

    `lm_head`: whether the answers' tokens need next-token logits.
    """
    flops = ForwardFlops(cfg)

    def step(number: int, timer: PhaseTimer) -> Work:
        nonlocal state
        batch = batches[number]
        state, metrics = update(state, place(batch))
        jax.block_until_ready((state, metrics))
        needed = flops.sequences(batch.lengths, logits=batch.mask.sum() if lm_head else 0)
        needed -= flops.sequences(batch.alike)
        packing = batch.packing
        return Work(
            config.batch_size, float(batch.lengths.sum()), 3 * needed, packed=packing.tokens, places=packing.places
        )

    bench.run(step)
