"""Which module speaks for which model type, and what a folder's JSON files say.

A family is a module with `config_from_hf, config_to_hf` and these tables (see `hf/llama.py`):

- CLASSES: model_type -> what class names begin with; HEAD_CLASSES: head -> what they end with.
- TENSORS: our parameter -> its tensor, all but those of a scalar head, which SCALAR_HEADS names.
- TRUNK_PREFIX: what the names of a bare trunk lack; IGNORED: a pattern of tensors that follow from the configuration.

Nothing outside this file asks which family a folder or a configuration belongs to.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from easyrl.core.errors import UserError
from easyrl.hf import bloom, gpt2, llama
from easyrl.hf.fields import read_json
from easyrl.hf.layout import HFTensor
from easyrl.models.families import ModelConfig

FAMILIES: dict[str, ModuleType] = {"llama": llama, "gpt2": gpt2, "bloom": bloom}


def family_of(cfg: ModelConfig) -> ModuleType:
    """The module that maps `cfg` to transformers."""
    return FAMILIES[cfg.family]


def class_name(cfg: ModelConfig, head: str) -> str:
    """The transformers class that computes `cfg` with this head."""
    family = family_of(cfg)
    return family.CLASSES[cfg.hf_type] + family.HEAD_CLASSES[head]


def tensors(cfg: ModelConfig, head: str) -> dict[str, HFTensor]:
    """The tensor of every parameter that a model with this head may have, in the order in which they are written."""
    family = family_of(cfg)
    if head == "lm":
        return family.TENSORS
    name = family.SCALAR_HEADS[head]
    scalar = {
        "head/scalar": HFTensor(f"{name}.weight", "1 D -> D"),
        "head/scalar_bias": HFTensor(f"{name}.bias", "1 -> "),
    }
    return family.TENSORS | scalar


def config_from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    """The configuration that a config.json describes; `source` names it in errors."""
    by_type = {model_type: family for family in FAMILIES.values() for model_type in family.CLASSES}
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise UserError(f"{source}: model_type is {model_type!r}, expected one of {', '.join(by_type)}")
    if raw.get("quantization_config") is not None:
        raise UserError(f"{source}: the weights are quantised (quantization_config), expected float weights")
    return by_type[model_type].config_from_hf(raw, source)


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of a transformers folder."""
    path = Path(directory) / "config.json"
    return config_from_hf(read_json(path), str(path))


def read_stop_ids(directory: str | Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` of generation_config.json, else of config.json, else none.

    Raises UserError for an id that a model with `vocab_size` embeddings has not.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise UserError(f"{path}: eos_token_id is {ids}, expected token ids from 0 to {vocab_size - 1}")
        return tuple(ids)
    return ()


def read_pad_id(directory: str | Path) -> int | None:
    """`pad_token_id` of config.json; a negative one, as old Llama folders have, stands for none."""
    path = Path(directory) / "config.json"
    found = read_json(path).get("pad_token_id") if path.exists() else None
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise UserError(f"{path}: pad_token_id is {found!r}, expected a token id")
    return found if found is not None and found >= 0 else None
