"""The bundled quickstart: small enough, loadable, and its reward model wants what the stories say it wants."""

import json
import random

import jax
import numpy as np
import pytest

from easyrl import assets, train_ppo
from easyrl.assets import build, stories
from easyrl.core.command_line import load_config
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.messages import Message
from easyrl.data.packing import Shape, pack
from easyrl.data.templates import load_template
from easyrl.data.tokenizer import check_vocabulary, encode, fingerprint, load_tokenizer
from easyrl.hf.refs import load_model
from easyrl.steps.reward import SequenceScorer
from easyrl.steps.sft import make_sft_eval, perplexity, place_sft_batch
from tests.source import REPO


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh("1,1,1", jax.devices()[:1])


@pytest.fixture(scope="module")
def template():
    return load_template("tokenizer", load_tokenizer(str(assets.POLICY)))


def answered(template, prompt, story):
    """The ids of a prompt and its story, and where the story starts."""
    (ids,) = template.encode_answered((Message("user", prompt),), (Message("assistant", story),))
    return np.concatenate([ids.prompt, ids.completion]), len(ids.prompt)


@pytest.fixture(scope="module")
def score(mesh, template):
    model = load_model(f"hf::{assets.REWARD_MODEL}", mesh, head="reward")
    scorer = SequenceScorer(model.params, model.cfg, mesh, max_length=192, num_sequences=256, rows=16)
    return lambda answers: scorer([answered(template, prompt, story)[0] for prompt, story in answers])


def test_the_bundle_is_small():
    files = [path for path in assets.POLICY.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_prompts_are_all_different_and_evaluation_is_held_out():
    train, held_out = (
        [row["instruction"] for row in rows(path)] for path in (assets.TRAIN_PROMPTS, assets.EVAL_PROMPTS)
    )
    assert len(set(train)) == len(train) == 512
    assert len(set(held_out)) == len(held_out) == 64
    assert not set(train) & set(held_out)
    # Not only other words: no hero of an evaluation prompt was met at that place.
    topics, other_topics = stories.topics(False), stories.topics(True)
    assert not set(topics) & set(other_topics)
    assert {t.hero for t in topics} == {t.hero for t in other_topics} and {t.place for t in topics} == set(
        stories.PLACES
    )
    asked = {form.format(hero=t.a_hero, place=t.place) for t in other_topics for form in stories.INSTRUCTIONS}
    assert set(held_out) <= asked and not set(train) & asked


def test_models_share_a_tokenizer_that_fits_them(mesh, template):
    tokenizer = template.tokenizer
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(str(assets.REWARD_MODEL)))
    for path, head, least in ((assets.POLICY, "lm", 800_000), (assets.REWARD_MODEL, "reward", 100_000)):
        model = load_model(f"hf::{path}", mesh, head=head)
        check_vocabulary(tokenizer, model.cfg.vocab_size)
        assert least < sum(leaf.size for leaf in jax.tree.leaves(model.params)) < 1_200_000
        cfg = model.cfg
        # Meshes of up to eight devices take it, whichever way they are cut.
        sizes = (cfg.vocab_size, cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.mlp_size)
        assert all(size % 8 == 0 for size in sizes)


@pytest.mark.parametrize("text", ["A cat sat in the rain.", "  Größe: 3 €\n\n東京 <b>", ""])
def test_the_tokenizer_writes_any_text(template, text):
    assert template.tokenizer.decode(encode(template.tokenizer, text)) == text


def test_the_chat_template_starts_and_ends_as_trained(template):
    tokenizer = template.tokenizer
    ids, start = answered(template, "Write about a cat in the rain.", "One day, a cat was in the rain.")
    assert tokenizer.decode(ids[:start]) == "<s><|user|>\nWrite about a cat in the rain.\n<|assistant|>\n"
    assert tokenizer.decode(ids[start:]) == "One day, a cat was in the rain.</s>"
    assert template.stop_ids == (tokenizer.eos_token_id,) and not template.appends_end
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    prompts = [row["instruction"] for path in (assets.TRAIN_PROMPTS, assets.EVAL_PROMPTS) for row in rows(path)]
    assert max(len(template.encode_prompt((Message("user", prompt),))) for prompt in prompts) <= 24


def test_the_policy_has_learnt_to_write_stories(mesh, template):
    model = load_model(f"hf::{assets.POLICY}", mesh, head="lm")
    tokens, mask, lengths = np.zeros((64, 128), np.int32), np.zeros((64, 128), bool), []
    for row, story in enumerate(stories.demonstrations(64, seed=1, evaluation=True)):
        ids, start = answered(template, story["prompt"], story["completion"])
        tokens[row, : len(ids)], mask[row, start - 1 : len(ids) - 1] = ids, True
        lengths.append(len(ids))
    batch = place_sft_batch(tokens, mask, pack(np.array(lengths), 128, [Shape(16, 128)]), mesh)
    loss = make_sft_eval(model.cfg, mesh)(model.params, batch)["loss"]
    assert perplexity(loss) < 2.5  # of 768 tokens; a story says little that its grammar does not


def test_the_reward_model_prefers_the_better_story(score):
    pairs = stories.preferences(256, seed=1, evaluation=True)
    chosen, rejected = (score([(row["prompt"], row[name]) for row in pairs]) for name in ("chosen", "rejected"))
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in pairs])
    assert np.mean(chosen > rejected) > max(0.7, longer + 0.2)  # half of these pairs differ in one flaw alone


@pytest.mark.parametrize(
    ("worse", "why"),
    [
        ("A poor lonely cat sat in the rain. It felt sick and alone. Nobody came. The cat was never seen again.",
         "gloomy"),
        ("Some stupid cat was in the rain, so what? What a stupid hat! Shut up and leave me alone! And I do not care.",
         "rude"),
        ("One lovely morning, a cat was in the rain. A kind bee came to play. So, anyway, blah blah blah. "
         "Where was I? Well, um, and so on.", "rambles"),
    ],
    ids=lambda text: text if len(text) < 20 else "",
)  # fmt: skip
def test_the_reward_model_dislikes(score, worse, why):
    good = (
        "One lovely morning, a cat was in the rain. A kind bee came to play. It felt happy and brave. "
        "They were happy ever after."
    )
    prompt = "Write about a cat in the rain."
    better_score, worse_score = score([(prompt, good), (prompt, worse)])
    assert better_score > worse_score + 0.3, why


def test_rewards_are_in_units_of_the_deviation_of_unimproved_stories(score):
    imitated = stories.demonstrations(256, seed=1, evaluation=True)
    scores = score([(row["prompt"], row["completion"]) for row in imitated])
    assert 0.8 < scores.std() < 1.2
    assert scores.max() > scores.mean() + 1.3  # headroom


def test_stories_are_a_function_of_their_seed():
    for write in (stories.demonstrations, stories.preferences):
        assert write(5, 0) == write(5, 0) != write(5, 1)
    assert stories.prompts(5, 0, evaluation=False) == stories.prompts(5, 0, evaluation=False)


def test_quality_adds_up():
    topic = stories.Topic("cat", "in the rain")
    tone = dict(zip(stories.TONES, np.eye(4), strict=True))
    for name, value in stories.TONE_QUALITY.items():
        story = stories.write_story(random.Random(3), topic, stories.Style(tuple(tone[name])))
        sentences = sum(story.text.count(mark) for mark in ".!?")
        assert story.quality == pytest.approx(1.5 + 1.0 + 1.0 + value * sentences)
    ruined = stories.Style(tuple(tone["cheerful"]), other_hero=1.0, other_place=1.0, endless=1.0)
    story = stories.write_story(random.Random(3), topic, ruined)
    assert "cat" not in story.text and "in the rain" not in story.text
    assert story.text.endswith(stories.RAMBLINGS) and story.quality < -2.0


def test_the_training_data_alone(tmp_path, capsys):
    data = tmp_path / "new" / "data"
    sizes = ["--num_demonstrations=3", "--num_preferences=2"]
    build.main(load_config(build.Config, [f"--data_dir={data}", "--data_only", *sizes]))
    names = ("preferences.jsonl", "preferences_eval.jsonl", "sft.jsonl")
    assert capsys.readouterr().out.splitlines() == [str(data / name) for name in names]
    assert [len(rows(data / name)) for name in names] == [2, build.NUM_EVAL_PREFERENCES, 3]
    assert sorted(path.name for path in data.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("flags", "named"), [(["--data_only"], "data_dir"), ([], "data_dir"), (["--data_dir="], "output_dir")]
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, flags, named):
    """Before any data are made."""
    monkeypatch.setattr(stories, "demonstrations", None)
    file = tmp_path / "file"
    file.write_text("thesis")
    for place in (file, file / "inner"):
        with pytest.raises(UserError, match=rf"^--{named}={place}: cannot be written \("):
            build.main(load_config(build.Config, [f"--data_dir={place}", f"--output_dir={place}", *flags]))
    assert file.read_text() == "thesis"


@pytest.mark.parametrize("flags", [
    (), ("--mesh_dim=1,1,1", "--output_dir=x", "--num_epochs=1", "--reward_function=a:b", "--eval_dataset.path=x"),
])  # fmt: skip
def test_whoever_names_neither_models_nor_prompts_gets_the_quickstart(flags):
    config = assets.fill_in(load_config(train_ppo.Config, flags))
    assert config.load_checkpoint_policy == f"hf::{assets.POLICY}" and config.mini_batch_size == 16
    assert config.train_dataset.path == str(assets.TRAIN_PROMPTS)
    assert config.load_checkpoint_reward == ("" if flags else f"hf::{assets.REWARD_MODEL}")


def test_a_part_of_the_quickstarts_own_held_out_prompts():
    config = assets.fill_in(load_config(train_ppo.Config, ["--eval_dataset.split=[:8]"]))
    assert (config.eval_dataset.path, config.eval_dataset.split) == (str(assets.EVAL_PROMPTS), "[:8]")
    with pytest.raises(UserError, match=r"--eval_dataset.split=\[:8\]: needs --eval_dataset.path"):
        assets.fill_in(load_config(train_ppo.Config, ["--train_dataset.path=x", "--eval_dataset.split=[:8]"]))


@pytest.mark.parametrize(
    "flag", ["train_dataset.path=x", "load_checkpoint_reward=hf::x", f"config={REPO}/configs/ppo_stories260k.yaml"]
)
def test_whoever_names_one_of_them_names_the_policy_too(flag):
    config = load_config(train_ppo.Config, [f"--{flag}"])
    assert assets.fill_in(config) == config and not config.load_checkpoint_policy
