"""What a file can tell a function of a user by: its code, and all that its code refers to."""

from __future__ import annotations

import builtins
import dis
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice)
OF_TORCH = (torch.dtype, torch.device)
INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""What lies there changes with its version, and not from one call to the next."""


def identity_of(value: Any, name: str, seen: tuple[int, ...] = ()) -> str:
    """What tells a value from others, in text: equal for equal values only, in this process and in the next.

    Args:
        value: Plain data, tensors, functions, or what an installed package has.
        name: What it is called where it is used, for the message.
        seen: Ids of the functions that it is found on the way through.

    Raises:
        ValueError: Two of its kind can't be told apart; the message names it.
    """
    if isinstance(value, PLAIN + OF_TORCH):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        bits = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return f"tensor {plain.dtype} {tuple(plain.shape)} {hashlib.sha256(bits).hexdigest()}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} {[identity_of(each, f'{name}[{i}]', seen) for i, each in enumerate(value)]}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} {sorted(identity_of(each, name, seen) for each in value)}"
    if isinstance(value, Mapping):
        each = [(identity_of(k, name, seen), identity_of(v, f"{name}[{k!r}]", seen)) for k, v in value.items()]
        return f"{type(value).__name__} {each}"
    if isinstance(value, ModuleType) and _is_installed(value.__name__):
        return f"module {value.__name__}"
    owner = getattr(value, "__self__", None)  # of what is written in C: a module, or a class
    where = getattr(value, "__module__", None) or getattr(owner, "__module__", None) or getattr(owner, "__name__", None)
    if isinstance(where, str) and hasattr(value, "__name__") and _is_installed(where):
        return f"{where}.{getattr(value, '__qualname__', value.__name__)}"
    if isinstance(value, FunctionType):
        return _of_function(value, seen)
    raise ValueError(
        f"{name} is a {type(value).__name__}, of which a file can't tell one from another, and the metric refers to "
        "it: needed plain functions, numbers, text or tensors, or no folder"
    )


def _of_function(function: FunctionType, seen: tuple[int, ...]) -> str:
    if id(function) in seen:
        return f"itself {seen.index(id(function))}"
    seen = (*seen, id(function))
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    refers: dict[str, Any] = {
        **{name: cell.cell_contents for name, cell in held.items() if not _is_empty(cell)},
        **dict(_globals_of(function.__code__, function.__globals__)),
        "its defaults": function.__defaults__,
        "its keyword defaults": function.__kwdefaults__,
    }
    said = {name: identity_of(value, name, seen) for name, value in sorted(refers.items())}
    return f"{function.__qualname__} {_code(function.__code__)} {said}"


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _globals_of(code: CodeType, space: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a code's global names refer to, through the modules among them to what it takes of these."""
    found: Any = None
    path = ""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
            if isinstance(found, ModuleType):
                yield path, found
            path, found = str(step.argval), None
            if step.opname == "IMPORT_NAME":
                found = sys.modules.get(path)
                if found is None and not _is_installed(path):
                    raise ValueError(f"the metric imports {path} itself, needed that at the head of its file")
            elif path in space:
                found = space[path]
            elif not hasattr(builtins, path):
                continue  # an error when it is run
            if found is not None and not isinstance(found, ModuleType):
                yield path, found
        elif isinstance(found, ModuleType) and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            path, found = f"{path}.{step.argval}", getattr(found, str(step.argval), None)
            if found is not None and not isinstance(found, ModuleType):
                yield path, found
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL", "PUSH_NULL"):
            if isinstance(found, ModuleType):
                yield path, found
            found = None
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _globals_of(const, space)


def _is_installed(module: str) -> bool:
    """Whether a module comes with Python or a package: not from a file of the user's own."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return True
    if top == __name__.split(".")[0]:
        return True
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    files = [Path(place).resolve() for place in places if place is not None]
    return any(file.is_relative_to(root) for file in files for root in INSTALLED)


def _code(code: CodeType) -> str:
    """What a function does, whatever file and line it stands in."""
    consts = [_code(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {consts}"
