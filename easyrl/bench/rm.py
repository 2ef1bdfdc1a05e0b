"""An optimizer step of a reward model on a batch of pairs.

python -m easyrl.bench rm --workload=w2
"""

import dataclasses

import numpy as np

from easyrl.bench.models import place_model
from easyrl.bench.offline import HostBatch, HostBatches, OfflineBenchConfig, time_steps
from easyrl.bench.report import benchmark
from easyrl.core.sharding import make_mesh
from easyrl.models.families import param_specs
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.reward import RewardBatch, RewardLossConfig, make_reward_step, place_reward_batch
from easyrl.steps.state import create_train_state


@dataclasses.dataclass(frozen=True)
class Config(OfflineBenchConfig):
    """Time optimizer steps of a reward model."""


def main(config: Config) -> None:
    mesh, cfg = make_mesh(config.mesh_dim), config.cfg
    batches = HostBatches(config, cfg, mesh, per_sample=2)
    params = place_model(cfg, "reward", mesh, config.param_dtype)
    optimizer = make_optimizer(OptimizerConfig(clip_gradient=0.0), make_schedule("constant", config.lr, 1))

    def place(batch: HostBatch) -> RewardBatch:
        margins = np.zeros(len(batch.tokens) // 2, np.float32)
        return place_reward_batch(batch.tokens, batch.lengths, margins, batch.packing, mesh)

    with benchmark(config, "rm") as bench:
        state = create_train_state(params, param_specs(cfg, "reward"), optimizer, mesh)
        del params
        update = make_reward_step(cfg, optimizer, mesh, RewardLossConfig())
        time_steps(bench, config, cfg, batches, state, update, place, lm_head=False)
