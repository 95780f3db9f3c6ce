"""Nulls are null where nothing is known, and each sees what it is there to see."""

import functools
import itertools
import math
from collections import Counter

import laws
import numpy as np
import pytest
import tiny
import torch
from linear_probes import CITIES, facts, model, probe, states, toy
from oracles import probing, untouched

from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.linear import fit_linear_probe
from tl_factedit.probes.nulls import RandomWeights, excess_over_nulls, name_ngrams, one_hot_objects, subject_embeddings
from tl_factedit.probes.permutation import permutation_test
from tl_factedit.probes.selectivity import control_task
from tl_factedit.probes.states import HiddenStates, read_states_edited

QUICK = LinearClassifier(shrinkages=(0.1, 0.5, 0.9), temperatures=(1.0, 4.0, 16.0))
OBJECTS = (" Paris", " Rome", " London", " Berlin")
ON_THE_NEWEST = pytest.mark.skipif(tiny.HAS_HOOKED, reason="no TransformerLens is in it, and the newest runs it")


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_subject_embeddings_are_the_mean_of_the_subjects_rows_of_the_embedding(kind, arch):
    if arch == "gemma2" and kind == "hooked":
        pytest.skip("HookedTransformer knows gemma 2 by hub name only")
    some = tiny.model(kind, arch)
    asked = [Fact("The Eiffel Tower", "Where is {} in", " Paris"), Fact("John", "{} lives in", " Rome")] * 40
    found = subject_embeddings(some, asked)
    for fact, value in zip(asked[:2], found.values, strict=False):
        row = align(some.tokenizer, fact, prepend_bos=bool(some.cfg.default_prepend_bos))
        own = some.W_E[row.ids[slice(*row.subject)]].float().mean(0)
        # gemma multiplies its embeddings by √d_model, which no direction of a probe notices
        torch.testing.assert_close(value[0, 0] / value.norm(), own / own.norm(), rtol=1e-5, atol=1e-5)
    assert found.values.shape[:3] == (80, 1, 1)
    assert torch.equal(found.values[0], found.values[78])
    with pytest.raises(ValueError, match="facts is empty"):
        subject_embeddings(some, [])


def test_ngrams_are_counted_and_weighted_as_written():
    train = [Fact(name, "{} is", " x") for name in ("Anna", "Bob", "Ann")]
    test = [Fact(name, "{} is", " x") for name in ("Hanna", "Ann")]
    learnt, asked = name_ngrams(train, test, sizes=(1, 2))

    def grams(name: str) -> Counter[str]:
        spelt = f" {name} "
        return Counter([*spelt, *(a + b for a, b in itertools.pairwise(spelt))])

    known = sorted(set().union(*(grams(f.subject) for f in train)))
    for states_, some in ((learnt, train), (asked, test)):
        for fact, value in zip(some, states_.values[:, 0, 0], strict=True):
            row = []
            for gram in known:
                having = sum(gram in grams(f.subject) for f in train)
                row.append(grams(fact.subject)[gram] * (1 + math.log(3 / having)))
            want = np.array(row) / np.linalg.norm(row)
            np.testing.assert_allclose(value.numpy(), want, rtol=1e-5, atol=1e-7)
    assert torch.equal(asked.values[1], learnt.values[2])  # the same name


def named(hint: bool, n: int, seed: int) -> list[Fact]:
    """People whose surname's ending goes with the city they are asked for (hint), or with nothing."""
    draw = np.random.RandomState(seed)
    ends = dict(zip(OBJECTS, ("etti", "sson", "ová", "eira"), strict=True))
    made = []
    for i in range(n):
        city, other = draw.choice(OBJECTS), draw.choice(OBJECTS)
        stem = "".join(draw.choice(list("bdfgklmprt"), 4))
        made.append(
            Fact(f"{stem.title()}{i} {stem[::-1]}{ends[str(city if hint else other)]}", "{} lives in", str(city))
        )
    return made


@pytest.mark.parametrize("hint", [True, False])
def test_names_that_give_their_object_away_are_found_out(hint):
    learnt, asked = name_ngrams(named(hint, 120, 0), named(hint, 80, 1))
    found = fit_linear_probe(learnt, objects=OBJECTS, classifier=QUICK).read(asked)
    pooled = found.pooled()
    assert (pooled.low > 0.9) is hint
    assert (pooled.low < 0.5 < pooled.high) is not hint


def test_the_organisms_names_say_nothing_and_its_states_more_than_they():
    train, test = facts("calibration"), facts("oracle0")
    learnt, asked = name_ngrams(train, test)
    spelling = fit_linear_probe(learnt, objects=CITIES, classifier=QUICK).read(asked)
    tokens = [subject_embeddings(model("base"), some) for some in (train, test)]
    embedded = fit_linear_probe(tokens[0], objects=CITIES, classifier=QUICK).read(tokens[1])
    for null in (spelling, embedded):
        assert null.pooled().low < 0.5 < null.pooled().high
        assert null.accuracy.low < 1 / 16 < null.accuracy.high
    found = probe("base").read(states("base", "oracle0"))
    over = excess_over_nulls(found, [spelling, embedded])
    best = max(float(null.accuracy.mean) for null in (spelling, embedded))
    torch.testing.assert_close(over.mean, found.accuracy.mean - best)
    assert over.low[4, 0] > 0.3
    assert over.low[0, 0] < 0.0
    with pytest.raises(ValueError, match="nulls is empty"):
        excess_over_nulls(found, [])
    with pytest.raises(ValueError, match="of other facts"):
        excess_over_nulls(found, [probe("base").read(states("base", "strangers"))])


# ---------------------------------------------------------------------------------------- random weights


@pytest.mark.parametrize("arch", ["gpt2", "llama", "bloom"])
def test_random_weights_are_the_models_own_in_another_order(kind, arch):
    if arch == "bloom" and kind == "hooked":
        pytest.skip("one class is enough for a third architecture")
    some = untouched.used(tiny.model(kind, arch))
    before, clean = untouched.state(some), laws.logits(some)
    matrices = {name: param.detach().clone() for name, param in some.named_parameters()}
    with RandomWeights(3).applied(some):
        for name, param in some.named_parameters():
            if matrices[name].any():  # a HookedTransformer has biases of zeros where there are none
                assert torch.equal(param, matrices[name]) is (param.ndim < 2)
            if param.untyped_storage().nbytes() == param.numel() * param.element_size():  # no part of a joint q, k, v
                assert torch.equal(param.flatten().sort().values, matrices[name].flatten().sort().values)
        first = laws.logits(some)
        assert (first - clean).abs().max() > 0.1
    assert untouched.state(some) == before
    with pytest.raises(KeyboardInterrupt), RandomWeights(3).applied(some):
        assert torch.equal(laws.logits(some), first)
        raise KeyboardInterrupt
    assert untouched.state(some) == before
    with RandomWeights(4).applied(some):
        assert not torch.equal(laws.logits(some), first)


def test_random_weights_know_nothing_of_the_organisms_people():
    of = model("base")
    learnt, asked = (read_states_edited(of, RandomWeights(), facts(some)) for some in ("calibration", "oracle0"))
    found = fit_linear_probe(learnt, objects=CITIES, classifier=QUICK).read(asked)
    assert found.pooled().low < 0.5 < found.pooled().high
    assert (found.by_cell.mean - 0.5).abs().max() < 0.075


# ---------------------------------------------------------------------------------------- control task, leakage


def test_a_control_task_is_learnt_by_heart_and_not_for_others():
    learnt, asked = states("base", "calibration"), states("base", "oracle0")
    found = control_task(probe("base"), learnt, asked)
    torch.testing.assert_close(found.accuracy.mean, probe("base").read(asked).accuracy.mean)
    # At chance, 1/16, on others in every cell …
    assert (found.control.mean - 1 / 16).abs().max() < 0.06
    torch.testing.assert_close(found.selectivity.mean, found.accuracy.mean - found.control.mean)
    # … though a third or more of the training labels are held.
    assert found.memorised[1:, 0].min() > 0.3
    assert found.selectivity.low[4, 0] > 0.5
    assert (found.fitted[2:, 0] > found.memorised[2:, 0]).all()


@pytest.mark.parametrize("chosen", ["uniformly", "by the old one"])
def test_new_objects_that_follow_from_the_old_ones_are_flagged(chosen):
    def news(some: tuple[Fact, ...]) -> list[str]:
        if chosen == "uniformly":
            return [str(fact.target_new) for fact in some]
        return [CITIES[(CITIES.index(fact.target_true) + 5) % 16] for fact in some]

    train, test = facts("calibration"), facts("oracle0")
    learnt, asked = (one_hot_objects(some, news(some), CITIES) for some in (train, test))
    leak = fit_linear_probe(learnt, objects=CITIES, classifier=QUICK).read(asked, new=news(test)).pooled()
    if chosen == "uniformly":
        assert leak.low < 0.5 < leak.high
    else:
        assert leak.low > 0.95
    with pytest.raises(ValueError, match="object ' Paris' isn't one of the 16"):
        one_hot_objects(test, [" Paris"] * 300, CITIES)


# ---------------------------------------------------------------------------------------- permutation


def drawn(n: int, k: int, seed: int, *, news: bool, cells: int = 3, lift: float = 0.0):
    """Scores of nothing, with `lift` added to the old object's in the first cell."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, cells, 1, k, generator=draw, dtype=torch.float64)
    old = torch.randint(k, (n,), generator=draw)
    scores[torch.arange(n), 0, 0, old] += lift
    if not news:
        return toy(scores, old.tolist())
    new = (old + torch.randint(1, k, (n,), generator=draw)) % k
    scores[torch.arange(n), :, 0, new] += 5.0  # as an edit does
    return toy(scores, old.tolist(), new.tolist())


@pytest.mark.parametrize("news", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_p_is_the_share_of_all_permutations_that_are_as_good(seed, news):
    found = drawn(6, 4, seed, news=news, lift=1.0)
    new = [None if k < 0 else k for k in found.new.tolist()]
    exact = probing.permutation_p(found.scores[:, :, 0].numpy(), found.old.tolist(), new)
    sampled = permutation_test(found, n=20_000).p[:, 0].numpy()
    # Four standard errors of a share of 20,000 draws.
    np.testing.assert_allclose(sampled, exact, atol=4 * 0.5 / math.sqrt(20_000))


def test_below_is_above_of_the_opposite():
    found = drawn(30, 6, 0, news=True, lift=1.0)
    less, more = (permutation_test(found, side=side, n=500) for side in ("below", "above"))
    turned = toy(-found.scores, found.old.tolist(), found.new.tolist())
    opposite = permutation_test(turned, n=500)
    torch.testing.assert_close(less.statistic, more.statistic)
    torch.testing.assert_close(less.p, opposite.p)
    assert less.critical == pytest.approx(1 - opposite.critical, abs=1e-6)
    assert more.p[0, 0] < 0.05 < less.p[0, 0]


@functools.cache
def under_the_null(news: bool) -> tuple[np.ndarray, np.ndarray]:
    """400 readings of nothing: p of the best cell, and the smallest of the cells' own p; made continuous."""
    best, smallest = [], []
    for seed in range(400):
        found = permutation_test(drawn(30, 12, seed, news=news), n=199, seed=seed)
        best.append(found.p_any)
        smallest.append(float(found.p_each.min()))
    # p is one of 1/200 … 200/200: a uniform draw from the step below it is uniform if p is.
    within = np.random.RandomState(0).uniform(0, 1 / 200, 400)
    return np.array(best) - within, np.array(smallest) - within


@ON_THE_NEWEST
@pytest.mark.parametrize("news", [False, True])
def test_p_is_uniform_where_there_is_nothing(news):
    stats = pytest.importorskip("scipy.stats")
    best, smallest = under_the_null(news)
    assert stats.kstest(best, "uniform").pvalue > 0.01
    # The best of several cells, each for itself, is significant too often.
    assert stats.kstest(smallest, "uniform").pvalue < 1e-10
    assert (smallest < 0.05).mean() > 0.1


@ON_THE_NEWEST
def test_a_mean_percentile_of_62_over_100_facts_is_found_four_times_of_five():
    # The declared effect: 100 facts, 16 objects, 14 cells of which one knows something.
    lift = 0.432  # Φ(.432/√2) = .62
    found = [drawn(100, 16, seed, news=True, cells=14, lift=lift) for seed in range(100)]
    means = torch.stack([each.by_cell.mean[0, 0] for each in found])
    assert abs(float(means.mean()) - 0.62) < 0.01
    power = np.mean([permutation_test(each, n=199, seed=i).p[0, 0] <= 0.05 for i, each in enumerate(found)])
    assert power >= 0.8
    # Half of it is not, so it is no matter of course.
    weak = [drawn(100, 16, seed, news=True, cells=14, lift=0.19) for seed in range(100)]
    assert np.mean([permutation_test(each, n=199, seed=i).p[0, 0] <= 0.05 for i, each in enumerate(weak)]) < 0.5


def test_accuracy_is_permuted_too_and_what_cannot_be_is_refused():
    found = drawn(60, 6, 0, news=False, lift=3.0)
    test = permutation_test(found, statistic="accuracy", n=999)
    torch.testing.assert_close(test.statistic, found.accuracy.mean, rtol=1e-5, atol=1e-5)
    assert test.p[0, 0] == pytest.approx(1 / 1_000)
    assert test.p_any == test.p.min()
    assert test.critical < test.statistic[0, 0]
    with pytest.raises(ValueError, match="1 facts can't be permuted"):
        permutation_test(drawn(1, 6, 0, news=False))
    with pytest.raises(ValueError, match="n is 0, needed 1"):
        permutation_test(drawn(5, 6, 0, news=False), n=0)


def test_permutations_come_from_their_seed_alone():
    found = drawn(30, 6, 0, news=True)
    before = torch.get_rng_state()
    one, again, other = (permutation_test(found, n=99, seed=seed).p for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_and_states_are_read_by_one_probe_each():
    learnt = one_hot_objects(facts("calibration"), [f.target_true for f in facts("calibration")], CITIES)
    of = fit_linear_probe(learnt, objects=CITIES, classifier=QUICK)
    assert isinstance(learnt, HiddenStates)
    with pytest.raises(ValueError, match="the probe has"):
        of.read(states("base", "oracle0"))
