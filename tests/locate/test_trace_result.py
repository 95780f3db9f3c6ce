"""What a trace says of many facts, keeps in a file, and resumes from after a kill."""

import dataclasses
import functools

import pytest
import tiny
import torch

import tl_factedit as fe
import tl_factedit.locate.inputs as questions_module
from tl_factedit.backend.runner import Runner
from tl_factedit.core.estimate import over_facts, over_facts_each, rank_correlation
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import ROLES, roles

FACTS = tuple(
    fe.Fact(subject, prompt, " Paris", id=subject)
    for subject, prompt in (
        ("Rome", "{} is"),
        ("The Eiffel Tower", "Where is {} located in"),
        ("Big Ben", "The city of {} is"),
        ("Prado Museum", "{} stands in the city of"),
    )
)


@functools.cache
def shared(kind: str):
    return tiny.model(kind, "gpt2")


def traced(model, **options):
    return causal_trace(model, FACTS, **{"corruption": fe.GaussianNoise(samples=4), "progress": False, **options})


# ---------------------------------------------------------------------------------------- roles and averages


def test_every_token_has_one_role():
    assert roles(8, (1, 4)) == [
        "before",
        "first subject",
        "middle subject",
        "last subject",
        "first after",
        "further",
        "further",
        "last",
    ]
    assert roles(4, (1, 2)) == ["before", "last subject", "first after", "last"]
    assert roles(3, (0, 1)) == ["last subject", "first after", "last"]
    assert roles(2, (0, 1)) == ["last subject", "last"]
    assert roles(3, (1, 3)) == ["before", "first subject", "last subject"]


def made(effect: torch.Tensor, **changes):
    """A trace with effects of one's own, [fact layer pos]."""
    trace = traced(shared("bridge"))
    return dataclasses.replace(trace, effect=effect, sample_effect=effect[..., None].repeat(1, 1, 1, 4), **changes)


def test_averages_are_over_tokens_within_a_fact_first():
    trace = traced(shared("bridge"))
    effect = trace.effect.clone()
    table = made(effect).by_role()
    i = 1  # three subject tokens
    start, stop = trace.subject[i]
    row = ROLES.index("middle subject")
    torch.testing.assert_close(table[i, row], effect[i, :, start + 1 : stop - 1].mean(-1))
    assert table[0, row].isnan().all(), "a subject of one token has no middle"
    found = trace.average()
    assert found.n[ROLES.index("last subject")].tolist() == [4] * 4
    assert found.n[row].tolist() == [1] * 4
    last = trace.at_last_subject_token
    torch.testing.assert_close(found.mean[ROLES.index("last subject")].float(), last.mean(0))
    assert bool((found.low[3] <= found.mean[3]).all() and (found.mean[3] <= found.high[3]).all())
    frame = trace.roles_table()
    assert set(frame.role) <= set(ROLES)
    assert frame[(frame.role == "last subject") & (frame.layer == 2)].effect.iloc[0] == pytest.approx(
        float(last[:, 2].mean()), abs=1e-6
    )


def test_shares_of_small_effects_are_left_out():
    trace = made(torch.full((4, 4, 9), 0.1), clean=torch.tensor([0.5, 0.5, 0.5, 0.5]))
    trace = dataclasses.replace(trace, corrupted=torch.tensor([0.0, 0.3, 0.46, 0.5]))
    share = trace.fraction()
    torch.testing.assert_close(share[0], torch.full((4, 9), 0.2))
    torch.testing.assert_close(share[1], torch.full((4, 9), 0.5))
    assert share[2:].isnan().all()


# ---------------------------------------------------------------------------------------- the best cell


def planted(*cells: tuple[int, int, float]) -> fe.Trace:
    """A trace of one fact whose total effect is 0.5 and whose effects are 0 but in some cells (layer, position)."""
    trace = causal_trace(shared("bridge"), FACTS[1], corruption=fe.GaussianNoise(samples=4), progress=False)
    effect = torch.zeros(1, *trace.effect.shape[1:])
    for layer, position, value in cells:
        effect[0, layer, position] = value
    clean, corrupted = torch.tensor([0.6]), torch.tensor([0.1])
    return dataclasses.replace(
        trace, effect=effect, clean=clean, corrupted=corrupted, known=(True,), top=(" Paris",), unpacked=""
    )


def place(role: str) -> int:
    """The first token of a role in the planted trace's prompt."""
    trace = planted()
    return roles(len(trace.tokens[0]), trace.subject[0]).index(role)


@pytest.mark.parametrize("role", ["first subject", "middle subject", "last subject", "first after"])
def test_the_best_cell_is_where_the_effect_is_and_never_at_the_last_token(role):
    trace = planted((2, place(role), 0.3), (3, place("last"), 0.5), (1, place("last subject"), 0.05))
    assert trace.best_cell == (role, 2, pytest.approx(0.3))
    assert trace.peak_layer == (2 if role == "last subject" else 1)


def test_the_best_cell_of_many_facts_is_of_the_mean_over_roles():
    trace = traced(shared("bridge"))
    mean = trace.by_role().nanmean(0)[:-1]
    best = trace.best_cell
    assert best.effect == pytest.approx(float(mean[~mean.isnan()].max()))
    assert float(mean[ROLES.index(best.role), best.layer]) == pytest.approx(best.effect)


def test_a_trace_of_nothing_has_no_best_cell():
    trace = planted()
    nan = torch.full_like(trace.effect, torch.nan)
    nothing = dataclasses.replace(trace, effect=nan, corrupted=torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="no fact of this trace could be corrupted"):
        _ = nothing.best_cell
    assert "1 without a donor" in repr(nothing)


def test_the_repr_says_when_the_last_subject_token_carries_nothing_and_where_the_largest_is():
    here, elsewhere = planted((2, place("last subject"), 0.3)), planted((1, place("first subject"), 0.3))
    assert here.carries_subject and not elsewhere.carries_subject
    assert "last subject token peaks at layer 2 with 0.300" in repr(here) and "largest before" not in repr(here)
    said = repr(elsewhere)
    assert "last subject token carries nothing: its largest is at layer 0 with 0.000" in said
    assert "largest before the last token: first subject token, layer 1, 0.300" in said
    # A twentieth of the total effect (0.5) is the least that counts.
    assert planted((2, place("last subject"), 0.026)).carries_subject
    assert not planted((2, place("last subject"), 0.024)).carries_subject
    assert not planted((2, place("last subject"), -0.3)).carries_subject


def test_what_is_said_of_several_facts_is_of_the_known_ones():
    trace = traced(shared("bridge"))
    effect = torch.zeros_like(trace.effect)
    last = [stop - 1 for _, stop in trace.subject]
    effect[0, 1, last[0]], effect[1, 3, last[1]] = 0.3, 0.9
    total = {"clean": torch.tensor([0.6, 0.9, 0.1, 0.2]), "corrupted": torch.tensor([0.1, 0.0, 0.9, 0.8])}
    some = made(effect, known=(True, False, False, False), **total)
    assert some.counted == (True, False, False, False) and some.peak_layer == 1
    assert "3 not known and left out here" in repr(some) and "clean 0.600, corrupted 0.100" in repr(some)
    assert "peaks at layer 1 with 0.300" in repr(some)
    none = made(effect, known=(False,) * 4, **total)
    assert none.counted == (True,) * 4 and none.peak_layer == 3 and "4 not known," in repr(none)


def test_total_effects_of_opposite_sign_do_not_make_a_small_effect_large():
    trace = traced(shared("bridge"))
    effect = torch.zeros_like(trace.effect)
    for i, (_, stop) in enumerate(trace.subject):
        effect[i, 1, stop - 1] = 0.01
    corrupted = torch.tensor([0.1, 0.1, 0.9, 0.8])
    mixed = made(effect, clean=torch.full((4,), 0.5), corrupted=corrupted, known=(True,) * 4)
    assert not mixed.carries_subject and "carries nothing" in repr(mixed)


def test_the_best_share_of_noise_alone_is_nothing():
    """Its reason to exist: the plain maximum over tokens of pure noise is far above 0."""
    noise = 0.1 * torch.randn(4, 4, 9, 4, generator=torch.Generator().manual_seed(0))
    trace = traced(shared("bridge"))
    trace = dataclasses.replace(
        trace, effect=noise.mean(-1), sample_effect=noise, clean=torch.ones(4), corrupted=torch.zeros(4)
    )
    naive = trace.fraction().amax(-1).mean()
    assert naive > 0.05
    assert abs(float(trace.best_fraction().mean())) < float(naive) / 2
    real = dataclasses.replace(trace, sample_effect=noise * 0.01 + torch.linspace(0, 0.8, 9)[:, None])
    torch.testing.assert_close(real.best_fraction(), torch.full((4, 4), 0.8), rtol=0, atol=0.01)


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "corruption",
    [
        fe.GaussianNoise(samples=2),
        fe.locate.UniformNoise(samples=2),
        fe.locate.MultivariateNoise(samples=2),
        fe.TokenReplacement(known=False),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_trace_survives_a_file(kind, corruption, tmp_path):
    asked = [*FACTS, FACTS[0].but(subject="Paris", target_true=" Rome")]
    trace = causal_trace(shared(kind), asked, corruption=corruption, metric="logprob", progress=False)
    trace.save(tmp_path / "trace.safetensors")
    loaded = fe.Trace.load(tmp_path / "trace.safetensors")
    for field in dataclasses.fields(trace):
        mine, theirs = getattr(trace, field.name), getattr(loaded, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.allclose(mine, theirs, equal_nan=True), field.name
        elif field.name == "corruption" and isinstance(corruption, fe.TokenReplacement):
            assert (theirs.samples, theirs.seed, theirs.known) == (mine.samples, mine.seed, mine.known)
        else:
            assert mine == theirs, field.name


def test_a_damaged_file_is_refused_and_left(tmp_path):
    path = tmp_path / "trace.safetensors"
    traced(shared("bridge")).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short or no safetensors file"):
        fe.Trace.load(path)
    assert path.exists()


class Killed(BaseException):
    pass


def test_a_killed_trace_goes_on_where_it_was(kind, tmp_path, monkeypatch):
    model = shared(kind)
    want = traced(model)
    monkeypatch.setattr(questions_module, "MOST_QUESTIONS", 1)
    calls, run = [], Runner.logits
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "logits", lambda self, *a, **k: calls.append(1) or run(self, *a, **k))
        traced(model)
    whole = len(calls)
    calls.clear()

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == whole - 2:
            raise Killed
        return run(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "logits", failing)
        with pytest.raises(Killed):
            traced(model, folder=tmp_path)
    kept = sorted(tmp_path.glob("part-*.safetensors"))
    assert 0 < len(kept) < len(FACTS)
    calls.clear()
    monkeypatch.setattr(Runner, "logits", lambda self, *a, **k: calls.append(1) or run(self, *a, **k))
    resumed = traced(model, folder=tmp_path)
    rest = len(calls)
    assert torch.allclose(resumed.sample_effect, want.sample_effect, atol=1e-5, equal_nan=True)
    assert resumed.top == want.top
    calls.clear()
    traced(model)
    assert rest < len(calls)
    with pytest.raises(ValueError, match="belongs to another trace"):
        traced(model, folder=tmp_path, metric="logprob")


# ---------------------------------------------------------------------------------------- estimates


def test_many_means_at_once_are_each_as_alone():
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    values[:5, 1] = float("nan")
    found = over_facts_each(values, draws=10_000)
    for i in range(3):
        alone = over_facts(values[:, i].tolist())
        assert float(found.mean[i]) == pytest.approx(alone.mean)
        assert int(found.n[i]) == alone.n
        assert float(found.low[i]) == pytest.approx(alone.low, abs=0.02)
        assert float(found.high[i]) == pytest.approx(alone.high, abs=0.02)
    lonely = over_facts_each(torch.tensor([[1.0], [float("nan")]]))
    assert float(lonely.mean[0]) == 1.0
    assert lonely.low.isnan().all()


def test_rank_correlation_is_spearmans_with_ties():
    x = torch.tensor([1.0, 2.0, 2.0, 4.0, 5.0, 0.0, 3.0, float("nan")])
    y = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.5, 3.0, 1.0])

    def ranks(values):
        return torch.tensor([float((values < v).sum()) + float((values == v).sum() - 1) / 2 for v in values])

    pair = torch.stack([ranks(x[:-1]), ranks(y[:-1])])
    found = rank_correlation(x, y)
    assert found.mean == pytest.approx(float(torch.corrcoef(pair)[0, 1]))
    assert found.n == 7
    assert found.low <= found.mean <= found.high
    assert rank_correlation(x, -x).mean == pytest.approx(-1.0)
    assert torch.tensor(rank_correlation(x, torch.zeros(8)).mean).isnan()


# ---------------------------------------------------------------------------------------- damage


def test_noise_is_scaled_to_the_damage_asked_for(kind):
    model = shared(kind)
    noise = fe.locate.calibrate_noise(model, FACTS, lost=0.3, noise=fe.GaussianNoise(samples=3))
    trace = traced(model, corruption=noise)
    assert 1 - float(trace.corrupted.mean() / trace.clean.mean()) == pytest.approx(0.3, abs=0.011)
    more = fe.locate.calibrate_noise(model, FACTS, lost=0.2, noise=fe.GaussianNoise(samples=3))
    assert more.scale < noise.scale
    for lost in (0.0, 1.0):
        with pytest.raises(ValueError, match="needed a share between 0 and 1"):
            fe.locate.calibrate_noise(model, FACTS, lost=lost)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subject": ((0, 99),) * 4}, r"subject\[0\] is .*within"),
        ({"subject": ((2, 2),) * 4}, r"subject\[0\] is .*within"),
        ({"tokens": (("a",) * 50,) * 4}, r"tokens\[0\] is .*tokens, as the effects have"),
        ({"known": (True,)}, "known is .*needed one for each of 4 facts"),
    ],
)
def test_a_file_whose_spans_or_lengths_do_not_fit_is_refused(changes, said, tmp_path):
    dataclasses.replace(traced(shared("bridge")), **changes).save(tmp_path / "trace")
    with pytest.raises(ValueError, match=f"trace doesn't hold a valid trace .*{said}"):
        fe.Trace.load(tmp_path / "trace")
