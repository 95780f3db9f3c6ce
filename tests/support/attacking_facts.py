"""Facts that a random model knows, so that attacks count them."""

import laws
from oracles import attacking

import tl_factedit as fe


def known_facts(model) -> list[fe.Fact]:
    third = fe.Fact("Big Ben", "{} stands near the", " Rome", " Paris")
    return [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER, third)]
