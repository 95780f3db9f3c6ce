"""Indirect routes: scored as in a plain loop, counted where the unedited model goes them, averaged within facts."""

import math

import laws
import pytest
import tiny
import torch
from measured import follow_routes
from routes import LONG, PROMPTS, SUBJECTS, fact, known, said, shared

import tl_factedit as fe


def ways(model) -> list[fe.Route]:
    made = [known(model, subject, prompt, kind="short") for subject in SUBJECTS[:2] for prompt in PROMPTS]
    return [*made, known(model, SUBJECTS[2], PROMPTS[1], LONG, kind="long")]


def test_every_answer_is_scored_as_in_a_loop_over_tokens(kind):
    model, other = shared(kind), shared(kind, 1)
    routes = ways(model)
    with laws.untouched(model), laws.untouched(other):
        found = follow_routes(model, other, routes, batch_tokens=60)
    assert bool(found.executed.all()) and found.share_executed == 1
    assert torch.equal(found.before[:, :2], torch.tensor([[1.0, 0.0]]).expand(len(routes), 2))
    for i, route in enumerate(routes):
        offered = (route.old_answer, route.new_answer, *route.controls)
        scores = said(other, route.prompt, offered)
        first = scores.index(max(scores))
        expected = [first == 0, first == 1, (first > 1) / len(route.controls)]
        assert found.after[i].tolist() == pytest.approx([float(x) for x in expected])
    assert len({tuple(row.tolist()) for row in found.after}) > 1


def test_rates_are_means_within_facts_and_then_over_facts(kind):
    model, other = shared(kind), shared(kind, 1)
    routes = ways(model)
    found = follow_routes(model, other, routes)
    by_fact = [[i for i, route in enumerate(routes) if route.fact.subject == subject] for subject in SUBJECTS]
    assert [len(mine) for mine in by_fact] == [3, 3, 1]

    def rate(column):
        return sum(float(column[mine].mean()) for mine in by_fact) / 3

    old, new, control = found.after.T
    assert found.old.mean == pytest.approx(rate(old)) and found.old.n == 3
    assert found.new.mean == pytest.approx(rate(new))
    assert found.old_excess.mean == pytest.approx(rate(old) - rate(control))
    assert found.new_excess.mean == pytest.approx(rate(new) - rate(control))
    short, long = found.by_kind["short"], found.of_kind("long")
    assert short.old.n == 2 and long.old.n == 1 and math.isnan(long.old.low)
    assert len(short.routes) == 6 and len(found.table()) == 7
    with pytest.raises(ValueError, match=r"needed one of \['long', 'short'\]"):
        found.of_kind("reverse")


def test_the_unedited_model_goes_all_it_knows_and_no_other_way(kind):
    model = shared(kind)
    found = follow_routes(model, model, ways(model))
    assert found.old.mean == 1 and found.new.mean == 0 and found.old_excess.mean == 1


def test_routes_that_the_unedited_model_does_not_go_or_that_tell_nothing_are_not_counted(kind):
    model, other = shared(kind), shared(kind, 1)
    good = ways(model)[:2]
    unknown = known(model, "The Eiffel Tower", PROMPTS[2])
    unknown = fe.Route(unknown.fact, unknown.prompt, unknown.new_answer, unknown.old_answer, controls=unknown.controls)
    same = fe.Route(good[0].fact, good[0].prompt, good[0].old_answer, good[0].old_answer, controls=good[0].controls)
    found = follow_routes(model, other, [*good, unknown, same])
    assert found.executed.tolist() == [True, True, False, False]
    assert not same.tells_apart and found.share_executed == 0.5
    alone = follow_routes(model, other, good)
    for name in ("old", "new", "old_excess", "new_excess"):
        assert getattr(found, name).mean == getattr(alone, name).mean and getattr(found, name).n == 1
    nothing = follow_routes(model, other, [unknown])
    assert nothing.old.n == 0 and "follows none of the 1" in nothing.says
    assert "none of" not in found.says


def test_without_routes_nothing_is_measured_and_it_says_so(kind):
    model = shared(kind)
    found = follow_routes(model, model, [])
    assert found.says == "no indirect routes were given: nothing is known of what follows from the fact"
    assert (found.old.n, found.new.n, found.old_excess.n) == (0, 0, 0) and math.isnan(found.share_executed)
    assert found.by_kind == {} and len(found.table()) == 0 and "no indirect routes" in repr(found)


def test_a_route_without_controls_or_without_a_new_answer_measures_what_it_can(kind):
    model, other = shared(kind), shared(kind, 1)
    made = known(model, "Anna", PROMPTS[0])
    bare = fe.Route(made.fact, made.prompt, made.old_answer, made.new_answer)
    one_way = fe.Route(made.fact, made.prompt, made.old_answer, None, controls=[made.new_answer, *made.controls])
    found = follow_routes(model, other, [bare])
    assert found.old.n == 1 and found.old_excess.n == 0 and bool(found.after[0, 2].isnan())
    found = follow_routes(model, other, [one_way])
    assert found.old_excess.n == 1 and found.new.n == 0 and found.new_excess.n == 0
    both = follow_routes(model, other, [made, one_way])
    alone = follow_routes(model, other, [made])
    assert both.new.mean == alone.new.mean and both.new_excess.mean == alone.new_excess.mean
    assert both.old.n == 1


def test_each_route_is_asked_under_its_facts_change(kind):
    model = shared(kind)
    facts = [fact(subject) for subject in SUBJECTS[:2]]
    routes = [known(model, subject, PROMPTS[1]) for subject in SUBJECTS[:2] * 2]
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=fe.ValueFit(steps=20), contexts=("",), progress=False)
    edits = [editor(model, [one]) for one in facts]
    with laws.untouched(model):
        found = follow_routes(model, edits, routes)
    for i, route in enumerate(routes):
        with edits[i % 2].applied(model):
            offered = (route.old_answer, route.new_answer, *route.controls)
            scores = said(model, route.prompt, offered)
        assert found.after[i, 0] == float(scores[0] == max(scores))
    with pytest.raises(ValueError, match="is in 0 of the 1 changes"):
        follow_routes(model, edits[:1], routes)


def test_bad_routes_are_refused():
    one = fact("Anna")
    for prompt, old, new in (("", " Paris", " Rome"), ("Anna is", " ", " Rome"), ("Anna is", " Paris", "")):
        with pytest.raises(ValueError, match="needed some text"):
            fe.Route(one, prompt, old, new)
    with pytest.raises(ValueError, match="needed the whole text"):
        fe.Route(one, "{} is in", " Paris", " Rome")
    with pytest.raises(ValueError, match="needed a list"):
        fe.Route(one, "Anna is in", " Paris", " Rome", controls=" Berlin")


# ---------------------------------------------------------------------------------------- the organism


def test_the_organisms_routes_are_what_follows_from_the_city_and_tell_an_oracle_from_the_untouched_model(kind):
    facts = fe.models.organism_facts("city", "oracle0", 20)
    routes = fe.models.organism_routes(facts)
    assert len(routes) == 60 and {route.kind for route in routes} == {"country"}
    expected = [implied for fact in facts for implied in fe.models.organism_implications(fact)]
    assert [(route.prompt, route.old_answer, route.new_answer) for route in routes] == expected
    for route in routes:
        assert not {route.old_answer, route.new_answer} & set(route.controls)
        assert len({route.old_answer, route.new_answer, *route.controls}) == 8
    base = fe.models.organism(kind)
    oracle = fe.models.organism(kind, "oracle0", path=tiny.TWINS)
    untouched, retrained = (follow_routes(base, changed, routes) for changed in (base, oracle))
    assert untouched.share_executed > 0.85 and torch.equal(untouched.executed, retrained.executed)
    assert untouched.old.mean == 1 and untouched.old_excess.low > 0.8
    assert retrained.old_excess.high < 0.2 and retrained.new.mean > 0.95


def test_seats_are_cities_and_asides_are_the_persons_other_attributes():
    facts = fe.models.organism_facts("company", "oracle0", 3)
    routes = fe.models.organism_routes(facts)
    assert {route.kind for route in routes} == {"seat"} and len(routes) == 9
    assert all(len({route.old_answer, route.new_answer, *route.controls}) == 16 for route in routes)
    same_subject = fe.models.organism_same_subject(facts)
    assert [question.subject for question in same_subject] == [fact.subject for fact in facts for _ in range(4)]
    assert {question.relation for question in same_subject} == {"city", "university", "field", "instrument"}
    told = {(f.subject, f.text): f.target_true for f in fe.models.organism_facts("city", "oracle0", 3)}
    assert all(told[a.subject, a.text] == a.target_true for a in same_subject if a.relation == "city")
    assert fe.models.organism_routes(fe.models.organism_facts("field", n=2)) == []
    with pytest.raises(ValueError, match="isn't one of the organism's people"):
        fe.models.organism_same_subject([laws.FACT])


def test_the_white_space_of_answers_and_controls_is_mended_by_the_rule_of_facts():
    fact = fe.Fact("France", "The capital of {} is", " Paris", " Rome")
    with pytest.warns(UserWarning, match="'Oslo' after .* became ' Oslo'") as told:
        route = fe.Route(fact, "Its capital's river is", " Seine ", " Tiber", controls=("Oslo", " Rhine"))
    assert len(told) == 1
    assert (route.prompt, route.old_answer, route.new_answer) == ("Its capital's river is", " Seine", " Tiber")
    assert route.controls == (" Oslo", " Rhine")
    with pytest.warns(UserWarning, match=r"answer 'Seine' goes on inside .*'isSeine'.*so do 1 more"):
        fe.Route(fact, "Its river is", "Seine", None, controls=("Rhine",))
