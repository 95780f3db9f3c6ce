"""A file gives back what was written, or says that it can't; it is never half written and never touched by a read."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch

from tl_factedit.core import files
from tl_factedit.core.files import opened, read, replacing, write

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


def test_a_file_of_another_format_is_refused_with_both_formats(path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", "7")
    assert "holds 'edit' of format 1, needed 'edit' of format 7" in refused(path)
    assert "holds 'edit' of format 1, needed 'key statistics' of format 7" in refused(path, "key statistics")


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


# ---------------------------------------------------------------------------------------- how it is written


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(tmp_path, mask):
    path, before = tmp_path / "a.safetensors", os.umask(mask)
    try:
        write(path, "edit", {}, {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_draft_that_a_kill_has_left_goes_with_the_next_write_and_a_fresh_one_of_another_process_stays(tmp_path):
    path = tmp_path / "a[1].safetensors"
    killed = [replacing(path) for _ in range(2)]  # never left: what a kill leaves
    for writer in killed:
        writer.__enter__().write_text("half")
    old, fresh = sorted(tmp_path.iterdir())
    assert not path.exists()
    os.utime(old, (time.time() - 2 * files.STALE,) * 2)
    write(path, "edit", {"n": 1}, {})
    assert sorted(tmp_path.iterdir()) == sorted([fresh, path])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_an_os_error_that_names_the_file_and_the_old_file_stays(path, monkeypatch):
    before = path.read_bytes()
    said = r"what was there is as it was.*edit\.safetensors"
    with (
        pytest.raises(OSError, match=said) as error,
        replacing(path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert error.value.errno == errno.ENOSPC

    def full_disk(*args, **options):
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*edit\.safetensors") as error:
        write(path, "edit", {}, {"x": torch.zeros(3)})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_relative_path_stays_where_it_was_when_the_call_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with replacing("a.txt") as draft:
        monkeypatch.chdir(tmp_path / "elsewhere")
        draft.write_text("here")
    assert (tmp_path / "a.txt").read_text() == "here"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(path):
    path.chmod(0)
    with pytest.raises(PermissionError):
        read(path, "edit")


def test_a_disk_that_fails_is_not_a_damaged_file(path, monkeypatch):
    def fails(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "safe_open", fails)
    with pytest.raises(OSError, match="Input/output error"):
        read(path, "edit")


def test_a_folder_and_the_pointer_of_git_lfs_are_told(path):
    with pytest.raises(ValueError, match="is a folder, needed a file with edit"):
        read(path.parent, "edit")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in refused(path)


# ---------------------------------------------------------------------------------------- what is in it


def taken(path):
    """A small reader, as the package's are."""
    with opened(path, "edit") as file:
        layers = file.fields("layers", int)
        n = file.field("n_tokens", int), file.field("share", float), file.field("corpus", str)
        return n, [(file.tensor(f"k.{i}", "fact d_mlp"), file.tensor(f"v.{i}", "fact 2")) for i in layers]


GOOD = ({"layers": [1, 2], "n_tokens": 3, "share": 1, "corpus": "c"}, {
    f"{name}.{i}": torch.zeros(4, width) for i in (1, 2) for name, width in (("k", 3), ("v", 2))
})  # fmt: skip


def test_content_that_fits_together_is_taken(tmp_path):
    write(tmp_path / "a", "edit", *GOOD)
    n, pairs = taken(tmp_path / "a")
    assert n == (3, 1, "c")
    assert [(len(k), len(v)) for k, v in pairs] == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"layers": None}, {}, "layers is None, needed a value of type list"),
        ({"layers": [1, "2"]}, {}, r"layers\[1\] is '2', needed a value of type int"),
        ({"layers": [1, True]}, {}, r"layers\[1\] is True"),
        ({"layers": [1, 3]}, {}, "it has no tensor 'k.3'"),
        ({"n_tokens": 1.5}, {}, "n_tokens is 1.5"),
        ({"share": "much"}, {}, "share is 'much'"),
        ({"corpus": 3}, {}, "corpus is 3"),
        ({}, {"k.2": torch.zeros(4, 5)}, r"tensor 'k.2' is \(4, 5\), needed \[fact = 4, d_mlp = 3\]"),
        ({}, {"v.1": torch.zeros(5, 2)}, r"tensor 'v.1' is \(5, 2\), needed \[fact = 4, 2 = 2\]"),
        ({}, {"v.1": torch.zeros(4, 3)}, r"tensor 'v.1' is \(4, 3\)"),
        ({}, {"v.1": torch.zeros(4)}, r"tensor 'v.1' is \(4,\)"),
        ({}, {"k.1": torch.zeros(4, 3, dtype=torch.long)}, "tensor 'k.1' is of torch.int64, needed a floating type"),
        ({}, {"k.1": torch.full((4, 3), float("nan"))}, "tensor 'k.1' holds numbers that are not finite"),
        ({}, {"k.1": torch.full((4, 3), float("inf"))}, "tensor 'k.1' holds numbers that are not finite"),
    ],
)
def test_content_with_a_right_checksum_that_does_not_fit_is_refused_by_file(tmp_path, header, tensors, message):
    write(tmp_path / "edit.safetensors", "edit", GOOD[0] | header, GOOD[1] | tensors)
    with pytest.raises(ValueError, match=rf"edit\.safetensors doesn't hold a valid edit \({message}"):
        taken(tmp_path / "edit.safetensors")


@pytest.mark.parametrize("lost", list(GOOD[0]))
def test_content_that_lacks_a_field_is_refused_by_file_and_field(tmp_path, lost):
    write(tmp_path / "edit.safetensors", "edit", {k: v for k, v in GOOD[0].items() if k != lost}, GOOD[1])
    with pytest.raises(ValueError, match=rf"edit\.safetensors doesn't hold a valid edit \(it has no '{lost}'"):
        taken(tmp_path / "edit.safetensors")


def test_missing_values_may_be_nan_where_they_are_meant_and_never_infinite(tmp_path):
    for value, fine in ((float("nan"), True), (float("-inf"), False)):
        write(tmp_path / "a", "trace", {}, {"x": torch.tensor([1.0, value])})
        with opened(tmp_path / "a", "trace") as file:
            if fine:
                assert file.tensor("x", "pos", missing=True).isnan().any()
                continue
            with pytest.raises(ValueError, match="infinite"):
                file.tensor("x", "pos", missing=True)


def test_through_a_link_its_target_is_written(tmp_path):
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(target)
    for number in (1, 2):  # of which the first makes the target
        write(link, "thing", {"n": number}, {})
        assert link.is_symlink() and not target.is_symlink() and read(target, "thing")[0] == {"n": number}
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="can't be written"):
        write(tmp_path / "circle", "thing", {}, {})


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for place, what in ((pipe, "a pipe"), (folder, "a folder"), (Path("/dev/null"), "a device")):
        with pytest.raises(OSError, match=f"it can't be written .*{what}"):
            write(place, "thing", {}, {})
    assert pipe.is_fifo() and sorted(each.name for each in tmp_path.iterdir()) == ["folder", "pipe"]


def test_the_mode_of_the_file_that_is_replaced_is_kept(tmp_path):
    path = tmp_path / "file"
    write(path, "thing", {"n": 1}, {})
    for mode in (0o640, 0o444):
        path.chmod(mode)
        write(path, "thing", {"n": mode}, {})
        assert path.stat().st_mode & 0o777 == mode and read(path, "thing")[0] == {"n": mode}


def test_a_file_of_another_kind_is_not_replaced(tmp_path, path):
    """The edit that a verdict is of, or the facts that a trace is of: two paths are easily mixed up."""
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="isn't a file with scores"):
        write(path, "scores", {}, {})
    facts = tmp_path / "facts.json"
    facts.write_text("[1, 2, 3, 4, 5]")
    with pytest.raises(FileExistsError, match="isn't a file with edit"):
        write(facts, "edit", {}, {})
    assert path.read_bytes() == before and facts.read_text() == "[1, 2, 3, 4, 5]"
    write(path, "edit", {"again": 1}, {})  # its own kind, also where it is damaged, and an empty file
    path.write_bytes(path.read_bytes()[:-1])
    write(path, "edit", {"again": 2}, {})
    assert read(path, "edit")[0] == {"again": 2}
    facts.write_text("")
    write(facts, "edit", {}, {})
