"""What PPO holds frozen: the reference, and with --num_layers_unfrozen the bottom that all its models share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.core.errors import UserError
from easyrl.core.fingerprint import fingerprint_params
from easyrl.hf.refs import FoundModel, load_weights
from easyrl.models.branch import trained_layers


class Frozen(NamedTuple):
    """Parameters that never change. Without a shared `bottom` the reference is a whole model, else the top of one."""

    reference: dict
    bottom: dict | None


def check_shared(policy: FoundModel, others: list[FoundModel], num_unfrozen: int) -> None:
    """Raise UserError, before a weight is read, naming the model that cannot stand on the policy's bottom."""
    if trained_layers(policy.cfg.num_layers, num_unfrozen).start == 0:
        return
    for other in others:
        mine, theirs = vars(policy.cfg), vars(other.cfg)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"{other.flag}: has {name}={theirs.get(name)}, the policy {name}={mine.get(name)}; with "
                    f"--num_layers_unfrozen={num_unfrozen} it stands on the policy's lower layers and must be like it"
                )


def load_start(
    found: FoundModel,
    mesh: Mesh,
    *,
    dtype: str,
    param_dtype: str,
    seed: int = 0,
    layers: range | None = None,
) -> dict:
    """A frozen copy, in the format `dtype`, of the language model that training starts from in `param_dtype`.

    Where that one is narrower, the copy is rounded as the model is: else the two would not be the same at the start.
    """
    narrower = jnp.finfo(param_dtype).nmant < jnp.finfo(dtype).nmant
    loaded = param_dtype if narrower else dtype
    params = load_weights(found, mesh, head="lm", dtype=loaded, seed=seed, layers=layers)
    return jax.tree.map(lambda x: x.astype(dtype), params) if narrower else params


def load_frozen(
    policy: FoundModel,
    reference: FoundModel,
    value: FoundModel,
    num_unfrozen: int,
    mesh: Mesh,
    *,
    dtype: str,
    param_dtype: str,
    seed: int = 0,
) -> Frozen:
    """The frozen weights, in the format `dtype`; a reference that is the policy's start, as `load_start` has it.

    A reference or value model of other files than the policy's is taken to share its bottom only if that is so, to the
    last bit in `dtype`. Raises UserError naming its flag otherwise. (While that is looked into, there are two bottoms.)
    """
    trained = trained_layers(policy.cfg.num_layers, num_unfrozen)
    bottom = None
    if trained.start:
        below = range(trained.start)
        bottom = load_weights(policy, mesh, head="lm", dtype=dtype, seed=seed, layers=below)
        for other, head in ((reference, "lm"), (value, "value")):
            if dataclasses.replace(other, flag=policy.flag) == policy:
                continue
            theirs = load_weights(
                other, mesh, head=head, dtype=dtype, seed=seed, layers=below, new_head="zeros" if head != "lm" else None
            )
            if fingerprint_params(theirs) != fingerprint_params(bottom):
                raise UserError(
                    f"{other.flag}: its embeddings or lower layers are not the policy's, on which "
                    f"--num_layers_unfrozen={num_unfrozen} puts it; expected the policy's start or a model trained "
                    "with these layers frozen"
                )
    layers = trained_layers(reference.cfg.num_layers, num_unfrozen)
    if dataclasses.replace(reference, flag=policy.flag) == policy:
        start = load_start(reference, mesh, dtype=dtype, param_dtype=param_dtype, seed=seed, layers=layers)
        return Frozen(start, bottom)
    return Frozen(load_weights(reference, mesh, head="lm", dtype=dtype, seed=seed, layers=layers), bottom)
