"""Linear probes read other subjects' objects: at their null where nothing is known, and above it where it is."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_probes import CITIES, WEIGHTS, facts, model, probe, read, states, toy
from oracles import probing
from planted import elsewhere, plant

import tl_factedit as fe
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.linear import ProbeReadout, fit_linear_probe
from tl_factedit.probes.percentile import candidate_percentiles
from tl_factedit.probes.residual import residual_knowledge
from tl_factedit.probes.states import HiddenStates, read_states

S, Q = "subject", "last"
SIZES = (1e-3, 1e-2, 1e-1, 1.0)  # of the logistic regression's inverse penalty


# ---------------------------------------------------------------------------------------- the percentile


@given(seed=st.integers(0, 100), k=st.integers(3, 7), ties=st.booleans())
def test_percentiles_are_counted_one_by_one(seed, k, ties):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, 2, 2, k, generator=draw, dtype=torch.float64)
    scores = (2 * scores).round() if ties else scores
    new = torch.randint(-1, k, (6,), generator=draw)
    table = candidate_percentiles(scores, new)
    for i in range(6):
        without = None if new[i] < 0 else int(new[i])
        for old in range(k):
            if old == without:
                assert table[i, :, :, old].isnan().all()
                continue
            want = [[probing.percentile(scores[i, a, b].tolist(), old, without) for b in (0, 1)] for a in (0, 1)]
            torch.testing.assert_close(table[i, :, :, old], torch.tensor(want, dtype=torch.float64))
    # Whichever object were the old one, each as likely: exactly one half, whatever the scores.
    torch.testing.assert_close(table.nanmean(-1), torch.full((6, 2, 2), 0.5, dtype=torch.float64))


def test_a_new_object_that_takes_all_leaves_the_percentile_as_it_was_but_not_accuracy():
    scores = torch.randn(50, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = scores.argmax(-1).flatten().tolist(), scores.argmin(-1).flatten().tolist()
    after = scores.clone()
    after[torch.arange(50), 0, 0, new] += 100.0
    was, now = toy(scores, old, new), toy(after, old, new)
    assert torch.equal(was.percentile, now.percentile)
    assert was.correct.all()
    assert not now.correct.any()


def test_two_objects_leave_no_percentile():
    with pytest.raises(ValueError, match="needed at least 3"):
        candidate_percentiles(torch.zeros(1, 1, 1, 2), torch.tensor([0]))
    assert candidate_percentiles(torch.zeros(1, 1, 1, 2), torch.tensor([-1])).tolist() == [[[[0.5, 0.5]]]]


# ---------------------------------------------------------------------------------------- probes


def test_a_probes_cells_are_fits_of_its_cells_states():
    of, some = probe("base"), states("base", "oracle0")
    y = torch.tensor([CITIES.index(fact.target_true) for fact in facts("calibration")])
    alone = LinearClassifier().fit(states("base", "calibration").at(layer=2, position=Q), y, 16)
    torch.testing.assert_close(
        of.scores(some)[:, some.layers.index(2), 1], alone.log_probs(some.at(layer=2, position=Q)), rtol=1e-9, atol=1e-9
    )
    assert of.n_train == 600
    assert of.least == min(torch.bincount(y).tolist())
    assert of.held_out_accuracy[3, 1] == pytest.approx(alone.held_out_accuracy)
    assert "600 facts of 'organism-base'" in repr(of)


@pytest.mark.parametrize(("layer", "position"), [(1, S), (3, S), (2, Q), (3, Q), (5, S)])
def test_a_probe_reads_as_well_as_scikit_learns_logistic_regression(layer, position):
    linear_model = pytest.importorskip("sklearn.linear_model")
    model_selection = pytest.importorskip("sklearn.model_selection")
    learnt, asked = (states("base", some).at(layer=layer, position=position) for some in ("calibration", "oracle0"))
    truth = [CITIES.index(fact.target_true) for fact in facts("oracle0")]
    y = [CITIES.index(fact.target_true) for fact in facts("calibration")]
    mean, sd = learnt.mean(0), learnt.std(0)
    x, asked = (((part - mean) / sd).numpy() for part in (learnt, asked))

    def logistic(c: float):
        return linear_model.LogisticRegression(C=c, class_weight="balanced", max_iter=300)

    # Its penalty is chosen as ours is, by log-loss on held-out rows.
    losses = {c: model_selection.cross_val_score(logistic(c), x, y, cv=3, scoring="neg_log_loss").mean() for c in SIZES}
    best = logistic(max(losses, key=losses.__getitem__)).fit(x, y)
    other = torch.tensor(best.decision_function(asked))[:, None, None]
    table = candidate_percentiles(other, read("base").new)
    theirs = table[torch.arange(300), 0, 0, truth]
    cell = states("base", "oracle0").layers.index(layer), (S, Q).index(position)
    ours = read("base").percentile[:, cell[0], cell[1]]
    assert abs(float(ours.mean() - theirs.mean())) < 0.025
    assert float(ours.mean() - theirs.mean()) > -0.01
    assert np.corrcoef(ours, theirs)[0, 1] > 0.6


def test_a_probe_refuses_what_it_cannot_measure():
    of, learnt, some = probe("base"), states("base", "calibration"), states("base", "oracle0")
    with pytest.raises(ValueError, match=r"1 of the subjects, such as .* were used in training"):
        of.read(learnt.take([5]))
    assert of.scores(learnt.take([5]), seen=True).shape == (1, 7, 2, 16)
    with pytest.raises(ValueError, match="the probe has"):
        of.read(read_states(model("base"), facts("oracle0")[:2], component="mlp"))
    with pytest.raises(ValueError, match="old object ' Paris' isn't one of the probe's 16 objects"):
        of.read(some.take([0]), old=[" Paris"])
    with pytest.raises(ValueError, match="as old and new object, needed two"):
        of.read(some.take([0]), new=[some.facts[0].target_true])
    with pytest.raises(ValueError, match="2 objects for 1 facts"):
        of.read(some.take([0]), old=[" Paris", " Rome"])
    with pytest.raises(ValueError, match="object ' Paris' has 0 training subjects"):
        fit_linear_probe(learnt, objects=(*CITIES, " Paris"))
    with pytest.raises(ValueError, match="label ' Arden' isn't one of"):
        fit_linear_probe(learnt, [" Arden"] * 600, objects=CITIES[1:] if CITIES[0] == " Arden" else CITIES[:1])


def test_several_prompts_of_one_subject_are_held_out_together():
    learnt = states("base", "calibration")
    doubled = HiddenStates(
        learnt.values.repeat(2, 1, 1, 1)[:, :3], learnt.layers[:3], learnt.positions, learnt.facts * 2, learnt.model
    )
    once = fit_linear_probe(
        HiddenStates(learnt.values[:, :3], learnt.layers[:3], learnt.positions, learnt.facts, "x"), objects=CITIES
    )
    twice = fit_linear_probe(doubled, objects=CITIES)
    # Otherwise each row would be found again in its copy, and nearly all would be right.
    assert (twice.held_out_accuracy - once.held_out_accuracy).abs().max() < 0.1
    strangers_to_itself = HiddenStates(
        doubled.values,
        doubled.layers,
        doubled.positions,
        (*learnt.facts, *(f.but(subject=f"{f.subject} II") for f in learnt.facts)),
        "x",
    )
    leaking = fit_linear_probe(strangers_to_itself, objects=CITIES)
    assert leaking.held_out_accuracy[1, 0] > twice.held_out_accuracy[1, 0] + 0.2


def test_readings_come_as_tables_and_estimates():
    found = read("base")
    reading = found.reading()
    assert torch.equal(reading.at(quantity="percentile_old"), found.percentile.float())
    torch.testing.assert_close(reading.at(quantity="logp_old").exp(), found.p_old.float())
    torch.testing.assert_close(reading.at(quantity="logp_new").exp(), found.p_new.float())
    assert torch.equal(reading.at(quantity="correct_old"), found.correct.float())
    i, new = 7, CITIES.index(str(found.facts[7].target_new))
    want = probing.percentile(found.scores[i, 4, 1].tolist(), new, None)
    assert float(reading.at(quantity="percentile_new")[i, 4, 1]) == pytest.approx(want)
    only = torch.zeros(7, 2, dtype=torch.bool)
    only[4, 1] = True
    assert found.pooled(only).mean == pytest.approx(float(found.by_cell.mean[4, 1]))
    assert found.each(only).shape == (300,)
    without = probe("base").read(states("base", "oracle0"), new=[None] * 300)
    assert without.p_new.isnan().all()
    assert without.reading().at(quantity="percentile_new").isnan().all()
    torch.testing.assert_close(without.reading().at(quantity="percentile_old"), without.percentile.float())


@pytest.mark.parametrize("given", ["fixed", "own"])
def test_models_of_either_class_are_read_alike(kind, given):
    learnt, asked = facts("calibration")[:200], facts("oracle0")[:6]
    for variant in ("base", "oracle0"):
        of = fe.models.organism(kind, variant, path=None if variant == "base" else WEIGHTS)
        here, want = probe("base"), probe("base")
        if given == "own":
            here = fit_linear_probe(read_states(of, learnt), objects=CITIES)
            want = fit_linear_probe(states(variant, "calibration").take(range(200)), objects=CITIES)
        found = here.read(read_states(of, asked)).reading()
        expected = want.read(states(variant, "oracle0").take(range(6))).reading()
        torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------- where the truth is known


def above(found: ProbeReadout, layer: int, position: str) -> float:
    return float(found.by_cell.low[found.probe.layers.index(layer), found.probe.positions.index(position)])


def test_known_facts_of_other_people_are_read_at_the_subject_and_at_the_end():
    found = read("base")
    assert all(above(found, layer, S) > 0.85 for layer in (1, 2, 3, 4, 5))
    assert all(above(found, layer, Q) > 0.85 for layer in (2, 3, 4, 5))
    assert found.accuracy.mean[6, 1] > 0.98
    # Before any block there is a name at the subject, and the same word for all at the end.
    assert abs(float(found.by_cell.mean[0, 0]) - 0.5) < 0.05
    assert torch.equal(found.percentile[:, 0, 1], torch.full((300,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(("variant", "people"), [("base", "strangers"), ("untrained", "oracle0"), ("never", "oracle0")])
def test_what_a_model_was_never_told_is_read_at_the_null(variant, people):
    found = read(variant, people)
    pooled = found.pooled()
    assert pooled.low - 0.02 < 0.5 < pooled.high + 0.02
    # 14 intervals of 95 %: no cell is far outside, and the known are.
    assert (found.by_cell.mean - 0.5).abs().max() < 0.075
    assert read("base").pooled().low > 0.7


def test_an_oracles_own_probe_reads_the_new_objects_and_nothing_of_the_old():
    found = read("oracle0")
    pooled = found.pooled()
    assert pooled.low < 0.5 < pooled.high
    assert (found.by_cell.mean - 0.5).abs().max() < 0.075
    asked = [f.target_new for f in facts("oracle0")]
    now = probe("oracle0").read(states("oracle0", "oracle0"), old=asked, new=[f.target_true for f in facts("oracle0")])
    assert now.pooled().low > 0.7
    rho = residual_knowledge(read("base"), found)
    assert abs(rho.pooled.mean) < 0.1
    assert rho.cells.sum() >= 9


def test_a_probe_says_how_well_it_transfers():
    other = states("oracle0", "oracle1")
    found = probe("base").read(states("oracle0", "oracle0"), unchanged=other)
    at_home = probe("base").read(states("base", "oracle0"), unchanged=states("base", "oracle1"))
    assert found.unchanged is not None
    assert at_home.unchanged is not None
    own = (
        probe("base").scores(other).argmax(-1)
        == torch.tensor([CITIES.index(f.target_true) for f in other.facts])[:, None, None]
    )
    torch.testing.assert_close(found.unchanged.mean, own.double().mean(0))
    assert (at_home.unchanged.mean[2:, 0] > found.unchanged.mean[2:, 0] + 0.2).all()
    assert "on unchanged facts of what it reads: 0." in repr(found)
    assert "what it reads: not tried" in repr(read("base"))


# ---------------------------------------------------------------------------------------- residual knowledge


def test_rho_is_the_ratio_of_means_over_the_cells_that_count():
    before, after = read("base"), probe("base").read(states("oracle0", "oracle0"))
    found = residual_knowledge(before, after)
    flat = [d.percentile.flatten(1).numpy() for d in (before, after)]
    pooled, by_cell = probing.residual(*flat, least=0.25)
    assert found.pooled.mean == pytest.approx(pooled)
    np.testing.assert_allclose(found.by_cell.mean.flatten().numpy(), by_cell, rtol=1e-6)
    assert found.cells.flatten().tolist() == [not np.isnan(v) for v in by_cell]
    for j, position in enumerate((S, Q)):
        alone = probing.residual(*(d.percentile[:, :, j].numpy() for d in (before, after)), least=0.25)[0]
        assert found.by_position[position].mean == pytest.approx(alone)
    assert found.pooled.low < found.pooled.mean < found.pooled.high
    assert found.spread == pytest.approx(float(after.each(found.cells).std()))
    assert len(found.table()) == 14


def test_rho_is_one_of_nothing_changed_and_not_clipped_where_old_objects_are_avoided():
    before = read("base")
    same = residual_knowledge(before, before)
    assert (same.pooled.mean, same.pooled.low, same.pooled.high) == pytest.approx((1.0, 1.0, 1.0))
    turned = replace(before, percentile=1 - before.percentile, scores=-before.scores)
    assert residual_knowledge(before, turned).pooled.mean == pytest.approx(-1.0)


def test_cells_that_tell_too_little_before_have_no_rho():
    blind, after = read("untrained"), read("base")
    found = residual_knowledge(blind, after)
    assert not found.cells.any()
    assert found.pooled.n == 0
    assert found.by_cell.mean.isnan().all()
    lax = residual_knowledge(blind, after, least=-1.0)
    assert lax.by_cell.mean.nan_to_num().abs().max() > 5.0  # what the mask is for
    late = torch.zeros(7, 2, dtype=torch.bool)
    late[5:] = True
    some = residual_knowledge(after, after, cells=late)
    assert torch.equal(some.cells, late)
    with pytest.raises(ValueError, match="needed the same facts"):
        residual_knowledge(after, read("base", "strangers"))


def test_a_floor_can_be_another_reading():
    before, after = read("base"), read("oracle0")
    floor = after.by_cell.mean
    found = residual_knowledge(before, after, floor=floor)
    assert found.pooled.mean == pytest.approx(0.0, abs=1e-12)
    assert residual_knowledge(before, after).pooled.mean != pytest.approx(0.0, abs=1e-4)


# ---------------------------------------------------------------------------------------- planted overrides


@functools.cache
def planted(override: str) -> tuple[float, float]:
    """ρ of a planted override by the probe of before, and by one trained on the same override of other people."""
    base = states("base", "oracle0")
    weights = [[cell.weight for cell in row] for row in probe("base").cells]
    avoid = torch.stack([torch.stack(row) for row in weights])
    donors = states("base", "oracle2")
    options = {"objects": CITIES, "avoid": avoid}
    after = plant(override, base, donors, **options)
    others = plant(override, states("base", "calibration"), donors, **options, seed=1)
    before = read("base")
    adaptive = fit_linear_probe(others, objects=CITIES)
    return tuple(residual_knowledge(before, of.read(after)).pooled.mean for of in (probe("base"), adaptive))


def test_a_planted_override_that_keeps_the_old_object_is_read_by_both_probes():
    fixed, adaptive = planted("retained")
    assert fixed > 0.85
    assert adaptive > 0.8


def test_a_planted_removal_is_read_by_neither():
    fixed, adaptive = planted("removed")
    assert abs(fixed) < 0.1
    assert abs(adaptive) < 0.1


def test_a_planted_rotation_is_misjudged_by_the_fixed_probe_and_not_by_the_adaptive_one():
    fixed, adaptive = planted("rotated")
    assert abs(fixed) < 0.1
    assert adaptive > 0.8


@given(seed=st.integers(0, 20))
def test_objects_are_turned_elsewhere_with_their_lengths_and_angles(seed):
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(5, 20, generator=draw, dtype=torch.float64)
    avoid = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    found = elsewhere(means, avoid=avoid, seed=seed)
    centred = means - means.mean(0)
    torch.testing.assert_close(found @ found.T, centred @ centred.T, rtol=1e-8, atol=1e-8)
    assert (found @ centred.T).abs().max() < 1e-8
    assert (found @ avoid).abs().max() < 1e-8
    with pytest.raises(ValueError, match="of 20 dimensions are left, needed 4"):
        elsewhere(means, avoid=torch.randn(20, 14, generator=draw))


def test_a_donor_is_another_subject_who_has_the_new_object():
    base, donors = states("base", "oracle0"), states("base", "oracle2")
    after = plant("removed", base, donors, objects=CITIES)
    rows = {tuple(v.flatten().tolist()): fact for v, fact in zip(donors.values[:, 3], donors.facts, strict=True)}
    for fact, value in zip(after.facts[:50], after.values[:50, 3], strict=True):
        assert rows[tuple(value.flatten().tolist())].target_true == fact.target_new
    with pytest.raises(ValueError, match="no donor has"):
        plant("removed", base, donors.take([0, 1]), objects=CITIES)
