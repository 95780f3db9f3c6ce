"""Whether what is given as the unchanged model is one: what it carries already, and which references that concerns."""

from __future__ import annotations

from collections.abc import Sequence

from tl_factedit.backend.protocol import Model, model_name
from tl_factedit.backend.state import users_hooks
from tl_factedit.core.facts import Fact
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.ledger import edits_on
from tl_factedit.measure.change import Change, Changed, asked_as, identity


def check_way_round(model: Model, changed: Changed, facts: Sequence[Fact]) -> None:
    """Check that another model is another one, and that it is the changed one of the two; nothing is run.

    Args:
        model: What is given as the unchanged model.
        changed: The change.
        facts: What is to be audited.

    Raises:
        ValueError: The change is the model itself (or wraps the same transformers model, under the same hooks), or an
            edit that was made for one of the facts is on the unchanged model and not on the changed one.
    """
    if isinstance(changed, (Sequence, Change)):
        return
    if _is_itself(model, changed):
        raise ValueError(
            f"the change is the model itself ({model_name(model)}), needed two: keep a copy from before the change "
            "(copy.deepcopy(model)), or give an edit that isn't applied"
        )
    there = {edit.digest for edit in edits_on(changed)}
    for edit in edits_on(model):
        made_for = {identity(fact) for fact in edit.facts}
        fact = next((fact for fact in facts if not made_for.isdisjoint(asked_as(fact))), None)
        if fact is not None and edit.digest not in there:
            raise ValueError(
                f"an edit of {fact.name!r} is on the first model ({model_name(model)}) and not on the second, needed "
                "the unchanged one first: fe.audit(unchanged, changed, facts)"
            )


def _is_itself(model: Model, other: Model) -> bool:
    one, two = (getattr(each, "original_model", each) for each in (model, other))
    return model is other or (one is two and users_hooks(model) == users_hooks(other))


def edits_beside(model: Model, changed: Changed) -> tuple[Edit, ...]:
    """The edits on the unchanged model that the change wasn't made on top of (another model: that aren't on it too)."""
    if isinstance(changed, Sequence):
        known = {digest for change in changed for digest in change.provenance.edits}
    elif isinstance(changed, Change):
        known = set(changed.provenance.edits)
    else:
        known = {digest for edit in edits_on(changed) for digest in (edit.digest, *edit.parts)}
    return tuple(edit for edit in edits_on(model) if known.isdisjoint((edit.digest, *edit.parts)))


def subjects_written(model: Model, changed: Changed) -> frozenset[str]:
    """The subjects of all edits that are on the unchanged model, or on another model that it is compared with."""
    models = [model] if isinstance(changed, (Sequence, Change)) else [model, changed]
    return frozenset(fact.subject for each in models for edit in edits_on(each) for fact in edit.facts)


def describe_beside(edits: Sequence[Edit]) -> str:
    """What an audit says of edits that are on its unchanged model."""
    names = [fact.name for edit in edits for fact in edit.facts]
    few = f"{', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if names[3:] else ''}"
    return (
        f"the unchanged model carries edits that the change wasn't made on top of (of {few}): the audit compares with "
        "them on; undo them first (fe.undo_all_(model)) to compare with the model without"
    )
