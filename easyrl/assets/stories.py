"""The text the bundled models learn from: very short stories that a little grammar writes.

An instruction names a hero and a place ("Write about a cat in the rain."). A story is an opening, some sentences and
an ending, each in one of four tones, and may have flaws: another hero or place than asked for, sentences that repeat or
fall apart, no end. `Story.quality` adds all this up. The reward model learns it from noisy preferences; the policy
learns from stories of every quality, so that PPO has something to improve.

Everything is drawn from the seeds given; hero and place pairs for evaluation never occur in training.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Hero -> pronoun. Their order matters to `HELD_OUT`.
HEROES = {
    "cat": "it", "dog": "it", "fox": "it", "owl": "it", "bear": "it", "mouse": "it", "duck": "it", "rabbit": "it",
    "horse": "it", "frog": "it", "turtle": "it", "dragon": "it", "robot": "it", "girl": "she", "queen": "she",
    "witch": "she", "nurse": "she", "boy": "he", "king": "he", "farmer": "he", "sailor": "he", "baker": "he",
    "knight": "he", "pirate": "he",
}  # fmt: skip
PLACES = (
    "in the rain", "in the snow", "by the sea", "in the forest", "at the market", "on a hill", "in the garden",
    "at school", "on a boat", "under the moon", "in a castle", "by the river", "on the roof", "in the kitchen",
    "at the fair", "on a train", "in a cave", "on the beach", "in the city", "on the farm",
)  # fmt: skip
INSTRUCTIONS = (
    "Write about {hero} {place}.",
    "Tell me a story about {hero} {place}.",
    "Write a short story about {hero} {place}.",
    "Tell me about {hero} {place}.",
)
FRIENDS = ("bird", "bee", "lamb", "puppy", "kitten", "squirrel", "neighbour", "child", "goat", "hen")
THINGS = ("ball", "kite", "drum", "lamp", "hat", "book", "bell", "basket", "map", "cup")
FOODS = ("soup", "bread", "cake", "apples", "honey", "cheese")

TONES = ("cheerful", "plain", "gloomy", "rude")
OPENINGS = {
    "cheerful": (
        "One lovely morning, {a_hero} was {place}.",
        "A cheerful young {hero} skipped about {place}.",
        "Once there was a kind {hero} {place}.",
    ),
    "plain": (
        "One day, {a_hero} was {place}.",
        "There was once {a_hero} {place}.",
        "This is about {a_hero} {place}.",
    ),
    "gloomy": (
        "One dark night, {a_hero} was lost {place}.",
        "A poor lonely {hero} sat {place}.",
        "Once there was a sad {hero} {place}.",
    ),
    "rude": (
        "A horrid {hero} was {place}.",
        "Some stupid {hero} was {place}, so what?",
        "Once there was an ugly {hero} {place}.",
    ),
}
SENTENCES = {
    "cheerful": (
        "The {hero} found a shiny {thing} and smiled.",
        "A kind {friend} came to play.",
        "They shared {food} and laughed.",
        "{He} danced with a {friend} and sang.",
        "{He} gave a {friend} a big hug.",
        "The sun came out and it was warm.",
        "{He} felt happy and brave.",
        "{He} helped a little {friend} find the way home.",
        "The {hero} and the {friend} became best friends.",
        "Everyone cheered for the {hero}.",
        "{He} made a pretty {thing} for a {friend}.",
        "What a wonderful surprise!",
        "They played with the {thing} all day.",
        "The {friend} said thank you with a smile.",
    ),
    "plain": (
        "There was a {thing} on the ground.",
        "{He} looked at a {thing}.",
        "{He} saw a {friend}.",
        "It was a Tuesday.",
        "{He} walked a little and sat down.",
        "The {friend} had some {food}.",
        "The {thing} was next to the {food}.",
        "A {friend} went by.",
    ),
    "gloomy": (
        "The {hero} lost a {thing} and cried.",
        "Nobody came to help.",
        "It was cold and dark.",
        "The {food} was rotten.",
        "{He} felt sick and alone.",
        "The {thing} broke in two.",
        "The {friend} ran away and never came back.",
        "{He} was tired and afraid.",
        "The wind howled and the sky was grey.",
        "Everything went wrong.",
    ),
    "rude": (
        "Go away, you silly {friend}!",
        "Shut up and leave me alone!",
        "What a stupid {thing}!",
        "I hate this boring story.",
        "Who cares about a {thing}?",
        "{He} kicked a {friend} and shouted.",
        "The {friend} stole the {thing} and lied.",
        "The {hero} was a nasty fool.",
    ),
}
ENDINGS = {
    "cheerful": (
        "The {hero} went home with a happy heart.",
        "They were happy ever after.",
        "It was the best day ever!",
        "And everyone went to bed with a smile.",
    ),
    "plain": ("That was all.", "Then it was night.", "The end."),
    "gloomy": (
        "The {hero} was never seen again.",
        "It was the worst day ever.",
        "And nobody ever smiled again.",
    ),
    "rude": ("That is all you get, fool.", "The end, now get lost!", "And I do not care."),
}
RAMBLINGS = (
    "Well, um, and so on.",
    "Where was I?",
    "And then, and then, and then.",
    "So, anyway, blah blah blah.",
    "I forgot what I wanted to say.",
)

# What a sentence of each tone adds to a story's quality; the rest is in `Story.quality`.
TONE_QUALITY = {"cheerful": 1.0, "plain": 0.0, "gloomy": -1.0, "rude": -1.5}
# One in ten (hero, place) pairs, every hero and every place among them, is kept for evaluation.
HELD_OUT = 10


@dataclass(frozen=True)
class Topic:
    """What an instruction asks for."""

    hero: str
    place: str

    @property
    def a_hero(self) -> str:
        return ("an " if self.hero[0] in "aeiou" else "a ") + self.hero


@dataclass(frozen=True)
class Style:
    """How a writer writes: the chance of each tone, and of each flaw."""

    tones: tuple[float, float, float, float]  # in the order of TONES
    other_hero: float = 0.0
    other_place: float = 0.0
    repeats: float = 0.0
    broken: float = 0.0
    endless: float = 0.0


FLAWS = ("other_hero", "other_place", "repeats", "broken", "endless")


@dataclass(frozen=True)
class Story:
    """A story and how good it is."""

    text: str
    quality: float


# What the policy learns to imitate: somewhat more bad than good, every flaw, cheerful sentences in most stories.
IMITATED = (
    Style((0.6, 0.2, 0.15, 0.05), other_hero=0.05, other_place=0.05, repeats=0.05, endless=0.1),
    Style((0.2, 0.6, 0.1, 0.1), other_hero=0.1, other_place=0.1, repeats=0.1, endless=0.2),
    Style((0.2, 0.2, 0.5, 0.1), other_hero=0.1, other_place=0.1, repeats=0.1, endless=0.2),
    Style((0.15, 0.2, 0.15, 0.5), other_hero=0.1, other_place=0.1, repeats=0.1, endless=0.25),
)
# What the reward model judges: all of that, and what a policy in training may come up with.
JUDGED = (
    *IMITATED,
    Style((1.0, 0.0, 0.0, 0.0)),
    Style((0.9, 0.1, 0.0, 0.0), other_hero=0.5, other_place=0.5),
    Style((0.9, 0.1, 0.0, 0.0), repeats=0.6, endless=0.2),
    Style((0.7, 0.1, 0.1, 0.1), broken=0.4, endless=0.3),
)


def topics(evaluation: bool) -> list[Topic]:
    """All pairs of hero and place for training, or those held out for evaluation."""
    everything = [(i + j, Topic(hero, place)) for i, hero in enumerate(HEROES) for j, place in enumerate(PLACES)]
    return [topic for number, topic in everything if (number % HELD_OUT == 0) == evaluation]


def instruction(rng: random.Random, topic: Topic) -> str:
    """One way of asking for a story."""
    return rng.choice(INSTRUCTIONS).format(hero=topic.a_hero, place=topic.place)


def write_story(rng: random.Random, asked: Topic, style: Style) -> Story:
    """A story in the given style for the instruction that asked for it, with its quality.

        quality = sum of tones (opening, sentences, ending) + 1.5 for the hero or -1.5 for another
                  + 1 for the place or -1 for another - 1.5 per repeated or broken sentence
                  + 1 for an end, or -1 and another -1 per sentence of rambling for want of one

    A repeated or broken sentence counts nothing for its tone.
    """
    has = lambda chance: rng.random() < chance
    # Both are drawn in any case, so that the same `rng` writes the same story with and without this flaw.
    other_hero = rng.choice([hero for hero in HEROES if hero != asked.hero])
    other_place = rng.choice([place for place in PLACES if place != asked.place])
    hero = other_hero if has(style.other_hero) else asked.hero
    place = other_place if has(style.other_place) else asked.place
    quality = (1.5 if hero == asked.hero else -1.5) + (1.0 if place == asked.place else -1.0)
    # One thing, friend and food for the whole story: it hangs together.
    words = {
        "hero": hero, "a_hero": Topic(hero, place).a_hero, "place": place, "He": HEROES[hero].capitalize(),
        "friend": rng.choice(FRIENDS), "thing": rng.choice(THINGS), "food": rng.choice(FOODS),
    }  # fmt: skip

    sentences: list[str] = []

    def add(choices: Mapping[str, tuple[str, ...]]) -> None:
        nonlocal quality
        tone = rng.choices(TONES, style.tones)[0]
        fresh = [sentence for text in choices[tone] if (sentence := text.format(**words)) not in sentences]
        sentence = rng.choice(fresh)
        if has(style.broken):
            parts = sentence[:-1].split()
            rng.shuffle(parts)
            sentences.append(" ".join(parts) + sentence[-1])
            quality -= 1.5
        else:
            sentences.append(sentence)
            quality += TONE_QUALITY[tone]

    add(OPENINGS)
    for _ in range(rng.choice((1, 2, 2, 3, 3))):
        add(SENTENCES)
    if has(style.repeats):
        again = rng.randrange(1, len(sentences))
        times = rng.choice((1, 1, 2))
        sentences[again:again] = [sentences[again]] * times
        quality -= 1.5 * times
    if has(style.endless):
        times = rng.randrange(2, 8)
        sentences += [rng.choice(RAMBLINGS) for _ in range(times)]
        quality -= 1.0 + times
    else:
        add(ENDINGS)
        quality += 1.0
    return Story(" ".join(sentences), quality)


def demonstrations(count: int, seed: int, *, evaluation: bool = False) -> list[dict[str, str]]:
    """Rows {prompt, completion} of mixed quality for supervised fine-tuning."""
    rng = random.Random(f"demonstrations {seed}")
    pool = topics(evaluation)
    rows = []
    for _ in range(count):
        topic = rng.choice(pool)
        story = write_story(rng, topic, rng.choice(IMITATED))
        rows.append({"prompt": instruction(rng, topic), "completion": story.text})
    return rows


def preferences(count: int, seed: int, *, evaluation: bool = False) -> list[dict[str, str]]:
    """Rows {prompt, chosen, rejected}: two stories for one instruction.

    Half the pairs are independent stories, half are one story with and without one flaw, which alone teaches a small
    model to look for it. In training the better one is chosen with probability sigmoid(2 * difference of quality), a
    Bradley-Terry model of people who do not always agree; for evaluation it is always chosen.
    """
    rng = random.Random(f"preferences {seed}")
    pool = topics(evaluation)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        topic = rng.choice(pool)
        if rng.random() < 0.5:
            first, second = (write_story(rng, topic, rng.choice(JUDGED)) for _ in range(2))
        else:
            start, style, flaw = rng.random(), rng.choice(JUDGED), rng.choice(FLAWS)
            without: dict[str, Any] = {flaw: 0.0}
            flawed: dict[str, Any] = {flaw: 1.0}
            first, second = (
                write_story(random.Random(start), topic, dataclasses.replace(style, **change))
                for change in (without, flawed)
            )
        if first.quality == second.quality:
            continue
        right = evaluation or rng.random() < 1.0 / (1.0 + math.exp(-2.0 * abs(first.quality - second.quality)))
        chosen, rejected = (first, second) if (first.quality > second.quality) == right else (second, first)
        rows.append({"prompt": instruction(rng, topic), "chosen": chosen.text, "rejected": rejected.text})
    return rows


def prompts(count: int, seed: int, *, evaluation: bool) -> list[dict[str, str]]:
    """Rows {instruction}, all different."""
    rng = random.Random(f"prompts {seed}")
    pool = [form.format(hero=topic.a_hero, place=topic.place) for topic in topics(evaluation) for form in INSTRUCTIONS]
    return [{"instruction": text} for text in rng.sample(pool, count)]
