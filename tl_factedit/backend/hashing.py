"""Hashes of tensors, made where the tensors are: the same on every device, and of each only a few numbers come back.

A tensor's bytes, in the order of its indices, are read as 64-bit words x, behind which zeros are filled in. Of every
`BLOCK` words two sums are taken, in integers that wrap around, so that no order of summation, and no device, changes
them:

    A = Σ c_j · x_j        B = Σ d_j · (x_j >> 32)

with odd numbers c and d that never change. These sums, all A and then all B, are words again, and are summed in the
same way, with other c and d. What is left, 16 bytes of each 4 MB, is fetched, and hashed with SHA-256 behind the
tensor's type and shape.

One changed bit always changes A of its block, as an odd number times a power of two is never 0, and so what is left.
Larger changes go unseen by accident, with a probability of some 2⁻⁶⁴; B is there for the uppermost bits of words, of
which A says no more than whether an odd number of them changed. This tells mix-ups: whoever wants two tensors with one
hash can make them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

WORD = 8
"""Bytes of a word."""

BLOCK = 1024
"""Words of which two sums are taken."""

SMALL = 1 << 16
"""Bytes up to which equally large tensors are hashed together, as each launch on a device takes its time."""

COPIED = 1 << 28
"""Bytes (a few more at most) that are copied at once of a tensor whose numbers aren't in memory in their order."""

Tables: TypeAlias = Int[Tensor, "2 _"]
"""The numbers c and d."""


def hash_all(tensors: Sequence[Tensor]) -> list[str]:
    """A hash of each tensor's type, shape and bits."""
    return [digest([tensor], [found]) for tensor, found in zip(tensors, sums(tensors), strict=True)]


def hash_one(tensor: Tensor) -> str:
    """A hash of one tensor's type, shape and bits."""
    return hash_all([tensor])[0]


def digest(tensors: Sequence[Tensor], found: Sequence[bytes]) -> str:
    """One hash of several tensors, whose `sums` these are."""
    seen = hashlib.sha256()
    for tensor, left in zip(tensors, found, strict=True):
        seen.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        seen.update(left)
    return seen.hexdigest()[:32]


def sums(tensors: Sequence[Tensor]) -> list[bytes]:
    """What is left of each tensor; of nothing but zeros, zeros. It is fetched in one copy from each device."""
    tables = {where: _tables(where) for where in dict.fromkeys(tensor.device for tensor in tensors)}
    left: dict[torch.device, list[tuple[list[int], Tensor]]] = {where: [] for where in tables}
    for some in _alike(tensors):
        first = tensors[some[0]]
        once, twice = tables[first.device]
        if len(some) > 1 and first.numel() * first.element_size() <= SMALL:
            words = _summed(_words(torch.stack([tensors[i].reshape(-1) for i in some])), once)
        else:
            parts = ([_summed(_words(row), once) for row in _in_order(tensors[i])] for i in some)
            words = torch.cat([part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts])
        left[first.device].append((some, _summed(words, twice)))
    found = [b""] * len(tensors)
    for parts in left.values():
        fetched = torch.cat([part.flatten() for _, part in parts]).cpu().split([part.numel() for _, part in parts])
        for (some, part), values in zip(parts, fetched, strict=True):
            for i, row in zip(some, values.reshape(part.shape).numpy(), strict=True):
                found[i] = row.tobytes()
    return found


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors of one device, type and size."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype, tensor.numel()), []).append(i)
    return list(groups.values())


def _in_order(tensor: Tensor) -> Iterator[Tensor]:
    """Its numbers in the order of its indices, one row each time: all but the last row are whole blocks."""
    if tensor.is_contiguous():
        yield tensor.reshape(1, -1)
        return
    block, row = WORD * BLOCK, tensor[0].numel() * tensor.element_size()
    rows = block // math.gcd(block, row)  # the fewest that are whole blocks
    for part in tensor.split(rows * max(1, COPIED // (rows * row))):
        yield part.reshape(1, -1)


def _words(rows: Tensor) -> Int[Tensor, "row word"]:
    if not rows.numel():
        return torch.zeros((len(rows), 0), dtype=torch.int64, device=rows.device)
    over = rows.shape[1] * rows.element_size() % WORD
    if over:
        rows = pad(rows.view(torch.uint8), (0, WORD - over))
    elif rows.storage_offset() * rows.element_size() % WORD:
        rows = rows.clone()
    return rows.view(torch.int64)


def _summed(words: Int[Tensor, "row word"], tables: Tables) -> Int[Tensor, "row sum"]:
    """A of all blocks, and then B of all blocks; the last block may be shorter."""
    rows, count = len(words), words.shape[1] // BLOCK
    whole, rest = words[:, : count * BLOCK].reshape(rows * count, BLOCK), words[:, count * BLOCK :]
    # On a CPU as many at once as a processor's cache holds; on a device more, as each launch takes its time.
    pairs = [_two_sums(some, tables) for some in whole.split(256 if words.is_cpu else 1 << 12)]
    both = [torch.cat(some).reshape(rows, count) for some in zip(*pairs, strict=True)]
    if rest.numel():
        last = _two_sums(rest, tables[:, : rest.shape[1]])
        both = [torch.cat([some, one[:, None]], 1) for some, one in zip(both, last, strict=True)]
    return torch.cat(both, 1)


def _two_sums(words: Int[Tensor, "block word"], tables: Tables) -> tuple[Tensor, Tensor]:
    return _dot(words, tables[0]), _dot(words >> 32, tables[1])


def _dot(words: Int[Tensor, "block word"], table: Int[Tensor, "word"]) -> Int[Tensor, "block"]:
    # What CUDA has no kernel for takes half the time on a CPU.
    return torch.mv(words, table) if words.is_cpu else (words * table).sum(1)


def _tables(where: torch.device) -> Int[Tensor, "level two block"]:
    """The numbers c and d of the words, and of the sums: SplitMix64 of 1, 2, 3 …, made odd."""
    z = torch.arange(1, 4 * BLOCK + 1, device=where) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (z | 1).reshape(2, 2, BLOCK)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
