"""Any result comes back from a file as it was, and what a file can't hold is named when it is written."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tl_factedit.core import files, saved
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact

FACT = Fact("The Eiffel Tower", "{} is in", " Paris", neighbours=["Big Ben is in"], id=3)
NAN = float("nan")


def back(value, tmp_path, kind=object):
    saved.save(value, tmp_path / "file", "thing")
    return saved.load(tmp_path / "file", "thing", kind)


VALUES = {
    "plain": (None, True, 3, 0.1, "Größe", -0.0, float("inf")),
    "nested": (("a", 1), [1, ["b"]], {"a": (1,), 2: {"x": None}, (1, "mlp"): 0.5}, frozenset({"b", "a"})),
    "empty": ((), [], {}, frozenset(), ""),
    "range": range(1, 9, 2),
    "fact": FACT,
    "facts as keys": {FACT: 1.0},
    "an estimate": Estimate(0.5, 0.25, 0.75, 4),
    "numpy": (np.float64(0.5), np.int64(3), np.bool_(True)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_equal_and_of_its_type(name, tmp_path):
    value = VALUES[name]
    found = back(value, tmp_path)
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple) and name != "numpy":
        assert [type(each) for each in found] == [type(each) for each in value]


def test_nan_stays_nan_in_a_file_and_in_plain_data(tmp_path):
    found = back((Estimate(NAN, NAN, NAN, 0), torch.tensor([1.0, NAN])), tmp_path)
    assert math.isnan(found[0].mean) and math.isnan(found[0].high) and found[0].n == 0
    assert found[1][0] == 1 and bool(found[1][1].isnan())
    assert math.isnan(saved.as_plain(found)[0]["mean"]) and math.isnan(saved.as_plain(found)[1][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit_also_where_they_share_memory(dtype, tmp_path):
    base = torch.arange(6).reshape(2, 3).to(dtype)
    value = (base, base.T, base[0].expand(4, 3), torch.tensor(2).to(dtype))
    for one, other in zip(back(value, tmp_path), value, strict=True):
        assert torch.equal(one, other) and one.dtype == dtype


@dataclass(frozen=True)
class Own:
    """A class of one's own."""

    number: int = 1


@pytest.mark.parametrize("value", [Own(), lambda: 1, object(), np.zeros(2), 1j, b"x"], ids=lambda v: type(v).__name__)
def test_what_a_file_can_not_hold_is_named_and_nothing_is_written(value, tmp_path):
    (tmp_path / "file").write_text("as it was")
    result = {"details": ({"fine": 1}, {"mine": value})}
    for call in (lambda: saved.save(result, tmp_path / "file", "thing"), lambda: saved.as_plain(result, "thing")):
        with pytest.raises(ValueError, match=r"thing\['details'\]\[1\]\['mine'\] is .*which a file can't hold"):
            call()
    assert (tmp_path / "file").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_plain_data_is_written_by_json():
    plain = saved.as_plain({"fact": FACT, (1, 2): torch.eye(2), "set": {"b", "a"}})
    assert json.loads(json.dumps(plain)) == plain
    assert plain["fact"]["subject"] == "The Eiffel Tower" and plain["(1, 2)"] == [[1, 0], [0, 1]]
    assert plain["set"] == ["a", "b"]


def estimate(**changes) -> dict:
    fields = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4, **changes}
    return {"result": {"class": "tl_factedit.core.estimate.Estimate", "fields": fields}}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"result": {"class": "os.system", "fields": {}}}, "it holds a os.system, which this version"),
        ({"result": {"class": "tl_factedit.core.files.os.system", "fields": {}}}, "which this version"),
        ({"result": {"class": "tl_factedit.core.files.write", "fields": {}}}, "which this version"),
        ({"result": {"class": "tl_factedit.core.estimate.Gone", "fields": {}}}, "which this version"),
        ({"result": {"class": "tl_factedit.core.estimate.Estimate", "fields": {"mean": 1.0}}}, "thing has no 'low'"),
        (estimate(mean="0.5"), "thing.mean is '0.5', needed a value of type float"),
        (estimate(low=None), "thing.low is None, needed a value of type float"),
        (estimate(n=-1), "n of an estimate is -1, needed a whole number"),
        (estimate(n=1.5), "thing.n is 1.5, needed a value of type int"),
        ({"result": {"tensor": "gone"}}, "thing has no tensor 'gone'"),
        ({"result": [1]}, r"thing is \[1\], needed a value of type Estimate"),
        ({"result": {}}, "thing is {}, needed a value as `save` writes it"),
        (estimate(more=1), "thing has a 'more', which no Estimate has"),
        ({}, "it has no 'result'"),
    ],
)
def test_a_whole_file_with_other_content_is_refused_by_its_name(header, said, tmp_path):
    files.write(tmp_path / "a.safetensors", "thing", header, {})
    with pytest.raises(ValueError, match=rf"a\.safetensors doesn't hold a valid thing .*{said}"):
        saved.load(tmp_path / "a.safetensors", "thing", Estimate)


def test_damage_and_other_kinds_of_files_are_told(tmp_path):
    path = tmp_path / "a.safetensors"
    saved.save(Estimate(0.5, 0.25, 0.75, 4), path, "thing")
    with pytest.raises(ValueError, match=r"a\.safetensors holds 'thing', needed 'edit'"):
        saved.load(path, "edit", Estimate)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:20], b"", whole.replace(b"0.25", b"0.26")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            saved.load(path, "thing", Estimate)
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        saved.load(tmp_path / "b.safetensors", "thing", Estimate)
