"""What is measured of an edit when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.weights import DownProj
from tl_factedit.core.typed import Number, made
from tl_factedit.editing.delta import LayerUpdate, norm_ratio


@dataclass(frozen=True)
class Diagnostics:
    """How an edit sits in one layer.

    Attributes:
        layer: The block.
        division_factor: uᵀk / (‖u‖ ‖k‖) of the update direction and its key, in [-1, 1]; near 0 the
            update must be huge to write at its key (disabling edits, Gupta et al. 2024, arXiv:2403.07175).
            1 where the editor divides by nothing of the kind.
        update_norm: ‖ΔW‖ (Frobenius).
        weight_norm: ‖W‖ before.
        exactness: What rounding to the weight's own type loses, ‖K (ΔW as written) − R‖ / ‖R‖, with R what the update
            is to add at its keys (what it leaves out of a fact's target is `unmet`).
        value_norm: ‖v*‖ / ‖v‖ of the value written and the one replaced.
        unmet: For each fact, the share of its residual that the update doesn't meet, ‖k ΔW − r‖ / ‖r‖ before
            rounding; empty where all is met by construction, or where it isn't known (`Edit.scaled`).
        key_cosines: For each fact, the largest cosine, in size, of its key with another fact's; empty for one fact.
        off_target: For each fact, the largest ‖k_t ΔW‖ / ‖k ΔW‖ over the other tokens t of its prompt (BOS is one),
            with k the key where the edit is to write: how much of it is added where it isn't meant. Empty where it
            wasn't measured (see `off_target_share`, which can ask neighbours too).
        weight: λ, by which what is kept weighs against what is written: as it was given, or as it was found for the
            share ``unmet=``; None where the editor has none.

    With several facts, `division_factor` is the smallest over facts and `value_norm` the largest.
    """

    layer: int
    division_factor: Number
    update_norm: Number
    weight_norm: Number
    exactness: Number
    value_norm: Number
    unmet: Sequence[Number] = ()
    key_cosines: Sequence[Number] = ()
    off_target: Sequence[Number] = ()
    weight: Number | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnostics:
        """From plain data; older files have no ``weight``, ``off_target`` or ``unmet``, and one cosine for all facts.

        Raises:
            ValueError: A field is missing, or no such thing as it has to be; the message names it.
        """
        known = {name: value for name, value in data.items() if name != "key_cosine"}
        return made(cls, known, "diagnostics", plain=True, missing=("unmet", "key_cosines", "off_target", "weight"))

    @property
    def key_cosine(self) -> float:
        """The largest of `key_cosines`; 0 for one fact."""
        return max(self.key_cosines, default=0.0)

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.update_norm / self.weight_norm


def value_norm(written: Float[Tensor, "fact d_model"], replaced: Float[Tensor, "fact d_model"]) -> float:
    """‖v*‖ / ‖v‖ of the values written and those replaced, the largest over facts."""
    return float((written.norm(dim=-1) / replaced.norm(dim=-1)).max())


def diagnose(site: DownProj, update: LayerUpdate, *, off_target: Sequence[float] = ()) -> Diagnostics:
    """Diagnostics of what an editor does in one layer.

    Args:
        site: Where it is written.
        update: The change, with its keys.
        off_target: For each fact, as `measure_off_target` finds it.
    """
    delta = update.delta
    keys = update.keys.double().cpu()
    directions = keys if update.directions is None else update.directions.double().cpu()
    weight = site.W.cpu()
    wanted = keys @ delta.left.cpu() @ delta.right.cpu()
    moved = keys @ (delta.on(weight).double() - weight.double())
    now = site.value(update.keys.to(site.W.device)).cpu()
    unit = torch.nn.functional.normalize(keys, dim=-1)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0.0)
    unmet: tuple[float, ...] = ()
    if update.residuals is not None:
        residuals = update.residuals.double().cpu()
        unmet = tuple(norm_ratio((wanted - residuals).norm(dim=-1), residuals.norm(dim=-1)).tolist())
    return Diagnostics(
        layer=delta.layer,
        division_factor=float(((directions * keys).sum(-1) / (directions.norm(dim=-1) * keys.norm(dim=-1))).min()),
        update_norm=delta.norm,
        weight_norm=float(weight.double().norm()),
        exactness=float((moved - wanted).norm() / wanted.norm()) if bool(wanted.any()) else 0.0,
        value_norm=value_norm(now + wanted, now),
        unmet=unmet,
        key_cosines=tuple(cosines.amax(-1).tolist()) if len(keys) > 1 else (),
        off_target=tuple(off_target),
        weight=update.weight,
    )
