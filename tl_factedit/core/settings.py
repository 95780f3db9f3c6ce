"""The numbers, switches and words of settings: what their annotations say, checked as a value is made.

One check for all frozen dataclasses of settings: a field that is annotated as a number, a bool or some words is refused
by name if it is something else, a text in place of a number, NaN or None, before anything is run.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin

from tl_factedit.core.kinds import as_whole, short
from tl_factedit.core.typed import hints_of


def check_settings(
    settings: Any, *, least: Mapping[str, int] | None = None, above: Mapping[str, int] | None = None
) -> None:
    """Check the fields of a dataclass that are annotated as ``int``, ``float``, ``bool`` or ``Literal`` (or None).

    Integers of any kind become plain ones. Infinity passes where no bound forbids it, NaN never.

    Args:
        settings: A value of a dataclass, in its ``__post_init__``.
        least: The least that a field may be, by name.
        above: What a field has to be more than, by name.

    Raises:
        ValueError: A field is of another kind, too small, or NaN; the message names it.
    """
    least, above = least or {}, above or {}
    for name, hint in hints_of(type(settings)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        given = getattr(settings, name)
        rest = [kind for kind in kinds if kind is not type(None)]
        if len(rest) != 1 or (given is None and len(rest) < len(kinds)):
            continue
        or_none = ", or None" if len(rest) < len(kinds) else ""
        if rest[0] is int:
            bound = least.get(name)
            number = as_whole(given, name, bound, f"a whole number{or_none}")
            object.__setattr__(settings, name, number)
        elif rest[0] is float:
            _check_float(given, name, least.get(name), above.get(name), or_none)
        elif rest[0] is bool and not isinstance(given, bool):
            raise ValueError(f"{name} is {short(given)}, needed True or False{or_none}")
        elif get_origin(rest[0]) is Literal and given not in get_args(rest[0]):
            words = " or ".join(map(repr, get_args(rest[0])))
            raise ValueError(f"{name} {short(given)} is unknown, needed {words}{or_none}")


def _check_float(given: Any, name: str, least: int | None, above: int | None, or_none: str) -> None:
    needed = "a number" if least is None and above is None else f"{least} or more" if above is None else ""
    needed = needed or f"more than {above}"
    bad = isinstance(given, bool) or not isinstance(given, Real) or math.isnan(given)
    if bad or (least is not None and given < least) or (above is not None and given <= above):
        raise ValueError(f"{name} is {short(given)}, needed {needed}{or_none}")
