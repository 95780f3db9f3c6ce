"""Files of records: JSON, JSONL, CSV, TSV and Parquet, packed or not. The only place where files of facts are read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

from tl_factedit.core.telling import tell

GZIP = b"\x1f\x8b"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")


def is_table(path: str | Path) -> bool:
    """Whether a file's name says that it is a table of text, whose first line names its columns."""
    return _end(path) in SEPARATORS


def is_tabular(path: str | Path) -> bool:
    """Whether a file's name says that it has rows and columns, and isn't JSON."""
    return is_table(path) or _end(path) == ".parquet"


def _end(path: str | Path) -> str:
    """How a name ends, without that it is packed."""
    ends = [end.lower() for end in Path(path).suffixes]
    return ((ends[:-1] if ends[-1:] == [".gz"] else ends)[-1:] or [""])[0]


def read_rows(path: str | Path) -> Any:
    """The records of a file, by its name's end; what isn't a table is JSON or JSONL, and comes as it is.

    In tables of text all is text, "NA" too, and what is empty is None.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It can't be read as what its name says.
    """
    file = Path(path).expanduser()
    end = _end(file)
    if end in (".xlsx", ".xls", ".ods"):
        raise ValueError(f"{path} is a spreadsheet, needed a table of text: save it as CSV")
    if end in SEPARATORS:
        return _table(path, file.read_bytes(), SEPARATORS[end])
    if end != ".parquet":
        return read_json(path)
    import pandas as pd

    if not file.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        rows = pd.read_parquet(file).to_dict("records")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error
    return [{str(name): value for name, value in row.items()} for row in rows]


def _table(path: str | Path, raw: bytes, separator: str) -> list[dict[str, str | None]]:
    """The rows of a table of text whose first line names its columns; each has as many fields as there are names.

    Where names have spaces around them, as after ", ", these and those in front of fields are left out; that is told.

    Raises:
        ValueError: It isn't one; the message gives the line.
    """
    try:
        text = (gzip.decompress(raw) if raw.startswith(GZIP) else raw).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = next(reader, [])
        if any(name != name.strip() for name in names):
            table = io.StringIO(text, newline="")
            reader = csv.reader(table, delimiter=separator, strict=True, skipinitialspace=True)
            names = [name.strip() for name in next(reader)]
            tell(
                f"{path} has spaces around the names of its columns: they are left out, as are those in front of fields"
            )
        if len(names) < 2:
            other = next((mark for mark in (";", "\t", ",", "|") if mark != separator and mark in "".join(names)), None)
            hint = f": is {other!r} what stands between them?" if other else ""
            raise ValueError(f"its first line names {len(names)} column, needed several{hint}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"its first line, which is taken as the names of columns, names {twice[0]!r} twice")
        found: list[dict[str, str | None]] = []
        for row in reader:
            if row and len(row) != len(names):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} fields, and the first line {len(names)}: put text that "
                    "holds a separator in quotes"
                )
            if row:
                found.append({name: value or None for name, value in zip(names, row, strict=True)})
    except (csv.Error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} can't be read as a table: {error}") from error
    return found


def read_json(path: str | Path) -> Any:
    """What a file of JSON holds, packed by gzip or not; of JSONL (one record a line), the list of its records.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is a folder, a table, the pointer that git-lfs leaves, or isn't JSON.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{path} is a folder, needed a file of JSON")
    if is_tabular(file) and file.is_file():
        raise ValueError(f"{path} is a table, needed JSON of this layout: fe.data.facts(path) reads tables")
    raw = file.read_bytes()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is the pointer that git-lfs leaves for a file, needed the file: run git lfs pull")
    try:
        if raw.startswith(GZIP):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")  # Windows puts a byte-order mark in front
        try:
            found = json.loads(text)
            return [found] if isinstance(found, dict) and _end(file) in LINES else found
        except json.JSONDecodeError:
            lines = [line for line in text.split("\n") if line.strip()]
            if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
                raise
            return _lines(text)
    except RecursionError as error:
        raise ValueError(f"{path} isn't JSON of records: it is nested too deep") from error
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} isn't JSON: {error}") from error


def _lines(text: str) -> list[Any]:
    """The records of JSONL.

    Raises:
        ValueError: A line isn't JSON; the message gives its number.
    """
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                why = f"line {number}, column {error.colno}: {error.msg}, so that it may be cut short"
                raise ValueError(why) from error
    return found
