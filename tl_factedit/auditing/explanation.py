"""A verdict in a sentence or two, for people who read nothing else."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from tl_factedit.attacks.attack import OFF, Recovery, Shows
from tl_factedit.attacks.silencing import Silencing

if TYPE_CHECKING:
    from tl_factedit.auditing.verdict import Verdict

MOST_CHARACTERS = 120

SAYS = {
    "FAILED": "The change doesn't do what it was made for, so that there is nothing to audit.",
    "DAMAGED": "The change breaks what it should have left alone; what became of the old object is beside the point.",
    "MOVED": "The old object is gone from where facts are encoded and nothing tried brings it back, but it can still "
    "be decoded in another code.",
    "LATENT": "Nothing tried brings the old object back, but traces of it are still found.",
    "SCARRED": "Nothing tried brings the old object back, and it is marked as what the answer is not.",
    "ERASED": "Nothing of the old object was found, by measurements that would have shown it.",
    "INCONCLUSIVE": "What was measured supports no stronger label.",
}


def explain(verdict: Verdict, *, first: int | None = None) -> str:
    """What was found, by which question, and what was foreseeable from the unedited model.

    Args:
        verdict: The verdict.
        first: Where no label is supported, of how many things that are missing to tell; None for all.
    """
    if verdict.label == "ERASED":
        covers = any(finding.covers for finding in verdict.findings.showing("elsewhere"))
        how = "" if covers else " Not all that was written could be silenced; the weights were asked instead."
        return SAYS["ERASED"] + how + " It speaks of the wordings and contexts that were tried."
    if verdict.label != "INSERTED":
        lacks = verdict.missing if verdict.label == "INCONCLUSIVE" else ()
        what = "First of what is missing" if len(lacks[:first]) < len(lacks) else "What is missing"
        return SAYS[verdict.label] + (f" {what}: {'; '.join(map(_brief, lacks[:first]))}." if lacks else "")
    sentences = [_off(verdict)] if "elsewhere" in verdict.by else []
    under = _strongest(verdict, "underneath")
    if under is not None and under.best is not None:
        share = f"{under.share('old_first', under.best.key):.2f}"
        if "underneath" in verdict.by:
            what = "what follows from the old object" if under.attack == "indirect routes" else "the old object"
            sentences.append(
                f"With the change in force {what} comes back in {share} of the facts ({under.attack}, "
                f"{under.best.label}): the change is a mask even while it acts."
            )
        else:
            most = "" if math.isnan(under.at_most) else f" (at most {under.at_most:.2f} beyond its null)"
            sentences.append(f"With the change in force nothing tried is shown to bring it back{most}.")
    return " ".join(sentences)


def _brief(missing: str) -> str:
    """What is missing in so many characters; the verdict's list has it whole."""
    return textwrap.shorten(missing, MOST_CHARACTERS, placeholder=" …").removesuffix(".")


def _off(verdict: Verdict) -> str:
    found = _strongest(verdict, "elsewhere")
    assert found is not None and found.best is not None  # or it wouldn't have decided
    key = found.best.key
    with_it, without = found.share("old_first", key), found.share("old_first", key, before=True)
    how = f"{found.best.label} silenced" if isinstance(key, Silencing) else found.best.label
    place = found.keys.index(key)
    if "left" in found.extra and float(found.extra["cover"][place]) < OFF:  # cells that the change reads, not its own
        how += f", which leaves {float(found.extra['left'][place]):.0%} of what was written,"
    return (
        f"With {how} the changed model names the old object in {with_it:.2f} of the facts; the "
        f"unedited model did in {without:.2f}, so that a way past the change was foreseeable."
    )


def _strongest(verdict: Verdict, shows: Shows) -> Recovery | None:
    found = [
        mine for recovery in verdict.attacks if (mine := recovery.showing(shows)) is not None and mine.best is not None
    ]
    return max(found, key=lambda recovery: recovery.strongest.mean, default=None)
