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
from tl_factedit.core.kinds import short
from tl_factedit.core.typed import fitting, made

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
        return fitting(_decoded(file.header["result"], what, file.tensors), kind, what)


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


def _decoded(data: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Back from `_encoded`; what a field holds is checked against its annotation."""
    if isinstance(data, list):
        return [_decoded(each, f"{name}[{i}]", tensors) for i, each in enumerate(data)]
    if not isinstance(data, dict):
        return data
    marks = [mark for mark in MARKS if mark in data]
    if len(marks) != 1 or set(data) != set(MARKS[marks[0]]):
        raise ValueError(f"{name} is {short(data)}, needed a value as `save` writes it")
    mark, held = marks[0], data[marks[0]]
    if mark in ("tensor", "class", "named"):
        fitting(held, str, f"the {mark} of {name}")
    else:
        fitting(held, list, f"the {mark} of {name}")
    if mark == "tensor":
        if held not in tensors:
            raise ValueError(f"{name} has no tensor {held!r}")
        return tensors[held]
    if mark == "range":
        return range(*(fitting(each, int, f"the range of {name}") for each in held))
    if mark == "mapping":
        pairs = [fitting(pair, tuple[Any, Any], f"the mapping of {name}", plain=True) for pair in held]
        return {
            _decoded(key, f"a key of {name}", tensors): _decoded(each, f"{name}[{key!r}]", tensors)
            for key, each in pairs
        }
    if mark in ("tuple", "set"):
        each = [_decoded(one, f"{name}[{i}]", tensors) for i, one in enumerate(held)]
        return tuple(each) if mark == "tuple" else frozenset(each)
    kind = _class(held)
    fields = fitting(
        data["fields" if mark == "class" else "items"], dict if mark == "class" else list, f"the fields of {name}"
    )
    if mark == "named":
        if len(fields) != len(kind._fields):
            raise ValueError(f"{name} has {len(fields)} values, and a {kind.__name__} {len(kind._fields)}")
        fields = dict(zip(kind._fields, fields, strict=True))
    return made(kind, {field: _decoded(each, f"{name}.{field}", tensors) for field, each in fields.items()}, name)


MARKS = {
    "tensor": ("tensor",),
    "tuple": ("tuple",),
    "named": ("named", "items"),
    "range": ("range",),
    "set": ("set",),
    "mapping": ("mapping",),
    "class": ("class", "fields"),
}
"""What tells kinds of values apart in a header, and what else goes with each."""


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
