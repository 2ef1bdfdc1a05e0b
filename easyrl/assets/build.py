"""Makes everything the quickstart needs, from text the project writes itself (`assets/stories.py`).

    python -m easyrl.assets.build                                  about ten minutes on two cores
    python -m easyrl.assets.build --data_dir=DIR --data_only       just the training data, for train_sft and train_rm

A tokenizer; prompts, and others held out; a policy of about a million parameters, fine-tuned on stories of mixed
quality; a reward model trained on noisy preferences between stories.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from easyrl import assets
from easyrl.assets import stories
from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.files import check_folder
from easyrl.core.params import init_params, num_params
from easyrl.core.sharding import make_mesh
from easyrl.data.dataset import PackedDatasetConfig, load_dataset
from easyrl.data.loader import Loader
from easyrl.data.messages import Message
from easyrl.data.packing import group_shapes
from easyrl.data.templates import BODIES, Template, load_template
from easyrl.hf.export import export_model, generation_settings
from easyrl.hf.model_card import ModelCard
from easyrl.models.families import param_specs
from easyrl.models.llama import LlamaConfig
from easyrl.runtime.loop import run_loop
from easyrl.runtime.progress import progress_hook
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.reward import RewardLossConfig, SequenceScorer, make_reward_step, place_reward_batch
from easyrl.steps.sft import make_sft_step, place_sft_batch
from easyrl.steps.state import create_train_state

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCAB_SIZE = 768  # nearly every word of the stories is one token; every byte is one, so any text can be written
MAX_POSITIONS = 512
SEQ_LENGTH = 72  # a prompt and the first 56 tokens of a story: all of it, unless it is an endless one
ROWS = 8  # packed rows in one pass
LEARNING_RATE = 3e-3
NUM_EVAL_PREFERENCES = 1024

# Every dimension divides by 8, so that the quickstart also runs on meshes of 8 devices.
POLICY = LlamaConfig(
    vocab_size=VOCAB_SIZE, width=128, num_layers=4, num_heads=8, num_kv_heads=8, head_size=16, mlp_size=384,
    max_positions=MAX_POSITIONS, tied_embeddings=True,
)  # fmt: skip
REWARD_MODEL = dataclasses.replace(POLICY, width=64, num_layers=3, head_size=8, mlp_size=192)


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the models, tokenizer and prompts of the quickstart."""

    output_dir: str = flag(str(assets.POLICY.parent), "Folder to write into.")
    data_dir: str = flag("", "Folder to keep the training data in. Empty: it is not kept.")
    data_only: bool = flag(False, "Write that data, and make neither prompts nor models.")
    seed: int = flag(0, "Seed of everything random.")
    num_demonstrations: int = flag(32000, "Stories the policy is fine-tuned on, each seen once.")
    num_preferences: int = flag(32000, "Pairs of stories the reward model is trained on, each seen once.")
    num_prompts: int = flag(512, "Prompts for PPO.")
    num_eval_prompts: int = flag(64, "Prompts for evaluation, about heroes and places that never met in training.")

    def __post_init__(self) -> None:
        if self.data_only and not self.data_dir:
            raise UserError("--data_only: expected --data_dir, the folder to write into")


def main(config: Config) -> None:
    output_dir = Path(config.output_dir)
    for name in ("data_dir",) if config.data_only else ("data_dir", "output_dir"):
        if folder := getattr(config, name):
            check_folder(Path(folder), f"--{name}={folder}")
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = Path(config.data_dir or scratch)
        seed = config.seed
        sft = write_rows(data_dir / "sft.jsonl", stories.demonstrations(config.num_demonstrations, seed))
        pairs = write_rows(data_dir / "preferences.jsonl", stories.preferences(config.num_preferences, seed))
        held_out = stories.preferences(NUM_EVAL_PREFERENCES, seed, evaluation=True)
        eval_pairs = write_rows(data_dir / "preferences_eval.jsonl", held_out)
        if config.data_dir:
            print(f"{pairs}\n{eval_pairs}\n{sft}", flush=True)
        if config.data_only:
            return
        for name, size, evaluation in (
            (assets.TRAIN_PROMPTS.name, config.num_prompts, False),
            (assets.EVAL_PROMPTS.name, config.num_eval_prompts, True),
        ):
            write_rows(output_dir / name, stories.prompts(size, seed, evaluation=evaluation))

        template = load_template("tokenizer", make_tokenizer(sft))
        mesh = make_mesh("1,1,1", jax.devices()[:1])
        policy = fine_tune(sft, template, mesh, seed)
        reward_model = train_reward_model(pairs, template, mesh, seed)
    accuracy = pair_accuracy(reward_model, held_out, template, mesh)
    print(f"the reward model prefers the better one of {accuracy:.1%} of held-out pairs")
    for folder, cfg, params, head, title, summary in (
        (assets.POLICY, POLICY, policy, "lm", "Quickstart policy", "Writes tiny stories, good and bad."),
        (assets.REWARD_MODEL, REWARD_MODEL, reward_model, "reward", "Quickstart reward model",
         "Likes stories that are cheerful, about what was asked for, and properly ended."),
    ):  # fmt: skip
        card = ModelCard(title=title, summary=f"{summary} Made by `python -m easyrl.assets.build`.")
        generation = generation_settings(None, template.stop_ids, template.tokenizer) if head == "lm" else None
        export_model(
            output_dir / folder.name, cfg, params, head,
            tokenizer=template.tokenizer, generation_config=generation, dtype=jnp.bfloat16, model_card=card,
        )  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the stories, with the `tulu` chat template; texts start with <s>, as Llama's do."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((text for row in rows for text in row.values()), trainer)
    bos = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        chat_template="{{ bos_token }}" + BODIES["tulu"], model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def fine_tune(data: Path, template: Template, mesh: Mesh, seed: int) -> dict:
    """The policy's parameters after one pass over the demonstrations."""
    loader = load(data, "sft", template, seed)
    return train(
        POLICY, "lm", loader, mesh, seed,
        make_step=lambda optimizer: make_sft_step(POLICY, optimizer, mesh),
        place=lambda batch: place_sft_batch(batch.tokens, batch.mask, batch.packing, mesh),
    )  # fmt: skip


def train_reward_model(data: Path, template: Template, mesh: Mesh, seed: int) -> dict:
    """The reward model's parameters after one pass over the preferences.

    Its scores are scaled so that stories like the policy's have a standard deviation of 1.
    """
    loader = load(data, "pair", template, seed)
    loss = RewardLossConfig("pairwise", center_coef=0.01)
    params = train(
        REWARD_MODEL, "reward", loader, mesh, seed,
        make_step=lambda optimizer: make_reward_step(REWARD_MODEL, optimizer, mesh, loss),
        place=lambda batch: place_reward_batch(
            batch.tokens, batch.lengths, batch.values, batch.packing, mesh
        ),
    )  # fmt: skip
    imitated = stories.demonstrations(1024, seed, evaluation=True)
    scores = score([(row["prompt"], row["completion"]) for row in imitated], params, template, mesh)
    params["head"]["scalar"] /= scores.std()
    return params


def pair_accuracy(params: dict, pairs: list[dict[str, str]], template: Template, mesh: Mesh) -> float:
    """The share of pairs of which the reward model prefers the better story."""
    chosen, rejected = (
        score([(row["prompt"], row[name]) for row in pairs], params, template, mesh) for name in ("chosen", "rejected")
    )
    return float(np.mean(chosen > rejected))


def load(data: Path, kind: str, template: Template, seed: int) -> Loader:
    """Batches of 32 samples: a small model gains more from many steps than from large ones."""
    dataset = PackedDatasetConfig(
        path=str(data),
        seq_length=SEQ_LENGTH,
        row_length=2 * SEQ_LENGTH,
        batch_size=32,
        cache_dir=str(data.parent / "cache"),
    )
    return Loader(load_dataset(dataset, kind, template), dataset, seed, find_shapes=partial(group_shapes, rows=ROWS))


def train(
    cfg: LlamaConfig, head: str, loader: Loader, mesh: Mesh, seed: int, *, make_step: Callable, place: Callable
) -> dict:
    """Parameters after one epoch from scratch."""
    total = loader.order.steps(0)
    schedule = make_schedule("cosine", LEARNING_RATE, total, warmup_updates=total // 20)
    optimizer = make_optimizer(OptimizerConfig(b2=0.95, weight_decay=0.01), schedule)
    specs = param_specs(cfg, head)
    print(f"training {num_params(specs):,} parameters ({head})")
    state = create_train_state(init_params(specs, jax.random.key(seed), jnp.float32, mesh), specs, optimizer, mesh)
    batches = (place(batch) for batch in loader.batches(stop=total))
    bar = progress_hook(total, {"loss": "loss", "accuracy": "accuracy", "tok/s": "tokens_per_second"})
    return run_loop(state, batches, make_step(optimizer), start=0, total=total, hooks=[bar]).params


def score(answers: list[tuple[str, str]], params: dict, template: Template, mesh: Mesh) -> np.ndarray:
    """The reward model's scores of (instruction, story) pairs."""
    scorer = SequenceScorer(params, REWARD_MODEL, mesh, max_length=SEQ_LENGTH, num_sequences=256, rows=ROWS)
    sequences = []
    for prompt, story in answers:
        (answered,) = template.encode_answered((Message("user", prompt),), (Message("assistant", story),))
        sequences.append(np.concatenate([answered.prompt, answered.completion])[:SEQ_LENGTH])
    return scorer(sequences)


if __name__ == "__main__":
    run(main, Config)
