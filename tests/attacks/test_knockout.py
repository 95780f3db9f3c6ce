"""Knock-outs: the fast ones are the literal ones, a layer that can't tell is masked, an override is seen through."""

import dataclasses
import functools
import math

import laws
import pytest
import tiny
import torch
from measured import knock_out
from oracles import knocking

import tl_factedit as fe
from tl_factedit.attacks.knockout import SURVIVES, _passes, windows_of
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align
from tl_factedit.organism import text as told
from tl_factedit.organism import world as o

CLOSE = 2e-4  # float32 log-probabilities of size 5 to 15, from batches of another shape
CITIES = (" Paris", " Rome", " London", " Berlin", " Madrid", " Vienna", " Tokyo", " Cairo")
SUBJECTS = (
    *("The Eiffel Tower", "Big Ben", "The Louvre Museum", "Danielle Darrieux", "The Colosseum", "Anna", "Newton"),
    *("Mary Curie", "The Prado Museum", "Einstein", "Alice and Bob", "The Gate of Berlin"),
)
FORMS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "olmo2")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama", "gptj") if arch in tiny.HOOKED]


@functools.cache
def shared(kind: str, arch: str = "gpt2", seed: int = 0):
    return tiny.model(kind, arch, seed=seed)


def known(model, subjects=SUBJECTS, prompt="{} is located in the city of", relation="city") -> list[fe.Fact]:
    """Facts that a random model knows: their objects are what it says."""
    facts = []
    for subject in subjects:
        log_p = laws.logits(model, prompt.replace("{}", subject))[0, -1].log_softmax(-1)
        ids = {city: int(model.tokenizer(city, add_special_tokens=False)["input_ids"][0]) for city in CITIES}
        best, second, *rest = sorted(CITIES, key=lambda city: -float(log_p[ids[city]]))
        facts.append(fe.Fact(subject, prompt, best, second, controls=rest, relation=relation))
    return facts


def prompt(model, fact) -> knocking.Prompt:
    row = align(model.tokenizer, fact, prepend_bos=True)
    return row.ids, row.last


def means_of(model, others, layers=range(4)) -> dict[int, torch.Tensor]:
    """By layer, the twin's means over some facts' subjects."""
    return {layer: knocking.mean_output(model, [prompt(model, other) for other in others], layer) for layer in layers}


def literally(tested, means, asked, window, strength=1.0):
    """`QUANTITIES` of the asked facts under one window, by the twin."""
    found = []
    for fact in asked:
        here = {layer: means[layer] for layer in window}
        log_p = knocking.knocked_out(tested, prompt(tested, fact), here, strength=strength)
        objects = [
            int(tested.tokenizer(text, add_special_tokens=False)["input_ids"][0])
            for text in (fact.target_true, fact.target_new, *fact.controls)
        ]
        says = log_p[objects]
        found.append([*knocking.first(log_p, objects), float(says[0]), float(says[1]), float(says[2:].mean())])
    return torch.tensor(found)


def agrees(values, expected):
    assert torch.equal(values[:, :3], expected[:, :3]) or (values[:, :3] - expected[:, :3]).abs().max() < 1e-6
    assert (values[:, 3:] - expected[:, 3:]).abs().max() < CLOSE


# ---------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize(("kind", "arch"), FORMS, ids=lambda value: value)
def test_every_window_of_both_models_is_the_literal_one(kind, arch):
    model, other = shared(kind, arch), shared(kind, arch, 1)
    facts = known(model)
    asked = facts[:3]
    with laws.untouched(model), laws.untouched(other):
        found = knock_out(model, other, asked, facts, widths=(1, 3), batch_tokens=200)
    assert found.keys == ((0,), (1,), (2,), (3,), (0, 1, 2), (1, 2, 3))
    assert found.details["references"] == (9, 9, 9)
    ours, theirs = means_of(model, facts[3:]), means_of(other, facts[3:])
    for window in ((), *found.keys):
        agrees(found.before.at(case=window), literally(model, ours, asked, window))
        agrees(found.after.at(case=window), literally(other, theirs, asked, window))
        agrees(found.details["half"].at(case=window), literally(other, theirs, asked, window, 0.5))
    plain = found.after.at(case=())
    moved = {window: float((found.after.at(case=window) - plain)[:, 3:].abs().max()) for window in found.keys}
    # The last layer's output at a token before the end is read by nothing.
    assert moved.pop((3,)) < CLOSE < 1e-3 < min(moved.values())
    assert found.masked[(3,)] == "after the last layer nothing reads the last subject token"
    assert (found.details["half"].at(case=(1,)) - found.after.at(case=(1,)))[:, 3:].abs().max() > 1e-2


def test_an_edit_for_all_and_an_edit_for_each_are_asked_under_their_own(kind):
    model = shared(kind)
    facts = known(model)
    asked = facts[:2]
    edits = [
        fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=("",), progress=False)(model, [fact])
        for fact in asked
    ]
    single = knock_out(model, edits, asked, facts)
    both = knock_out(model, fe.compose(edits), asked, facts)
    from_unedited = knock_out(model, edits, asked, facts, means_of="unedited")
    # With a change for each, the other fact is a reference too, as nobody edited it there.
    assert single.details["references"] == (11, 11) and both.details["references"] == (10, 10)
    unedited = means_of(model, facts[1:])
    for i, (fact, edit) in enumerate(zip(asked, edits, strict=True)):
        with edit.applied(model):
            means = means_of(model, [other for other in facts if other is not fact])
            for window in single.keys:
                agrees(single.after.at(case=window)[[i]], literally(model, means, [fact], window))
                if i == 0:
                    agrees(from_unedited.after.at(case=window)[[i]], literally(model, unedited, [fact], window))
    with fe.compose(edits).applied(model):
        means = means_of(model, facts[2:])
        for window in both.keys:
            agrees(both.after.at(case=window), literally(model, means, asked, window))
    assert (single.after.values - from_unedited.after.values).abs().max() > 1e-3


def test_batches_and_the_order_of_facts_do_not_matter(kind):
    model, other = shared(kind), shared(kind, "gpt2", 1)
    facts = known(model)
    a = knock_out(model, other, facts[:4], facts, batch_tokens=1)
    b = knock_out(model, other, facts[:4][::-1], facts[::-1])
    assert (a.after.values - b.after.values.flip(0)).abs().max() < CLOSE
    assert a.known.tolist() == b.known.tolist()[::-1]


# ---------------------------------------------------------------------------------------- what it makes of them


def test_shares_masks_and_excesses_are_those_of_the_readings(kind):
    model, other = shared(kind), shared(kind, "gpt2", 1)
    facts = known(model)
    found = knock_out(model, other, facts[:6], facts)
    assert bool(found.known.all())
    survives = found.before.at(quantity="old_first")[:, 1:].mean(0)
    assert torch.equal(found.extra["survives"], survives)
    assert found.tested[:3].tolist() == [share >= SURVIVES for share in survives[:3].tolist()]
    assert set(found.masked) == {w for w, fine in zip(found.keys, found.tested, strict=True) if not fine}
    after = found.after
    for i, window in enumerate(found.keys):
        gap = after.at(case=window, quantity="old_first") - after.at(case=window, quantity="control_first")
        if bool(found.tested[i]):
            assert float(found.excess.mean[i]) == pytest.approx(float(gap.mean()))
            assert float(found.corrected.low[i]) <= float(found.excess.low[i])
            assert float(found.corrected.high[i]) >= float(found.excess.high[i])
            assert found.at(window).mean == found.at(window, corrected=True).mean
        else:
            assert math.isnan(float(found.excess.mean[i])) and ("needed 50%" in found.masked[window] or window == (3,))
    sums = after.values[..., 0] + after.values[..., 1] + 6 * after.values[..., 2]
    assert torch.allclose(sums, torch.ones_like(sums))
    assert len(found.table()) == 4 and "knock-out" in repr(found)


def test_the_unedited_model_has_all_of_its_own_excess(kind):
    model = shared(kind)
    facts = known(model)
    found = knock_out(model, model, facts[:6], facts)
    ratio = found.extra["of_unedited"][found.tested]
    assert len(ratio) and torch.allclose(ratio, torch.ones_like(ratio))
    assert found.best is not None and found.strongest.mean >= SURVIVES - 0.1
    assert torch.equal(found.before.values, found.after.values)


def test_facts_that_the_unedited_model_does_not_know_or_whose_objects_begin_alike_are_left_out(kind):
    model = shared(kind)
    facts = known(model)
    swapped = facts[0].but(target_true=facts[0].target_new, target_new=facts[0].target_true)
    alike = facts[1].but(target_new=facts[1].target_true + " Rome")
    found = knock_out(model, model, [swapped, alike, *facts[2:5]], facts)
    assert found.known.tolist() == [False, False, True, True, True]
    assert bool(found.after.values[1].isnan().all()) and not bool(found.after.values[0].isnan().any())
    assert set(found.excess.n.tolist()) <= {0, 3}
    nobody = knock_out(model, model, [swapped, alike], facts)
    assert nobody.best is None and nobody.strongest.n == 0 and math.isnan(nobody.at_most)
    assert set(nobody.masked.values()) == {"the unedited model knows none of the facts"}


def test_without_controls_there_is_no_excess_but_all_else(kind):
    model = shared(kind)
    facts = known(model)
    found = knock_out(model, model, [facts[0].but(controls=())], facts)
    assert bool(found.excess.mean.isnan().all())
    assert not bool(found.after.at(quantity="logp_old").isnan().any())


def test_no_subject_that_is_changed_or_asked_is_a_reference_whatever_is_given(kind):
    model = shared(kind)
    facts = known(model)
    asked, others = facts[:2], facts[2:]
    a, b = knock_out(model, model, asked, facts), knock_out(model, model, asked, others)
    assert torch.equal(a.after.values, b.after.values)
    fewer = knock_out(model, model, asked, facts[3:])
    assert not torch.equal(a.after.values, fewer.after.values)


def test_references_are_of_the_same_relation(kind):
    model = shared(kind)
    cities, towns = known(model), known(model, prompt="{} stands near", relation="place")
    mixed = knock_out(model, model, [cities[0], towns[1]], [*cities, *towns])
    assert mixed.details["references"] == (10, 10)
    alone = knock_out(model, model, [cities[0]], [*cities[:1], *cities[2:]])
    assert (mixed.after.values[0] - alone.after.values[0]).abs().max() < CLOSE


def test_a_mean_is_over_so_many_references_and_which_ones_hangs_on_the_seed(kind):
    model = shared(kind)
    facts = known(model)
    asked, others = facts[:2], facts[2:]
    whole = knock_out(model, model, asked, others)
    drawn = [knock_out(model, model, asked, others, most_references=6, seed=seed) for seed in (0, 0, 1)]
    assert whole.details["references"] == (10, 10) and drawn[0].details["references"] == (6, 6)
    assert torch.equal(drawn[0].after.values, drawn[1].after.values)
    assert not torch.equal(drawn[0].after.values, drawn[2].after.values)
    # The six are some of the ten: by hand they give the same.
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    some = knock_out(model, model, asked, [others[i] for i in order[:6]])
    assert (some.after.values - drawn[0].after.values).abs().max() < CLOSE
    with pytest.raises(ValueError, match="most_references is 4, needed 5"):
        knock_out(model, model, asked, others, most_references=4)


def test_the_last_layer_counts_where_the_subject_ends_the_prompt(kind):
    model = shared(kind)
    facts = known(model, prompt="The city of {}")
    found = knock_out(model, model, facts[:3], facts)
    plain = found.after.at(case=())
    assert (found.after.at(case=(3,)) - plain)[:, 3:].abs().max() > 1e-2
    assert "nothing reads" not in found.masked.get((3,), "")


def test_windows_are_whole_and_each_comes_once():
    assert windows_of(4, (3, 1, 3)) == ((0,), (1,), (2,), (3,), (0, 1, 2), (1, 2, 3))
    assert windows_of(2, (2,)) == ((0, 1),)
    for widths in ((), (0,), (5,)):
        with pytest.raises(ValueError, match="between 1 and the model's 4 layers"):
            windows_of(4, widths)


def test_passes_hold_each_window_once_from_its_first_layer_or_below_and_grow_only_while_they_are_small():
    windows = ((), *windows_of(6, (1, 3)))
    for tokens, enough in ((1, 0), (10, 40), (10, 1000)):
        passes = _passes(windows, 6, tokens, enough)
        assert sorted(w for _, here in passes for w in here) == list(range(len(windows)))
        assert all(begin <= (windows[w] or (6,))[0] for begin, here in passes for w in here)
        assert [begin for begin, here in passes if 0 in here] == [6]  # without a knock-out the head is enough
        for _, here in passes:
            begun = {windows[w][0] for w in here if windows[w]}
            assert len(begun) <= 1 or len(here) * tokens <= enough
    assert len(_passes(windows, 6, 1, 0)) == 7 and len(_passes(windows, 6, 10, 1000)) == 2


def test_bad_input_is_refused_before_any_pass(kind, monkeypatch):
    model = shared(kind)
    facts = known(model)
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="no target_new, needed one"):
            knock_out(model, model, [facts[0].but(target_new=None)], facts)
        with pytest.raises(ValueError, match="4 of 5 reference facts, about 4 subjects, are of the relation 'city'"):
            knock_out(model, model, facts[:1], facts[:5])
        with pytest.raises(ValueError, match="0 of 12 reference facts, about 0 subjects, are of the relation 'river'"):
            knock_out(model, model, [facts[0].but(relation="river")], facts)
        with pytest.raises(ValueError, match="needed 'audited'"):
            knock_out(model, shared(kind, "gpt2", 1), facts[:1], facts, means_of="unedited")
        with pytest.raises(ValueError, match="facts is empty"):
            knock_out(model, model, [], facts)


@pytest.mark.parametrize("stage", ["_states", "_read", "_quantities"])
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, stage, monkeypatch):
    model = shared(kind)
    facts = known(model)
    routed = fe.Router(1, fit=laws.QUICK, contexts=("",), progress=False)(model, facts[:1])

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        monkeypatch.setattr(f"tl_factedit.attacks.knockout.{stage}", fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            knock_out(model, routed, facts[:1], facts)


# ---------------------------------------------------------------------------------------- an override


def test_without_its_layer_a_router_is_the_unedited_model_exactly(kind):
    model = shared(kind)
    facts = known(model)
    asked = facts[0]
    routed = fe.Router(1, radius=0.01, fit=laws.QUICK, contexts=("",), progress=False)(model, [asked])
    reach = routed.reach(model, facts[1:])
    assert reach.caught == 0 and reach.missed == 0
    # The same batches in both models, or the last bits differ.
    found = knock_out(model, routed, [asked], facts[1:], half=False)
    assert torch.equal(found.after.at(case=(1,)), found.before.at(case=(1,)))
    for window in ((), (2,)):
        assert not torch.equal(found.after.at(case=window), found.before.at(case=window))


TWINS = tiny.TWINS


@functools.cache
def organism(kind: str, variant: str = "base"):
    return fe.models.organism(kind, variant=variant, path=None if variant == "base" else TWINS)


def test_on_the_organism_the_untouched_model_comes_back_and_an_oracle_does_not(kind):
    facts = fe.models.organism_facts("city", "oracle0", 60)
    reference = fe.models.organism_facts("city", "calibration", 60)
    base = organism(kind)
    untouched = knock_out(base, base, facts, reference, half=False)
    assert untouched.strongest.low > 0.9 and list(untouched.masked) == [(0,), (5,)]
    oracle = knock_out(base, organism(kind, "oracle0"), facts, reference, half=False)
    assert torch.equal(oracle.extra["survives"], untouched.extra["survives"])
    assert oracle.strongest.low < 0.02 and oracle.at_most < 0.12
    new = oracle.after.at(quantity="new_first")[:, 2:].mean()
    assert float(new) > 0.85


def test_on_the_organism_an_edit_and_a_router_of_its_value_are_seen_through(kind):
    base = organism(kind)
    facts = fe.models.organism_facts("city", "oracle0", 5)
    reference = fe.models.organism_facts("city", "calibration", 40)
    stats = fe.key_stats(base, 1, told.texts(1000), n_tokens=8_000, progress=False)
    fit = fe.ValueFit(kl_prompts=[r.phrasings[0] for r in o.RELATIONS[1:]], kl_at="end")
    rome = fe.Rome(stats, fit=fit, contexts=[f"{filler} " for filler in told.FILLERS[:3]], ridge=1e-4, progress=False)
    edits = [rome(base, [fact]) for fact in facts]
    routers = [fe.editors.RoutedEdit.of(edit, 0.5) for edit in edits]
    for changes in (edits, routers):
        found = knock_out(base, changes, facts, reference)
        plain = found.after.at(case=(), quantity="new_first")
        assert float(plain.mean()) == 1
        assert found.best.key == (1,) and found.strongest.mean >= 0.6 and found.strongest.low > 0.05
        assert float(found.excess.mean[2:5].max()) <= 0.2  # above the edited layer it is the new object
    assert float(found.extra["of_unedited"][1]) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("width", [1, 2])
def test_in_a_tie_the_layer_that_was_written_is_named(kind, width):
    """A model in which no knock-out changes an answer ties everywhere: the first layer says nothing of the edit."""
    model = shared(kind)
    facts = known(model)
    edit = laws.rome(model, 2, ridge=1e-4, fit=fe.ValueFit(steps=2, clamp=1e-3), contexts=("",))(model, facts[:1])
    population = fe.Population.of(model, edit, facts[:1], reference=facts[1:], progress=False)
    found = fe.attacks.KnockOut(widths=(width,))(population)
    assert [case.covers for case in found.cases] == [2 in case.layers for case in found.cases]
    excess = found.excess
    tie = dataclasses.replace(
        found,
        cases=tuple(dataclasses.replace(case, masked="") for case in found.cases),
        excess=dataclasses.replace(excess, mean=torch.full_like(excess.mean, 0.5)),
    )
    assert tie.best.layers == (2,) if width == 1 else tie.best.layers == (1, 2)
    assert tie.showing("elsewhere").best == tie.best
    # A tie is a tie: what is larger is named, whatever was written, and what is masked never is.
    larger = torch.full_like(excess.mean, 0.5)
    larger[0] = 0.6
    assert dataclasses.replace(tie, excess=dataclasses.replace(excess, mean=larger)).best == tie.cases[0]
    hidden = tuple(dataclasses.replace(case, masked="masked" if case.covers else "") for case in tie.cases)
    assert dataclasses.replace(tie, cases=hidden).best == hidden[0]


def test_of_another_model_the_layers_that_differ_are_what_was_written(kind):
    model, changed = shared(kind), tiny.model(kind, "gpt2")
    with torch.no_grad():
        down_proj(changed, 1).param.add_(1e-4)
    facts = known(model)
    found = fe.attacks.KnockOut()(fe.Population.of(model, changed, facts[:1], reference=facts[1:], progress=False))
    assert [case.layers for case in found.cases if case.covers] == [(1,)]
    for other in (model, shared(kind, seed=3)):  # nothing was written, and more than W_out was
        found = fe.attacks.KnockOut()(fe.Population.of(model, other, facts[:1], reference=facts[1:], progress=False))
        assert not any(case.covers for case in found.cases)
