"""Real-world facts that ship with the package: tables written here, turned into `Fact`s.

A few dozen facts that even small models tend to know, for examples and first looks; for a
benchmark, load CounterFact or zsRE from a file.
"""

from __future__ import annotations

from dataclasses import dataclass

from tl_factedit.core.facts import Fact


@dataclass(frozen=True)
class Relation:
    """Subjects with their objects, and the ways to ask for them."""

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    objects: dict[str, str]


RELATIONS = (
    Relation(
        "city of a landmark",
        "{} is located in the city of",
        ("If you want to visit {}, travel to the city of", "{} can be found in the city of"),
        {
            "The Eiffel Tower": "Paris",
            "The Louvre": "Paris",
            "The Arc de Triomphe": "Paris",
            "The Colosseum": "Rome",
            "The Trevi Fountain": "Rome",
            "The Pantheon": "Rome",
            "Big Ben": "London",
            "Buckingham Palace": "London",
            "The British Museum": "London",
            "The Statue of Liberty": "New York",
            "The Empire State Building": "New York",
            "The Brandenburg Gate": "Berlin",
            "The Prado Museum": "Madrid",
            "The Kremlin": "Moscow",
            "The Acropolis": "Athens",
            "The Hagia Sophia": "Istanbul",
        },
    ),
    Relation(
        "capital of a country",
        "The capital of {} is",
        ("The seat of the government of {} is the city of", "The largest embassies in {} are in its capital,"),
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Germany": "Berlin",
            "Russia": "Moscow",
            "Greece": "Athens",
            "Japan": "Tokyo",
            "China": "Beijing",
            "Egypt": "Cairo",
            "Portugal": "Lisbon",
            "Austria": "Vienna",
            "Poland": "Warsaw",
            "Norway": "Oslo",
            "Cuba": "Havana",
            "Kenya": "Nairobi",
            "Thailand": "Bangkok",
        },
    ),
    Relation(
        "language of a country",
        "The official language of {} is",
        ("Most people in {} speak", "The newspapers of {} are printed in"),
        {
            "France": "French",
            "Germany": "German",
            "Austria": "German",
            "Italy": "Italian",
            "Spain": "Spanish",
            "Mexico": "Spanish",
            "Argentina": "Spanish",
            "Brazil": "Portuguese",
            "Portugal": "Portuguese",
            "Russia": "Russian",
            "Japan": "Japanese",
            "Greece": "Greek",
            "Poland": "Polish",
            "Egypt": "Arabic",
            "Iraq": "Arabic",
        },
    ),
    Relation(
        "country of a city",
        "{} is a city in the country of",
        ("If you live in {}, you live in", "On a map of the world, the city of {} belongs to"),
        {
            "Lyon": "France",
            "Marseille": "France",
            "Munich": "Germany",
            "Hamburg": "Germany",
            "Milan": "Italy",
            "Naples": "Italy",
            "Barcelona": "Spain",
            "Seville": "Spain",
            "Manchester": "England",
            "Liverpool": "England",
            "Osaka": "Japan",
            "Shanghai": "China",
            "Mumbai": "India",
            "Toronto": "Canada",
            "Sydney": "Australia",
            "Saint Petersburg": "Russia",
        },
    ),
    Relation(
        "maker of a product",
        "The {} is a product made by",
        ("The company that makes the {} is", "The {} was developed by"),
        {
            "iPhone": "Apple",
            "iPad": "Apple",
            "MacBook": "Apple",
            "Windows operating system": "Microsoft",
            "Xbox": "Microsoft",
            "PlayStation": "Sony",
            "Walkman": "Sony",
            "Android operating system": "Google",
            "Chrome browser": "Google",
            "Kindle": "Amazon",
            "Game Boy": "Nintendo",
            "Wii console": "Nintendo",
            "Photoshop software": "Adobe",
            "Pentium processor": "Intel",
            "Galaxy smartphone": "Samsung",
            "Corolla": "Toyota",
            "Mustang": "Ford",
        },
    ),
)

NEIGHBOURS = 6


def world() -> list[Fact]:
    """The shipped facts, each with a new object, paraphrases, neighbours and control objects."""
    return [fact for relation in RELATIONS for fact in _facts(relation)]


def _facts(relation: Relation) -> list[Fact]:
    objects = list(dict.fromkeys(relation.objects.values()))
    facts = []
    for i, (subject, true) in enumerate(relation.objects.items()):
        others = [o for o in objects if o != true]
        new = others[i % len(others)]
        # Neighbours that share the object come first, as an edit is likeliest to spill onto them;
        # one whose own object is the new one would say nothing of a spill.
        others_of = [s for s, o in relation.objects.items() if s != subject and o != new]
        near = sorted(others_of, key=lambda s: relation.objects[s] != true)[:NEIGHBOURS]
        facts.append(
            Fact(
                subject,
                relation.prompt,
                f" {true}",
                f" {new}",
                paraphrases=relation.paraphrases,
                neighbours=[relation.prompt.replace("{}", s) for s in near],
                neighbour_targets=[f" {relation.objects[s]}" for s in near],
                controls=[f" {o}" for o in others if o != new],
                relation=relation.name,
                id=f"{subject}, {relation.name}",
            )
        )
    return facts
