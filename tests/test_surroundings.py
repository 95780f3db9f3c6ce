"""What surrounds a call doesn't change its numbers: modes, default types, flags, hooks, the tokenizer's padding.

One table of all public calls that take a model (`CALLS`), one of all surroundings (`SURROUNDINGS`): each call in each
surrounding gives what it gives without, bit for bit where the same passes are run. What a result only works out when it
is asked (its properties, its `table()`) is asked in the surrounding too.
"""

import copy
import dataclasses
import functools
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import attacking_facts
import laws
import numpy as np
import pandas as pd
import pytest
import routes
import tiny
import torch
from oracles import attacking
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

import tl_factedit as fe
from tl_factedit.backend.state import frozen, plain_torch

KIND = tiny.ONE_KIND[0]
LAYER = 1
PEOPLE = ("Anna", "Bob", "Mary", "John", "Alice", "Einstein", "Newton", "Curie")
FIT = fe.ValueFit(steps=3)

# ------------------------------------------------------------------------------------ what the calls are given


def world_of(model: Any) -> SimpleNamespace:
    """A model and everything made of it that calls are given; made outside of all surroundings."""
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    facts = attacking_facts.known_facts(model)
    facts = [facts[0], *(fact.but(neighbours=(), neighbour_targets=()) for fact in facts[1:])]
    stats = fe.key_stats(model, [LAYER - 1, LAYER], laws.texts(60), n_tokens=700, progress=False)
    options: dict[str, Any] = {"contexts": ("", "What is it ? "), "progress": False}
    rome = fe.Rome(stats[LAYER], ridge=1e-2, fit=FIT, **options)
    edits = rome.each(model, facts)
    old, *others = [facts[0].target_true, *facts[0].controls[:7]]
    people = [facts[0].but(subject=who, id=who, target_true=(old, others[0])[i % 2]) for i, who in enumerate(PEOPLE)]
    people = [one.but(neighbours=(), neighbour_targets=(), paraphrases=()) for one in people]
    pairs = [f"{one} {other}" for one in PEOPLE for other in PEOPLE if one != other]
    crowd = [people[0].but(subject=who, id=who, target_true=(old, *others)[i % 8]) for i, who in enumerate(pairs[:32])]
    learnt, unseen = (fe.probes.read_states(model, some) for some in (people[:6], people[6:]))
    probe = fe.probes.fit_linear_probe(learnt, objects=[old, others[0]], classifier=CLASSIFIER)
    eraser = fe.probes.random_subspace(learnt.at(layer=0, position="last"), 2)
    lens = fe.probes.train_tuned_lens(model, laws.texts(20), **LENS)
    scope = fe.probes.Patchscope("The city of {} is in", source_layers=[0, 1], target_layers=[0, 2])
    several = fe.Emmet(stats, ridge=1e-2, fit=FIT, **options)(model, people[:4])
    route = routes.known(model, facts[0].subject, "The native language of {} is")
    return SimpleNamespace(
        model=model,
        facts=facts,
        fact=facts[0],
        stats=stats,
        options=options,
        rome=rome,
        edits=edits,
        edit=edits[0],
        several=several,
        router=fe.editors.RoutedEdit.of(edits[0]),
        people=people,
        donors=[one.but(target_true=said(model, one), controls=()) for one in people],
        crowd=crowd,
        learnt=learnt,
        unseen=unseen,
        halves=torch.arange(6) % 2,
        probe=probe,
        eraser=eraser,
        lens=lens,
        scope=scope,
        route=dataclasses.replace(route, fact=facts[0]),
        trace=fe.causal_trace(model, facts[0], progress=False),
        scores=fe.evaluate(model, facts),
        hf=tiny.hf_model("gpt2", n_layers=3),
        retain=tiny.model(KIND, "gpt2", n_layers=3, seed=1),
    )


REPLACED = fe.TokenReplacement(known=False)
CLASSIFIER = fe.probes.LinearClassifier(folds=2, shrinkages=(0.1, 0.5), temperatures=(1.0, 2.0))
LENS: dict[str, Any] = {"n_tokens": 100, "steps": 3, "batch": 32, "progress": False}


def said(model: Any, fact: fe.Fact) -> str:
    """The word that the model finds likeliest, so that it knows the fact."""
    known = [f" {word}" for word in dict.fromkeys(tiny.WORDS.split()) if word.isalpha()]
    ids = [int(model.to_tokens(word, prepend_bos=False)[0, -1]) for word in known]
    return known[int(attacking.ends(model, fact.text)[ids].argmax())]


def population(w: SimpleNamespace, **options: Any) -> fe.Population:
    return fe.Population.of(w.model, w.edits, w.facts, **{"reference": w.people, "progress": False, **options})


def one_edit(w: SimpleNamespace, **options: Any) -> fe.Population:
    return fe.Population.of(w.model, w.edit, [w.fact], **{"reference": w.people, "progress": False, **options})


def crowded(w: SimpleNamespace) -> fe.Population:
    return fe.Population.of(w.model, w.several, w.people[:4], progress=False)


def objects(fact: fe.Fact) -> list[str]:
    return [fact.target_true, fact.target_new, *fact.controls]


def layerwise(w: SimpleNamespace, editor: type, **options: Any) -> fe.Edit:
    return editor(w.stats, fit=FIT, **w.options, **options)(w.model, w.facts)


def applied(w: SimpleNamespace, change: Any) -> Tensor:
    """Logits with a change applied."""
    with change.applied(w.model):
        return laws.logits(w.model)


def written(w: SimpleNamespace) -> Any:
    """The weights with two edits on them, with one of them taken back, and with none."""
    found, before = [], [p.detach().clone() for p in w.model.parameters()]
    first, second = w.edits[:2]
    for step in (first.apply_, second.apply_, first.undo_, second.undo_):
        step(w.model)
        found.append((laws.logits(w.model), [edit.digest for edit in fe.edits_on(w.model)]))
    assert all(torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))
    return found


def undone(w: SimpleNamespace, undo: Callable[[Any], None]) -> Any:
    """What a model says once all its edits are taken back, or are forgotten (and then put back by hand)."""
    weight = [p for p in w.model.parameters()]
    before = [p.detach().clone() for p in weight]
    w.edit.apply_(w.model)
    undo(w.model)
    found = laws.logits(w.model), fe.edits_on(w.model)
    with torch.no_grad():
        for param, was in zip(weight, before, strict=True):
            param.copy_(was)
    return found


def loaded(w: SimpleNamespace) -> Tensor:
    with plain_torch():  # weights that a user makes in inference mode are refused; see tests/backend/test_model.py
        hf, tokenizer = copy.deepcopy(w.hf), tiny.tokenizer()
    return laws.logits(fe.models.from_hf(hf, tokenizer, kind=KIND))


def exported(w: SimpleNamespace) -> Any:
    hf = copy.deepcopy(w.hf)
    fe.export_hf_(w.edit, hf)
    return [p.detach().clone() for p in hf.parameters()]


def copied(w: SimpleNamespace) -> Any:
    return [p.detach().clone() for p in fe.export_hf(w.edit, w.hf).parameters()]


def from_npz(w: SimpleNamespace) -> fe.KeyStats:
    return fe.KeyStats.from_npz(published(w), w.model, LAYER, prepend_bos=True)


def published(w: SimpleNamespace) -> Path:
    path = Path(w.folder) / "moment.npz"
    if not path.exists():
        np.savez(path, **{"mom2.count": 500, "mom2.mom2": (w.stats[LAYER].moment.numpy() * 500)})
    return path


def inputs(w: SimpleNamespace) -> fe.editing.EditInputs:
    return fe.editing.EditInputs.of(w.model, w.facts, [LAYER])


def made(w: SimpleNamespace) -> fe.Edit:
    update = fe.editing.LayerUpdate(w.edit.deltas[0], w.edit.keys[LAYER], values=w.edit.values[LAYER])
    given = fe.editing.EditInputs.of(w.model, [w.fact], [LAYER])
    return fe.Edit.made(given, [update], editor={"name": "own"}, fits=[{}])


def targets(objective: Any) -> Callable[[SimpleNamespace], Any]:
    return lambda w: objective.targets(w.model, w.facts[:1], prepend_bos=True)


def attack(made: Any, of: Callable[..., fe.Population] = population) -> Callable[[SimpleNamespace], Any]:
    return lambda w: made(of(w))


def readings(w: SimpleNamespace) -> tuple[Any, Any]:
    return w.probe.read(w.unseen), w.probe.read(fe.probes.read_states_edited(w.model, w.edit, w.unseen.facts))


def audited(w: SimpleNamespace) -> fe.Verdict:
    return fe.audit(
        w.model, w.edit, [w.fact], reference=w.people, routes=[w.route], texts=laws.texts(2), progress=False
    )


def report(w: SimpleNamespace) -> str:
    return fe.show.report(Path(w.folder) / "report.html", w.trace, w.scores).read_text()


def a_case(w: SimpleNamespace) -> fe.evaluation.EditCase:
    query = fe.evaluation.Query(w.people[0].text, [str(w.people[0].target_true)])
    return fe.evaluation.EditCase([w.fact], [fe.evaluation.Question("near", [query], conditions=[query])])


def texts(w: SimpleNamespace, n: int = 20) -> list[str]:
    return laws.texts(n)


a, e, ed, ev, lo, p = fe.attacks, fe.editing, fe.editors, fe.evaluation, fe.locate, fe.probes
CALLS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "data.select": lambda w: fe.data.select(w.model, w.facts, known=False),
    "alignable": lambda w: fe.alignable(w.model, w.facts),
    "chat_prompt": lambda w: fe.chat_prompt(w.model, "Where is {} ?"),
    "known": lambda w: fe.known(w.model, w.facts),
    "answers": lambda w: fe.answers(w.model, w.facts, n_tokens=3, progress=False),
    "evaluation.elicit": lambda w: fe.evaluation.elicit(w.model, w.edit, [w.fact], samples=3, n_tokens=3),
    "evaluation.ripples": lambda w: fe.evaluation.ripples(w.model, w.edit, a_case(w), n_tokens=3, progress=False),
    "causal_trace": lambda w: fe.causal_trace(w.model, w.facts[:2], progress=False),
    "causal_trace, replaced": lambda w: fe.causal_trace(
        w.model, w.people[:2], component="mlp", window=2, corruption=REPLACED, progress=False
    ),
    "key_stats": lambda w: fe.key_stats(w.model, LAYER, texts(w), n_tokens=100, progress=False),
    "KeyStats.identity": lambda w: fe.KeyStats.identity(w.model, LAYER),
    "KeyStats.from_npz": from_npz,
    "KeyStats.check": lambda w: w.stats[LAYER].check(w.model, inputs(w).base),
    "Rome": lambda w: w.rome(w.model, [w.fact]),
    "Rome, original": lambda w: dataclasses.replace(w.rome, variant="original", target_ref="bare")(w.model, [w.fact]),
    "Rome.each": lambda w: w.rome.each(w.model, w.facts[:2]),
    "Memit": lambda w: layerwise(w, fe.Memit, weight=10.0),
    "Emmet": lambda w: layerwise(w, fe.Emmet, ridge=1e-2),
    "AlphaEdit": lambda w: layerwise(w, fe.AlphaEdit, share=0.5),
    "Pmet": lambda w: layerwise(w, fe.Pmet, weight=10.0),
    "FineTune": lambda w: fe.FineTune(LAYER, steps=2, progress=False)(w.model, w.facts),
    "FineTune.around": lambda w: fe.FineTune.around(w.model, LAYER, 3),
    "KnowledgeNeurons": lambda w: fe.KnowledgeNeurons(steps=3, layers=[LAYER], progress=False)(w.model, [w.fact]),
    "Router": lambda w: fe.Router(LAYER, fit=FIT, **w.options)(w.model, [w.fact]),
    "Inject.targets": targets(fe.Inject()),
    "Erase.targets": targets(fe.Erase()),
    "editing.Amplify.targets": targets(e.Amplify()),
    "editing.Force.targets": targets(e.Force()),
    "editing.Reverse.targets": targets(e.Reverse()),
    "Edit.made": made,
    "Edit.check": lambda w: w.edit.check(w.model),
    "Edit.apply_": written,
    "Edit.undo_": written,
    "Edit.applied": lambda w: applied(w, w.edit.scaled(0.5)),
    "edits_on": written,
    "undo_all_": lambda w: undone(w, fe.undo_all_),
    "editing.forget_edits_": lambda w: undone(w, e.forget_edits_),
    "compose": lambda w: applied(w, fe.compose(w.edits)),
    "export_hf": copied,
    "export_hf_": exported,
    "Population.of": lambda w: population(w).known,
    "compare": lambda w: fe.compare(fe.LogitLens(), w.model, w.edits, w.facts, progress=False),
    "LogitLens": lambda w: fe.LogitLens()(w.model, w.facts),
    "evaluate": lambda w: fe.evaluate(w.model, w.facts),
    "audit": audited,
    "attacks.KnockOut": attack(a.KnockOut(widths=(1,)), one_edit),
    "attacks.footprint": lambda w: a.footprint(w.model, w.edits, w.facts, progress=False),
    "attacks.redundancy": lambda w: a.redundancy(
        w.model, w.facts[:1], w.people, places=("subject",), most_cells=1, progress=False
    ),
    "attacks.ReadOut": attack(a.ReadOut()),
    "attacks.ContextAttack": attack(a.ContextAttack(prefixes=[a.RepeatPrefix(1)])),
    "attacks.FollowRoutes": lambda w: a.FollowRoutes([w.route])(one_edit(w)),
    "attacks.follow_routes": lambda w: a.follow_routes(one_edit(w), [w.route]),
    "attacks.WeightReversal": attack(a.WeightReversal(dropped=(1, 2))),
    "attacks.Rounding": attack(a.Rounding(bits=(4,))),
    "attacks.Relearn": attack(a.Relearn(layers=(LAYER,), lr=1e-2, steps=3, controls=2)),
    "attacks.DisjointRelearning": attack(a.DisjointRelearning(lr=1e-3, layers=(LAYER,), most=3), crowded),
    "attacks.Paraphrases": attack(a.Paraphrases()),
    "attacks.NeutralContexts": attack(a.NeutralContexts(("It rained all day. ", "As we know, "))),
    "attacks.neutral_prefixes": lambda w: a.neutral_prefixes(w.people[:3], most=4),
    "attacks.Drift": lambda w: a.Drift(laws.texts(3), steps=(1, 2), layers=(LAYER,))(crowded(w)),
    "attacks.relearning_rate": lambda w: a.relearning_rate(
        w.model, w.facts, layers=[LAYER], rates=(3e-2, 1e-2, 5e-3), steps=20, least=2.0
    ),
    "auditing.retention": lambda w: fe.auditing.retention(one_edit(w, reference=w.crowd)),
    "editing.EditInputs.of": lambda w: inputs(w).prompts,
    "editing.off_target_share": lambda w: e.off_target_share(w.model, w.edit),
    "editing.layerwise_edit": lambda w: e.layerwise_edit(
        fe.Memit(w.stats, weight=10.0, fit=FIT, **w.options), w.model, w.facts[:1], ridge=1e-2
    ),
    "editing.Provenance.of": lambda w: e.Provenance.of(w.model),
    "editing.fit_values": lambda w: e.fit_values(
        w.model, w.facts[:2], LAYER, ("",), fit=FIT, prepend_bos=True, progress=False
    ),
    "editors.RoutedEdit.applied": lambda w: applied(w, w.router),
    "editors.RoutedEdit.check": lambda w: w.router.check(w.model),
    "editors.RoutedEdit.hooks": lambda w: [name for name, _ in w.router.hooks(w.model)],
    "editors.RoutedEdit.reach": lambda w: w.router.reach(w.model, w.people),
    "evaluation.token_accuracy": lambda w: ev.token_accuracy(w.model, w.facts[1:]),
    "evaluation.attribute_positions": lambda w: ev.attribute_positions(population(w)),
    "evaluation.gain_coverage": lambda w: ev.gain_coverage(population(w), prefixes=("What is it ? ",)),
    "evaluation.dose_curve": lambda w: ev.dose_curve(w.model, w.edit, [w.fact], doses=(0.0, 0.5, 1.0)),
    "evaluation.gains": lambda w: ev.gains(w.model, w.edit, w.fact.text),
    "evaluation.erasure_success": lambda w: ev.erasure_success(population(w)),
    "evaluation.mediate": lambda w: ev.mediate(population(w)),
    "evaluation.specificity": lambda w: ev.specificity(one_edit(w), [w.fact.but(prompt="{} is near")]),
    "evaluation.drift": lambda w: ev.drift(population(w), texts(w, 3)),
    "locate.compare_corruptions": lambda w: lo.compare_corruptions(
        w.model, w.people[:2], corruptions=(fe.GaussianNoise(samples=2), REPLACED), progress=False
    ),
    "locate.calibrate_noise": lambda w: lo.calibrate_noise(w.model, w.facts[:1], 0.3, tolerance=0.3),
    "locate.embedding_std": lambda w: lo.embedding_std(w.model, ["Rome", "Big Ben"]),
    "locate.hase2023": lambda w: lo.hase2023(w.model, w.fact, unknown="trace", progress=False),
    "locate.meng2022": lambda w: lo.meng2022(w.model, w.fact, unknown="trace", progress=False),
    "locate.zhang2023": lambda w: lo.zhang2023(w.model, w.donors, progress=False),
    "locate.trace_units": lambda w: lo.trace_units(w.model, w.fact, layers=[LAYER], progress=False),
    "models.from_hf": loaded,
    "probes.read_states": lambda w: p.read_states(w.model, w.facts),
    "probes.read_states_edited": lambda w: p.read_states_edited(w.model, w.edits, w.facts),
    "probes.fit_linear_probe": lambda w: p.fit_linear_probe(w.learnt, classifier=CLASSIFIER),
    "probes.LinearProbe": lambda w: (*readings(w), w.probe.transfer(w.unseen)),
    "probes.residual_knowledge": lambda w: p.residual_knowledge(*readings(w), least=-1.0),
    "probes.excess_over_nulls": lambda w: p.excess_over_nulls(readings(w)[0], [readings(w)[1]]),
    "probes.control_task": lambda w: p.control_task(w.probe, w.learnt, w.unseen, classifier=CLASSIFIER),
    "probes.permutation_test": lambda w: p.permutation_test(readings(w)[1], n=20),
    "probes.name_ngrams": lambda w: p.name_ngrams(w.people, w.facts),
    "probes.one_hot_objects": lambda w: p.one_hot_objects(w.people[:2], [" Rome", " Paris"], [" Paris", " Rome"]),
    "probes.states_of_others": lambda w: p.states_of_others(w.learnt),
    "probes.leace": lambda w: p.leace(w.learnt.at(layer=0, position="last"), w.halves, 2),
    "probes.random_subspace": lambda w: p.random_subspace(w.learnt.at(layer=0, position="last"), 2),
    "probes.RandomWeights.applied": lambda w: applied(w, p.RandomWeights()),
    "probes.subject_embeddings": lambda w: p.subject_embeddings(w.model, w.facts),
    "probes.erase_states": lambda w: applied(w, p.erase_states(w.model, w.eraser, 0, w.facts[:1])),
    "probes.Erasure.applied": lambda w: applied(w, p.erase_states(w.model, w.eraser, 0, [w.fact], everywhere=True)),
    "probes.train_tuned_lens": lambda w: p.train_tuned_lens(w.model, texts(w), **LENS),
    "probes.TunedLens": lambda w: w.lens(w.model, w.facts),
    "probes.TunedLens.check": lambda w: w.lens.check(w.model),
    "probes.TunedLens.streams": lambda w: list(w.lens.streams(w.model, w.facts)),
    "probes.TunedLens.divergence": lambda w: w.lens.divergence(w.model, texts(w), n_tokens=50),
    "probes.TunedLens.refitted": lambda w: w.lens.refitted(w.model, texts(w), progress=False),
    "probes.fixed_and_refitted": lambda w: p.fixed_and_refitted(
        w.lens, w.model, w.edit, w.facts, texts(w), progress=False
    ),
    "probes.AttributeRate": lambda w: p.AttributeRate(
        p.attributes_by_object(w.facts[:1], {o: (o, " Italy") for o in objects(w.fact)}), k=10
    )(w.model, w.facts[:1]),
    "probes.Patchscope": lambda w: w.scope(w.model, w.facts[:2]),
    "probes.Patchscope.read": lambda w: w.scope.read(w.model, w.learnt),
    "probes.crossed_patchscope": lambda w: p.crossed_patchscope(w.scope, w.model, w.edit, [w.fact]),
    "probes.unlearning_depth": lambda w: p.unlearning_depth(population(w), w.retain),
    "show.edit": lambda w: fe.show.edit(w.model, w.edit, w.fact.text).html,
    "show.trace": lambda w: fe.show.trace(w.trace).html,
    "show.average": lambda w: fe.show.average(fe.causal_trace(w.model, w.facts[:2], progress=False)).html,
    "show.redundancy": lambda w: (
        fe.show.redundancy(
            a.redundancy(w.model, w.facts[:1], w.people, places=("subject",), most_cells=1, progress=False)
        ).html
    ),
    "show.scores": lambda w: fe.show.scores(w.scores).html,
    "show.report": report,
    "stats.stats_convergence": lambda w: fe.stats.stats_convergence(
        w.model, LAYER, texts(w, 40), w.facts[:1], n_tokens=150, steps=2, ridge=1e-2, progress=False
    ),
    "stats.SampledContexts.draw": lambda w: fe.stats.SampledContexts(lengths=((2, 3),)).draw(w.model),
    "stats.sample_texts": lambda w: fe.stats.sample_texts(w.model, 20, length=10, progress=False),
}


# ------------------------------------------------------------------------------------ comparing


def flat(value: Any, at: str = "", *, classes: tuple[type, ...] = ()) -> dict[str, Any]:
    """All that a result holds and can be asked for without arguments, by its path; models are left out."""
    if isinstance(value, FactoredMatrix):
        value = value.AB
    if isinstance(value, nn.Module) or (callable(value) and not dataclasses.is_dataclass(value)):
        return {}
    down = functools.partial(flat, classes=(*classes, type(value)))
    if isinstance(value, Tensor):
        return {at: value.detach().clone()}
    if isinstance(value, pd.DataFrame):
        return {f"{at}[{name}]": list(column) for name, column in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for field in dataclasses.fields(value):
            found |= down(getattr(value, field.name), f"{at}.{field.name}")
        if not isinstance(value, fe.Fact):
            for name, member in inspect.getmembers_static(type(value)):
                if type(value) in classes:
                    break  # as of Routes.by_kind: the same kind of result again
                if name.startswith("_") or name in vars(value):
                    continue
                if isinstance(member, (property, functools.cached_property)):
                    found |= down(asked(lambda name=name: getattr(value, name)), f"{at}.{name}")
                elif name in ASKED and inspect.isfunction(member):
                    found |= down(asked(getattr(value, name)), f"{at}.{name}()")
        return found
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in down(item, f"{at}[{key!r}]").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in down(item, f"{at}[{i}]").items()}
    return {at: value}


ASKED = ("table", "average", "fraction", "best_fraction", "by_role", "roles_table", "effects", "agreement", "reading")


def asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (ValueError, AttributeError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"


def differences(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> list[str]:
    """Where two results differ."""
    found = sorted(one.keys() ^ other.keys())
    return found + [at for at in one if at in other and not same(one[at], other[at], tolerance)]


def same(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True).all())
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other)) or math.isclose(
            one, other, rel_tol=tolerance, abs_tol=tolerance
        )  # fmt: skip
    return type(one) is type(other) and one == other


# ------------------------------------------------------------------------------------ what surrounds them


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def training(w: SimpleNamespace) -> Iterator[None]:
    """In training mode, with a dropout of a half (a HookedTransformer has none)."""
    roots = [w.model, getattr(w.model, "original_model", w.model)]
    modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
    were = [(m, m.training, getattr(m, "p", None)) for m in modules]
    w.model.train()
    for module in modules:
        module.train()
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    try:
        yield
    finally:
        for module, mode, p in were:
            module.training = mode
            if isinstance(module, nn.Dropout):
                module.p = p


@contextmanager
def padding_left(w: SimpleNamespace) -> Iterator[None]:
    before = w.model.tokenizer.padding_side
    w.model.tokenizer.padding_side = "left"
    try:
        yield
    finally:
        w.model.tokenizer.padding_side = before


@contextmanager
def hook_of_a_user(w: SimpleNamespace, fn: Callable[..., Any] = lambda value, hook: value) -> Iterator[None]:
    """A user's hooks on the stream and on a key, which give back what they get."""
    with w.model.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", fn), ("blocks.0.mlp.hook_post", fn)]):
        yield


@dataclasses.dataclass(frozen=True)
class Surrounding:
    """What surrounds a call, how far its result may be from that of the plain call, and what of it may be another.

    Attributes:
        enter: From what calls are given to a context.
        tolerance: Relative and absolute; 0 for bit for bit.
        apart: Endings of the paths that aren't compared.
    """

    enter: Callable[[SimpleNamespace], Any]
    tolerance: float = 0.0
    apart: tuple[str, ...] = ()


SURROUNDINGS: dict[str, Surrounding] = {
    "inference mode": Surrounding(lambda w: torch.inference_mode()),
    "gradients off": Surrounding(lambda w: torch.set_grad_enabled(False)),
    "autocast": Surrounding(lambda w: torch.autocast("cpu", torch.bfloat16)),
    "default float64": Surrounding(lambda w: default_dtype(torch.float64)),
    "default bfloat16": Surrounding(lambda w: default_dtype(torch.bfloat16)),
    "default float16": Surrounding(lambda w: default_dtype(torch.float16)),
    "another default device": Surrounding(lambda w: torch.device("meta")),  # whatever is made there has no numbers
    "training, with dropout": Surrounding(training),
    "left padding": Surrounding(padding_left),
    # Rows aren't packed around a user's hooks, so that batches have other shapes: roundings of 1e-7, some tens of times
    # larger after a few steps of Adam. Results say so (`unpacked`), and which hooks there were.
    "a user's hooks": Surrounding(hook_of_a_user, 1e-5, (".unpacked", ".digest", ".changes", ".hooks[", ".concerns[")),
}

# Each alone where calls are quick; where each call's types are checked (see conftest.py), several at a time.
SEVERAL = (
    ("inference mode", "autocast", "default float64"),
    ("training, with dropout", "another default device", "default float16"),
    ("a user's hooks", "gradients off", "left padding", "default bfloat16"),
)
TRIED: tuple[tuple[str, ...], ...] = tuple((name,) for name in SURROUNDINGS) if tiny.HAS_HOOKED else SEVERAL


@contextmanager
def surrounded(w: SimpleNamespace, names: tuple[str, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(SURROUNDINGS[name].enter(w))
        yield


def modes() -> tuple[Any, ...]:
    """What PyTorch is set to, and must be afterwards."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@functools.cache
def world(form: str) -> SimpleNamespace:
    """What the calls are given: of a model as it is, of one with processed weights, of one in bfloat16."""
    options: dict[str, Any] = {"n_layers": 3}
    if form == "half":
        options["dtype"] = torch.bfloat16
    if form == "processed" and KIND == "hooked":
        model = tiny.hooked("gpt2", processed=True, **options)
    else:
        model = tiny.model(KIND, "gpt2", **options)
    if form == "processed" and KIND == "bridge":
        model.enable_compatibility_mode()
    return world_of(model)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    for form in ("plain", "processed", "half"):
        world(form).folder = tmp_path_factory.mktemp(form)


@functools.cache
def plainly(call: str, form: str = "plain") -> dict[str, Any]:
    """What a call gives when nothing surrounds it."""
    return flat(quiet(call, world(form)))


def quiet(call: str, w: SimpleNamespace) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edits of so few steps have concerns
        return CALLS[call](w)


def without(result: dict[str, Any], apart: tuple[str, ...]) -> dict[str, Any]:
    return {at: value for at, value in result.items() if not any(part in at for part in apart)}


def test_every_surrounding_is_tried():
    assert {name for names in TRIED for name in names} == set(SURROUNDINGS) == {n for names in SEVERAL for n in names}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("names", TRIED, ids=" + ".join)
def test_a_call_gives_what_it_gives_in_plain_surroundings(names, call):
    w, around = world("plain"), [SURROUNDINGS[name] for name in names]
    want = plainly(call)
    with surrounded(w, names):
        before = modes()
        found = flat(quiet(call, w))
        assert modes() == before
    apart = tuple(part for one in around for part in one.apart)
    assert differences(without(want, apart), without(found, apart), max(one.tolerance for one in around)) == []


# ------------------------------------------------------------------------------------ other weights

# What processing the weights leaves as it is are log-probabilities, and the keys of LayerNorm models. All else that is
# measured in embeddings, residual streams or W_out is of the weights as they are there: noise has their spread, an edit
# their norms.
ANEW = {
    "noise of the embeddings' spread, which are centred": (
        "causal_trace", "causal_trace, replaced", "locate.compare_corruptions", "locate.calibrate_noise",
        "locate.hase2023", "locate.meng2022", "locate.zhang2023", "locate.trace_units", "locate.embedding_std",
        "editing.Force.targets", "show.trace", "show.average", "show.report",
    ),
    "how much of what a component says was changed": (
        "audit", "attacks.KnockOut", "attacks.footprint", "attacks.WeightReversal", "attacks.Rounding",
    ),
    "values fitted in a centred stream, within bounds that are shares of its norm": (
        "Rome", "Rome, original", "Rome.each", "Memit", "Emmet", "AlphaEdit", "Pmet", "FineTune", "KnowledgeNeurons",
        "Router", "Edit.made", "editing.fit_values", "editing.layerwise_edit",
    ),
    "what an edit that was made there does": (
        "Edit.apply_", "Edit.undo_", "Edit.applied", "edits_on", "undo_all_", "editing.forget_edits_", "compose",
        "compare", "evaluation.attribute_positions", "evaluation.mediate", "editors.RoutedEdit.applied",
        "probes.unlearning_depth", "show.edit", "show.scores",
    ),
    "states, and what is fitted to them": (
        "auditing.retention", "probes.read_states", "probes.read_states_edited", "probes.fit_linear_probe",
        "probes.LinearProbe", "probes.residual_knowledge", "probes.excess_over_nulls", "probes.control_task",
        "probes.permutation_test", "probes.states_of_others", "probes.leace", "probes.random_subspace",
        "probes.RandomWeights.applied", "probes.subject_embeddings", "probes.erase_states", "probes.Erasure.applied",
        "probes.train_tuned_lens", "probes.TunedLens", "probes.TunedLens.streams", "probes.TunedLens.divergence",
        "probes.TunedLens.refitted", "probes.fixed_and_refitted",
    ),
}  # fmt: skip


def the_door_works_here_too(call: str, form: str) -> None:
    """Also of these weights a call gives what it gives in plain surroundings."""
    if tiny.HAS_HOOKED:
        with surrounded(world(form), SEVERAL[0]):
            assert differences(plainly(call, form), flat(quiet(call, world(form)))) == []


OF_THE_WEIGHTS = (".provenance", ".weights", "digest", "moment']", ".corpus", ".model", ".trained_on")


@pytest.mark.parametrize("call", CALLS)
def test_processed_weights_give_the_same_but_for_what_is_measured_in_them(call):
    want, found = (without(plainly(call, form), OF_THE_WEIGHTS) for form in ("plain", "processed"))
    apart = differences(want, found, 1e-4)  # float32, other products
    assert bool(apart) == any(call in calls for calls in ANEW.values()), apart
    the_door_works_here_too(call, "processed")


# Of bfloat16 weights logits of size 4 are off by 0.01, and so are log-probabilities, shares of gains, and streams of
# size 1. Everything is reported in the types of the plain run; a leader among near ties may be another.
NEAR = {
    "evaluate": 0.03,
    "causal_trace": 0.03,
    "locate.trace_units": 0.03,
    "key_stats": 0.03,
    "stats.stats_convergence": 0.03,
    "evaluation.drift": 0.03,
    "evaluation.specificity": 0.03,
    "editors.RoutedEdit.reach": 0.03,
    "probes.subject_embeddings": 0.03,
    "probes.train_tuned_lens": 0.03,
}
RAW = ("Edit.apply_", "Edit.undo_", "edits_on", "undo_all_", "forget_edits_", ".applied", "compose", "erase_states")
"""These give this test's own logits, in the model's type."""
LEADERS = (".top", "success")


@pytest.mark.parametrize("call", CALLS)
def test_of_weights_in_bfloat16_everything_is_reported_as_of_others(call):
    w = world("half")
    if call.startswith("export_hf"):  # to a model in float32
        with pytest.raises(ValueError, match="W_out of layer 0 isn't the one the edit was made for"):
            quiet(call, w)
        return
    want, found = (without(plainly(call, form), (*OF_THE_WEIGHTS, *LEADERS)) for form in ("plain", "half"))
    if not call.endswith(RAW):
        types = [{at: v.dtype for at, v in of.items() if isinstance(v, Tensor)} for of in (want, found)]
        assert all(types[1].get(at, dtype) == dtype for at, dtype in types[0].items())
    if call in NEAR:
        assert differences(want, found, NEAR[call]) == []
    the_door_works_here_too(call, "half")


@pytest.mark.parametrize("form", ["processed", "half"])
def test_what_was_made_for_other_weights_is_refused(form):
    plain, other = world("plain"), world(form)
    refusals = {
        "was made for weights": [
            lambda: plain.edit.apply_(other.model),
            lambda: plain.edit.check(other.model),
            lambda: plain.router.check(other.model),
            lambda: quiet_applied(p.erase_states(plain.model, plain.eraser, 0, plain.facts), other.model),
        ],
        "key statistics are of .* but the model has weights": [lambda: plain.rome(other.model, [other.fact])],
    }
    for words, calls in refusals.items():
        for call in calls:
            with laws.untouched(other.model), pytest.raises(ValueError, match=words):
                call()
    if form == "processed" and KIND == "bridge":
        with pytest.raises(ValueError, match=r"the lens is of .* centred stream: False"):
            plain.lens(other.model, other.facts)


def quiet_applied(change: Any, model: Any) -> None:
    with change.applied(model):
        pass


# ------------------------------------------------------------------------------------ no call is forgotten

NOT_ASKED = {
    "auditing.AuditProvenance.of": "a part of every audit",
    "save_hf": "refused under hooks, and compares what it wrote with the model itself: tests/editing/test_save_hf.py",
    "attacks.Recovery.of": "where every attack ends",
    "attacks.Recovery.in_excess_of_common": "asks in an attack's own way, and is in several of them",
    "editing.describe": "reads the fields of an editor, and is in every edit",
}


def asks_a_model(fn: Any) -> bool:
    return bool({"model", "population", "hf_model", "editor"} & set(inspect.signature(inspect.unwrap(fn)).parameters))


def calls_of(name: str, thing: Any) -> list[str]:
    """The calls of one public name that take a model, or what holds one."""
    if not inspect.isclass(thing):
        return [name] if asks_a_model(thing) else []
    if getattr(thing, "_is_protocol", False) or issubclass(thing, Exception):
        return []
    found = [name] if "__call__" in vars(thing) and asks_a_model(thing.__call__) else []
    members = {member: getattr(thing, member) for member in vars(thing) if not member.startswith("_")}
    return found + [f"{name}.{member}" for member, fn in members.items() if callable(fn) and asks_a_model(fn)]


def public_calls() -> list[str]:
    spaces = [name for name in fe.__all__ if isinstance(getattr(fe, name), ModuleType)]
    listed = [(name, getattr(fe, name)) for name in fe.__all__ if name not in spaces]
    for space in (getattr(fe, name) for name in spaces):
        listed += [(f"{space.__name__.rpartition('.')[2]}.{name}", getattr(space, name)) for name in space.__all__]
    return [call for name, thing in listed if callable(thing) for call in calls_of(name, thing)]


def test_every_public_call_that_takes_a_model_is_in_the_table():
    tried = {call.partition(",")[0] for call in CALLS}
    assert [call for call in public_calls() if call not in tried and call not in NOT_ASKED] == []
    assert len(public_calls()) > 70
    assert [call for call in NOT_ASKED if call in tried or call not in public_calls()] == []


# ------------------------------------------------------------------------------------ the door itself


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("default float64", lambda w: inspect.unwrap(fe.evaluate)(w.model, w.facts)),
        ("default bfloat16", lambda w: inspect.unwrap(fe.evaluate)(w.model, w.facts)),
        ("another default device", lambda w: inspect.unwrap(fe.evaluate)(w.model, w.facts)),
        ("autocast", lambda w: w.model(w.model.to_tokens("Rome"))),
        ("inference mode", lambda w: torch.zeros(1).is_inference()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_the_door_the_surroundings_tell(name, bare):
    w = world("plain")
    want = flat(bare(w))

    def found() -> dict[str, Any]:
        with SURROUNDINGS[name].enter(w):
            return flat(bare(w))

    try:
        assert differences(want, found())
    except (RuntimeError, NotImplementedError) as failure:
        assert name == "another default device" and "meta" in str(failure)
    behind = plain_torch()(bare)
    with SURROUNDINGS[name].enter(w):
        assert differences(want, flat(behind(w))) == []


def test_training_mode_tells_without_the_door():
    w = world("plain")
    if KIND == "hooked":
        pytest.skip("a HookedTransformer has no dropout")
    tokens = w.model.to_tokens(w.fact.text)
    with torch.no_grad(), training(w):
        assert not torch.equal(w.model(tokens), w.model(tokens))
        with frozen(w.model):
            assert torch.equal(w.model(tokens), w.model(tokens))


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_the_door_sets_what_is_plain_and_puts_back_what_was(raises):
    names = ("inference mode", "autocast", "default float16", "another default device")
    with surrounded(world("plain"), names):
        before = modes()
        with pytest.raises(KeyboardInterrupt) if raises else nullcontext(), plain_torch():
            assert modes() == (False, False, False, torch.float32, torch.device("cpu"))
            with torch.enable_grad(), plain_torch():
                assert torch.is_grad_enabled()
            if raises:
                raise KeyboardInterrupt
        assert modes() == before
    assert torch.get_default_dtype() == torch.float32


def test_a_hook_of_a_user_that_changes_something_counts_and_is_recorded():
    w = world("plain")
    plain = fe.evaluate(w.model, w.facts)
    with hook_of_a_user(w, lambda value, hook: 1.5 * value):
        changed = fe.evaluate(w.model, w.facts)
    assert differences(flat(plain.answers), flat(changed.answers), 1e-3)
    hooked = [name for name in changed.provenance.hooks if "_original_component" not in name]
    assert len(hooked) >= 2 and not plain.provenance.hooks
    assert any(f"blocks.{LAYER}.hook_resid_post" in name or f"{LAYER}.hook_out" in name for name in hooked), hooked


# ------------------------------------------------------------------------------------ a second thread


@contextmanager
def at_work_elsewhere(model: Any) -> Iterator[None]:
    """Another thread is in a call on the model for the length of the block."""
    began, may_end = threading.Event(), threading.Event()

    def work() -> None:
        with frozen(model):
            began.set()
            may_end.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert began.wait(60)
        yield
    finally:
        may_end.set()
        thread.join()


def in_another_thread(call: Callable[[], Any]) -> BaseException | None:
    """What a call raises in a thread of its own."""
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


CHANGES: dict[str, Callable[[SimpleNamespace], Any]] = {
    "Edit": lambda w: w.edit,
    "RoutedEdit": lambda w: w.router,
    "RandomWeights": lambda w: p.RandomWeights(),
    "Erasure": lambda w: p.erase_states(w.model, w.eraser, 0, w.facts),
}
WRITERS = {
    "apply_": lambda w: w.edits[1].apply_(w.model),
    "undo_": lambda w: w.edit.undo_(w.model),
    "undo_all_": lambda w: fe.undo_all_(w.model),
    "forget_edits_": lambda w: e.forget_edits_(w.model),
}


@pytest.mark.filterwarnings("ignore::tl_factedit.EditWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_is_refused_while_another_thread_is_at_work(name):
    w = world("plain")
    w.edit.apply_(w.model)
    try:
        with at_work_elsewhere(w.model):
            before = [param.detach().clone() for param in w.model.parameters()]
            with pytest.raises(RuntimeError, match="another thread is at work on"):
                WRITERS[name](w)
            assert all(torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))
            assert [edit.digest for edit in fe.edits_on(w.model)] == [w.edit.digest]
    finally:
        w.edit.undo_(w.model)


@pytest.mark.filterwarnings("ignore::tl_factedit.EditWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_holds_the_model_for_its_thread_as_long_as_it_is_applied(name):
    w = world("plain")
    change = CHANGES[name](w)
    with at_work_elsewhere(w.model), pytest.raises(RuntimeError, match="another thread is at work on"):
        quiet_applied(change, w.model)
    clean = laws.logits(w.model)
    with change.applied(w.model):
        refused = in_another_thread(lambda: fe.evaluate(w.model, w.facts))
        assert isinstance(refused, RuntimeError) and "another thread is at work on" in str(refused)
        fe.evaluate(w.model, w.facts)
    assert in_another_thread(lambda: fe.evaluate(w.model, w.facts)) is None
    assert torch.equal(laws.logits(w.model), clean)


@pytest.mark.filterwarnings("ignore::tl_factedit.EditWarning")
def test_two_models_are_no_concern_of_each_other():
    w = world("plain")
    alone = copy.deepcopy(w.model)
    with at_work_elsewhere(w.model):
        w.edit.apply_(alone)
        w.edit.undo_(alone)


# ------------------------------------------------------------------------------------ moved models, other names


@pytest.mark.parametrize("arch", ["gpt2", "llama", "phi3", "falcon"])
def test_random_weights_are_the_same_once_a_model_was_moved(arch):
    if KIND == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = tiny.model(KIND, arch, n_layers=2)
    clean = laws.logits(model)

    def said(seed: int) -> Tensor:
        with fe.probes.RandomWeights(seed).applied(model):
            return laws.logits(model)

    before = said(0)
    assert (before - clean).abs().max() > 1e-2 and not torch.equal(before, said(1))
    model.to(torch.float64)
    model.to(torch.float32)  # by now a bridge's q, k and v are no longer views of one matrix
    assert torch.equal(laws.logits(model), clean)
    assert torch.equal(said(0), before)


@pytest.mark.skipif(KIND == "hooked", reason="a HookedTransformer isn't given a cache of transformers")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_given_under_the_name_that_the_models_forward_has(name, monkeypatch):
    model = tiny.model(KIND, "gpt2", n_layers=3)
    want = fe.causal_trace(model, laws.FACT, progress=False)
    assert want.unpacked == ""
    inner, given = model.original_model.forward, []

    def forward(input_ids=None, attention_mask=None, position_ids=None, *, use_cache=None, **options):
        given.append(name in options)
        if name in options:
            options["past_key_values"] = options.pop(name)
        return inner(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **options
        )

    own = ["input_ids", "attention_mask", "position_ids", "use_cache"]
    names = [*own, name]
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
    monkeypatch.setattr(model.original_model, "forward", forward)
    found = fe.causal_trace(model, laws.FACT, progress=False)
    assert any(given)
    assert torch.equal(found.effect, want.effect) and found.unpacked == ""
