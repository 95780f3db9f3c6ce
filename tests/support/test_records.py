"""What the measuring scripts keep survives a kill in the middle of a line."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "records.py"


@pytest.fixture
def records():
    spec = importlib.util.spec_from_file_location("records", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_cut_last_line_is_taken_off_and_the_next_one_begins_anew(records, tmp_path, cut):
    path = tmp_path / "lines.jsonl"
    assert records.read_lines(path) == []
    for i in range(3):
        records.add_line(path, {"name": "ä", "i": i})
    assert [line["i"] for line in records.read_lines(path)] == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["i"] for line in records.read_lines(path)] == [0, 1]
    records.add_line(path, {"name": "ä", "i": 7})
    assert [line["i"] for line in records.read_lines(path)] == [0, 1, 7]
