"""zsRE's score against a literal copy: token by token, one whole pass each."""

import math

import laws
import pytest
import tiny
import torch
from oracles import zsre

import tl_factedit as fe
from tl_factedit.core.tokens import continuation, encode

FACT = laws.FACT.but(
    target_new=" Rome in Italy",
    paraphrases=["Where is {} ? in", "{} can be found in"],
    neighbours=["Big Ben is located in the city of", "The Louvre is"],
    neighbour_targets=[" London in England", " Paris"],
)


def said(model, text: str, count: int) -> str:
    """What a model says, greedily, as the continuation of a text."""
    ids = model.to_tokens(text)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return " " + model.tokenizer.decode(ids[0, start:])


def literal(model, text: str, target: str) -> list[bool]:
    prompt = encode(model.tokenizer, text, prepend_bos=True)[0].tolist()
    return zsre.tokens_right(model, prompt, continuation(model.tokenizer, text, target, prepend_bos=True).tolist())


@pytest.mark.parametrize("batch_tokens", [8, 4096])
def test_every_token_is_asked_for_after_those_before_it(model, batch_tokens):
    asked = [
        # Half right: the model's own first tokens, and then something else.
        FACT.but(target_new=f"{said(model, FACT.text, 2)} Paris Rome"),
        FACT.but(subject="Big Ben", target_new=said(model, FACT.but(subject="Big Ben").text, 3)),
        laws.OTHER,
    ]
    found = fe.evaluation.token_accuracy(model, asked, prepend_bos=True, batch_tokens=batch_tokens)
    rewrite = [literal(model, fact.text, fact.target_new) for fact in asked]
    assert found.rewrite.mean == pytest.approx(sum(sum(r) / len(r) for r in rewrite) / 3)
    assert 0 < found.rewrite.mean < 1 and all(rewrite[1])
    of_each = []
    for fact in asked[:2]:
        right = [r for text in fact.paraphrases for r in literal(model, fact.fill(text), fact.target_new)]
        of_each.append(sum(right) / len(right))
    assert found.paraphrase.mean == pytest.approx(sum(of_each) / 2) and found.paraphrase.n == 2
    right = [
        r
        for text, target in zip(FACT.neighbours, FACT.neighbour_targets, strict=True)
        for r in literal(model, text, target)
    ]
    assert found.neighbourhood.mean == pytest.approx(sum(right) / len(right)) and found.neighbourhood.n == 2


def test_a_fact_without_an_old_object_is_scored(kind):
    model = tiny.model(kind, "gpt2")
    fact = fe.Fact("Berlin", "{} is in", None, said(model, "Berlin is in", 2))
    with laws.untouched(model):
        found = fe.evaluation.token_accuracy(model, fact)
    assert found.rewrite.mean == 1 and math.isnan(found.paraphrase.mean)
    assert found.provenance == fe.editing.Provenance.of(model)
    assert repr(found).startswith("TokenAccuracy(rewrite 1.000")


def test_bad_facts_are_refused_before_anything_is_run(kind, monkeypatch):
    model = tiny.model(kind, "gpt2")
    for fact, message in (
        (FACT.but(target_new=None), "no target_new"),
        (fe.Fact("Rome", "{} is in", None, " Italy", neighbours=["Paris is in"]), "no target_true"),
    ):
        with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
            fe.evaluation.token_accuracy(model, [fact])
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="twice"):
        fe.evaluation.token_accuracy(model, [FACT, FACT])
