"""A file gives back what was written, or says that it can't; it is never half written and never touched by a read."""

import json

import pytest
import torch

from tl_factedit.core.files import read, write

HEADER = {"layer": 3, "name": "Größe", "scale": 0.1, "none": None, "list": [1, [2]]}
TENSORS = {
    "float": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "bfloat": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "double": torch.tensor([0.1, float("inf"), -0.0], dtype=torch.float64),
    "bool": torch.tensor([[True, False], [False, True]]),
    "long": torch.tensor([2**40, -1]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "edit.safetensors"
    write(path, "edit", HEADER, TENSORS)
    return path


def refused(path, what: str = "edit") -> str:
    """The message with which a read is refused; the file must be as it was."""
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"edit\.safetensors") as error:
        read(path, what)
    assert path.read_bytes() == before
    return str(error.value)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_bit_for_bit_with_its_type(path, name):
    _, tensors = read(path, "edit")
    assert tensors[name].dtype == TENSORS[name].dtype
    assert torch.equal(tensors[name], TENSORS[name])
    assert tensors.keys() == TENSORS.keys()


def test_the_header_comes_back(path):
    assert read(path, "edit")[0] == HEADER


def test_views_and_shared_tensors_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    given = {"transposed": base.T, "row": base[1], "again": base.T}
    write(tmp_path / "views", "edit", {}, given)
    _, tensors = read(tmp_path / "views", "edit")
    assert all(torch.equal(tensors[name], given[name]) for name in given)
    assert not tensors["row"].requires_grad


def test_folders_are_made_and_an_older_file_is_replaced_with_no_draft_left(tmp_path):
    path = tmp_path / "a" / "b" / "edit.safetensors"
    write(path, "edit", {"n": 1}, {})
    write(path, "edit", {"n": 2}, {})
    assert read(path, "edit") == ({"n": 2}, {})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("header", "tensors"),
    [({"bad": object()}, {}), ({}, {"bad": torch.zeros(2).to_sparse()})],
    ids=["header", "tensor"],
)
def test_a_write_that_fails_leaves_the_older_file_and_no_draft(path, header, tensors):
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        write(path, "edit", header, tensors)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors doesn't exist"):
        read(tmp_path / "nothing.safetensors", "edit")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -8, -1], ids=str)
def test_a_file_cut_short_is_refused(path, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "cut short or no safetensors file" in refused(path)


def test_a_file_with_bytes_appended_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path)


def data_start(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_in_the_data_is_refused(path, part, bit):
    raw = bytearray(path.read_bytes())
    begin = data_start(raw)
    raw[begin + int(part * (len(raw) - begin))] ^= 1 << bit
    path.write_bytes(raw)
    assert "changed since it was written" in refused(path)


def test_any_flipped_byte_of_the_file_is_refused(tmp_path):
    path = tmp_path / "edit.safetensors"
    write(path, "edit", {"layer": 3}, {"x": torch.arange(3.0)})
    whole, unnoticed = path.read_bytes(), []
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            read(path, "edit")
        except ValueError as error:
            assert str(path) in str(error)
        else:
            unnoticed.append((i, whole[max(0, i - 20) : i + 20]))
    assert not unnoticed


def test_a_changed_header_value_is_refused(path):
    raw = path.read_bytes()
    assert raw.count(b'\\"layer\\": 3') == 1
    path.write_bytes(raw.replace(b'\\"layer\\": 3', b'\\"layer\\": 4'))
    assert "changed since it was written (its checksum differs)" in refused(path)


def test_a_file_of_another_kind_is_refused_with_both_kinds(path):
    assert "holds 'edit', needed 'key statistics'" in refused(path, "key statistics")


def test_a_safetensors_file_of_someone_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "edit.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    assert "holds 'something else', needed 'edit'" in refused(path)


@pytest.mark.parametrize("lost", ["header", "sha256"])
def test_a_file_without_its_header_or_checksum_is_refused(tmp_path, lost):
    from safetensors.torch import save_file

    meta = {"format": "1", "what": "edit", "header": json.dumps({}), "sha256": "0"}
    del meta[lost]
    path = tmp_path / "edit.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=meta)
    refused(path)


@pytest.mark.parametrize("content", [b"not a file of tensors", b"\xff" * 64, b"{}"], ids=["text", "ff", "json"])
def test_anything_else_is_refused(path, content):
    path.write_bytes(content)
    refused(path)
