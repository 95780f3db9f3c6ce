"""A picture of where an edit acts in a text."""

from __future__ import annotations

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.editing.edit import Edit
from tl_factedit.evaluation.edit_gains import gains
from tl_factedit.show.charts import token_strips
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import tag
from tl_factedit.show.page import Picture
from tl_factedit.show.tables import gain_table


@plain_torch()
def edit(model: Model, edit: Edit, text: str, *, prepend_bos: bool | None = None) -> Picture:
    """The tokens of a text, coloured by how much of an edit fires at each.

    Args:
        model: The model that the edit was made on, without it.
        edit: The edit; it is applied and taken back here.
        text: Any text.
        prepend_bos: BOS policy; None for the edit's own.

    Raises:
        TypeError: What is given isn't an `Edit`, or isn't text.
    """
    check_kind(edit, Edit, "edit = editor(model, facts), such as fe.Rome(stats)(model, facts)")
    check_kind(text, str, "give one text, such as fact.text")
    fired = gains(model, edit, text, prepend_bos=prepend_bos)
    names = ", ".join(f"{f.subject}:{f.target_true} → {f.target_new}" for f in edit.facts[:3])
    more = f" and {len(edit.facts) - 3} more" if len(edit.facts) > 3 else ""
    caption = (
        "Gain: how much of the edit fires at a token. 1 (blue): as at the key it was written for; 0 (white): not "
        "at all; negative (vermilion): the other way round. A weight edit is confined to no position. "
        f"Predicted and measured change of the value differ by {fired.predicted_error:.1e} of the largest."
    )
    each = fired.gain.shape[-1] > 1 and " (of several keys, the one that fires most)"
    body = tag(
        "figure",
        tag("p", f"Edit of {names}{more}" + (each or "")),
        *token_strips(fired),
        tag("figcaption", caption),
        tag("h4", "The same in numbers"),
        gain_table(fired),
    )
    return Picture("Where the edit fires", body, (edit.provenance,), live=True)
