"""Erasure comparators: what a model looks like with a relation's objects erased from a state.

An eraser (`tl_factedit.probes.scrubbing`) at one place of a model is a test of probes and of the audit, not a fact that
was erased: the next blocks may read the object anew from what isn't linear, or from other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.hook_names import EMBED, resid_post, resid_pre
from tl_factedit.backend.hooking import hooked
from tl_factedit.backend.protocol import Hook, Model, bos_policy, check_layer, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, one_thread, plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, pad
from tl_factedit.editing.ledger import base_fingerprint
from tl_factedit.probes.scrubbing import Eraser

AT_ONCE = 256
"""Subjects embedded in one pass."""


@dataclass(frozen=True, eq=False)
class Erasure:
    """An eraser at work in a model: a change of the residual stream after one block. Weights aren't touched.

    It is applied like an edit, ``with erasure.applied(model)``, and audited like one. Made by `erase_states`.

    Attributes:
        eraser: The map that is applied.
        layer: The block after which it is applied; -1 for what enters the first.
        facts: The facts it was made for.
        everywhere: Whether it is applied at every token, and not only at the last token of these facts' subjects.
        spelt: Token embeddings of each spelling of these subjects, by which they are found.
        provenance: Model, weights, BOS policy, versions.
    """

    eraser: Eraser
    layer: int
    facts: tuple[Fact, ...]
    everywhere: bool
    spelt: tuple[Float[Tensor, "_ d_model"], ...]
    provenance: Provenance

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer that it changes."""
        return (self.layer,)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the erasure for the length of a ``with`` block.

        A forward pass of your own inside it that begins after the embeddings (``start_at_layer``) raises a ValueError,
        unless the erasure works everywhere: the subjects can't be found in it.

        Raises:
            ValueError: The model has other weights than it was made for (edits of this package don't count).
            RuntimeError: Another thread is at work on the model. Inside the block other threads are refused.
        """
        now = base_fingerprint(model)
        if not self.provenance.weights.matches(now):
            raise ValueError(
                f"the erasure was made for weights {self.provenance.weights} of {self.provenance.model!r}, but "
                f"{model_name(model)} has weights {now}: apply it to the model it was made on"
            )
        place = _place(model, self.layer)
        if self.everywhere:
            hooks: list[Hook] = [(place, lambda value, hook: self.eraser(value))]
        else:
            finder = _Finder(self.spelt)
            hooks = [(EMBED, finder.look), (place, lambda value, hook: finder.change(value, self.eraser))]
        with one_thread(model), hooked(model, hooks):
            yield model

    def __repr__(self) -> str:
        """What it takes, and where."""
        where = "every token" if self.everywhere else f"the last subject token of {len(self.facts)} facts"
        return f"Erasure({self.eraser.rank} of {len(self.eraser.mean)} directions after layer {self.layer}, at {where})"


@plain_torch()
def erase_states(
    model: Model,
    eraser: Eraser,
    layer: int,
    facts: Sequence[Fact],
    *,
    everywhere: bool = False,
    prepend_bos: bool | None = None,
) -> Erasure:
    """Put an eraser to work at the last token of some facts' subjects.

    The subjects are found by their token embeddings in whatever is run, spelt as in the facts' prompts and in those of
    their paraphrases that are templates. Other spellings aren't found, nor are subjects whose embeddings are noised.

    Args:
        model: The model whose states the eraser was fitted on.
        eraser: The map to apply.
        layer: The block after which to apply it; -1 for what enters the first.
        facts: The facts whose subjects to erase at.
        everywhere: Apply it at every token of everything that is run instead.
        prepend_bos: BOS policy; None for the model's default.

    Raises:
        ValueError: No facts, no such layer, or another width than the model's.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if len(eraser.mean) != model.cfg.d_model:
        raise ValueError(f"the eraser is for {len(eraser.mean)} dimensions, the model has {model.cfg.d_model}")
    _place(model, layer)
    bos = bos_policy(model, prepend_bos)
    rows = [
        align(model.tokenizer, fact, prepend_bos=bos, template=template)
        for fact in facts
        for template in (fact.prompt, *(p for p in fact.paraphrases if "{}" in p))
    ]
    spelt = [torch.tensor(ids) for ids in sorted({tuple(row.ids[slice(*row.subject)].tolist()) for row in rows})]
    vectors: list[Tensor] = []
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for begin in range(0, len(spelt), AT_ONCE):
            ids = spelt[begin : begin + AT_ONCE]
            embedded = runner.capture(pad(ids, fill=0), [EMBED], stop=1)[EMBED]
            vectors += [of_row[: len(row)].clone() for of_row, row in zip(embedded, ids, strict=True)]
    provenance = Provenance.of(model, bos, weights=base_fingerprint(model), prompts=(fact.text for fact in facts))
    return Erasure(eraser, layer, tuple(facts), everywhere, tuple(vectors), provenance)


def _place(model: Model, layer: int) -> str:
    return resid_pre(0) if layer == -1 else resid_post(check_layer(model, layer))


class _Finder:
    """Finds sequences of tokens in a forward pass by their embeddings, which are looked up and so bit-identical."""

    def __init__(self, spelt: Sequence[Float[Tensor, "_ d_model"]]) -> None:
        self.words: dict[bytes, int] = {}
        self.spelt = {tuple(self.words.setdefault(word, len(self.words)) for word in _words(ids)) for ids in spelt}
        self.seen: Tensor | None = None

    def look(self, value: Float[Tensor, "row pos d_model"], hook: Any = None) -> None:
        found = torch.zeros(value.shape[:2], dtype=torch.bool)
        lengths = {len(ids) for ids in self.spelt}
        for i, row in enumerate(value):
            ids = [self.words.get(word, -1) for word in _words(row)]
            for end in range(1, len(ids) + 1):
                found[i, end - 1] = any(tuple(ids[end - n : end]) in self.spelt for n in lengths if n <= end)
        self.seen = found

    def change(self, value: Float[Tensor, "row pos d_model"], eraser: Eraser) -> Float[Tensor, "row pos d_model"]:
        found, self.seen = self.seen, None
        if found is None or found.shape != value.shape[:2]:
            raise ValueError(
                "a pass begins after the embeddings, so the subjects can't be found in it: run whole prompts, or "
                "erase at every token (everywhere=True)"
            )
        changed = value.clone()
        changed[found.to(value.device)] = eraser(value[found.to(value.device)])
        return changed


def _words(embedded: Float[Tensor, "pos d_model"]) -> Sequence[bytes]:
    flat = embedded.detach().cpu().contiguous().view(torch.uint8).reshape(len(embedded), -1)
    return [row.numpy().tobytes() for row in flat]
