"""Editors: values that turn (model, facts) into an `Edit`. One method a file."""

from tl_factedit.editors.router import RoutedEdit

__all__ = [
    "RoutedEdit",
]
