"""Values (frozen dataclasses of numbers, text and tensors) as JSON beside named tensors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A value of a type that isn't this package's, as read from a file: what it said of itself.

    Attributes:
        text: Its ``repr``.
    """

    text: str


def encode(value: Any, name: str, tensors: dict[str, Tensor], kinds: Sequence[type]) -> Any:
    """Plain data for a header; tensors are put into `tensors` under names that begin with `name`.

    Fields that a ``repr`` leaves out are left out here too.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if type(value) in kinds:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.repr}
        kept = {key: encode(each, f"{name}.{key}", tensors, kinds) for key, each in fields.items()}
        return {"kind": type(value).__name__, "fields": kept}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()  # a scalar of numpy
    if isinstance(value, tuple | list):
        return [encode(each, f"{name}.{i}", tensors, kinds) for i, each in enumerate(value)]
    return {"text": repr(value)}


def decode(data: Any, tensors: Mapping[str, Tensor], kinds: Sequence[type]) -> Any:
    """Back from `encode`; lists come back as tuples."""
    if isinstance(data, list):
        return tuple(decode(each, tensors, kinds) for each in data)
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return tensors[data["tensor"]]
    if "text" in data:
        return Unknown(data["text"])
    known = {kind.__name__: kind for kind in kinds}
    if data["kind"] not in known:
        raise ValueError(f"the file holds a {data['kind']}, needed one of {sorted(known)}: a newer version wrote it")
    return known[data["kind"]](**{key: decode(each, tensors, kinds) for key, each in data["fields"].items()})
