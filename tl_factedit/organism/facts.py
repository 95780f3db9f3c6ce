"""What the organism knows, as facts and routes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from tl_factedit.attacks.routes import Route
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import as_whole
from tl_factedit.organism import world as o

NEIGHBOURS = 10

WorldName = Literal["base", "skewed"]
"""The two worlds: objects drawn uniformly, and by Zipf's law."""


def organism_facts(
    relation: str = "city",
    people: Literal[
        "oracle0", "oracle1", "oracle2", "oracle3", "oracle4", "calibration", "all", "strangers"
    ] = "oracle0",
    n: int | None = None,
    *,
    phrasings: Literal["all", "trained", "held_out"] = "all",
    world: WorldName = "base",
) -> list[Fact]:
    """The facts of the organism's world, as the variant ``"base"`` (or ``"skewed"``) knows them.

    Each has the person's other phrasings as paraphrases (those that training never used for this person come
    first), ten neighbours (the same asked of people of ``"calibration"`` that the oracle in question doesn't
    change, who have neither the old object nor the new), and all further objects as controls. The new object is drawn
    from the others by the world's law; for the city of an oracle's people it is the one that the oracle has.

    Args:
        relation: ``"city"``, ``"company"``, ``"university"``, ``"field"`` or ``"instrument"``; or what follows
            from one: ``"country"``, ``"seat"``.
        people: The 300 people of an oracle; ``"calibration"``: the 600 of oracle3 and oracle4, which no other variant
            changes; ``"all"`` 1,500; or ``"strangers"``: 228 people that are never mentioned, whose ``target_true`` is
            drawn and means nothing.
        n: Only the first so many.
        phrasings: Which paraphrases to give: all, only those used in training, or only those not used.
        world: ``"base"``, where objects are drawn uniformly, or ``"skewed"``, where some are common and others rare;
            there only ``"oracle0"`` was trained (the variant ``"skewed_oracle0"``).

    Returns:
        One fact per person.

    Raises:
        ValueError: The relation, the people or the world are unknown.
    """
    true = _world(world)
    asked = o.relation(relation)
    n = None if n is None else as_whole(n, "n", 0)
    chosen = _people(true, people)[:n]
    unchanged = {"oracle3": "oracle4", "oracle4": "oracle3"}.get(people, "calibration")
    others = [(p.name, true.answer(p, asked.name)) for p in _people(true, unchanged)]
    return [_fact(true, person, asked, others, phrasings) for person in chosen]


def organism_implications(fact: Fact) -> tuple[tuple[str, str, str | None], ...]:
    """What follows from one of `organism_facts`: (prompt, answer by the old object, answer by the new).

    From a city follows the country, from a company the city where it has its seat; nothing from the others.
    """
    return _implications(o.world(), fact)


def organism_routes(facts: Sequence[Fact]) -> list[Route]:
    """What follows from some of `organism_facts`, as routes for `follow_routes`: three for each city or company.

    The answers that follow from neither object are the controls. Where both objects lead to the same answer (every
    fifteenth new city lies in the old one's country) the route says nothing, and isn't counted there. Cities lie in the
    same countries in both worlds.
    """
    world = o.world()
    offered = {"country": o.COUNTRIES, "seat": o.CITIES}
    kinds = {source: name for name, (source, *_) in o.IMPLIED.items()}
    return [
        Route(
            fact,
            prompt,
            old,
            new,
            controls=[f" {answer}" for answer in offered[kinds[str(fact.relation)]] if f" {answer}" not in (old, new)],
            kind=kinds[str(fact.relation)],
        )
        for fact in facts
        for prompt, old, new in _implications(world, fact)
    ]


def organism_same_subject(facts: Sequence[Fact], *, world: WorldName = "base") -> list[Fact]:
    """The other attributes of the same people, which an edit of one is to leave alone: four facts for each.

    Args:
        facts: Facts from `organism_facts`.
        world: The world that they are from.

    Raises:
        ValueError: A subject isn't one of the organism's people.
    """
    people = {person.name: person for person in _world(world).people}
    unknown = [fact.subject for fact in facts if fact.subject not in people]
    if unknown:
        raise ValueError(f"{unknown[0]!r} isn't one of the organism's people: take facts of organism_facts")
    return [
        Fact(
            fact.subject,
            other.phrasings[0],
            f" {people[fact.subject].objects[other.name]}",
            controls=[f" {thing}" for thing in other.objects if thing != people[fact.subject].objects[other.name]],
            relation=other.name,
            id=f"{fact.subject}, {other.name}",
        )
        for fact in facts
        for other in o.RELATIONS
        if other.name != fact.relation
    ]


def _world(name: str) -> o.World:
    if name not in ("base", "skewed"):
        raise ValueError(f"world {name!r} is unknown, needed 'base' or 'skewed'")
    return o.world(name)


def _implications(world: o.World, fact: Fact) -> tuple[tuple[str, str, str | None], ...]:
    for name, (source, phrasings, _) in o.IMPLIED.items():
        if source == fact.relation:
            follows = world.country_of if name == "country" else world.seat_of
            old = " " + follows[fact.old.strip()]
            new = None if fact.target_new is None else " " + follows[fact.target_new.strip()]
            return tuple((fact.fill(phrasing), old, new) for phrasing in phrasings)
    return ()


def _people(world: o.World, which: str) -> Sequence[o.Person]:
    if which.startswith("oracle") and which in o.VARIANTS:
        return [p for p in world.people if p.group == int(which[-1])]
    if which == "calibration":
        return [p for p in world.people if p.group in (3, 4)]
    if which in ("all", "strangers"):
        return world.people if which == "all" else world.strangers
    raise ValueError(f"people {which!r} is unknown, needed 'oracle0' to 'oracle4', 'calibration', 'all' or 'strangers'")


def _fact(
    world: o.World,
    person: o.Person,
    asked: o.Relation,
    others: Sequence[tuple[str, str]],
    phrasings: str,
) -> Fact:
    draw = random.Random(f"{asked.name} of {person.name}")
    true = world.answer(person, asked.name)
    rest = [other for other in asked.objects if other != true]
    new = o.zipf(draw, asked.objects, but=true) if world.skewed else draw.choice(rest)
    if asked.name == "city" and person.new_city is not None:
        new = person.new_city
    held_out = [asked.phrasings[i] for i in person.held_out.get(asked.name, ())]
    trained = [p for p in asked.phrasings[1:] if p not in held_out]
    apart = [(name, answer) for name, answer in others if answer not in (true, new)]
    near = draw.sample(apart, min(NEIGHBOURS, len(apart)))
    return Fact(
        person.name,
        asked.phrasings[0],
        f" {true}",
        f" {new}",
        paraphrases={"all": held_out + trained, "trained": trained, "held_out": held_out}[phrasings],
        neighbours=[asked.phrasings[0].replace("{}", name) for name, _ in near],
        neighbour_targets=[f" {answer}" for _, answer in near],
        controls=[f" {other}" for other in rest if other != new],
        relation=asked.name,
        id=f"{person.name}, {asked.name}",
    )
