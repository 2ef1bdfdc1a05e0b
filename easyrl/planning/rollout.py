"""The phases that trainers with responses of their own have in common: sampling, and what reward models say of it."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.groups import GROUPS
from easyrl.core.params import abstract
from easyrl.core.sharding import DECODE_RULES, check_batch, num_data_shards, stand_in
from easyrl.data.packing import Shape
from easyrl.data.tokenizer import Tokenizer, load_tokenizer, parse_ids
from easyrl.hf.refs import find_config, find_model, parse_ref
from easyrl.models.config import ModelConfig
from easyrl.models.families import param_specs
from easyrl.planning.memory import device_bytes, item_size
from easyrl.planning.necessary import ForwardFlops
from easyrl.planning.phases import Phase, groups, packed_loops
from easyrl.rewards.models import FLAG, TOKENS_FOR_ONE, Reading, find_reading, scored_length
from easyrl.runtime.run_config import compute_settings, find_shapes
from easyrl.sampling.decode import make_sampling
from easyrl.sampling.loops import Loop, decode_loops
from easyrl.sampling.refill import REFILLS, num_refilled
from easyrl.steps.packed import abstract_plans
from easyrl.steps.reward import make_scorer
from easyrl.steps.sampling import prompt_shapes


def sampling_phase(
    config: Any, each: int, logprob_space: str, mesh: Mesh, cfg: ModelConfig, params: dict, fill: float
) -> Phase:
    """One call of the sampler, `each` responses to a prompt.

    Decoded all at once, they take as many steps as the longest, which is as long as it may be, and no row is left out
    before; where some wait, as many as `fill` leaves to each.
    """
    N, P, C = config.train_dataset.batch_size, config.train_dataset.seq_length, config.max_continuation_len
    B, shards = each * N, num_data_shards(mesh)
    check_batch(N, mesh, config.mesh_dim)
    check_batch(config.decode_rows, mesh, config.mesh_dim, "--decode_rows")
    sample = make_sampling(
        cfg, config.sampling, stop_ids=parse_ids(config.stop_ids, cfg.vocab_size, "--stop_ids") or (0,),
        logprob_space=logprob_space, num_samples=each, decode_rows=config.decode_rows, mesh=mesh,
    )  # fmt: skip
    host = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # Of the shapes that groups of prompts may have, the one for the bulk.
    rows, length = prompt_shapes(N // shards, P, config.micro_batch_size // shards)[0]
    shape = Shape(shards * rows, length)
    loops = decode_loops(B, shards, P, C, may_end=True, at_once=config.decode_rows)
    flops = ForwardFlops(cfg)
    some = loops[0].rows
    slots = B * (P + C) if some == B else N * P + some * (P + C)
    cache = 2 * cfg.num_layers * slots * cfg.num_kv_heads * cfg.head_size * item_size(cfg.dtype)
    return Phase(
        "sampling",
        sample,
        (params, host(N, P), host(N), abstract_plans([shape], N, mesh), key, host(B)),
        runs=1,
        loops={GROUPS: groups(N, shape.rows, fill)} | _decoding_trips(loops, B, shards, P, C, fill),
        necessary=N * flops.sequence(fill * P) + B * flops.head + B * flops.decoding(fill * P, fill * (C - 1)),
        parts={
            "cache": cache / (shards * math.gcd(mesh.shape["mp"], cfg.num_kv_heads)),
            "decoding weights": device_bytes(abstract(param_specs(cfg, "lm"), cfg.dtype, mesh, DECODE_RULES)),
        },
    )


def _decoding_trips(
    loops: Sequence[Loop], responses: int, shards: int, prompt_size: int, size: int, fill: float
) -> dict[str, float]:
    """How often the loops of decoding run when the longest response is of this `size`, and all are `fill` of it.

    The first token comes from the prefill, so there is a step less than there are tokens. Where responses wait, the
    loop of steps is inside that of refills, and its trips are those for one of them.
    """
    rows, fewer = loops[0].rows, {loop.name: 0.0 for loop in loops if loop.rows < loops[0].rows}
    if rows < responses:
        refills = -(-(responses - rows) // (shards * num_refilled(rows // shards))) + 1
        steps = groups(responses, rows, fill) * (size - 1)
        return {loops[0].name: steps / refills, REFILLS: float(refills)} | fewer
    sizes = [prompt_size, *(min(loop.size, prompt_size + size - 1) for loop in loops if loop.rows == rows)]
    trips = (float(after - before) for before, after in itertools.pairwise(sizes))
    return dict(zip((loop.name for loop in loops), trips, strict=False)) | fewer


@dataclasses.dataclass(frozen=True)
class PlannedRewards:
    """The reward models of a command line: how each reads, its phase, whose first argument is its weights, and what of
    their tokenizers is taken for granted (empty: nothing).
    """

    readings: list[Reading]
    phases: list[Phase]
    condition: str

    def resident(self) -> dict[str, tuple[str, Any]]:
        """The models, as `ScriptPlan.resident` has what lies in memory all the time."""
        weights = (phase.arguments[0] for phase in self.phases)
        return {f"reward model {i}": ("frozen weights", params) for i, params in enumerate(weights, 1)}


def plan_rewards(config: Any, policy: str, responses: int, length: int, mesh: Mesh, fill: float) -> PlannedRewards:
    """What each reward model says of this many responses of the model `policy`, which with their prompts have up to
    `length` tokens of its tokenizer.
    """
    compute = {**compute_settings(config), "remat": "none"}
    refs = [ref.strip() for ref in config.load_checkpoint_reward.split(",") if ref.strip()]
    tokenizer = _tokenizer(policy, "lm", config.tokenizer) if refs else None
    readings, phases, assumed = [], [], []
    for number, ref in enumerate(refs, 1):
        cfg = find_config(ref, head="reward", compute=compute, flag=FLAG)
        sizes = {"max_length": length, "max_positions": cfg.max_positions}
        own = _tokenizer(ref, "reward") if tokenizer else None
        if own:
            reading = find_reading(ref, own, tokenizer, config.reward_template, **sizes)
        else:
            assumed.append(ref)
            most = scored_length(ref, **sizes, written=0 if config.reward_template else None)
            reading = Reading(template=None, shares_tokenizer=True, max_length=most)
        shape = find_shapes(config, mesh, reading.max_length, sequences=responses)[0]
        readings.append(reading)
        phases.append(
            Phase(
                f"reward {number}" if number > 1 else "reward",
                make_scorer(cfg, mesh, None),
                (
                    abstract(param_specs(cfg, "reward"), DTYPES[config.dtype], mesh),
                    stand_in(mesh, jnp.int32, responses, reading.max_length),
                    stand_in(mesh, jnp.int32, responses),
                    abstract_plans([shape], responses, mesh),
                ),
                runs=1,
                loops=packed_loops(responses, shape, fill),
                necessary=responses * ForwardFlops(cfg).sequence(fill * reading.max_length),
            )
        )
    condition = ""
    if assumed:
        condition = (
            f"{' and '.join(assumed)} with the policy's tokenizer (not both are here to compare); with one of its "
            f"own a reward model has room for {TOKENS_FOR_ONE * length:,} tokens and those of its template"
        )
    return PlannedRewards(readings, phases, condition)


def _tokenizer(ref: str, head: str, named: str = "") -> Tokenizer | None:
    """The tokenizer that is `named`, else that of the model `ref`; None where it cannot be had."""
    kind, target = parse_ref(ref)
    if kind == "random" and not named:
        return None
    with contextlib.suppress(UserError):
        # Not `find_model` for what may be a Hub id: it fetches weights.
        return load_tokenizer(named or (target if kind == "hf" else str(find_model(ref, head=head).directory or "")))
    return None
