"""Whether values are what annotations say: a file may hold anything, and its checksum be right all the same.

The annotations of a dataclass's fields say which kinds, words, shapes and types they may have, so they are what a file
is checked against: a new field is checked without a line of code. Axes of one name are as long throughout a value, and
``"fact"`` is as long as its ``facts``.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, TypeVar, Union

from jaxtyping import AbstractArray
from torch import Tensor

from tl_factedit.core.kinds import short

T = TypeVar("T")

Sizes = dict[str, "int | tuple[int, ...]"]
"""Lengths of axes by name; of a run of axes (``"*row"``) its shape."""

FINITE = "neither NaN nor infinite"
A_NUMBER = "not NaN"

Finite = Annotated[float, FINITE]
"""A number that is neither NaN nor infinite."""

Number = Annotated[float, A_NUMBER]
"""A number that may be infinite, but not NaN."""


def made(
    kind: type[T], given: Mapping[str, Any], name: str, *, plain: bool = False, missing: Collection[str] = ()
) -> T:
    """A value of a dataclass (or named tuple) from its fields, each checked against its annotation.

    Args:
        kind: The class.
        given: The fields by name.
        name: What to call the value in an error.
        plain: They are plain data of JSON: lists stand for tuples, and dicts for dataclasses.
        missing: Fields that may be left out, which files of older versions lack.

    Raises:
        ValueError: A field is missing, unknown or no such thing as its annotation says; the message names it.
    """
    hints = hints_of(kind)
    lacks = [field for field in hints if field not in given and field not in missing]
    if lacks:
        raise ValueError(f"{name} has no {lacks[0]!r}, which a {kind.__name__} needs")
    more = [field for field in given if field not in hints]
    if more:
        raise ValueError(f"{name} has a {more[0]!r}, which no {kind.__name__} has")
    sizes: Sizes = {}
    for field, value in given.items():
        if isinstance(value, tuple | list) and field.endswith("s"):
            sizes[field[:-1]] = len(value)
    found = {
        field: fitting(value, hints[field], f"{name}.{field}", sizes=sizes, plain=plain)
        for field, value in given.items()
    }
    try:
        return kind(**found)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of the fields that a class is made with."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return hints


def fitting(value: Any, annotation: Any, name: str, *, sizes: Sizes | None = None, plain: bool = False) -> Any:
    """The value itself, if it is what an annotation says; plain data is made into it.

    Args:
        value: Anything.
        annotation: A class, or what `typing` and jaxtyping make of some.
        name: What to call the value in an error.
        sizes: Lengths of axes that are known so far, by name; those of this value are added.
        plain: As in `made`.

    Raises:
        ValueError: It isn't; the message names it.
    """
    sizes = {} if sizes is None else sizes
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    down = functools.partial(fitting, sizes=sizes, plain=plain)
    if annotation in (Any, object):
        return value
    if annotation in (None, type(None)):
        return _only(value is None, value, name, "None")
    if origin is Annotated:
        number = down(value, args[0], name)
        wanted = args[1] if args[1] in (FINITE, A_NUMBER) else ""
        bad = number != number or (wanted == FINITE and abs(number) == float("inf"))
        return _only(not (wanted and bad), number, name, f"a number that is {wanted}")
    if origin in (Union, types.UnionType):
        return _one_of(value, args, name, down)
    if origin is Literal:
        known = any(value == each and type(value) is type(each) for each in args)
        return _only(known, value, name, f"one of {', '.join(map(repr, args))}")
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return _array(value, annotation, name, sizes)
    if origin is tuple:
        value = tuple(value) if plain and isinstance(value, list) else value
        _only(isinstance(value, tuple), value, name, "a tuple")
        kinds = args[:1] * len(value) if args[-1:] == (...,) else args
        _only(len(kinds) == len(value), value, name, f"{len(kinds)} values")
        return tuple(down(each, kind, f"{name}[{i}]") for i, (each, kind) in enumerate(zip(value, kinds, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _only(isinstance(value, Mapping), value, name, "a mapping")
        key, item = args
        return {down(k, key, f"a key of {name}"): down(v, item, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(origin, type) and issubclass(origin, AbstractSet):
        _only(isinstance(value, AbstractSet), value, name, "a set")
        return frozenset(down(each, args[0], f"an element of {name}") for each in value)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        _only(isinstance(value, Sequence) and not isinstance(value, str | bytes), value, name, "a list")
        if isinstance(value, range):
            return value
        each = [down(one, args[0], f"{name}[{i}]") for i, one in enumerate(value)]
        return tuple(each) if plain or isinstance(value, tuple) else each
    kind = annotation if origin is None else origin
    if plain and isinstance(value, dict) and dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return made(kind, value, name, plain=True)
    return _of_kind(value, kind, name)


def _of_kind(value: Any, kind: Any, name: str) -> Any:
    if kind is Hashable:
        return _only(isinstance(value, Hashable), value, name, "a name")
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return value  # of which nothing can be told
    good = kind is bool if isinstance(value, bool) else isinstance(value, (int, float) if kind is float else kind)
    return _only(good, value, name, f"a value of type {kind.__name__}")


def _one_of(value: Any, kinds: Sequence[Any], name: str, down: Any) -> Any:
    """A value of a union: the first kind that it is of. What is said is of the one that it is likeliest meant to be."""
    errors: list[ValueError] = []
    for kind in kinds:
        try:
            return down(value, kind, name)
        except ValueError as error:
            errors.append(error)
    deepest = [error for error in errors if not str(error).startswith(f"{name} is ")]
    if deepest and value is not None:
        raise deepest[0]
    needed = " or ".join(dict.fromkeys(str(error).rpartition("needed ")[2] for error in errors))
    raise ValueError(f"{name} is {short(value)}, needed {needed}")


def _array(value: Any, annotation: Any, name: str, sizes: Sizes) -> Any:
    _only(isinstance(value, Tensor), value, name, "a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    dtypes: Any = annotation.dtypes
    if isinstance(dtypes, list | tuple) and dtype not in dtypes:
        raise ValueError(f"{name} is of {value.dtype}, needed {_words(dtypes)}")
    axes, shape = annotation.dim_str.split(), tuple(value.shape)
    said = f"{name} is {shape}, needed [{_axes(axes, sizes)}]"
    at = next((i for i, axis in enumerate(axes) if axis == "..." or axis.startswith("*")), None)
    if at is not None:
        stop = len(shape) - (len(axes) - at - 1)
        if stop < at:
            raise ValueError(said)
        # A run of axes counts as one, whose size is its shape.
        shape = (*shape[:at], shape[at:stop], *shape[stop:])
    known = [int(axis) if axis.isdigit() else sizes.get(axis) for axis in axes]
    if len(axes) != len(shape) or any(k not in (None, n) for k, n in zip(known, shape, strict=True)):
        raise ValueError(said)
    for axis, n in zip(axes, shape, strict=True):
        if not axis.isdigit() and axis not in ("_", "..."):
            sizes[axis] = n
    return value


def _axes(axes: Sequence[str], sizes: Sizes) -> str:
    return ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else axis for axis in axes)


def _words(dtypes: Collection[str]) -> str:
    kinds = {"bool": "bool", "int64": "a type of whole numbers", "float32": "a floating type"}
    return next((said for dtype, said in kinds.items() if dtype in dtypes), " or ".join(sorted(dtypes)))


def _only(good: bool, value: T, name: str, needed: str) -> T:
    if not good:
        raise ValueError(f"{name} is {short(value)}, needed {needed}")
    return value
