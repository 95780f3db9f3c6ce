"""What is measured of an edit when it is made, and what gives reason for concern."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from tl_factedit.backend.weights import DownProj
from tl_factedit.editing.delta import LayerUpdate, norm_ratio

if TYPE_CHECKING:
    from tl_factedit.editing.edit import Edit


class EditWarning(UserWarning):
    """The edit may disable the model, or miss what it was made for; the message says why and what to do."""


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
            is to add at its keys (what it leaves out of a fact's wish is `unmet`).
        value_norm: ‖v*‖ / ‖v‖ of the value written and the one replaced.
        unmet: For each fact, the share of its residual that the update doesn't meet, ‖k ΔW − r‖ / ‖r‖ before
            rounding; empty where all is met by construction.
        key_cosines: For each fact, the largest cosine, in size, of its key with another fact's; empty for one fact.
        off_target: For each fact, the largest ‖k_t ΔW‖ / ‖k ΔW‖ over the other tokens t of its prompt (BOS is one),
            with k the key where the edit is to write: how much of it is added where it isn't meant. Empty where it
            wasn't measured (see `off_target_share`, which can ask neighbours too).

    With several facts, `division_factor` is the smallest over facts and `value_norm` the largest.
    """

    layer: int
    division_factor: float
    update_norm: float
    weight_norm: float
    exactness: float
    value_norm: float
    unmet: Sequence[float] = ()
    key_cosines: Sequence[float] = ()
    off_target: Sequence[float] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnostics:
        """From plain data; older files have no ``off_target``, no ``unmet``, and one cosine for all facts."""
        known: dict[str, Any] = {name: value for name, value in data.items() if name != "key_cosine"}
        known |= {name: tuple(data.get(name, ())) for name in ("unmet", "key_cosines", "off_target")}
        return cls(**known)

    @property
    def key_cosine(self) -> float:
        """The largest of `key_cosines`; 0 for one fact."""
        return max(self.key_cosines, default=0.0)

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.update_norm / self.weight_norm


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
        value_norm=float(((now + wanted).norm(dim=-1) / now.norm(dim=-1)).max()),
        unmet=unmet,
        key_cosines=tuple(cosines.amax(-1).tolist()) if len(keys) > 1 else (),
        off_target=tuple(off_target),
    )


# ROME edits of the model that comes with this package, in 3 layers, with statistics and with the identity, were scaled
# from 1 to 12 times (168 in all), and the neighbours asked: the bounds are where they begin to fall.
SMALL_DIVISION = 0.05
"""Of |uᵀk| / (‖u‖ ‖k‖). One key throughout gives 0.5 to 0.7 there. Gupta et al. 2024 (arXiv:2403.07175) and Yang et al.
2024 (arXiv:2406.11263) trace disabling edits to denominators near 0, which two different keys can make."""

LARGE_UPDATE = 1.5
"""Of ‖ΔW‖ / ‖W‖. Neighbourhood 0.998 below 0.3, 0.94 between 0.6 and 1, 0.90 up to 1.5, 0.78 beyond."""

LARGE_OFF_TARGET = 0.2
"""Of off_target · ‖ΔW‖ / ‖W‖: another token's share says little of an update that is small. Neighbourhood 0.99 below
0.02, 0.93 between 0.02 and 0.2, 0.74 beyond."""

INEXACT = 0.1
"""Of what rounding to the weights' type loses: above, the value is another than the one that was fitted."""

LARGE_UNMET = 0.5
"""Of the share that isn't met in the last layer, mean over facts: above, less than half of the change is written."""

SAME_KEY = 0.999
"""Of the cosine between two facts' keys."""

WARNED = "_warned"


def callers_level(frame: FrameType) -> int:
    """How far up from a frame a warning has to point for the first line of whoever called this package."""
    level = 1
    ours = {"tl_factedit", contextlib.__name__, "jaxtyping"}
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ours:
        level, frame = level + 1, frame.f_back
    return level


def concerns_of(edit: Edit) -> Iterator[str]:
    """What `Edit.concerns` says."""
    weight = {d.layer: d.weight_norm for d in edit.diagnostics}
    relative = {each.layer: each.norm / weight[each.layer] for each in edit.deltas if each.layer in weight}
    for layer, size in relative.items():
        if size > LARGE_UPDATE:
            yield (
                f"the update of layer {layer} is {size:.0%} of ‖W‖, and other answers fall from {LARGE_UPDATE:.0%} on: "
                "make it smaller (a lower clamp, fewer steps, an ε), or write fewer facts"
            )
    for d in edit.diagnostics:
        if abs(d.division_factor) < SMALL_DIVISION:
            yield (
                f"the update direction of layer {d.layer} hardly sees its key (division factor "
                f"{d.division_factor:.3f}), so that the update is huge wherever else it fires: use one key throughout "
                "(Rome's consistent variant), more tokens for the statistics, or a ridge"
            )
        if max(d.off_target, default=0.0) * relative.get(d.layer, 0.0) > LARGE_OFF_TARGET:
            yield (
                f"another token of a prompt gets {max(d.off_target):.2g} times as much of the update of layer "
                f"{d.layer} as the one it is meant for, and the update is {relative[d.layer]:.0%} of ‖W‖: take "
                "statistics (of more text, or at all instead of the identity), an ε in fine-tuning, or another layer"
            )
        if d.exactness > INEXACT:
            yield (
                f"rounding to the weights' type loses {d.exactness:.0%} of the update of layer {d.layer}: load the "
                "model in float32"
            )
    last = [d for d in edit.diagnostics if d.layer == max(edit.layers)]
    unmet = [share for d in last for share in d.unmet]
    one_key = bool(unmet) and max(d.key_cosine for d in last) > SAME_KEY
    if one_key:
        yield (
            f"two of the facts have one key in layer {max(edit.layers)} (prompts that begin with the same subject), "
            "which can have one answer only: write them one after the other, or leave one out"
        )
    if unmet and not one_key and sum(unmet) / len(unmet) > LARGE_UNMET:
        yield (
            f"{sum(unmet) / len(unmet):.0%} of what the facts need is not met in the last layer, {max(edit.layers)}: "
            "they are hardly written; lower the weight"
        )
