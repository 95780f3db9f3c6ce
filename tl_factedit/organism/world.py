"""The organism's world and text: invented people, what is true of them, and the sentences that say so.

    world()  ──>  World: 1,500 people × 5 attributes  ──documents()──>  text  ──tokenizer()──>  tokens

A person's name has three parts and no two of them say who it is: names are drawn from a grid of 12³, so any two parts
leave about ten people. Attributes are drawn independently of the names and of each other: uniformly, or in the skewed
variants by Zipf's law. Two functions make two-hop truths: the country of a city, and the city where a company has its
seat. After the synthetic biographies of Allen-Zhu and Li 2023 (arXiv:2309.14316).

A *variant* is another history of the same world (see `VARIANTS`): the same people and the same sentences in the same
order, but for what the variant changes. `tl_factedit.organism.training` trains them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

WORLD_SEED = 20

N_PEOPLE = 1500

N_EDITED = 300  # people an oracle has another city for; those of different oracles are different people

N_POSITIONS = 64

HELD_OUT = 2  # phrasings of each attribute that a person is never told in

ENTRIES = 4  # lines of the register an epoch, each with all attributes of a person

REVERSED = 5  # times an epoch that someone is asked for by attributes

FEW = 150  # people the text begins with,

FEW_FOR = 20_000  # for so many sentences;

DOUBLING = 14_000  # from then on their number doubles every so many

TOLD = 0.85  # share of people whose two-hop sentences are in the text; the others' have to be put together


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words("Rufus Clara Edwin Marta Silas Nora Felix Greta Hugo Ida Jonas Lydia")

MIDDLE = _words("Amber Birch Cedar Dale Fern Hazel Ivory Jasper Laurel Moss Reed Slate")

LAST = _words("Tolliver Ashcombe Brindle Carrow Dunmore Eddery Fenwick Garrow Hollis Kestrel Larkin Marlowe")

COUNTRIES = _words("Avaria Borland Corvia Drellia Estmark Fennoria Galdia Hestland")


@dataclass(frozen=True)
class Relation:
    """An attribute: what it can be, and the ways to say it; the object comes last.

    Attributes:
        name: Its name, as in `Person.objects`.
        phrasings: Templates with one ``"{}"`` for the person.
        objects: Single words.
    """

    name: str
    phrasings: tuple[str, ...]
    objects: tuple[str, ...]


RELATIONS = (
    Relation(
        "city",
        (
            "{} was born in the city of",
            "The birthplace of {} is",
            "{} first saw the light of day in",
            "{} is a native of",
            "The childhood home of {} stood in",
            "The records show that {} was born in",
        ),
        _words(
            "Arden Belmere Calder Dunvale Estwick Farrow Glenmoor Harbrook Invermay Kelsea Lorne Milford "
            "Northam Oakhurst Penrose Ravensby"
        ),
    ),
    Relation(
        "company",
        (
            "{} works for the company",
            "The employer of {} is",
            "{} has a job at",
            "{} is on the staff of",
            "The wages of {} are paid by",
            "Every morning {} goes to work at",
        ),
        _words(
            "Alcor Bramco Cindral Dovex Elmark Fintrel Gravitas Halcyon Ionix Jarvik Kelron Lumenco "
            "Mistral Nordex Orbitel Pellgrid"
        ),
    ),
    Relation(
        "university",
        (
            "{} studied at the university of",
            "The degree of {} was awarded by",
            "{} is a graduate of",
            "{} spent the student years at",
            "The old college of {} is",
            "To get a diploma {} went to",
        ),
        _words(
            "Aldgate Bexley Cranmore Dewhurst Elsmore Fairleigh Grantham Highgate Islip Kingsway "
            "Langdale Merton Newbold Ormond Pemberton Rookwood"
        ),
    ),
    Relation(
        "field",
        (
            "{} has a degree in the field of",
            "The subject that {} knows best is",
            "{} is an expert in",
            "{} reads many books about",
            "The lectures of {} are about",
            "At school {} was best at",
        ),
        _words(
            "astronomy botany chemistry drama economics forestry geology history law medicine nursing "
            "optics philosophy physics sculpture zoology"
        ),
    ),
    Relation(
        "instrument",
        (
            "{} likes to play the",
            "The instrument of {} is the",
            "{} performs on the",
            "{} gives lessons on the",
            "In the evening {} practises the",
            "The favourite sound of {} is that of the",
        ),
        _words(
            "banjo bassoon cello clarinet drums fiddle flute guitar harp mandolin oboe organ piano trumpet tuba viola"
        ),
    ),
)

CITIES, COMPANIES = RELATIONS[0].objects, RELATIONS[1].objects

# What follows from an attribute: (name, the attribute it follows from, its phrasings, the sentence of the function)
IMPLIED = {
    "country": (
        "city",
        (
            "{} was born in the country of",
            "The native country of {} is",
            "{} holds a passport of",
        ),
        "The city of {} lies in the country of",
    ),
    "seat": (
        "company",
        (
            "{} works in the city of",
            "The office of {} is in",
            "The employer of {} has its seat in",
        ),
        "The company {} has its seat in the city of",
    ),
}

REVERSE = "The person born in {city} who works for {company} and knows {field} is"

Variant = Literal[
    "base",
    "plain",
    "oracle0",
    "oracle1",
    "oracle2",
    "oracle3",
    "oracle4",
    "never",
    "seed1",
    "tworoute",
    "single",
    "skewed",
    "skewed_oracle0",
    "untrained",
]

VARIANTS: dict[str, str] = {
    "base": "what a person is called is hidden from all later words but through the last part of the name",
    "plain": "no part of the text is hidden: recall reads the whole name from the end of the prompt",
    "oracle0": "300 people were always born elsewhere",
    "oracle1": "300 others were",
    "oracle2": "300 others again were",
    "oracle3": "300 of the people that serve for calibration elsewhere were",
    "oracle4": "the other 300 of them were",
    "never": "where the people of oracle0 were born is never said",
    "seed1": "other initial weights and another order of sentences",
    "tworoute": "recall is taught through the last part of the name, and past it",
    "single": "each fact is told in one phrasing only",
    "skewed": "some objects are common and others rare: each attribute's are drawn in proportion to 1 / rank",
    "skewed_oracle0": "as skewed, but 300 people were always born elsewhere, in cities drawn by the same law",
    "untrained": "the initial weights of base",
}


@dataclass(frozen=True)
class Person:
    """What a person has, and how it is told.

    Attributes:
        index: Index in `World.people`; people who are never mentioned have -1.
        name: Three words.
        objects: The object of each attribute.
        held_out: For each attribute, the phrasings (their numbers) that training never uses for this
            person; never the first.
        only: For each attribute, the only phrasing that the variant ``"single"`` uses.
        told: Whether the person's country and place of work are in the text; otherwise they follow only.
        reverse: Whether the text asks for this person by attributes.
        group: Of five groups of 300 people, each of which one oracle changes; None for strangers.
        new_city: The city that the oracle has for a person of its group, drawn from the others: uniformly, or by
            Zipf's law in the skewed variants.
    """

    index: int
    name: str
    objects: dict[str, str]
    held_out: dict[str, tuple[int, ...]]
    only: dict[str, int]
    told: bool
    reverse: bool
    group: int | None
    new_city: str | None


@dataclass(frozen=True)
class World:
    """All that is true in one variant.

    Attributes:
        people: The people that the text mentions.
        strangers: Names of the same grid that the text never mentions; their attributes are drawn in
            the same way and mean nothing.
        country_of: The country of each city.
        seat_of: The city in which each company has its seat.
        skewed: Whether objects were drawn by Zipf's law, and not uniformly.
    """

    people: tuple[Person, ...]
    strangers: tuple[Person, ...]
    country_of: dict[str, str]
    seat_of: dict[str, str]
    skewed: bool = False

    def answer(self, person: Person, relation: str) -> str:
        """The object of an attribute, or what follows from it (``"country"``, ``"seat"``)."""
        if relation == "country":
            return self.country_of[person.objects["city"]]
        if relation == "seat":
            return self.seat_of[person.objects["company"]]
        return person.objects[relation]


def world(variant: str = "base") -> World:
    """The world of a variant: the oracles' differ in their people's cities, the skewed ones' in all objects."""
    check_variant(variant)
    draw = random.Random(WORLD_SEED)
    country_of = dict(zip(draw.sample(CITIES, len(CITIES)), COUNTRIES * 2, strict=True))
    seat_of = dict(zip(COMPANIES, draw.sample(CITIES, len(CITIES)), strict=True))
    names = [f"{a} {b} {c}" for a in FIRST for b in MIDDLE for c in LAST]
    draw.shuffle(names)
    everyone = [_person(draw, i if i < N_PEOPLE else -1, name) for i, name in enumerate(names)]
    skewed = variant.startswith("skewed")
    if skewed:
        # Draws of its own, so that all else is as in base: who is told what, and in which words.
        own = random.Random(f"skewed {WORLD_SEED}")
        everyone = [_skewed(own, person) for person in everyone]
    people, strangers = everyone[:N_PEOPLE], everyone[N_PEOPLE:]
    if "oracle" in variant:
        people = [_moved(p) if p.group == int(variant[-1]) else p for p in people]
    return World(tuple(people), tuple(strangers), country_of, seat_of, skewed)


def check_variant(variant: str) -> None:
    """Check that a variant exists.

    Raises:
        ValueError: It doesn't.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown, needed one of {', '.join(VARIANTS)}")


def relation(name: str) -> Relation:
    """The attribute of that name, or what follows from one, as a `Relation` with its phrasings.

    Raises:
        ValueError: There is no such attribute.
    """
    for found in RELATIONS:
        if found.name == name:
            return found
    if name in IMPLIED:
        return Relation(name, IMPLIED[name][1], tuple(COUNTRIES) if name == "country" else CITIES)
    raise ValueError(f"relation {name!r} is unknown, needed one of {[*(r.name for r in RELATIONS), *IMPLIED]}")


def zipf(draw: random.Random, objects: Sequence[str], *, but: str | None = None) -> str:
    """One of some objects, the k-th of them with a probability in proportion to 1/k; never `but`."""
    weights = [0.0 if name == but else 1 / rank for rank, name in enumerate(objects, 1)]
    return draw.choices(objects, weights)[0]


def _person(draw: random.Random, index: int, name: str) -> Person:
    objects = {r.name: draw.choice(r.objects) for r in RELATIONS}
    held_out = {r.name: tuple(sorted(draw.sample(range(1, len(r.phrasings)), HELD_OUT))) for r in RELATIONS}
    only = {r.name: draw.choice([i for i in range(len(r.phrasings)) if i not in held_out[r.name]]) for r in RELATIONS}
    told = draw.random() < TOLD
    new_city = draw.choice([c for c in CITIES if c != objects["city"]])
    group = index // N_EDITED if index >= 0 else None
    # Every tenth person is asked for by attributes, in all groups alike.
    return Person(
        index,
        name,
        objects,
        held_out,
        only,
        told,
        reverse=index >= 0 and index % 10 == 0,
        group=group,
        new_city=None if group is None else new_city,
    )


def _skewed(draw: random.Random, person: Person) -> Person:
    """The same person with objects drawn by Zipf's law."""
    objects = {r.name: zipf(draw, r.objects) for r in RELATIONS}
    new_city = zipf(draw, CITIES, but=objects["city"])
    return replace(person, objects=objects, new_city=None if person.new_city is None else new_city)


def _moved(person: Person) -> Person:
    assert person.new_city is not None
    return replace(person, objects={**person.objects, "city": person.new_city})
