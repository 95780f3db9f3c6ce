"""Facts that don't serve are set aside, each by the first filter that it fails, with the reason."""

import audits
import laws
import pytest
import tiny
from jaxtyping import TypeCheckError

import tl_factedit as fe

SAID = laws.FACT.but(id="said")


def of_the_model(model):
    """A fact that the model knows: its old object is what it says."""
    top = " " + fe.known(model, SAID).top[0].strip()  # its tokenizer leaves spaces out
    return SAID.but(target_true=top, target_new=" London" if top != " London" else " Rome", controls=())


def test_each_filter_says_what_it_set_aside(kind):
    model = tiny.model(kind, "gpt2", tok=tiny.tokenizer("wordlevel"))
    good = of_the_model(model)
    again = good.but(target_new=" Berlin", id="again")
    sibling = good.but(prompt="{} stands in", id="sibling")
    alike = good.but(prompt="People say that {} is in", target_true=" German", target_new=" German speaks", id="alike")
    long = good.but(prompt="{} " + " ".join(["is"] * 80), id="long")
    unknown = laws.OTHER.but(target_true=" Rome" if fe.known(model, laws.OTHER).top[0].strip() != "Rome" else " Paris")
    with laws.untouched(model):
        found = fe.data.select(model, [good, again, sibling, alike, long, unknown], one_a_subject=True)
    assert list(found) == [good]
    assert {fact.name: name for fact, name, _ in found.removed} == {
        "again": "asked once",
        "sibling": "one a subject",
        "alike": "one a subject",
        "long": "alignable",
        unknown.name: "known",
    }
    assert repr(found).startswith("1 fact of 6; alignable: 1 set aside; asked once: 1 set aside")
    why = found.table().set_index("fact").why
    assert "asks what 'said' asks" in why["again"] and "has rank" in why[unknown.name]
    assert [fact.name for fact in fe.data.select(model, [alike, good], known=False)] == ["said"]
    assert len(fe.data.select(model, [alike, good], known=False, apart=False)) == 2


def test_on_the_organism_what_is_kept_is_known():
    kind = tiny.KINDS[-1]
    model, facts = audits.organism(kind), audits.ASKED[:8]
    assert list(fe.data.select(model, facts)) == list(facts)
    wrong = [fact.but(target_true=fact.target_new, target_new=fact.target_true) for fact in facts]
    found = fe.data.select(model, wrong)
    assert not found and {name for _, name, _ in found.removed} == {"known"}


def test_what_has_no_old_object_is_not_known_and_nothing_is_an_error(kind):
    model = tiny.model(kind, "gpt2")
    new = SAID.but(target_true=None)
    assert fe.data.select(model, new).table().why.tolist() == ["there is no old object"]
    assert list(fe.data.select(model, new, known=False)) == [new]
    with pytest.raises(ValueError, match="facts is empty"):
        fe.data.select(model, [])
    for name in ("known", "apart", "one_a_subject"):  # a text that says no would turn a filter on
        with pytest.raises((ValueError, TypeCheckError), match=name):
            fe.data.select(model, new, **{name: "no"})
