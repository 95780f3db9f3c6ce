"""Cells: where something can be silenced, or was written: a component of a block, at some tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

Silenceable: TypeAlias = Literal["mlp", "attn"]
"""What a block adds to the residual stream."""

Place: TypeAlias = Literal["subject", "last", "all"]
"""The last subject token; the last token of the prompt; every token from the subject's first on."""

COMPONENTS: tuple[Silenceable, ...] = ("mlp", "attn")
PLACES: tuple[Place, ...] = ("subject", "last", "all")


class Cell(NamedTuple):
    """One component of one block, at one place.

    Attributes:
        component: ``"mlp"`` or ``"attn"``.
        layer: The block, from 0 on.
        place: ``"subject"`` (its last token), ``"last"`` (of the prompt), ``"all"`` (every token from the subject's
            first on).
    """

    component: Silenceable
    layer: int
    place: Place


Cells: TypeAlias = tuple[Cell, ...]
"""Silenced together; none: nothing is."""

Window: TypeAlias = tuple[int, ...]
"""Neighbouring layers."""


def positions(place: Place, subject: tuple[int, int], length: int) -> range:
    """The positions that a place means in a prompt.

    Args:
        place: See `Place`.
        subject: (start, stop) of the subject.
        length: Length of the prompt, in tokens.
    """
    start, stop = subject
    return {"subject": range(stop - 1, stop), "last": range(length - 1, length), "all": range(start, length)}[place]


def in_order(cells: Iterable[Cell]) -> Cells:
    """Each once, sorted by layer, component and place."""
    return tuple(sorted(set(cells), key=lambda cell: (cell.layer, cell.component, PLACES.index(cell.place))))


def singles_of(
    layers: int, components: Sequence[Silenceable], places: Sequence[Place], widths: Sequence[int]
) -> list[Cells]:
    """Each component at each place, of each window of layers.

    Raises:
        ValueError: An unknown component or place; a width that the model hasn't got layers for.
    """
    for given, known, what in ((components, COMPONENTS, "component"), (places, PLACES, "place")):
        for name in given:
            if name not in known:
                raise ValueError(f"{what} {name!r} is unknown, needed one of {known}")
    return [
        in_order(Cell(component, layer, place) for layer in window)
        for component in components
        for place in places
        for window in windows_of(layers, widths)
    ]


def windows_of(layers: int, widths: Sequence[int]) -> tuple[Window, ...]:
    """All windows of neighbouring layers of these widths, whole ones only, narrow ones first."""
    if not widths or min(widths) < 1 or max(widths) > layers:
        raise ValueError(f"widths are {tuple(widths)}, needed some between 1 and the model's {layers} layers")
    return tuple(
        tuple(range(start, start + width)) for width in sorted(set(widths)) for start in range(layers - width + 1)
    )


def describe(cells: Sequence[Cell]) -> str:
    """In words: "MLP of layer 5 at the subject", "attention and MLPs of layers 2 to 4 from the subject on"."""
    if not cells:
        return "nothing"
    by_place: dict[Place, list[Cell]] = {}
    for cell in in_order(cells):
        by_place.setdefault(cell.place, []).append(cell)
    where = {"subject": "at the subject", "last": "at the last token", "all": "from the subject on"}
    return " and ".join(f"{_components(here)} {where[place]}" for place, here in by_place.items())


def _components(cells: Sequence[Cell]) -> str:
    layers = {name: tuple(cell.layer for cell in cells if cell.component == name) for name in COMPONENTS}
    if layers["mlp"] == layers["attn"]:
        return f"attention and MLP{'s' * (len(layers['mlp']) > 1)} of {_layers(layers['mlp'])}"
    names = {"mlp": "MLP", "attn": "attention"}
    return " and ".join(
        f"{names[name]}{'s' * (len(here) > 1 and name == 'mlp')} of {_layers(here)}"
        for name, here in layers.items()
        if here
    )


def _layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
