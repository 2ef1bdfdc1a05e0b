"""README.md of an exported model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from easyrl.core.text import is_hub_id

# head -> (the Hub's task, the class to load it with, what to do with the tokens of `inputs`)
_USES = {
    "lm": (
        "text-generation",
        "AutoModelForCausalLM",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))",
    ),
    "reward": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "score = model(**inputs).logits[0, 0]  # one number for the whole conversation, read at its last token",
    ),
    "value": (
        "token-classification",
        "AutoModelForTokenClassification",
        "values = model(**inputs).logits[0, :, 0]  # the return expected after each token",
    ),
}


@dataclass(frozen=True)
class ModelCard:
    """What there is to say about a trained model.

    `hyperparameters` are listed as given, in the words such cards use: learning_rate, total_train_batch_size,
    optimizer, lr_scheduler_type, lr_scheduler_warmup_ratio, num_epochs, KL penalty coefficient. `template` names the
    chat format and `input_format` is an example of a prompt as the model saw it, newlines and all; `metrics` are those
    reached at the end of training.
    """

    title: str
    summary: str = ""
    method: str = ""
    base_model: str = ""
    reference_model: str = ""  # where it is not the base model
    reward_model: str = ""
    datasets: tuple[str, ...] = ()
    template: str = ""
    input_format: str = ""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def name_of(ref: str) -> str:
    """What people call the model of a reference: its folder's name, or the run's where that is an export of a run."""
    path = Path(ref.partition("::")[2])
    exported = re.fullmatch(r"hf|hf_best|hf-\d+|checkpoints|\d+", path.name)
    return name_of(f"::{path.parent}") if exported and path.parent.name else path.name


def template_of(named: str) -> str:
    """The chat format that --template names, for people."""
    return "the base model's own" if named == "tokenizer" else named


def render(card: ModelCard, head: str, *, chat: bool = False) -> str:
    """The card as Markdown with the Hub's YAML front matter.

    `head` is `lm`, `reward` or `value`; `chat` says whether the tokenizer beside it has a chat template.
    """
    task, auto_class, use = _USES[head]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    front["tags"] = ["easyrl", *([card.method.lower()] if card.method else [])]
    # The Hub takes ids of its own only; folders on the trainer's disk are named in the text.
    if _is_hub_id(card.base_model):
        front["base_model"] = card.base_model
    if datasets := [name for name in card.datasets if _is_hub_id(name)]:
        front["datasets"] = datasets
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {card.title}"]
    if card.summary:
        parts.append(card.summary)
    parts.append(_bullets(
        {
            "Trained with": "easyrl" + (f", {card.method}" if card.method else ""),
            "Base model": card.base_model,
            "Reference model": card.reference_model,
            "Reward model": card.reward_model,
            "Data": ", ".join(card.datasets),
            "Chat template": card.template,
        }
    ))  # fmt: skip
    if card.input_format:
        parts.append(_input_format(card.input_format))
    if card.hyperparameters:
        parts.append("## Training hyperparameters\n\n" + _bullets(card.hyperparameters))
    if card.metrics:
        rows = "\n".join(f"| {name} | {_show(value)} |" for name, value in card.metrics.items())
        parts.append(f"## Metrics at the end of training\n\n| metric | value |\n| --- | ---: |\n{rows}")
    parts.append(
        "## How to load it\n\n```python\n"
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        'folder = "PATH"  # of the folder that this file is in, or its id on the Hub\n'
        f"model = {auto_class}.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"{_tokenize(head, chat)}\n{use}\n```"
    )
    return "\n\n".join(parts) + "\n"


def _input_format(example: str) -> str:
    text = f"## Input format\n\n```\n{example.rstrip(chr(10))}\n```"
    last_line = example.rstrip("\n").rsplit("\n", 1)[-1]
    if example.endswith("\n"):
        text += f"\n\n**Mind the newline after `{last_line}`**: the model was trained with it and does worse without."
    return text


def _tokenize(head: str, chat: bool) -> str:
    """The line of Python that makes `inputs`."""
    if not chat:
        return 'inputs = tokenizer(text, return_tensors="pt")'
    prompt = ", add_generation_prompt=True" if head == "lm" else ""
    return f'inputs = tokenizer.apply_chat_template(messages{prompt}, return_tensors="pt", return_dict=True)'


def _bullets(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {_show(value)}" for name, value in facts.items() if value != "")


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_hub_id(name: str) -> bool:
    return is_hub_id(name) and "/" in name and not Path(name).exists()
