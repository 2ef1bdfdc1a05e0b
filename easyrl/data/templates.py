r"""Chat templates: how messages become text, how that text becomes token ids, and which of the ids are the answer's.

A template is one Jinja text, the same that an exported tokenizer carries as its `chat_template`; transformers renders
it, so what is trained on is what `apply_chat_template` gives at use. The ids of a prompt are exactly those that a chat
server computes for it, `encode(render(messages, add_generation_prompt=True))`, and the answer's ids continue them.

    name     text of one exchange (bos first where the tokenizer adds one; ^ marks the end of the prompt)
    tulu     <|user|>\nQUESTION\n<|assistant|>\n^ANSWER</s>            and \n before the next turn
    vicuna   SYSTEM USER: QUESTION ASSISTANT:^ ANSWER</s>                v1.1, with FastChat's default system message
    chatml   <|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n^ANSWER<|im_end|>\n
    llama3   <|start_header_id|>user<|end_header_id|>\n\nQUESTION<|eot_id|> ... assistant ...\n\n^ANSWER<|eot_id|>
    none     QUESTION^ANSWER</s>                                         the texts alone, one behind the other

`tokenizer` stands for the tokenizer's own template; any other name is a file that holds a Jinja template.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from easyrl.core.errors import UserError
from easyrl.data.messages import BadRow, Message, Messages, as_dicts
from easyrl.data.tokenizer import Tokenizer, adds_bos, encode

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Bodies without the beginning-of-text token, which depends on the tokenizer. Line breaks in the output are Jinja's \n.
BODIES = {
    "tulu": (
        r"{% for message in messages %}{% if message['role'] == 'assistant' %}"
        r"{{ '<|assistant|>\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        r"{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "vicuna": (
        r"{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
        r"{% else %}{{ '" + VICUNA_SYSTEM.replace("'", r"\'") + r" ' }}{% endif %}"
        r"{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        r"{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
        r"{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "chatml": (
        r"{% for message in messages %}"
        r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        r"{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        r"{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "none": (
        r"{% for message in messages %}{{ message['content'] }}"
        r"{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
# A text that the answer to be encoded can stand behind, for a tokenizer that writes the start of a text in its own way.
ANCHORS = ("\n", ":", "a")
# What templates are told that ask for the date. Llama 3's write this one where they cannot ask.
TODAY = datetime(2024, 7, 26)
DIRECTIVES = (*"aAwdebBmyYHIMSpfjUWFDTR", "-d", "-m")  # of strftime
# Goes before such a template: transformers hands no function over to templates, and has one that gives the day itself.
# Jinja drops the line break behind a block.
DATED = "".join(
    (
        "{% macro strftime_now(format) %}{{ format",
        *(f".replace('%{directive}', '{TODAY.strftime('%' + directive)}')" for directive in DIRECTIVES),
        " }}{% endmacro %}\n",
    )
)
TAIL = 64  # characters of a prompt that are looked at to see whether its last token would merge with the answer's first


class Answered(NamedTuple):
    """The ids of an answered prompt, in two parts.

    `completion` starts with the first token of the first answer. `is_answer` marks its tokens that the assistant
    writes: the answers with their end tokens, but not the user's turns and the template's tags between them.
    """

    prompt: np.ndarray  # int32 [P]
    completion: np.ndarray  # int32 [C]
    is_answer: np.ndarray  # bool [C]
    rewritten: int  # earlier answers that are not marked, because the template changes them in later turns


@dataclass(frozen=True)
class Template:
    """A chat template together with the tokenizer it writes for."""

    name: str
    jinja: str  # what an exported tokenizer carries as `chat_template`
    tokenizer: Tokenizer
    bos_id: int | None  # the beginning-of-text token, if prompts start with one
    end_id: int  # the token that an answer ends with
    appends_end: bool  # the text of the template has no end token: it is appended to the ids of the last answer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which sampling stops: the template's end token and the tokenizer's end-of-text token."""
        eos_id = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(int(token) for token in (self.end_id, eos_id) if token is not None))

    @property
    def tag_length(self) -> int:
        """The number of tokens in the assistant's tag, which no cut may take from the end of a prompt."""
        question = (Message("user", "a"),)
        return len(self.encode_prompt(question)) - len(encode(self.tokenizer, self.render(question)))

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, followed by the assistant's tag if the assistant is to speak next.

        An answer that ends with a stop token, or a conversation that starts with the beginning-of-text token, is given
        no second one. A template that asks for the date gets TODAY: the tokens of a run depend neither on the day nor
        on the host.
        """
        plain = tuple(
            message._replace(content=self._without_end(message.content)) if message.role == "assistant" else message
            for message in messages
        )
        try:
            text = self.tokenizer.apply_chat_template(
                as_dicts(plain),
                chat_template=DATED + self.jinja if "strftime_now" in self.jinja else self.jinja,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template raises what it likes, Jinja's own errors among it
            raise BadRow(f"template {self.name!r} refuses the messages ({error})", "refused by the template") from None
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if bos and text.startswith(bos + bos) else text

    def encode_prompt(self, messages: Messages) -> np.ndarray:
        """The ids, int32 [P], of messages that await an answer, up to and including the assistant's tag."""
        return np.asarray(encode(self.tokenizer, self.render(messages, add_generation_prompt=True)), np.int32)

    def encode_answered(self, prompt: Messages, *completions: Messages) -> list[Answered]:
        """The ids of `prompt` followed by the turns of each of `completions`, which start with an answer.

        The boundary between a prompt and its answer is where the ids of the prompt alone end. Where the tokenizer would
        merge the two (an answer that starts with white space), the prompt keeps the ids it has at use, and the answer
        is encoded behind it. With an empty prompt a completion is raw text: bos, text, end token, all of it an answer
        but for bos. Of these two it may bring its own.
        """
        if not prompt:
            return [self._encode_raw(completion[0].content) for completion in completions]
        # The completions have their prompt in common, and each turn starts like the one before.
        render, encode_behind = functools.cache(self.render), functools.cache(self._encode_behind)
        return [self._encode_turns((*prompt, *one), len(prompt), render, encode_behind) for one in completions]

    def _encode_raw(self, text: str) -> Answered:
        bos = [] if self.bos_id is None else [self.bos_id]
        text = self._without_end(text)
        ids = encode(self.tokenizer, text)
        # Text that starts with a special token was written by a template: its stop tokens are what they seem.
        if self._stops(ids) and ids[0] not in special_ids(self.tokenizer):
            ids = self._encode_quoted(text)
        ids = [*(ids[1:] if bos and ids[:1] == bos else ids), self.end_id]
        return Answered(np.asarray(bos, np.int32), np.asarray(ids, np.int32), np.ones(len(ids), bool), 0)

    def _encode_turns(self, messages: Messages, first: int, render: Callable, encode_behind: Callable) -> Answered:
        ids: list[int] = []
        marks: list[bool] = []
        prompt_length = rewritten = 0
        for context, answer in self._turns(messages, first, render):
            if answer is None:
                rewritten += 1
                continue
            # Every context but the first follows an answer.
            before = () if not ids else ANCHORS if self.appends_end else (self._end_text,)
            context_ids = encode_behind(before, context)
            answer_ids = self._encode_behind((context[-TAIL:], *ANCHORS), answer)
            closing = [] if self.appends_end else [self.end_id]
            if self._stops(answer_ids[: len(answer_ids) - len(closing)]):
                answer_ids = self._encode_quoted(answer.removesuffix(self._end_text) if closing else answer) + closing
            prompt_length = prompt_length or len(context_ids)
            ids += context_ids + answer_ids
            marks += [False] * len(context_ids) + [True] * len(answer_ids)
        if self.appends_end:
            ids.append(self.end_id)
            marks.append(True)
        tokens, is_answer = np.asarray(ids, np.int32), np.asarray(marks, bool)
        return Answered(tokens[:prompt_length], tokens[prompt_length:], is_answer[prompt_length:], rewritten)

    def _turns(self, messages: Messages, first: int, render: Callable) -> Iterator[tuple[str, str | None]]:
        """(context, answer) texts of the answers from message `first` on; together they are the conversation's text.

        The answer is None where the template writes an earlier answer differently once later turns follow (Qwen3 drops
        its thinking): such an answer is only context. An answer ends with its end token; text behind that belongs to
        the next context, or to nothing.
        """
        whole = render(messages)
        start = 0
        for index in range(first, len(messages)):
            if messages[index].role != "assistant":
                continue
            before = render(messages[:index], add_generation_prompt=True)
            after = render(messages[: index + 1])
            if not self.appends_end:
                head, end, _ = after.rpartition(self._end_text)
                after = head + end
            if after.startswith(before) and len(after) > len(before) and whole.startswith(after):
                yield whole[start : len(before)], after[len(before) :]
                start = len(after)
            elif index < len(messages) - 1:
                yield "", None
            else:
                found = "the text of an answered conversation does not start with the text of its prompt"
                raise UserError(f"template {self.name!r} cannot be trained with: {found}")

    def _stops(self, ids: list[int]) -> bool:
        """Whether sampling would stop at one of these tokens."""
        return not set(self.stop_ids).isdisjoint(ids)

    def _without_end(self, text: str) -> str:
        """The text of an answer without the stop token that it may end with."""
        for stop in self._stop_texts:
            if text.endswith(stop):
                return text.removesuffix(stop)
        return text

    def _encode_quoted(self, text: str) -> list[int]:
        """The ids of text that mentions a stop token, as ordinary text: a policy must not learn to stop there.

        The text is cut inside every such token, and the parts are encoded one behind the other.
        """
        cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, self._stop_texts)), text)]
        parts = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
        return [token for part in parts for token in self._encode_behind(ANCHORS, part)]

    def _encode_behind(self, anchors: tuple[str, ...], text: str) -> list[int]:
        """The ids that `text` has behind the first of `anchors` that does not merge with it, or else on its own."""
        for anchor in anchors:
            anchor_ids = encode(self.tokenizer, anchor)
            joint = encode(self.tokenizer, anchor + text)
            if joint[: len(anchor_ids)] == anchor_ids:
                return joint[len(anchor_ids) :]
        return encode(self.tokenizer, text)

    @property
    def _end_text(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.end_id)

    @property
    def _stop_texts(self) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens that stand for no text: ends, tags and the like."""
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} | set(
        tokenizer.all_special_ids
    )


def load_template(name: str, tokenizer: Tokenizer, flag: str = "--template") -> Template:
    """The template called `name` (tulu, vicuna, chatml, llama3, none, tokenizer) or in the Jinja file `name`.

    Raises UserError, naming `flag`, when there is none, when it needs a token that the tokenizer lacks, or when it
    cannot be rendered.
    """
    jinja = _jinja(name, tokenizer, flag)
    if name in BODIES and name not in NEEDED_TOKENS and tokenizer.eos_token is None:
        raise UserError(f"{flag}={name}: the tokenizer has no end-of-text token, which this template ends answers with")
    vocabulary = tokenizer.get_vocab()
    for token in NEEDED_TOKENS.get(name, ()):
        if token not in vocabulary:
            raise UserError(f"{flag}={name}: the tokenizer has no token {token}, expected one made for this template")
    unknown = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    probe = Template(name, jinja, tokenizer, None, unknown, appends_end=True)
    question, answer = Message("user", "a"), Message("assistant", "b")
    try:
        asked = probe.render((question,), add_generation_prompt=True)
        answered = probe.render((question, answer))
    except BadRow as error:
        raise UserError(f"{flag}={name}: {error}") from None
    if not answered.startswith(asked):
        found = "the text of an answered question does not start with the text of the question"
        raise UserError(f"{flag}={name}: {found}, expected a template that takes add_generation_prompt")
    begins = adds_bos(tokenizer) or encode(tokenizer, asked)[:1] == [tokenizer.bos_token_id]
    bos_id = tokenizer.bos_token_id if begins else None
    special = special_ids(tokenizer)

    def ends_in(text: str) -> list[int]:
        return [token for token in encode(tokenizer, text[len(asked) :]) if token in special]

    # Of an answer that others follow, if it has an end: some templates write one more where a conversation ends.
    if ends := ends_in(_followed(probe, question, answer, answered)) or ends_in(answered):
        return Template(name, jinja, tokenizer, bos_id, ends[-1], appends_end=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag}={name}: answers end with no special token, and the tokenizer has no end-of-text token")
    return Template(name, jinja, tokenizer, bos_id, tokenizer.eos_token_id, appends_end=True)


def _followed(template: Template, question: Message, answer: Message, answered: str) -> str:
    """As much of `answered`, the text of this exchange, as is still there once another question follows."""
    try:
        longer = template.render((question, answer, question))
    except BadRow:
        return answered
    pairs = zip(answered, longer, strict=False)
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def own_jinja(tokenizer: Tokenizer) -> str | None:
    """The chat template that comes with a tokenizer; of several the one called `default`."""
    own: Any = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _jinja(name: str, tokenizer: Tokenizer, flag: str) -> str:
    if name in BODIES:
        return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + BODIES[name]
    if name == "tokenizer":
        if own := own_jinja(tokenizer):
            return own
        raise UserError(f"{flag}=tokenizer: the tokenizer has no chat template, expected one of {', '.join(BODIES)}")
    path = Path(name).expanduser()
    if not path.is_file():
        expected = f"one of {', '.join(BODIES)}, tokenizer, or a file with a Jinja template"
        raise UserError(f"{flag}={name}: found no such template or file, expected {expected}")
    try:
        return path.read_text(encoding="utf-8-sig")  # a mark at its start, as Windows writes it, is no part of it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}={name}: the template cannot be read ({error})") from None
