"""Results kept in a folder: a call that was killed resumes there.

Each result has a file of its own, named after all that it depends on (what was asked and how, weights, versions), which
also stands inside it. So a folder can hold any number of results, a call that grew is only asked what is new, and
nothing is ever taken for something else, not even where files were renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_factedit.core import files
from tl_factedit.core.kinds import short

SHORT = 16
"""Hexadecimal digits of the name that stand in the file's name; all of them stand in the file."""


@dataclass(frozen=True)
class Cache:
    """Results in a folder.

    Attributes:
        folder: The folder; it is made when the first result is written.
    """

    folder: Path

    @classmethod
    def at(cls, folder: str | Path | None) -> Cache | None:
        """The cache in a folder; None for none. A relative path is pinned to the working directory of now.

        Raises:
            ValueError: It is a file.
        """
        return None if folder is None else cls(files.pinned_folder(folder))

    def find(self, what: str, depends_on: Any, kinds: Sequence[type] = ()) -> tuple[Any] | None:
        """What was kept, in a tuple of one; None if nothing was.

        Args:
            what: The kind of result, in words that can be a file's name.
            depends_on: Everything that decides the result, as plain data.
            kinds: The dataclasses of this package that may be in it.

        Raises:
            ValueError: The file is damaged, or holds another result (it was renamed or copied): it is left as it is.
        """
        check_kinds(kinds)
        name = _name(what, depends_on)
        path = self._path(what, name)
        if not path.exists():
            return None
        with files.opened(path, what) as file:
            theirs, found = file.field("name", str), files.decode(file.header["result"], "result", file.tensors, kinds)
        if theirs != name:
            raise ValueError(
                f"{path} holds another result than its name says, as after renaming or copying files in the folder: "
                "move it away, and it is made again"
            )
        return (found,)

    def keep(self, what: str, depends_on: Any, result: Any, kinds: Sequence[type] = ()) -> None:
        """Write a result: tensors, numbers, text, tuples of these, or values of `kinds`."""
        check_kinds(kinds)
        name, named = _name(what, depends_on), dict[str, Tensor]()
        header: Mapping[str, Any] = {"name": name, "result": files.encode(result, "result", named, kinds)}
        files.write(self._path(what, name), what, header, named)

    def _path(self, what: str, name: str) -> Path:
        return self.folder / f"{what.replace(' ', '-')}-{name[:SHORT]}.safetensors"


def check_kinds(kinds: Any) -> None:
    """Check that kinds of results are dataclasses, in a list.

    Raises:
        ValueError: They aren't.
    """
    if isinstance(kinds, type) or not isinstance(kinds, Sequence):
        write = f": write [{kinds.__name__}]" if isinstance(kinds, type) else ""
        raise ValueError(f"kinds is {short(kinds)}, needed a list of dataclasses, () for none{write}")
    for i, each in enumerate(kinds):
        if not isinstance(each, type) or not is_dataclass(each):
            raise ValueError(f"kinds[{i}] is {short(each)}, needed a dataclass, which a file can hold field by field")


def _name(what: str, depends_on: Any) -> str:
    text = json.dumps([what, depends_on], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()
