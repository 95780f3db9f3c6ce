"""Numbers of things, in words."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """``"1 fact"``, ``"2 facts"``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
