"""A picture of where a change writes."""

from __future__ import annotations

from tl_factedit.attacks.footprints import WRITES, Footprint
from tl_factedit.locate.trace_result import ROLES
from tl_factedit.show.heat_map import Scale, heat_map
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import Html, join, number, tag
from tl_factedit.show.page import Picture

NAMES = {"attn": "attention", "mlp": "MLP", "rest": "norms behind them"}
OUTSIDE = {"embed": "embeddings", "norm": "final norm", "unembed": "unembedding"}
HUE = "orange"


def footprint(found: Footprint) -> Picture:
    """Where a change writes: the share of all it wrote, by component, layer and role of the token.

    Args:
        found: From ``fe.attacks.footprint``.

    Raises:
        TypeError: What is given isn't a `Footprint`.
    """
    check_kind(found, Footprint, "found = fe.attacks.footprint(model, changed, facts)")
    return Picture("Footprint of the change", footprint_chart(found), ())


def footprint_chart(found: Footprint) -> Html:
    """The same as a figure: a heat map for each component that was written."""
    facts = "one fact" if len(found.facts) == 1 else f"{len(found.facts)} facts"
    if not found.written:
        return tag("p", f"Nothing was written: over {facts} no component answers otherwise by {WRITES:g} of its own.")
    table = found.table()
    layers = sorted({layer for _, layer in found.components if layer is not None})
    largest = float(table[table.component.isin(list(NAMES))].share.max())
    charts = []
    for component, name in NAMES.items():
        if not any(each == component for each, _ in found.written):
            continue
        rows = table[table.component == component]
        roles = [role for role in ROLES if role in set(rows.role)]
        at = {(row.role, int(row.layer)): row for row in rows.itertuples()}
        shares = [[float(at[role, layer].share) for layer in layers] for role in roles]
        tooltips = [
            [
                f"{name} of layer {layer}, {role}: {number(at[role, layer].share, 3)} of what was written, "
                f"{number(at[role, layer].write, 3)} of its own answer"
                for layer in layers
            ]
            for role in roles
        ]
        drawing = heat_map(
            shares,
            scale=Scale.of([0.0, max(largest, 1e-9)], HUE),
            labels=roles,
            tooltips=tooltips,
            neutral=[False] * len(roles),
            strong=[role.endswith("subject") for role in roles],
            x_label="layer",
            unit="share of all that was written",
            name=f"Where the change writes: {name}",
        )
        charts.append(join(tag("h4", name[0].upper() + name[1:]), drawing))
    outside = [OUTSIDE[name] for name, layer in found.written if layer is None]
    whole = found.whole()
    caption = (
        f"Each component of the changed model is given what the unedited model's own is given, over {facts}; colour: "
        "its share of the whole squared change. "
        + (f"Also written: {', '.join(outside)}, which can't be silenced. " if outside else "")
        + (
            "No set of cells takes out all of it from the subject on."
            if whole is None
            else f"All of it goes with {_count(len(whole))} silenced."
        )
    )
    return tag("figure", *charts, tag("figcaption", caption))


def _count(cells: int) -> str:
    return "one cell" if cells == 1 else f"{cells} cells"
