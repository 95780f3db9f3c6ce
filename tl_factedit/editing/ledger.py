"""Which edits are on a model, and the weights from before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from tl_factedit.backend.fingerprint import Fingerprint, fingerprint, hash_weight
from tl_factedit.backend.protocol import Model, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.weights import DownProj, down_proj, write_all

if TYPE_CHECKING:
    from tl_factedit.editing.edit import Edit


def edits_on(model: Model) -> tuple[Edit, ...]:
    """The edits that are applied to a model now, in the order they were applied."""
    return ledger_of(model).edits


def undo_all_(model: Model) -> None:
    """Take all edits back at once: the weights are those of before the first, bit for bit.

    However many there are it copies each layer once, where undoing a thousand one by one writes the ones left anew each
    time. Nothing happens if none is applied.

    Raises:
        ValueError: The weights were changed since by something else. Nothing is written then.
    """
    ledger = ledger_of(model)
    ledger.check_unchanged(model)
    commit_all(model, {layer: down_proj(model, layer) for layer in ledger.base}, ledger.base, Ledger())


def base_fingerprint(model: Model) -> Fingerprint:
    """Fingerprint of the weights without the edits that are applied to the model now."""
    now = fingerprint(model)
    ledger = ledger_of(model)
    hashes = list(now.w_out)
    for layer, weight in ledger.base.items():
        if hashes[layer] == ledger.written[layer]:
            hashes[layer] = hash_weight(weight)
    return Fingerprint(tuple(hashes), now.rest, now.layout)


def made_on(model: Model, prepend_bos: bool, base: Fingerprint) -> Provenance:
    """The provenance of an edit that is made now: of the weights without edits, and which edits were on them."""
    edits = tuple(edit.digest for edit in ledger_of(model).edits)
    return Provenance.of(model, prepend_bos, weights=base, edits=edits)


@dataclass(frozen=True)
class Ledger:
    """What is applied to one model. Lives on the model, so that a copy of the model has its own."""

    base: Mapping[int, Tensor] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    written: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Mapping[int, Tensor], edits: tuple[Edit, ...], written: Mapping[int, str]) -> Ledger:
        """With the layers only that these edits touch."""
        touched = {delta.layer for edit in edits for delta in edit.deltas}
        return cls(
            {layer: weight for layer, weight in base.items() if layer in touched},
            edits,
            {layer: digest for layer, digest in written.items() if layer in touched},
        )

    def check_unchanged(self, model: Model) -> None:
        """Check that the touched weights are still those that the last edit left.

        Raises:
            ValueError: Something else has written to one.
        """
        for layer, expected in self.written.items():
            if hash_weight(down_proj(model, layer).W) != expected:
                raise ValueError(
                    f"W_out of layer {layer} was changed since an edit was applied to {model_name(model)} (by "
                    "training, loading or weight processing): nothing was written; reload the model"
                )


_LEDGER = "_tl_factedit_ledger"


def ledger_of(model: Model) -> Ledger:
    """What is applied to a model now."""
    return model.__dict__.get(_LEDGER) or Ledger()


def _keep(model: Model, ledger: Ledger) -> None:
    # Straight into __dict__: a bridge hands other attributes on to the model it wraps.
    if ledger.edits:
        model.__dict__[_LEDGER] = ledger
    else:
        model.__dict__.pop(_LEDGER, None)


def weight_hashes(weights: Mapping[int, Tensor]) -> dict[int, str]:
    """A hash of each layer's weight."""
    return {layer: hash_weight(weight) for layer, weight in weights.items()}


def commit_all(model: Model, sites: Mapping[int, DownProj], weights: Mapping[int, Tensor], ledger: Ledger) -> None:
    """All layers and the ledger, or none of it, whatever interrupts it."""
    before, was = {layer: site.W.clone() for layer, site in sites.items()}, ledger_of(model)
    try:
        for layer, site in sites.items():
            site.write_(weights[layer])
        _keep(model, ledger)
    except BaseException:
        write_all(list(sites.values()), list(before.values()))
        _keep(model, was)
        raise
