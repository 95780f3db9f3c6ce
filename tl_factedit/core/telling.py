"""What a call has to say beside its result: a warning at the line that called this package, each thing once a call."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType

_told: ContextVar[set[str] | None] = ContextVar("_told", default=None)
"""What the public call that is running has said; nothing is kept when it ends."""

OURS = {"tl_factedit", contextlib.__name__, "dataclasses", "functools", "jaxtyping", "beartype"}
"""Whose frames stand between a warning and the line of whoever called this package."""


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """The length of a public call, in which one thing is told once; a call may lie in another."""
    if _told.get() is not None:
        yield
        return
    token = _told.set(set())
    try:
        yield
    finally:
        _told.reset(token)


def tell(message: str, category: type[Warning] = UserWarning, *, once: str | None = None) -> None:
    """Warn, at the line of whoever called this package.

    Args:
        message: What to say.
        category: Of the warning.
        once: What it is about: of one thing only the first message in a public call is given; None for the message
            itself.
    """
    told, about = _told.get(), once or message
    if told is not None:
        if about in told:
            return
        told.add(about)
    warnings.warn(message, category, stacklevel=callers_level(inspect.currentframe()))


def callers_level(frame: FrameType | None) -> int:
    """How far up from a frame a warning has to point for the first line of whoever called this package.

    Args:
        frame: Where the warning is given (``inspect.currentframe()``); None where Python can't say: 1.
    """
    level = 1
    while frame and frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    return level
