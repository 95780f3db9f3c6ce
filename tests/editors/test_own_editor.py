"""A newcomer's editor: one dataclass in one file, which obeys the laws of every editor without a line more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import laws
import pytest
import tiny
import torch

import tl_factedit as fe

FACTS = [laws.FACT, laws.OTHER]


@dataclass(frozen=True)
class SmallestChange:
    """Write values at keys by the change of ``W_out`` of least Frobenius norm: ΔW = K⁺ δ."""

    layer: int
    fit: fe.ValueFit = fe.ValueFit()  # noqa: RUF009  (frozen)

    def __call__(self, model: Any, facts: Sequence[fe.Fact]) -> fe.Edit:
        inputs = fe.editing.EditInputs.of(model, facts, [self.layer], fit=self.fit)
        fits = fe.editing.fit_values(
            model, inputs.facts, self.layer, [""], fit=self.fit, prepend_bos=inputs.prepend_bos
        )
        keys = torch.stack([fit.keys[0] for fit in fits])
        delta = fe.editing.Delta(self.layer, torch.linalg.pinv(keys), torch.stack([fit.delta for fit in fits]))
        return fe.Edit.made(
            inputs,
            [fe.editing.LayerUpdate(delta, keys)],
            editor=fe.editing.describe(self),
            fits=[fit.record for fit in fits],
        )


def test_an_editor_of_ones_own_obeys_the_laws_of_every_editor(kind, monkeypatch, tmp_path):
    model = tiny.model(kind, "gpt2")
    editor = SmallestChange(1, laws.QUICK)
    assert isinstance(editor, fe.Editor)
    edit = laws.leaves_everything_as_it_was(lambda: editor(model, FACTS), model)
    laws.makes_the_same_edit_twice(lambda: editor(model, FACTS))
    laws.writes_its_values_at_its_keys(edit, model)
    laws.comes_off_bit_for_bit(edit, model)
    laws.survives_a_file(edit, tmp_path / "edit.safetensors", model)
    laws.wants_a_new_object(editor, model, laws.FACT, monkeypatch)


def test_what_every_edit_has_is_filled_in(kind):
    model = tiny.model(kind, "gpt2")
    edit = SmallestChange(1, laws.QUICK)(model, FACTS)
    assert edit.editor["name"] == "SmallestChange"
    assert edit.editor["layer"] == 1 and edit.editor["fit"]["steps"] == laws.QUICK.steps
    assert edit.provenance.weights == fe.editing.Provenance.of(model).weights
    (diagnostics,) = edit.diagnostics
    assert len(diagnostics.off_target) == len(diagnostics.key_cosines) == len(FACTS)
    assert min(diagnostics.off_target) > 0
    assert [fit["same_first_token"] for fit in edit.fits] == [False, False]
    # For one fact and one context it is ROME with the identity for statistics.
    (rome,) = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=(), progress=False).each(
        model, FACTS[:1]
    )
    alone = SmallestChange(1, laws.QUICK)(model, FACTS[:1])
    torch.testing.assert_close(alone.deltas[0].dense, rome.deltas[0].dense, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Regularised:
    """Ridge regression from keys to residuals, over several layers: Δ = (λ I + KᵀK)⁻¹ Kᵀ R."""

    stats: dict[int, fe.KeyStats]
    weight: float = 0.1
    objective: fe.editing.Objective = fe.Inject()  # noqa: RUF009  (frozen)
    fit: fe.ValueFit = laws.QUICK
    contexts: Sequence[str] = ()
    prepend_bos: bool | None = None
    memory: float = 2.0
    progress: bool = False

    def __call__(self, model: Any, facts: Sequence[fe.Fact]) -> fe.Edit:
        return fe.editing.layerwise_edit(self, model, facts, ridge=None)

    def solver(self, stats: fe.KeyStats) -> Any:
        gram = torch.eye(len(stats.moment), dtype=torch.float64)
        return lambda keys, residuals: fe.editing.Factors(
            torch.linalg.solve(self.weight * gram + keys.T @ keys, keys.T), residuals
        )


def test_a_closed_form_of_ones_own_goes_over_the_layers_as_memit_does(kind, tmp_path, monkeypatch):
    model = tiny.model(kind, "gpt2")
    stats = {layer: fe.KeyStats.identity(model, layer) for layer in (1, 2)}
    edit = laws.leaves_everything_as_it_was(lambda: Regularised(stats)(model, FACTS), model)
    assert edit.layers == (1, 2)
    laws.comes_off_bit_for_bit(edit, model)
    laws.survives_a_file(edit, tmp_path / "edit.safetensors", model)
    laws.wants_a_new_object(Regularised(stats), model, laws.FACT, monkeypatch)
    # It is MEMIT with the identity for statistics.
    memit = fe.Memit(stats, weight=0.1, fit=laws.QUICK, contexts=(), progress=False)(model, FACTS)
    for own, theirs in zip(edit.deltas, memit.deltas, strict=True):
        torch.testing.assert_close(own.dense, theirs.dense, rtol=1e-6, atol=1e-9)


def test_what_is_not_a_dataclass_is_not_described():
    with pytest.raises(TypeError, match="needed a dataclass"):
        fe.editing.describe(lambda model, facts: None)
