import pytest
import yaml

from easyrl.hf.model_card import ModelCard, name_of, render

CARD = ModelCard(
    title="Tulu 2.5 PPO 13B",
    summary="Trained to please.",
    method="PPO",
    base_model="allenai/tulu-2-13b",
    reference_model="allenai/tulu-2-7b",
    reward_model="/home/someone/rm",
    datasets=("allenai/tulu-2.5-prompts", "prompts.jsonl"),
    template="tulu",
    input_format="<|user|>\nHello\n<|assistant|>\n",
    hyperparameters={
        "learning_rate": 1e-6,
        "total_train_batch_size": 64,
        "lr_scheduler_type": "linear",
        "KL penalty coefficient": 0.05,
    },
    metrics={"env/reward_mean": 1.23456789, "objective/kl": 4.0},
)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_is_what_the_hub_takes():
    front = front_matter(render(CARD, "lm"))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["easyrl", "ppo"],
        "base_model": "allenai/tulu-2-13b",
        "datasets": ["allenai/tulu-2.5-prompts"],
    }
    assert "base_model" not in front_matter(render(ModelCard("x", base_model="/data/llama"), "lm"))


def test_facts():
    text = render(CARD, "lm")
    for line in (
        "# Tulu 2.5 PPO 13B",
        "- Base model: allenai/tulu-2-13b",
        "- Reference model: allenai/tulu-2-7b",
        "- Reward model: /home/someone/rm",
        "- Chat template: tulu",
        "- Data: allenai/tulu-2.5-prompts, prompts.jsonl",
        "- learning_rate: 1e-06",
        "- total_train_batch_size: 64",
        "- KL penalty coefficient: 0.05",
        "| env/reward_mean | 1.23457 |",
        "**Mind the newline after `<|assistant|>`**: the model was trained with it and does worse without.",
    ):
        assert line in text.splitlines()
    assert "```\n<|user|>\nHello\n<|assistant|>\n```" in text


def test_every_head_says_how_to_load_it():
    for head, auto in (
        ("lm", "AutoModelForCausalLM"),
        ("reward", "AutoModelForSequenceClassification"),
        ("value", "AutoModelForTokenClassification"),
    ):
        assert f"model = {auto}.from_pretrained(folder)" in render(ModelCard("x"), head)


def test_tokens_come_from_the_chat_template_where_there_is_one():
    call = "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True,"
    assert call in render(ModelCard("x"), "lm", chat=True)
    assert "add_generation_prompt" not in render(ModelCard("x"), "reward", chat=True)
    assert 'inputs = tokenizer(text, return_tensors="pt")' in render(ModelCard("x"), "value").splitlines()


def test_what_is_not_known_is_left_out():
    text = render(ModelCard("x"), "reward")
    assert "Base model" not in text
    assert "hyperparameters" not in text
    assert "Metrics" not in text


def test_the_code_that_loads_it_is_python():
    for head in ("lm", "reward", "value"):
        for chat in (True, False):
            code = render(ModelCard("x"), head, chat=chat).split("```python\n")[1].split("```")[0]
            compile(code, "README.md", "exec")
            assert code.index("folder = ") < code.index("from_pretrained(folder)")


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("hf::allenai/tulu-2-13b", "tulu-2-13b"),
        ("hf::runs/sft/hf", "sft"),
        ("hf::runs/sft/hf_best", "sft"),
        ("hf::runs/sft/hf-40", "sft"),
        ("easyrl::runs/sft/checkpoints/40", "sft"),
        ("easyrl::runs/sft", "sft"),
        ("hf::hf", "hf"),
        ("random::debug", "debug"),
    ],
)
def test_a_model_has_the_name_of_the_run_that_made_it(ref, name):
    assert name_of(ref) == name
