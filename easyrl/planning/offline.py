"""The phases of `train_sft`, `train_rm` and `train_dpo`: the step, and what a reference says of the answers.

With `train_dpo --online` also sampling and reward models. A pair is taken for told in every case: all are learnt from.
"""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.core.dtypes import DTYPES
from easyrl.core.params import abstract
from easyrl.core.sharding import stand_in
from easyrl.data.packing import rounded_up
from easyrl.hf.refs import find_config
from easyrl.models.families import param_specs
from easyrl.planning.necessary import ForwardFlops
from easyrl.planning.phases import Phase, ScriptPlan, packed_loops, remat_share, trained
from easyrl.planning.rollout import plan_rewards, sampling_phase
from easyrl.runtime.online import EACH
from easyrl.runtime.run_config import compute_settings, find_shapes
from easyrl.steps.dpo import KTO, AnswerBatch, make_answer_logprobs, make_dpo_step
from easyrl.steps.kto import KTOBatch, make_kto_step
from easyrl.steps.optimizer import make_optimizer, make_schedule
from easyrl.steps.packed import abstract_plans
from easyrl.steps.reward import RewardBatch, make_reward_step
from easyrl.steps.sft import SFTBatch, make_sft_step


def offline_plan(script: str, config: Any, mesh: Mesh, fill: float) -> ScriptPlan:
    """What one step of an offline trainer with this config runs, when sequences are `fill` as long as they may be."""
    online = getattr(config, "online", False)
    compute = compute_settings(config)
    cfg = find_config(config.load_checkpoint, compute=compute)
    unpaired = script == "train_sft" or config.loss in (KTO, "pointwise")
    per_sample = 1 if unpaired else 2
    data = config.train_dataset
    T = config.longest[1]
    length = data.row_length or rounded_up(T)
    samples = data.batch_size
    if data.batch_rows:  # as many samples as fill the rows
        samples = max(int(data.batch_rows * (data.row_length or T) / (fill * T)), 1)
    B = samples * per_sample
    # Of the shapes that groups may have, the one for the bulk.
    shape = find_shapes(config, mesh, length, together=per_sample, sequences=B)[0]
    most = -(-B * T // shape.length)
    plans, loops = abstract_plans([shape], most, mesh), packed_loops(most, shape, fill)

    optimizer = make_optimizer(config.optimizer, make_schedule(config.lr_schedule, config.lr, 1))
    head = "reward" if script == "train_rm" else "lm"
    model = trained(cfg, head, DTYPES[config.param_dtype], optimizer, mesh)
    resident = model.resident("model")
    tokens, mask = stand_in(mesh, jnp.int32, B, T), stand_in(mesh, jnp.bool_, B, T)
    numbers = lambda size: stand_in(mesh, jnp.float32, size)
    flops, size = ForwardFlops(cfg), fill * T
    forward = B * flops.sequence(size, logits=size if head == "lm" else 0)
    phases: list[Phase] = []
    condition = ""
    if online:
        rewards = plan_rewards(config, config.load_checkpoint, B, T, mesh, fill)
        phases = [sampling_phase(config, EACH, "model", mesh, cfg, model.state.params, fill), *rewards.phases]
        resident |= rewards.resident()
        condition = rewards.condition

    batch: Any
    if script == "train_sft":
        program, batch = make_sft_step(cfg, optimizer, mesh), SFTBatch(tokens, mask, plans)
    elif script == "train_rm":
        program = make_reward_step(cfg, optimizer, mesh, config)
        batch = RewardBatch(tokens, stand_in(mesh, jnp.int32, B), numbers(samples), plans)
    else:
        program = (make_kto_step if unpaired else make_dpo_step)(cfg, optimizer, mesh, config)
        batch = AnswerBatch(tokens, mask, numbers(B), plans)
        batch = KTOBatch(batch, batch, stand_in(mesh, jnp.bool_, B)) if unpaired else batch
    passes = 3 * forward
    if script == "train_dpo":
        passes += forward if unpaired else 0  # the mismatched answers, without a gradient
        if config.reads_reference:
            asked = (tokens, mask, plans)
            phases.append(_reference(config, mesh, cfg, model.state.params, compute, asked, loops, B, size))
            if not config.asks_beforehand:
                resident["reference"] = ("frozen weights", phases[-1].arguments[0])
    phases.append(
        Phase(
            "step", program, (model.state, batch), runs=1, loops=loops, necessary=passes,
            recomputed=remat_share(cfg) * forward, parts={"gradients": model.gradients()}, layers=cfg.num_layers,
        )
    )  # fmt: skip
    if not (data.row_length or online):
        condition = (
            f"rows of up to {length:,} tokens; where data leave much padding in these, a trainer takes rows of up to "
            f"{2 * length:,}, unless --train_dataset.row_length={length} is given"
        )
    return ScriptPlan(phases, resident, tokens=B * size, condition=condition)


def _reference(
    config: Any, mesh: Mesh, cfg: Any, params: dict, compute: dict, batch: tuple, loops: dict, sequences: int,
    length: float,
) -> Phase:  # fmt: skip
    """Asking the reference about a batch of sequences that are `length` tokens long on average: in every step, or about
    all data before the optimizer's state is made.
    """
    if config.load_checkpoint_reference:
        found = {**compute, "remat": "none"}
        cfg = find_config(config.load_checkpoint_reference, compute=found, flag="--load_checkpoint_reference")
    if config.load_checkpoint_reference or not config.asks_beforehand:
        params = abstract(param_specs(cfg, "lm"), DTYPES[config.dtype], mesh)
    return Phase(
        "reference",
        make_answer_logprobs(cfg, mesh),
        (params, *batch),
        runs=0 if config.asks_beforehand else 1,
        loops=loops,
        necessary=sequences * ForwardFlops(cfg).sequence(length, logits=length),
        before=config.asks_beforehand,
    )
