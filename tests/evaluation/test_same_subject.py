"""What a change breaks: the subject's other facts and neutral text, as in plain loops; nothing for no change."""

import functools
import math

import laws
import measured
import pytest
import tiny
import torch

import tl_factedit as fe

CLOSE = 1e-4
FACTS = [laws.FACT, laws.OTHER]
TEXTS = ["Big Ben stands near the river", "John lives in Rome . Anna works in the city", "What is it ?"]
SAME_SUBJECT = [
    fe.Fact("The Eiffel Tower", "{} was born in", " Rome"),
    fe.Fact("The Eiffel Tower", "Where is {} ? In", " Paris"),
    fe.Fact("Danielle Darrieux", "{} works in the", " city"),
]


@functools.cache
def shared(kind: str, seed: int = 0):
    return tiny.model(kind, "gpt2", seed=seed)


def next_token(model, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(model.to_tokens(text))[0].double().log_softmax(-1)


def known(model, same_subject=SAME_SUBJECT):
    """The same facts, asked for what the model says."""
    words = [model.tokenizer.decode([int(next_token(model, a.text)[-1].argmax())]) for a in same_subject]
    return [question.but(target_true=f" {word}") for question, word in zip(same_subject, words, strict=True)]


@functools.cache
def edits(kind: str):
    model = shared(kind)
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=fe.ValueFit(steps=15), contexts=("",), progress=False)
    return tuple(editor(model, [fact]) for fact in FACTS)


# ---------------------------------------------------------------------------------------- same_subject


def test_asides_are_answered_if_their_first_token_leads_and_kept_if_it_still_does(kind):
    model, other = shared(kind), shared(kind, 1)
    asked = [*known(model)[:2], SAME_SUBJECT[2].but(target_true=" Rome")]
    with laws.untouched(model), laws.untouched(other):
        found = measured.specificity(model, other, FACTS, asked, batch_tokens=12)
    assert found.answered_before.tolist() == [True, True, False] and found.of_fact == (0, 0, 1)
    for i, question in enumerate(asked):
        was, now = next_token(model, question.text)[-1], next_token(other, question.text)[-1]
        true = int(model.to_tokens(question.target_true, prepend_bos=False)[0, 0])
        assert bool(found.answered_after[i]) == (int(now.argmax()) == true)
        assert float(found.moved[i]) == pytest.approx(float((was.exp() * (was - now)).sum()), abs=CLOSE)
    # Within a fact first; a question that wasn't answered before isn't lost.
    assert found.before.mean == pytest.approx(0.5) and found.kept.n == 1
    assert found.kept.mean == pytest.approx(float(found.answered_after[:2].float().mean()))
    assert found.kl.mean == pytest.approx(float((found.moved[:2].mean() + found.moved[2]) / 2), abs=CLOSE)
    assert len(found.table()) == 3 and "kept" in repr(found)


def test_no_change_loses_nothing_and_another_model_loses_something(kind):
    model = shared(kind)
    asked = known(model)
    same, other = (measured.specificity(model, m, FACTS, asked) for m in (model, shared(kind, 1)))
    assert same.before.mean == same.kept.mean == 1 and same.kl == fe.Estimate(0.0, 0.0, 0.0, 2)
    assert other.kept.mean < 1 and other.kl.mean > 0.1


def test_each_aside_is_asked_under_the_change_of_its_subject(kind):
    model = shared(kind)
    asked = known(model)
    with laws.untouched(model):
        found = measured.specificity(model, list(edits(kind)), FACTS, asked[::-1])
    for i, (question, of) in enumerate(zip(found.same_subject, found.of_fact, strict=True)):
        assert FACTS[of].subject == question.subject
        was = next_token(model, question.text)[-1]
        with edits(kind)[of].applied(model):
            now = next_token(model, question.text)[-1]
        assert float(found.moved[i]) == pytest.approx(float((was.exp() * (was - now)).sum()), abs=CLOSE)
    assert float(found.moved.max()) > 1e-2


def test_an_aside_of_a_subject_with_two_changed_facts_is_asked_under_both(kind):
    model = shared(kind)
    second = laws.FACT.but(prompt="{} stands in the city of")
    found = measured.specificity(model, model, [laws.FACT, second], SAME_SUBJECT[:1])
    assert found.of_fact == (0, 1) and len(found.same_subject) == 2


def test_without_asides_nothing_is_measured(kind):
    found = measured.specificity(shared(kind), shared(kind), FACTS, [])
    assert found.kept.n == 0 and math.isnan(found.kept.mean) and "none were given" in repr(found)


def test_asides_of_others_and_of_what_is_changed_are_refused(kind, monkeypatch):
    model = shared(kind)
    with laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="needed the subject of a changed fact"):
            measured.specificity(model, model, FACTS, [fe.Fact("Anna", "{} works in", " Rome")])
        with pytest.raises(ValueError, match="needed another relation"):
            measured.specificity(model, model, FACTS, [laws.FACT])


# ---------------------------------------------------------------------------------------- drift


def by_hand(model, changed, text: str) -> tuple[float, float, float, int]:
    """Mean NLL of a token before and after, mean KL, tokens."""
    ids = model.to_tokens(text)[0]
    was, now = next_token(model, text), next_token(changed, text)
    count = len(ids) - 1
    nll = [-float(log_p[torch.arange(count), ids[1:]].mean()) for log_p in (was, now)]
    return *nll, float((was.exp() * (was - now)).sum(-1)[:-1].mean()), count


def test_drift_is_that_of_a_loop_over_texts_and_long_texts_weigh_more(kind):
    model, other = shared(kind), shared(kind, 1)
    with laws.untouched(model), laws.untouched(other):
        found = measured.drift(model, other, FACTS, TEXTS, batch_tokens=12)
    rows = torch.tensor([by_hand(model, other, text) for text in TEXTS], dtype=torch.float64)
    assert (found.nll_before - rows[:, 0]).abs().max() < CLOSE
    assert (found.nll_after[0] - rows[:, 1]).abs().max() < CLOSE
    assert (found.kl[0] - rows[:, 2]).abs().max() < CLOSE
    assert found.tokens.tolist() == rows[:, 3].tolist() and len(set(found.tokens.tolist())) == 3
    share = rows[:, 3] / rows[:, 3].sum()
    ratio = float(((rows[:, 1] - rows[:, 0]) * share).sum().exp())
    assert found.perplexity_ratio.mean == pytest.approx(ratio, rel=CLOSE) and found.worst == pytest.approx(ratio)
    assert found.mean_kl.mean == pytest.approx(float((rows[:, 2] * share).sum()), abs=CLOSE)
    assert found.perplexity_ratio.n == 3 and found.perplexity_ratio.low < ratio < found.perplexity_ratio.high
    assert "over 3 texts" in repr(found)


def test_no_change_drifts_nowhere(kind):
    model = shared(kind)
    found = measured.drift(model, model, FACTS, TEXTS)
    assert found.perplexity_ratio == fe.Estimate(1.0, 1.0, 1.0, 3) and found.mean_kl == fe.Estimate(0.0, 0.0, 0.0, 3)
    assert measured.drift(model, shared(kind, 1), FACTS, TEXTS).mean_kl.low > 0.05


def test_of_a_change_for_each_fact_drift_is_over_changes_and_the_worst_is_named(kind):
    model = shared(kind)
    with laws.untouched(model):
        found = measured.drift(model, list(edits(kind)), FACTS, TEXTS)
    ratios = []
    for c, edit in enumerate(edits(kind)):
        before = [by_hand(model, model, text) for text in TEXTS]
        with edit.applied(model):
            after = [by_hand(model, model, text)[0] for text in TEXTS]
        assert found.nll_after[c].tolist() == pytest.approx(after, abs=CLOSE)
        total = sum(row[3] for row in before)
        ratios.append(math.exp(sum((a - row[0]) * row[3] for a, row in zip(after, before, strict=True)) / total))
    assert found.perplexity_ratio.mean == pytest.approx(sum(ratios) / 2, rel=CLOSE) and found.perplexity_ratio.n == 2
    assert found.worst == pytest.approx(max(ratios), rel=CLOSE)
    assert abs(found.worst - 1) > 1e-5 and "over 2 changes" in repr(found)


def test_texts_that_predict_nothing_are_refused(kind, monkeypatch):
    model = shared(kind)
    with laws.no_forward(monkeypatch, model):
        for texts in ([], "one text"):
            with pytest.raises(ValueError, match="needed a list of texts"):
                measured.drift(model, model, FACTS, texts)
        with pytest.raises(ValueError, match="needed two tokens at least"):
            measured.drift(model, model, FACTS, ["Big Ben", "Rome"], prepend_bos=False)
