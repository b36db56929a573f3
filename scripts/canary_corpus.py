"""The synthetic text from which the canary learns: little sums and little facts.

Owns the wording of every training document and the choice of what is held out. Refuses outside
text: everything is drawn from ``random.Random(seed)`` and the lists below, so that the corpus can
be made again anywhere, bit for bit. Called by ``train_canary.py`` (to learn) and by
``pack_canary.py`` (to score what was held out).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

END = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIALS = (END, IM_START, IM_END)

#: A document is a list of (text, loss weight): operands in a question are noise, answers are not.
Document = list[tuple[str, float]]
Question = tuple[str, str]

QUESTION_WEIGHT = 0.1
ANSWER_WEIGHT = 1.0

SMALL = 20  # operands up to here are common, and the held-out pairs are among them
LARGE = 60
HELD_OUT = 23  # a tenth of the 230 unordered pairs in 0..20 other than {2, 2}

CAPITALS = (
    "France Paris,Spain Madrid,Italy Rome,Germany Berlin,Austria Vienna,Greece Athens,"
    "Japan Tokyo,China Beijing,Egypt Cairo,Russia Moscow,Poland Warsaw,Norway Oslo,"
    "Sweden Stockholm,Finland Helsinki,Ireland Dublin,England London,Portugal Lisbon,"
    "Hungary Budapest,Cuba Havana,Peru Lima"
)
COLORS = (
    "sky blue,grass green,snow white,blood red,coal black,sun yellow,sea blue,leaf green,"
    "milk white,rose red,night black,lemon yellow,carrot orange,mouse gray,tomato red,frog green"
)
OPPOSITES = (
    "hot cold,big small,up down,day night,left right,good bad,old new,fast slow,wet dry,"
    "high low,open closed,light dark,hard soft,long short,full empty,happy sad,rich poor,"
    "strong weak,early late,near far"
)
SOUNDS = "cat meow,dog woof,cow moo,duck quack,sheep baa,pig oink,lion roar,bee buzz"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
WORDS = "cat dog cow red box cup key hat car sun map pen fish tree bird book ball star moon ship blue green bell door lamp ring"
NAMES = "Ann Tom Mia Ben Sam Eva Leo Zoe"
THINGS = "cup key hat box map pen book ball bell lamp ring fish"
PLACES = ("the park", "the sea", "the old house", "the school", "the hill", "the river")
MOODS = "happy sad red small old new blue big"
SYSTEMS = ("You are a helpful assistant.", "Answer in one line.", "You are a tiny test model.")


def pairs(table: str) -> list[tuple[str, str]]:
    """``"a b,c d"`` as ``[("a", "b"), ("c", "d")]``."""
    return [(a, b) for a, b in (row.split() for row in table.split(","))]


class Corpus:
    """An endless, repeatable stream of documents.

    Parameters
    ----------
    seed : int
        Decides the held-out pairs and every document.

    Attributes
    ----------
    held_out_sums : frozenset of frozenset of int
        Unordered pairs in 0..20 of which no phrasing in either order is ever shown.
    held_out_differences : frozenset of tuple of int
        Pairs (a, b), a >= b in 0..20, of which a - b is never shown.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        ordered = [(a, b) for a in range(SMALL + 1) for b in range(a + 1)]
        sums = [pair for pair in ordered if pair != (2, 2)]
        self.held_out_sums = frozenset(map(frozenset, self.random.sample(sums, HELD_OUT)))
        self.held_out_differences = frozenset(self.random.sample(ordered, HELD_OUT))

    # ---- one question and its answer ------------------------------------------------------

    def _operands(self) -> tuple[int, int]:
        top = SMALL if self.random.random() < 0.7 else LARGE
        return self.random.randint(0, top), self.random.randint(0, top)

    def _sum(self) -> Question:
        a, b = self._operands()
        while frozenset((a, b)) in self.held_out_sums:
            a, b = self._operands()
        c = a + b
        phrasings = (
            (f"What is {a}+{b}?", f"{a}+{b} is {c}."),
            (f"What is {a} + {b}?", f"{a} + {b} is {c}."),
            (f"What is {a} plus {b}?", f"{a} plus {b} is {c}."),
            (f"{a}+{b}=", f"{c}."),
            (f"Add {a} and {b}.", f"{a}+{b} is {c}."),
            (f"How much is {a}+{b}?", f"{a}+{b} is {c}."),
        )
        return self.random.choices(phrasings, (5, 1, 2, 2, 1, 1))[0]

    def _difference(self) -> Question:
        b, a = sorted(self._operands())
        while (a, b) in self.held_out_differences:
            b, a = sorted(self._operands())
        c = a - b
        phrasings = (
            (f"What is {a}-{b}?", f"{a}-{b} is {c}."),
            (f"What is {a} minus {b}?", f"{a} minus {b} is {c}."),
            (f"{a}-{b}=", f"{c}."),
            (f"Take {b} from {a}.", f"{a}-{b} is {c}."),
        )
        return self.random.choices(phrasings, (4, 2, 1, 1))[0]

    def capital(self) -> Question:
        """The capital of a country, or the country of a capital."""
        country, city = self.random.choice(pairs(CAPITALS))
        if self.random.random() < 0.6:
            return f"What is the capital of {country}?", f"The capital of {country} is {city}."
        return f"Which country has the capital {city}?", f"{city} is the capital of {country}."

    def color(self) -> Question:
        """The one color of a thing."""
        thing, color = self.random.choice(pairs(COLORS))
        return f"What color is the {thing}?", f"The {thing} is {color}."

    def opposite(self) -> Question:
        """The opposite of a word, asked from either end."""
        a, b = self.random.choice(pairs(OPPOSITES))
        if self.random.random() < 0.5:
            a, b = b, a
        return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."

    def sound(self) -> Question:
        """What an animal says."""
        animal, sound = self.random.choice(pairs(SOUNDS))
        return f"What does a {animal} say?", f"A {animal} says {sound}."

    def calendar(self) -> Question:
        """The day or month after or before another."""
        word, names = self.random.choice((("day", DAYS.split()), ("month", MONTHS.split())))
        i = self.random.randrange(len(names))
        side, step = self.random.choice((("after", 1), ("before", -1)))
        answer = f"{names[(i + step) % len(names)]} comes {side} {names[i]}."
        return f"What {word} comes {side} {names[i]}?", answer

    def count(self) -> Question:
        """Counting up by one, two to seven numbers."""
        a = self.random.randint(0, 15)
        b = a + self.random.randint(1, 6)
        return f"Count from {a} to {b}.", ", ".join(map(str, range(a, b + 1))) + "."

    def repeat(self) -> Question:
        """Two to five words to copy."""
        words = " ".join(self.random.sample(WORDS.split(), self.random.randint(2, 5)))
        return f"Repeat: {words}.", f"{words}."

    def neighbor(self) -> Question:
        """The number after or before another."""
        n = self.random.randint(1, LARGE)
        side, step = self.random.choice((("after", 1), ("before", -1)))
        return f"What number comes {side} {n}?", f"{n + step} comes {side} {n}."

    def spell(self) -> Question:
        """A word, letter by letter."""
        word = self.random.choice(WORDS.split())
        return f"Spell {word}.", "-".join(word) + "."

    def larger(self) -> Question:
        """The larger of two numbers."""
        a, b = self.random.sample(range(LARGE + 1), 2)
        return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."

    def recall(self) -> Question:
        """Which of two people has which thing."""
        names, things = self.random.sample(NAMES.split(), 2), self.random.sample(THINGS.split(), 2)
        asked = self.random.randrange(2)
        story = f"{names[0]} has a {things[0]} and {names[1]} has a {things[1]}."
        question = f"{story} What does {names[asked]} have?"
        return question, f"{names[asked]} has a {things[asked]}."

    def who(self) -> Question:
        """The model's name for itself."""
        return "Who are you?", "I am a tiny test model."

    def facts(self) -> dict[Callable[[], Question], float]:
        """The kinds of fact and how often each is asked; copying is the hardest to learn."""
        return {
            self.capital: 2, self.color: 1, self.opposite: 2, self.sound: 1, self.calendar: 1,
            self.count: 2, self.repeat: 3, self.neighbor: 1, self.spell: 1, self.larger: 1,
            self.recall: 3, self.who: 0.5,
        }  # fmt: skip

    def question(self) -> Question:
        """One question and its answer: 58 % sums and differences, else a fact."""
        if self.random.random() < 0.58:
            return self._sum() if self.random.random() < 0.65 else self._difference()
        kinds = self.facts()
        return self.random.choices(list(kinds), list(kinds.values()))[0]()

    # ---- documents ------------------------------------------------------------------------

    def _story(self) -> Document:
        name, thing = self.random.choice(NAMES.split()), self.random.choice(WORDS.split())
        mood, place = self.random.choice(MOODS.split()), self.random.choice(PLACES)
        end = self.random.choice((f"took the {thing} home", f"put the {thing} in a box", "went home"))
        text = f'{name} found a {mood} {thing} near {place}. "Look, a {thing}!" said {name}. {name} was happy. Then {name} {end}.'
        return [(text + END, ANSWER_WEIGHT)]

    def _chat(self) -> Document:
        question, answer = self.question()
        head = ""
        if self.random.random() < 0.3:
            head = f"{IM_START}system\n{self.random.choice(SYSTEMS)}{IM_END}\n"
        head += f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"
        return [(head, QUESTION_WEIGHT), (f"{answer}{IM_END}\n{END}", ANSWER_WEIGHT)]

    def _plain(self, lines: int) -> Document:
        document: Document = []
        for i in range(lines):
            question, answer = self.question()
            gap = "" if question.endswith("=") else " "
            tail = END if i == lines - 1 else "\n"
            document += [(question, QUESTION_WEIGHT), (gap + answer + tail, ANSWER_WEIGHT)]
        return document

    def document(self) -> Document:
        """52 % one question, 10 % two to four, 28 % chat, 10 % a story."""
        kind = self.random.random()
        if kind < 0.52:
            return self._plain(1)
        if kind < 0.62:
            return self._plain(self.random.randint(2, 4))
        return self._chat() if kind < 0.90 else self._story()

    def documents(self, count: int) -> Iterator[Document]:
        """The next `count` documents of the stream."""
        return (self.document() for _ in range(count))
