"""The type checks that tests run under: beartype's, made once for each function.

jaxtyping checks a function by an empty one with the same parameters, which it hands to the type checker wherever a
``def`` is run. A hook is defined anew at each call of its factory, and beartype would write its checks anew each time,
which took a fifth of the time of tests that run hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[Any, Callable] = {}


def checked(empty: Callable) -> Callable:
    """The empty function with its checks: those of an earlier one of the same name and the same annotations, if any."""
    parameters = tuple((p.name, p.kind, p.default is p.empty) for p in inspect.signature(empty).parameters.values())
    key = (empty.__module__, empty.__qualname__, parameters, tuple(empty.__annotations__.items()))
    try:
        found = _made.get(key)
    except TypeError:  # an annotation that can't be hashed
        return beartype(empty)
    if found is None:
        found = _made[key] = beartype(empty)
    return found
