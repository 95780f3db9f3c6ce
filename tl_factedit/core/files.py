"""Tensors with a JSON header in one safetensors file, whose damage is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"


def write(path: Path, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file in one move: a kill leaves either the old file or the new one.

    Args:
        path: The file.
        what: The kind of content, checked again by `read`.
        header: Plain data; scalars of numpy and torch will do.
        tensors: Named tensors.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, default=plain_number)
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(
            kept,
            draft,
            metadata={"format": FORMAT, "what": what, "header": text, "sha256": digest(what, text, kept)},
        )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file made by `write`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut short, changed, or of another kind. It is left as it is.
    """
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}): make it again") from error
    if meta.get("format") != FORMAT or meta.get("what") != what:
        raise ValueError(f"{path} holds {meta.get('what', 'something else')!r}, needed {what!r} of format {FORMAT}")
    if meta.get("sha256") != digest(what, meta.get("header", ""), tensors):
        raise ValueError(f"{path} was changed since it was written (its checksum differs): make it again")
    return json.loads(meta["header"]), tensors


def plain_number(value: Any) -> Any:
    """The plain number in a scalar of numpy or torch."""
    if getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"a {type(value).__name__} can't be kept in a file: {value!r}")


def digest(what: str, header: str, tensors: Mapping[str, Tensor]) -> str:
    """Checksum of a header and its tensors."""
    found = hashlib.sha256(f"{what}\n{header}\n".encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


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
