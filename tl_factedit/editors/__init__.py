"""One method a file. The editors themselves stand in `fe`: `fe.Rome`, `fe.Memit` and others."""

from tl_factedit.core.namespaces import shows
from tl_factedit.editing.routed_edit import RoutedEdit

__all__ = [
    "RoutedEdit",
]

__dir__ = shows(__all__)
