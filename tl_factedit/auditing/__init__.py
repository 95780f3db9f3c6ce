"""From measurements to a verdict."""

from tl_factedit.auditing.retained import Retention, retention

__all__ = [
    "Retention",
    "retention",
]
