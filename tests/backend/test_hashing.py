"""Hashes of tensors: against a literal twin in Python's integers, and what they tell apart."""

import pytest
import torch

from tl_factedit.backend import hashing
from tl_factedit.backend.fingerprint import fingerprint, hashed_once
from tl_factedit.backend.hashing import BLOCK, hash_all, hash_one, sums
from tl_factedit.backend.weights import down_proj

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)


def noise(*shape, dtype=torch.float32, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * 50).to(dtype) if dtype in (torch.int8, torch.bool) else drawn.to(dtype)


# ---------------------------------------------------------------------------------------- the literal twin

M = 1 << 64


def split_mix(i):
    z = i * 0x9E3779B97F4A7C15 % M
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % M
    z = (z ^ z >> 27) * 0x94D049BB133111EB % M
    return (z ^ z >> 31) | 1


def signed(word):
    return word - M if word >> 63 else word


def summed(words, level):
    block = hashing.BLOCK
    found = [[], []]
    for start in range(0, len(words), block):
        a = b = 0
        for j, word in enumerate(words[start : start + block]):
            a += split_mix(1 + 2 * level * block + j) * word
            b += split_mix(1 + (2 * level + 1) * block + j) * (signed(word) >> 32)
        found[0].append(a % M)
        found[1].append(b % M)
    return found[0] + found[1]


def literally(tensor):
    raw = b"".join(bytes(one.view(torch.uint8).tolist()) for one in tensor.contiguous().reshape(-1, 1))
    raw += bytes(-len(raw) % 8)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    return b"".join(word.to_bytes(8, "little") for word in summed(summed(words, 0), 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (3,), (7, 5), (41, 100), (2, BLOCK)], ids=str)
def test_sums_are_those_of_pythons_integers(shape, dtype):
    tensor = noise(*shape, dtype=dtype)
    assert sums([tensor]) == [literally(tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [64, 65, 1000, 4096, 8191])
def test_sums_of_many_blocks_are_those_of_pythons_integers(n, dtype, monkeypatch):
    monkeypatch.setattr(hashing, "BLOCK", 8)
    tensors = [noise(n, dtype=dtype, seed=i) for i in range(3)]
    assert sums(tensors) == [literally(tensor) for tensor in tensors]
    monkeypatch.setattr(hashing, "SMALL", 16)
    assert sums(tensors) == [literally(tensor) for tensor in tensors]


# ---------------------------------------------------------------------------------------- in any order, anywhere


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copied", [hashing.COPIED, 1 << 14])
def test_a_view_has_the_hash_of_its_copy(dtype, copied, monkeypatch):
    monkeypatch.setattr(hashing, "COPIED", copied)
    whole = noise(90, 333, dtype=dtype)
    for view in (whole.T, whole[:, 1:], whole[::2], whole.reshape(-1)[1:], whole.T[3:], whole[:1].expand(50, -1)):
        assert hash_one(view) == hash_one(view.clone(memory_format=torch.contiguous_format))


def test_tensors_that_are_hashed_together_have_the_hashes_they_have_alone():
    tensors = [noise(n, seed=i) for i, n in enumerate((5, 3, 5, 0, 5, 20_000, 0, 3))] + [noise(5, dtype=torch.float64)]
    assert hash_all(tensors) == [hash_one(tensor) for tensor in tensors]
    assert hash_all([]) == []


def test_the_order_of_summation_does_not_matter(monkeypatch):
    tensor = noise(300, 700)
    here = hash_one(tensor)
    monkeypatch.setattr(hashing, "_dot", lambda words, table: (words.flip(1) * table.flip(0)).sum(1))
    assert hash_one(tensor) == here


# ---------------------------------------------------------------------------------------- what it tells apart


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_changed_bit_changes_the_hash(dtype):
    tensor = noise(67, dtype=dtype)
    raw = tensor.view(torch.uint8)
    found = {hash_one(tensor)}
    bits = range(1 if dtype is torch.bool else 8)
    for byte in range(len(raw)):
        for bit in bits:
            raw[byte] ^= 1 << bit
            found.add(hash_one(tensor))
            raw[byte] ^= 1 << bit
    assert len(found) == 1 + len(bits) * len(raw)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_a_changed_bit_of_any_block_changes_the_hash(bit):
    tensor = noise(40 * BLOCK, dtype=torch.float64)
    words = tensor.view(torch.int64)
    found = {hash_one(tensor)}
    for at in range(0, len(words), 509):
        words[at] ^= signed(1 << bit)
        found.add(hash_one(tensor))
        words[at] ^= signed(1 << bit)
    assert len(found) == 1 + len(range(0, len(words), 509))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_order_signs_and_shape_are_told(dtype):
    tensor = noise(64, 640, dtype=dtype)
    swapped, rows, one, two = (tensor.clone() for _ in range(4))
    swapped[3, 5], swapped[40, 600] = tensor[40, 600], tensor[3, 5]
    rows[[3, 40]] = tensor[[40, 3]]
    one[:, 7] *= -1  # the sign of a neuron: an even number of uppermost bits
    two[[3, 3, 40, 40], [5, 600, 5, 600]] *= -1
    others = [swapped, rows, one, two, -tensor, tensor.T, tensor.reshape(640, 64), tensor.flip(0), tensor.double() * 1]
    if dtype is torch.float64:
        others.pop()
    assert len({hash_one(each) for each in (tensor, *others)}) == 1 + len(others)


def test_zeros_count_by_their_number_and_type():
    zeros = [torch.zeros(n, dtype=dtype) for n in (0, 1, 2, 3000) for dtype in (torch.float32, torch.bfloat16)]
    assert len(set(hash_all(zeros))) == len(zeros)
    assert not any(any(left) for left in sums(zeros))


# ---------------------------------------------------------------------------------------- once a call


@pytest.fixture
def counted(monkeypatch):
    """How many tensors each fingerprint read."""
    read = []

    def counting(tensors):
        read.append(len(tensors))
        return sums(tensors)

    monkeypatch.setattr("tl_factedit.backend.fingerprint.sums", counting)
    return read


def test_inside_a_block_only_what_was_written_is_read_again(model, counted):
    before = fingerprint(model)
    with hashed_once(model), hashed_once(model):
        assert fingerprint(model) == before
        assert fingerprint(model) == before
        site = down_proj(model, 1)
        site.write_(site.W * 2)
        changed = fingerprint(model)
        site.write_(site.W / 2)
        assert fingerprint(model) == before
        with torch.no_grad():
            next(model.parameters()).data = next(model.parameters()) * 2
        assert not fingerprint(model).matches(before)
    everything = counted[0]
    assert counted == [everything, everything, 0, 1, 1, 1]
    site.write_(site.W * 2)
    assert fingerprint(model).w_out == changed.w_out
    assert counted[-1] == everything


def test_a_copy_of_a_model_inside_a_block_is_hashed_by_itself(model):
    import copy

    with hashed_once(model):
        fingerprint(model)
        other = copy.deepcopy(model)
        down_proj(other, 1).W.data.mul_(2.0)
        assert fingerprint(other) != fingerprint(model)
    fingerprint(other)
