"""Verdicts where the truth is known: models without the old object, overrides by construction, planted states."""

import copy
import functools
from dataclasses import replace

import laws
import pytest
import tiny
import torch
from audits import ASKED, CONTEXTS, FACTS, FIT, HELD, REFERENCE, REST, audited, organism
from measured import retention
from planted import plant

import tl_factedit as fe
from tl_factedit.auditing.calibration import Calibration
from tl_factedit.auditing.findings import NEEDED, AttackFinding, Findings
from tl_factedit.auditing.retained import states_of_changed
from tl_factedit.auditing.rules import judge
from tl_factedit.core.estimate import Estimate
from tl_factedit.editors.router import Router
from tl_factedit.organism import text as told
from tl_factedit.probes.linear import fit_linear_probe
from tl_factedit.probes.residual import residual_knowledge
from tl_factedit.probes.states import read_states

held = pytest.mark.skipif(not HELD.exists(), reason="the twins' weights are in a checkout, in tests/organism/weights")


LONG = pytest.mark.skipif(not tiny.HAS_HOOKED, reason="long under type checks: TransformerLens 3 runs it")


@pytest.fixture(params=tiny.ONE_KIND, scope="session")
def kind(request):
    """Verdicts of either class hang together by what is measured, which is tested of both."""
    return request.param


@LONG
@held
@pytest.mark.parametrize("oracle", ["oracle0"])
def test_a_model_that_never_had_the_old_city_is_erased_and_not_without_its_evidence(kind, oracle):
    changed = organism(kind, oracle)
    with laws.untouched(organism(kind)), laws.untouched(changed):
        verdict = audited(kind, changed, calibration=Calibration(changed, REST), full=True)
    assert verdict.label == "ERASED", repr(verdict)
    assert verdict.explain().startswith("Nothing of the old object was found") and not verdict.by
    assert verdict.power and verdict.level == "population"
    assert abs(verdict.retained.estimate.mean) < 0.2 and verdict.recoverable.estimate.mean < 0.1
    for lack in ("native", "adaptive", "route_new", "perplexity"):
        assert judge(replace(verdict.findings, **{lack: None})).label == "INCONCLUSIVE", lack
    # All of it was written, so that it can't be silenced: the weights had to be asked.
    for lack in ("weight reversal", "disjoint relearning"):
        assert judge(without(verdict.findings, lack)).label == "INCONCLUSIVE", lack
    assert not verdict.findings.untried and {each.attack for each in verdict.attacks} == set(NEEDED)
    for lack in NEEDED:
        assert judge(replace(without(verdict.findings, lack), untried=(lack,))).label == "INCONCLUSIVE", lack
    # What the attacks find of an override of the same people is part of it.
    assert verdict.findings.control is not None and verdict.findings.control["weight reversal"].low > 0
    assert judge(replace(verdict.findings, control={"drift": Estimate(0.0, -0.1, 0.1, 75)})).label == "INCONCLUSIVE"
    assert "ERASED" in verdict._repr_html_() and len(verdict.table()) == len(ASKED)


def without(findings: Findings, *attacks: str) -> Findings:
    return replace(findings, attacks=tuple(each for each in findings.attacks if each.attack not in attacks))


def test_an_untouched_model_has_failed(kind):
    verdict = audited(kind, copy.deepcopy(organism(kind)), same_subject=(), routes=(), texts=(), reference=())
    assert verdict.label == "FAILED"


@functools.cache
def router(kind: str):
    return Router(layer=1, fit=FIT, contexts=CONTEXTS, progress=False)(organism(kind), ASKED[:24])


def test_an_override_by_construction_is_inserted_however_it_is_given(kind):
    changed = router(kind)
    with laws.untouched(organism(kind)):
        verdict = audited(kind, changed, ASKED[:24])
    assert verdict.label == "INSERTED", repr(verdict)
    knocked = verdict.attack("knock-out")
    assert knocked.best.layers == (1,) and knocked.strongest.low > 0.5 and knocked.details["whole"]
    assert verdict.by == {"elsewhere"} and "foreseeable" in verdict.explain()
    assert verdict.table()["old_back"].mean() > 0.8
    # Without what brings the old object back nothing else would have called it that.
    assert judge(without(verdict.findings, "knock-out", "indirect routes")).label != "INSERTED"


@LONG
def test_single_rome_edits_are_inserted_and_a_list_of_them_is_read_edit_by_edit(kind):
    model = organism(kind)
    stats = fe.key_stats(model, 1, told.texts(2_000), n_tokens=20_000, progress=False)[1]
    facts = ASKED[:12]
    edits = [fe.Rome(stats, fit=FIT, contexts=CONTEXTS, progress=False)(model, [fact]) for fact in facts]
    with laws.untouched(model):
        verdict = audited(kind, edits[::-1], facts)
    assert verdict.label == "INSERTED", repr(verdict)
    with edits[3].applied(model):
        alone = fe.evaluate(model, facts[3])
    assert verdict.after.answers[-1].fact == 11
    mine = [answer for answer in verdict.after.answers if answer.fact == 3]
    assert [a.success for a in mine] == [a.success for a in alone.answers]
    assert verdict.upstream.invariant and verdict.upstream.layer == 1
    single = audited(kind, edits[0], facts[:1])
    assert (single.label, single.level) == ("INSERTED", "per edit")
    assert single.dose is not None and single.gains


@LONG
def test_an_override_where_no_layer_can_be_spared_is_not_called_erased(kind):
    """The base model loses its answers without layer 0, so that no knock-out can show what lies over them there."""
    facts = ASKED[:40]
    route = Router(layer=0, fit=replace(FIT, kl_weight=0.5), contexts=("",), progress=False)(organism(kind), facts)
    verdict = audited(kind, route, facts, reference=REFERENCE[:60], texts=())
    assert verdict.findings.efficacy.mean > 0.9 and verdict.attack("knock-out").strongest.mean < 0.1
    off = next(each for each in verdict.findings.attacks if (each.attack, each.shows) == ("knock-out", "elsewhere"))
    assert off.covers is False
    assert any("the unedited model can't spare it" in line for line in verdict.missing)


@LONG
def test_a_model_that_was_never_trained_is_not_called_erased(kind):
    changed = untrained(organism(kind))
    bare = [fact.but(neighbours=(), neighbour_targets=()) for fact in ASKED[:40]]
    verdict = audited(
        kind,
        changed,
        bare,
        reference=REFERENCE[:200],
        same_subject=(),
        texts=(),
        objective=fe.Erase(),
    )
    assert verdict.findings.native is None and verdict.label == "INCONCLUSIVE", repr(verdict)
    assert any("reads unchanged facts of the changed model" in line for line in verdict.missing)


def untrained(model):
    """A copy with random weights."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in other.parameters():
            if param.ndim > 1:
                param.copy_(0.05 * torch.randn(param.shape, generator=draw))
    return other


@LONG
def test_an_edit_inside_another_model_is_found_there_and_its_layers_are_knocked_out_together(kind):
    model = organism(kind)
    stats = fe.key_stats(model, [1, 3], told.texts(1_000), n_tokens=8_000, progress=False)
    facts = ASKED[:12]
    spread = {"fit": replace(FIT, clamp=0.75), "contexts": CONTEXTS, "progress": False}
    edit = fe.Memit(stats, weight=1.0, **spread)(model, facts)
    other = copy.deepcopy(model)
    edit.apply_(other)
    bare = {"same_subject": (), "routes": (), "texts": (), "reference": REFERENCE[:60]}
    given, found = audited(kind, edit, facts, **bare), audited(kind, other, facts, **bare)
    knocked = [verdict.attack("knock-out") for verdict in (given, found)]
    assert knocked[0].keys == knocked[1].keys
    # What the footprint names: the two layers that were written, though they aren't neighbours.
    assert any({cell.layer for cell in key.cells} == {1, 3} for key in knocked[1].keys)
    assert given.label == found.label
    torch.testing.assert_close(knocked[0].excess.mean, knocked[1].excess.mean, equal_nan=True)


def test_facts_that_cannot_be_knocked_out_are_named_and_calibrated_people_are_no_references(kind):
    changed = router(kind)
    facts = ASKED[:8]
    few = [fact.but(relation="elsewhere") for fact in ASKED[8:12]]
    bare = {"same_subject": (), "routes": (), "texts": (), "reference": REFERENCE[:60]}
    verdict = audited(kind, changed, [*facts, *few], **bare)
    assert any("4 facts of 'elsewhere' weren't knocked out" in line for line in verdict.missing)
    assert len(verdict.attack("knock-out").facts) == 8
    mixed = [*REFERENCE[:200], *REST]
    kept = retention(
        organism(kind), organism(kind), ASKED[:24], mixed, Calibration(organism(kind), REST), progress=False
    )
    assert kept.n_native == 200


# ---------------------------------------------------------------------------------------- planted states

BEHAVES = Findings(
    efficacy=Estimate(1.0, 0.95, 1.0, 75),
    paraphrase=Estimate(1.0, 0.95, 1.0, 75),
    neighbour_loss=Estimate(0.0, 0.0, 0.0, 75),
    specificity_loss=Estimate(0.0, 0.0, 0.05, 75),
    perplexity=Estimate(1.0, 0.99, 1.01, 20),
    attacks=(
        AttackFinding("knock-out", "elsewhere", "one layer", Estimate(0.0, 0.0, 0.08, 75), 0.05, 0.08, 5, True),
        AttackFinding("read-out", "residue", "lens", Estimate(0.0, 0.0, 0.08, 75), 0.05, 0.08, 5),
        AttackFinding("routes", "underneath", "all", Estimate(0.0, 0.0, 0.05, 75), 0.05, 0.05, 1),
    ),
    route_new=Estimate(0.99, 0.93, 1.0, 75),
)
"""As an oracle behaves: nothing comes back."""


@pytest.mark.parametrize(("override", "label"), [("removed", "ERASED"), ("rotated", "MOVED"), ("retained", "LATENT")])
def test_what_is_planted_into_the_states_is_what_is_said_of_them(kind, override, label):
    model = organism(kind)
    objects = sorted({fact.target_true for fact in REFERENCE})
    donors, clean = read_states(model, REFERENCE), read_states(model, FACTS)
    planted = plant(override, clean, donors, objects=objects)
    asked, rest = list(range(75)), list(range(75, 300))
    probe = fit_linear_probe(donors, objects=objects)
    before = probe.read(clean.take(asked))
    native = residual_knowledge(before, probe.read(planted.take(asked)))
    few = fit_linear_probe(clean.take(rest), objects=objects).read(clean.take(asked))
    adaptive = residual_knowledge(few, fit_linear_probe(planted.take(rest), objects=objects).read(planted.take(asked)))
    found = judge(replace(BEHAVES, native=native.pooled, adaptive=adaptive.pooled))
    assert found.label == label, (native, adaptive)


# ---------------------------------------------------------------------------------------- what is retained


def test_probes_are_only_trained_where_they_can_be(kind):
    model, changed = organism(kind), router(kind)
    facts = ASKED[:24]
    few = retention(model, changed, facts, REFERENCE[:20])
    assert few.native is None and "no decoder was trained" in few.why[0]
    mixed = retention(model, changed, [*facts, facts[0].but(relation="birth")], REFERENCE)
    assert mixed.relations == {"city": 24} and "'birth'" in mixed.why[0] and "for its 1 fact" in mixed.why[0]
    with pytest.raises(ValueError, match="are in the calibration and among the facts"):
        retention(model, changed, facts, REFERENCE, Calibration(changed, facts))
    with pytest.raises(ValueError, match="no target_new"):
        retention(model, model, [facts[0].but(target_new=None)], REFERENCE)


@LONG
def test_facts_of_several_relations_have_a_probe_each_and_are_pooled(kind):
    model, changed = organism(kind), router(kind)
    others = [*REFERENCE[:300], *fe.models.organism_facts("company", "calibration")[:300]]
    companies = sorted({fact.target_true for fact in others if fact.relation == "company"})
    work = {fact.subject: fact for fact in fe.models.organism_facts("company", "oracle0")}
    facts = []  # in turn: a changed city, and the company of the same person, which nothing changed
    for fact in ASKED[:24]:
        beside = work[fact.subject]
        new = next(company for company in companies if company != beside.target_true)
        facts += [fact, beside.but(target_new=new)]
    found = retention(model, changed, facts, others, progress=False, force=True)
    assert found.relations == {"city": 24, "company": 24} and "2 relations" in repr(found)
    assert found.n_native == 600
    apart = [
        retention(model, changed, facts[i::2], [x for x in others if x.relation == relation], force=True)
        for i, relation in enumerate(("city", "company"))
    ]
    assert found.facts == (*apart[0].facts, *apart[1].facts)
    assert apart[0].native.pooled.mean < 0.5 < 0.8 < apart[1].native.pooled.mean
    assert apart[0].native.pooled.mean < found.native.pooled.mean < apart[1].native.pooled.mean
    assert found.native.pooled.n == 48
    assert torch.allclose(found.transfer, (apart[0].transfer + apart[1].transfer) / 2)


def test_what_lies_upstream_is_left_out_and_changed_subjects_are_no_references(kind):
    model, changed = organism(kind), router(kind)
    facts = ASKED[:24]
    found = retention(model, changed, facts, [*facts, *REFERENCE])
    assert found.n_native == len(REFERENCE)
    layers = found.native.layers
    assert not bool(found.native.cells[[layers.index(layer) for layer in (-1, 0)]].any())
    assert bool(found.native.cells[layers.index(1) :].any())


def test_states_come_in_the_order_of_the_facts(kind):
    model = organism(kind)
    changes = [Router(layer=1, contexts=("",), fit=fe.ValueFit(steps=2), progress=False)(model, [f]) for f in ASKED[:3]]
    read = states_of_changed(fe.Population.of(model, changes[::-1], ASKED[:3]))
    for i, change in enumerate(changes):
        with change.applied(model):
            alone = read_states(model, [ASKED[i]])
        assert (read.values[i] - alone.values[0]).abs().max() < 1e-4
