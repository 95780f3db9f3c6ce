"""Which edits are in a model's weights, and the weights from before them.

The ledger stands on the modules that own the edited weights. So everything that wraps them knows of the edits (two
bridges over one transformers model, a compiled model), and a copy of a model has a ledger of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tl_factedit.backend.fingerprint import Fingerprint, fingerprint
from tl_factedit.backend.hashing import hash_all, hash_one
from tl_factedit.backend.protocol import Model, UnsupportedModelError, model_name, n_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.state import finish_despite_interrupt, one_thread, plain_torch
from tl_factedit.backend.weights import LEDGER, DownProj, down_proj, ledger_on, write_all
from tl_factedit.editing.delta import Delta

if TYPE_CHECKING:
    from tl_factedit.editing.edit import Edit


@plain_torch()
def edits_on(model: Model) -> tuple[Edit, ...]:
    """The edits that are applied to a model now, in the order they were applied.

    Edits whose layers all hold the weights from before them again (``load_state_dict``, ``copy_``) aren't.
    """
    return ledger_of(model).edits


@plain_torch()
def undo_all_(model: Model) -> None:
    """Take all edits back at once: the weights are those of before the first, bit for bit.

    However many there are, it copies each layer once. Nothing happens if none is applied.

    Raises:
        ValueError: The weights were changed since by something else. Nothing is written then.
        RuntimeError: Another thread is at work on the model. Nothing is written then.
    """
    with one_thread(model):
        ledger = ledger_of(model)
        ledger.check_unchanged(model)
        commit_all(model, {layer: down_proj(model, layer) for layer in ledger.base}, ledger.base, Ledger())


@plain_torch()
def forget_edits_(model: Model) -> None:
    """Take the weights for what they are now: no edit is on the model any more, and none can be undone.

    For weights that were changed by something else after an edit (trained on, loaded in part), so that the edit can
    neither be taken back nor stay. Where all weights from before the edits were put back, there is nothing to forget.

    Raises:
        RuntimeError: Another thread is at work on the model.
    """
    with one_thread(model):
        keep(model, Ledger())


def base_fingerprint(model: Model) -> Fingerprint:
    """Fingerprint of the weights without the edits that are applied to the model now."""
    now = fingerprint(model)
    ledger = ledger_of(model)
    edited = [layer for layer in ledger.base if now.w_out[layer] == ledger.written[layer]]
    hashes = dict(enumerate(now.w_out)) | dict(
        zip(edited, hash_all([ledger.base[layer] for layer in edited]), strict=True)
    )
    return Fingerprint(tuple(hashes.values()), now.rest, now.layout)


def made_on(model: Model, prepend_bos: bool, base: Fingerprint, prompts: Iterable[str] = ()) -> Provenance:
    """The provenance of an edit that is made now: of the weights without edits, and which edits were on them."""
    return Provenance.of(model, prepend_bos, weights=base, prompts=prompts)


@dataclass(frozen=True)
class Ledger:
    """What is applied to one model.

    Attributes:
        edits: The edits, in the order they were applied.
        base: The weights from before the first edit, by layer.
        written: A hash of the weights as the last edit left them, by layer.
        between: By layer, some of the weights from between its edits: by how many of its edits are in them.
    """

    edits: tuple[Edit, ...] = ()
    base: Mapping[int, Tensor] = field(default_factory=dict)
    written: Mapping[int, str] = field(default_factory=dict)
    between: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)

    def holds(self, edit: Edit) -> bool:
        """Whether an edit is applied."""
        return any(other.digest == edit.digest for other in self.edits)

    def carried_by(self, model: Model) -> Mapping[str, bool]:
        """What `backend.weights.carried` says of a model that this ledger stands on."""
        return {edit.digest: edit.provenance.prepend_bos for edit in ledger_of(model).edits}

    def deltas(self, layer: int) -> list[Delta]:
        """The changes of one layer, in order."""
        return [delta for edit in self.edits for delta in edit.deltas if delta.layer == layer]

    def with_edit(self, edit: Edit, before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Ledger:
        """The ledger once an edit is written.

        Args:
            edit: The edit.
            before: The weights of its layers without it.
            after: And with it.
        """
        between = dict(self.between)
        for layer, weight in before.items():
            if count := len(self.deltas(layer)):
                between[layer] = thinned({**between.get(layer, {}), count: weight}, count + 1)
        return replace(
            self,
            edits=(*self.edits, edit),
            base={**before, **self.base},
            written={**self.written, **_hashed(after)},
            between=between,
        )

    def without(self, edit: Edit) -> tuple[Ledger, dict[int, Tensor]]:
        """The ledger once an edit is taken back, and the weights of its layers then.

        The edits after it are written anew, each rounded as it was, from the nearest weights that are still there; on
        the way some are kept. So taking a stack of n edits off from above needs some n log n additions, not n².
        """
        at = next(i for i, other in enumerate(self.edits) if other.digest == edit.digest)
        left = replace(self, edits=(*self.edits[:at], *self.edits[at + 1 :]))
        weights: dict[int, Tensor] = {}
        between = dict(self.between)
        for layer in edit.layers:
            deltas = left.deltas(layer)
            place = len(replace(self, edits=self.edits[:at]).deltas(layer))
            kept = {0: self.base[layer], **between.pop(layer, {})}
            start = max(count for count in kept if count <= place)
            weight = kept[start].clone()
            known = {count: each for count, each in kept.items() if 0 < count <= start}
            for count in range(start, len(deltas)):
                if count:
                    known = thinned({**known, count: weight}, len(deltas))
                weight = deltas[count].on(weight)
            known.pop(len(deltas), None)
            if known:
                between[layer] = known
            weights[layer] = weight
        touched = {delta.layer for other in left.edits for delta in other.deltas}
        written = {**self.written, **_hashed({layer: weight for layer, weight in weights.items() if layer in touched})}
        return (
            replace(
                left,
                base={layer: weight for layer, weight in self.base.items() if layer in touched},
                written={layer: digest for layer, digest in written.items() if layer in touched},
                between={layer: kept for layer, kept in between.items() if layer in touched},
            ),
            weights,
        )

    def check_unchanged(self, model: Model) -> None:
        """Check that the touched weights are still those that the last edit left.

        Raises:
            ValueError: Something else has written to one.
        """
        now = _hashed({layer: down_proj(model, layer).W for layer in self.written})
        for layer, expected in self.written.items():
            if now[layer] != expected:
                raise ValueError(
                    f"W_out of layer {layer} was changed since an edit was applied to {model_name(model)} (by "
                    "training, loading or weight processing): nothing was written; load the weights from before the "
                    "edit into all of its layers, which takes it off, reload the model, or take the weights as they "
                    "are: editing.forget_edits_(model)"
                )


def _hashed(weights: Mapping[int, Tensor]) -> dict[int, str]:
    return dict(zip(weights, hash_all(list(weights.values())), strict=True))


def thinned(weights: Mapping[int, Tensor], top: int) -> dict[int, Tensor]:
    """Of the weights between `top` edits, those to keep: one for each power of two of the distance from the top."""
    kept: dict[int, int] = {}
    for count in sorted(weights, reverse=True):
        kept[(top - count).bit_length()] = count  # the one with the fewest edits
    return {count: weights[count] for count in sorted(kept.values())}


def ledger_of(model: Model) -> Ledger:
    """What is applied to a model now; edits whose layers all hold the weights from before them again are left out."""
    ledger: Ledger = ledger_on(model) or Ledger()
    restored = {layer for layer, base in ledger.base.items() if _is_restored(model, layer, base, ledger)}
    gone = [edit for edit in ledger.edits if restored.issuperset(edit.layers)]
    if not gone:
        return ledger
    left = replace(ledger, edits=tuple(edit for edit in ledger.edits if edit not in gone))
    touched = {delta.layer for edit in left.edits for delta in edit.deltas}
    # A layer that one of its edits shares with a layer that wasn't put back stays as it is: that is for the user.
    return replace(
        left,
        base={layer: weight for layer, weight in ledger.base.items() if layer in touched},
        written={layer: digest for layer, digest in ledger.written.items() if layer in touched},
        between={layer: kept for layer, kept in ledger.between.items() if layer in touched and layer not in restored},
    )


def _is_restored(model: Model, layer: int, base: Tensor, ledger: Ledger) -> bool:
    """Whether a layer holds the weights from before its edits, and not because they change nothing."""
    weight = down_proj(model, layer).W
    same = weight.dtype == base.dtype and torch.equal(weight, base.to(weight.device))
    return same and hash_one(base) != ledger.written[layer]


def keep(model: Model, ledger: Ledger) -> None:
    """Put a ledger on the modules whose weights it tells of, and take it off all others; done even if interrupted."""

    def put() -> None:
        for layer, owner in _owned(model):
            if layer in ledger.base:
                vars(owner)[LEDGER] = ledger  # straight into __dict__: a bridge hands other attributes on
            else:
                vars(owner).pop(LEDGER, None)

    finish_despite_interrupt(put)


def _owned(model: Model) -> Iterator[tuple[int, nn.Module]]:
    for layer in range(n_layers(model)):
        with suppress(UnsupportedModelError):
            yield layer, down_proj(model, layer).owner


def commit_all(model: Model, sites: Mapping[int, DownProj], weights: Mapping[int, Tensor], ledger: Ledger) -> None:
    """All layers and the ledger, or none of it, whatever interrupts it."""
    before, was = {layer: site.W.clone() for layer, site in sites.items()}, ledger_of(model)
    try:
        for layer, site in sites.items():
            site.write_(weights[layer])
        keep(model, ledger)
    except BaseException:
        write_all(list(sites.values()), list(before.values()))
        keep(model, was)
        raise
