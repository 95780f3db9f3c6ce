"""What is read of each change is kept, found again, and never taken for something else."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import laws
import measured
import pytest
import tiny
import torch

import tl_factedit as fe

FACTS = [
    laws.FACT.but(relation="city"),
    laws.FACT.but(subject="Big Ben", relation="city"),
    laws.FACT.but(subject="Newton", relation="city"),
]


@pytest.fixture(scope="module")
def model(request):
    return tiny.model("bridge", "gpt2")


@pytest.fixture(scope="module")
def edits(model):
    stats = fe.KeyStats.identity(model, 1)
    editor = fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)
    return [editor(model, [fact]) for fact in FACTS]


@dataclass(frozen=True)
class Found:
    """Something of several kinds, as readings are."""

    values: torch.Tensor
    count: int
    words: tuple[str, ...]


def reader(calls: Counter, broken: tuple[str, ...] = (), asked=FACTS):
    def read(runner, indices):
        fact, tested = asked[indices[0]], runner.model
        subject = fact.subject
        if subject in broken:
            raise KeyboardInterrupt(subject)
        calls[subject] += 1
        return Found(laws.logits(tested, fact.text)[0, -1], len(indices), (subject, "read"))

    return read


def run(model, changed, facts, read, folder, **asked):
    population = fe.Population.of(model, changed, facts, folder=folder, progress=False)
    found = population.each("some reading", read, settings=asked, kinds=(Found,))
    return {part.indices[0]: each for part, each in found}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[i].values, b[i].values) and (a[i].count, a[i].words) == (b[i].count, b[i].words) for i in a
    )


def test_what_a_killed_call_has_read_is_not_read_again(model, edits, tmp_path):
    calls = Counter()
    whole = run(model, edits, FACTS, reader(Counter()), None)
    with laws.untouched(model):
        with pytest.raises(KeyboardInterrupt):
            run(model, edits, FACTS, reader(calls, ("Newton",)), tmp_path)
        assert calls == {"The Eiffel Tower": 1, "Big Ben": 1}
        assert same(run(model, edits, FACTS, reader(calls), tmp_path), whole)
        assert calls == {"The Eiffel Tower": 1, "Big Ben": 1, "Newton": 1}
        assert same(run(model, edits, FACTS, reader(calls), tmp_path), whole)
    assert sum(calls.values()) == 3 and len(list(tmp_path.iterdir())) == 3


def test_without_a_folder_nothing_is_kept(model, edits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = Counter()
    for _ in range(2):
        run(model, edits, FACTS, reader(calls), None)
    assert set(calls.values()) == {2} and not list(tmp_path.iterdir())


def test_another_question_change_fact_or_model_is_read_anew(model, edits, tmp_path):
    calls = Counter()
    run(model, edits, FACTS, reader(calls), tmp_path, how=1)
    run(model, edits, FACTS, reader(calls), tmp_path, how=2)
    stronger = [edits[0].scaled(2.0), *edits[1:]]
    run(model, stronger, FACTS, reader(calls), tmp_path, how=1)
    asked = [FACTS[0].but(controls=[" Oslo"]), *FACTS[1:]]
    run(model, edits, asked, reader(calls), tmp_path, how=1)
    assert calls == {"The Eiffel Tower": 4, "Big Ben": 2, "Newton": 2}
    other = tiny.model("bridge", "gpt2", seed=1)
    run(model, other, FACTS, reader(calls), tmp_path, how=1)
    run(other, model, FACTS, reader(calls), tmp_path, how=1)
    run(model, other, FACTS, reader(calls), tmp_path, how=1)
    assert calls["The Eiffel Tower"] == 6


def test_a_population_that_grew_is_asked_what_is_new(model, edits, tmp_path):
    calls = Counter()
    run(model, edits[:2], FACTS[:2], reader(calls), tmp_path)
    run(model, edits[::-1], FACTS[::-1], reader(calls, asked=FACTS[::-1]), tmp_path)
    assert set(calls.values()) == {1} and len(calls) == 3


def test_a_damaged_file_is_refused_by_name_and_left(model, edits, tmp_path):
    run(model, edits[:1], FACTS[:1], reader(Counter()), tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=path.name):
        run(model, edits[:1], FACTS[:1], reader(Counter()), tmp_path)
    assert path.read_bytes() == data[:-8]


def test_files_that_were_swapped_by_name_are_told(model, edits, tmp_path):
    whole = run(model, edits, FACTS, reader(Counter()), tmp_path)
    first, second, _ = sorted(tmp_path.iterdir())
    spare = tmp_path / "spare"
    first.rename(spare), second.rename(first), spare.rename(second)
    calls = Counter()
    with pytest.raises(ValueError, match="holds another result than its name says"):
        run(model, edits, FACTS, reader(calls), tmp_path)
    first.rename(spare), second.rename(first), spare.rename(second)
    assert same(run(model, edits, FACTS, reader(calls), tmp_path), whole) and not calls


def test_a_relative_folder_is_where_it_was_asked_for(model, edits, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    population = fe.Population.of(model, edits, FACTS, folder="kept", progress=False)
    monkeypatch.chdir(tmp_path / "there")
    list(population.each("some reading", reader(Counter()), settings=(), kinds=(Found,)))
    assert len(list((tmp_path / "here" / "kept").iterdir())) == 3 and not list((tmp_path / "there").iterdir())


def test_what_is_read_of_the_unedited_model_is_kept_too(model, edits, tmp_path):
    calls = Counter()
    for _ in range(2):
        population = fe.Population.of(model, edits, FACTS, folder=tmp_path, progress=False)
        found = population.unedited("some reading", reader(calls), settings=(), kinds=(Found,))
    assert calls == {"The Eiffel Tower": 1} and found.count == 3


@pytest.mark.parametrize("call", ["unedited", "each", "read", "after", "keep"])
def test_what_a_reading_depends_on_has_to_be_said(model, call):
    """Without it a second attack of the same name would be given what the first has read."""
    population = fe.Population.of(model, model, FACTS, progress=False)
    asked = ("x", None, dict) if call == "keep" else ("x", reader(Counter()))
    with pytest.raises(TypeError, match="settings"):
        getattr(population, call)(*asked)


@dataclass(frozen=True)
class Nameless:
    """A change of a user's own, without a digest."""

    edit: Any

    @property
    def facts(self):
        return self.edit.facts

    @property
    def layers(self):
        return self.edit.layers

    @property
    def provenance(self):
        return self.edit.provenance

    @contextmanager
    def applied(self, model):
        with self.edit.applied(model) as changed:
            yield changed


def test_a_change_that_cannot_be_told_from_others_is_not_kept(model, edits, tmp_path, monkeypatch):
    nameless = Nameless(edits[0])
    read = run(model, nameless, FACTS[:1], reader(Counter()), None)
    assert same(read, run(model, edits[0], FACTS[:1], reader(Counter()), None))
    with pytest.raises(ValueError, match="a Nameless has no digest"):
        run(model, nameless, FACTS[:1], reader(Counter()), tmp_path)
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="a Nameless has no digest"):
        fe.audit(model, nameless, FACTS[:1], folder=tmp_path)


# ---------------------------------------------------------------------------------------- all that an audit reads


CONTROLS = (" London", " Berlin", " Madrid", " Vienna")


def asked(**more) -> dict[str, Any]:
    subjects = ("The Louvre Museum", "Danielle Darrieux", "The Colosseum", "Anna", "Mary Curie", "Einstein")
    return {
        "reference": [FACTS[0].but(subject=subject) for subject in subjects],
        "routes": [fe.Route(fact, f"{fact.subject} is in", " Paris", " Rome", controls=CONTROLS) for fact in FACTS],
        "same_subject": [fe.Fact(fact.subject, "{} is a", " city") for fact in FACTS],
        "texts": ["John lives in Rome . What is it ?"],
        "progress": False,
        **more,
    }


def test_an_audit_that_was_killed_goes_on_and_comes_to_the_same(kind, tmp_path, monkeypatch):
    model = tiny.model(kind, "gpt2")
    facts = [fact.but(controls=CONTROLS) for fact in FACTS]
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=("",), progress=False)
    edits = [editor(model, [fact]) for fact in facts]
    whole = fe.audit(model, edits, facts, **asked())
    apply_, applied, most = fe.Edit.apply_, [], [0]

    def counted(self, model):
        if len(applied) == most[0]:
            raise KeyboardInterrupt("killed")
        applied.append(self.digest)
        apply_(self, model)

    monkeypatch.setattr(fe.Edit, "apply_", counted)
    times = []
    for most[0] in (7, 10, 10_000, 10_000):
        applied.clear()
        with laws.untouched(model):
            try:
                verdict = fe.audit(model, edits, facts, **asked(folder=tmp_path))
            except KeyboardInterrupt:
                verdict = None
        times.append(len(applied))
    assert verdict is not None and repr(verdict) == repr(whole)
    assert verdict.table().equals(whole.table())
    assert repr(verdict.findings) == repr(whole.findings)
    # Nine measurements were read once for each edit, in three goes; what only compares bits upstream isn't kept.
    assert times[3] == len(edits)
    assert [*times[:2], times[2] - len(edits)] == [7, 10, 9 * len(edits) - 17]


def test_a_model_that_carries_hooks_is_not_kept(model, tmp_path, kind):
    """No fingerprint of weights tells it from the bare one."""
    bare, other = tiny.model(kind, "gpt2"), tiny.model(kind, "gpt2", seed=1)
    first = measured.erasure_success(bare, other, FACTS, folder=tmp_path, progress=False)
    for changed in (other, bare):
        changed.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda value, hook=None: 0 * value)
        with pytest.raises(ValueError, match="carries hooks of its own"):
            measured.erasure_success(bare, other, FACTS, folder=tmp_path, progress=False)
        assert measured.erasure_success(bare, other, FACTS, progress=False).facts == first.facts
        changed.reset_hooks()
    assert measured.erasure_success(bare, other, FACTS, folder=tmp_path, progress=False).prompt == first.prompt
