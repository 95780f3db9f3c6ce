"""Laws that every Editor obeys, as plain functions; and the small things the tests of editing share.

A law takes an editor (or an edit) and a model and asserts. A new editor gets its tests by calling them::

    laws.leaves_everything_as_it_was(lambda: Memit(stats)(model, facts), model)
    laws.comes_off_bit_for_bit(edit, model)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.editing.value_fit import Fitted
from tl_factedit.editing.values import fit_values

FACT = fe.Fact(
    "The Eiffel Tower",
    "{} is located in the city of",
    " Paris",
    " Rome",
    paraphrases=["Where is {} ? in"],
    neighbours=["The Louvre is located in the city of", "Big Ben is located in the city of"],
    neighbour_targets=[" Paris", " London"],
    controls=[" Berlin", " Madrid", " Vienna", " Tokyo"],
)
OTHER = fe.Fact("Danielle Darrieux", "The mother tongue of {} is", " French", " German")
CONTEXTS = ("", "John lives in Rome . ", "What is it ? ")
QUICK = fe.ValueFit(steps=4)
D_MLP = 64
WANTED = 10 * D_MLP


def texts(count: int, *, seed: int = 0, words: int = 30) -> list[str]:
    """Random words of the tiny tokenizers' vocabulary, of unequal lengths."""
    draw = random.Random(seed)
    known = [word for word in tiny.WORDS.split() if word.isalpha()]
    return [" ".join(draw.choices(known, k=draw.randint(3, words))) for _ in range(count)]


def stats(model: Any, layer: int, *, n_tokens: int = 1_000, seed: int = 0) -> fe.KeyStats:
    """Enough key statistics of one layer for an inverse without a ridge."""
    return fe.key_stats(model, layer, texts(150, seed=seed), n_tokens=n_tokens, progress=False)[layer]


def rome(model: Any, layer: int = 1, **options: Any) -> fe.Rome:
    """A quick ROME: few steps, given contexts."""
    return fe.Rome(stats(model, layer), **{"fit": QUICK, "contexts": CONTEXTS, "progress": False, **options})


def fit_value(model: Any, target: Any, layer: int, contexts: Any, **options: Any) -> Fitted:
    """The value of one fact."""
    return fit_values(model, [target], layer, contexts, **options)[0]


def logits(model: Any, text: str = FACT.text + " Paris") -> Tensor:
    """Logits at every position of a text."""
    with frozen(model), torch.no_grad():
        return Runner(model).logits(model.to_tokens(text)).to("cpu", copy=True)


# ------------------------------------------------------------------------------------ all that can be left behind


@dataclass(frozen=True)
class State:
    """What a call could leave behind on a model, or in the process."""

    weights: tuple[Tensor, ...]
    grads: tuple[Any, ...]
    wants: tuple[bool, ...]
    modules: Mapping[str, tuple[Any, ...]]
    edits: tuple[str, ...]
    rng: tuple[Any, ...]
    modes: tuple[bool, bool]


def state(model: Any) -> State:
    """Bits of all weights, gradients, hooks, replaced forwards, flags, applied edits, random states."""
    return State(
        weights=tuple(param.detach().clone() for param in model.parameters()),
        grads=tuple(param.grad for param in model.parameters()),
        wants=tuple(param.requires_grad for param in model.parameters()),
        modules={
            name: (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                "forward" in vars(module),
                len(getattr(module, "fwd_hooks", ())),
                module.training,
            )
            for name, module in model.named_modules()
        },
        edits=tuple(edit.digest for edit in fe.edits_on(model)),
        rng=(torch.get_rng_state(), np.random.get_state()[1].copy()),  # not random's: beartype draws from it
        modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    )


def assert_same(before: State, after: State) -> None:
    """Every bit of two states is equal."""
    assert all(torch.equal(a, b) for a, b in zip(before.weights, after.weights, strict=True)), "weights"
    assert all(a is b for a, b in zip(before.grads, after.grads, strict=True)), "gradients"
    assert before.wants == after.wants, "requires_grad"
    assert before.modules == after.modules, "hooks, forwards or training mode"
    assert before.edits == after.edits, "applied edits"
    assert torch.equal(before.rng[0], after.rng[0]), "torch's random state"
    assert np.array_equal(before.rng[1], after.rng[1]), "numpy's random state"
    assert before.modes == after.modes, "gradient modes"


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """The block leaves everything as it was, also when it raises."""
    logits(model)  # a bridge's first forward installs hooks of its own, for good
    before = state(model)
    try:
        yield
    finally:
        assert_same(before, state(model))


@contextmanager
def no_forward(monkeypatch: pytest.MonkeyPatch, model: Any) -> Iterator[None]:
    """No block of the model runs inside."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass was run")

    with monkeypatch.context() as patch:
        for method in ("logits", "capture"):
            patch.setattr(Runner, method, fail)
        handles = [block.register_forward_pre_hook(fail) for block in model.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def same_edits(a: fe.Edit, b: fe.Edit) -> None:
    """Two edits are equal in every field."""
    assert a.digest == b.digest
    assert (a.facts, a.contexts, a.diagnostics) == (b.facts, b.contexts, b.diagnostics)
    assert a.layers == b.layers
    assert [dict(fit) for fit in a.fits] == [dict(fit) for fit in b.fits]
    assert dict(a.editor) == dict(b.editor)
    assert a.provenance == b.provenance
    for mine, theirs in ((a.keys, b.keys), (a.values, b.values)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[layer], theirs[layer]) for layer in mine)
    for x, y in zip(a.deltas, b.deltas, strict=True):
        assert x.layer == y.layer and torch.equal(x.left, y.left) and torch.equal(x.right, y.right)


# ------------------------------------------------------------------------------------ laws of an editor


def leaves_everything_as_it_was(make: Callable[[], fe.Edit], model: Any) -> fe.Edit:
    """Making an edit changes no weight, flag, hook or random state; applying it does change a weight."""
    with untouched(model):
        edit = make()
    before = state(model)
    with edit.applied(model), pytest.raises(AssertionError, match="weights"):
        assert_same(before, state(model))
    assert_same(before, state(model))
    return edit


def makes_the_same_edit_twice(make: Callable[[], fe.Edit]) -> None:
    """Whatever the global random state is, the same call makes the same edit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = make()
        torch.manual_seed(2)
        same_edits(first, make())


def writes_its_values_at_its_keys(edit: fe.Edit, model: Any, *, tolerance: float = 1e-5) -> None:
    """W'ᵀk* = v* at every key of every layer (and not before the edit), in the weights as they are stored."""
    for layer in edit.layers:
        site = down_proj(model, layer)
        scale = edit.values[layer].norm()
        assert (site.value(edit.keys[layer]) - edit.values[layer]).norm() > 100 * tolerance * scale
        with edit.applied(model):
            assert (site.value(edit.keys[layer]) - edit.values[layer]).norm() <= tolerance * scale


def comes_off_bit_for_bit(edit: fe.Edit, model: Any) -> None:
    """Applying changes the logits; undoing gives back every bit of weights and logits."""
    clean = logits(model)
    before = state(model)
    edit.apply_(model)
    assert (logits(model) - clean).abs().max() > 1e-3
    edit.undo_(model)
    assert_same(before, state(model))
    assert torch.equal(logits(model), clean)


def survives_a_file(edit: fe.Edit, path: Path, model: Any) -> None:
    """A saved edit comes back equal in every field, and does the same."""
    edit.save(path)
    loaded = fe.Edit.load(path)
    same_edits(edit, loaded)
    with edit.applied(model):
        here = logits(model)
    with loaded.applied(model):
        assert torch.equal(logits(model), here)


def wants_a_new_object(editor: fe.Editor, model: Any, fact: fe.Fact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fact without target_new is refused before anything is run."""
    with untouched(model), no_forward(monkeypatch, model), pytest.raises(ValueError, match="no target_new, needed one"):
        editor(model, [fact.but(target_new=None)])
