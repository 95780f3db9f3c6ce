"""What ``dir()`` shows of a namespace: its public names, and nothing of how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def shows(names: Sequence[str]) -> Callable[[], list[str]]:
    """A module's ``__dir__`` that shows these names alone; whatever else it holds can still be imported.

    Args:
        names: The module's ``__all__``.
    """

    def listed() -> list[str]:
        return sorted(names)

    return listed
