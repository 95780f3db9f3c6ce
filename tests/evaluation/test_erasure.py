"""Whether the old object still leads, as in a plain loop; an erasure is judged by that, and not by a new object."""

import copy
import functools
import math

import laws
import pytest
import tiny
import torch
from measured import erasure_success

import tl_factedit as fe

WORDS = [" Paris", " Rome", " city", " river", " lives", " works"]
LAYER = 1


@functools.cache
def shared(kind: str, seed: int = 0):
    return tiny.model(kind, "gpt2", seed=seed)


def next_token(model, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(model.to_tokens(text))[0, -1].double()


def leader(model, text: str, words) -> str:
    scores = next_token(model, text)
    return max(words, key=lambda word: float(scores[int(model.to_tokens(word, prepend_bos=False)[0, 0])]))


def believed(model, fact: fe.Fact) -> fe.Fact:
    """The same fact with the object that the model puts first, and all others as its controls."""
    old = leader(model, fact.text, WORDS)
    new, *controls = [word for word in WORDS if word != old]
    alone = fact.but(neighbours=(), neighbour_targets=())
    return alone.but(target_true=old, target_new=new, controls=controls, paraphrases=["{} is in", f"{fact.subject} in"])


def test_it_is_the_share_of_facts_that_led_and_lead_no_more_as_a_plain_loop_finds_them(kind):
    model, other = shared(kind), shared(kind, 1)
    facts = [believed(model, laws.FACT), laws.OTHER.but(controls=WORDS), believed(model, laws.OTHER)]
    with laws.untouched(model), laws.untouched(other):
        found = erasure_success(model, other, facts, batch_tokens=12)
    led, lead = (
        [
            [leader(m, text, [f.target_true, f.target_new, *f.controls]) == f.target_true for text in texts]
            for f in facts
            for texts in [[f.text, *map(f.fill, f.paraphrases)]]
        ]
        for m in (model, other)
    )
    assert found.before.tolist() == [each[0] for each in led] and found.after.tolist() == [each[0] for each in lead]
    gone = [[not now for was, now in zip(*both, strict=True) if was] for both in zip(led, lead, strict=True)]
    first = [float(not now[0]) for was, now in zip(led, lead, strict=True) if was[0]]
    assert found.prompt.n == len(first) and found.prompt.mean == pytest.approx(sum(first) / len(first))
    rest = [each[was[0] :] for each, was in zip(gone, led, strict=True)]
    shares = [sum(each) / len(each) for each in rest if each]
    assert found.paraphrase.n == len(shares)
    assert not shares or found.paraphrase.mean == pytest.approx(sum(shares) / len(shares))
    assert "3 facts" in repr(found)


def test_no_change_forgets_nothing_and_what_cannot_be_compared_does_not_count(kind):
    model = shared(kind)
    fact = believed(model, laws.FACT)
    assert erasure_success(model, model, [fact]).prompt.mean == 0
    alone = erasure_success(model, model, [fact.but(target_new=None, controls=())])
    assert alone.prompt.n == 0 and math.isnan(alone.prompt.mean)
    # An object that begins with the old one's token is no other object.
    same = erasure_success(model, model, [fact.but(target_new=fact.target_true + " city", controls=())])
    assert same.prompt.n == 0


def erasure(model, fact: fe.Fact) -> fe.Edit:
    fit = fe.ValueFit(steps=20, kl_weight=0.0, decay=0.0)
    return fe.Rome(fe.KeyStats.identity(model, LAYER), objective=fe.Erase(), fit=fit, contexts=("",), progress=False)(
        model, [fact]
    )


def test_an_erasure_is_judged_by_whether_the_old_object_leads(kind):
    model = shared(kind)
    fact = believed(model, laws.FACT).but(paraphrases=())
    edit = erasure(model, fact)
    with laws.untouched(model):
        verdict = fe.audit(model, edit, [fact])
    assert verdict.erasure_success.prompt.mean == 1 and verdict.findings.erasing
    assert verdict.label == "INCONCLUSIVE" and "the old object no longer leads" in repr(verdict)
    assert bool(verdict.table()["success"][0])
    # As an injection it may fail or not; as it was meant it is the same however it is asked for.
    injected = fe.audit(model, edit, [fact], objective=fe.Inject())
    assert injected.erasure_success is None and injected.findings.efficacy == injected.after.efficacy
    with edit.applied(model):
        said = leader(model, fact.text, WORDS)
    assert said != fact.target_true


def test_an_untouched_model_has_failed_to_erase_and_another_model_is_asked_as_it_is_told(kind):
    model = shared(kind)
    fact = believed(model, laws.FACT).but(paraphrases=())
    failed = fe.audit(model, copy.deepcopy(model), [fact], objective=fe.Erase())
    assert failed.label == "FAILED" and "nothing was erased or hidden" in repr(failed)
    assert fe.audit(model, copy.deepcopy(model), [fact]).erasure_success is None


def test_an_unknown_old_object_has_no_efficacy_and_no_label(kind):
    model = shared(kind)
    fact = believed(model, laws.FACT)
    unknown = fact.but(target_true=fact.target_new, target_new=fact.target_true, paraphrases=())
    verdict = fe.audit(model, copy.deepcopy(model), [unknown], objective=fe.Erase())
    assert verdict.label == "INCONCLUSIVE" and any("none, so no efficacy" in line for line in verdict.missing)


def test_edits_that_erase_and_edits_that_do_not_are_audited_apart(kind):
    model = shared(kind)
    fact, other = believed(model, laws.FACT), believed(model, laws.OTHER)
    written = fe.Rome(fe.KeyStats.identity(model, LAYER), fit=laws.QUICK, contexts=("",), progress=False)
    with pytest.raises(ValueError, match="some of the edits erase"):
        fe.audit(model, [erasure(model, fact), written(model, [other])], [fact, other])
