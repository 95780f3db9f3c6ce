"""Whether a change does what it is for: the targets' probabilities before it and with it, each after its own prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.memory import MOST_TOKENS
from tl_factedit.backend.protocol import Hook, Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import Aligned, align, pad
from tl_factedit.core.typed import Finite, Number, fitting
from tl_factedit.editing.objectives import EditTarget, set_subjects

MEASURED = ("prob_before", "prob_after", "first_before", "first_after")
"""What `outcomes` says of a target; of no other change than the one it was measured with."""

OF_ONE_CHANGE = (*MEASURED, "missed")
"""What fits say that is left out of an edit that is made of others, whose outcome nobody measured."""


SAID: dict[str, Any] = {
    "target": str,
    "unlikely": bool,
    **dict.fromkeys(("prob_before", "prob_after"), Finite),
    **dict.fromkeys(("first_before", "first_after"), bool),
}
"""All that is said of a target together."""

FITTED: dict[str, Any] = {
    "target_prob": tuple[Finite, ...],
    "losses": tuple[Number, ...],
    "stopped": str,
    "same_first_token": bool,
    "missed": Number,
}
"""What else editors of this package say of a fit."""


def unmeasured(fits: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Fits as they stand in an edit that is made of others: without what was measured of those."""
    return tuple({name: item for name, item in fit.items() if name not in OF_ONE_CHANGE} for fit in fits)


def check_fits(fits: Sequence[Mapping[str, Any]]) -> None:
    """Check that what a file says of fits is what those need who read them; editors may say more.

    Raises:
        ValueError: It isn't; the message names the field.
    """
    for i, fit in enumerate(fits):
        for name, kind in (SAID | FITTED).items():
            if name in fit:
                fitting(fit[name], kind, f"fits[{i}].{name}", plain=True)
        lacks = [name for name in SAID if name not in fit]
        if lacks and any(name in fit for name in MEASURED):
            raise ValueError(f"fits[{i}] has no {lacks[0]!r}, and has others of {', '.join(SAID)}: needed all or none")


def as_editor(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file says of an editor, if it is what those need who read it; editors may say more.

    Raises:
        ValueError: It isn't; the message names the field.
    """
    fitting(said.get("name"), str, "editor.name")
    if said["name"] == "scaled":
        fitting(said.get("alpha"), Finite, "editor.alpha")
    for name in ("digests", "scaled_from"):
        if name in said:
            fitting(said[name], tuple[str, ...], f"editor.{name}", plain=True)
    return said


def outcomes(
    model: Model, targets: Sequence[EditTarget], hooks: Sequence[Hook], *, prepend_bos: bool
) -> list[dict[str, Any]]:
    """What becomes of each target after its fact's bare prompt (under the embeddings that the target asks for).

    Args:
        model: Either class, without the change.
        targets: What is wanted.
        hooks: That make the change.
        prepend_bos: BOS policy.

    Returns:
        For each target ``target`` and ``unlikely``, what was wanted; ``prob_before`` and ``prob_after``, the mean
        probability of its tokens; ``first_before`` and ``first_after``, whether each of them is the likeliest.
    """
    rows = [align(model.tokenizer, target.fact, prepend_bos=prepend_bos) for target in targets]
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        before, after = (_said(runner, targets, rows, each) for each in ((), hooks))
    return [
        {
            "target": target.fact.target_new,
            "unlikely": target.unlikely,
            "prob_before": was[0],
            "prob_after": now[0],
            "first_before": was[1],
            "first_after": now[1],
        }
        for target, was, now in zip(targets, before, after, strict=True)
    ]


def _said(
    runner: Runner, targets: Sequence[EditTarget], rows: Sequence[Aligned], hooks: Sequence[Hook]
) -> list[tuple[float, bool]]:
    said: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
    ids = [_target_ids(row) for row in rows]
    texts = [torch.cat([row.ids, target[:-1]]) for row, target in zip(rows, ids, strict=True)]
    for attempt in that_fit([len(text) for text in texts], MOST_TOKENS):
        with attempt as batch:
            at = [(r, len(rows[i].ids) - 1 + t) for r, i in enumerate(batch) for t in range(len(ids[i]))]
            subjects = set_subjects([(targets[i], rows[i].subject) for i in batch])
            logits = runner.logits(
                pad([texts[i] for i in batch], 0),
                at=(torch.tensor([r for r, _ in at]), torch.tensor([place for _, place in at])),
                hooks=[*subjects, *hooks],
            )[0]
            probs = logits.float().softmax(-1).cpu()
            for i, own in zip(batch, probs.split([len(ids[i]) for i in batch]), strict=True):
                wanted = own.gather(-1, ids[i][:, None])[:, 0]
                said[i] = float(wanted.mean()), bool((wanted == own.amax(-1)).all())
    return said


def _target_ids(row: Aligned) -> Tensor:
    if row.new_ids is None:
        raise ValueError("the fact has no target_new")
    return row.new_ids
