"""Three forms of a change are gone through alike, and nothing stays applied."""

import jaxtyping
import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.measure.population import bos_of_change, parts_of

FACTS = [laws.FACT, laws.OTHER]


@pytest.fixture
def model(kind):
    return tiny.model(kind, "gpt2")


def plain(model, fact, bos=None):
    stats = fe.KeyStats.identity(model, 1)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), prepend_bos=bos, progress=False)(model, [fact])


@pytest.fixture
def edits(model):
    return [plain(model, fact) for fact in FACTS]


def answers(model, changed, facts):
    """For each fact, the logits of the model that answers for it."""
    found = {}
    for part in parts_of(model, changed, facts):
        with part.applied() as tested:
            for i, fact in zip(part.indices, part.facts, strict=True):
                assert facts[i] is fact
                found[i] = laws.logits(tested, fact.text)
    return [found[i] for i in range(len(facts))]


def test_edits_routers_and_nothing_else_are_changes(model, edits):
    assert isinstance(edits[0], fe.editing.Change)
    assert isinstance(fe.editors.RoutedEdit.of(edits[0]), fe.editing.Change)
    assert not isinstance(model, fe.editing.Change) and not isinstance(laws.FACT, fe.editing.Change)


def test_an_erasure_made_without_a_new_object_serves_the_fact_with_one(model):
    """What an audit compares with is no part of what was erased."""
    stats = fe.KeyStats.identity(model, 1)
    editor = fe.Rome(stats, objective=fe.Erase(), fit=laws.QUICK, contexts=("",), progress=False)
    edits = [editor(model, [fact.but(target_new=None)]) for fact in FACTS]
    assert [part.indices for part in parts_of(model, edits, FACTS)] == [(0,), (1,)]
    both = [*edits, plain(model, FACTS[0])]  # one made for this very object comes first
    assert parts_of(model, both, FACTS[:1])[0].changed is both[2]


def test_each_fact_is_asked_of_its_own_change_whatever_their_order(model, edits):
    expected = []
    for fact, edit in zip(FACTS, edits, strict=True):
        with edit.applied(model):
            expected.append(laws.logits(model, fact.text))
    before = laws.state(model)
    for changes in (edits, edits[::-1]):
        assert all(map(torch.equal, answers(model, changes, FACTS), expected))
    asked = [fact.but(paraphrases=(), controls=(" Cairo",), id="again") for fact in FACTS[::-1]]
    assert all(map(torch.equal, answers(model, edits, asked), expected[::-1]))
    laws.assert_same(before, laws.state(model))


def test_one_change_and_another_model_serve_all_facts_at_once(kind, model, edits):
    both = fe.compose(edits)
    with both.applied(model):
        expected = [laws.logits(model, fact.text) for fact in FACTS]
    assert all(map(torch.equal, answers(model, both, FACTS), expected))
    other = tiny.model(kind, "gpt2", seed=1)
    assert all(map(torch.equal, answers(model, other, FACTS), [laws.logits(other, fact.text) for fact in FACTS]))
    (part,) = parts_of(model, other, FACTS)
    assert part.indices == (0, 1) and part.touched == {fact.subject for fact in FACTS}


def test_a_part_knows_whom_its_change_touches(model, edits):
    (part,) = parts_of(model, fe.compose(edits), FACTS[:1])
    assert part.touched == {fact.subject for fact in FACTS}
    (part,) = parts_of(model, edits, FACTS[:1])
    assert part.touched == {FACTS[0].subject}


def test_an_error_inside_leaves_nothing_applied(model, edits):
    with laws.untouched(model), pytest.raises(RuntimeError, match="inside"):
        for part in parts_of(model, edits, FACTS):
            with part.applied():
                raise RuntimeError("inside")


def test_what_can_not_be_gone_through_is_refused_before_anything_is_applied(kind, model, edits):
    tok = tiny.tokenizer("bytebpe")
    with laws.untouched(model):
        with pytest.raises(ValueError, match="facts is empty"):
            parts_of(model, edits, [])
        with pytest.raises(ValueError, match="list of changes is empty"):
            parts_of(model, [], FACTS)
        with pytest.raises(ValueError, match="is in 0 of the 1 changes"):
            parts_of(model, edits[:1], FACTS)
        with pytest.raises(ValueError, match="is in 2 of the 3 changes"):
            parts_of(model, [*edits, edits[0]], FACTS)
        with pytest.raises(ValueError, match="is in 0 of the 2 changes"):
            parts_of(model, edits, [laws.FACT.but(target_new=" London")])
        with pytest.raises(ValueError, match="two models with one tokenizer"):
            parts_of(model, tiny.model(kind, "gpt2", tok=tok), FACTS)


def test_the_bos_policy_is_the_changes_own(model, edits):
    without = plain(model, laws.FACT, bos=False)
    assert bos_of_change(model, edits) is True and bos_of_change(model, without) is False
    assert bos_of_change(model, model, False) is False and bos_of_change(model, model) is True
    with pytest.raises(ValueError, match="but the change was made with False"):
        bos_of_change(model, without, True)
    with pytest.raises(ValueError, match="some of the changes were made with BOS"):
        bos_of_change(model, [edits[1], without])


def test_what_is_no_change_is_told_before_anything_runs(model, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # this suite's types are stricter than a user's
    for path in (tmp_path / "edit", str(tmp_path)):
        with pytest.raises(ValueError, match=r"needed the change itself: fe\.Edit\.load"):
            parts_of(model, path, FACTS)
    with pytest.raises((TypeError, fe.UnsupportedModelError)):
        parts_of(model, torch.nn.Linear(2, 2), FACTS)


def test_facts_that_a_single_change_was_not_made_for_are_refused_unless_forced(model, edits, monkeypatch):
    edit, other = edits[0], FACTS[1]
    calls = (
        lambda **force: fe.Population.of(model, edit, FACTS, **force),
        lambda **force: fe.Population.of(model, fe.editors.RoutedEdit.of(edit), other, **force),
        lambda **force: fe.evaluation.dose_curve(model, edit, other, doses=[1.0], **force),
    )
    for call in calls:
        with (
            laws.no_forward(monkeypatch, model),
            pytest.raises(ValueError, match=r"made for .* or force=True") as error,
        ):
            call()
        assert repr(other.name) in str(error.value)
        call(force=True)
    made = fe.Population.of(model, edit, FACTS[0].but(target_new=None))
    assert made.asking(other).facts == (other,)  # whoever asks it knows what else is asked
    route = fe.Route(other, "One hop", " Rome", " Paris")
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="force=True"):
        fe.attacks.follow_routes(made, [route])
