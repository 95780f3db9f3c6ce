"""Every row of the contract's table of bad input: an error before any forward pass, that says what to do."""

import copy
import dataclasses
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.fingerprint import Fingerprint
from tl_factedit.backend.protocol import UnsupportedModelError
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj

LAYER = 1
FACT = laws.FACT


@pytest.fixture(
    params=[(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS], ids="-".join, scope="module"
)
def model(request):
    """Shared, as bad input changes nothing."""
    return tiny.model(*request.param)


LONG = " ".join(["is"] * 80)
TOO_LONG = {
    "prompt": FACT.but(prompt=f"{{}} {LONG}", id="the long one"),
    "paraphrase": FACT.but(paraphrases=[f"{{}} {LONG}"], id="the long one"),
    "neighbour": FACT.but(neighbours=[LONG], neighbour_targets=[" Paris"], id="the long one"),
}
FEW = {"fit": fe.ValueFit(steps=2), "contexts": ("",), "progress": False}
SCOPE = fe.probes.Patchscope("The city of {} is in", source_layers=[0], target_layers=[0])


def plain(model) -> fe.KeyStats:
    return fe.KeyStats(1, torch.eye(len(down_proj(model, 1).W)).double(), 0, "identity", None)


ASKING = {
    "known": lambda model, facts: fe.known(model, facts),
    "evaluate": lambda model, facts: fe.evaluate(model, facts),
    "token_accuracy": lambda model, facts: fe.evaluation.token_accuracy(model, facts),
    "causal_trace": lambda model, facts: fe.causal_trace(model, facts, progress=False),
    "trace_units": lambda model, facts: fe.locate.trace_units(model, facts[1], layers=[1], progress=False),
    "calibrate_noise": lambda model, facts: fe.locate.calibrate_noise(model, facts, 0.3),
    "meng2022": lambda model, facts: fe.locate.meng2022(model, facts, unknown="trace", progress=False),
    "hase2023": lambda model, facts: fe.locate.hase2023(model, facts, progress=False),
    "zhang2023": lambda model, facts: fe.locate.zhang2023(model, facts, progress=False),
    "Rome": lambda model, facts: fe.Rome(plain(model), **FEW)(model, facts[1:]),
    "Memit": lambda model, facts: fe.Memit({1: plain(model)}, **FEW)(model, facts),
    "FineTune": lambda model, facts: fe.FineTune(1, steps=2, progress=False)(model, facts),
    "KnowledgeNeurons": lambda model, facts: fe.KnowledgeNeurons(steps=2, progress=False)(model, facts),
    "Router": lambda model, facts: fe.Router(1, **FEW)(model, facts),
    "LogitLens": lambda model, facts: fe.LogitLens()(model, facts),
    "read_states": lambda model, facts: fe.probes.read_states(model, facts),
    "subject_embeddings": lambda model, facts: fe.probes.subject_embeddings(model, facts),
    "Patchscope": lambda model, facts: SCOPE(model, facts),
    "audit": lambda model, facts: fe.audit(model, copy.deepcopy(model), facts, progress=False),
    "footprint": lambda model, facts: fe.attacks.footprint(model, model, facts, progress=False),
    "ReadOut": lambda model, facts: fe.attacks.ReadOut()(fe.Population.of(model, model, facts, progress=False)),
}
ALSO = {"paraphrase": ("evaluate", "token_accuracy", "KnowledgeNeurons", "audit"), "neighbour": ("evaluate", "audit")}


@pytest.mark.parametrize(
    ("what", "call"), [("prompt", call) for call in ASKING] + [(what, call) for what in ALSO for call in ALSO[what]]
)
def test_a_text_longer_than_the_context_is_named_with_its_fact_before_any_pass(model, what, call, monkeypatch):
    def run(*_, **__):
        raise AssertionError("a forward pass was run")

    for method in ("logits", "capture", "remember"):
        monkeypatch.setattr(Runner, method, run)
    facts = [laws.OTHER, TOO_LONG[what]]
    with pytest.raises(
        ValueError, match=r"(?s)tokens.*has room for 64.*'the long one'|'the long one'.*has room for 64"
    ):
        ASKING[call](model, facts)


def test_a_paraphrase_in_which_an_edit_is_to_fire_is_named_before_any_pass(model, refuse):
    edit = fe.Rome(fe.KeyStats.identity(model, 1), **FEW)(model, [FACT])
    long = fe.Population.of(model, edit, FACT.but(paraphrases=[f"{{}} {LONG}"], id="the long one"), progress=False)
    refuse(lambda: fe.evaluation.gain_coverage(long), "paraphrases: ", "has room for 64", "'the long one'")


@pytest.mark.parametrize("call", ["gains", "Patchscope"])
def test_another_text_that_is_too_long_is_named_too(model, call):
    with pytest.raises(ValueError, match=r"'(The Eiffel Tower|\?) is is.* tokens, and the model has room for 64"):
        if call == "gains":
            fe.evaluation.gains(
                model, fe.Rome(fe.KeyStats.identity(model, 1), **FEW)(model, [FACT]), TOO_LONG["prompt"].text
            )
        else:
            fe.probes.Patchscope(f"{{}} {LONG}", source_layers=[0], target_layers=[0])(model, [FACT])


@pytest.fixture(scope="module")
def stats(model):
    return laws.stats(model, LAYER)


def rome(stats, **options) -> fe.Rome:
    return fe.Rome(stats, **{"fit": laws.QUICK, "contexts": fe.stats.SampledContexts(lengths=((2, 3),)), **options})


@pytest.fixture
def refuse(model, monkeypatch):
    """That a call is refused, without a forward pass, with everything as it was and all of these words."""

    def check(call, *words, on=model, error=ValueError):
        with laws.untouched(on), laws.no_forward(monkeypatch, on), pytest.raises(error) as found:
            call()
        for word in words:
            assert word in str(found.value)

    return check


# -- prompt with no "{}" or two; empty subject or target


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Rome", "It is in", " Italy"), ("holds 0", "exactly one", "where the subject goes")),
        (("Rome", "{} and {} are in", " Italy"), ("holds 2", "exactly one", "where the subject goes")),
        (("", "{} is in", " Italy"), ("subject is ''", "needed some text", "give the subject's name")),
        (("Rome", "{} is in", ""), ("target_true is ''", "needed some text", "give the object")),
        (("Rome", "{} is in", " Italy", " "), ("target_new is ' '", "needed some text", "give the object")),
    ],
    ids=["no slot", "two slots", "no subject", "no object", "no new object"],
)
def test_a_fact_without_its_parts(arguments, words):
    with pytest.raises(ValueError) as error:
        fe.Fact(*arguments)
    assert all(word in str(error.value) for word in words)


# -- subject that doesn't end on a token boundary


INSIDE = fe.Fact("Eiffel Tow", "The {}er is located in the city of", " Paris", " Rome")


@pytest.mark.parametrize("call", ["causal_trace", "Rome", "audit", "LogitLens"])
def test_a_subject_that_ends_inside_a_token(model, stats, refuse, call):
    edit = rome(stats)(model, [FACT])
    calls = {
        "causal_trace": lambda: fe.causal_trace(model, INSIDE),
        "Rome": lambda: rome(stats)(model, [INSIDE]),
        "audit": lambda: fe.audit(model, edit, [INSIDE]),
        "LogitLens": lambda: fe.LogitLens()(model, [INSIDE]),
    }
    words = ("'Eiffel Tow'", "ends inside token 'Tower'", "(position 3)", "extend the subject or change the template")
    if call == "LogitLens":  # it has made its Runner by then, which probes a bridge's first block
        with laws.untouched(model), pytest.raises(ValueError, match="ends inside token 'Tower'"):
            calls[call]()
    else:
        refuse(calls[call], *words)


# -- target_new whose first token equals target_true's


def test_objects_with_the_same_first_token_are_accepted_and_flagged(model, stats):
    fact = FACT.but(target_true=" Rome in Spain", target_new=" Rome in Italy", neighbours=(), neighbour_targets=())
    edit = rome(stats)(model, [fact])
    verdict = fe.audit(model, edit, [fact])
    assert all(answer.same_first_token for answer in verdict.after.answers)
    assert bool(verdict.table()["same_first_token"][0])
    lens = verdict.lens.after
    assert lens.at(quantity="margin").isnan().all()
    assert not lens.at(quantity="logp_old").isnan().any()
    assert not any(answer.same_first_token for answer in fe.evaluate(model, [FACT]).answers)


# -- fact without target_new given to an editor


def test_a_fact_without_a_new_object(model, stats, refuse):
    fact = FACT.but(target_new=None)
    words = ("'The Eiffel Tower' has no target_new", "needed one", "fact.but(target_new=...)")
    refuse(lambda: rome(stats)(model, [fact]), *words)
    refuse(lambda: fe.evaluate(model, [fact]), *words)


# -- layer outside the model, mixture of experts, quantised or offloaded weights


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_layer_outside_the_model(model, stats, refuse, layer):
    words = (f"layer {layer} is outside the model", "has layers 0 to 3")
    refuse(lambda: fe.key_stats(model, layer, ["Rome"]), *words)
    refuse(lambda: fe.KeyStats.identity(model, layer), *words)
    moved = fe.KeyStats(layer, stats.moment, stats.n_tokens, stats.corpus, stats.provenance)
    refuse(lambda: rome(moved)(model, [FACT]), *words)


MOE = [("bridge", arch) for arch in tiny.MOE] + [("hooked", arch) for arch in tiny.MOE if arch in tiny.HOOKED]


@pytest.mark.parametrize("form", MOE, ids="-".join)
def test_a_mixture_of_experts(form, monkeypatch):
    model = tiny.model(*form, n_layers=2)
    site = fe.KeyStats(1, torch.eye(64, dtype=torch.float64), 0, "identity", None)
    calls = (
        lambda: fe.key_stats(model, 1, ["Rome"]),
        lambda: fe.KeyStats.identity(model, 1),
        lambda: rome(site)(model, [FACT]),
    )
    for call in calls:
        with laws.no_forward(monkeypatch, model), pytest.raises(UnsupportedModelError) as error:
            call()
        assert all(word in str(error.value) for word in ("blocks.1.mlp", "mixture-of-experts", "choose a dense"))


def broken(kind: str, how: str):
    """A model whose second W_out is quantised to int8, or offloaded to the meta device."""
    model = tiny.model(kind, "llama")
    old = down_proj(model, LAYER).param
    data = old.data.to(torch.int8) if how == "quantised" else old.data.to("meta")
    new = torch.nn.Parameter(data, requires_grad=False)
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is old:
                module._parameters[name] = new
    return model


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("quantised", ("int8", "floating-point", "load the model unquantised")),
        ("offloaded", ("meta device (offloaded)", "weights in memory", "load without offloading")),
    ],
)
def test_weights_that_cannot_be_written(kind, monkeypatch, how, words):
    model = broken(kind, how)
    plain = fe.KeyStats(LAYER, torch.eye(64, dtype=torch.float64), 0, "identity", None)
    for call in (lambda: fe.key_stats(model, LAYER, ["Rome"]), lambda: rome(plain)(model, [FACT])):
        with laws.no_forward(monkeypatch, model), pytest.raises(UnsupportedModelError) as error:
            call()
        assert all(word in str(error.value) for word in (f"blocks.{LAYER}.mlp", *words))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: fe.causal_trace(model, FACT, progress=False),
        lambda model: fe.evaluate(model, [FACT]),
        lambda model: fe.LogitLens()(model, [FACT]),
        lambda model: fe.probes.read_states(model, [FACT]),
    ],
)
def test_weights_that_are_not_in_memory(kind, call):
    model = broken(kind, "offloaded")
    words = r"1 of the parameters of .* are on the meta device \(offloaded\).*load without offloading"
    ran: list[object] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedModelError, match=words):
        call(model)
    assert ran == []


# -- key statistics of another model, layer or weights


def test_statistics_of_another_model(model, stats, refuse, kind):
    other = tiny.model(kind, "llama", seed=5)
    words = ("key statistics are of", "the model has weights", "collect them on these")
    refuse(lambda: rome(stats)(other, [FACT]), *words, on=other)


def test_statistics_of_another_size(stats, refuse, kind):
    other = tiny.model(kind, "llama", d_mlp=48)
    refuse(lambda: rome(stats)(other, [FACT]), "(64, 64)", "d_mlp = 48", "collect them on this one", on=other)


def test_statistics_under_another_layer(stats):
    with pytest.raises(ValueError, match=r"statistics of layer 1 under 2: give Rome\(stats\[layer\]\)"):
        rome({2: stats})


@pytest.mark.parametrize("layer", [LAYER, 3], ids=["the edited layer", "another layer"])
def test_statistics_of_other_weights(model, stats, refuse, layer):
    trained = copy.deepcopy(model)
    with torch.no_grad():
        down_proj(trained, layer).param[0, 0] += 1e-3
    refuse(lambda: rome(stats)(trained, [FACT]), "key statistics are of", "collect them on these", on=trained)


# -- statistics file cut short, or changed


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-9], ("is cut short", "make it again")),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], ("was changed", "checksum", "make it again")),
        (lambda data: b"", ("is cut short", "make it again")),
    ],
    ids=["cut short", "changed", "empty"],
)
def test_a_damaged_file_of_statistics(model, stats, refuse, tmp_path, damage, words):
    file = tmp_path / "layer_1.safetensors"
    texts = laws.texts(5)
    fe.key_stats(model, LAYER, texts, path=tmp_path, progress=False)
    data = damage(file.read_bytes())
    file.write_bytes(data)
    refuse(lambda: fe.KeyStats.load(file), str(file), *words)
    refuse(lambda: fe.key_stats(model, LAYER, texts, path=tmp_path), str(file), *words)
    refuse(lambda: fe.key_stats(model, [LAYER, 2], texts, path=tmp_path), str(file), *words)
    assert file.read_bytes() == data


# -- singular or ill-conditioned second moment


def test_too_few_tokens(model, refuse):
    few = fe.key_stats(model, LAYER, laws.texts(50), n_tokens=200, progress=False)
    words = ("layer 1 is over 200 tokens", "wanted 10 tokens for each of 64 dimensions = 640", "collect more text")
    refuse(lambda: rome(few)(model, [FACT]), *words)
    assert rome(few, ridge=1e-2)(model, [FACT]).diagnostics[0].exactness < 1e-5
    with pytest.warns(fe.EditWarning, match=r"too few tokens for ridge=1e-09, .* wanted 10 tokens .* pass ridge=1e-2"):
        rome(few, ridge=1e-9)(model, [FACT])


def test_a_singular_moment_of_many_tokens(model, refuse):
    same = fe.key_stats(model, LAYER, ["The Eiffel Tower is in Paris"] * 100, n_tokens=700, progress=False)
    words = ("layer 1 is over 700 tokens", "wanted 10 tokens for each of 64", "collect more text, or pass ridge=1e-2")
    refuse(lambda: rome(same)(model, [FACT]), *words)
    assert rome(same, ridge=1e-2)(model, [FACT]).diagnostics[0].exactness < 1e-5


# -- NaN or inf anywhere in an optimisation


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_an_optimisation_that_is_not_finite(model, stats, monkeypatch, bad, step):
    logits, calls = Runner.logits, []

    def spoil(self, *args, start=None, **options):
        out = logits(self, *args, start=start, **options)
        calls.extend([1] if start is not None else [])
        return out * bad if len(calls) == step + 1 else out

    with laws.untouched(model):
        monkeypatch.setattr(Runner, "why_not_packed", lambda *_: "")  # which runs the model too, to see whether it can
        monkeypatch.setattr(Runner, "logits", spoil)
        with pytest.raises(RuntimeError, match=f"at step {step}.*lower ValueFit.lr or clamp, or load .* float32"):
            rome(stats)(model, [FACT])
        monkeypatch.undo()


# -- edit applied twice; undone on a model it isn't on; weights changed since


def test_an_edit_applied_twice_or_undone_where_it_is_not(model, stats, refuse):
    edit = rome(stats)(model, [FACT])
    refuse(lambda: edit.undo_(model), "isn't applied to", "apply_ it first")
    with edit.applied(model):
        refuse(lambda: edit.apply_(model), "is applied to", "already", "undo_ it first")
        refuse(lambda: fe.evaluation.gains(model, edit, FACT.text), "already", "undo_ it first")
        refuse(lambda: fe.audit(model, edit, [FACT]), "already", "undo_ it first")


def test_weights_changed_since(model, stats, refuse):
    edit, trained = rome(stats)(model, [FACT]), copy.deepcopy(model)
    edit.apply_(trained)
    with torch.no_grad():
        down_proj(trained, LAYER).param[0, 0] += 1e-3
    refuse(lambda: edit.undo_(trained), "W_out of layer 1 was changed since", "nothing was written", on=trained)
    other = copy.deepcopy(model)
    with torch.no_grad():
        down_proj(other, 3).param[0, 0] += 1e-3
    refuse(lambda: edit.apply_(other), "was made for weights", "apply it to the model it was made on", on=other)


# -- an exception or Ctrl-C at any point of any call (each module's own tests inject it at every stage)


@pytest.mark.parametrize(
    "call", ["causal_trace", "key_stats", "Rome", "gains", "dose_curve", "audit", "evaluate", "sample"]
)
def test_an_interrupt_inside_a_forward(model, stats, call):
    edit = rome(stats)(model, [FACT])
    calls = {
        "causal_trace": lambda: fe.causal_trace(model, FACT, progress=False),
        "key_stats": lambda: fe.key_stats(model, 2, ["Rome"], progress=False),
        "Rome": lambda: rome(stats)(model, [FACT]),
        "gains": lambda: fe.evaluation.gains(model, edit, FACT.text),
        "dose_curve": lambda: fe.evaluation.dose_curve(model, edit, [FACT]),
        "audit": lambda: fe.audit(model, edit, [FACT]),
        "evaluate": lambda: fe.evaluate(model, [FACT]),
        "sample": lambda: fe.stats.sample_texts(model, 10, progress=False),
    }
    laws.logits(model)

    def fail(*_):
        raise KeyboardInterrupt("injected")

    handle = model.blocks[LAYER].register_forward_pre_hook(fail)
    before = laws.state(model)
    try:
        with pytest.raises(KeyboardInterrupt, match="injected"):
            calls[call]()
        laws.assert_same(before, laws.state(model))
    finally:
        handle.remove()


# -- model in training mode, or with gradients enabled


def test_training_mode_and_gradients_are_left_as_they_are(kind):
    model = tiny.model(kind, "gpt2")
    stats = laws.stats(model, LAYER)
    expected = rome(stats)(model, [FACT])
    margin = fe.evaluation.dose_curve(model, expected, [FACT]).override_margin
    model.train()
    for i, param in enumerate(model.parameters()):
        param.requires_grad_(i % 2 == 0)
    with laws.untouched(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fe.EditWarning)  # an edit of a random model is large
        warnings.filterwarnings("ignore", "the model doesn't know")  # nor does it know anything
        edit = rome(stats)(model, [FACT])
        assert torch.equal(fe.evaluation.dose_curve(model, edit, [FACT]).override_margin, margin)
        fe.audit(model, edit, [FACT])
        fe.causal_trace(model, FACT, progress=False)
    laws.same_edits(edit, expected)


# -- what an editor is made of


def test_contexts_are_prefixes_and_a_fit_has_sizes(stats):
    for make, words in (
        (lambda: fe.Rome(stats, contexts="Hello . "), "needed a list"),
        (lambda: fe.Rome(stats, contexts=["Hello . {}"]), "is no prefix"),
        (lambda: fe.Rome(stats, contexts=["Hello . ", ""]), "counts once"),
        (lambda: fe.ValueFit(lr=-1.0), "lr is -1"),
        (lambda: fe.ValueFit(clamp=0.0), "clamp is 0"),
        (lambda: fe.ValueFit(decay=-1.0), "decay is -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            make()


def test_what_is_too_long_for_the_model_is_named(model, stats, refuse):
    long = "The " * 300
    for contexts in (["Hello . ", long], ["", "Hello . ", long]):
        editor = rome(stats, contexts=contexts)
        refuse(lambda editor=editor: editor(model, [FACT]), "context 2 of 3", "'The The", "cfg.n_ctx", "shorten it")
    many = fe.FineTune(LAYER, contexts=[long])
    refuse(lambda: many(model, [FACT]), "context 1 of 2", "'The Eiffel Tower'", "cfg.n_ctx")
    asked = FACT.but(paraphrases=(long + "{} is",))
    refuse(lambda: fe.evaluate(model, [asked]), "'The The", "cfg.n_ctx", "shorten the prompt")


OF_ANOTHER_KIND = """
import laws, numpy as np, tiny, tl_factedit as fe
model = tiny.bridge("gpt2")
stats = laws.stats(model, 1)
quick = {"fit": laws.QUICK, "contexts": (), "progress": False}
edit = fe.Rome(stats, **quick)(model, laws.FACT)
new = laws.FACT.but(target_true=None)
whole = fe.Population.of(model, edit, laws.FACT, progress=False)
for call in (
    lambda: fe.Rome(None),
    lambda: fe.Memit([stats]),
    lambda: fe.Emmet(stats, weight="a"),
    lambda: fe.Memit(stats, weight="a"),
    lambda: fe.Pmet(stats, unmet=None, weight=True),
    lambda: fe.AlphaEdit(stats, weight=None),
    lambda: fe.Memit(stats, ridge="0"),
    lambda: fe.Rome(stats, contexts=None),
    lambda: fe.Rome(stats, objective="inject"),
    lambda: fe.Rome(stats, **quick)(model, ["Paris"]),
    lambda: fe.AlphaEdit({1: stats}, earlier=fe.Rome(stats, **quick)(model, [laws.FACT])),
    lambda: fe.causal_trace(model, "The Eiffel Tower is in"),
    lambda: fe.evaluate(model, {"subject": "Rome"}),
    lambda: fe.audit(model, edit, "Rome"),
    lambda: fe.LogitLens()(model, [3]),
    lambda: fe.alignable(model, None),
    lambda: fe.evaluate(model, laws.FACT, batch_tokens=0),
    lambda: fe.evaluate(model, laws.FACT, batch_tokens="2"),
    lambda: fe.evaluation.dose_curve(model, edit, laws.FACT, doses=[]),
    lambda: fe.evaluation.dose_curve(model, edit, laws.FACT, doses=[float("nan")]),
    lambda: fe.evaluation.dose_curve(model, edit, []),
    lambda: fe.causal_trace(model, new),
    lambda: fe.evaluate(model, new),
    lambda: fe.audit(model, edit, new),
    lambda: fe.Rome(stats, objective=fe.Erase(), **quick)(model, new),
    lambda: fe.attacks.ReadOut()(fe.Population.of(model, edit, [new])),
    lambda: fe.audit(model, edit, laws.FACT, objective="erase"),
    lambda: fe.audit(model, edit, laws.FACT, objective=fe.Erase),
    lambda: fe.audit(model, edit, laws.FACT, reference="x"),
    lambda: fe.audit(model, edit, laws.FACT, reference=["x"]),
    lambda: fe.audit(model, edit, laws.FACT, routes=["x"]),
    lambda: fe.audit(model, edit, laws.FACT, same_subject="x"),
    lambda: fe.audit(model, edit, laws.FACT, texts="hello there"),
    lambda: fe.audit(model, edit, laws.FACT, texts=[1]),
    lambda: fe.audit(model, edit, laws.FACT, texts=[None]),
    lambda: fe.audit(model, edit, laws.FACT, attacks=[fe.attacks.KnockOut]),
    lambda: fe.audit(model, edit, laws.FACT, calibration=(edit, [laws.FACT])),
    lambda: fe.audit(model, edit, laws.FACT, thresholds={}),
    lambda: fe.Population.of(model, edit, laws.FACT, reference="x"),
    lambda: fe.attacks.redundancy(model, [laws.FACT], "x"),
    lambda: fe.evaluation.specificity(whole, "x"),
    lambda: fe.attacks.follow_routes(whole, ["x"]),
    lambda: fe.attacks.FollowRoutes(["x"])(whole),
    lambda: fe.evaluation.drift(whole, [None]),
    lambda: fe.evaluation.gains(model, edit, None),
    lambda: fe.Rome(stats, fit={"steps": 3}),
    lambda: fe.causal_trace(model, laws.FACT, corruption="noise"),
    lambda: fe.causal_trace(model, laws.FACT, corruption=fe.GaussianNoise),
    lambda: fe.causal_trace(model, laws.FACT, window=1.5),
    lambda: fe.key_stats(model, 1, ["Rome"], batch_tokens=0),
    lambda: fe.key_stats(model, 1, ["Rome"], batch_tokens=-1),
    lambda: fe.key_stats(model, 1, ["Rome"], batch_tokens=float("nan")),
    lambda: fe.key_stats(model, 1, ["Rome"], batch_tokens=1.5),
    lambda: fe.key_stats(model, 1, ["Rome"], batch_tokens="4"),
    lambda: fe.key_stats(model, 1, ["Rome"], batch_tokens=None),
    lambda: fe.key_stats(model, 1, ["Rome"], n_tokens="10"),
    lambda: fe.key_stats(model, 1, ["Rome"], n_tokens=float("nan")),
    lambda: fe.key_stats(model, 1, None),
    lambda: fe.ValueFit(steps=1.5),
    lambda: fe.ValueFit(steps="3"),
    lambda: edit.scaled("2"),
    lambda: edit.scaled(float("nan")),
    lambda: fe.FineTune(True),
    lambda: fe.known(model, laws.FACT, prepend_bos="False"),
    lambda: fe.evaluate(model, laws.FACT, prepend_bos=0),
    lambda: fe.alignable(model, laws.FACT, prepend_bos=1.0),
    lambda: fe.causal_trace(model, laws.FACT, prepend_bos="False", progress=False),
    lambda: fe.key_stats(model, 1, ["Rome"], prepend_bos="False"),
    lambda: fe.Rome(fe.KeyStats.identity(model, 1), prepend_bos="False", **quick)(model, laws.FACT),
):
    try:
        call()
    except ValueError as error:
        print("refused:", error)
injected = fe.Rome(stats, **quick)(model, new)
with injected.applied(model):
    pass
assert injected.facts == (new,) and "None" in repr(injected)
assert fe.Rome(stats, **quick)(model, (fact for fact in [laws.FACT])).facts == (laws.FACT,)
assert fe.FineTune(np.int64(1)).layers == fe.FineTune([np.int32(1)]).layers == (1,)
assert list(fe.key_stats(model, np.int64(1), laws.texts(3), n_tokens=20, progress=False)) == [1]
"""


@pytest.mark.parametrize("of", tiny.KINDS)
def test_what_is_of_another_kind_is_told_so(of):
    """As a user runs it: in the tests themselves the types of all calls are checked."""
    found = subprocess.run(
        [sys.executable, "-c", OF_ANOTHER_KIND.replace("tiny.bridge(", f"tiny.{of}(")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")},
    )
    said = [line for line in found.stdout.splitlines() if line.startswith("refused:")]
    wanted = (
        "stats is a NoneType",
        "stats is a list",
        "weight is 'a', needed a number",
        "weight is 'a', needed a number",
        "weight is True, needed a number",
        "weight is None, needed a number",
        "ridge is '0', needed a number",
        "write ()",
        "such as Inject()",
        "facts[0] is 'Paris', a str: needed a Fact",
        "write [edit]",
        "facts is 'The Eiffel Tower is in', a str: needed Facts",
        "a dict: needed Facts",
        "a str: needed Facts",
        "facts[0] is 3, a int: needed a Fact",
        "a NoneType: needed Facts",
        "batch_tokens is 0, needed a whole number",
        "batch_tokens is '2', needed a whole number",
        "doses is empty, needed some finite numbers",
        "doses[0] is nan, needed some finite numbers",
        "facts is empty, needed at least one",
        "no target_true, and a trace needs the old object",
        "no target_true, and evaluate needs the old object",
        "no target_true, and an audit needs the old object",
        "no target_true, and Erase needs the old object",
        "no target_true, and",
        "such as Inject()",
        "write Erase()",
        "reference is 'x', a str: needed Facts",
        "reference[0] is 'x', a str: needed a Fact",
        "routes[0] is 'x', a str: needed a fe.Route(",
        "same_subject is 'x', a str: needed Facts",
        "texts is 'hello there', a str: needed a list, each a text",
        "texts[0] is 1, a int: needed a text",
        "texts[0] is None, a NoneType: needed a text",
        "attacks holds the class KnockOut",
        "a tuple: needed fe.Calibration(changed, facts)",
        "thresholds is {}, a dict: needed fe.Thresholds(",
        "reference is 'x'",
        "reference is 'x'",
        "same_subject is 'x'",
        "routes[0] is 'x'",
        "routes[0] is 'x'",
        "texts[0] is None",
        "text is None, a NoneType: needed one text",
        "fit is {'steps': 3}, a dict: needed fe.ValueFit(",
        "corruption is 'noise', a str: needed one such as fe.GaussianNoise()",
        "corruption is the class GaussianNoise",
        "window is 1.5, needed at least 1 (a whole number)",
        "batch_tokens is 0, needed at least 1",
        "batch_tokens is -1, needed at least 1",
        "batch_tokens is nan, needed at least 1",
        "batch_tokens is 1.5, needed at least 1",
        "batch_tokens is '4', needed at least 1",
        "batch_tokens is None, needed at least 1",
        "n_tokens is '10', needed at least 1",
        "n_tokens is nan, needed at least 1",
        "texts is None, needed an iterable of strings",
        "steps is 1.5, needed at least 1",
        "steps is '3', needed at least 1",
        "alpha is '2', needed a finite number",
        "alpha is nan, needed a finite number",
        "layer is True, needed a whole number",
        "prepend_bos is 'False', needed True, False or None",
        "prepend_bos is 0, needed True, False or None",
        "prepend_bos is 1.0, needed True, False or None",
        "prepend_bos is 'False', needed True, False or None",
        "prepend_bos is 'False', needed True, False or None",
        "prepend_bos is 'False', needed True, False or None",
    )
    assert len(said) == len(wanted)
    assert all(words in line for words, line in zip(wanted, said, strict=True)), said


def test_earlier_edits_and_statistics_are_of_this_model_and_of_enough(model, stats, refuse):
    edit = rome(stats, contexts=(), progress=False)(model, [FACT])
    editor = {"fit": laws.QUICK, "contexts": (), "progress": False}
    foreign = dataclasses.replace(
        edit, provenance=dataclasses.replace(edit.provenance, weights=Fingerprint(("0",), "0", "bridge"))
    )
    refuse(lambda: fe.AlphaEdit({LAYER: stats}, earlier=[foreign], **editor)(model, [FACT]), "an earlier edit is of")
    other_bos = dataclasses.replace(
        edit, provenance=dataclasses.replace(edit.provenance, prepend_bos=not edit.provenance.prepend_bos)
    )
    refuse(lambda: fe.AlphaEdit({LAYER: stats}, earlier=[other_bos], **editor)(model, [FACT]), "prepend_bos")
    few = fe.KeyStats(LAYER, stats.moment, 3, "by hand", None)
    refuse(
        lambda: fe.AlphaEdit({LAYER: few}, **editor)(model, [FACT]),
        "never seen would count as free",
        "collect more text",
    )
    refuse(lambda: fe.AlphaEdit({LAYER: plain(model)}), "the identity", "key_stats")


@pytest.mark.parametrize("subject", ["The <eos> Tower", "The Zugspitze"])
@pytest.mark.parametrize(
    "call", ["known", "evaluate", "token_accuracy", "causal_trace", "Rome", "KnowledgeNeurons", "LogitLens", "audit"]
)
def test_a_subject_that_is_no_text_to_the_tokenizer_is_refused_everywhere(model, call, subject):
    fact = fe.Fact(subject, "{} is located in the city of", " Paris", " Rome")
    words = "holds '<eos>', which the tokenizer reads as a control token|doesn't know and reads as '<unk>'"
    with laws.untouched(model), pytest.raises(ValueError, match=words):
        ASKING[call](model, [laws.OTHER, fact])
    bad = fe.alignable(model, [laws.OTHER, fact])[1]
    assert [each for each, _ in bad] == [fact]


def test_bos_comes_once_however_it_is_brought(model, stats, refuse):
    chat = FACT.but(prompt="<bos>" + FACT.prompt)
    for contexts, fact in ((("<bos>John lives. ",), chat), (("John lives. <bos>",), FACT), (("<bos>A <bos>",), FACT)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a prompt begins with the BOS token")
            refuse(
                lambda contexts=contexts, fact=fact: rome(stats, contexts=contexts)(model, [fact]),
                "holds the BOS token '<bos>'",
                "take it off the context",
            )


OF_ANOTHER_NUMBER = """
import collections.abc, dataclasses, math, typing, laws, tiny, tl_factedit as fe
from tl_factedit.core.typed import hints_of
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.attacks.context import QuestionPrefix, RepeatPrefix
from tl_factedit.probes.lens_training import LensTraining
model = tiny.bridge("gpt2")
calls = []
for kind, given in (
    (fe.ValueFit, {}), (fe.FineTune, {"layers": 1}), (fe.KnowledgeNeurons, {}), (fe.Router, {"layer": 1}),
    (fe.GaussianNoise, {}), (fe.locate.UniformNoise, {}), (fe.locate.MultivariateNoise, {}),
    (TokenReplacement, {}), (fe.stats.SampledContexts, {}), (LensTraining, {}),
    (fe.probes.LinearClassifier, {}),
    (fe.probes.Patchscope, {}),
    *((getattr(fe.attacks, name), {}) for name in (
        "ContextAttack", "DisjointRelearning", "KnockOut", "Paraphrases", "ReadOut", "Relearn", "Rounding",
        "WeightReversal")),
    (fe.attacks.Drift, {"texts": ["Rome"]}), (fe.attacks.NeutralContexts, {"prefixes": ["Rome"]}),
    (fe.attacks.FollowRoutes, {"routes": ()}), (RepeatPrefix, {}), (QuestionPrefix, {}),
):
    kind(**given)
    for name, hint in hints_of(kind).items():
        several = typing.get_origin(hint) is collections.abc.Sequence
        kinds = (hint,) if several else typing.get_args(hint) or (hint,)
        for bad in ("x", math.nan, None, [1], True):
            if (bad is None and type(None) in kinds) or (bad is True and bool in kinds):
                continue
            if typing.get_origin(hint) is tuple and bad == [1]:
                continue
            if set(kinds) & {int, float, bool} and not set(map(typing.get_origin, kinds)) - {None}:
                calls.append((f"{kind.__name__}.{name}={bad!r}", name, lambda k=kind, g={**given, name: bad}: k(**g)))
        several = [each for each in kinds if typing.get_origin(each) is collections.abc.Sequence]
        one = typing.get_args(several[0])[0] if several else None
        if "attacks" in kind.__module__ and (one in (int, float, str) or typing.get_origin(one) is typing.Literal):
            fine = [*[3][: float in kinds], *[None][: type(None) in kinds], *[["x"]][: one is str]]
            for bad in (each for each in ("x", [None], [math.nan], ["x"], 3, None) if each not in fine):
                what = f"{kind.__name__}.{name}={bad!r}"
                calls.append((what, name, lambda k=kind, g={**given, name: bad}: k(**g)))
        elif str in kinds:
            calls.append((f"{kind.__name__}.{name}", name, lambda k=kind, g={**given, name: 3}: k(**g)))
route = {"fact": laws.FACT, "prompt": "It is in", "old_answer": " a", "new_answer": " b"}
fe.Route(**route, controls=[" c"], kind="x")
for name in (*route, "kind", "controls"):
    for bad in (3, math.nan, ["x", 3], *(() if name == "new_answer" else (None,))):
        calls.append((f"Route {bad!r}", name, lambda g={**route, name: bad}: fe.Route(**g)))
edit = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=(), progress=False)(model, laws.FACT)
whole = fe.Population.of(model, edit, laws.FACT, progress=False)
for bad in (fe.Fact, 3, "x", [fe.Fact("a", "{} b", " c")]):
    calls.append((f"{bad!r}", "kinds", lambda b=bad: whole.unedited("x", lambda runner, i: 1, settings=(), kinds=b)))
for bad in ("x", math.nan, None, -1, 1.5):
    calls += [
        (f"{bad!r}", "batch_tokens", lambda b=bad: fe.evaluation.dose_curve(model, edit, laws.FACT, batch_tokens=b)),
        (f"{bad!r}", "n_tokens", lambda b=bad: fe.stats.sample_texts(model, b)),
        (f"{bad!r}", "length", lambda b=bad: fe.stats.sample_texts(model, 10, length=b)),
        (f"{bad!r}", "save_every", lambda b=bad: fe.key_stats(model, 1, ["Rome"], save_every=b)),
        (f"{bad!r}", "lost", lambda b=bad: fe.locate.calibrate_noise(model, laws.FACT, b)),
        (f"{bad!r}", "tolerance", lambda b=bad: fe.locate.calibrate_noise(model, laws.FACT, tolerance=b))
    ][: 5 if bad == 1.5 else 6]
    if bad is not None:
        calls.append((f"{bad!r}", "n", lambda b=bad: fe.models.organism_facts(n=b)))
for bad in ("x", math.nan, None, 1.5):
    calls.append((f"{bad!r}", "layer", lambda b=bad: fe.KeyStats.identity(model, b)))
calls += [
    ("3", "system", lambda: fe.chat_prompt(model, "Where is {}?", system=3)),
    ("a file", "folder", lambda: fe.causal_trace(model, laws.FACT, folder=__import__("sys").executable)),
    ("a file", "folder", lambda: fe.Population.of(model, edit, laws.FACT, folder=__import__("sys").executable)),
    ("a file", "folder", lambda: fe.save_hf(model, __import__("sys").executable)),
    ("3", "folder", lambda: fe.causal_trace(model, laws.FACT, folder=3)),
    ("pairs", "lengths", lambda: fe.stats.SampledContexts(lengths=(("a", 1),))),
    ("words", "starts", lambda: fe.stats.SampledContexts(starts=(1,))),
    ("templates", "kl_prompts", lambda: fe.ValueFit(kl_prompts=(1,))),
]
print(len(calls))
for what, name, call in calls:
    try:
        call()
    except ValueError as error:
        if name not in str(error):
            print("doesn't name", name, what, error)
    except Exception as error:
        print(what, name, repr(error))
    else:
        print(what, name, "accepted")
"""


@pytest.mark.parametrize("of", tiny.KINDS)
def test_a_number_is_a_number_in_all_settings(of):
    found = subprocess.run(
        [sys.executable, "-c", OF_ANOTHER_NUMBER.replace("tiny.bridge(", f"tiny.{of}(")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")},
    )
    count, *wrong = found.stdout.splitlines()
    assert int(count) > 150
    assert not wrong


OF_ANOTHER_CLASS = """
import laws, tiny, tl_factedit as fe
model = tiny.bridge("gpt2")
fact = laws.FACT
hf, tok = tiny.hf_model("gpt2"), tiny.tokenizer()
rome = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=(), progress=False)
edit = rome(model, fact)
bare = tiny.bridge("gpt2")
bare.tokenizer = None
for call in (
    lambda: edit.apply_(None),
    lambda: edit.undo_("x"),
    lambda: edit.check(3),
    lambda: fe.undo_all_(3),
    lambda: fe.locate.embedding_std("x", ["Paris"]),
    lambda: fe.stats.sample_texts("x", 10),
    lambda: fe.evaluation.dose_curve("x", edit, fact),
    lambda: fe.audit(edit, model, fact),
    lambda: fe.evaluation.dose_curve(model, "x", fact),
    lambda: fe.evaluation.gains(model, "x", fact.text),
    lambda: fe.evaluation.erasure_success(model),
    lambda: fe.evaluation.drift(model, ["x"]),
    lambda: fe.attacks.ReadOut()(edit),
    lambda: fe.compose([None]),
    lambda: fe.compose("x"),
    lambda: fe.Rome({1: 1}),
    lambda: fe.Memit({1: 1}),
    lambda: fe.show.attack(fact),
    lambda: fe.models.from_hf(None, None),
    lambda: fe.models.from_hf(hf, None),
    lambda: fe.evaluation.gains(bare, edit, fact.text),
    lambda: fe.show.edit(bare, edit, fact.text),
    lambda: fe.locate.embedding_std(bare, ["Paris"]),
    lambda: fe.stats.sample_texts(bare, 10),
    lambda: fe.chat_prompt(bare, "Where is {}?"),
):
    try:
        call()
    except (ValueError, TypeError) as error:
        print("refused:", error)
    except Exception as error:
        print("refused:", repr(error))
    else:
        print("refused: not at all")
"""


@pytest.mark.parametrize("of", tiny.KINDS)
def test_what_is_no_model_no_edit_no_population_and_no_tokenizer_is_told_so(of):
    found = subprocess.run(
        [sys.executable, "-c", OF_ANOTHER_CLASS.replace("tiny.bridge(", f"tiny.{of}(")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")},
    )
    said = [line for line in found.stdout.splitlines() if line.startswith("refused:")]
    neither = "neither a HookedTransformer nor a TransformerBridge"
    wanted = (
        ("model is None, a NoneType", neither),
        ("model is 'x', a str", neither),
        ("model is 3, a int", neither),
        ("model is 3, a int", neither),
        ("model is 'x', a str", neither),
        ("model is 'x', a str", neither),
        ("model is 'x', a str", neither),
        ("model is Edit(", neither),
        ("edit is 'x', a str: needed an Edit",),
        ("edit is 'x', a str: needed an Edit",),
        ("population is ", "needed a Population"),
        ("population is ", "needed a Population"),
        ("population is Edit(", "needed a Population"),
        ("edits[0] is None, a NoneType: needed an Edit",),
        ("edits is 'x', a str: needed a list, each an Edit",),
        ("stats[1] is 1, a int: needed KeyStats",),
        ("stats[1] is 1, a int: needed KeyStats",),
        ("can't be shown here, needed a Recovery",),
        ("hf_model is None, a NoneType: needed a causal model of transformers",),
        *[("has no tokenizer, needed its own fast one",)] * 6,
    )
    assert len(said) == len(wanted)
    assert all(words in line for parts, line in zip(wanted, said, strict=True) for words in parts), said
