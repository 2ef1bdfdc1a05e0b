"""An optimizer step of supervised fine-tuning.

python -m easyrl.bench sft --workload=w3
python -m easyrl.bench sft --workload=fixed --model=1b --dtype=bf16 --seq_length=2048 --batch_size=8
"""

import dataclasses

from easyrl.bench.models import place_model
from easyrl.bench.offline import HostBatch, HostBatches, OfflineBenchConfig, time_steps
from easyrl.bench.report import benchmark
from easyrl.core.sharding import make_mesh
from easyrl.models.families import param_specs
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.sft import SFTBatch, make_sft_step, place_sft_batch
from easyrl.steps.state import create_train_state


@dataclasses.dataclass(frozen=True)
class Config(OfflineBenchConfig):
    """Time optimizer steps of supervised fine-tuning, on the chosen answers of the workload."""


def main(config: Config) -> None:
    mesh, cfg = make_mesh(config.mesh_dim), config.cfg
    batches = HostBatches(config, cfg, mesh, per_sample=1)
    params = place_model(cfg, "lm", mesh, config.param_dtype)
    optimizer = make_optimizer(OptimizerConfig(clip_gradient=0.0), make_schedule("constant", config.lr, 1))

    def place(batch: HostBatch) -> SFTBatch:
        return place_sft_batch(batch.tokens, batch.mask, batch.packing, mesh)

    with benchmark(config, "sft") as bench:
        state = create_train_state(params, param_specs(cfg, "lm"), optimizer, mesh)
        del params
        time_steps(bench, config, cfg, batches, state, make_sft_step(cfg, optimizer, mesh), place)
