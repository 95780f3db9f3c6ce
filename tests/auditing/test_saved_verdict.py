"""A verdict and its scores come back from a file with all that was measured, and say where they came from."""

import copy
import json
import math
from dataclasses import dataclass, replace

import attacking_facts
import laws
import pytest
import tiny

import tl_factedit as fe
from tl_factedit.attacks import Recovery
from tl_factedit.organism import text as told

FACTS = fe.models.organism_facts("city")
TEXTS = told.texts(3)
ATTACKS = (
    fe.attacks.ContextAttack((fe.attacks.RepeatPrefix(2),)),
    fe.attacks.WeightReversal(),
    fe.attacks.Relearn(lr=1e-3, steps=2, controls=2),
)


def as_text(result) -> str:
    """Everything in a result; NaN equals NaN in it."""
    return json.dumps(result.to_dict())


@pytest.fixture(scope="module")
def verdicts(kind):
    """Of one edit, of a list of edits that erase, and of another model: together they hold all that a verdict can."""
    model, asked, others = fe.models.organism(kind), FACTS[:2], FACTS[10:70]
    given = {"reference": others, "texts": TEXTS, "progress": False}
    stats = fe.KeyStats.identity(model, 1)
    writing = fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)
    erasing = replace(writing, objective=fe.Erase())
    edits = writing.each(model, asked)
    calibration = fe.Calibration(writing.each(model, FACTS[70:72]), FACTS[70:72])
    return {
        "edit": fe.audit(
            model,
            fe.compose(edits),
            asked,
            routes=fe.models.organism_routes(asked),
            same_subject=fe.models.organism_same_subject(asked)[:2],
            calibration=calibration,
            attacks=ATTACKS,
            seed=3,
            **given,
        ),
        "erasures": fe.audit(model, erasing.each(model, asked), asked, **given),
        "model": fe.audit(model, fe.models.organism(kind, "plain"), asked[:1], progress=False),
    }


@pytest.mark.parametrize("name", ["edit", "erasures", "model"])
def test_a_verdict_comes_back_whole(verdicts, name, tmp_path):
    verdict = verdicts[name]
    verdict.save(tmp_path / "verdict.safetensors")
    found = fe.Verdict.load(tmp_path / "verdict.safetensors")
    assert as_text(found) == as_text(verdict)
    assert repr(found) == repr(verdict)
    assert found.table().equals(verdict.table())
    assert fe.show.verdict(found).html == fe.show.verdict(verdict).html
    for mine, theirs in zip(verdict.attacks, found.attacks, strict=True):
        assert theirs.table().equals(mine.table()) and theirs.cases == mine.cases
    found.save(tmp_path / "again")
    assert as_text(fe.Verdict.load(tmp_path / "again")) == as_text(verdict)


def test_what_a_verdict_is_judged_by_is_judged_the_same(verdicts, tmp_path):
    for verdict in verdicts.values():
        verdict.save(tmp_path / "verdict")
        found = fe.Verdict.load(tmp_path / "verdict")
        assert fe.auditing.judge(found.findings, found.thresholds).label == verdict.label


def test_everything_that_can_be_gathered_is_among_what_was_saved(verdicts):
    whole, erased = verdicts["edit"], verdicts["erasures"]
    assert None not in (whole.retention, whole.specificity, whole.drift, whole.upstream, whole.dose)
    assert whole.gains and erased.erasure_success is not None
    assert {each.attack for each in whole.attacks} > {"knock-out", "read-out", "indirect routes"}
    assert len(whole.attacks) == 5 + len(ATTACKS)  # two read-outs, the knock-out, paraphrases, the routes


def test_a_verdict_says_where_it_came_from(verdicts, kind):
    model = fe.models.organism(kind)
    here = verdicts["edit"].provenance
    assert here.model == fe.editing.Provenance.of(model)
    (change,) = here.changes
    assert (change.kind, change.editor["name"]) == ("Edit", "composed")
    assert change.provenance.weights == here.model.weights and change.digest is not None
    assert here.seed == 3 and here.given["texts"] == 3 and here.given["calibration"] == 2
    assert any(text.startswith("KnockOut(") and "widths=" in text for text in here.attacks)
    assert any(text.startswith("WeightReversal(") for text in here.attacks)
    assert verdicts["edit"].thresholds == fe.Thresholds()
    erased = verdicts["erasures"].provenance
    assert erased.erasing and not here.erasing and len(erased.changes) == 2
    assert erased.digest != here.digest
    (other,) = verdicts["model"].provenance.changes
    assert other.kind == "model" and other.provenance.model == "organism-plain"


def test_the_same_question_has_the_same_digest(kind):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    asked = [fe.audit(model, copy.deepcopy(model), facts[:n], progress=False).provenance for n in (1, 1, 2)]
    assert asked[0] == asked[1] and asked[0].digest != asked[2].digest


@dataclass(frozen=True)
class Careless:
    """An attack that keeps what no file can hold."""

    def __call__(self, population: fe.Population, /) -> Recovery:
        found = fe.attacks.ReadOut()(population)
        return replace(found, attack="careless", details={"fine": 1, "model": population.model})


def test_what_an_attack_of_ones_own_left_is_named_when_it_is_saved(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    verdict = fe.audit(model, copy.deepcopy(model), facts, attacks=[Careless()], progress=False)
    at = next(i for i, each in enumerate(verdict.attacks) if each.attack == "careless")
    for call in (lambda: verdict.save(tmp_path / "verdict"), verdict.to_dict):
        with pytest.raises(ValueError, match=rf"verdict\.attacks\[{at}\]\.details\['model'\] is "):
            call()
    assert not list(tmp_path.iterdir())


def test_scores_come_back_whole(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    scores = fe.evaluate(model, [laws.FACT, laws.OTHER])
    scores.save(tmp_path / "scores")
    found = fe.Scores.load(tmp_path / "scores")
    assert found.facts == scores.facts and found.answers == scores.answers and found.provenance == scores.provenance
    assert as_text(found) == as_text(scores) and repr(found) == repr(scores)
    alone = fe.evaluate(model, [laws.OTHER])  # without paraphrases or neighbours
    alone.save(tmp_path / "alone")
    assert math.isnan(fe.Scores.load(tmp_path / "alone").paraphrase.mean)
    assert math.isnan(alone.to_dict()["paraphrase"]["mean"])


def test_files_of_other_kinds_and_damaged_ones_are_named(verdicts, kind, tmp_path):
    path = tmp_path / "verdict.safetensors"
    verdicts["model"].save(path)
    with pytest.raises(ValueError, match=r"verdict\.safetensors holds 'verdict', needed 'scores'"):
        fe.Scores.load(path)
    with pytest.raises(ValueError, match=r"verdict\.safetensors holds 'verdict', needed 'edit'"):
        fe.Edit.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"verdict\.safetensors is cut short"):
        fe.Verdict.load(path)
    verdicts["model"].before.save(path)
    with pytest.raises(ValueError, match=r"verdict\.safetensors holds 'scores', needed 'verdict'"):
        fe.Verdict.load(path)
