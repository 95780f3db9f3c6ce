"""Hooks for the length of a block: the one way in which this package puts any up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from tl_factedit.backend.protocol import Hook, HookFn, Model, UnsupportedModelError, hook_points, model_name
from tl_factedit.backend.state import finish_despite_interrupt


@contextmanager
def hooked(model: Model, hooks: Sequence[Hook], points: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Hooks for the length of a ``with`` block; each goes on exit, also on an error, and nobody else's does.

    They are put up and taken down at their hook points: a bridge of TransformerLens 3 looks all its names up anew in
    each ``model.hooks``, for each hook, which takes longer than a short pass.

    Args:
        model: Either class.
        hooks: (place, function) pairs: a TransformerLens hook name, or a module whose output is meant. Functions are
            called as ``fn(value, hook=...)``; what they return, unless it is None, takes the value's place.
        points: The model's ``hook_dict``, where a caller keeps it; None to ask the model.

    Raises:
        UnsupportedModelError: The model has no hook of such a name; nothing is put up.
    """
    if points is None:
        points = hook_points(model) if any(isinstance(place, str) for place, _ in hooks) else {}
    named = [(_point(model, points, place), fn) for place, fn in hooks if isinstance(place, str)]
    own: Any = object()  # a level that is nobody else's: theirs are numbers
    with ExitStack() as stack:
        for place, fn in hooks:
            if not isinstance(place, str):
                handle = place.register_forward_hook(lambda _m, _a, out, fn=fn: fn(out, hook=None))
                stack.callback(handle.remove)
        try:
            for point, fn in named:
                point.add_hook(fn, level=own)
            yield
        finally:

            def take_down() -> None:
                for point, _ in named:
                    point.remove_hooks(level=own)

            finish_despite_interrupt(take_down)


def keepers(places: Sequence[str], kept: dict[str, Tensor]) -> list[Hook]:
    """Hooks that put what passes at some places into `kept`."""

    def keep(name: str) -> HookFn:
        def hook_fn(value: Tensor, hook: Any = None) -> None:
            kept[name] = value.detach().clone()

        return hook_fn

    return [(name, keep(name)) for name in places]


def way_out(places: Sequence[str]) -> str:
    """What to do where hooks are missing, for the end of a message."""
    if any(place.endswith("hook_mlp_out") for place in places):
        return ": blocks of attention alone have no MLP (trace component='attn' or 'resid')"
    if any(place.endswith("hook_resid_mid") for place in places):
        return ": where attention and MLP run side by side nothing lies between them (trace component='resid')"
    return ""


def _point(model: Model, points: Mapping[str, Any], place: str) -> Any:
    if place not in points:
        raise UnsupportedModelError(f"{model_name(model)} has no hook {place!r}{way_out([place])}")
    return points[place]
