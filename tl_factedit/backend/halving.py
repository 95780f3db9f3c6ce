"""Passes that the device has no memory for are made again with half as much, and it is said.

A loop over batches becomes one over attempts, with its body inside the attempt:

    for attempt in that_fit(lengths, batch_tokens):
        with attempt as some:                # indices
            logits = runner.logits(pad([rows[i] for i in some], 0))
            …

The body may be left at any pass, and is run again for fewer: it writes what it found last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Generic, TypeVar

import torch

from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import batches

T = TypeVar("T")


class Attempt(Generic[T]):
    """What is run together, for once.

    Attributes:
        items: What is run together.
        share: How much of the budget its passes may take: 1, and half as much after each time that there was no room.
    """

    def __init__(self, items: list[T], share: float) -> None:
        self.items, self.share = items, share
        self.error: Exception | None = None

    def __enter__(self) -> list[T]:
        """What is run together."""
        return self.items

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """Keep an error that says that the memory is full; others go on."""
        if isinstance(error, Exception) and is_out_of_memory(error):
            self.error = error.with_traceback(None)  # which holds what the pass had made
            return True
        return False


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device says that it has no memory left; MPS and the CPU say so in words."""
    said = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
    return said or isinstance(error, torch.OutOfMemoryError)


def that_fit(lengths: Sequence[int], most: int) -> Iterator[Attempt[int]]:
    """Batches of rows (see `batches`), halved where the device has no memory for them.

    Args:
        lengths: What each row costs, in tokens.
        most: Most tokens in one pass (the ``batch_tokens`` of public calls).

    Raises:
        ValueError: `most` isn't a whole number above 0.
        OutOfMemoryError: A single row has no room.
    """

    def tokens(some: list[int]) -> int:
        return max(lengths[i] for i in some) * len(some)

    return halving(batches(lengths, most), tokens, "tokens in one pass", "a smaller batch_tokens")


def halving(
    groups: Iterable[list[T]], cost: Callable[[list[T]], float], unit: str, remedy: str, *, least: float = 1.0
) -> Iterator[Attempt[T]]:
    """Groups, halved where the device has no memory for them; those that follow are no larger than what fitted.

    Args:
        groups: What is run together.
        cost: What a group costs.
        unit: Of what.
        remedy: What to ask for, so that it needn't be found out.
        least: The least share of a budget that passes may take; 1 where groups alone say how large passes are.

    Warns:
        UserWarning: The memory was full; once, as soon as there is a size that fits.

    Raises:
        OutOfMemoryError: A single one has no room with the least share.
    """
    waiting: deque[list[T]] = deque()
    source = iter(groups)
    most, share, failed, told = float("inf"), 1.0, 0.0, False
    while (group := waiting.popleft() if waiting else next(source, None)) is not None:
        if cost(group) > most and len(group) > 1:
            middle = len(group) // 2
            waiting.extendleft((group[middle:], group[:middle]))
            continue
        attempt = Attempt(group, share)
        yield attempt
        if attempt.error is None:
            if failed and not told:
                told = True
                less = "" if share == 1 else f", in passes of {share:.3g} of the size"
                tell(
                    f"out of memory with {failed:,.4g} {unit}: went on with {cost(group):,.4g}{less}; ask for {remedy}",
                    once=f"out of memory, {remedy}",
                )
            continue
        failed = failed or cost(group)
        if len(group) > 1:
            most = cost(group) / 2
        if share / 2 >= least:
            share /= 2
        elif len(group) == 1:
            raise torch.OutOfMemoryError(
                f"out of memory with {cost(group):,.4g} {unit}, of one alone: free memory on the device, shorten the "
                f"text, load the model in half precision, or take a larger device ({attempt.error})"
            ) from None
        waiting.appendleft(group)
