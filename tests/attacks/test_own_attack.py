"""An attack of one's own: one frozen value, seen in the verdict, in its table and in its picture."""

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import attacking_facts
import laws
import pytest
import tiny
import torch
from jaxtyping import TypeCheckError

import tl_factedit as fe
from tl_factedit.attacks import Case, Recovery
from tl_factedit.auditing.gather import Plan, _recovery_of
from tl_factedit.core.tokens import encode
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import at_the_ends


@dataclass(frozen=True)
class Politely:
    """Asks once more, politely."""

    words: str = "Please say it again . "

    def __call__(self, population: fe.Population, /) -> Recovery:
        asked, tokenizer = population.first_tokens, population.model.tokenizer
        rows = [encode(tokenizer, self.words + f.text, prepend_bos=population.prepend_bos)[0] for f in population.facts]

        def read(runner, indices):
            found = torch.full((len(indices), 1, 3), torch.nan)
            for row, logits in at_the_ends(runner, [rows[i] for i in indices], 4096):
                found[row, 0] = asked[indices[row]].first(logits)
            return found

        before, after = population.read("politely", read, settings=repr(self))
        return Recovery.of("politely", population, [Case("please", "asked politely", "underneath")], before, after)


def test_it_is_an_attack_and_resumes(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    assert isinstance(Politely(), fe.attacks.Attack)
    unchanged = fe.Population.of(model, model, facts, progress=False)
    with laws.untouched(model):
        found = Politely()(unchanged)
    assert torch.equal(found.before.values, found.after.values) and found.known.all()
    other = fe.Population.of(model, tiny.model(kind, "gpt2", seed=1), facts, folder=tmp_path, progress=False)
    first, again = (Politely()(other) for _ in range(2))
    assert torch.equal(first.after.values, again.after.values) and len(list(tmp_path.iterdir())) == 3


def test_it_is_in_the_verdict_its_table_and_its_picture(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    verdict = fe.audit(model, copy.deepcopy(model), facts, attacks=[Politely()], objective=fe.Inject(), progress=False)
    own = verdict.attack("politely")
    assert own is not None and own in verdict.attacks
    finding = next(found for found in verdict.findings.attacks if found.attack == "politely")
    assert finding.shows == "underneath" and finding.strongest == own.strongest
    assert own.table()["case"].tolist() == ["asked politely"]
    picture = fe.show.verdict(verdict).html
    assert "Politely" in picture and "asked politely" in picture
    assert "asked politely" in fe.show.attack(own).html
    fe.show.report(tmp_path / "report.html", own)
    assert "asked politely" in (tmp_path / "report.html").read_text()


def test_one_of_the_same_type_takes_the_place_of_the_default_one(kind):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    verdict = fe.audit(model, copy.deepcopy(model), facts, attacks=[fe.attacks.ReadOut(k=3)], progress=False)
    read = [recovery for recovery in verdict.attacks if recovery.attack == "read-out"]
    assert len(read) == 1 and read[0].extra["candidates"].max() > 1


# ---------------------------------------------------------------------------------------- what it decides


@dataclass(frozen=True)
class Planted:
    """Gives the same answer of every fact, whatever the model."""

    old: float
    name: str = "planted"

    def __call__(self, population: fe.Population, /) -> Recovery:
        before, after = (torch.tensor([old, 0.0, 0.0]).expand(len(population.facts), 1, 3) for old in (1.0, self.old))
        return Recovery.of(self.name, population, [Case("it", "planted", "underneath")], before, after)


@functools.cache
def edited(kind):
    """A model, a fact that it knows, and an edit of it that works."""
    model = tiny.model(kind, "gpt2")
    fact = attacking_facts.known_facts(model)[0].but(neighbours=(), neighbour_targets=())
    fit = fe.ValueFit(steps=20, kl_weight=0.0, decay=0.0)
    return model, fact, laws.rome(model, 1, fit=fit, contexts=("",))(model, [fact])


def unchecked(function):
    """Past the type checks of this test suite, which a user doesn't have."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.mark.parametrize(
    ("old", "by", "label"), [(1.0, {"underneath"}, "INSERTED"), (0.0, set(), "INCONCLUSIVE")], ids=["back", "gone"]
)
def test_what_it_brings_back_decides(kind, old, by, label):
    model, fact, edit = edited(kind)
    attack = Planted(old)  # alone, or in a list
    verdict = fe.audit(model, edit, fact, attacks=attack if old else [attack], progress=False)
    assert verdict.attack("planted").strongest.mean == old and verdict.attack("no such attack") is None
    assert verdict.by == by and verdict.label == label, repr(verdict)
    # Nothing was knocked out, as there are no references: so nothing is said of what the model can spare.
    assert "can't spare" not in repr(verdict) and "needs references" in repr(verdict)
    assert "more: no conclusion, as no fact has references and controls" in repr(verdict)
    assert "(per edit, 1 fact)" in repr(verdict)


@pytest.mark.parametrize(
    ("given", "named"),
    [(fe.attacks.KnockOut, "KnockOut"), ([Planted(1.0), Planted], "Planted")],
    ids=["alone", "among others"],
)
def test_a_class_is_no_attack_and_refused_before_anything_is_run(kind, monkeypatch, given, named):
    model, fact, edit = edited(kind)
    message = rf"attacks holds the class {named}, needed values such as KnockOut\(\): a class isn't one"
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        fe.audit(model, edit, fact, attacks=given, progress=False)


@pytest.mark.parametrize("given", [3, "knock-out"])
def test_what_cannot_be_called_is_no_attack(given):
    with pytest.raises(ValueError, match=f"attacks holds {given!r}, needed values such as"):
        unchecked(Plan.check)(SimpleNamespace(attacks=(given,)), None)


def test_what_returns_something_else_or_has_the_name_of_another_is_told(kind):
    model, fact, edit = edited(kind)
    population = fe.Population.of(model, edit, fact, progress=False)
    with pytest.raises(TypeError, match=r"function returned a int, needed a Recovery: Recovery\.of"):
        unchecked(_recovery_of)(lambda _: 3, population, [])
    with laws.untouched(model), pytest.raises(ValueError, match="two attacks are called 'read-out', needed a name for"):
        fe.audit(model, edit, fact, attacks=Planted(1.0, "read-out"), progress=False)


def test_a_case_that_asks_none_of_the_three_questions_is_refused():
    with pytest.raises(ValueError, match=r"case 'a' shows 'undernaeth', needed one of \('elsewhere', 'underneath'"):
        unchecked(Case.__post_init__)(SimpleNamespace(key="a", shows="undernaeth"))
    with pytest.raises((ValueError, TypeCheckError), match="elsewhere"):
        Case("a", "a case", "undernaeth")


def test_intervals_hold_for_as_many_cases_as_are_said(kind):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    found = Politely()(fe.Population.of(model, tiny.model(kind, "gpt2", seed=1), facts, progress=False))
    assert torch.equal(found.among(1).corrected.low, found.corrected.low)
    many = found.among(200)
    assert float(many.corrected.low) <= float(found.corrected.low) and torch.equal(many.excess.high, found.excess.high)
    assert torch.equal(many.corrected.high, excess(*found.counted, tests=200).high)
    with pytest.raises(ValueError, match="0 cases together with 1 of this attack"):
        found.among(0)
    assert torch.equal(found.showing("underneath").among(9).corrected.high, found.among(9).corrected.high)
