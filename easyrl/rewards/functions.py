"""Reward functions to use as they are, and to write one's own by.

--reward_function=easyrl.rewards.functions:contains_answer
"""

import re


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


ANIMALS = frozenset(
    _words("""
    ant bear bee bird bug bunny butterfly cat chicken cow deer dog dragon duck elephant fish fox frog giraffe goat horse
    kitten lion monkey mouse owl panda pig puppy rabbit sheep snake spider squirrel tiger turtle whale wolf zebra
    """)
)
HAPPY = frozenset(
    _words("""
    beautiful best better brave excited friend friends fun funny giggled glad good great happy helped hug hugged joy
    kind laugh laughed love loved nice play played pretty proud safe shared smile smiled thank thanked warm wonderful
    """)
)
SAD = frozenset(
    _words("""
    afraid alone angry bad broke broken cried cry crying dark died fell hate hurt lonely lost mad mean sad scared scary
    sick sorry tired upset worried wrong
    """)
)
ENOUGH = 3  # different words of a kind after which more of them earn nothing


def contains_answer(prompts: list[str], responses: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the response contains the row's `answer` as whole words, 0 elsewhere; case and white space do not count.

    Raises ValueError naming a row without an answer.
    """
    scores = []
    for row, (response, wanted) in enumerate(zip(responses, answer, strict=True)):
        if not _plain(wanted or ""):
            raise ValueError(f"response {row} of the batch belongs to a row whose column `answer` is empty")
        scores.append(float(re.search(rf"(?<!\w){re.escape(_plain(wanted))}(?!\w)", _plain(response)) is not None))
    return scores


def distinct_words(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """Different words over all words, between 0 and 1; 0 for a response without words. A guard against repetition."""
    return [len(set(words)) / len(words) if (words := _words(response)) else 0.0 for response in responses]


def happy_animal_story(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """Whether a story is about an animal and stays happy, between -1 and 2.

    1 if an animal is mentioned, plus min(happy, 3) / 3 - min(sad, 3) / 3, where happy and sad are the numbers of
    different words of each kind. Repeating a word earns nothing, so the reward cannot be had by saying `happy` all the
    time.
    """
    scores = []
    for response in responses:
        words = set(_words(response))
        happy, sad = (min(len(words & kind), ENOUGH) / ENOUGH for kind in (HAPPY, SAD))
        scores.append(float(bool(words & ANIMALS)) + happy - sad)
    return scores


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
