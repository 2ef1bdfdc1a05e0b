import pytest

from easyrl.core.errors import UserError
from easyrl.rewards.functions import contains_answer, distinct_words, happy_animal_story
from easyrl.rewards.sources import function_source


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("The answer is 18.", "18", 1.0),
        ("The answer is 180.", "18", 0.0),
        ("It is NEW\n  york, I think", "New York", 1.0),
        ("", "18", 0.0),
        ("costs $2.50 (or so)", "$2.50", 1.0),
        ("a.b", "a+b", 0.0),
        ("I count 42 of them", 42, 1.0),
        ("none: 0", 0, 1.0),
        ("about 2.5, I think", 2.5, 1.0),
        ("It costs 3.5 dollars.", "5", 0.0),
        ("It costs 3.5 dollars.", "3", 0.0),
        ("a chance of .5", "5", 0.0),
        ("x = -5", "5", 0.0),
        ("x = \u22125", 5, 0.0),
        ("x = -5.", "-5", 1.0),
        ("10-5, so...5", "5", 1.0),
        ("5,6", "6", 1.0),
        ("It is 1,500.", "1500", 1.0),
        ("1500 or 1,500, say", "1,500", 1.0),
        ("It is 1,500.", "500", 0.0),
        ("costs $1,250,000.50", "$1,250,000.50", 1.0),
    ],
)
def test_contains_answer(response, answer, score):
    assert contains_answer(["q"], [response], [answer]) == [score]


def test_contains_answer_needs_one(batch_of):
    source = function_source("easyrl.rewards.functions:contains_answer")
    assert source.score(batch_of("yes 4", answer=["4"]))[0].tolist() == [1.0]
    with pytest.raises(UserError, match="response 1 of the batch belongs to a row whose column `answer` is empty"):
        source.score(batch_of("yes", "no", answer=["4", None]))


def test_distinct_words():
    assert distinct_words([""] * 4, ["a b c", "The the THE the", "", "dog, dog!"]) == [1.0, 0.25, 0.0, 0.5]


def test_happy_animal_story():
    stories = [
        "Once there was a dog. He was happy and had fun with his friend.",
        "Once there was a dog.",
        "happy happy happy happy happy happy",
        "A cat was sad and cried. She was lonely.",
        "There was a box.",
    ]
    assert happy_animal_story([""] * 5, stories) == pytest.approx([2.0, 1.0, 1 / 3, 0.0, 0.0])
