"""The unlearning depth score is that of whole passes with one hook; and what it says where the truth is known."""

import functools
import math

import laws
import pytest
import tiny
import torch
from attacking_facts import known_facts
from audits import CONTEXTS, FACTS, FIT, HELD
from oracles import depths

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import align
from tl_factedit.editors.router import Router
from tl_factedit.probes.unlearning import UnlearningDepth, unlearning_depth

CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # float32 log-probabilities of size 1 to 10, from batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
held = pytest.mark.skipif(not HELD.exists(), reason="the twins' weights are in a checkout, in tests/organism/weights")


@functools.cache
def trio(kind: str, arch: str):
    """A full, a changed and a retain model, and facts with old objects of one and of several tokens."""
    models = [tiny.model(kind, arch, seed=seed) for seed in (0, 1, 2)]
    one, *_ = known_facts(models[0])
    facts = [one, fe.Fact("Big Ben", "{} is in", " Rome and Paris"), fe.Fact("Bob", "Where is {} located in", " Paris")]
    return (*models, facts)


def of(full, changed, facts, **options):
    return fe.Population.of(full, changed, facts, progress=False, **options)


# ---------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)
@pytest.mark.parametrize("positions", ["object", "prompt"])
def test_it_is_what_whole_passes_with_one_hook_give(kind, arch, positions):
    full, changed, retain, facts = trio(kind, arch)
    tau = 0.2
    found = unlearning_depth(of(full, changed, facts), retain, tau=tau, positions=positions)
    several = 0
    for i, fact in enumerate(facts):
        row = align(full.tokenizer, fact, prepend_bos=bool(full.cfg.default_prepend_bos))
        prompt, target = row.ids, row.true_ids
        several += len(target) > 1
        # The tokens that predict the object's: the prompt's last one up to the last but one of the object.
        places = list(range(len(prompt) - 1 if positions == "object" else 0, len(prompt) + len(target) - 1))
        stages = [
            [depths.drop(full, source, prompt, target, layer, places) for layer in found.layers]
            for source in (retain, changed)
        ]
        torch.testing.assert_close(found.retain_drop[i], torch.tensor(stages[0]), **CLOSE)
        torch.testing.assert_close(found.changed_drop[i], torch.tensor(stages[1]), **CLOSE)
        assert float(found.full[i]) == pytest.approx(depths.mean_log_p(full, prompt, target, []), abs=1e-4)
        want = depths.score(*stages, tau)
        assert math.isnan(found.of_each[i]) if want is None else found.of_each[i] == pytest.approx(want, abs=1e-3)
    assert several == 1 and found.score.n >= 2
    assert len(found.layers) == 4 and bool((found.retain_drop.abs() > 0.01).any(0).all())


def by_hand(retain_drop, changed_drop, **options) -> UnlearningDepth:
    retain_drop, changed_drop = torch.tensor(retain_drop), torch.tensor(changed_drop)
    facts = tuple(fe.Fact(f"p{i}", "{} is", " here") for i in range(len(retain_drop)))
    layers, full = tuple(range(retain_drop.shape[1])), torch.full((len(retain_drop),), -0.5)
    return UnlearningDepth(facts, layers, full, retain_drop, changed_drop, **{
        "tau": 0.05, "positions": "object", "retain": "r", **options})  # fmt: skip


def test_layers_below_tau_do_not_count_ratios_are_clipped_and_what_is_dropped_is_told():
    found = by_hand(
        [[0.04, 1.0, 3.0], [0.01, 0.05, -2.0], [0.0, 2.0, 2.0]],
        [[0.04, 0.5, 9.0], [5.0, 5.0, 5.0], [1.0, -1.0, 2.0]],
    )
    assert found.counts.tolist() == [[False, True, True], [False, False, False], [False, True, True]]
    assert found.of_each[0] == pytest.approx((0.5 + 3) / 4) and found.of_each[2] == pytest.approx(0.5)
    assert math.isnan(found.of_each[1]) and found.score.n == 2
    ((fact, why),) = found.dropped
    assert fact is found.facts[1] and "cost 0.050 nats" in why and "block 1" in why and "τ = 0.05" in why
    assert found.at(0).n == 0 and math.isnan(found.at(0).mean)
    assert found.at(1).mean == pytest.approx(0.5 / 3) and found.at(2).mean == 1
    table = found.table()
    assert list(table.counts_for) == [0, 2, 2] and table.changed_drop[2] == pytest.approx(5.5)
    assert "1 without a layer that counts" in repr(found) and "p1" in found._repr_html_()
    assert by_hand([[0.04, 1.0, 3.0]], [[0.04, 0.5, 9.0]], tau=0.0).counts.all()
    with pytest.raises(ValueError, match="layer 3 is outside the model"):
        found.at(3)


def test_where_nothing_counts_nothing_is_measured():
    found = by_hand([[0.0, 0.01]], [[1.0, 1.0]])
    assert found.score.n == 0 and "not measured" in repr(found) and len(found.dropped) == 1
    assert "p0" in found._repr_html_() and len(found.table()) == 2


# ---------------------------------------------------------------------------------------- its ends, and what it refuses


@pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)
@pytest.mark.parametrize("positions", ["object", "prompt"])
def test_an_untouched_model_is_at_0_and_the_retain_model_at_1(kind, arch, positions):
    full, _, retain, facts = trio(kind, arch)
    with laws.untouched(full), laws.untouched(retain):
        nothing = unlearning_depth(of(full, full, facts), retain, positions=positions)
        everything = unlearning_depth(of(full, retain, facts), retain, positions=positions)
    assert nothing.score.n == everything.score.n > 1
    assert nothing.score.mean == pytest.approx(0, abs=1e-4) and everything.score.mean == pytest.approx(1, abs=1e-4)


def test_each_change_serves_its_fact_and_a_folder_resumes(kind, tmp_path, monkeypatch):
    full, _, retain, facts = trio(kind, "gpt2")
    facts = known_facts(full)
    edits = [laws.rome(full)(full, [fact]) for fact in facts]
    with laws.untouched(full):
        found = unlearning_depth(of(full, edits, facts, folder=tmp_path), retain)
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        alone = unlearning_depth(of(full, edit, [fact]), retain)
        torch.testing.assert_close(found.changed_drop[i], alone.changed_drop[0], **CLOSE)
        # What comes out of the blocks below the edit is as it was.
        assert float(alone.changed_drop[0, 0].abs()) < 1e-4 < float(alone.changed_drop[0, 1:].abs().max())
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "__init__", lambda *_: pytest.fail("a model was run"))
        again = unlearning_depth(of(full, edits, facts, folder=tmp_path), retain)
    assert torch.equal(again.changed_drop, found.changed_drop) and again.score == found.score
    other = unlearning_depth(of(full, edits, facts, folder=tmp_path), trio(kind, "gpt2")[1])
    assert not torch.equal(other.retain_drop, found.retain_drop)
    hook = retain.blocks[0].register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"the retain model .* carries hooks of its own"):
            unlearning_depth(of(full, edits, facts, folder=tmp_path), retain)
        assert torch.equal(unlearning_depth(of(full, edits, facts), retain).retain_drop, found.retain_drop)
    finally:
        hook.remove()


def test_what_can_not_be_asked_is_refused_before_anything_runs(kind, monkeypatch):
    full, changed, retain, facts = trio(kind, "gpt2")
    smaller = tiny.model(kind, "gpt2", n_layers=3)
    edit = laws.rome(full)(full, [facts[0]])
    refused = [
        ("no retain model is given", lambda: unlearning_depth(of(full, changed, facts))),
        ("retain is the unedited model itself", lambda: unlearning_depth(of(full, changed, facts), full)),
        ("the retain model .* needed two of one shape", lambda: unlearning_depth(of(full, changed, facts), smaller)),
        ("the changed model .* needed two of one shape", lambda: unlearning_depth(of(full, smaller, facts), retain)),
        ("positions is 'last'", lambda: unlearning_depth(of(full, changed, facts), retain, positions="last")),
        ("tau is -1.0", lambda: unlearning_depth(of(full, changed, facts), retain, tau=-1.0)),
        ("tau is nan", lambda: unlearning_depth(of(full, changed, facts), retain, tau=math.nan)),
        ("is asked twice", lambda: unlearning_depth(of(full, changed, [facts[0]] * 2), retain)),
        ("no target_true", lambda: unlearning_depth(of(full, changed, facts[0].but(target_true=None)), retain)),
        ("retain is a Edit, needed a model", lambda: unlearning_depth(of(full, changed, facts), edit)),
    ]
    with laws.no_forward(monkeypatch, full):
        for words, call in refused:
            if tiny.HAS_HOOKED or not words.startswith(("positions is", "retain is a Edit")):  # else types are checked
                with pytest.raises(ValueError, match=words):
                    call()


# ---------------------------------------------------------------------------------------- where the truth is known


ASKED = FACTS[:40]


@pytest.fixture(scope="module")
def base(kind):
    return fe.models.organism(kind)


def twin(kind, variant):
    return fe.models.organism(kind, variant, path=HELD)


@held
def test_states_of_a_model_that_was_never_told_are_at_1_and_of_an_oracle_near_it(kind, base):
    never = twin(kind, "never")
    found = unlearning_depth(of(base, never, ASKED), never)
    assert found.score.mean == pytest.approx(1) and found.score.n == 40
    oracle = unlearning_depth(of(base, twin(kind, "oracle0"), ASKED), never)
    assert 0.7 < oracle.score.mean < 0.9 and oracle.at(5).mean > 0.8
    assert unlearning_depth(of(base, base, ASKED), never).score.mean == pytest.approx(0, abs=1e-5)


@held
def test_it_does_not_tell_an_override_from_an_oracle(kind, base):
    """The limit that the page states: at the last token an override has been read already."""
    never = twin(kind, "never")
    override = Router(layer=1, fit=FIT, contexts=CONTEXTS, progress=False)(base, ASKED)
    found = unlearning_depth(of(base, override, ASKED), never)
    oracle = unlearning_depth(of(base, twin(kind, "oracle0"), ASKED), never)
    assert found.score.mean > 0.65 and abs(found.score.mean - oracle.score.mean) < 0.1
    whole = unlearning_depth(of(base, override, ASKED), never, positions="prompt")
    assert whole.at(0).mean == pytest.approx(0, abs=1e-5) and whole.at(1).mean > 0.8  # in force from its layer on
    assert unlearning_depth(of(base, twin(kind, "oracle0"), ASKED), never, positions="prompt").at(0).mean > 0.5


@held
def test_between_models_of_other_initial_weights_it_is_void(kind, base):
    """A model that knows every one of the facts, in another code, is given the score of one that has none."""
    other = twin(kind, "seed1")
    bare = [fact.but(paraphrases=(), neighbours=(), neighbour_targets=()) for fact in ASKED]
    assert fe.evaluate(other, bare).efficacy.mean < 0.05  # of the new object: it says the old one
    assert unlearning_depth(of(base, other, ASKED), twin(kind, "never")).score.mean > 0.9
