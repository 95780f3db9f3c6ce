"""LEACE erases what is linear, on the rows it was fitted on, at the tokens it is put to; its placebos don't."""

import functools

import laws
import numpy as np
import pytest
import tiny
import torch
from linear_probes import CITIES, facts, model, states
from oracles import attacking, probing, untouched
from planted import gaussian_states

import tl_factedit as fe
from tl_factedit.attacks.silencing import NOTHING
from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.estimate import over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Change
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.erasure import erase_states
from tl_factedit.probes.scrubbing import Eraser, leace, random_subspace
from tl_factedit.probes.states import read_states, read_states_edited

pytest.importorskip("concept_erasure")

K, D, N = 6, 12, 1_200
QUICK = LinearClassifier(shrinkages=(0.01, 0.1, 0.5, 0.9), temperatures=(1.0, 4.0, 16.0))
FACTS = [
    Fact("The Eiffel Tower", "Where is {} located in the city of", " Paris", " Rome", paraphrases=["What is {} in"]),
    Fact("Big Ben", "{} is in", " London", " Madrid"),
]
OTHER = Fact("Danielle Darrieux", "The mother tongue of {} is", " French", " German")


@functools.cache
def planted(seed: int = 0, signal: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(K).repeat(N // K)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return gaussian_states(y, K, D, signal, seed=seed) @ mix + 3.0, y


def one_hot(y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(y).double()


def covariance(x: torch.Tensor, y: torch.Tensor) -> float:
    x, z = x - x.mean(0), one_hot(y) - one_hot(y).mean(0)
    return float((x.T @ z / len(x)).abs().max())


def accuracy(train: torch.Tensor, y: torch.Tensor, test: torch.Tensor, truth: torch.Tensor):
    found = QUICK.fit(train, y, int(y.max()) + 1).log_probs(test).argmax(-1)
    return over_facts((found == truth).double().tolist())


# ---------------------------------------------------------------------------------------- the theorem


@pytest.mark.parametrize("shrinkage", [True, False])
def test_leace_leaves_no_covariance_with_the_objects_and_no_linear_probe(shrinkage):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = planted()
    eraser = leace(x, y, K, shrinkage=shrinkage)
    gone = eraser(x)
    assert eraser.rank == K - 1
    assert covariance(gone, y) < 1e-10 < 1e-2 < covariance(x, y)
    # In sample a constant is the best there is: so the fit's coefficients are 0, and its answers the majority's.
    more = torch.cat([torch.arange(N), (y == 2).nonzero()[:5, 0]])
    skewed = (leace(x[more], y[more], K, shrinkage=shrinkage)(x[more]) - x[more].mean(0)).numpy()
    to_the_end = {"C": 1e6, "solver": "newton-cg", "tol": 1e-12, "max_iter": 1_000}
    logistic = linear_model.LogisticRegression(**to_the_end).fit(skewed, y[more].numpy())
    assert np.abs(logistic.coef_).max() < 1e-6
    assert logistic.score(skewed, y[more].numpy()) == pytest.approx(205 / 1_205)
    assert (
        np.abs(
            linear_model.LogisticRegression(C=1e6, max_iter=1_000).fit((x - x.mean(0)).numpy(), y.numpy()).coef_
        ).max()
        > 0.1
    )
    # And our own classifier's, which weights all classes alike, are means of nothing.
    assert QUICK.fit(gone, y, K).weight.abs().max() < 1e-6 < QUICK.fit(x, y, K).weight.abs().max()


def test_on_other_rows_a_probe_is_at_chance_within_its_interval_and_without_erasure_it_is_not():
    (x, y), (other, truth) = planted(0), planted(1)
    eraser = leace(x, y, K)
    within = accuracy(eraser(other)[:600], truth[:600], eraser(other)[600:], truth[600:])
    before = accuracy(other[:600], truth[:600], other[600:], truth[600:])
    assert within.low < 1 / K < within.high + 0.01
    assert before.low > 0.5


@pytest.mark.parametrize("shrinkage", [False])
def test_it_is_the_published_formula(shrinkage):
    x, y = planted()
    other = planted(1)[0][:50]
    want = probing.leace(x.numpy(), one_hot(y).numpy(), other.numpy())
    torch.testing.assert_close(leace(x, y, K, shrinkage=shrinkage)(other), torch.tensor(want), rtol=1e-7, atol=1e-7)


def test_it_changes_less_than_any_other_projection_that_erases_as_much():
    x, y = planted()
    eraser = leace(x, y, K, shrinkage=False)
    means = torch.stack([x[y == k].mean(0) for k in range(K)])
    basis = torch.linalg.svd(means - means.mean(0)).Vh[: K - 1]
    orthogonal = Eraser(basis.T, basis, x.mean(0), N)
    assert covariance(orthogonal(x), y) < 1e-10
    least, other = (float(((x - r(x)) ** 2).sum(-1).mean()) for r in (eraser, orthogonal))
    assert least < 0.999 * other
    torch.testing.assert_close(eraser(eraser(x)), eraser(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0), rtol=1e-8, atol=1e-8)


def test_what_a_quadratic_probe_reads_is_not_erased():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4_000, D, generator=draw, dtype=torch.float64)
    y = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()  # planted: no linear trace at all
    gone = leace(x[::2], y[::2], 2)(x)
    pairs = torch.combinations(torch.arange(D), 2)

    def squares(v: torch.Tensor) -> torch.Tensor:
        return v[:, pairs[:, 0]] * v[:, pairs[:, 1]]

    linear = accuracy(gone[::2], y[::2], gone[1::2], y[1::2])
    quadratic = accuracy(squares(gone[::2]), y[::2], squares(gone[1::2]), y[1::2])
    assert linear.low < 0.5 < linear.high
    assert quadratic.low > 0.8


def test_placebos_take_as_much_and_leave_accuracy():
    x, y = planted(signal=4.0)
    other, truth = planted(1, signal=4.0)
    z = torch.randint(K, (N,), generator=torch.Generator().manual_seed(3))  # another relation of the same subjects
    before = accuracy(x, y, other, truth)
    wide = torch.cat([x, torch.randn(N, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)], 1)
    wider = torch.cat([other, torch.randn(N, 60, generator=torch.Generator().manual_seed(5), dtype=torch.float64)], 1)
    erasers = {"leace": leace(wide, y, K), "another": leace(wide, z, K), "random": random_subspace(wide, K - 1)}
    after = {name: accuracy(r(wide), y, r(wider), truth) for name, r in erasers.items()}
    assert before.low > 0.9
    assert after["leace"].high < 0.3
    assert after["another"].low > 0.8
    assert after["random"].low > 0.8
    assert {r.rank for r in erasers.values()} == {K - 1}
    assert random_subspace(wide, 5, seed=1).left.shape == (72, 5)
    assert not torch.equal(random_subspace(wide, 5, seed=1).left, random_subspace(wide, 5, seed=2).left)
    with pytest.raises(ValueError, match="rank 13 is more than the 12 directions"):
        random_subspace(x, 13)


def test_an_eraser_says_how_much_it_takes():
    x, y = planted()
    eraser = leace(x, y, K)
    want = [(row - eraser(row[None])[0]).norm() / row.norm() for row in x[:20]]
    torch.testing.assert_close(eraser.size(x)[:20], torch.stack(want))
    assert eraser(x.float()).dtype == torch.float32
    assert eraser.n_train == N
    with pytest.raises(ValueError, match="1 rows, needed at least 2"):
        leace(x[:1], y[:1], K)


def test_without_the_package_its_name_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(ModuleNotFoundError, match=r"tl-factedit\[probes\]"):
        leace(*planted(), K)


# ---------------------------------------------------------------------------------------- at work in a model


def eraser_of(some, layer: int, rank: int = 3) -> Eraser:
    draw = torch.Generator().manual_seed(0)
    stream = torch.randn(200, some.cfg.d_model, generator=draw)
    return random_subspace(stream, rank, seed=layer)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_it_works_at_the_last_token_of_its_subjects_and_nowhere_else(kind, arch, layer):
    some = untouched.used(tiny.model(kind, arch))
    before = untouched.state(some)
    eraser = eraser_of(some, layer)
    erasure = erase_states(some, eraser, layer, FACTS)
    assert isinstance(erasure, Change)
    assert (erasure.layers, erasure.facts) == ((layer,), tuple(FACTS))
    clean = read_states(some, [*FACTS, OTHER])
    found = read_states_edited(some, erasure, [*FACTS, OTHER])
    row = clean.layers.index(layer)
    torch.testing.assert_close(found.values[:2, row, 0], eraser(clean.values[:2, row, 0]), rtol=1e-5, atol=1e-5)
    assert ((found.values - clean.values)[:2, row, 0].norm(dim=-1) > 0.1).all()
    torch.testing.assert_close(found.values[:, row, 1], clean.values[:, row, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values[:, :row], clean.values[:, :row], rtol=1e-5, atol=1e-5)
    # What comes later reads it; another subject's prompt is as it was.
    assert ((found.values - clean.values)[:2, -1, 1].norm(dim=-1) > 1e-3).all()
    torch.testing.assert_close(found.values[2], clean.values[2], rtol=1e-5, atol=1e-5)
    assert untouched.state(some) == before
    assert f"3 of {some.cfg.d_model} directions after layer {layer}" in repr(erasure)


def test_subjects_are_found_anywhere_in_a_text_and_in_batches(kind):
    some = tiny.model(kind, "gpt2")
    eraser = eraser_of(some, 1)
    erasure = erase_states(some, eraser, 1, FACTS)
    text = "Mary visit Big Ben . The Tower is in Paris . The Eiffel Tower is near Big Ben and Ben"
    tokens = torch.cat([some.to_tokens(text)] * 3)
    words = ["<bos>", *text.split()]
    where = [words.index("Ben"), words.index("Eiffel") + 1, len(words) - 3]
    place = "blocks.1.hook_resid_post"
    with frozen(some), torch.no_grad():
        clean = Runner(some).capture(tokens, [place])[place]
        with erasure.applied(some):
            found = Runner(some).capture(tokens, [place])[place]
            again = Runner(some).capture(tokens[:, :4], [place])[place]
    changed = (found - clean).norm(dim=-1) > 1e-4
    assert [row.nonzero()[:, 0].tolist() for row in changed] == [where] * 3
    torch.testing.assert_close(found[0, where], eraser(clean[0, where]), rtol=1e-5, atol=1e-5)
    assert not ((again - clean[:, :4]).norm(dim=-1) > 1e-4).any()  # "Big" alone is nobody


def test_everywhere_is_every_token_of_every_text(kind):
    some = tiny.model(kind, "gpt2")
    eraser = eraser_of(some, 2)
    erasure = erase_states(some, eraser, 2, FACTS, everywhere=True)
    tokens, place = some.to_tokens("Mary lives in Rome"), "blocks.2.hook_resid_post"
    with frozen(some), torch.no_grad():
        clean = Runner(some).capture(tokens, [place])[place]
        with erasure.applied(some):
            found = Runner(some).capture(tokens, [place])[place]
    torch.testing.assert_close(found, eraser(clean), rtol=1e-5, atol=1e-5)
    assert "every token" in repr(erasure)


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_a_pass_of_ours_that_begins_at_a_later_layer_is_the_whole_one(kind, layer):
    some = tiny.model(kind, "gpt2")
    erasure = erase_states(some, eraser_of(some, layer), layer, FACTS)
    tokens = some.to_tokens(FACTS[0].text)
    with frozen(some), torch.no_grad():
        clean = Runner(some).logits(tokens)
        with erasure.applied(some):
            whole, runner = Runner(some).logits(tokens), Runner(some)
            for begin in (0, 1, 2):
                stream = runner.capture(tokens, [resid_pre(begin)])[resid_pre(begin)]
                assert torch.allclose(runner.logits(tokens, start=(begin, stream)), whole, atol=1e-5)
    assert (whole - clean).abs().max() > 1e-3


def test_a_pass_of_ones_own_that_begins_behind_the_embeddings_is_refused():
    if not tiny.HAS_HOOKED:
        pytest.skip("a bridge always embeds its tokens")
    some = tiny.model("hooked", "gpt2")
    erasure = erase_states(some, eraser_of(some, 2), 2, FACTS)
    tokens = some.to_tokens(FACTS[0].text)
    with frozen(some), torch.no_grad(), erasure.applied(some):
        stream = Runner(some).capture(tokens, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
        with pytest.raises(ValueError, match="begins after the embeddings"):
            some(stream, start_at_layer=1, tokens=tokens)


def test_it_is_audited_as_an_edit_is(kind):
    some = tiny.model(kind, "gpt2")
    known = [attacking.known_fact(some, fact) for fact in FACTS]
    others = [fact.but(subject=f"Rome {i}", id=None, neighbours=()) for fact in known for i in range(6)]
    for layer in (0, 2):
        erasure = erase_states(some, eraser_of(some, layer), layer, known)
        with laws.untouched(some):
            verdict = fe.audit(some, erasure, known, reference=others)
        found = verdict.attack("knock-out")
        with erasure.applied(some):
            log_p = laws.logits(some, known[0].text)[0, -1].log_softmax(-1)
        old = int(some.to_tokens(known[0].target_true, prepend_bos=False)[0, 0])
        said = found.after.at(fact=0, case=NOTHING, quantity="logp_old")
        assert float(said) == pytest.approx(float(log_p[old]), abs=1e-4)
        assert verdict.label not in ("ERASED", "MOVED", "LATENT")  # two facts are no evidence of absence


def test_other_weights_are_refused(kind):
    some, other = tiny.model(kind, "gpt2"), tiny.model(kind, "gpt2", seed=1)
    erasure = erase_states(some, eraser_of(some, 1), 1, FACTS)
    with pytest.raises(ValueError, match="the erasure was made for weights"), erasure.applied(other):
        pass


def test_hooks_are_taken_back_also_by_an_error(kind):
    some = untouched.used(tiny.model(kind, "llama"))
    erasure = erase_states(some, eraser_of(some, 1), 1, FACTS)
    before, clean = untouched.state(some), laws.logits(some, FACTS[0].text)
    with pytest.raises(KeyboardInterrupt), erasure.applied(some):
        assert (laws.logits(some, FACTS[0].text) - clean).abs().max() > 1e-4
        raise KeyboardInterrupt
    assert untouched.state(some) == before
    assert torch.equal(laws.logits(some, FACTS[0].text), clean)


def test_what_cannot_be_erased_is_refused(kind):
    some = tiny.model(kind, "gpt2")
    with pytest.raises(ValueError, match="facts is empty"):
        erase_states(some, eraser_of(some, 1), 1, [])
    with pytest.raises(ValueError, match="layer 9 is outside the model"):
        erase_states(some, eraser_of(some, 1), 9, FACTS)
    with pytest.raises(ValueError, match="is for 12 dimensions, the model has 32"):
        erase_states(some, random_subspace(planted()[0], 2), 1, FACTS)


def test_on_the_organism_it_blinds_the_state_it_is_put_to_for_other_people_and_not_what_follows():
    learnt, asked = states("base", "calibration"), states("base", "oracle0")
    y = torch.tensor([CITIES.index(fact.target_true) for fact in learnt.facts])
    truth = torch.tensor([CITIES.index(fact.target_true) for fact in asked.facts])
    eraser = leace(learnt.at(layer=2, position="subject"), y, 16)
    some = [Fact(f.subject, f.prompt, f.target_true, f.target_new) for f in (*facts("calibration"), *facts("oracle0"))]
    erasure = erase_states(model("base"), eraser, 2, some)
    train, test = (read_states_edited(model("base"), erasure, part.facts) for part in (learnt, asked))

    def read(layer: int, train_states, test_states):
        cells = [part.at(layer=layer, position="subject") for part in (train_states, test_states)]
        return accuracy(cells[0], y, cells[1], truth)

    assert read(2, learnt, asked).low > 0.6
    assert read(2, train, test).low < 1 / 16 < read(2, train, test).high + 0.01
    assert read(3, train, test).low > 0.15  # the next block reads it anew from what is not linear
    assert eraser.rank == 15
    assert 0.1 < float(eraser.size(asked.at(layer=2, position="subject")).mean()) < 0.5
