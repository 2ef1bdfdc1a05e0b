"""Templates: the documented text, the ids that transformers gives, and the boundary where prompts end."""

import dataclasses

import pytest

from easyrl.core.errors import UserError
from easyrl.data.formats import parse_row
from easyrl.data.messages import BadRow, Message, as_dicts
from easyrl.data.readers import open_source
from easyrl.data.templates import BODIES, load_template
from easyrl.data.tokenizer import encode, load_tokenizer

U, A, U2, A2 = (
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Bye"),
    Message("assistant", "Ciao"),
)
S = Message("system", "Be brief.")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
L3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
RENDERED = {
    "tulu": "<s><|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>",
    "vicuna": f"<s>{VICUNA} USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: Ciao</s>",
    "chatml": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n",
    "llama3": f"<s>{L3.format('user')}Hi<|eot_id|>{L3.format('assistant')}Hello<|eot_id|>"
    f"{L3.format('user')}Bye<|eot_id|>{L3.format('assistant')}Ciao<|eot_id|>",
    "none": "<s>HiHello</s>ByeCiao</s>",
}
TAGS = {
    "tulu": "<|assistant|>\n",
    "vicuna": "ASSISTANT:",
    "chatml": "<|im_start|>assistant\n",
    "llama3": L3.format("assistant"),
    "none": "",
}
SYSTEMS = {
    "tulu": "<s><|system|>\nBe brief.\n<|user|>\nHi\n",
    "vicuna": "<s>Be brief. USER: Hi ",
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    "llama3": f"<s>{L3.format('system')}Be brief.<|eot_id|>{L3.format('user')}Hi<|eot_id|>",
    "none": "<s>Be brief.Hi",
}
names = pytest.mark.parametrize("name", BODIES)


def text_of(template, ids):
    return template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@names
def test_the_text_is_the_documented_one(name, tokenizer):
    template = load_template(name, tokenizer)
    assert template.render((U, A, U2, A2)) == RENDERED[name]
    assert template.render((S, U)) == SYSTEMS[name]
    assert template.render((S, U), add_generation_prompt=True) == SYSTEMS[name] + TAGS[name]


@names
def test_prompt_and_answer_meet_behind_the_tag(name, tokenizer):
    template = load_template(name, tokenizer)
    (found,) = template.encode_answered((U,), (A, U2, A2))
    end = template.tokenizer.convert_ids_to_tokens(template.end_id)
    whole = RENDERED[name]
    start = whole.index("Hello") - (
        name == "vicuna"
    )  # vicuna's prompt ends with a colon, the answer starts with a space
    assert text_of(template, found.prompt) == whole[:start]
    assert text_of(template, found.completion) == whole[start : whole.rindex(end) + len(end)]
    answers = [text_of(template, [i]) for i, mark in zip(found.completion, found.is_answer, strict=True) if mark]
    space = " " if name == "vicuna" else ""
    assert "".join(answers) == f"{space}Hello{end}{space}Ciao{end}"
    assert found.prompt.tolist() == template.encode_prompt((U,)).tolist()
    assert found.completion[-1] == template.end_id and template.end_id in template.stop_ids
    assert found.rewritten == 0


@names
def test_an_exported_tokenizer_gives_the_same_ids(name, tokenizer, make_tokenizer):
    template = load_template(name, tokenizer)
    exported = make_tokenizer(chat_template=template.jinja)
    (found,) = template.encode_answered((S, U), (A, U2, A2))
    ours = [*found.prompt, *found.completion]
    assert exported.apply_chat_template(as_dicts((S, U, A, U2, A2)), return_dict=False)[: len(ours)] == ours
    asked = exported.apply_chat_template(as_dicts((S, U)), add_generation_prompt=True, return_dict=False)
    assert asked == found.prompt.tolist()
    own = load_template("tokenizer", exported)
    assert own == dataclasses.replace(template, name="tokenizer", tokenizer=exported)


@names
def test_bos_once_or_never(name, make_tokenizer):
    with_bos, without = load_template(name, make_tokenizer()), load_template(name, make_tokenizer(adds_bos=False))
    bos = with_bos.tokenizer.bos_token_id
    assert with_bos.encode_prompt((U,)).tolist() == [bos, *without.encode_prompt((U,)).tolist()]
    assert without.bos_id is None


def test_a_token_that_spans_the_boundary_is_split_there(tokenizer):
    template = load_template("tulu", tokenizer)
    prompt = template.encode_prompt((U,))
    answer = "\n\nsystem"
    joint = encode(tokenizer, template.render((U,), add_generation_prompt=True) + answer)
    assert joint[: len(prompt)] != prompt.tolist(), "the test needs a tokenizer that merges line breaks"
    (found,) = template.encode_answered((U,), (Message("assistant", answer),))
    assert found.prompt.tolist() == prompt.tolist()
    assert text_of(template, found.completion) == answer + "</s>"


@names
def test_an_answer_may_mention_the_end_token(name, tokenizer):
    template = load_template(name, tokenizer)
    end = tokenizer.convert_ids_to_tokens(template.end_id)
    text = f"say {end} and {end}{end}."
    (found,) = template.encode_answered((U,), (Message("assistant", text), U2, A2))
    first = found.completion.tolist().index(template.end_id)
    assert text_of(template, found.completion[:first]).strip() == text
    assert found.completion[found.is_answer].tolist().count(template.end_id) == 2
    (raw,) = template.encode_answered((), (Message("assistant", text),))
    assert text_of(template, raw.completion[:-1]) == text and raw.completion[-1] == template.end_id
    assert template.end_id not in raw.completion[:-1]


def test_an_answer_may_mention_the_other_stop_token(tokenizer):
    """Sampling stops at the tokenizer's end-of-text token, too, where the template ends answers with its own."""
    template = load_template("llama3", tokenizer)
    other = tokenizer.eos_token
    assert tokenizer.eos_token_id != template.end_id and tokenizer.eos_token_id in template.stop_ids
    text = f"say {other}, <|eot_id|> and {other}."
    (found,) = template.encode_answered((U,), (Message("assistant", text),))
    assert text_of(template, found.completion) == f"{text}<|eot_id|>"
    (raw,) = template.encode_answered((), (Message("assistant", text),))
    assert text_of(template, raw.completion) == f"{text}<|eot_id|>"
    for ids in (found.completion, raw.completion):
        assert [i for i in ids if i in template.stop_ids] == [template.end_id]


@names
def test_an_answer_may_bring_its_end(name, tokenizer):
    """Data that were made for other trainers often do."""
    template = load_template(name, tokenizer)
    ended = Message("assistant", "Hello" + tokenizer.convert_ids_to_tokens(template.end_id))
    one, other = (template.encode_answered((U,), (answer, U2, A2))[0] for answer in (A, ended))
    assert other.completion.tolist() == one.completion.tolist()
    one, other = (template.encode_answered((), (answer,))[0] for answer in (A, ended))
    assert other.completion.tolist() == one.completion.tolist()


def test_a_prompt_may_bring_its_beginning(tokenizer):
    template = load_template("none", tokenizer)
    assert template.encode_prompt((Message("user", "<s>Hi"),)).tolist() == template.encode_prompt((U,)).tolist()


@names
def test_raw_text_may_be_rendered(name, tokenizer):
    """Its special tokens are what they seem, and it begins and ends once."""
    template = load_template(name, tokenizer)
    text = template.render((U, A, U2, A2)).rstrip()
    (found,) = template.encode_answered((), (Message("assistant", text),))
    assert found.prompt.tolist() == [tokenizer.bos_token_id]
    assert [*found.prompt, *found.completion] == encode(tokenizer, text)


CLOSING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else eos_token }}"
)


def test_an_answer_ends_as_it_does_when_others_follow(make_tokenizer):
    """Phi-3's template closes a conversation with one more token."""
    template = load_template("tokenizer", make_tokenizer(chat_template=CLOSING))
    (found,) = template.encode_answered((U,), (A, U2, A2))
    assert template.tokenizer.convert_ids_to_tokens(list(template.stop_ids)) == ["<|im_end|>", "</s>"]
    assert found.rewritten == 0
    assert text_of(template, found.completion[found.is_answer]) == "Hello<|im_end|>Ciao<|im_end|>"


def test_the_date_is_the_same_every_day(make_tokenizer):
    """Llama 3.1's and 3.2's own templates write it where they can ask for it."""
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %Y-%m-%d') }}{% endif %}"
    for start, expected in (("", ""), ("\n ", "\n "), ("  {% if true %}\n{% endif %}", "")):  # white space stays
        jinja = f"{start}{{{{ bos_token }}}}{asks}{BODIES['tulu']}"
        template = load_template("tokenizer", make_tokenizer(chat_template=jinja))
        assert template.render((U,)).startswith(f"{expected}<s>26 Jul 2024, 2024-07-26<|user|>")
        assert template.jinja == jinja


def test_raw_text_is_all_answer(tokenizer):
    (found,) = load_template("tulu", tokenizer).encode_answered((), (Message("assistant", "some text"),))
    assert found.prompt.tolist() == [tokenizer.bos_token_id]
    assert found.completion.tolist() == [*encode(tokenizer, "some text"), tokenizer.eos_token_id]
    assert found.is_answer.all()


def test_a_jinja_file_without_end_token_gets_one(tmp_path, tokenizer):
    path = tmp_path / "plain.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = load_template(str(path), tokenizer)
    assert template.appends_end and template.bos_id == tokenizer.bos_token_id
    (found,) = template.encode_answered((U,), (A, U2, A2))
    assert (
        text_of(template, [*found.prompt, *found.completion])
        == "user: Hi assistant: Hello user: Bye assistant: Ciao </s>"
    )
    assert found.completion.tolist().count(template.end_id) == 1
    (tmp_path / "marked.jinja").write_text(path.read_text(), encoding="utf-8-sig")  # as editors on Windows write it
    assert load_template(str(tmp_path / "marked.jinja"), tokenizer).jinja == template.jinja


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_answers_that_the_template_rewrites_are_context(tokenizer, make_tokenizer):
    """Qwen3's template gives a thinking block to the last answer only, so an earlier one is not what was generated."""
    template = load_template("tokenizer", make_tokenizer(chat_template=THINKING))
    (found,) = template.encode_answered((U,), (A, U2, A2))
    assert found.rewritten == 1
    assert text_of(template, found.completion) == "<think></think>Ciao<|im_end|>"
    assert text_of(template, found.prompt).count("Hello") == 1


REFUSED = {
    "unknown": (
        None,
        "found no such template or file, expected one of tulu, vicuna, chatml, llama3, none",
    ),
    "tokenizer": (None, "the tokenizer has no chat template, expected one of tulu, vicuna, chatml, llama3, none"),
    "chatml": (("<s>", "</s>"), "the tokenizer has no token <|im_start|>, expected one made for this template"),
    "llama3": (("<s>", "</s>"), "the tokenizer has no token <|start_header_id|>, expected one made for this template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_do_not_fit(name, make_tokenizer):
    specials, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        load_template(name, make_tokenizer(specials) if specials else make_tokenizer())
    assert str(caught.value).startswith(f"--template={name}: {expected}")


@pytest.mark.parametrize(
    ("jinja", "expected"),
    [
        ("{% for", "refuses the messages"),
        ("{{ raise_exception('never') }}", "refuses the messages (never)"),
        ("{{ messages[-1]['content'] }}", "does not start with the text of the question"),
    ],
)
def test_jinja_files_that_do_not_work(tmp_path, tokenizer, jinja, expected):
    (tmp_path / "bad.jinja").write_text(jinja)
    with pytest.raises(UserError) as caught:
        load_template(str(tmp_path / "bad.jinja"), tokenizer)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_no_end_of_text_token(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(("<s>",), eos=None)
    with pytest.raises(UserError, match="--template=tulu: the tokenizer has no end-of-text token"):
        load_template("tulu", tokenizer)
    (tmp_path / "a.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="answers end with no special token"):
        load_template(str(tmp_path / "a.jinja"), tokenizer)


def test_a_template_that_refuses_one_row(tokenizer, make_tokenizer):
    jinja = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BODIES["tulu"]
    template = load_template("tokenizer", make_tokenizer(chat_template=jinja))
    with pytest.raises(BadRow, match="no system"):
        template.encode_prompt((S, U))


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/llama3", "tokenizers/gpt2", "models/stories260K"])
def test_real_tokenizers_agree_with_transformers(shared_data, folder):
    tokenizer = load_tokenizer(str(shared_data / folder))
    tokenizer.model_max_length = 10**9
    template = load_template("llama3" if "llama3" in folder else "tulu", tokenizer)
    source = open_source(str(shared_data / "sft" / "sharegpt_zh_1k.jsonl.gz"))
    for row, _ in zip(source.rows(), range(25), strict=False):
        (example,) = parse_row(row.value, "sft")
        (found,) = template.encode_answered(example.prompt, example.completion)
        ours = [*found.prompt, *found.completion]
        messages = as_dicts((*example.prompt, *example.completion))
        ids = tokenizer.apply_chat_template(messages, chat_template=template.jinja, return_dict=False)
        assert ids[: len(ours)] == ours
        assert found.is_answer.sum() > 0 and found.completion[found.is_answer][-1] == template.end_id
