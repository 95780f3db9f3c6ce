"""The numbers, switches, texts and words of settings: what their annotations say, checked as a value is made.

One check for all frozen dataclasses of settings: a field that is annotated as a number, a bool, text or some words (or
a list of such) is refused by name if it is something else, a text in place of a number, NaN or None, before anything is
run.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin

from tl_factedit.core.kinds import as_whole, short
from tl_factedit.core.typed import hints_of


def check_settings(
    settings: Any, *, least: Mapping[str, int] | None = None, above: Mapping[str, int] | None = None
) -> None:
    """Check the fields that are annotated as ``int``, ``float``, ``bool``, ``str`` or ``Literal``, or a list of such.

    None may be allowed beside them. Integers of any kind become plain ones, and lists tuples. Infinity passes where no
    bound forbids it, NaN never.

    Args:
        settings: A value of a dataclass, in its ``__post_init__``.
        least: The least that a field, or each in a list, may be, by name.
        above: What a field, or each in a list, has to be more than, by name.

    Raises:
        ValueError: A field is of another kind, too small, or NaN; the message names it.
    """
    least, above = least or {}, above or {}
    for name, hint in hints_of(type(settings)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        given = getattr(settings, name)
        rest = [kind for kind in kinds if kind is not type(None)]
        if given is None and len(rest) < len(kinds):
            continue
        kind = _meant(given, rest)
        or_none = ", or None" if len(rest) < len(kinds) else ""
        if get_origin(kind) is Sequence:
            found: Any = _several(given, get_args(kind)[0], name, least.get(name), above.get(name), or_none)
        else:
            found = _checked(given, kind, name, least.get(name), above.get(name), or_none)
        object.__setattr__(settings, name, found)


def _meant(given: Any, kinds: Sequence[Any]) -> Any:
    """Which of some kinds is meant: of one thing or several, that which has as many; None where it can't be told."""
    several = [kind for kind in kinds if get_origin(kind) is Sequence]
    if several and isinstance(given, Sequence) and not isinstance(given, str):
        return several[0]
    single = [kind for kind in kinds if get_origin(kind) is not Sequence] or several
    return single[0] if len(single) == 1 else None


def _several(given: Any, kind: Any, name: str, least: int | None, above: int | None, or_none: str) -> Any:
    if kind not in (int, float, str) and get_origin(kind) is not Literal:
        return given
    if isinstance(given, str) or not isinstance(given, Sequence):
        write = f": write [{given!r}]" if isinstance(given, (int, float, str)) else ""
        said = f"the string {short(given)}" if isinstance(given, str) else short(given)
        raise ValueError(f"{name} is {said}, needed a list{or_none}{write}")
    return tuple(_checked(each, kind, f"{name}[{i}]", least, above, "") for i, each in enumerate(given))


def _checked(given: Any, kind: Any, name: str, least: int | None, above: int | None, or_none: str) -> Any:
    if kind is int:
        return as_whole(given, name, least, f"a whole number{or_none}")
    if kind is float:
        _check_float(given, name, least, above, or_none)
    elif kind is bool and not isinstance(given, bool):
        raise ValueError(f"{name} is {short(given)}, needed True or False{or_none}")
    elif kind is str and not isinstance(given, str):
        raise ValueError(f"{name} is {short(given)}, a {type(given).__name__}: needed text{or_none}")
    elif get_origin(kind) is Literal and given not in get_args(kind):
        words = " or ".join(map(repr, get_args(kind)))
        raise ValueError(f"{name} {short(given)} is unknown, needed {words}{or_none}")
    return given


def _check_float(given: Any, name: str, least: int | None, above: int | None, or_none: str) -> None:
    needed = "a number" if least is None and above is None else f"{least} or more" if above is None else ""
    needed = needed or f"more than {above}"
    bad = isinstance(given, bool) or not isinstance(given, Real) or math.isnan(given)
    if bad or (least is not None and given < least) or (above is not None and given <= above):
        raise ValueError(f"{name} is {short(given)}, needed {needed}{or_none}")
