"""Knock-outs: the fast ones are the literal ones, a layer that can't tell is masked, an override is seen through."""

import dataclasses
import functools
import math

import jaxtyping
import laws
import pytest
import tiny
import torch
from measured import knock_out
from oracles import knocking

import tl_factedit as fe
from tl_factedit.attacks.attack import SURVIVES
from tl_factedit.attacks.cells import Cell, in_order, windows_of
from tl_factedit.attacks.silencing import NOTHING, Silencing, passes
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
    return row.ids, row.subject


def means_of(model, others):
    """The twin's means over some facts' prompts."""
    prompts = [prompt(model, other) for other in others]
    return functools.cache(lambda component, layer: knocking.mean_saying(model, prompts, component, layer))


def literally(tested, means, asked, cells, strength=1.0):
    """`QUANTITIES` of the asked facts with some cells silenced, by the twin."""
    found = []
    for fact in asked:
        log_p = knocking.knocked_out(tested, prompt(tested, fact), cells, means, strength=strength)
        objects = [
            int(tested.tokenizer(text, add_special_tokens=False)["input_ids"][0])
            for text in (fact.target_true, fact.target_new, *fact.controls)
        ]
        says = log_p[objects]
        found.append([*knocking.first(log_p, objects), float(says[0]), float(says[1]), float(says[2:].mean())])
    return torch.tensor(found)


def mlp(*layers: int, place="subject", by="mean") -> Silencing:
    """The key of a case."""
    return Silencing(in_order(Cell("mlp", layer, place) for layer in layers), by)


AT_SUBJECT = {"components": ("mlp",), "places": ("subject",)}


def agrees(values, expected):
    assert torch.equal(values[:, :3], expected[:, :3]) or (values[:, :3] - expected[:, :3]).abs().max() < 1e-6
    assert (values[:, 3:] - expected[:, 3:]).abs().max() < CLOSE


# ---------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize(("kind", "arch"), FORMS, ids=lambda value: value)
def test_every_case_of_both_models_is_the_literal_one(kind, arch):
    model, other = shared(kind, arch), shared(kind, arch, 1)
    facts = known(model)
    asked = facts[:3]
    with laws.untouched(model), laws.untouched(other):
        found = knock_out(model, other, asked, facts, widths=(1, 3), batch_tokens=200)
    singles = [key for key in found.keys if key.by == "mean" and len(key.cells) == 1]
    assert len(singles) == 4 * 2 * 3 and mlp(0, 1, 2) in found.keys and mlp(1, 2, 3, place="all") in found.keys
    assert found.details["references"] == (9, 9, 9)
    ours, theirs = means_of(model, facts[3:]), means_of(other, facts[3:])
    places = {"subject", "last", "all"}
    drawn = [key for key in found.keys if key.by == "mean"][:: 7 if arch == "gpt2" else 11]
    assert {cell.place for key in drawn for cell in key.cells} == places
    for key in (NOTHING, mlp(0, 1, 2), *drawn):
        agrees(found.before.at(case=key), literally(model, ours, asked, key.cells))
        agrees(found.after.at(case=key), literally(other, theirs, asked, key.cells))
    halves = [key for key in found.keys if key.by == "half"]
    for key in halves[:2]:
        agrees(found.after.at(case=key), literally(other, theirs, asked, key.cells, 0.5))
    for key in [key for key in found.keys if key.by == "resample"][:2]:
        for i, fact in enumerate(asked):
            # By one of the references; which one, the seed says.
            drawn_by = [literally(other, means_of(other, [reference]), [fact], key.cells)[0] for reference in facts[3:]]
            assert any(torch.allclose(found.after.at(case=key)[i], each, atol=CLOSE) for each in drawn_by)
    plain = found.after.at(case=NOTHING)
    moved = {key: float((found.after.at(case=key) - plain)[:, 3:].abs().max()) for key in singles}
    # The last layer's output at a token before the end is read by nothing.
    unread = [key for key in singles if key.cells[0].layer == 3 and key.cells[0].place == "subject"]
    assert len(unread) == 2
    for key in unread:
        assert moved.pop(key) < CLOSE
        assert found.masked[key] == "after the last layer nothing reads the last subject token"
    assert min(change for key, change in moved.items() if key.cells[0].place != "last") > CLOSE


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
    looked_at = [key for key in single.keys if key.by == "mean"][::7]
    unedited = means_of(model, facts[1:])
    for component, layer in {(cell.component, cell.layer) for key in looked_at for cell in key.cells}:
        unedited(component, layer)  # now, while nothing is edited
    for i, (fact, edit) in enumerate(zip(asked, edits, strict=True)):
        with edit.applied(model):
            means = means_of(model, [other for other in facts if other is not fact])
            for key in looked_at:
                agrees(single.after.at(case=key)[[i]], literally(model, means, [fact], key.cells))
                if i == 0:
                    agrees(from_unedited.after.at(case=key)[[i]], literally(model, unedited, [fact], key.cells))
    with fe.compose(edits).applied(model):
        means = means_of(model, facts[2:])
        for key in looked_at:
            agrees(both.after.at(case=key), literally(model, means, asked, key.cells))
    assert (single.after.values - from_unedited.after.values).abs().max() > 1e-3


def test_batches_and_the_order_of_facts_do_not_matter(kind):
    model, other = shared(kind), shared(kind, "gpt2", 1)
    facts = known(model)[:9]
    a = knock_out(model, other, facts[:3], facts, components=("mlp",), batch_tokens=20, resample=False)
    b = knock_out(model, other, facts[:3][::-1], facts[::-1], components=("mlp",), resample=False)
    assert (a.after.values - b.after.values.flip(0)).abs().max() < CLOSE
    assert a.known.tolist() == b.known.tolist()[::-1]


# ---------------------------------------------------------------------------------------- what it makes of them


def test_shares_masks_and_excesses_are_those_of_the_readings(kind):
    model, other = shared(kind), shared(kind, "gpt2", 1)
    facts = known(model)
    found = knock_out(model, other, facts[:6], facts)
    assert bool(found.known.all())
    assert torch.equal(found.extra["survives"], found.before.at(quantity="old_first")[:, 1:].mean(0))
    after, survives = found.after, found.extra["survives"].tolist()
    for i, key in enumerate(found.keys):
        counts = ~found.counted[0][:, i].isnan()  # the facts for which the change is in force, or for which it isn't
        old, control = (after.at(case=key, quantity=name)[counts] for name in ("old_first", "control_first"))
        if bool(found.tested[i]):
            assert int(counts.sum()) >= 3 and found.share("old_first", key) == pytest.approx(float(old.mean()))
            assert survives[i] >= SURVIVES
            common = float(found.extra["common"][i]) if "common" in found.extra else math.nan
            null = max(float(control.mean()), 0.0 if math.isnan(common) else common)
            assert float(found.excess.mean[i]) == pytest.approx(float(old.mean()) - null, abs=1e-6)
            assert float(found.corrected.low[i]) <= float(found.excess.low[i])
            assert float(found.corrected.high[i]) >= float(found.excess.high[i])
            assert found.at(key).mean == found.at(key, corrected=True).mean
        else:
            why = ("needed 50%", "nothing reads", "can spare it whole")
            assert math.isnan(float(found.excess.mean[i])) and any(each in found.masked[key] for each in why)
    sums = after.values[..., 0] + after.values[..., 1] + 6 * after.values[..., 2]
    assert torch.allclose(sums, torch.ones_like(sums))
    assert len(found.table()) == len(found.cases) and "knock-out" in repr(found)


def test_the_unedited_model_has_all_of_its_own_excess(kind):
    model = shared(kind)
    facts = known(model)
    found = knock_out(model, model, facts[:6], facts, **AT_SUBJECT)
    assert found.best is not None and found.strongest.mean >= SURVIVES - 0.2
    assert torch.equal(found.before.values, found.after.values)
    assert {case.shows for case in found.cases} == {"elsewhere"}  # nothing was written: nothing is in force


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
    plain = found.after.at(case=NOTHING)
    assert (found.after.at(case=mlp(3)) - plain)[:, 3:].abs().max() > 1e-2
    assert "nothing reads" not in found.masked.get(mlp(3), "")


def test_windows_are_whole_and_each_comes_once():
    assert windows_of(4, (3, 1, 3)) == ((0,), (1,), (2,), (3,), (0, 1, 2), (1, 2, 3))
    assert windows_of(2, (2,)) == ((0, 1),)
    for widths in ((), (0,), (5,)):
        with pytest.raises(ValueError, match="between 1 and the model's 4 layers"):
            windows_of(4, widths)


def test_passes_hold_each_silencing_once_from_its_first_layer_or_below_and_grow_only_while_they_are_small():
    begins = [6, *(layer for layer in range(6) for _ in range(2))]
    for tokens, enough in ((1, 0), (10, 40), (10, 1000)):
        found = passes(begins, 6, tokens, enough)
        assert sorted(s for _, here in found for s in here) == list(range(len(begins)))
        assert all(begin <= begins[s] for begin, here in found for s in here)
        assert [begin for begin, here in found if 0 in here] == [6]  # where nothing is silenced the head is enough
        for _, here in found:
            assert len({begins[s] for s in here}) == 1 or len(here) * tokens <= enough
    assert len(passes(begins, 6, 1, 0)) == 7 and len(passes(begins, 6, 10, 1000)) == 2


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
        with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="head"):
            knock_out(model, model, facts[:1], facts, components=("head",))
        with pytest.raises(ValueError, match="none of the model's cells"):
            knock_out(model, model, facts[:1], facts, cells=[[Cell("mlp", 9, "all")]])


@pytest.mark.parametrize("stage", ["footprint_of", "Replacements.read", "says_under", "firsts"])
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, stage, monkeypatch):
    model = shared(kind)
    facts = known(model)
    routed = fe.Router(1, fit=laws.QUICK, contexts=("",), progress=False)(model, facts[:1])

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        module = "knockout" if stage == "footprint_of" else "asking"
        monkeypatch.setattr(f"tl_factedit.attacks.{module}.{stage}", fail)
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
    found = knock_out(model, routed, [asked], facts[1:])
    # What the theorem says of cells that take out all that was written: the same batches in both, and the same bits.
    key = mlp(1)
    assert float(found.extra["cover"][found.keys.index(key)]) == 1.0 and found.details["footprint"].whole() == key.cells
    assert torch.equal(found.after.at(case=key), found.before.at(case=key))
    for other in (NOTHING, mlp(2)):
        assert not torch.equal(found.after.at(case=other), found.before.at(case=other))
    shows = {case.key: case.shows for case in found.cases}
    assert shows[key] == "elsewhere" and shows[mlp(2)] == shows[mlp(1, place="last")] == "underneath"


TWINS = tiny.TWINS


@functools.cache
def organism(kind: str, variant: str = "base"):
    return fe.models.organism(kind, variant=variant, path=None if variant == "base" else TWINS)


def test_on_the_organism_the_untouched_model_comes_back_and_an_oracle_does_not(kind):
    facts = fe.models.organism_facts("city", "oracle0", 60)
    reference = fe.models.organism_facts("city", "calibration", 60)
    base = organism(kind)
    untouched = knock_out(base, base, facts, reference, resample=False, **AT_SUBJECT)
    assert untouched.strongest.low > 0.85
    assert [key for key in untouched.masked if key.by == "mean"] == [mlp(0), mlp(5)]
    oracle = knock_out(base, organism(kind, "oracle0"), facts, reference, resample=False, **AT_SUBJECT)
    assert oracle.strongest.low < 0.02 and oracle.at_most < 0.12
    new = torch.stack([oracle.after.at(case=mlp(layer), quantity="new_first") for layer in range(1, 5)]).mean()
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
        found = knock_out(base, changes, facts, reference, **AT_SUBJECT)
        plain = found.after.at(case=NOTHING, quantity="new_first")
        assert float(plain.mean()) == 1
        assert found.best.layers == (1,) and found.best.shows == "elsewhere"
        assert found.strongest.mean >= 0.6 and found.strongest.low > 0.05
        above = [float(found.at(mlp(layer)).mean) for layer in (2, 3, 4)]
        assert max(above) <= 0.2  # above the edited layer it is the new object
    assert float(found.extra["of_unedited"][found.keys.index(mlp(1))]) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------- ties


def test_in_a_tie_the_cells_that_were_written_are_named(kind):
    """A model in which no knock-out changes an answer ties everywhere: the first layer says nothing of the edit."""
    model = shared(kind)
    facts = known(model)
    routed = fe.Router(2, radius=0.01, fit=laws.QUICK, contexts=("",), progress=False)(model, facts[:1])
    found = fe.attacks.KnockOut()(fe.Population.of(model, routed, facts[:1], reference=facts[1:], progress=False))
    assert {case.layers for case in found.cases if case.covers} == {(2,)}
    excess = found.excess
    tie = dataclasses.replace(
        found,
        cases=tuple(dataclasses.replace(case, masked="") for case in found.cases),
        excess=dataclasses.replace(excess, mean=torch.full_like(excess.mean, 0.5)),
    )
    assert tie.best.layers == (2,) and tie.showing("elsewhere").best == tie.best
    # A tie is a tie: what is larger is named, whatever was written, and what is masked never is.
    larger = torch.full_like(excess.mean, 0.5)
    larger[0] = 0.6
    assert dataclasses.replace(tie, excess=dataclasses.replace(excess, mean=larger)).best == tie.cases[0]
    hidden = tuple(dataclasses.replace(case, masked="masked" if case.covers else "") for case in tie.cases)
    assert dataclasses.replace(tie, cases=hidden).best == hidden[0]


# ---------------------------------------------------------------------------------------- a common object


def one_object(population):
    """The same facts, all with one old object."""
    facts = tuple(fact.but(target_true=population.facts[0].target_true) for fact in population.facts)
    return dataclasses.replace(population, facts=facts)


def test_an_object_that_many_others_have_is_no_sign_of_a_fact(kind):
    """Where silencing makes a model name a common object of anybody, the old object's return means nothing."""
    population = fe.Population.of(shared(kind), shared(kind), known(shared(kind))[:6], progress=False)
    cases = [fe.attacks.Case(0, "a case", "elsewhere")]
    back = torch.zeros(6, 1, 3)
    back[:3, 0, 0] = 1.0  # of half of the facts, and never a control
    alone = fe.attacks.Recovery.of("own", population, cases, back, back)
    assert alone.strongest.mean == pytest.approx(0.5)
    everybody = fe.attacks.Recovery.of("own", population, cases, back, back, common=torch.full((6, 1), 0.5))
    assert everybody.strongest.mean == pytest.approx(0.0) and float(everybody.extra["common"][0]) == 0.5
    nobody = fe.attacks.Recovery.of("own", population, cases, back, back, common=torch.zeros(6, 1))
    assert (nobody.strongest.low, nobody.strongest.high) == pytest.approx((alone.strongest.low, alone.strongest.high))
    # A null that facts share is unsure, the more the fewer subjects it is of and the more facts have one object.
    many, few, one = (
        fe.attacks.Recovery.of("own", shared_by, cases, back, back, common=torch.full((6, 1), 0.2), subjects=count)
        for shared_by, count in ((population, 1000), (population, 8), (one_object(population), 8))
    )
    assert one.strongest.low < few.strongest.low < many.strongest.low
    assert few.among(1).strongest == few.strongest and few.showing("elsewhere").strongest == few.strongest


def test_how_often_others_are_given_the_object_is_counted_literally(kind):
    model, other = shared(kind), shared(kind, "gpt2", 1)
    facts = known(model)
    asked, owners = facts[:2], facts[2:]
    found = knock_out(model, other, asked, owners, resample=False)
    looked = [
        i for i, value in enumerate(found.extra.get("common", torch.tensor([])).tolist()) if not math.isnan(value)
    ]
    assert looked, "no case brings the old object back: the test asks nothing"
    theirs = means_of(other, owners)
    for i in looked[:2]:
        key, shares = found.keys[i], []
        for fact in asked:
            objects = [fact.target_true, fact.target_new, *fact.controls]
            ids = [int(other.tokenizer(text, add_special_tokens=False)["input_ids"][0]) for text in objects]
            strangers = [owner for owner in owners if owner.target_true != fact.target_true]
            says = [knocking.knocked_out(other, prompt(other, one), key.cells, theirs) for one in strangers]
            shares.append(sum(knocking.first(log_p, ids)[0] for log_p in says) / len(says))
        assert float(found.extra["common"][i]) == pytest.approx(sum(shares) / len(shares), abs=1e-6)
