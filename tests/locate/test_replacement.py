"""Another subject in the subject's place: found by rule, reported where there is none, and run as if it stood there."""

import functools
import pickle

import pytest
import tiny
import torch
from oracles import tracing

import tl_factedit as fe
from tl_factedit.core.tokens import align

PROMPT = "{} is in the city of"
SUBJECTS = ("Big Ben", "Eiffel Tower", "Prado Museum", "Louvre Gate")
NOISE = fe.GaussianNoise(samples=2)


@functools.cache
def shared(kind: str):
    return tiny.model(kind, "gpt2")


def row_of(model, fact):
    return align(model.tokenizer, fact, prepend_bos=model.cfg.default_prepend_bos)


@functools.cache
def facts(kind: str) -> tuple[fe.Fact, ...]:
    """Facts that this random model 'knows': their objects are what it says first, each with another."""
    model, found = shared(kind), []
    for subject in SUBJECTS:
        fact = fe.Fact(subject, PROMPT, " Rome", relation="city")
        with torch.no_grad():
            top = int(model(row_of(model, fact).ids[None])[0, -1].argmax())
        found.append(fact.but(target_true=" " + model.tokenizer.decode([top])))
    return tuple(found)


def trace(kind, asked, **options):
    corruption = fe.TokenReplacement(samples=4, known=False)
    return fe.causal_trace(shared(kind), asked, **{"corruption": corruption, "progress": False, **options})


def others(kind):
    """Two facts of two subject tokens with different answers, and one that has no partner."""
    first, *rest = facts(kind)
    second = next((f for f in rest if f.target_true != first.target_true), rest[0].but(target_true=" Rome"))
    alone = fe.Fact("Rome", "The capital of {} is", " Paris", relation="capital")
    return [first, second, alone]


def test_a_donor_has_the_prompt_relation_and_length_and_another_answer(kind):
    first, second, alone = others(kind)
    same_answer = first.but(subject=next(each for each in SUBJECTS if each not in (first.subject, second.subject)))
    long = first.but(subject="The Eiffel Tower", target_true=" Berlin")
    elsewhere = second.but(prompt="The {} is in", target_true=" Madrid")
    unrelated = second.but(relation="other", target_true=" Vienna")
    found = trace(kind, [first, second, alone, same_answer, long, elsewhere, unrelated])
    assert found.donors[0] == (second.subject,)
    assert set(found.donors[1]) == {first.subject, same_answer.subject}
    assert found.donors[2] == ()


def test_a_fact_without_a_donor_is_not_traced_and_said_so(kind):
    found = trace(kind, others(kind))
    assert found.corruptible == (True, True, False)
    assert found.effect[2].isnan().all()
    assert found.corrupted[2].isnan()
    assert "1 without a donor" in repr(found)
    with pytest.raises(ValueError, match="none of 1 facts has a donor"):
        trace(kind, others(kind)[:1])


def test_unknown_donors_are_left_out_unless_asked_for(kind):
    first, second, _ = others(kind)
    wrong = second.but(target_true=" Where" if second.target_true != " Where" else " What")
    assert trace(kind, [first, wrong]).donors == ((second.subject,), (first.subject,))
    with_known = fe.causal_trace(shared(kind), [first, wrong], corruption=fe.TokenReplacement(), progress=False)
    assert with_known.donors == ((), (first.subject,))


def test_donors_hang_on_the_seed_and_not_on_the_order(kind):
    asked = [
        f.but(target_true=target) for f, target in zip(facts(kind), (" A", " Paris", " Rome", " Berlin"), strict=True)
    ]
    asked[0] = asked[0].but(target_true=" London")
    corruption = fe.TokenReplacement(known=False)
    one = fe.causal_trace(shared(kind), asked, corruption=corruption, progress=False)
    other = fe.causal_trace(shared(kind), asked[::-1], corruption=corruption, progress=False)
    assert {f.subject: d for f, d in zip(one.facts, one.donors, strict=True)} != {}
    assert all(len(donors) == 1 for donors in one.donors)
    seeds = [fe.TokenReplacement(known=False, seed=seed) for seed in range(6)]
    drawn = {fe.causal_trace(shared(kind), asked, corruption=each, progress=False).donors for each in seeds}
    assert len(drawn) > 1
    assert sorted(map(len, other.donors)) == [1, 1, 1, 1]


@pytest.mark.parametrize("metric", ["prob", "logit_diff", "kl"])
def test_the_corrupted_run_is_the_donors_own_prompt(kind, metric):
    model, (first, second, _) = shared(kind), others(kind)
    found = trace(kind, [first, second], metric=metric)
    mine, theirs = row_of(model, first), row_of(model, second)
    with torch.no_grad():
        clean, swapped = model(mine.ids[None]), model(theirs.ids[None])
    asked = tracing.TracedPrompt(mine.ids, mine.subject, mine.true_ids)
    other = int(theirs.true_ids[0])
    want = tracing.scored(swapped, asked, metric, clean_logits=clean, other=other)[0]
    assert float(found.corrupted[0]) == pytest.approx(float(want), abs=1e-5)
    assert float(found.clean[0]) == pytest.approx(
        float(tracing.scored(clean, asked, metric, clean_logits=clean, other=other)[0]), abs=1e-5
    )
    assert abs(float(found.total_effect[0])) > 1e-3


@pytest.mark.parametrize("component", ["resid", "mlp"])
def test_its_cells_are_the_loop_over_cells(kind, component):
    model, (first, second, _) = shared(kind), others(kind)
    found = trace(kind, [first, second], component=component)
    mine, theirs = row_of(model, first), row_of(model, second)
    asked = tracing.TracedPrompt(mine.ids, mine.subject, mine.true_ids)
    embedded = [
        tracing.clean_cache(model, tracing.TracedPrompt(row.ids, row.subject, row.true_ids), ["hook_embed"])[
            "hook_embed"
        ][0]
        for row in (mine, theirs)
    ]
    noise = (embedded[1] - embedded[0])[slice(*mine.subject)][None]
    loop = tracing.trace(model, asked, noise, component=component)
    assert (found.sample_effect[0, :, : len(mine.ids), :1] - loop.effect).abs().max() < 1e-5
    assert loop.effect.abs().max() > 1e-4


# ---------------------------------------------------------------------------------------- side by side


def test_two_equal_corruptions_agree_and_the_table_says_so(kind):
    asked = list(facts(kind))
    noise = fe.GaussianNoise(samples=2)
    both = fe.locate.compare_corruptions(
        shared(kind), asked, corruptions=(noise, noise), min_effect=-1.0, progress=False
    )
    assert all(both.usable)
    assert both.profile().mean == pytest.approx(1.0)
    assert [rho.mean for rho in both.agreement()[:3]] == pytest.approx([1.0] * 3)
    assert both.agreement()[3].mean != both.agreement()[3].mean  # NaN: nothing is left to do after the last layer
    first, second = both.peaks()
    assert first.layer == second.layer
    assert first.low <= first.layer <= first.high
    table = both.table()
    assert list(table.layer) == [0, 1, 2, 3]
    assert table["rank correlation"].tolist()[:3] == pytest.approx([1.0] * 3)
    assert "4 of 4 facts usable" in repr(both)


def test_noise_and_replacement_are_compared_on_the_facts_that_have_donors(kind):
    asked = others(kind)
    both = fe.locate.compare_corruptions(
        shared(kind),
        asked,
        corruptions=(NOISE, fe.TokenReplacement(known=False)),
        min_effect=-1.0,
        progress=False,
    )
    assert both.usable == (True, True, False)
    assert both.first.corruptible == (True, True, True)
    assert len(both.effects()[0]) == 2


def test_donors_of_another_model_are_not_taken(kind):
    asked = facts(kind)
    found = trace(kind, asked).corruption
    again = fe.causal_trace(shared(kind), asked[0], corruption=found, progress=False)
    assert again.donors[0]
    with pytest.raises(ValueError, match=r"found on another model.*TokenReplacement\(samples=4, seed=0\)"):
        fe.causal_trace(tiny.model(kind, "gpt2", seed=9), asked, corruption=found, progress=False)


def test_a_trace_by_replacement_can_be_pickled(kind):
    found = trace(kind, facts(kind))
    copied = pickle.loads(pickle.dumps(found))
    assert torch.equal(copied.effect, found.effect) and copied.donors == found.donors
