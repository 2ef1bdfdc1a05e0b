"""Where a model comes from: `hf::DIR_OR_HUB_ID`, `easyrl::DIR` or `random::PRESET_OR_CONFIG_JSON`.

Checkpoints of EasyLM are read too: `params::FILE@CONFIG`, and likewise `trainstate_params::` and `flax_params::`, as
EasyLM names them. CONFIG is a preset, a config.json (beside which the tokenizer may be) or a folder with one; without
it the folder of FILE has one.
"""

import contextlib
import dataclasses
import glob
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from huggingface_hub import hf_hub_download, snapshot_download
from jax.sharding import Mesh

from easyrl.core.errors import UserError
from easyrl.core.params import init_params
from easyrl.core.text import is_hub_id
from easyrl.data.templates import Template
from easyrl.data.tokenizer import parse_ids
from easyrl.hf import easylm as easylm_files
from easyrl.hf.families import config_from_hf, family_of, read_config, read_pad_id, read_stop_ids
from easyrl.hf.fields import read_json
from easyrl.hf.load import Tensors, load_params
from easyrl.hf.presets import PRESETS
from easyrl.hf.safetensors_io import INDEX, WEIGHTS, Checkpoint, indexed
from easyrl.hf.saved import SavedWeights, find_saved, load_saved
from easyrl.models.branch import cut
from easyrl.models.families import ModelConfig, param_specs

KINDS = ("hf", "easyrl", "random", *easylm_files.KINDS)

# What a model needs of a Hub repository, besides the files that its index names. Pickled weights are never fetched, nor
# are second copies of the weights.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "vocab.*",
    "merges.txt",
)


class Ref(NamedTuple):
    """A parsed reference: its kind and what follows the `::`."""

    kind: str
    target: str


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """All that is known of a model before a weight is read.

    `directory` holds its tokenizer (None: it has none); `stop_ids` are the ids that it is known to end a text with (()
    when nothing says); `flag` is the one that named it; `pad_id` is the pad token of its config.json, if any; `saved`
    says where its weights are if a run's checkpoint has them, `easylm` if a file of EasyLM does.
    """

    cfg: ModelConfig
    directory: Path | None
    stop_ids: tuple[int, ...]
    flag: str
    pad_id: int | None = None
    saved: SavedWeights | None = None
    easylm: easylm_files.EasyLMFile | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(FoundModel):
    """A model ready to use."""

    params: dict


def parse_ref(text: str, flag: str = "--load_checkpoint") -> Ref:
    """Split `KIND::TARGET`. Raises UserError naming `flag`."""
    kind, separator, target = text.partition("::")
    if not separator or kind not in KINDS or not target:
        found = f"{flag}={text}:" if text else f"{flag}: found nothing,"
        raise UserError(
            f"{found} expected hf::DIR_OR_HUB_ID, easyrl::DIR, random::PRESET_OR_CONFIG_JSON or params::FILE@CONFIG"
        )
    return Ref(kind, target)


def find_model(
    ref: str, *, head: str = "lm", compute: Mapping[str, Any] | None = None, flag: str = "--load_checkpoint"
) -> FoundModel:
    """The model that `ref` names, without its weights.

    `head` is the one it will be loaded with: a run of PPO has two models to choose from. `compute` replaces the fields
    of the configuration that say how to compute and not what (dtype, remat, attention). Raises UserError naming `flag`
    and the file at fault.
    """
    kind, target = parse_ref(ref, flag)
    if kind == "random":
        found = FoundModel(config_from_hf(*_raw_config(target, f"{flag}={ref}")[:2]), None, (), flag)
    elif kind in easylm_files.KINDS:
        found = _find_easylm(kind, target, flag)
    else:
        directory, saved = find_saved(target, head, flag) if kind == "easyrl" else (find_folder(target, flag), None)
        with _naming(flag):
            cfg = read_config(directory)
            stop_ids, pad_id = read_stop_ids(directory, cfg.vocab_size), read_pad_id(directory)
            found = FoundModel(cfg, directory, stop_ids, flag, pad_id, saved)
    return dataclasses.replace(found, cfg=dataclasses.replace(found.cfg, **(compute or {})))


def find_config(
    ref: str, *, head: str = "lm", compute: Mapping[str, Any] | None = None, flag: str = "--load_checkpoint"
) -> ModelConfig:
    """The configuration of the model that `ref` names, as in `find_model`; of a Hub id only config.json is fetched."""
    kind, target = parse_ref(ref, flag)
    if kind != "hf" or Path(target).expanduser().is_dir() or not is_hub_id(target):
        return find_model(ref, head=head, compute=compute, flag=flag).cfg
    with _fetching(f"{flag}={ref}"):
        path = hf_hub_download(target, "config.json")
    return dataclasses.replace(read_config(Path(path).parent), **(compute or {}))


def load_weights(
    found: FoundModel,
    mesh: Mesh,
    *,
    head: str,
    dtype="float32",
    seed: int = 0,
    new_head: str | None = None,
    layers: range | None = None,
    trained: bool = False,
) -> dict:
    """The parameters of a model with the head `lm`, `reward` or `value`, in `dtype`, sharded on `mesh`.

    `new_head` (`zeros` or `normal`) says how to start a scalar head that the checkpoint lacks; `layers` asks for one
    part of the model alone (`models/branch.py`); `trained` says that steps will be given the parameters to change
    (`load_params`). Everything random comes from `seed`. Raises UserError naming the model's flag and the file at
    fault, or --mesh_dim for a parameter that it does not divide.
    """
    with _naming(found.flag):
        if found.saved is not None:
            params = load_saved(found.saved, found.cfg, mesh, head=head, dtype=dtype, seed=seed, new_head=new_head)
        elif found.easylm is None and found.directory is None:
            params = init_params(param_specs(found.cfg, head), jax.random.key(seed), dtype, mesh)
        else:
            return load_params(
                open_tensors(found),
                found.cfg,
                head,
                mesh,
                dtype,
                layers=layers,
                new_head=new_head,
                seed=seed,
                trained=trained,
            )
        return params if layers is None else cut(params, layers)


def load_model(
    ref: str,
    mesh: Mesh,
    *,
    head: str,
    dtype="float32",
    seed: int = 0,
    new_head: str | None = None,
    compute: Mapping[str, Any] | None = None,
    flag: str = "--load_checkpoint",
) -> LoadedModel:
    """`find_model` and `load_weights` in one."""
    found = find_model(ref, head=head, compute=compute, flag=flag)
    params = load_weights(found, mesh, head=head, dtype=dtype, seed=seed, new_head=new_head)
    return LoadedModel(**vars(found), params=params)


def check_length(found: FoundModel, named: str, longest: int, flags: str) -> None:
    """Raises UserError where the model of `named`, a flag with its value, reads fewer tokens than `flags` ask for."""
    if found.cfg.max_positions < longest:
        raise UserError(f"{named}: reads up to {found.cfg.max_positions} tokens, {flags} is {longest}")


def stored_as(found: FoundModel) -> tuple[str, str]:
    """(head, dtype) of the model as it is stored: what a conversion keeps. A random model is a float32 language model.

    Of several formats the widest. Raises UserError naming the model's flag and the file at fault.
    """
    if found.saved is not None:
        assert found.directory is not None
        return found.saved.head, read_json(found.directory / "config.json").get("torch_dtype", "float32")
    if found.easylm is None and found.directory is None:
        return "lm", "float32"
    with _naming(found.flag):
        checkpoint = open_tensors(found)
        head = "reward" if {"score.weight", "classifier.weight"} & set(checkpoint) else "lm"
        if found.easylm is None and found.directory is not None:
            named = str(read_json(found.directory / "config.json").get("architectures"))
            head = "value" if head == "reward" and "ForTokenClassification" in named else head
    buffers = family_of(found.cfg).IGNORED  # old folders have some in float32 beside weights in half of that
    stored = {checkpoint.dtype(name) for name in checkpoint if not re.fullmatch(buffers, name)}
    widest = next((dtype for dtype in ("float64", "float32", "bfloat16", "float16") if dtype in stored), "float32")
    return head, "float32" if widest == "float64" or {"bfloat16", "float16"} <= stored else widest


def stop_ids_of(found: FoundModel, template: Template, named: str = "") -> tuple[int, ...]:
    """The ids that end a response: those `named` by --stop_ids, else all that model and template end a text with."""
    ids = parse_ids(named, found.cfg.vocab_size, "--stop_ids")
    return ids or tuple(dict.fromkeys((*found.stop_ids, *template.stop_ids)))


def open_tensors(found: FoundModel) -> Tensors:
    """The stored tensors of a model of transformers or of EasyLM."""
    if found.easylm is not None:
        return easylm_files.EasyLMCheckpoint(found.easylm, found.cfg.head_size)
    assert found.directory is not None
    return Checkpoint(found.directory)


def find_folder(target: str, flag: str = "--load_checkpoint") -> Path:
    """The local folder for a folder's name or a Hub id, fetched when it is not there yet (without pickles)."""
    directory = Path(target).expanduser()
    if directory.is_dir():
        return directory
    if not is_hub_id(target):
        raise UserError(f"{flag}=hf::{target}: no such folder")
    named = f"{flag}=hf::{target}"
    with _fetching(named):
        directory = Path(snapshot_download(target, allow_patterns=list(HUB_FILES)))
    weights = [WEIGHTS]
    if (directory / INDEX).exists():  # shards have whatever names it gives them
        with _naming(flag):
            weights += sorted(name for name in indexed(directory) if name.endswith(".safetensors"))
    with _fetching(named):
        return Path(snapshot_download(target, allow_patterns=[*HUB_FILES, *map(glob.escape, weights)]))


def _raw_config(target: str, source: str) -> tuple[dict[str, Any], str, Path | None]:
    """The fields that `target` stands for: a preset's name, a config.json, a folder with one, or JSON itself.

    With them the name of their place for errors, and the folder of the file if there is one.
    """
    if target in PRESETS:
        return PRESETS[target], source, None
    if target.startswith("{"):
        try:
            return json.loads(target), source, None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}: is not JSON ({error})") from None
    path = Path(target).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{source}: expected a config.json or one of {', '.join(PRESETS)}")
    return read_json(path), str(path), path.parent


def _find_easylm(kind: str, target: str, flag: str) -> FoundModel:
    """The model of a file of EasyLM, `FILE@CONFIG` or `FILE`."""
    file, at, config = target.rpartition("@")
    path = Path(file if at else target).expanduser()
    raw, source, directory = _raw_config(config if at else str(path.parent), f"{flag}={kind}::{target}")
    with _naming(flag):
        cfg = config_from_hf(easylm_files.config_to_hf(raw), source)
        if cfg.hf_type != "llama":
            raise UserError(
                f"{source}: model_type is {cfg.hf_type!r}, expected llama, the only one that is read from EasyLM"
            )
        stored = easylm_files.EasyLMFile(path, kind, neighbours=not raw.get("use_hf_rotary_emb", False))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        stop_ids = read_stop_ids(directory, cfg.vocab_size) if directory else ()
        pad_id = read_pad_id(directory) if directory else None
    return FoundModel(cfg, directory, stop_ids, flag, pad_id, easylm=stored)


@contextlib.contextmanager
def _fetching(named: str) -> Iterator[None]:
    """Makes one line of whatever goes wrong at the Hub, `named` being the flag with what it asks for."""
    try:
        yield
    except Exception as error:  # the Hub's own, those of the client beneath it, or of JSON from something in between
        found = " ".join(str(error).split())[:200]
        raise UserError(
            f"{named}: no such folder, and not to be had from the Hub ({type(error).__name__}: {found})"
        ) from None


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Puts the flag before the file that a UserError names."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
