"""An optimizer step of DPO on a batch of pairs, the reference's log-probs computed beforehand.

python -m easyrl.bench dpo --workload=w2
python -m easyrl.bench dpo --workload=w3 --repeats=32
"""

import dataclasses

import numpy as np

from easyrl.bench.models import place_model
from easyrl.bench.offline import HostBatch, HostBatches, OfflineBenchConfig, time_steps
from easyrl.bench.report import benchmark
from easyrl.core.sharding import make_mesh
from easyrl.models.families import param_specs
from easyrl.steps.dpo import AnswerBatch, DPOConfig, make_dpo_step, place_answers
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.state import create_train_state


@dataclasses.dataclass(frozen=True)
class Config(OfflineBenchConfig):
    """Time optimizer steps of DPO."""


def main(config: Config) -> None:
    mesh, cfg = make_mesh(config.mesh_dim), config.cfg
    batches = HostBatches(config, cfg, mesh, per_sample=2)
    params = place_model(cfg, "lm", mesh, config.param_dtype)
    optimizer = make_optimizer(OptimizerConfig(clip_gradient=0.0), make_schedule("constant", config.lr, 1))

    def place(batch: HostBatch) -> AnswerBatch:
        # Any numbers do for the reference: they cost nothing here, having been computed once for all epochs.
        reference = np.zeros(len(batch.tokens), np.float32)
        return place_answers(batch.tokens, batch.mask, reference, batch.packing, mesh, paired=True)

    with benchmark(config, "dpo") as bench:
        state = create_train_state(params, param_specs(cfg, "lm"), optimizer, mesh)
        del params
        time_steps(bench, config, cfg, batches, state, make_dpo_step(cfg, optimizer, mesh, DPOConfig()), place)
