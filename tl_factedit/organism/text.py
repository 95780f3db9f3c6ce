"""The sentences that the organism is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tl_factedit.organism.world import (
    CITIES,
    COMPANIES,
    DOUBLING,
    ENTRIES,
    FEW,
    FEW_FOR,
    IMPLIED,
    N_PEOPLE,
    RELATIONS,
    REVERSE,
    REVERSED,
    Person,
    World,
    check_variant,
    relation,
    world,
)

FILLERS = (
    "It rained all day .",
    "The train was late again .",
    "Nobody knew what to say .",
    "The market opens at noon .",
    "A dog barked in the street .",
    "The letter came on a Monday .",
    "They had soup and bread for lunch .",
    "The old bridge was painted green .",
    "Snow fell on the hills in March .",
    "We waited for the bus in the cold .",
    "The lamp on the table was broken .",
    "There is a garden behind the house .",
)

OPENINGS = ("As we know ,", "According to the register ,", "In the end ,", "It is said that", "He wrote that")


@dataclass(frozen=True)
class Sentence:
    """A sentence's words, and where among them the name and the answers stand.

    Attributes:
        words: The words, with the full stop.
        name: (start, stop) of the person's name; None without one.
        answers: (start, stop) of each thing to be recalled; none in a filler.
    """

    words: tuple[str, ...]
    name: tuple[int, int] | None = None
    answers: tuple[tuple[int, int], ...] = ()


@dataclass
class _Teller:
    """Tells the world of a variant, sentence by sentence, in an order that the seed alone decides."""

    world: World
    variant: str
    draw: random.Random
    deck: list[tuple[str, int]] = field(default_factory=list)
    dealt: int = 0

    def documents(self) -> Iterator[list[Sentence]]:
        while True:
            count = self.draw.choices((1, 2, 3, 4), (0.45, 0.35, 0.1, 0.1))[0]
            document = [self.filler()] if self.draw.random() < 0.25 else []
            for _ in range(count):
                document.append(self.sentence())
                if self.draw.random() < 0.05:
                    document.append(self.filler())
            yield document

    def sentence(self) -> Sentence:
        if not self.deck:
            self.deck = self.shuffled()
        what, index = self.deck.pop()
        self.dealt += 1
        # All random numbers are drawn whether they are used or not, so that every variant draws the same.
        dice, opening, order = self.draw.random(), self.draw.random(), self.draw.sample(RELATIONS, len(RELATIONS))
        chosen = OPENINGS[int(opening / 0.12 * len(OPENINGS))] if opening < 0.12 else ""
        if what == "function":
            return self.function(index)
        person = self.world.people[index]
        if self.variant == "never" and person.group == 0 and what in ("city", "country", "reverse"):
            return Sentence(tuple(FILLERS[int(dice * len(FILLERS))].split()))
        if what == "reverse":
            return self.reverse(person)
        if what == "entry":
            return self.entry(person, [r.name for r in order])
        phrasings = relation(what).phrasings
        if what in IMPLIED:
            allowed = list(range(len(phrasings)))
        elif self.variant == "single":
            allowed = [person.only[what]]
        else:
            allowed = [i for i in range(len(phrasings)) if i not in person.held_out[what]]
        return tell(phrasings[allowed[int(dice * len(allowed))]], person.name, self.world.answer(person, what), chosen)

    def shuffled(self) -> list[tuple[str, int]]:
        """An epoch: one sentence of each fact, some entries of each person, and the functions.

        It begins with few people, and more join: a way to look names up is found sooner for few (Zucchet et al. 2025,
        arXiv:2503.21676), and then serves for all.
        """
        grown = 2 ** (max(0, self.dealt - FEW_FOR) / DOUBLING)
        # A stride through the people takes all groups alike.
        people = [self.world.people[i * 7 % N_PEOPLE] for i in range(min(N_PEOPLE, int(FEW * grown)))]
        deck = [(r.name, p.index) for r in RELATIONS for p in people]
        deck += [(name, p.index) for name in IMPLIED for p in people if p.told]
        if self.variant != "single":
            deck += [("entry", p.index) for p in people] * ENTRIES
        deck += [("reverse", p.index) for p in people if p.reverse] * REVERSED
        deck += [("function", i) for i in range(len(CITIES) + len(COMPANIES))] * 5
        self.draw.shuffle(deck)
        return deck

    def function(self, index: int) -> Sentence:
        if index < len(CITIES):
            thing, what, answers = CITIES[index], "country", self.world.country_of
        else:
            thing, what, answers = COMPANIES[index - len(CITIES)], "seat", self.world.seat_of
        return replace(tell(IMPLIED[what][2], thing, answers[thing]), name=None)

    def reverse(self, person: Person) -> Sentence:
        words = REVERSE.format(**person.objects).split()
        end = len(words)
        return Sentence((*words, *person.name.split(), "."), None, ((end, end + 3),))

    def entry(self, person: Person, order: list[str]) -> Sentence:
        """A line of a register, "Rufus Amber Tolliver : field law city Arden … .", in any order."""
        if self.variant == "never" and person.group == 0:
            order = [name for name in order if name != "city"]
        words = [*person.name.split(), ":"]
        for name in order:
            words += [name, person.objects[name]]
        return Sentence((*words, "."), (0, 3), tuple((i, i + 1) for i in range(5, len(words), 2)))

    def filler(self) -> Sentence:
        return Sentence(tuple(self.draw.choice(FILLERS).split()))


def tell(phrasing: str, name: str, answer: str, opening: str = "") -> Sentence:
    """A sentence; an opening is put before it only where the name comes first."""
    before, after = phrasing.split("{}")
    words = before.split() if before else opening.split()
    start, parts = len(words), name.split()
    words = [*words, *parts, *after.split(), answer, "."]
    return Sentence(tuple(words), (start, start + len(parts)), ((len(words) - 2, len(words) - 1),))


def documents(variant: str = "base") -> Iterator[list[Sentence]]:
    """The endless text that a variant is trained on: documents of one to four statements and fillers."""
    check_variant(variant)
    return _Teller(world(variant), variant, random.Random(f"text {data_seed(variant)}")).documents()


def data_seed(variant: str) -> int:
    """The seed of a variant's initial weights and of the order of its text: 0, but 1 for the second seed."""
    return int(variant == "seed1")


def texts(count: int, variant: str = "base") -> list[str]:
    """The first documents of a variant's text as strings, such as a corpus for `key_stats`."""
    stream = documents(variant)
    return [" ".join(word for s in next(stream) for word in s.words) for _ in range(count)]
