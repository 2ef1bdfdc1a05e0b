"""A model from one format into another: transformers folders, checkpoints of runs, checkpoints of EasyLM.

    python -m easyrl.convert --load_checkpoint=REF --output_dir=DIR [--format=hf|easyrl] [--verify]

REF is anything that a trainer starts from. `--format=hf` writes a folder that transformers loads without arguments,
`--format=easyrl` one that `easyrl::DIR` names. Tensors go through one at a time, from the files to the devices (their
only whole copy) and back. docs/convert.md has more.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from easyrl.core.checkpoints import Writer, read_facts
from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.files import check_folder, set_aside
from easyrl.core.sharding import make_mesh
from easyrl.data.tokenizer import TOKENIZER_FILES, Tokenizer, check_vocabulary, load_tokenizer
from easyrl.hf.easylm import KINDS as EASYLM_KINDS
from easyrl.hf.export import check_replaceable, export_model
from easyrl.hf.families import class_name
from easyrl.hf.fields import read_json
from easyrl.hf.model_card import ModelCard
from easyrl.hf.presets import PRESETS
from easyrl.hf.refs import FoundModel, find_model, load_weights, parse_ref, stored_as
from easyrl.hf.saved import SavedModel, statistics, write_models
from easyrl.hf.verify import has_torch, our_outputs, random_tokens, transformers_outputs
from easyrl.models.heads import HEADS

# Fields of config.json that say nothing of the network but belong to the model.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "reward_mean", "reward_std")
PLACE = "params"  # where in a checkpoint's arrays the parameters are


@dataclasses.dataclass(frozen=True)
class Config:
    """Convert a model from one format into another."""

    load_checkpoint: str = flag(
        "", "The model: hf::DIR_OR_HUB_ID, easyrl::DIR, random::PRESET_OR_CONFIG_JSON or params::FILE@CONFIG."
    )
    output_dir: str = flag("", "Folder to write.")
    format: str = flag(
        "hf", "hf: a transformers folder; easyrl: a checkpoint for easyrl::DIR.", choices=("hf", "easyrl")
    )
    head: str = flag(
        "", "lm, reward or value. Empty: as the checkpoint has it. A reward model can become a value model.",
        choices=("", *HEADS),
    )  # fmt: skip
    dtype: str = flag("", "fp32 or bf16. Empty: as the checkpoint has it.", choices=("", *DTYPES))
    tokenizer: str = flag("", "Folder or hub id of a tokenizer to put beside the weights. Empty: the model's, if any.")
    verify: bool = flag(
        False, "Compare outputs with those of transformers, or where there is no torch with those of the written model."
    )
    tolerance: float = flag(
        1e-4, "Largest difference that --verify lets pass, in units of the largest output if that is above 1.", above=0
    )
    mesh_dim: str = flag("1,-1,1", "Devices as dp,fsdp,mp; one -1 takes what is left.")


def main(config: Config) -> None:
    for name in ("load_checkpoint", "output_dir"):
        if not getattr(config, name):
            raise UserError(f"--{name}: found nothing, expected {'a model' if name != 'output_dir' else 'a folder'}")
    # ------------------------------------------------------------ where to, before anything is read
    named, folder = f"--output_dir={config.output_dir}", Path(config.output_dir).resolve()
    config = dataclasses.replace(config, output_dir=str(folder))
    place = folder / "checkpoints" if config.format == "easyrl" else folder
    if any(path in (folder, place) or place in path.parents for path in sources(config.load_checkpoint)):
        raise UserError(f"{named}: is where --load_checkpoint={config.load_checkpoint} lies, expected another folder")
    check_folder(place.parent, named)
    check_replaceable(place)

    # ------------------------------------------------------------ what there is, and what it is to become
    mesh = make_mesh(config.mesh_dim)
    found = find_model(config.load_checkpoint, head=config.head or "lm")
    head, dtype = stored_as(found)
    head, dtype = config.head or head, DTYPES.get(config.dtype, dtype)
    tokenizer = find_tokenizer(config, found)

    # ------------------------------------------------------------ read, write
    params = load_weights(found, mesh, head=head, dtype=dtype)
    tokens = random_tokens(found.cfg, special_ids(found, tokenizer))
    ours = our_outputs(params, found.cfg, head, tokens, found.pad_id) if config.verify else None
    write = write_transformers if config.format == "hf" else write_checkpoint
    try:
        if place.exists() and any(place.iterdir()):
            print(f"an earlier export in {place} is in {set_aside(place)} now", flush=True)
        write(config, found, head, params, tokenizer)
    except OSError as error:
        raise UserError(f"{named}: cannot be written ({error.strerror or error})") from None
    del params
    print(f"{class_name(found.cfg, head)} in {np.dtype(dtype).name}: {folder}", flush=True)

    # ------------------------------------------------------------ compare
    if ours is not None:
        verify(config, mesh, found, head, tokens, ours)


def sources(ref: str) -> list[Path]:
    """The files and folders, by their real paths, that `ref` names and that are there; what it has from a preset, the
    Hub or a store is none. A random model has none either: all that it needs is read before anything is written.
    """
    kind, target = parse_ref(ref)
    if kind in EASYLM_KINDS:
        names = [name for name in target.rsplit("@", 1) if name not in PRESETS]
    else:
        names = {"hf": [target], "easyrl": [target, f"{target}/checkpoints"]}.get(kind, [])
    paths = [Path(name).expanduser() for name in names]
    return [path.resolve() for path in paths if os.path.exists(path)]  # False, too, for JSON, too long for a name


def find_tokenizer(config: Config, found: FoundModel) -> Tokenizer | None:
    """The tokenizer that goes with the model; None when it has none."""
    place = config.tokenizer
    if not place and found.directory and any((found.directory / name).exists() for name in TOKENIZER_FILES):
        place = str(found.directory)
    if not place:
        return None
    tokenizer = load_tokenizer(place)
    check_vocabulary(tokenizer, found.cfg.vocab_size)
    return tokenizer


def special_ids(found: FoundModel, tokenizer: Tokenizer | None) -> set[int]:
    """The ids that decide where a score is read, or would if they got into the wrong field of config.json."""
    ids = (*found.stop_ids, found.pad_id, *(getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad")))
    return {token for token in ids if token is not None and token < found.cfg.vocab_size}


def kept_texts(found: FoundModel, head: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of config.json, generation_config.json) that go over as they are."""
    # A classifier that names no pad token gets none from its tokenizer: scores would be read elsewhere.
    fields: dict[str, Any] = {} if head == "lm" else {"pad_token_id": None}
    if found.directory is None:
        return fields, {}
    raw, generation = read_json(found.directory / "config.json"), found.directory / "generation_config.json"
    fields |= {key: raw[key] for key in KEPT if raw.get(key) is not None}
    if head == "reward" and found.saved is not None:
        fields |= statistics(read_facts(found.saved.folder, found.saved.step).get("metrics", {}))
    return fields, read_json(generation) if generation.exists() else {}


def write_transformers(config: Config, found: FoundModel, head: str, params: dict, tokenizer: Tokenizer | None) -> None:
    fields, generation = kept_texts(found, head)
    source = parse_ref(config.load_checkpoint).target
    card = ModelCard(title=Path(config.output_dir).name, summary=f"Converted from {source}.", base_model=source)
    export_model(
        config.output_dir, found.cfg, params, head,
        tokenizer=tokenizer, generation_config=generation, config_fields=fields, model_card=card,
    )  # fmt: skip


def write_checkpoint(config: Config, found: FoundModel, head: str, params: dict, tokenizer: Tokenizer | None) -> None:
    """A checkpoints folder with one step, 0."""
    fields, generation = kept_texts(found, head)
    folder = epath.Path(config.output_dir) / "checkpoints"
    dtype = jax.tree.leaves(params)[0].dtype
    model = SavedModel(head, found.cfg, PLACE, tokenizer, generation, fields, dtype)
    writer = Writer(folder, lambda facts: [], lambda: write_models(folder, [model]))
    try:
        write_models(folder, [model])
        writer.start(0, {PLACE: params}, {"script": "convert", "source": config.load_checkpoint})
        writer.wait()
    finally:
        writer.close()


def verify(config: Config, mesh: Mesh, found: FoundModel, head: str, tokens: np.ndarray, ours: np.ndarray) -> None:
    """Prints the largest difference between `ours`, of what was read, and what was written.

    A transformers folder is run by transformers. A checkpoint is read back; where the model came from a transformers
    folder and has kept its head and format, that is run by transformers and compared with what was read back. Raises
    RunFailed above --tolerance.
    """
    written = Path(config.output_dir) if config.format == "hf" else None
    against = "transformers"
    if written and has_torch():
        theirs = transformers_outputs(written, head, tokens, written=True)
    else:
        again = find_model(f"{config.format}::{config.output_dir}", head=head)
        params = load_weights(again, mesh, head=head, dtype=stored_as(again)[1])
        theirs = our_outputs(params, again.cfg, head, tokens, again.pad_id)
        against = "what was written, read back"
        kept = (head, stored_as(again)[1]) == stored_as(found) and parse_ref(config.load_checkpoint).kind == "hf"
        if not written and found.directory and kept and has_torch():
            ours = transformers_outputs(found.directory, head, tokens, written=False)
            against = f"transformers on {found.directory}"
    largest, most = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    found_text = f"largest difference {largest:.3g}, of outputs up to {most:.3g}, from {against}"
    if not largest <= config.tolerance * max(1.0, most):
        raise RunFailed(f"--verify: {found_text}: expected at most {config.tolerance:g} (x the largest output above 1)")
    print(f"verified: {found_text}", flush=True)


if __name__ == "__main__":
    run(main, Config)
