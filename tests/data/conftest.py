"""Tiny tokenizers, made here: bytes and a few merges, with whichever special tokens a test wants."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "user\nassistant\n\nsystem\n\n",
    "  two  spaces\n\n  and lines",
]
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def make_tokenizer(specials=SPECIALS, *, adds_bos=True, eos="</s>", **settings):
    """A byte-level BPE tokenizer that merges across line breaks and spaces, as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if adds_bos:
        bos = (specials[0], tokenizer.token_to_id(specials[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    names = {"bos_token": specials[0]} if adds_bos else {}
    names |= {"eos_token": eos} if eos else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **settings)


@pytest.fixture(scope="session", name="make_tokenizer")
def _make_tokenizer():
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with every special token that a bundled template wants."""
    return make_tokenizer()


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSON lines into the test's folder and returns the path as text."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Tokenised data goes into a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EASYRL_CACHE", str(folder))
    return folder
