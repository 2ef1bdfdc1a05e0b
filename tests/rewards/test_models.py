"""Reward models before their weights are read: how much of a conversation they have room for."""

import pytest

from easyrl.data.messages import Message
from easyrl.data.templates import load_template
from easyrl.rewards.models import find_reward_models
from easyrl.rewards.sources import encode_conversation
from tests.train_ppo.conftest import make_tokenizer, write_model

ROOM = 20  # tokens of the policy's prompt and response


@pytest.fixture
def length(tmp_path):
    """The room that a reward model with this tokenizer has for conversations in a chat format."""

    def find(tokenizer, template_name, max_positions=512):
        folder = write_model(tmp_path / "reward", "reward", tokenizer=tokenizer, max_positions=max_positions)
        policy = load_template("none", make_tokenizer())
        (model,) = find_reward_models(f"hf::{folder}", template_name, policy, dtype="float32", max_length=ROOM)
        return model.max_length

    return find


def test_a_template_of_its_own_takes_no_room_from_the_conversation(length):
    """Vicuna's system message alone is longer than all that the policy reads."""
    tokenizer = make_tokenizer("<end>", 9)
    asked = (Message("user", "x" * 2 * (ROOM - 6)),)  # with its answer twice the tokens that the policy has room for
    tokens = encode_conversation(load_template("vicuna", tokenizer), asked, "y" * 10, ended=True)
    assert ROOM < 100 < len(tokens) <= length(tokenizer, "vicuna")


def test_room_ends_with_the_model(length):
    assert length(make_tokenizer("<end>", 9), "vicuna", max_positions=48) == 48


def test_the_tokens_of_the_policy_are_read_as_they_are(length, capsys):
    assert length(make_tokenizer(), "") == ROOM
    assert "note" not in capsys.readouterr().out


def test_another_template_of_its_own_is_said_unless_it_is_asked_for(length, tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = load_template("vicuna", tokenizer).jinja
    length(tokenizer, "")
    assert capsys.readouterr().out == (
        f"note: --load_checkpoint_reward=hf::{tmp_path / 'reward'} has a chat template of its own, and reads what the "
        "policy reads, with the template 'none'; --reward_template=tokenizer gives it its own\n"
    )
    length(tokenizer, "tokenizer")
    tokenizer.chat_template = load_template("none", tokenizer).jinja
    length(tokenizer, "")
    assert "note" not in capsys.readouterr().out


def test_a_pad_token_alone_makes_no_other_tokenizer(length):
    """It would be read with a template, and the value model would not start from it."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert length(tokenizer, "") == ROOM
