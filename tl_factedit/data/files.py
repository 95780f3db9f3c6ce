"""Files of records: JSON, JSONL, CSV, TSV and Parquet, packed or not. The only place where files of facts are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: str | Path) -> Any:
    """The records of a file, by its name's end; what isn't a table is JSON or JSONL, and comes as it is.

    In tables of text all is text, "NA" too, and what is empty is None.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It can't be read as what its name says.
    """
    file = Path(path).expanduser()
    ends = [end.lower() for end in file.suffixes]
    packed = ends[-1:] == [".gz"]
    end = (ends[:-1] if packed else ends)[-1:] or [""]
    if end[0] not in (*SEPARATORS, ".parquet"):
        return read_json(path)
    import pandas as pd

    if not file.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if end[0] == ".parquet":
            rows = pd.read_parquet(file).to_dict("records")
        else:
            table = pd.read_csv(file, sep=SEPARATORS[end[0]], dtype=str, keep_default_na=False, encoding="utf-8-sig")
            rows = table.to_dict("records")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} can't be read as {end[0][1:].upper()}: {error}") from error
    return [
        {str(k): None if isinstance(value, str) and not value else value for k, value in row.items()} for row in rows
    ]


def read_json(path: str | Path) -> Any:
    """What a file of JSON holds, packed by gzip or not; of JSONL (one record a line), the list of its records.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is a folder, the pointer that git-lfs leaves, or isn't JSON.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{path} is a folder, needed a file of JSON")
    raw = file.read_bytes()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is the pointer that git-lfs leaves for a file, needed the file: run git lfs pull")
    try:
        if raw.startswith(GZIP):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")  # Windows puts a byte-order mark in front
        try:
            return json.loads(text)
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
