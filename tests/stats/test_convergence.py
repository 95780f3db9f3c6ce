"""Whether key statistics are of enough tokens: by the letter of the formula, and judged on text they have not seen."""

import dataclasses
import weakref

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.solve import cholesky
from tl_factedit.stats.convergence import cosines, damage

FACTS = [laws.FACT, laws.OTHER, laws.FACT.but(subject="Danielle Darrieux")]
TEXTS = ["Rome", "  ", *laws.texts(60, seed=4)]
ASKED = {"n_tokens": 300, "steps": 2, "ridge": 1e-3, "context": 9}


@pytest.fixture(
    params=[(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS], ids="-".join, scope="module"
)
def model(request):
    """Shared, as nothing here may change it. In float64, so that the order of sums is the only difference."""
    return tiny.model(*request.param, dtype=torch.float64)


def report(model, layer=1, texts=TEXTS, facts=FACTS, **options):
    return fe.stats.stats_convergence(model, layer, texts, facts, **{**ASKED, "progress": False, **options})


@pytest.fixture(scope="module")
def found(model):
    return report(model)


# ---------------------------------------------------------------------------------------- by the letter


def halves(model, bos, context, enough):
    """Each text to the half with fewer tokens, the first one if they have as many."""
    parts, sizes = ([], []), [0, 0]
    for text in TEXTS:
        if not text.strip():
            continue
        half = 1 if sizes[1] < sizes[0] else 0
        length = len(model.to_tokens(text, prepend_bos=False)[0])
        sizes[half] += length + (-(-length // (context - 1)) if bos else 0)
        parts[half].append(text)
        if sizes[0] >= enough and sizes[1] >= enough:
            break
    return parts, sizes


def last_subject_key(model, layer, fact, bos):
    until = fact.prompt.split("{}")[0] + fact.subject
    ids = model.to_tokens(fact.text, prepend_bos=bos)[0].tolist()
    return editing.key_and_value(model, layer, ids, len(model.to_tokens(until, prepend_bos=bos)[0]) - 1)[0].double()


@pytest.mark.parametrize(("bos", "ridge", "points"), [(True, 0.0, (150, 300)), (False, 1e-3, (75, 150, 300))])
def test_it_equals_the_formula_written_out(model, bos, ridge, points):
    mine = report(model, prepend_bos=bos, ridge=ridge, steps=len(points) - 1)
    (fit, judge), _ = halves(model, bos, 9, 300)

    def moment(texts, n):
        found, count = editing.second_moments(model, [1], texts, n_tokens=n, context=9, bos=bos)
        assert count == n
        return found[1]

    judged, last = moment(judge, 300), moment(fit, 300)
    assert mine.points == points and mine.held_out == 300
    for j, fact in enumerate(FACTS):
        k = last_subject_key(model, 1, fact, bos)
        u = []
        for n in mine.points:
            c = moment(fit, n)
            u.append(torch.linalg.inv(c + ridge * c.trace() / 64 * torch.eye(64)) @ k)
        cost = [float(d @ judged @ d / (d @ k) ** 2) for d in u]
        assert float(mine.damage[j]) == pytest.approx(cost[-1], rel=1e-5)
        assert float(mine.plain_excess[j]) == pytest.approx(
            float(k @ judged @ k / (k @ k) ** 2) / cost[-1] - 1, rel=1e-5
        )
        for i, d in enumerate(u):
            assert float(mine.excess[i, j]) == pytest.approx(cost[i] / cost[-1] - 1, rel=1e-5, abs=1e-6)
            assert float(mine.euclidean[i, j]) == pytest.approx(float(d @ u[-1] / d.norm() / u[-1].norm()), rel=1e-6)
            across = d @ last @ u[-1] / ((d @ last @ d) * (u[-1] @ last @ u[-1])).sqrt()
            assert float(mine.cosine[i, j]) == pytest.approx(float(across), rel=1e-6)
    assert not torch.allclose(mine.cosine, mine.euclidean, atol=1e-3)


def test_the_judge_has_not_seen_the_text_it_judges_by(model, found):
    """On the text that a direction was taken from, it looks better than it is."""
    (fit, judge), _ = halves(model, True, 9, 300)
    seen, unseen = (
        editing.second_moments(model, [1], texts, n_tokens=300, context=9, bos=True)[0][1] for texts in (fit, judge)
    )
    keys = torch.stack([last_subject_key(model, 1, fact, True) for fact in FACTS])
    u = torch.cholesky_solve(keys.T, cholesky(seen, ridge=1e-3)).T
    assert (damage(u, keys, seen) < damage(u, keys, unseen)).all()
    assert not set(fit) & set(judge)
    # So few tokens do worse there than many, and on their own text they wouldn't.
    assert (found.excess[0] > found.excess[1]).all() and (found.excess[1] > 0).all()


def test_gaussian_keys_converge_as_reed_mallett_and_brennan_say():
    draw = torch.Generator().manual_seed(0)
    m, n, trials = 12, 40, 3_000
    key = torch.randn(1, m, generator=draw, dtype=torch.float64)
    best = damage(key, key, torch.eye(m, dtype=torch.float64))
    share = []
    for _ in range(trials):
        sample = torch.randn(n, m, generator=draw, dtype=torch.float64)
        u = torch.cholesky_solve(key.T, cholesky(sample.T @ sample)).T
        share.append(float(best / damage(u, key, torch.eye(m, dtype=torch.float64))))
    share = torch.tensor(share)
    error = float(share.std()) / trials**0.5
    assert float(share.mean()) == pytest.approx((n + 2 - m) / (n + 1), abs=4 * error)
    assert abs(float(share.mean()) - (n - m) / n) > 4 * error  # the rule of thumb without its corrections is off


def test_neither_measure_depends_on_the_length_of_a_direction():
    draw = torch.Generator().manual_seed(1)
    u, k = torch.randn(2, 5, 8, generator=draw)
    c = torch.randn(8, 8, generator=draw)
    c = c @ c.T
    torch.testing.assert_close(damage(3 * u, k, c), damage(u, k, c))
    torch.testing.assert_close(cosines(3 * u[None], k, c), cosines(u[None], k, c))
    assert not torch.allclose(damage(u, 3 * k, c), damage(u, k, c))


# ---------------------------------------------------------------------------------------- what it says


def test_the_last_point_is_what_the_others_are_measured_by(found):
    assert found.points == (75, 150, 300)
    assert torch.equal(found.excess[-1], torch.zeros(3, dtype=torch.float64))
    for cosine in (found.cosine, found.euclidean):
        torch.testing.assert_close(cosine[-1], torch.ones(3, dtype=torch.float64))
        assert (cosine[:-1] < 1).all() and (cosine[0] < cosine[1]).all()


def test_as_key_stats_goes_so_does_its_report(model):
    """u of the report is u of an editor: from `key_stats` of the same texts, after as many tokens."""
    (fit, judge), _ = halves(model, True, 9, 300)
    wide = {"n_tokens": 150, "context": 9, "prepend_bos": True, "progress": False}
    few, many, judged = (
        fe.key_stats(model, 1, texts, **{**wide, "n_tokens": n})[1].moment
        for texts, n in ((fit, 150), (fit, 300), (judge, 300))
    )
    keys = torch.stack([last_subject_key(model, 1, fact, True) for fact in FACTS])
    cost = [damage(torch.cholesky_solve(keys.T, cholesky(c, ridge=1e-3)).T, keys, judged) for c in (few, many)]
    mine = report(model, prepend_bos=True)
    torch.testing.assert_close(mine.excess[1], cost[0] / cost[1] - 1, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("excess", "enough"),
    [
        ([0.5, 0.04, 0.02, 0.0], 2),
        ([0.049, 0.01, 0.0, 0.0], 1),
        ([0.5, 0.3, 0.06, 0.0], None),
        ([0.01, 0.2, 0.02, 0.0], 4),  # a lucky early point doesn't count
        ([float("nan"), 0.01, 0.02, 0.0], 2),
        ([-0.2, -0.1, -0.01, 0.0], 1),
    ],
)
def test_enough_is_where_the_excess_stays_small(found, excess, enough):
    table = torch.tensor(excess, dtype=torch.float64)[:, None] + torch.tensor([0.0, 0.01, -0.01])
    cosine = torch.ones(4, 3, dtype=torch.float64)
    made = dataclasses.replace(found, points=(1, 2, 4, 8), excess=table, cosine=cosine, euclidean=cosine)
    assert made.enough == enough
    assert ("more tokens are wanted" in repr(made)) is (enough is None)


def test_its_table_and_its_line(found):
    table = found.table()
    assert table["tokens"].tolist() == [0, 75, 150, 300]
    assert table["tokens per dimension"].tolist()[1] == 75 / 64
    means = torch.stack([found.plain_excess, *found.excess]).mean(1)
    assert table["excess"].tolist() == pytest.approx(means.tolist())
    assert (table["low"] <= table["excess"]).all() and (table["excess"] <= table["high"]).all()
    assert table["excess"].iloc[-1] == table["low"].iloc[-1] == table["high"].iloc[-1] == 0.0
    assert table["damage"].iloc[-1] == pytest.approx(float(found.damage.mean()))
    assert table["damage"].iloc[1] == pytest.approx(float(((1 + found.excess[0]) * found.damage).mean()))
    assert table["cosine"].isna().tolist() == [True, False, False, False]
    assert table["facts"].tolist() == [3, 3, 3, 3]
    assert "layer 1, 3 facts, against 300 tokens" in repr(found) and "%" in repr(found)
    assert found._repr_html_().count("<tr") == 5


# ---------------------------------------------------------------------------------------- what it takes


def test_where_a_moment_cannot_be_inverted_yet_there_is_no_number(model):
    mine = report(model, ridge=0.0, steps=4)
    assert mine.points == (18, 37, 75, 150, 300)
    for values in (mine.excess, mine.cosine, mine.euclidean):
        assert values[:2].isnan().all() and not values[3:].isnan().any()  # fewer than 64 dimensions, and twice as many
    assert mine.table()["excess"].isna().tolist()[1:3] == [True, True]
    assert not report(model, ridge=1e-3, steps=4).excess.isnan().any()


def test_the_last_moment_must_have_an_inverse(model):
    with (
        laws.untouched(model),
        pytest.raises(ValueError, match=r"layer 1 after 50 tokens: .*= 640 dim|wanted 10 tokens"),
    ):
        report(model, ridge=0.0, n_tokens=50)


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_the_size_of_a_batch_is_irrelevant(model, found, batch_tokens):
    torch.testing.assert_close(report(model, batch_tokens=batch_tokens).excess, found.excess, rtol=1e-6, atol=1e-8)


def test_it_leaves_everything_as_it_was_and_reads_texts_once(model, found):
    read = []

    def endless():
        for text in TEXTS:
            read.append(text)
            yield text
        raise AssertionError("read to the end")

    with laws.untouched(model), torch.inference_mode():
        again = report(model, texts=endless())
    assert torch.equal(again.excess, found.excess) and again.corpus == found.corpus
    assert read == TEXTS[: len(read)]
    assert report(model, texts=TEXTS[1:]).corpus != found.corpus


def test_texts_that_end_before_are_halved(model):
    mine = report(model, texts=TEXTS[:12], n_tokens=10_000, steps=1)
    lengths = [len(model.to_tokens(text, prepend_bos=False)[0]) for text in TEXTS[:12] if text.strip()]
    total = sum(n + -(-n // 8) for n in lengths)
    assert mine.points[-1] + mine.held_out == total
    assert abs(mine.points[-1] - mine.held_out) <= max(lengths) + 5


def test_a_single_fact_will_do_and_says_nothing_of_facts(model, found):
    one = report(model, facts=laws.FACT)
    torch.testing.assert_close(one.excess, found.excess[:, :1], rtol=1e-9, atol=1e-12)
    assert one.table()["low"].isna().all()
    assert one.enough in (None, 75, 150)


def test_there_is_one_second_moment_at_a_time(model, monkeypatch):
    alive, peak, zeros = [], [], torch.zeros

    def watched(*shape, **options):
        made = zeros(*shape, **options)
        if made.shape == (64, 64):
            alive.append(weakref.ref(made))
            peak.append(sum(each() is not None for each in alive))
        return made

    monkeypatch.setattr(torch, "zeros", watched)
    report(model)
    assert peak == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facts": []}, "facts is empty"),
        ({"layer": 4}, "layer 4 is outside the model"),
        ({"steps": 0}, "steps is 0"),
        ({"ridge": -1.0}, r"ridge is -1\.0"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"context": 1}, "context is 1"),
        ({"texts": "Paris"}, r"one string.*write \[text\]"),
        ({"texts": ["Rome", " "]}, "fewer than two"),
        ({"facts": [laws.FACT.but(prompt="{}x is in")]}, "ends inside token"),
    ],
)
def test_bad_questions_are_refused_before_anything_is_run(model, monkeypatch, options, message):
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        report(model, **options)


def test_a_model_that_overflows_is_noticed(kind):
    model = tiny.model(kind, "gpt2")
    down_proj(model, 0).param.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="not finite"):
        report(model)


def test_the_forward_stops_at_the_layer(model, monkeypatch):
    stops, capture = set(), Runner.capture
    monkeypatch.setattr(Runner, "capture", lambda *a, **k: stops.add(k["stop"]) or capture(*a, **k))
    report(model)
    assert stops == {2}
