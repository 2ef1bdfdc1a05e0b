"""Loads tokenizers, and says what easyrl needs to know of one."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyrl.core.errors import UserError
from easyrl.core.text import is_file_name, is_hub_id

READ = ("tokenizer.json", "vocab.json", "vocab.txt")  # any of these has the tokens themselves
TOKENIZER_FILES = (*READ, "tokenizer.model", "tokenizer_config.json")

Tokenizer = Any  # a transformers PreTrainedTokenizerBase, which cannot be named without importing transformers


def load_tokenizer(ref: str, flag: str = "--tokenizer") -> Tokenizer:
    """Loads the tokenizer of a local folder or a hub id.

    Where there is a tokenizer.json, ids are what it says. No code of the folder or repository is run. Truncation and
    padding that tokenizer.json may ask for are switched off. Raises UserError, naming `flag`, when there is no
    tokenizer there or it cannot be read.
    """
    # Without this it warns on every start that torch, which nothing here needs, is not installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    path = Path(ref).expanduser()
    if not ref:
        raise UserError(f"{flag}: found nothing, expected a folder with a tokenizer or a hub id")
    if path.is_dir() and not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{flag}={ref}: found no tokenizer in this folder, expected tokenizer.json")
    if (path / "tokenizer.model").is_file() and not any((path / name).is_file() for name in READ):
        # transformers 5 reads Llama 2's, where sentencepiece is installed, and gives other ids than sentencepiece does.
        expected = "expected tokenizer.json, which save_pretrained of transformers 4's AutoTokenizer makes of it"
        raise UserError(f"{flag}={ref}: found tokenizer.model alone, {expected}")
    if path.is_file() or (not path.is_dir() and not (is_hub_id(ref) and "/" in ref)):
        found = "a file" if path.is_file() else "nothing there"
        raise UserError(f"{flag}={ref}: found {found}, expected a folder with a tokenizer or a hub id (owner/name)")
    try:
        # Said, not left out: without it transformers asks on the terminal, and a "y" on stdin runs the folder's code.
        where = str(path) if path.is_dir() else ref
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        if not _reads_as_its_file(tokenizer, where):
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        found = " ".join(str(error).split())[:200]
        raise UserError(f"{flag}={ref}: no tokenizer can be loaded ({type(error).__name__}: {found})") from None
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not is_file_name(name):  # an export writes each template into a file of that name
            raise UserError(f"{flag}={ref}: has a chat template called {name!r}, expected the name of a file")
    if tokenizer.is_fast:
        _find_special_tokens_anywhere(tokenizer)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _find_special_tokens_anywhere(tokenizer: Tokenizer) -> None:
    """Has special tokens looked for in text as it is written, whatever tokenizer.json says.

    Those of some Llamas are marked to be looked for in normalized text, with the space before it that a text starts
    with: "b</s>" is then b, </, s and >.
    """
    from tokenizers import Tokenizer as Backend

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [token for token in state["added_tokens"] if token["special"]]
    if any(token["normalized"] for token in special):
        for token in special:
            token["normalized"] = False
        tokenizer._tokenizer = Backend.from_str(json.dumps(state))


def _reads_as_its_file(tokenizer: Tokenizer, where: str) -> bool:
    """Whether text is cut up as tokenizer.json says, if there is one.

    Some classes of transformers 5 (GPT2Tokenizer, Qwen2Tokenizer, LlamaTokenizer) take no more than the vocabulary from
    it, and cut up text as the model does that they are named for: SmolLM's digits, say, as GPT-2's.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast:
        return True
    file = cached_file(where, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return True
    both = (tokenizer.backend_tokenizer, Backend.from_file(file))
    ours, theirs = (
        ([part.__getstate__() for part in (one.normalizer, one.pre_tokenizer)], _model_settings(one)) for one in both
    )
    return ours == theirs


def _model_settings(backend: Any) -> dict[str, Any]:
    """How a tokenizer's model makes tokens of a word; what is null, false or empty in it counts as absent.

    Unknown tokens are left out, because these vocabularies have every byte, and so is dropout, a matter of training.
    """
    settings = json.loads(backend.model.__getstate__())
    idle = ("vocab", "merges", "unk_token", "fuse_unk", "dropout")
    return {key: value for key, value in settings.items() if value and key not in idle}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text`: special tokens written in it are recognised, none is added."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself starts a text with its beginning-of-text token (Llama's does, GPT-2's does not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def pad_id(tokenizer: Tokenizer) -> int:
    """The id to fill with: the pad token, else the end-of-text token, else the unknown token, else 0.

    Any id will do: padding is known by lengths and segment ids, never by its value, so nothing attends to it or trains
    on it.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    return 0


def classifier_pad_id(tokenizer: Tokenizer) -> int | None:
    """The pad token that a reward model's config.json is to name, which no score is read at.

    The pad token, else the unknown token, else the end-of-text token. In that order, because with the last (GPT-2,
    which has no other) the score of a text that ends with it is read one token before the end.
    """
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, flag: str = "--tokenizer") -> None:
    """Requires that a model with `vocab_size` embeddings fits the tokenizer.

    Models pad their vocabulary, by a few per cent at most, so a tokenizer may be smaller. Raises UserError when it has
    an id that the model has not, or is so much smaller that it must belong to another model.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if size > vocab_size:
        found = f"the tokenizer's ids go up to {size - 1}, the model has embeddings for 0 to {vocab_size - 1}"
        raise UserError(f"{flag}: {found}: expected the model's own tokenizer")
    if vocab_size > max(1.25 * size, size + 1024):
        found = f"the tokenizer has {size} tokens, the model {vocab_size}"
        raise UserError(f"{flag}: {found}: expected the model's own tokenizer")


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of everything that decides how text becomes ids, and of the pad token: what data are cached by."""
    return _hash(tokenizer, tokenizer.special_tokens_map)


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers make the same ids of any text and end it alike, whichever token they fill with."""

    def digest(tokenizer: Tokenizer) -> str:
        return _hash(tokenizer, {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"})

    return digest(one) == digest(other)


def _hash(tokenizer: Tokenizer, special_tokens: Mapping[str, Any]) -> str:
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256(f"{content}{sorted(special_tokens.items())}".encode()).hexdigest()


def parse_ids(text: str, vocab_size: int, flag: str) -> tuple[int, ...]:
    """The token ids that `text` lists, separated by commas. Raises UserError naming `flag`."""
    try:
        ids = tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise UserError(f"{flag}={text}: expected token ids separated by commas") from None
    if not all(0 <= token < vocab_size for token in ids):
        raise UserError(f"{flag}={text}: expected ids from 0 to {vocab_size - 1}, the model's vocabulary")
    return ids
