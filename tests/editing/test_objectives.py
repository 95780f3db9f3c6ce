"""Hase et al.'s five problems: what each objective asks for, and what editors make of it."""

import functools

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.hook_names import EMBED
from tl_factedit.core.tokens import align
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editing.values import fit_values

LAYER, LAYERS = 1, (1, 2)
NOISE = fe.GaussianNoise(scale=2.0, samples=1, seed=3)
BARE = laws.FACT.but(target_new=None)
OTHER = laws.OTHER.but(target_new=None)
OBJECTIVES = {
    "inject": fe.Inject(),
    "erase": fe.Erase(),
    "amplify": fe.editing.Amplify(),
    "force": fe.editing.Force(NOISE),
    "reverse": fe.editing.Reverse(NOISE),
}
FIT = ValueFit(steps=4, lr=0.2, clamp=0.75)
EDITORS = {
    "rome": lambda stats, **options: fe.Rome(stats[LAYER], **options),
    "memit": lambda stats, **options: fe.Memit(stats, weight=1.0, **options),
    "emmet": lambda stats, **options: fe.Emmet(stats, **options),
    "alphaedit": lambda stats, **options: fe.AlphaEdit(stats, share=0.1, weight=1e-3, **options),
    "pmet": lambda stats, **options: fe.Pmet(stats, weight=1.0, **options),
}
LOSS, DELTA = {"rel": 2e-4, "abs": 2e-5}, {"rtol": 2e-3, "atol": 2e-3}
# Long enough to move a random model, and with nothing that holds it back.
FAR = {"contexts": [""], "fit": ValueFit(steps=20, lr=0.5, kl_weight=0.0, decay=0.0)}
unconcerned = pytest.mark.filterwarnings("ignore::tl_factedit.editing.concerns.EditWarning")
every_editor = pytest.mark.parametrize("which", EDITORS)


@functools.cache
def shared(kind: str, arch: str = "gpt2"):
    """A model and its statistics, as nothing here may change them."""
    model = tiny.model(kind, arch)
    return model, {layer: laws.stats(model, layer) for layer in LAYERS}


def make(which: str, stats, **options) -> fe.Editor:
    return EDITORS[which](stats, **{"fit": FIT, "contexts": laws.CONTEXTS, "progress": False, **options})


def target_of(objective: fe.editing.Objective, model, fact=BARE) -> fe.editing.EditTarget:
    return objective.targets(model, [fact], prepend_bos=True)[0]


def setting(model, noised: fe.editing.EditTarget, bos: bool = True):
    """A hook that sets the subject as a target says, in the bare prompt."""
    start, stop = align(model.tokenizer, noised.fact, prepend_bos=bos).subject

    def put(value, hook=None):
        value = value.clone()
        value[0, start:stop] = noised.embeddings.to(value)
        return value

    return [(EMBED, put)]


def likely(model, length: int = 1) -> fe.Fact:
    """The fact with what the model itself goes on with."""
    ids = model.to_tokens(BARE.text, prepend_bos=True)
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    said = model.tokenizer.decode(ids[0, -length:])
    return BARE.but(target_true=f" {said}")


def p_true(model, fact=BARE, noised: fe.editing.EditTarget | None = None, *, bos: bool = True) -> float:
    """Probability of all of target_true after the prompt, through public hooks."""
    row = align(model.tokenizer, fact, prepend_bos=bos)
    hooks = [] if noised is None else setting(model, noised, bos)
    with torch.no_grad():
        out = model.run_with_hooks(torch.cat([row.ids, row.true_ids[:-1]])[None], fwd_hooks=hooks)
    log_p = out[0].double().log_softmax(-1)
    return float(sum(log_p[len(row.ids) - 1 + i, token] for i, token in enumerate(row.true_ids)).exp())


# ---------------------------------------------------------------------------------------- what is asked for


def test_each_objective_asks_for_its_problem(kind):
    model, _ = shared(kind)
    asked = {name: target_of(each, model, laws.FACT) for name, each in OBJECTIVES.items()}
    assert {name: each.unlikely for name, each in asked.items()} == {name: name == "erase" for name in asked}
    assert {name: each.embeddings is not None for name, each in asked.items()} == {n: n == "force" for n in asked}
    assert asked["inject"].fact.target_new == " Rome"
    assert {asked[name].fact.target_new for name in ("erase", "amplify", "force")} == {" Paris"}
    assert all(each.fact.but(target_new=" Rome") == laws.FACT for each in asked.values())


def test_what_is_forced_and_reversed_is_under_the_first_sample_of_the_corruption(kind):
    model, _ = shared(kind)
    row = align(model.tokenizer, BARE, prepend_bos=True)
    start, stop = row.subject
    with torch.no_grad():
        _, cache = model.run_with_cache(row.ids[None], names_filter=EMBED)
    clean = cache[EMBED][0, start:stop]
    noise = 2.0 * float(clean.std()) * torch.from_numpy(laws.np.random.RandomState(3).randn(1, stop - start, 32))[0]
    forced = target_of(fe.editing.Force(NOISE), model)
    torch.testing.assert_close(forced.embeddings, clean + noise.float(), rtol=1e-5, atol=1e-6)
    hooks = setting(model, forced)
    with torch.no_grad():
        said = int(model.run_with_hooks(row.ids[None], fwd_hooks=hooks)[0, -1].argmax())
        plain = int(model(row.ids[None])[0, -1].argmax())
    reverse = target_of(fe.editing.Reverse(NOISE), model).fact.target_new
    assert model.tokenizer.encode(reverse, add_special_tokens=False) == [said] != [plain]


def test_embeddings_are_counted_from_the_last_token():
    given = torch.arange(6.0).reshape(3, 2)
    asked = fe.editing.EditTarget(BARE, embeddings=given)
    assert asked.spelt(3) is given
    assert torch.equal(asked.spelt(2), given[1:])
    assert torch.equal(asked.spelt(5), given[[0, 0, 0, 1, 2]])
    assert fe.editing.EditTarget(BARE).spelt(3) is None


class Nothing:
    """A corruption that finds nothing to put in a subject's place."""

    def calibrated(self, subjects):
        return self

    def draw(self, subject):
        return subject.embeddings[None][:0]

    def contrast(self, subject):
        return None


def test_a_corruption_that_has_nothing_to_put_there_is_refused(kind):
    model, _ = shared(kind)
    for objective in (fe.editing.Force(Nothing()), fe.editing.Reverse(Nothing())):
        with laws.untouched(model), pytest.raises(ValueError, match="Nothing has nothing to put in place of 'The Ei"):
            target_of(objective, model)


def test_a_reversal_that_cannot_be_spelt_is_refused(kind, monkeypatch):
    model, _ = shared(kind)
    with laws.untouched(model):
        monkeypatch.setattr(type(model.tokenizer), "all_special_ids", list(range(len(model.tokenizer))))
        with pytest.raises(ValueError, match=r"what 'The Eiffel Tower' leads to .* can't be spelt: take another seed"):
            target_of(fe.editing.Reverse(NOISE), model)
        monkeypatch.undo()


@pytest.mark.parametrize("tok", tiny.TOKENIZERS)
def test_what_a_reversal_is_to_say_is_one_token_after_the_prompt(kind, tok):
    """Some tokenizers spell a token that stands alone without the space before it."""
    model = tiny.model(kind, "llama", tok=tiny.tokenizer(tok))
    for seed in range(5):
        fact = target_of(fe.editing.Reverse(fe.GaussianNoise(samples=1, seed=seed)), model).fact
        assert len(align(model.tokenizer, fact, prepend_bos=True).new_ids) == 1


# ---------------------------------------------------------------------------------------- the value that is fitted


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("where", ["mlp", "resid"])
@pytest.mark.parametrize("name", ["erase", "force"])
def test_every_step_equals_the_literal_one(kind, arch, where, name):
    model, _ = shared(kind, arch)
    asked = target_of(OBJECTIVES[name], model, likely(model, 2))
    options = {"steps": 5, "lr": 0.1, "clamp": 4.0, "stop_below": 0.05, "kl_weight": 0.0625, "decay": 0.02}
    (found,) = fit_values(
        model, [asked], LAYER, laws.CONTEXTS, where=where, fit=ValueFit(**options), prepend_bos=True, progress=False
    )
    delta, losses = editing.fit_value(
        model,
        asked.fact,
        LAYER,
        laws.CONTEXTS,
        bos=True,
        where=where,
        unlikely=asked.unlikely,
        embeddings=asked.embeddings,
        **options,
    )
    assert found.losses == pytest.approx(losses, **LOSS)
    torch.testing.assert_close(found.delta, delta.double(), **DELTA)
    assert (found.target_prob[-1] < found.target_prob[0]) is asked.unlikely
    (plain,) = fit_values(
        model,
        [fe.editing.EditTarget(asked.fact)],
        LAYER,
        laws.CONTEXTS,
        where=where,
        fit=ValueFit(**options),
        prepend_bos=True,
        progress=False,
    )
    assert plain.losses[0] != pytest.approx(losses[0], rel=1e-2)


def test_targets_of_all_kinds_are_fitted_at_once_as_each_alone(kind):
    model, _ = shared(kind)
    targets = [target_of(each, model, laws.FACT) for each in OBJECTIVES.values()]
    options = {"where": "resid", "fit": FIT, "prepend_bos": True, "progress": False}
    together = fit_values(model, targets, LAYER, laws.CONTEXTS, **options)
    alone = [fit_values(model, [each], LAYER, laws.CONTEXTS, **options)[0] for each in targets]
    for one, other in zip(together, alone, strict=True):
        assert one.losses == pytest.approx(other.losses, **LOSS)
        torch.testing.assert_close(one.delta, other.delta, **DELTA)
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
    assert len({round(each.losses[0], 4) for each in together}) == len(targets)


def test_what_is_to_become_unlikely_does_not_stop_early(kind):
    model, _ = shared(kind)
    at_once = ValueFit(steps=4, stop_below=1e9, stop_kl=1e9)
    found = fit_values(
        model,
        [target_of(each, model) for each in (fe.Erase(), fe.editing.Amplify())],
        LAYER,
        laws.CONTEXTS,
        fit=at_once,
        prepend_bos=True,
        progress=False,
    )
    assert [(each.stopped, len(each.losses)) for each in found] == [("steps", 4), ("loss", 1)]


def test_embeddings_that_fit_no_subject_are_refused_before_anything_is_run(kind, monkeypatch):
    model, _ = shared(kind)
    odd = fe.editing.EditTarget(laws.FACT, embeddings=torch.zeros(2, 32))
    with (
        laws.untouched(model),
        laws.no_forward(monkeypatch, model),
        pytest.raises(ValueError, match=r"embeddings of 2 tokens, needed one for each of the 3 tokens of 'The Eiffel"),
    ):
        fit_values(model, [odd], LAYER, laws.CONTEXTS, prepend_bos=True, progress=False)


# ---------------------------------------------------------------------------------------- editors


@pytest.mark.parametrize(
    ("which", "name"),
    [*(("rome", name) for name in OBJECTIVES), *((which, "force") for which in EDITORS if which != "rome")],
)
def test_every_editor_takes_every_objective(kind, which, name, tmp_path):
    model, stats = shared(kind)
    fact = laws.FACT if name == "inject" else BARE
    editor = make(which, stats, objective=OBJECTIVES[name])
    with laws.untouched(model):
        edit = editor(model, [fact])
    assert edit.facts == (fact,)
    assert edit.editor["objective"] == repr(OBJECTIVES[name])
    assert f"{OBJECTIVES[name]!r} of " in repr(edit) or name == "inject"
    assert edit.fits[0]["unlikely"] is (name == "erase")
    assert edit.fits[0]["target"] == {"inject": " Rome", "reverse": edit.fits[0]["target"]}.get(name, " Paris")
    laws.makes_the_same_edit_twice(lambda: editor(model, [fact]))
    laws.survives_a_file(edit, tmp_path / "edit.safetensors", model)
    laws.comes_off_bit_for_bit(edit, model)


@every_editor
def test_amplifying_is_injecting_what_is_true(kind, which):
    model, stats = shared(kind)
    amplified = make(which, stats, objective=fe.editing.Amplify())(model, [BARE])
    injected = make(which, stats)(model, [BARE.but(target_true=None, target_new=BARE.target_true)])
    assert amplified.digest == injected.digest
    assert make(which, stats, objective=fe.Erase())(model, [BARE]).digest != injected.digest


@every_editor
def test_to_force_with_the_models_own_embeddings_is_to_amplify(kind, which):
    model, stats = shared(kind)
    still = make(which, stats, objective=fe.editing.Force(fe.GaussianNoise(scale=0.0, samples=1)))(model, [BARE])
    plain = make(which, stats, objective=fe.editing.Amplify())(model, [BARE])
    assert still.digest == plain.digest
    assert make(which, stats, objective=fe.editing.Force(NOISE))(model, [BARE]).digest != plain.digest


@unconcerned
@every_editor
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_erasing_lowers_and_amplifying_raises_what_is_true(kind, arch, which):
    model, stats = shared(kind, arch)
    fact = likely(model)
    before = p_true(model, fact)
    after = {}
    for name in ("erase", "amplify"):
        edit = make(which, stats, objective=OBJECTIVES[name], **FAR)(model, [fact])
        with edit.applied(model):
            after[name] = p_true(model, fact)
    assert after["erase"] < 0.6 * before
    assert after["amplify"] > 1.2 * before


@unconcerned
@every_editor
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_forcing_raises_what_is_true_under_its_noise_more_than_amplifying_does(kind, arch, which):
    model, stats = shared(kind, arch)
    noised = target_of(fe.editing.Force(NOISE), model)
    before = p_true(model, noised=noised)
    after = {}
    for name in ("force", "amplify"):
        edit = make(which, stats, objective=OBJECTIVES[name], **FAR)(model, [BARE])
        with edit.applied(model):
            after[name] = p_true(model, noised=noised)
    assert after["force"] > 1.4 * before
    assert after["force"] > after["amplify"]


@unconcerned
@every_editor
def test_reversing_raises_what_noise_leads_to(kind, which):
    model, stats = shared(kind)
    edit = make(which, stats, objective=fe.editing.Reverse(NOISE), **FAR)(model, [BARE])
    said = BARE.but(target_true=edit.fits[0]["target"])
    before = p_true(model, said)
    with edit.applied(model):
        assert p_true(model, said) > 1.5 * before


@every_editor
def test_the_keys_are_those_of_the_noised_subject(kind, which):
    """The key of the first layer, which no earlier change reaches."""
    model, stats = shared(kind)
    edit = make(which, stats, objective=fe.editing.Force(NOISE), contexts=[""])(model, [BARE])
    row = align(model.tokenizer, BARE, prepend_bos=True)
    place = f"blocks.{LAYER}.mlp.hook_post"
    noised = editing.seen(model, place, row.ids.tolist(), setting(model, target_of(fe.editing.Force(NOISE), model)))[
        row.last
    ]
    torch.testing.assert_close(edit.keys[LAYER][0], noised.double(), rtol=1e-4, atol=1e-5)
    clean = editing.seen(model, place, row.ids.tolist())[row.last]
    assert (noised - clean).norm() > 0.1 * clean.norm()


@every_editor
def test_only_injecting_wants_a_new_object(kind, which, monkeypatch):
    model, stats = shared(kind)
    laws.wants_a_new_object(make(which, stats), model, laws.FACT, monkeypatch)
    for name in OBJECTIVES.keys() - {"inject"}:
        with laws.no_forward(monkeypatch, model), pytest.raises(AssertionError, match="a forward pass was run"):
            make(which, stats, objective=OBJECTIVES[name])(model, [BARE])


@every_editor
def test_a_class_is_no_objective(kind, which):
    stats = shared(kind)[1]
    with pytest.raises(ValueError, match=r"objective is the class Erase, needed a value: write Erase\(\)"):
        make(which, stats, objective=fe.Erase)


@pytest.mark.parametrize(
    "stage",
    [
        "tl_factedit.editing.objectives.subject_of",
        "tl_factedit.editing.objectives.Runner.logits",
        "tl_factedit.editing.objectives.EditTarget.spelt",
        "tl_factedit.editing.adam.Adam.step",
    ],
)
@pytest.mark.parametrize("which", ["rome", "memit"])
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, which, stage, monkeypatch):
    model, stats = shared(kind)

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        monkeypatch.setattr(stage, fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            make(which, stats, objective=fe.editing.Reverse(NOISE))(model, [BARE])
        monkeypatch.undo()


def test_noise_is_set_to_the_spread_of_all_facts_that_are_forced_together(kind):
    model, _ = shared(kind)
    both = fe.editing.Force(NOISE).targets(model, [BARE, OTHER], prepend_bos=True)
    alone = target_of(fe.editing.Force(NOISE), model)
    assert not torch.allclose(both[0].embeddings, alone.embeddings)
    fixed = fe.editing.Force(fe.GaussianNoise(samples=1, sigma=0.2))
    both = fixed.targets(model, [BARE, OTHER], prepend_bos=True)
    assert torch.equal(both[0].embeddings, target_of(fixed, model).embeddings)


# ---------------------------------------------------------------------------------------- a model that knows


@pytest.fixture(scope="module")
def organism(kind):
    model = fe.models.organism(kind)
    return model, fe.KeyStats.identity(model, 2), fe.models.organism_facts("city", "calibration", 1)


@unconcerned
@pytest.mark.parametrize("which", ["rome", "memit"])
def test_on_a_model_that_knows_its_facts_each_objective_does_what_it_says(organism, which):
    model, identity, facts = organism
    noise = fe.GaussianNoise(samples=1, seed=0)
    bos = bool(model.cfg.default_prepend_bos)
    for fact in facts:
        bare = fact.but(target_new=None)

        def edited(objective, bare=bare):
            options = {"objective": objective, "contexts": [""], "progress": False}
            if which == "rome":
                return fe.Rome(identity, **options)(model, [bare])
            return fe.Memit({2: identity}, weight=1e-3, **options)(model, [bare])

        (noised,) = fe.editing.Force(noise).targets(model, [bare], prepend_bos=bos)
        assert knows(model, bare) > 0.9
        assert knows(model, bare, noised) < 0.5
        with edited(fe.Erase()).applied(model):
            assert knows(model, bare) < 0.1
        edit = edited(fe.editing.Reverse(noise))
        with edit.applied(model):
            assert edit.fits[0]["target"] != fact.target_true
            assert knows(model, bare.but(target_true=edit.fits[0]["target"])) > 0.5
        with edited(fe.editing.Force(noise)).applied(model):
            assert knows(model, bare, noised) > 0.8
        with edited(fe.editing.Amplify()).applied(model):
            assert knows(model, bare) > 0.9


def knows(model, fact, noised: fe.editing.EditTarget | None = None) -> float:
    return p_true(model, fact, noised, bos=bool(model.cfg.default_prepend_bos))
