"""Any result as a file, and as plain data.

A result is a frozen dataclass of this package that holds numbers, text, tensors, tuples, lists, sets, mappings and
other such dataclasses. Its fields are found, not listed: a new one is kept without a line of code, and what a file
can't hold is an error when it is written, which names the field. Files are those of `files`: one move, with a checksum.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tl_factedit.core import files

PACKAGE = __name__.partition(".")[0]
T = TypeVar("T")


def save(result: Any, path: str | Path, what: str) -> None:
    """Write a result into one safetensors file.

    Args:
        result: A dataclass of this package.
        path: The file; its folder is made.
        what: The kind of content, checked again by `load`.

    Raises:
        ValueError: A field holds what a file can't, such as a function or a class of one's own; nothing is written.
        OSError: It can't be written; what was there is as it was.

    Example:
        >>> save(scores, "scores.safetensors", "scores")          # doctest: +SKIP
    """
    tensors: dict[str, Tensor] = {}
    header = {"result": _encoded(result, what, tensors)}
    files.write(files.pinned(path), what, header, tensors)


def load(path: str | Path, what: str, kind: type[T]) -> T:
    """Read a file of `save`; tensors are on the CPU.

    Args:
        path: The file.
        what: The kind of content.
        kind: The class of the result.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut short or changed, holds another kind of thing, or what it holds doesn't fit
            together; the message names it.
    """
    with files.opened(path, what) as file:
        found = _decoded(file.header["result"], file.tensors)
        return files.of_kind(found, kind, "the result")


def as_plain(value: Any, name: str = "it") -> Any:
    """A result as plain data that `json` can write: dataclasses as dicts, tensors as nested lists; NaN stays NaN.

    Raises:
        ValueError: A field holds what plain data can't; the message names it.
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if _is_result(value):
        return {field: as_plain(each, f"{name}.{field}") for field, each in _fields(value).items()}
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else str(key): as_plain(each, f"{name}[{key!r}]") for key, each in value.items()
        }
    if isinstance(value, AbstractSet):
        return [as_plain(each, name) for each in sorted(value, key=repr)]
    if isinstance(value, tuple | list | range):
        return [as_plain(each, f"{name}[{i}]") for i, each in enumerate(value)]
    return _number_or_text(value, name)


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data from which `_decoded` makes the value again; tensors are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()  # a copy: a file can't hold two tensors that share memory
        return {"tensor": name}
    if _is_result(value):
        fields = {field: _encoded(each, f"{name}.{field}", tensors) for field, each in _fields(value).items()}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "fields": fields}
    if isinstance(value, Mapping):
        return {
            "mapping": [
                [_encoded(key, f"a key of {name}", tensors), _encoded(each, f"{name}[{key!r}]", tensors)]
                for key, each in value.items()
            ]
        }
    if isinstance(value, AbstractSet):
        return {"set": [_encoded(each, f"an element of {name}", tensors) for each in sorted(value, key=repr)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, tuple) and hasattr(value, "_fields") and _is_ours(value):
        items = [_encoded(each, f"{name}.{field}", tensors) for field, each in value._asdict().items()]  # type: ignore[attr-defined]
        return {"named": f"{type(value).__module__}.{type(value).__qualname__}", "items": items}
    if isinstance(value, tuple | list):
        found = [_encoded(each, f"{name}[{i}]", tensors) for i, each in enumerate(value)]
        return {"tuple": found} if isinstance(value, tuple) else found
    return _number_or_text(value, name)


def _decoded(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_decoded(each, tensors) for each in data]
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return tensors[data["tensor"]]
    if "tuple" in data:
        return tuple(_decoded(each, tensors) for each in data["tuple"])
    if "named" in data:
        return _class(data["named"])(*(_decoded(each, tensors) for each in data["items"]))
    if "range" in data:
        return range(*data["range"])
    if "set" in data:
        return frozenset(_decoded(each, tensors) for each in data["set"])
    if "mapping" in data:
        return {_decoded(key, tensors): _decoded(each, tensors) for key, each in data["mapping"]}
    return _class(data["class"])(**{name: _decoded(each, tensors) for name, each in data["fields"].items()})


def _class(name: str) -> Any:
    """A dataclass or a named tuple of this package by its full name; nothing else is taken from a file."""
    module, _, short = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), short) if module.startswith(f"{PACKAGE}.") else None
    except (ImportError, AttributeError):
        found = None
    known = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))
    if not known or found.__module__ != module:
        raise ValueError(f"it holds a {name}, which this version of {PACKAGE} doesn't have")
    return found


def _is_result(value: Any) -> bool:
    """Whether it is a value of a dataclass that `_class` finds again."""
    return dataclasses.is_dataclass(value) and _is_ours(value)


def _is_ours(value: Any) -> bool:
    """Whether its class is one of this package's, at the top of a module."""
    kind = type(value)
    return kind.__module__.startswith(f"{PACKAGE}.") and "." not in kind.__qualname__


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}


def _number_or_text(value: Any, name: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()  # a scalar of numpy
    raise ValueError(
        f"{name} is {value!r}, a {type(value).__module__}.{type(value).__qualname__}, which a file can't hold: needed "
        f"numbers, text, tensors, tuples, lists, ranges, sets, mappings, or dataclasses of {PACKAGE}"
    )
