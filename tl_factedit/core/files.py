"""Tensors with a JSON header in one safetensors file, whose damage is noticed.

A file is written beside its place and moved there, so that a kill leaves the old one or the new one. What is read is
checked against its checksum, and then against what the reader expects: `opened` names the file in every error.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_factedit.core.kinds import short
from tl_factedit.core.typed import fitting, made

FORMAT = "1"

STALE = 3600.0
"""Seconds after which a draft is taken to be left by a process that was killed."""

T = TypeVar("T")


def pinned(path: str | Path) -> Path:
    """The absolute path, to be taken at the start of a call: a change of folder in mid-run doesn't move it."""
    return Path(path).expanduser().absolute()


def pinned_folder(path: str | Path, name: str = "folder") -> Path:
    """The absolute path of a folder, which need not be there.

    Raises:
        ValueError: It is a file, or no path at all.
    """
    if not isinstance(path, (str, Path)):
        raise ValueError(f"{name} is {short(path)}, a {type(path).__name__}: needed a path")
    found = pinned(path)
    if found.exists() and not found.is_dir():
        raise ValueError(f"{name} {found} is a file, needed a folder (it is made if it isn't there)")
    return found


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A draft that takes the place of a file in one move, once it is written and on the disk.

    Its mode is that of the file that it replaces, or the umask's. Through a symbolic link its target is written,
    and the link stays. A draft that a killed process has left is removed by the next write to the same file.

    Args:
        path: The file; its folder is made.

    Yields:
        The draft's path, in the same folder.

    Raises:
        OSError: It can't be written (a full disk, a folder without permission); the message names the file, and what
            was there is as it was. Something else than a file is there, such as a device, a pipe or a folder.
    """
    path = pinned(path)
    given, path = path, _target(path)
    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_drafts(path)
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)  # safetensors makes files that only their owner can read
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            draft.chmod(stat.S_IMODE(path.stat().st_mode))
        draft.replace(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"it can't be written ({why}); what was there is as it was", str(given)) from error
    finally:
        draft.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The file that a path is to be written to: behind symbolic links, and not another kind of thing.

    Raises:
        OSError: A device, a pipe, a folder … is there, or links lead in a circle.
    """
    try:
        found = path.resolve() if path.is_symlink() else path
        mode = found.stat().st_mode if found.exists() else None
    except (OSError, RuntimeError) as error:  # in Python 3.12 and before a circle of links is the latter
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", errno.ELOOP), f"it can't be written ({why})", str(path)) from error
    if mode is not None and not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        what = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or the like"
        raise OSError(number, f"it can't be written (it is {what}, needed the path of a file)", str(path))
    return found


def _remove_stale_drafts(path: Path) -> None:
    for draft in path.parent.glob(f".{_literal(path.name[:200])}.{'[0-9a-f]' * 16}.draft"):
        try:
            if time.time() - draft.stat().st_mtime > STALE:
                draft.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def _literal(name: str) -> str:
    """A name in which no character is special to ``glob``."""
    return re.sub(r"([*?[])", r"[\1]", name)


def check_replaceable(path: Path, what: str, begins: Callable[[bytes], bool], how: str) -> None:
    """Check that what stands at a path may be replaced: nothing, an empty file, or one of the same kind.

    Args:
        path: Where something is to be written.
        what: What is to be written, in words.
        begins: Whether the first bytes of a file are those of this kind.
        how: What else to do.

    Raises:
        FileExistsError: Something else is there, such as the facts that a trace was made of.
    """
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            head = file.read(64)
        if not begins(head):
            raise FileExistsError(
                errno.EEXIST, f"a file that isn't {what} is there, and isn't replaced: {how}", str(path)
            )


def write(path: Path, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file in one move: a kill leaves either the old file or the new one.

    Args:
        path: The file.
        what: The kind of content, checked again by `read`.
        header: Plain data; scalars of numpy and torch will do.
        tensors: Named tensors.

    Raises:
        FileExistsError: A file of another kind is there, such as the edit that a verdict is of.
        OSError: It can't be written, e.g. as the disk is full; the old file is as it was.
    """
    check_replaceable(
        pinned(path), f"a file with {what}", lambda head: _may_hold(path, head, what), "give another path, or remove it"
    )
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, default=plain_number)
    metadata = {"format": FORMAT, "what": what, "header": text, "sha256": digest(what, text, kept)}
    with replacing(path) as draft:
        try:
            save_file(kept, draft, metadata=metadata)
        except SafetensorError as error:
            raise as_os_error(error) from error


def _may_hold(path: Path, head: bytes, what: str) -> bool:
    """Whether a file is a safetensors file that holds a kind of content, or that was cut short or damaged."""
    if head[8:9] != b"{":
        return False
    try:
        with safe_open(pinned(path), framework="pt") as file:
            return (file.metadata() or {}).get("what") == what
    except SafetensorError:
        return True


def as_os_error(error: SafetensorError, path: Path | None = None) -> OSError:
    """What safetensors says of a file that it can't write, as Python says it."""
    number = re.search(r"os error (\d+)", str(error))
    where = () if path is None else (str(path),)
    return OSError(int(number[1]) if number else errno.EIO, str(error), *where)


def read(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file made by `write`.

    Raises:
        FileNotFoundError: No such file.
        OSError: It can't be read (no permission, a broken disk): it may be whole.
        ValueError: The file is cut short, changed, or of another kind. It is left as it is.
    """
    path = pinned(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, needed a file with {what}")
    with path.open("rb") as file:  # unreadable isn't damaged
        begin = file.read(64)
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is the pointer that git-lfs leaves for a file, needed the file: run git lfs pull")
    if len(begin) < 8:
        raise ValueError(f"{path} is cut short or no safetensors file ({len(begin)} bytes): make it again")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}): make it again") from error
    if meta.get("format") != FORMAT or meta.get("what") != what:
        other = f" of format {meta['format']}" if meta.get("format", FORMAT) != FORMAT else ""
        raise ValueError(
            f"{path} holds {meta.get('what', 'something else')!r}{other}, needed {what!r} of format {FORMAT}"
        )
    if meta.get("sha256") != digest(what, meta.get("header", ""), tensors):
        raise ValueError(f"{path} was changed since it was written (its checksum differs): make it again")
    return json.loads(meta["header"]), tensors


class Content:
    """Header and tensors of a file, each taken with what it has to be.

    Attributes:
        path: The file.
        header: Plain data.
        tensors: By name.
        sizes: Lengths of the axes that are known so far, by name.
    """

    def __init__(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.header, self.tensors = path, header, tensors
        self.sizes: dict[str, int] = {}

    def field(self, name: str, kind: Any) -> Any:
        """A value of the header, if it is what a class or another annotation says (see `fitting`)."""
        return fitting(self.header[name], kind, name, plain=True)

    def fields(self, name: str, kind: Any) -> list[Any]:
        """A list of the header whose values are all what an annotation says."""
        return [fitting(value, kind, f"{name}[{i}]", plain=True) for i, value in enumerate(self.field(name, list))]

    def made(self, name: str, kind: type[T], *, missing: Collection[str] = ()) -> T:
        """A value of a dataclass that the header has as a dict, all of whose fields are checked."""
        return made(kind, self.field(name, dict), name, plain=True, missing=missing)

    def all_made(self, name: str, kind: type[T], *, missing: Collection[str] = ()) -> tuple[T, ...]:
        """Values of a dataclass that the header has as a list of dicts."""
        return tuple(
            made(kind, each, f"{name}[{i}]", plain=True, missing=missing)
            for i, each in enumerate(self.fields(name, dict))
        )

    def tensor(self, name: str, axes: str, *, dtype: torch.dtype | None = None, missing: bool = False) -> Tensor:
        """A tensor, if its axes are as long as they are elsewhere in the file.

        Args:
            name: Its name.
            axes: Names of its axes, such as ``"fact d_mlp"``, or numbers; ``"…"`` for any further ones.
            dtype: Its type; None for any floating one.
            missing: Whether NaN stands for a missing value in it. Otherwise all has to be finite.

        Raises:
            ValueError: There is no such tensor, or it has other axes, another type, or is not finite.
        """
        if name not in self.tensors:
            raise ValueError(f"it has no tensor {name!r}")
        found = self.tensors[name]
        names = axes.split()
        shape = tuple(found.shape)
        if names[-1:] == ["…"]:
            names, shape = names[:-1], shape[: len(names) - 1]
        wanted = [int(axis) if axis.isdigit() else self.sizes.get(axis) for axis in names]
        if len(shape) != len(names) or any(w not in (None, n) for w, n in zip(wanted, shape, strict=True)):
            said = ", ".join(
                axis if size is None else f"{axis} = {size}" for axis, size in zip(names, wanted, strict=True)
            )
            raise ValueError(f"tensor {name!r} is {tuple(found.shape)}, needed [{said}]")
        self.sizes |= {axis: size for axis, size in zip(names, shape, strict=True) if not axis.isdigit()}
        if found.dtype != dtype if dtype is not None else not found.is_floating_point():
            raise ValueError(f"tensor {name!r} is of {found.dtype}, needed {dtype or 'a floating type'}")
        if found.is_floating_point() and bool((found.isinf() if missing else ~found.isfinite()).any()):
            raise ValueError(
                f"tensor {name!r} holds {'infinite numbers' if missing else 'numbers that are not finite'}"
            )
        return found


@contextmanager
def opened(path: str | Path, what: str) -> Iterator[Content]:
    """The content of a file made by `write`, for as long as a value is made of it.

    Raises:
        FileNotFoundError: No such file.
        OSError: It can't be read.
        ValueError: As `read`; or its content isn't what is made of it, though its checksum is right. The message names
            the file and what is wrong.
    """
    path = pinned(path)
    header, tensors = read(path, what)
    try:
        yield Content(path, header, tensors)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} doesn't hold a valid {what} ({why}): another version or program may have written it; make it again"
        ) from error


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
        found.update(tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().data)
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


def decode(data: Any, name: str, tensors: Mapping[str, Tensor], kinds: Sequence[type]) -> Any:
    """Back from `encode`; lists come back as tuples, and what a field holds is checked against its annotation.

    Raises:
        ValueError: It isn't what `encode` writes; the message names it.
    """
    if isinstance(data, list):
        return tuple(decode(each, f"{name}[{i}]", tensors, kinds) for i, each in enumerate(data))
    if not isinstance(data, dict):
        return data
    if set(data) == {"tensor"}:
        if data["tensor"] not in tensors:
            raise ValueError(f"{name} has no tensor {data['tensor']!r}")
        return tensors[data["tensor"]]
    if set(data) == {"text"}:
        return Unknown(fitting(data["text"], str, f"the text of {name}"))
    known = {kind.__name__: kind for kind in kinds}
    if set(data) != {"kind", "fields"}:
        raise ValueError(f"{name} is {short(data)}, needed its kind and fields")
    if data["kind"] not in known:
        raise ValueError(
            f"the kind of {name} is {data['kind']!r}, needed one of {sorted(known)}: a newer version wrote it"
        )
    kind, held = known[data["kind"]], fitting(data["fields"], dict, f"the fields of {name}")
    left_out = [field.name for field in dataclasses.fields(kind) if not field.repr]
    fields = {key: decode(each, f"{name}.{key}", tensors, kinds) for key, each in held.items()}
    return made(kind, fields, name, missing=left_out)
