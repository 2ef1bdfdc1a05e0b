"""From sharded arrays to a folder that transformers loads without arguments.

Tensors come to the host one at a time, are written in shards, and the finished folder takes its name in one rename: a
run that is killed while it exports leaves no half-written model behind.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from easyrl.core.distributed import from_first, is_first, meet
from easyrl.core.errors import UserError
from easyrl.core.files import sync
from easyrl.core.sharding import fetch
from easyrl.hf.families import class_name, family_of, tensors
from easyrl.hf.fields import read_json
from easyrl.hf.layout import HFTensor, named_leaves
from easyrl.hf.model_card import ModelCard, render
from easyrl.hf.safetensors_io import TensorInfo, plan_shards, write_checkpoint
from easyrl.models.branch import depth, stacks
from easyrl.models.families import ModelConfig, param_specs

# A field of config.json by which an export is known as ours, so that a later one may replace it.
MARK = "trained_with"


def export_model(
    directory: str | Path,
    cfg: ModelConfig,
    params: dict,
    head: str = "lm",
    *,
    tokenizer=None,
    generation_config: Mapping[str, Any] | None = None,
    config_fields: Mapping[str, Any] | None = None,
    dtype=None,
    model_card: ModelCard | None = None,
    max_shard_bytes: float = 5e9,
) -> Path:
    """Write a model as a transformers folder: weights, config.json, tokenizer with chat template, README.md.

    `head` decides the class: `lm` ForCausalLM, `reward` ForSequenceClassification with one label, `value`
    ForTokenClassification with one label. `params` has the structure of `param_specs(cfg, head)`, with its layers in
    one stack or in several (`models/branch.py`, `join`); `dtype` casts on the way out (default: as they are).
    `tokenizer` is a transformers tokenizer; its special ids go into config.json where `config_fields` do not say
    otherwise. `generation_config` is written as it is, as `generation_settings` makes it for a trained policy; None:
    there is none. `config_fields` are further fields of config.json, which transformers keeps as attributes.

    Every process calls this, process 0 writes; the folder is complete when it returns. Raises UserError, before
    anything is written, when the folder already holds something that is not an earlier export.
    """
    directory = Path(directory).resolve()  # a link stays, and what it names is replaced
    check_replaceable(directory)
    plan = _plan(cfg, params, head, dtype)
    shards = plan_shards([info for info, *_ in plan], max_shard_bytes)
    written = (_fetch(leaf, tensor, layer).astype(info.dtype, copy=False) for info, leaf, tensor, layer in plan)
    failure = None
    if is_first():
        beside = directory.with_name(f".{directory.name}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            write_checkpoint(beside, shards, written)
            write_config(beside, cfg, head, plan[0][0].dtype, tokenizer, generation_config or {}, config_fields or {})
            _write_card(beside, cfg, head, tokenizer, model_card)
            _replace(directory, beside)
        except Exception as error:
            failure = error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    for _ in written:  # gathering a tensor takes every process, also when the disk of the first is full
        pass
    meet(f"export {directory}")
    if failure is not None:
        raise failure
    return directory


def _plan(cfg: ModelConfig, params: dict, head: str, dtype) -> list[tuple[TensorInfo, jax.Array, HFTensor, int | None]]:
    """Every tensor to write, in order: what precedes the layers, layer after layer, what follows."""
    table, specs = tensors(cfg, head), named_leaves(param_specs(cfg, head))
    # For every layer the parameters with the stack that it is in, and its place there.
    parts = [(named_leaves(params | {"layers": stack}), depth(stack)) for stack in stacks(params)]
    places = [(leaves, i) for leaves, size in parts for i in range(size)]
    for leaves, size in parts:
        rest = len(places) - size  # layers in other stacks
        found = {
            name: (leaf.shape[0] + rest, *leaf.shape[1:]) if name.startswith("layers/") else leaf.shape
            for name, leaf in leaves.items()
        }
        if found != {name: spec.shape for name, spec in specs.items()}:
            raise ValueError(f"the parameters do not have the structure of a {cfg.hf_type} with the head {head}")

    def entry(name: str, layer: int | None):
        leaves, place = places[layer or 0]
        tensor, leaf = table[name], leaves[name]
        shape = specs[name].shape if layer is None else specs[name].shape[1:]
        info = TensorInfo(tensor.name.format(i=layer), tensor.their_shape(shape), np.dtype(dtype or leaf.dtype))
        return info, leaf, tensor, None if layer is None else place

    names = [name for name in table if name in specs]
    layered = [name for name in names if table[name].layered]
    first = names.index(layered[0])
    before = [entry(name, None) for name in names[:first]]
    layers = [entry(name, i) for i in range(cfg.num_layers) for name in layered]
    after = [entry(name, None) for name in names[first:] if not table[name].layered]
    return before + layers + after


def _fetch(leaf: jax.Array, tensor: HFTensor, layer: int | None) -> np.ndarray:
    """One tensor on the host, in their layout."""
    if layer is not None:
        leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return tensor.to_theirs(np.asarray(fetch(leaf)))


def write_config(
    directory: Path,
    cfg: ModelConfig,
    head: str,
    dtype: np.dtype,
    tokenizer,
    generation: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> None:
    """config.json, generation_config.json and the tokenizer: all of an exported folder but weights and card."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    special |= {key: generation[key] for key in special if generation.get(key) not in (None, [])}
    special = {key: value for key, value in special.items() if value is not None}
    config = {
        "architectures": [class_name(cfg, head)],
        **family_of(cfg).config_to_hf(cfg),
        **special,
        "torch_dtype": dtype.name,
        MARK: "easyrl",
        **fields,
    }
    if head != "lm":
        config |= {"id2label": {"0": head}, "label2id": {head: 0}}
    if head == "value":
        config["classifier_dropout"] = 0.0  # transformers' default drops a tenth of the features while training
    _write_json(directory / "config.json", config)
    if head == "lm" and generation:
        _write_json(directory / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        _spell_for_4(directory / "tokenizer_config.json")


def _spell_for_4(path: Path) -> None:
    """Writes a tokenizer_config.json of transformers 5 in the names of transformers 4, which 5 knows too."""
    settings = read_json(path)
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write_json(path, settings)


def _write_card(directory: Path, cfg: ModelConfig, head: str, tokenizer, card: ModelCard | None) -> None:
    """README.md."""
    chat = getattr(tokenizer, "chat_template", None) is not None
    text = render(card or ModelCard(title=f"A {cfg.hf_type} model"), head, chat=chat)
    (directory / "README.md").write_text(text, encoding="utf-8")


def generation_settings(sampling, stop_ids: tuple[int, ...], tokenizer) -> dict[str, Any]:
    """generation_config.json of a trained policy: how it was sampled, a `SamplingConfig`, and what ends a response.

    With None nothing is restricted, which is said: transformers would keep only the 50 likeliest tokens. Temperature 0
    is greedy decoding.
    """
    settings = vars(sampling) if sampling else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    greedy = settings["temperature"] == 0
    bos_id, pad_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    return {
        "do_sample": not greedy,
        **{key: value for key, value in settings.items() if not (greedy and key in ("temperature", "top_k", "top_p"))},
        "eos_token_id": list(stop_ids),
        **({} if bos_id is None else {"bos_token_id": bos_id}),
        "pad_token_id": stop_ids[0] if pad_id is None else pad_id,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_replaceable(directory: Path) -> None:
    """Raise UserError when `directory` holds anything but an earlier export: better before training than after it."""
    from_first(lambda: _check_replaceable(directory))


def _check_replaceable(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir: {directory}: is a file, expected a new folder to export to")
    if not directory.exists() or not any(directory.iterdir()):
        return
    config = directory / "config.json"
    if not config.exists() or MARK not in read_json(config):
        found = "holds files that are not an earlier export"
        raise UserError(f"--output_dir: {directory}: {found}, expected a new or empty folder")


def _replace(directory: Path, finished: Path) -> None:
    """Give `finished` the name `directory`; an earlier export steps aside first and is then removed."""
    for path in finished.rglob("*"):
        sync(path)
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    finished.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
