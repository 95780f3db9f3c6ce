"""Lines of JSON in a file, one added at a time: a kill in the middle of one costs that line alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that doesn't have to exist; a last one that was cut is taken off it."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
