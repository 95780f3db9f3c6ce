"""Where a warning points: to the first line of whoever called this package."""

from __future__ import annotations

import contextlib
from types import FrameType


def callers_level(frame: FrameType | None) -> int:
    """How far up from a frame a warning has to point for the first line of whoever called this package.

    Args:
        frame: Where the warning is given (``inspect.currentframe()``); None where Python can't say: 1.
    """
    level = 1
    ours = {"tl_factedit", contextlib.__name__, "jaxtyping"}
    while frame and frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in ours:
        level, frame = level + 1, frame.f_back
    return level
