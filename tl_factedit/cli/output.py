"""What a command prints: its result as text or as one JSON object, and everything else on stderr."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tl_factedit.core import files


@dataclass(frozen=True)
class Output:
    """The result of a command.

    Attributes:
        text: For people.
        data: The same for programs, as plain data.
    """

    text: str
    data: Mapping[str, Any]

    def as_json(self, command: str) -> str:
        """One JSON object; null stands for what isn't a finite number, which JSON has no word for."""
        whole = {"command": command, "tl_factedit": version("tl-factedit"), **self.data}
        return json.dumps(_finite(whole), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


IN_PYTHON = (
    (re.compile(r": name it, columns=\{[^}]*\}"), ": rename one of them in the file"),
    (re.compile(r"fact\.but\(target_true=[^)]*\)"), "give --old, or the column target_true of the file"),
    (re.compile(r"fact\.but\(target_new=[^)]*\)"), "give --new, or the column target_new of the file"),
    (re.compile(r" \(wrong='leave out' leaves them out\)"), ""),
)
"""What messages advise who writes Python, and what does the same here."""


def in_options(message: str) -> str:
    """A message of the package, with the options of the command line in place of arguments in Python."""
    for python, option in IN_PYTHON:
        message = python.sub(option, message)
    return message


def say(text: str, *, result: bool = False) -> None:
    """Print a text on stderr, or the result on stdout; what the stream's encoding lacks is printed as "?"."""
    stream = sys.stdout if result else sys.stderr
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def step(args: argparse.Namespace, text: str) -> None:
    """Say what is done next, unless `--quiet` was given."""
    if not args.quiet:
        say(f"{text} …")


@contextmanager
def warnings_in_words() -> Iterator[None]:
    """Warnings are printed as a line of text, without the line of code that they point to."""
    with warnings.catch_warnings():
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_where: Any, **_more: Any) -> None:
    say(f"warning: {in_options(str(message))}")


def writable(path: Path, what: str) -> Path:
    """The absolute path of a file that is to be written, checked before the work is done.

    Args:
        path: As it was given.
        what: The option, for the message.

    Raises:
        ValueError: It is a folder, or would lie in a file.
    """
    file = files.pinned(path)
    if file.is_dir():
        raise ValueError(f"{what} {path} is a folder, needed the name of a file")
    wrong = next((part for part in file.parents if part.exists() and not part.is_dir()), None)
    if wrong is not None:
        raise ValueError(f"{what} {path} can't be written: {wrong} is a file, needed a folder")
    return file
