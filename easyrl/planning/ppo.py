"""The phases of `train_ppo`: sampling, reward models, scoring, finishing and updates, as the script makes them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.core.dtypes import DTYPES
from easyrl.core.params import abstract
from easyrl.core.sharding import stand_in
from easyrl.hf.refs import find_config
from easyrl.models.branch import join, trained_layers
from easyrl.models.config import ModelConfig
from easyrl.models.families import param_specs
from easyrl.planning.necessary import ForwardFlops
from easyrl.planning.phases import Phase, ScriptPlan, packed_loops, remat_share, trained
from easyrl.planning.rollout import plan_rewards, sampling_phase
from easyrl.rewards.models import value_start
from easyrl.runtime.run_config import compute_settings, find_shapes
from easyrl.steps.optimizer import make_optimizer
from easyrl.steps.packed import abstract_plans
from easyrl.steps.ppo import PPOState, branch_specs, make_ppo_schedules, make_update
from easyrl.steps.scoring import abstract_passes, abstract_rollout, make_finish, make_forward


def ppo_plan(config: Any, mesh: Mesh, fill: float) -> ScriptPlan:
    """What one step of `train_ppo` with this config runs, when sequences are `fill` as long as they may be."""
    dtype, param_dtype = DTYPES[config.dtype], DTYPES[config.param_dtype]
    compute = compute_settings(config)

    def find(ref: str, name: str) -> ModelConfig:
        head = "value" if name == "value" else "lm"
        return find_config(ref, head=head, compute=compute, flag=f"--load_checkpoint_{name}")

    policy_cfg = find(config.load_checkpoint_policy, "policy")
    ref_cfg = find(config.load_checkpoint_reference or config.load_checkpoint_policy, "reference")
    tops = trained_layers(policy_cfg.num_layers, config.num_layers_unfrozen)
    shared = range(tops.start)  # layers of the frozen bottom, with --num_layers_unfrozen
    B, T = config.num_responses, config.train_dataset.seq_length + config.max_continuation_len
    rewards = plan_rewards(config, config.load_checkpoint_policy, B, T, mesh, fill)
    value_ref = value_start(
        config.load_checkpoint_value, config.load_checkpoint_policy, config.load_checkpoint_reward, rewards.readings,
        shared=bool(shared),
    )  # fmt: skip
    value_cfg = find(value_ref, "value")

    schedules = make_ppo_schedules(config.lr_schedule, config.lr, config.value_lr, policy_updates=1, value_updates=1)
    policy_optimizer, value_optimizer = (make_optimizer(config.optimizer, schedule) for schedule in schedules)
    part = tops if shared else None
    policy = trained(policy_cfg, "lm", param_dtype, policy_optimizer, mesh, part)
    value = trained(value_cfg, "value", param_dtype, value_optimizer, mesh, part)
    ref_params = abstract(branch_specs(ref_cfg, "lm", config), dtype, mesh)
    bottom = abstract(param_specs(policy_cfg, "lm", shared), dtype, mesh) if shared else None
    kl_coef = stand_in(mesh, jnp.float32)
    state = PPOState(policy.state, value.state, kl_coef)

    phases = [
        sampling_phase(
            config, config.rollouts_per_prompt, config.logprob_space, mesh, policy_cfg,
            join(bottom, policy.state.params), fill,
        ),
        *rewards.phases,
    ]  # fmt: skip
    flops = {
        name: ForwardFlops(dataclasses.replace(cfg, num_layers=len(tops)) if shared else cfg)
        for name, cfg in (("policy", policy_cfg), ("ref", ref_cfg), ("value", value_cfg))
    }
    below = ForwardFlops(dataclasses.replace(policy_cfg, num_layers=len(shared))) if shared else None
    length = fill * T
    tokens, mask = stand_in(mesh, jnp.int32, B, T), stand_in(mesh, jnp.bool_, B, T)
    # Of the shapes that groups may have, the one for the bulk.
    shape, update_shape = (find_shapes(config, mesh, T, sequences=size)[0] for size in (B, config.mini_batch_size))
    plan, passes_loops = abstract_plans([shape], B, mesh), packed_loops(B, shape, fill)
    forward = make_forward(policy_cfg, ref_cfg, value_cfg, config, mesh)
    drawn = stand_in(mesh, jnp.float32, B, T)
    sampler = (drawn, drawn) if config.old_logprobs == "sampler" else None
    forward_arguments = (policy.state.params, ref_params, value.state.params, tokens, mask, plan, bottom, sampler)
    all_passes = B * (
        (flops["policy"].sequence(length, logits=length) if sampler is None else 0.0)
        + flops["ref"].sequence(length, logits=length)
        + flops["value"].sequence(length)
        + (below.sequence(length) if below else 0.0)
    )
    phases.append(Phase("passes", forward, forward_arguments, runs=1, loops=passes_loops, necessary=all_passes))

    finish = make_finish(config, mesh)
    passes = abstract_passes(policy_cfg, config, B, T, mesh)
    finish_arguments = (tokens, mask, passes.replace(hidden=None), stand_in(mesh, jnp.float32, B), kl_coef)
    phases.append(Phase("finish", finish, finish_arguments, runs=1, loops={}, necessary=0.0))

    rollout = abstract_rollout(finish, finish_arguments, mesh).replace(hidden=passes.hidden)
    M = config.mini_batch_size
    update_flops = {
        "policy": M * flops["policy"].sequence(length, logits=length),
        "value": M * flops["value"].sequence(length),
    }
    update = Phase(
        "update",
        make_update(policy_cfg, value_cfg, config, policy_optimizer, value_optimizer, mesh),
        (state, rollout, abstract_plans([update_shape], M, mesh), stand_in(mesh, jnp.bool_), bottom),
        runs=config.ppo_epochs * B / M,
        loops=packed_loops(M, update_shape, fill),
        necessary=3 * sum(update_flops.values()),
        recomputed=remat_share(policy_cfg) * sum(update_flops.values()),
        parts={"gradients": max(policy.gradients(), value.gradients())},
        layers=len(tops),
    )
    phases += [] if config.generate_only else [update]
    resident = {
        **policy.resident("policy"),
        **value.resident("value model"),
        "reference": ("frozen weights", ref_params),
        "shared bottom": ("frozen weights", bottom),
        **rewards.resident(),
        "rollout": ("rollout", (rollout, passes.replace(hidden=None), plan)),
    }
    condition = rewards.condition
    if condition and not (shared or config.load_checkpoint_value):
        condition += ", and the value model starts from the policy"
    return ScriptPlan(phases, resident, tokens=B * length, condition=condition)
