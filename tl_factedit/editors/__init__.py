"""Editors: values that turn (model, facts) into an `Edit`. One method a file."""

from tl_factedit.editing.routed_edit import RoutedEdit

__all__ = [
    "RoutedEdit",
]
