"""Pictures are of results: what is given instead is refused with what to do."""

from __future__ import annotations

from tl_factedit.core.facts import Fact


def check_kind(given: object, kind: type, how: str) -> None:
    """Check that a picture is given the kind of result that it shows.

    Args:
        given: What is given.
        kind: The class that is needed.
        how: How to get one.

    Raises:
        TypeError: It is of another class.
    """
    if not isinstance(given, kind):
        what = "facts" if _facts(given) else f"a {type(given).__name__}"
        raise TypeError(f"{what} can't be shown here, needed a {kind.__name__}: {how}")


def _facts(given: object) -> bool:
    return isinstance(given, Fact) or (isinstance(given, (list, tuple)) and any(isinstance(one, Fact) for one in given))
