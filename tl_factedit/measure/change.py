"""A change of a model, in any of three forms.

    one change for all facts      Edit, RoutedEdit, anything with .applied(model)
    a change for each fact        a list of them, each applied alone
    another model                 fine-tuned, retrained, edited elsewhere

`measure.population` goes through all three in one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.facts import Fact


@runtime_checkable
class Change(Protocol):
    """Anything that can be laid on a model and taken off again: an `Edit`, a router."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What it was made for."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it changes, ascending."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Of the model it was made on, with its BOS policy."""
        ...

    def applied(self, model: Model) -> AbstractContextManager[Model]:
        """The changed model for the length of a ``with`` block; weights and hooks as before afterwards."""
        ...


@runtime_checkable
class Digested(Protocol):
    """A change that can be told from others: an `Edit`, a router."""

    @property
    def digest(self) -> str:
        """Equal for equal changes only."""
        ...


Changed: TypeAlias = Change | Sequence[Change] | Model
"""One change for all facts, a change for each, or another model."""
