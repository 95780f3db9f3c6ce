"""What gives reason for concern: that an edit disables a model, or doesn't do what it was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.core.facts import Fact
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import Aligned
from tl_factedit.editing.outcome import MEASURED
from tl_factedit.editing.value_fit import ValueFit

if TYPE_CHECKING:
    from tl_factedit.editing.edit import Edit


class EditWarning(UserWarning):
    """The edit may disable the model, or miss what it was made for; the message says why and what to do."""


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

MET = 0.1
"""Below, lowering the weight would bring little more."""

SAME_KEY = 0.999
"""Of the cosine between two facts' keys."""

UNLIKELY, LIKELY = 0.05, 0.95
"""An object that is already as unlikely, or as likely, needn't become more so."""

AT_ENDS = ("FineTune", "KnowledgeNeurons")
"""Editors that don't write at the subject alone: the last layer does for them."""

WARNED = "_warned"


def warn_once(change: Any, name: str, concerns: Sequence[str]) -> None:
    """Say, as an `EditWarning`, what there is to be concerned about in a change; once for each object."""
    if concerns and not vars(change).get(WARNED):
        tell(f"{name}: {'; '.join(concerns)}", EditWarning)
        vars(change)[WARNED] = True


def failed(fit: Mapping[str, Any]) -> bool:
    """Whether a change didn't do what was wanted of a fact, in the sense of its objective; False where it is unknown.

    An object that was to become likely isn't what the model says, or was already and hardly moved; one that was to
    become unlikely is still what the model says, or hardly moved.
    """
    if any(name not in fit for name in MEASURED):
        return False
    before, after = fit["prob_before"], fit["prob_after"]
    if fit["unlikely"]:
        return bool(fit["first_after"] or (before > UNLIKELY and after > before / 2))
    nothing = fit["first_before"] and before < LIKELY and after - before < (1 - before) / 10
    return bool(not fit["first_after"] or nothing)


def so_already(fit: Mapping[str, Any]) -> bool:
    """Whether what was wanted of a fact was so before the change; False where it is unknown.

    An object that was to become unlikely was never said, one that was to become likely was said with certainty.
    """
    if any(name not in fit for name in MEASURED):
        return False
    before, first = fit["prob_before"], fit["first_before"]
    return bool(not first and before <= UNLIKELY if fit["unlikely"] else first and before >= LIKELY)


def concerns_of_needless(facts: Sequence[Fact], fits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What there is to say of facts for which a change writes something that wasn't needed."""
    needless = [(fact, fit) for fact, fit in zip(facts, fits, strict=True) if so_already(fit)]
    if needless:
        fact, fit = needless[0]
        many = (
            f"{len(needless)} of {len(facts)} facts were as wanted before it, such as {fact.name!r}: "
            if facts[1:]
            else ""
        )
        was = "never said" if fit["unlikely"] else "said with certainty"
        yield (
            f"{many}{fit['target']!r} was to become {'unlikely' if fit['unlikely'] else 'likely'}, and was {was} "
            f"before (with a probability of {probability(fit['prob_before'])}): nothing had to be written for it; look "
            "at what the model says (fe.known), or leave it out"
        )


def concerns_of_fits(
    facts: Sequence[Fact], fits: Sequence[Mapping[str, Any]], *, last_layer: bool = False, falls_short: str
) -> Iterator[str]:
    """What there is to say of facts of which a change didn't do what was wanted.

    Args:
        facts: What was to be changed.
        fits: How each fact's change was found, and what became of its target.
        last_layer: Whether it writes at the subjects in the model's last layer, where no other token reads it.
        falls_short: What to do where it was found how to bring about what is wanted, and isn't so with the change.
    """
    missed = [(fact, fit) for fact, fit in zip(facts, fits, strict=True) if failed(fit)]
    if not missed:
        return
    fact, fit = missed[0]
    many = f"{len(missed)} of {len(facts)} facts aren't as wanted with it, such as {fact.name!r}: " if facts[1:] else ""
    fitted = fit.get("target_prob", ())
    found = bool(fitted) and (fitted[-1] < 0.5) == fit["unlikely"]
    if last_layer and _in_mid_prompt(fact):
        remedy = "take a lower layer (what the last one writes at a subject in mid-prompt reaches no answer)"
    elif found:
        remedy = f"it was found how to bring that about, and at the prompt itself it isn't so: {falls_short}"
    elif fitted:
        remedy = f"the fit ended at {fitted[-1]:.2g}: take more steps, a larger lr, clamp or ε, or a lower layer"
    else:
        remedy = "take other hyperparameters, or another editor"
    yield (
        f"{many}{fit['target']!r} was to become {'unlikely' if fit['unlikely'] else 'likely'}, and its probability is "
        f"{probability(fit['prob_after'])} with the edit ({probability(fit['prob_before'])} without): {remedy}"
    )


def probability(p: float) -> str:
    """A probability in two digits; near 1 what it lacks of it, which tells two of them apart."""
    return f"1 − {1 - p:.2g}" if 0.99 < p < 1 else f"{p:.2g}"


def _in_mid_prompt(fact: Fact) -> bool:
    """Whether a prompt goes on behind its subject."""
    return not fact.prompt.endswith("{}")


def warn_before(model: Model, facts: Sequence[Fact], prompts: Sequence[Aligned], layer: int, fit: ValueFit) -> None:
    """Say, as an `EditWarning`, where a fit of values can't change any answer; nothing is run.

    Args:
        model: Either class.
        facts: What is to be edited.
        prompts: Each fact's prompt on its tokens.
        layer: Where values are fitted, at the last subject token.
        fit: How.
    """
    why = []
    deaf = [fact for fact, row in zip(facts, prompts, strict=True) if row.last < len(row.ids) - 1]
    if layer == n_layers(model) - 1 and deaf:
        why.append(
            f"layer {layer} is the last, where no token reads what is written at another, and the subject of "
            f"{deaf[0].name!r} ends before its prompt does: choose a lower layer"
        )
    if fit.steps == 1:
        why.append("a fit of steps=1 only reads the loss: take more")
    if why:
        idle = facts if fit.steps == 1 else deaf
        more = f" and {len(idle) - 3} more" if idle[3:] else ""
        name = f"the edit of {', '.join(repr(fact.name) for fact in idle[:3])}{more}"
        tell(f"{name} can't change the answer: {'; '.join(why)}", EditWarning)


def concerns_of(edit: Edit) -> Iterator[str]:
    """What `Edit.concerns` says."""
    weight = {d.layer: d.weight_norm for d in edit.diagnostics}
    relative = {each.layer: each.norm / weight[each.layer] for each in edit.deltas if each.layer in weight}
    name = edit.editor.get("name")
    changes = any(delta.norm for delta in edit.deltas)
    if name == "scaled" and not changes:
        yield f"it is scaled by {edit.editor['alpha']} and changes nothing: take another α"
    elif not changes:
        yield (
            "it writes nothing, not one weight changes: what was wanted was so already (see fits), or its "
            "hyperparameters leave no room; look at what the model says (fe.known, with old and new the right way "
            "round), or leave it out"
        )
    if edit.provenance.hooks:
        yield (
            f"hooks were on the model when it was made, at {', '.join(edit.provenance.hooks[:3])}: its keys, its "
            "values and what became of its targets are of the model with them; take them off and make it again, or "
            "keep them on"
        )
    of_part = "of one of its edits: " if name == "composed" and len(edit.editor.get("of", ())) > 1 else ""
    for layer, size in relative.items():
        if size > LARGE_UPDATE:
            yield (
                f"the update of layer {layer} is {size:.0%} of ‖W‖, and other answers fall from {LARGE_UPDATE:.0%} on: "
                "make it smaller (a lower clamp, fewer steps, an ε), or write fewer facts"
            )
    for d in edit.diagnostics:
        if abs(d.division_factor) < SMALL_DIVISION:
            yield (
                f"{of_part}the update direction of layer {d.layer} hardly sees its key (division factor "
                f"{d.division_factor:.3f}), so that the update is huge wherever else it fires: use one key throughout "
                "(Rome's consistent variant), more tokens for the statistics, or a ridge"
            )
        if max(d.off_target, default=0.0) * d.relative_norm > LARGE_OFF_TARGET:
            yield (
                f"{of_part}another token of a prompt gets {max(d.off_target):.2g} times as much of the update of layer "
                f"{d.layer} as the one it is meant for, and the update is {d.relative_norm:.0%} of ‖W‖: take "
                "statistics (of more text, or at all instead of the identity), an ε in fine-tuning, or another layer"
            )
        if d.exactness > INEXACT:
            remedy = (
                "it is that small beside the weights; look at whether anything had to be written (see fits)"
                if edit.provenance.dtype in ("float32", "float64")
                else "load the model in float32"
            )
            yield (
                f"{of_part}rounding to the weights' type loses {d.exactness:.0%} of the update of layer {d.layer}: "
                f"{remedy}"
            )
    last_layer = (
        max(edit.layers, default=-1) == len(edit.provenance.weights.w_out) - 1
        and edit.editor.get("name") not in AT_ENDS
    )
    last = [d for d in edit.diagnostics if d.layer == max(edit.layers, default=-1)]
    unmet = [share for d in last for share in d.unmet]
    weighs = any(d.weight is not None for d in last)
    if weighs and unmet and sum(unmet) / len(unmet) > MET:
        falls_short = "lower the weight (see unmet), or take another layer"
    elif len(edit.contexts) > 1:
        falls_short = (
            f"it is written at the mean of the keys under {len(edit.contexts)} contexts; take contexts=(), or another "
            "layer"
        )
    else:
        falls_short = "take another layer"
    if changes:
        yield from concerns_of_needless(edit.facts, edit.fits)
    yield from concerns_of_fits(edit.facts, edit.fits, last_layer=last_layer, falls_short=falls_short)
    one_key = bool(unmet) and max(d.key_cosine for d in last) > SAME_KEY
    if one_key:
        yield (
            f"two of the facts have one key in layer {max(edit.layers)} (prompts that begin with the same subject), "
            "which can have one answer only: write them one after the other, or leave one out"
        )
    if unmet and not one_key and sum(unmet) / len(unmet) > LARGE_UNMET:
        deaf = last_layer and all(map(_in_mid_prompt, edit.facts))
        remedy = "take a lower layer" if deaf else "lower the weight" if weighs else "take other hyperparameters"
        yield (
            f"{sum(unmet) / len(unmet):.0%} of what the facts need is not met in the last layer, {max(edit.layers)}: "
            f"they are hardly written; {remedy}"
        )
    if changes and name in ("scaled", "composed") and not all("prob_after" in fit for fit in edit.fits):
        yield f"it is {name}, and what becomes of its targets was not measured of it: evaluate it (fe.evaluate)"
