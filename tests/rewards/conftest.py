import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from easyrl.data.messages import Message
from easyrl.rewards.sources import ResponseBatch

SPECIAL = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizer():
    """One id a character, and the special tokens of the chat templates."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )


@pytest.fixture(scope="session")
def merging_tokenizer():
    """Characters, but two line breaks are one token."""
    characters = ["</s>", *map(chr, range(32, 127)), "\n", "\n\n"]
    vocabulary = {token: number for number, token in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def make_batch(*responses, ended=None, **columns):
    prompts = [f"ask {row}" for row in range(len(responses))]
    return ResponseBatch(
        sequences=[np.arange(row + 2, dtype=np.int32) for row in range(len(responses))],
        prompts=prompts,
        responses=list(responses),
        messages=[(Message("user", prompt),) for prompt in prompts],
        ended=np.ones(len(responses), bool) if ended is None else np.asarray(ended),
        columns=columns,
    )


@pytest.fixture
def batch_of():
    return make_batch
