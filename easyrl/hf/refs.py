"""Where a model comes from: `hf::DIR_OR_HUB_ID`, `easyrl::DIR` or `random::PRESET_OR_CONFIG_JSON`."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import Mesh

from easyrl.core.errors import UserError
from easyrl.core.params import init_params
from easyrl.hf.families import config_from_hf, read_config, read_stop_ids
from easyrl.hf.fields import read_json
from easyrl.hf.load import load_params
from easyrl.hf.presets import PRESETS
from easyrl.models.families import ModelConfig, param_specs

KINDS = ("hf", "easyrl", "random")

# What a model needs of a Hub repository. Pickled weights are never fetched, nor are second copies of the weights.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)


class Ref(NamedTuple):
    """A parsed reference: its kind and what follows the `::`."""

    kind: str
    target: str


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    `directory` holds its tokenizer (None: it has none); `stop_ids` are the ids that it is known to end a text with (()
    when nothing says).
    """

    cfg: ModelConfig
    params: dict
    directory: Path | None
    stop_ids: tuple[int, ...]


def parse_ref(text: str, flag: str = "--load_checkpoint") -> Ref:
    """Split `KIND::TARGET`. Raises UserError naming `flag`."""
    kind, separator, target = text.partition("::")
    if not separator or kind not in KINDS or not target:
        raise UserError(f"{flag}={text}: expected hf::DIR_OR_HUB_ID, easyrl::DIR or random::PRESET_OR_CONFIG_JSON")
    return Ref(kind, target)


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
    """The model that `ref` names, with the head `lm`, `reward` or `value`: parameters in `dtype`, sharded on `mesh`.

    `new_head` (`zeros` or `normal`) says how to start a scalar head that the checkpoint lacks; `compute` replaces the
    fields of the configuration that say how to compute and not what (dtype, remat, attention). Everything random comes
    from `seed`. Raises UserError naming `flag` or the file at fault.
    """
    compute = dict(compute or {})
    kind, target = parse_ref(ref, flag)
    if kind == "random":
        cfg = dataclasses.replace(_random_config(target, flag), **compute)
        params = init_params(param_specs(cfg, head), jax.random.key(seed), dtype, mesh)
        return LoadedModel(cfg, params, None, ())
    if kind == "easyrl":
        raise UserError(f"{flag}={ref}: reading a run's own checkpoints is not possible yet, expected hf:: or random::")
    directory = find_folder(target, flag)
    cfg = dataclasses.replace(read_config(directory), **compute)
    params = load_params(directory, cfg, head, mesh, dtype, new_head=new_head, seed=seed)
    return LoadedModel(cfg, params, directory, read_stop_ids(directory))


def find_folder(target: str, flag: str = "--load_checkpoint") -> Path:
    """The local folder for a folder's name or a Hub id, fetched when it is not there yet (without pickles)."""
    directory = Path(target).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", target):
        raise UserError(f"{flag}=hf::{target}: no such folder")
    try:
        return Path(snapshot_download(target, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{flag}=hf::{target}: no such folder, and not to be had from the Hub ({error})") from None


def _random_config(target: str, flag: str) -> ModelConfig:
    """The configuration of `random::TARGET`: a preset's name, a config.json, a folder with one, or JSON itself."""
    source = f"{flag}=random::{target}"
    if target in PRESETS:
        return config_from_hf(PRESETS[target], source)
    if target.startswith("{"):
        try:
            return config_from_hf(json.loads(target), source)
        except ValueError as error:
            raise UserError(f"{source}: is not JSON ({error})") from None
    path = Path(target).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{source}: expected a config.json or one of {', '.join(PRESETS)}")
    return config_from_hf(read_json(path), str(path))
