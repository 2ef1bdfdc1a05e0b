import dataclasses
import re

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.data.messages import Message
from easyrl.data.templates import load_template
from easyrl.rewards.sources import (
    encode_conversation,
    function_source,
    function_sources,
    model_source,
    retokenized_source,
)


def sums(sequences):
    return np.array([sequence.sum() for sequence in sequences], np.float32)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that the code under test can import, and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    written = iter(range(100))

    def write(code):
        name = f"easyrl_test_rewards_{tmp_path.name}_{next(written)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_a_model_with_the_policys_tokenizer_reads_the_sampled_tokens(batch_of):
    seen = []
    source = model_source("rm", lambda sequences: [seen.append(s.tolist()) or 0.5 for s in sequences])
    scores, metrics = source.score(batch_of("a", "b"))
    assert seen == [[0, 1], [0, 1, 2]] and scores.tolist() == [0.5, 0.5] and metrics == {}


@pytest.mark.parametrize(
    ("name", "ended_text", "cut_off_text"),
    [
        ("tulu", "<|user|>\nhi\n<|assistant|>\nyo</s>", "<|user|>\nhi\n<|assistant|>\nyo"),
        # The template writes a line break behind its end token; no answer ends with it.
        (
            "chatml",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo",
        ),
        (
            "{{ messages[0].content }}>{% if messages|length > 1 %}{{ messages[1].content }}{% endif %}",
            "hi>yo</s>",
            "hi>yo",
        ),
    ],
)
def test_a_response_is_written_in_the_models_own_template(tokenizer, tmp_path, name, ended_text, cut_off_text):
    if "{" in name:
        path = tmp_path / "template.jinja"
        path.write_text(name)
        name = str(path)
    template = load_template(name, tokenizer)
    for ended, text in ((True, ended_text), (False, cut_off_text)):
        ids = encode_conversation(template, (Message("user", "hi"),), "yo", ended=ended)
        assert "".join(tokenizer.convert_ids_to_tokens(ids)) == text
        assert ids.dtype == np.int32


def test_a_reencoded_answer_is_what_the_model_was_trained_on(tokenizer):
    """Training and scoring must agree on every id, the end token included; one in the text is text in both."""
    for name in ("tulu", "chatml", "none", "vicuna"):
        template = load_template(name, tokenizer)
        end, question = tokenizer.convert_ids_to_tokens(template.end_id), (Message("user", "hi"),)
        for text in ("yo", f"write {end} there", "\n\nyo "):
            (trained,) = template.encode_answered(question, (Message("assistant", text),))
            scored = encode_conversation(template, question, text, ended=True)
            assert scored.tolist() == [*trained.prompt, *trained.completion]
            assert scored.tolist().count(template.end_id) == 1 + (name == "chatml")
            np.testing.assert_array_equal(encode_conversation(template, question, text, ended=False), scored[:-1])


def test_the_prompt_keeps_its_ids_behind_which_an_answer_merges(merging_tokenizer):
    """A line break ends the prompt, and two are one token, which no policy ever reads there."""
    template = load_template("tulu", merging_tokenizer)
    question = (Message("user", "hi"),)
    prompt = template.encode_prompt(question).tolist()
    assert encode_conversation(template, question, "\nyo", ended=True).tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["tulu", "chatml", "own"])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_response_is_its_end_token_alone(tokenizer, tmp_path, name, text):
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}>{% if messages|length > 1 %}{{ messages[1].content|trim }}{% endif %}")
    template = load_template(str(own) if name == "own" else name, tokenizer)
    question = (Message("user", "hi"),)
    prompt = template.encode_prompt(question).tolist()
    assert encode_conversation(template, question, text, ended=True).tolist() == [*prompt, template.end_id]
    assert encode_conversation(template, question, text, ended=False).tolist() == prompt


@pytest.mark.parametrize(("bos", "kept"), [(None, "g answer"), ("a", "a answer")])
def test_a_reencoded_conversation_that_is_too_long_keeps_its_end(tokenizer, batch_of, bos, kept):
    seen = []
    template = dataclasses.replace(
        load_template("none", tokenizer), bos_id=bos and tokenizer.convert_tokens_to_ids(bos)
    )

    def score(sequences):
        seen.extend(sequences)
        return sums(sequences)

    source = retokenized_source("other", template, 8, score)
    scores, metrics = source.score(batch_of("x", "long answer", ended=[True, False]))
    assert ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in seen] == ["ask 0x</s>", kept]
    np.testing.assert_array_equal(scores, sums(seen))
    assert metrics == {"env/reward/other_cut": 0.5}


def test_a_template_that_refuses_names_model_and_response(tokenizer, batch_of, tmp_path):
    path = tmp_path / "picky.jinja"
    path.write_text(
        "{% if messages[0].content == 'ask 1' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages|map(attribute='content')|join('>') }}"
    )
    template = load_template("none", tokenizer)
    picky = type(template)("picky", path.read_text(), tokenizer, None, 1, appends_end=True)
    with pytest.raises(UserError, match="reward model other: response 1 of the batch: template 'picky' refuses"):
        retokenized_source("other", picky, 8, sums).score(batch_of("a", "b"))


def test_a_function_gets_lists_and_columns(module, batch_of):
    name = module(
        "def reward(prompts, responses, **columns):\n"
        "    assert columns['messages'][0] == [{'role': 'user', 'content': 'ask 0'}]\n"
        "    return [len(p) + len(r) + (a or 0) for p, r, a in zip(prompts, responses, columns['answer'])]\n"
    )
    scores, metrics = function_source(f"{name}:reward").score(batch_of("a", "bb", answer=[10, None]))
    assert scores.tolist() == [16.0, 7.0] and scores.dtype == np.float64 and metrics == {}


def test_a_function_without_columns_gets_those_it_names(module, batch_of):
    name = module(
        "def none(prompts, responses):\n    return [1] * len(responses)\n"
        "def some(prompts, responses, answer, missing=3):\n    return [a + missing for a in answer]\n"
        "def needs(prompts, responses, label):\n    return label\n"
    )
    batch = batch_of("a", "b", answer=[1, 2], other=[0, 0])
    assert function_source(f"{name}:none").score(batch)[0].tolist() == [1, 1]
    assert function_source(f"{name}:some").score(batch)[0].tolist() == [4, 5]
    with pytest.raises(UserError, match="needs the column 'label', the data have answer, other, messages"):
        function_source(f"{name}:needs").check(batch.columns)


def test_a_column_may_be_called_as_prompts_and_responses_are(module, batch_of):
    name = module("def f(prompts, responses, **columns):\n    return [len(columns['a'])] * len(responses)\n")
    batch = batch_of("a", "b", prompts=["p", "p"], responses=["r", "r"], a=[1, 2])
    assert function_source(f"{name}:f").score(batch)[0].tolist() == [2, 2]


def test_a_column_that_no_row_of_a_batch_has_is_none(module, batch_of):
    """Other rows of the data have it: a batch does not say what they lack."""
    name = module("def f(prompts, responses, label):\n    return [3 if one is None else one for one in label]\n")
    source = function_source(f"{name}:f")
    source.check(["label"])
    assert source.score(batch_of("a", "b", other=[0, 0]))[0].tolist() == [3, 3]


def test_a_function_cannot_change_the_batch(module, batch_of):
    name = module(
        "def f(prompts, responses, **columns):\n    responses.clear(); columns['a'].clear()\n    return [1.0, 2.0]\n"
    )
    batch = batch_of("a", "b", a=[1, 2])
    function_source(f"{name}:f").score(batch)
    assert batch.responses == ["a", "b"] and batch.columns == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.5]", r"returned numbers of shape \(1,\), expected one for each of the 2 responses"),
        ("return 0.5", "returned a float, expected one for each of the 2 responses"),
        ("return [[1], [2]]", r"returned numbers of shape \(2, 1\), expected one for each"),
        ("return ['good', 'bad']", "returned list, expected 2 numbers"),
        ("return None", "returned a NoneType, expected one for each of the 2 responses"),
        ("return {'a': 1}", "returned dict, expected 2 numbers"),
        ("raise KeyError('answer')", r"raised KeyError: 'answer' \(.*\.py, line 2, in f\)"),
        ("import json; json.loads('{')", r"raised JSONDecodeError: .* \(.*\.py, line 2, in f\)"),
    ],
)
def test_a_function_that_misbehaves_is_named_in_one_line(module, batch_of, body, message):
    name = module(f"def f(prompts, responses, **columns):\n    {body}\n")
    with pytest.raises(UserError, match=rf"^--reward_function={name}:f ({message})") as caught:
        function_source(f"{name}:f").score(batch_of("a", "b"))
    assert "\n" not in str(caught.value)
    assert body.startswith("return") or isinstance(caught.value.__cause__, (KeyError, ValueError))


@pytest.mark.parametrize(
    "spec", ["", "module", "module:", ":f", "a.b", "a:b:c", "os:system('x')", "a..b:f", "../a:f", "1a:f"]
)
def test_a_name_that_is_not_one_is_refused_before_anything_is_imported(spec):
    with pytest.raises(UserError, match=re.escape(f"--reward_function={spec}: expected package.module:function")):
        function_source(spec)


def test_what_cannot_be_imported_is_named(module):
    broken, needy, empty = module("1 / 0\n"), module("import no_such_thing\n"), module("value = 3\n")
    for spec, message in (
        ("no_such_package.rewards:f", "no module no_such_package in the working directory or on PYTHONPATH"),
        ("easyrl.no_such_module:f", "no module easyrl.no_such_module in the working"),
        (f"{broken}:f", f"importing {broken} failed: ZeroDivisionError"),
        (f"{needy}:f", f"importing {needy} failed: No module named 'no_such_thing'"),
        (f"{empty}:f", f"found no such name in {empty}, expected a function"),
        (f"{empty}:value", f"found a int in {empty}, expected a function"),
        ("builtins:max", "its arguments cannot be inspected, expected a Python function"),
    ):
        with pytest.raises(UserError, match=re.escape(f"--reward_function={spec}: {message}")):
            function_source(spec)


def test_several_functions(module):
    name = module("def f(p, r): return [1.0] * len(r)\ndef g(p, r): return [2.0] * len(r)\n")
    assert [source.name for source in function_sources(f"{name}:f, {name}:g")] == ["f", "g"]
    assert function_sources("") == []
