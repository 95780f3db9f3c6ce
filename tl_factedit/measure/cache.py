"""What is read of each changed model of a population, kept in a folder: a call that was killed goes on from there.

A file is named after all that its content hangs on: what was asked and how, the unedited model's weights, the change,
and versions. So a folder can hold any number of measurements, a population that grew is only asked what is new, and
nothing is ever taken for something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.protocol import Model, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.state import carries_hooks, frozen
from tl_factedit.core import files
from tl_factedit.measure.change import Change
from tl_factedit.measure.population import Part

T = TypeVar("T")


@runtime_checkable
class Digested(Protocol):
    """A change that can be told from others: an `Edit`, a router."""

    @property
    def digest(self) -> str:
        """Equal for equal changes only."""
        ...


def read_each(
    parts: Sequence[Part],
    read: Callable[[Model, Part], T],
    *,
    what: str,
    asked: Mapping[str, Any],
    folder: str | Path | None = None,
    kinds: Sequence[type] = (),
    progress: bool = True,
) -> Iterator[tuple[Part, T]]:
    """Apply each part's change and read its model, or find in the folder what was read before.

    Args:
        parts: Of `change.each`.
        read: From the changed model and the part to tensors, numbers, text, tuples of these, or values of `kinds`. It
            is called without gradients, inside `frozen`.
        what: Of the measurement, in words that can be a file's name.
        asked: Everything else the reading hangs on, as plain data (the part's facts and change needn't be in it).
        folder: Where to keep what was read; None: nowhere.
        kinds: The dataclasses of this package that `read` may return.
        progress: Whether to show a bar where there are several parts and it takes longer than a second.

    Yields:
        Each part with its reading, in order.

    Raises:
        ValueError: A folder, and a change that can't be told from others; a file in it that was changed or cut short.
    """
    check_keepable(parts, folder)
    base = None if folder is None or not parts else Provenance.of(parts[0].unedited).to_json()
    for part in tqdm(parts, desc=what, unit="change", delay=1, disable=not progress or len(parts) == 1, leave=False):
        path = None
        if folder is not None:
            path = Path(folder).expanduser() / f"{what.replace(' ', '-')}-{_digest(part, base, asked)}.safetensors"
            if path.exists():
                header, tensors = files.read(path, what)
                yield part, files.decode(header["read"], tensors, kinds)
                continue
        with part.applied() as model, frozen(model), torch.no_grad():
            found = read(model, part)
        if path is not None:
            named: dict[str, Tensor] = {}
            files.write(path, what, {"read": files.encode(found, "read", named, kinds)}, named)
        yield part, found


def check_keepable(parts: Sequence[Part], folder: str | Path | None) -> None:
    """See that what is read of each change can be kept, if it is to be; nothing is run.

    Raises:
        ValueError: A folder, and a change that can't be told from others, or a model that carries hooks of its own.
    """
    if folder is None:
        return
    for part in parts:
        if isinstance(part.changed, Change) and not isinstance(part.changed, Digested):
            raise ValueError(
                f"a {type(part.changed).__name__} has no digest, so that nothing can be kept of it: needed a change "
                "with one (an Edit, a RoutedEdit), or no folder"
            )
    # Each once: a population has one unedited model.
    models = {id(each): each for part in parts for each in (part.unedited, part.changed)}
    for model in models.values():
        if isinstance(model, Model) and carries_hooks(model):
            raise ValueError(
                f"{model_name(model)} carries hooks of its own, which no fingerprint of its weights tells: nothing "
                "can be kept of it, needed no folder (or reset_hooks)"
            )


def _digest(part: Part, base: Any, asked: Mapping[str, Any]) -> str:
    changed = part.changed
    change = changed.digest if isinstance(changed, Digested) else Provenance.of(changed).to_json()  # type: ignore[arg-type]
    facts = [asdict(fact) for fact in part.facts]
    text = json.dumps([facts, change, base, dict(asked)], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
