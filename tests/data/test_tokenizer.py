"""Loading tokenizers, and what is said when there is none."""

import json

import pytest
from tokenizers import Tokenizer

from easyrl.core.errors import UserError
from easyrl.data.tokenizer import adds_bos, check_vocabulary, encode, fingerprint, load_tokenizer, pad_id, same_ids


def test_a_saved_tokenizer_comes_back(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(str(tmp_path))
    assert encode(loaded, "the quick brown fox") == encode(tokenizer, "the quick brown fox")
    assert adds_bos(loaded)


def write_class(folder, name, **settings):
    """Gives the saved tokenizer in `folder` another class, as many models on the hub have one."""
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text()) | settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_ids_are_what_the_file_says_whatever_class_it_names(tmp_path, make_tokenizer, name):
    """SmolLM, a Llama with GPT2Tokenizer and digits apart: the class alone would keep the digits together."""
    make_tokenizer(chat_template="{{ messages }}", pad_token="<|eot_id|>").save_pretrained(tmp_path)
    write_class(tmp_path, name, pre_tokenizer=DIGITS)
    loaded, text = load_tokenizer(str(tmp_path)), "In  2024 it's 1234567</s>x"
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert encode(loaded, text) == file.encode(text, add_special_tokens=False).ids
    assert (loaded.eos_token, loaded.pad_token, loaded.chat_template) == ("</s>", "<|eot_id|>", "{{ messages }}")
    assert adds_bos(loaded)


def test_a_class_that_reads_as_its_file_stays(tmp_path, make_tokenizer):
    """GPT-2's own tokenizer_config.json names no special token: they are known by the class alone."""
    make_tokenizer(["<|endoftext|>"], adds_bos=False, eos=None).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    write_class(tmp_path, "GPT2Tokenizer", pre_tokenizer=BYTES)
    assert load_tokenizer(str(tmp_path)).eos_token == "<|endoftext|>"


def test_special_tokens_are_recognised_and_none_is_added(tokenizer):
    ids = encode(tokenizer, "a</s>")
    assert ids[-1] == tokenizer.eos_token_id and ids[0] != tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_special_tokens_are_found_behind_text_whatever_the_file_says(tmp_path, make_tokenizer, name):
    """Some Llamas look for them in normalized text, where the first one has a space before it."""
    make_tokenizer().save_pretrained(tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    write_class(tmp_path, name, normalizer=prepend, added_tokens=[token | {"normalized": True} for token in tokens])
    loaded = load_tokenizer(str(tmp_path))
    assert encode(loaded, "a</s>")[-1] == loaded.eos_token_id
    assert loaded.convert_ids_to_tokens(loaded.eos_token_id) == "</s>"
    loaded.save_pretrained(tmp_path / "again")
    assert encode(load_tokenizer(str(tmp_path / "again")), "a</s>b") == encode(loaded, "a</s>b")


def test_the_settings_of_the_model_are_what_the_file_says(tmp_path, make_tokenizer):
    """Llama 3 takes a word that is a token as it is, whether or not merges lead there; the class would go by merges."""
    make_tokenizer().save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    model["vocab"]["zebra"] = len(model["vocab"])
    write_class(tmp_path, "GPT2Tokenizer", pre_tokenizer=BYTES, model=model | {"ignore_merges": True})
    assert encode(load_tokenizer(str(tmp_path)), "zebra") == [model["vocab"]["zebra"]]


def test_the_same_ids(tokenizer, make_tokenizer):
    padded = make_tokenizer(pad_token="</s>")
    assert same_ids(tokenizer, padded) and same_ids(make_tokenizer(pad_token="<s>"), padded)
    assert not same_ids(padded, make_tokenizer(adds_bos=False, pad_token="</s>"))
    assert not same_ids(padded, make_tokenizer(eos="<|im_end|>", pad_token="</s>"))


def test_fingerprints(tokenizer, make_tokenizer):
    assert fingerprint(tokenizer) == fingerprint(make_tokenizer())
    assert fingerprint(tokenizer) != fingerprint(make_tokenizer(adds_bos=False))
    assert fingerprint(tokenizer) != fingerprint(make_tokenizer(eos="<|im_end|>"))


def test_pad_id(tokenizer, make_tokenizer):
    assert pad_id(make_tokenizer(pad_token="<|eot_id|>")) == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    assert pad_id(make_tokenizer(eos=None, unk_token="<|im_end|>")) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pad_id(make_tokenizer(eos=None)) == 0


def test_vocabularies(tokenizer):
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    check_vocabulary(tokenizer, size + 128)
    with pytest.raises(UserError, match=f"ids go up to {size - 1}, the model has embeddings for 0 to {size - 2}"):
        check_vocabulary(tokenizer, size - 1)
    with pytest.raises(UserError, match=f"--tokenizer: the tokenizer has {size} tokens, the model 32000"):
        check_vocabulary(tokenizer, 32000)


def test_where_there_is_none(tmp_path):
    def complaint(ref):
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(ref), "--tok")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert complaint("") == "--tok: found nothing, expected a folder with a tokenizer or a hub id"
    assert (
        complaint("/no/such")
        == "--tok=/no/such: found nothing there, expected a folder with a tokenizer or a hub id (owner/name)"
    )
    assert complaint(tmp_path).endswith("found no tokenizer in this folder, expected tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "found tokenizer.model alone, expected tokenizer.json" in complaint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "no tokenizer can be loaded" in complaint(tmp_path)
    assert "found a file, expected a folder" in complaint(tmp_path / "tokenizer.json")
    assert complaint("owner/missing").startswith("--tok=owner/missing: no tokenizer can be loaded (")
