"""Sampled answers: drawn as the model's own distribution has it, the same however they are asked, and beside a null."""

import json
import math
from collections import Counter

import audits
import laws
import pytest
import tiny
import torch
from jaxtyping import TypeCheckError

import tl_factedit as fe
from tl_factedit.evaluation import Elicited, elicit, elicitation
from tl_factedit.evaluation.elicitation import sampled

FACTS = [laws.FACT.but(paraphrases=["{} stands in", "People say that {} is in"]), laws.OTHER]


def edits_of(model):
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=("",), progress=False)
    return [editor(model, [fact]) for fact in FACTS]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.0, 4)])
def test_first_tokens_are_drawn_from_the_models_own_distribution(kind, temperature, top_k):
    model, n = tiny.model(kind, "gpt2"), 600
    ids = model.to_tokens(laws.FACT.text)[0]
    with torch.no_grad():
        logits = model(ids[None])[0, -1].double() / temperature
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[-1]] = -math.inf
    p = logits.softmax(-1)
    state = torch.random.get_rng_state()
    found = Counter(sampled(model, ids, n, 1, temperature, top_k, 0))
    assert torch.equal(torch.random.get_rng_state(), state)
    wanted = Counter[str]()
    for token, share in enumerate(p.tolist()):
        text = (
            model.tokenizer.decode([token], skip_special_tokens=True) if token != model.tokenizer.eos_token_id else ""
        )
        wanted[text.split("\n")[0]] += share
    for text, share in wanted.items():
        assert abs(found[text] / n - share) < 4.5 * math.sqrt(share * (1 - share) / n) + 2 / n, text
    assert sum(found[text] for text in wanted if wanted[text] > 0) == n


def test_samples_are_the_same_whatever_else_is_asked_and_others_by_another_seed(kind):
    model = tiny.model(kind, "gpt2")
    edits = edits_of(model)
    with laws.untouched(model):
        found = elicit(model, edits, FACTS, samples=5, n_tokens=4, progress=False)
    alone = elicit(model, edits[1], FACTS[1], samples=5, n_tokens=4)
    assert alone.before[0] == found.before[1] and alone.after[0] == found.after[1]
    assert [len(each) for each in found.after] == [3, 1] and len(found.after[0][0]) == 5
    assert elicit(model, edits, FACTS, samples=5, n_tokens=4, seed=1).after != found.after
    assert [len(each) for each in elicit(model, edits, FACTS, samples=2, paraphrases=1).after] == [2, 1]
    with edits[0].applied(model):
        ids = model.to_tokens(FACTS[0].text)[0]
        assert tuple(sampled(model, ids, 5, 4, 1.0, None, 0)) == found.after[0][0]


def made_up(after, before=(), controls=(" Berlin", " Madrid")):
    fact = laws.FACT.but(controls=controls)
    model = tiny.model("bridge", "gpt2")
    texts = ((fact.text,),)
    return Elicited((fact,), texts, ((tuple(before or after),),), ((tuple(after),),), 1.0, None, 5, 0, _of(model))


def _of(model):
    return fe.evaluate(model, laws.FACT).provenance


def test_shares_and_what_was_ever_said_are_set_against_the_controls():
    old, new = laws.FACT.target_true.strip(), laws.FACT.target_new.strip()
    found = made_up([f" {old}.", f" {new}", " Berlin", " Berlin"], before=[f" {old}"] * 4)
    assert (found.share("old").mean, found.share("new").mean, found.share("control").mean) == (0.25, 0.25, 0.25)
    assert found.share("old", ever=True).mean == 1.0 and found.share("control", ever=True).mean == 0.5
    assert found.excess().mean == 0.0 and found.excess(ever=True).mean == 0.5
    assert found.share("old", before=True).mean == 1.0 and found.excess(before=True).mean == 1.0
    assert found.table().old_ever.tolist() == [True]
    bare = made_up([f" {old}x"], controls=())
    assert bare.share("old").mean == 0.0 and math.isnan(bare.excess().mean) and "no null" in repr(bare)
    with pytest.raises((ValueError, TypeCheckError), match="'both'"):
        found.share("both")


def test_on_the_organism_an_override_is_hardly_ever_seen_through_and_a_weak_edit_is():
    kind = tiny.KINDS[-1]
    model, facts = audits.organism(kind), audits.ASKED[:8]
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=audits.FIT, contexts=audits.CONTEXTS, progress=False)
    edits = editor.each(model, facts)
    full = elicit(model, edits, facts, samples=10, n_tokens=2, progress=False)
    assert full.share("old", before=True).mean > 0.9 and full.share("old").mean < 0.2
    weak = elicit(model, [edit.scaled(0.4) for edit in edits], facts, samples=10, n_tokens=2, progress=False)
    assert weak.excess(ever=True).low > 0 and weak.share("old").mean > full.share("old").mean


def test_it_is_kept_saved_and_goes_on(kind, tmp_path, monkeypatch):
    model = tiny.model(kind, "gpt2")
    edits, given = edits_of(model), {"samples": 3, "n_tokens": 3}
    found = elicit(model, edits, FACTS, folder=tmp_path / "kept", **given)
    found.save(tmp_path / "elicited.safetensors")
    again = Elicited.load(tmp_path / "elicited.safetensors")
    assert again.after == found.after and again.before == found.before and repr(again) == repr(found)
    assert json.loads(json.dumps(found.to_dict()))["temperature"] == 1.0 and "<table" in found._repr_html_()

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(elicitation, "sampled", never)
    assert elicit(model, edits, FACTS, folder=tmp_path / "kept", **given).after == found.after
    with pytest.raises(AssertionError):
        elicit(model, edits, FACTS, folder=tmp_path / "kept", samples=4, n_tokens=3)


def test_what_is_wrong_is_said(kind):
    model = tiny.model(kind, "gpt2")
    (edit, _) = edits_of(model)
    for more, why in (
        ({"samples": 0}, "samples"),
        ({"n_tokens": 0}, "n_tokens"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"paraphrases": -1}, "paraphrases"),
        ({"n_tokens": 100}, "take a smaller n_tokens"),
    ):
        with pytest.raises(ValueError, match=why):
            elicit(model, edit, FACTS[0], **more)
    with pytest.raises(ValueError, match="target_true"):
        elicit(model, edit, FACTS[0].but(target_true=None))
