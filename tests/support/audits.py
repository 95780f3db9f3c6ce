"""Audits of the organism with all evidence that tests give."""

import functools
import warnings

import tiny

import tl_factedit as fe
from tl_factedit.attacks.routes import Route
from tl_factedit.organism import text as told
from tl_factedit.organism import world as o

HELD = tiny.TWINS
OTHERS = tuple(relation.name for relation in o.RELATIONS if relation.name != "city")
FIT = fe.ValueFit(kl_at="end", kl_prompts=tuple(o.relation(name).phrasings[0] for name in OTHERS))
CONTEXTS = ("", "It rained all day . ", "As we know , ")


@functools.cache
def organism(kind: str, variant: str = "base"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return fe.models.organism(kind, variant, path=HELD if variant.startswith("oracle") else None)


FACTS = fe.models.organism_facts("city", "oracle0")
ASKED, REST = FACTS[:75], FACTS[75:]
REFERENCE = fe.models.organism_facts("city", "calibration")
TEXTS = [text for text in told.texts(300) if not any(name in text for name in o.FIRST)][:20]


def routes(facts) -> list[Route]:
    return [
        Route(fact, prompt, old, new, controls=[f" {c}" for c in o.COUNTRIES if f" {c}" not in (old, new)])
        for fact in facts
        for prompt, old, new in fe.models.organism_implications(fact)
    ]


def same_subject(facts) -> list[fe.Fact]:
    subjects = {fact.subject for fact in facts}
    return [fact for name in OTHERS for fact in fe.models.organism_facts(name, "oracle0") if fact.subject in subjects]


def audited(kind, changed, facts=ASKED, **more) -> fe.Verdict:
    given = {
        "reference": REFERENCE,
        "routes": routes(facts),
        "same_subject": same_subject(facts),
        "texts": TEXTS,
        **more,
    }
    return fe.audit(organism(kind), changed, facts, progress=False, **given)
