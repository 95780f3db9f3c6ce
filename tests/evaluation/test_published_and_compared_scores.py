"""Magnitudes, Hase et al.'s scores, and comparisons of models fact by fact: as calculated by hand, and as resampled."""

import itertools
import math
import random

import laws
import pytest
import scipy.stats
import tiny
import torch
from jaxtyping import TypeCheckError

import tl_factedit as fe
from tl_factedit.core.estimate import jointly, over_facts
from tl_factedit.evaluation.score_comparison import holm
from tl_factedit.evaluation.scores import Answer, scores_of


def scores(model, rows, relations=None):
    """Scores of made-up answers: rows of (fact, ask, p_true, p_new) with objects of one and two tokens."""
    count = max(row[0] for row in rows) + 1
    facts = tuple(laws.FACT.but(id=str(i), relation=None if relations is None else relations[i]) for i in range(count))
    answers = tuple(
        Answer(i, ask, f"{ask} {j}", " a", " b", -math.log(true), -math.log(new), False, 1, 2)
        for j, (i, ask, true, new) in enumerate(rows)
    )
    return scores_of(facts, answers, fe.evaluate(model, laws.FACT).provenance)


@pytest.fixture(scope="module")
def model():
    return tiny.model("bridge", "gpt2")


def test_magnitudes_by_hand(model):
    rows = [
        (0, "rewrite", 0.1, 0.7),
        (0, "paraphrase", 0.2, 0.3),
        (0, "paraphrase", 0.2, 0.5),
        (0, "neighbour", 0.6, 0.1),
    ]
    found = fe.evaluation.magnitudes(scores(model, [*rows, (1, "rewrite", 0.5, 0.1)]))
    assert found.rewrite.mean == pytest.approx((0.6 - 0.4) / 2) and found.rewrite.n == 2
    assert found.paraphrase.mean == pytest.approx((0.1 + 0.3) / 2) and found.paraphrase.n == 1
    assert found.neighbourhood.mean == pytest.approx(0.5)


def test_rewrite_scores_by_hand_of_the_whole_object(model):
    before = scores(model, [(0, "rewrite", 0.5, 0.1), (0, "neighbour", 0.5, 0.2)])
    after = scores(model, [(0, "rewrite", 0.1, 0.9), (0, "neighbour", 0.5, 0.4)])
    found = fe.evaluation.rewrite_scores(before, after)  # the new object has two tokens
    assert found.rewrite.mean == pytest.approx((0.81 - 0.01) / 0.99)
    assert found.neighbourhood.mean == pytest.approx(1 - (0.16 - 0.04) / (0.5 + 0.46))
    same = fe.evaluation.rewrite_scores(before, before)
    assert same.rewrite.mean == 0.0 and same.neighbourhood.mean == 1.0 and math.isnan(same.paraphrase.mean)


def test_an_edit_moves_all_of_them(kind):
    model = tiny.model(kind, "gpt2")
    fact = laws.FACT.but(paraphrases=["{} stands in"], neighbours=["Big Ben is in"], neighbour_targets=[" London"])
    edit = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=("",), progress=False)(model, [fact])
    before = fe.evaluate(model, fact)
    with edit.applied(model):
        after = fe.evaluate(model, fact)
    assert fe.evaluation.rewrite_scores(before, after).rewrite.mean > 0
    assert fe.evaluation.magnitudes(after).rewrite.mean > fe.evaluation.magnitudes(before).rewrite.mean
    table = fe.evaluation.compare_scores({"before": before, "after": after})
    p_new = table.set_index("score").loc["p_new"]
    assert p_new.difference == pytest.approx(after.p_new.mean - before.p_new.mean, rel=1e-6)
    assert p_new.before == pytest.approx(before.p_new.mean, rel=1e-6)
    for answer, was in zip(after.answers, before.answers, strict=True):
        ids = model.tokenizer(answer.prompt + answer.new)["input_ids"]
        assert answer.tokens_new == len(ids) - len(model.tokenizer(answer.prompt)["input_ids"]) == was.tokens_new


def yes_and_no(model, wins, relations=None):
    """A rewrite for each fact, and whether the new object wins."""
    return scores(
        model, [(i, "rewrite", *((0.1, 0.5) if win else (0.5, 0.1))) for i, win in enumerate(wins)], relations
    )


def test_a_comparison_is_paired_and_its_p_is_that_of_all_swaps(model):
    a, b = [1, 1, 1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0, 1]
    table = fe.evaluation.compare_scores({"b": yes_and_no(model, b), "a": yes_and_no(model, a)}).set_index("score")
    row = table.loc["efficacy"]
    assert (row.model, row.value, row.b, row.n) == ("a", 7 / 8, 2 / 8, 8) and row.difference == 5 / 8
    swaps = list(itertools.product((1, -1), repeat=8))
    far = [abs(sum(s * (x - y) for s, x, y in zip(sign, a, b, strict=True))) >= 5 for sign in swaps]
    assert row.p == pytest.approx(sum(far) / len(swaps), abs=0.01)
    paired = over_facts([float(x - y) for x, y in zip(a, b, strict=True)], span=(-1.0, 1.0))
    assert (row.low, row.high) == (paired.low, paired.high)
    # Who differs nowhere differs by nothing; by how much others might, of eight facts, isn't known.
    alike = fe.evaluation.compare_scores({"b": yes_and_no(model, b), "a": yes_and_no(model, b)}).iloc[0]
    assert alike.difference == 0.0 and -0.4 < alike.low < 0 < alike.high < 0.4 and alike.p == 1.0
    assert math.isnan(table.loc["paraphrase"].difference) and math.isnan(table.loc["paraphrase"].p)


def test_where_nothing_differs_p_is_uniform_and_intervals_hold_zero(model):
    draw, below, held = random.Random(0), 0, 0
    for _ in range(60):
        a, b = ([draw.random() < 0.6 for _ in range(30)] for _ in range(2))
        row = fe.evaluation.compare_scores({"a": yes_and_no(model, a), "b": yes_and_no(model, b)}).iloc[0]
        below += row.p <= 0.1
        held += row.low <= 0 <= row.high
    assert below <= scipy.stats.binom.ppf(0.999, 60, 0.1) and held >= scipy.stats.binom.ppf(0.001, 60, 0.95)


def test_whole_relations_are_resampled_where_claims_reach_beyond_them(model):
    """Of facts that answer alike within their relation, there are as many as relations."""
    relations = [f"r{i // 20}" for i in range(200)]
    wins = [i // 20 % 2 == 0 for i in range(200)]
    models = {"never": yes_and_no(model, [False] * 200, relations), "half": yes_and_no(model, wins, relations)}
    facts, clusters = (
        fe.evaluation.compare_scores(models, cluster=cluster).set_index("score").loc["efficacy"]
        for cluster in ("fact", "relation")
    )
    assert facts.difference == clusters.difference == 0.5
    assert facts.high - facts.low < 0.16 < 0.5 < clusters.high - clusters.low
    assert facts.p < 0.001 < clusters.p
    ten = jointly([[float(i % 2 == 0) for i in range(10)]], lambda means: means[0])
    assert clusters.high - clusters.low == pytest.approx(ten.high - ten.low, abs=0.05)


def test_several_models_are_corrected_together(model):
    wins = {"a": [0, 0, 0, 0, 0, 0], "b": [1, 1, 1, 1, 1, 1], "c": [0, 1, 0, 0, 1, 0]}
    table = fe.evaluation.compare_scores({name: yes_and_no(model, each) for name, each in wins.items()}, against="a")
    rows = table[table.score == "efficacy"].set_index("model")
    assert rows.p_holm["b"] == pytest.approx(2 * rows.p["b"]) and rows.p_holm["c"] >= rows.p["c"]
    assert holm([0.01, math.nan, 0.04, 0.03])[2:] == [0.06, 0.06]
    ours, theirs = holm([0.001, 0.2, 0.03]), [0.003, 0.2, 0.06]
    assert ours == pytest.approx(theirs)


def test_scores_of_other_prompts_are_not_compared(model):
    one, other = yes_and_no(model, [1, 0]), yes_and_no(model, [1, 0, 1])
    for wrong in ({"a": one}, {"a": one, "b": other}):
        with pytest.raises(ValueError, match="needed"):
            fe.evaluation.compare_scores(wrong)
    with pytest.raises(ValueError, match="different prompts"):
        fe.evaluation.rewrite_scores(one, other)
    with pytest.raises(ValueError, match="against is 'c'"):
        fe.evaluation.compare_scores({"a": one, "b": one}, against="c")


def test_resampled_clusters_are_the_literal_ones():
    values, clusters = [1.0, 0.0, 4.0, math.nan, 2.0], ["a", "a", "b", "b", "c"]
    found = jointly([values], lambda means: means[0], clusters=clusters)
    generator, means = torch.Generator().manual_seed(0), []
    of = {"a": [1.0, 0.0], "b": [4.0], "c": [2.0]}
    for picked in torch.randint(3, (10_000, 3), generator=generator).tolist():
        drawn = [value for i in picked for value in of["abc"[i]]]
        means.append(sum(drawn) / len(drawn))
    means = torch.tensor(means, dtype=torch.float64)
    assert found.n == 4 and found.mean == pytest.approx(7 / 4)
    assert found.low <= means.quantile(0.025) and found.high >= means.quantile(0.975)
    assert means.min() <= found.low and found.high <= means.max()
    assert math.isnan(jointly([values], lambda means: means[0], clusters=["a"] * 5).low)


def test_what_is_of_another_kind_is_told_so(model):
    one = yes_and_no(model, [1, 0])
    with pytest.raises((ValueError, TypeCheckError), match=r"needed scores by name|Type-check"):
        fe.evaluation.compare_scores([one, one])
    with pytest.raises((ValueError, TypeCheckError), match="seed"):
        fe.evaluation.compare_scores({"a": one, "b": one}, seed="x")
