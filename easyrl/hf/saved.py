"""Models inside a run's checkpoints: how they are built, written once beside the steps, and their weights by step.

checkpoints/models/lm/      config.json, tokenizer and generation_config.json of the policy, as in an export
checkpoints/models/value/   the same of the value model, in PPO
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from easyrl.core.checkpoints import MODELS, find_checkpoint, is_remote, read_arrays
from easyrl.core.errors import UserError
from easyrl.core.files import cache_folder, write_atomic
from easyrl.core.params import abstract, map_specs
from easyrl.hf.export import write_config
from easyrl.hf.fields import read_json
from easyrl.hf.layout import named_leaves
from easyrl.hf.load import start_leaf
from easyrl.models.families import ModelConfig, param_specs

PLACE = "easyrl_place"  # field of config.json: where in the state the parameters are
LOWEST = "easyrl_lowest_layer"  # field of config.json: the first layer there is, where those beneath are frozen
# head asked for -> heads that have what it takes, the best first
TAKEN_FROM = {"lm": ("lm",), "reward": ("reward", "lm"), "value": ("value", "reward", "lm")}


class SavedModel(NamedTuple):
    """A model that a run's checkpoints hold: its parameters are at `place` in the state, as in `policy/params`.

    `tokenizer`, `generation` and `fields` of config.json are those that it is exported with; `dtype` is that of the
    parameters.
    """

    head: str
    cfg: ModelConfig
    place: str
    tokenizer: Any
    generation: Mapping[str, Any] = {}
    fields: Mapping[str, Any] = {}
    dtype: Any = np.float32


# Fields of a reward model's config.json, for whoever wants rewards of mean 0 and spread 1, and where they are from.
STATISTICS = {"reward_mean": "eval/mean_reward", "reward_std": "eval/reward_std"}


def statistics(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the config.json of a reward model with these metrics says of its scores: nothing without an evaluation."""
    return {field: metrics[name] for field, name in STATISTICS.items() if metrics.get(name) is not None}


class SavedWeights(NamedTuple):
    """The weights of a model at a step of a run."""

    folder: epath.Path
    step: int
    head: str
    place: str


def write_models(folder: epath.Path, models: Sequence[SavedModel]) -> None:
    """Writes what there is to know of models besides their weights into a run's checkpoints folder."""
    for model in models:
        target = folder / MODELS / model.head
        with TemporaryDirectory() as beside:
            fields = {**model.fields, PLACE: model.place}
            dtype = np.dtype(model.dtype)
            write_config(Path(beside), model.cfg, model.head, dtype, model.tokenizer, model.generation, fields)
            _copy(epath.Path(beside), target)


def find_saved(target: str, head: str, flag: str) -> tuple[Path, SavedWeights]:
    """The model that `easyrl::TARGET` names: the local folder of its config.json and tokenizer, and its weights.

    A run may hold several models; the one that best serves as a start for `head` is taken, or the only one there is.
    Raises UserError naming `flag`.
    """
    folder, step = find_checkpoint(target, flag)
    models = folder / MODELS
    heads = {path.name for path in models.iterdir()} if models.exists() else set()
    chosen = next((one for one in TAKEN_FROM[head] if one in heads), next(iter(heads)) if len(heads) == 1 else None)
    if chosen is None:
        found = " and ".join(sorted(heads)) or "none"
        raise UserError(f"{flag}=easyrl::{target}: expected a {head} model, found {found} in {models}")
    directory = _local(models / chosen)
    fields = read_json(directory / "config.json")
    if LOWEST in fields:
        raise UserError(
            f"{flag}=easyrl::{target}: holds the layers from {fields[LOWEST]} on, which --num_layers_unfrozen trained; "
            "expected a whole model, as in the folder hf of that run"
        )
    place = fields.get(PLACE)
    if not isinstance(place, str):
        raise UserError(f"{models / chosen}/config.json: has no {PLACE}, expected where in the state the weights are")
    return directory, SavedWeights(folder, step, chosen, place)


def load_saved(
    saved: SavedWeights, cfg: ModelConfig, mesh: Mesh, *, head: str, dtype, seed: int, new_head: str | None
) -> dict:
    """The parameters of `param_specs(cfg, head)` from a checkpoint; see `hf.load.load_params`."""
    specs = param_specs(cfg, head)
    stored = named_leaves(param_specs(cfg, saved.head))
    wanted = named_leaves(abstract(specs, dtype, mesh))
    there = {name: leaf for name, leaf in wanted.items() if name in stored}
    if head == "lm" and saved.head != "lm":
        raise UserError(f"{saved.folder}: holds a {saved.head} model, expected a language model")
    if head != "lm" and "head/scalar" not in there and new_head is None:
        raise UserError(f"{saved.folder}: holds a model without the head of a {head} model, expected one with it")
    tree = _nested({f"{saved.place}/{name}": leaf for name, leaf in there.items()})
    params = read_arrays(saved.folder, saved.step, tree)
    for key in saved.place.split("/"):
        params = params[key]
    loaded = named_leaves(params)

    def leaf(name, spec) -> jax.Array:
        return loaded[name] if name in loaded else start_leaf(name, spec, new_head, seed, dtype, mesh)

    return map_specs(leaf, specs)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def _local(folder: epath.Path) -> Path:
    """A folder of a store as a local one, where tokenizers can be read from."""
    if not is_remote(folder):
        return Path(folder)
    local = cache_folder() / MODELS / hashlib.sha256(str(folder).encode()).hexdigest()[:32]
    _copy(folder, epath.Path(local))
    return local


def _copy(source: epath.Path, target: epath.Path) -> None:
    """The files of one folder, and of those in it, into another; each whole or absent."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        elif is_remote(target):
            (target / path.name).write_bytes(path.read_bytes())
        else:
            with write_atomic(Path(target) / path.name) as part:
                part.write_bytes(path.read_bytes())
