"""What is given has to be of the kind that is needed: refused by name, before anything is run."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def short(value: Any) -> str:
    """A value as it is written, cut to less than a line."""
    line, *more = repr(value).splitlines() or [""]
    return line if len(line) < 80 and not more else line[:77] + "…"


def check_one(given: object, kind: type, name: str, how: str) -> None:
    """Check that a value is of a class (or protocol), and not that class itself.

    Args:
        given: What is given.
        kind: What is needed.
        name: The argument's name.
        how: What to give.

    Raises:
        ValueError: It is of another class.
    """
    if isinstance(given, type):
        raise ValueError(f"{name} is the class {given.__name__}, needed a value: {how}")
    if not isinstance(given, kind):
        raise ValueError(f"{name} is {short(given)}, a {type(given).__name__}: needed {how}")


def as_several(given: Iterable[T], kind: type[T], name: str, how: str) -> tuple[T, ...]:
    """Some values of a class, as a tuple; one text isn't some texts.

    Raises:
        ValueError: It is no list, or a value in it is of another class; the message says which.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"{name} is {short(given)}, a {type(given).__name__}: needed a list, each {how}")
    found = tuple(given)
    for i, each in enumerate(found):
        check_one(each, kind, f"{name}[{i}]", how)
    return found


def as_whole(given: Any, name: str, least: int | None = 1, what: str = "a whole number") -> int:
    """A whole number of any kind of integer.

    Raises:
        ValueError: It is none (True and 2.0 aren't), or is too small.
    """
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        needed = what if least is None else f"at least {least} ({what})"
        raise ValueError(f"{name} is {short(given)}, needed {needed}")
    return number


def check_flags(**given: object) -> None:
    """Check that switches are True or False: what only counts as one, such as ``"no"``, would turn something on.

    Raises:
        ValueError: One is something else; the message names it.
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {short(value)}, needed True or False")


def as_finite(given: Any, name: str, what: str = "a finite number") -> float:
    """A finite number.

    Raises:
        ValueError: It is none, such as a text or NaN.
    """
    try:
        number = math.nan if isinstance(given, (str, bytes, bool)) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {short(given)}, needed {what}")
    return number
