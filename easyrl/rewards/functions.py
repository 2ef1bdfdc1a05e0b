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
THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(,\d{3})+(?!\w|,\d)")
# Before a digit: no sign, which a minus behind a word or number is not, and no point behind a digit or at the start of
# a number, as the points of `so...5` are not.
NO_NUMBER_BEFORE = r"(?<!(?<![\w)])[-\u2212])(?<!\d\.)(?<!(?<![\w.])\.)"
ENOUGH = 3  # different words of a kind after which more of them earn nothing


def contains_answer(prompts: list[str], responses: list[str], answer: list, **columns: list) -> list[float]:
    """1 where the response contains the row's `answer`, text or a number, as whole words and numbers, 0 elsewhere.

    Neither -5 nor 3.5 contains 5. Case, white space and the commas of thousands do not count. Raises ValueError naming
    a row without an answer.
    """
    scores = []
    for row, (response, value) in enumerate(zip(responses, answer, strict=True)):
        wanted = "" if value is None else _plain(str(value))
        if not wanted:
            raise ValueError(f"response {row} of the batch belongs to a row whose column `answer` is empty")
        before = r"(?<!\w)" + (NO_NUMBER_BEFORE if wanted[0].isdigit() else "")
        after = r"(?!\w)" + (r"(?!\.\d)" if wanted[-1].isdigit() else "")
        scores.append(float(re.search(before + re.escape(wanted) + after, _plain(response)) is not None))
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
    return THOUSANDS.sub(lambda number: number[0].replace(",", ""), " ".join(text.casefold().split()))
