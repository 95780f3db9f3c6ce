"""From a fact's text to token ids: where the subject lies, and how its objects are spelt.

This is the off-by-one file. Positions are found by *character offsets* on the very ids that are
run (with their BOS), never by searching a separately tokenised string; a target's ids are what
the tokenizer makes of it *after its prompt*, never of the target alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_factedit.core.facts import Fact


@dataclass(frozen=True)
class Aligned:
    """A prompt as the model runs it.

    Attributes:
        text: The text, without BOS.
        ids: Token ids as run, BOS included if there is one.
        pieces: The same tokens as strings, for showing.
        subject: (start, stop) of the subject in `ids`; ``stop - 1`` is the last subject token.
        prepend_bos: Whether a BOS token stands in front.
        true_ids: The ids of ``target_true`` after this prompt.
        new_ids: The ids of ``target_new`` after this prompt, or None.
    """

    text: str
    ids: Int[Tensor, "pos"]
    pieces: tuple[str, ...]
    subject: tuple[int, int]
    prepend_bos: bool
    true_ids: Int[Tensor, "true"]
    new_ids: Int[Tensor, "new"] | None = None

    @property
    def last(self) -> int:
        """Position of the last subject token."""
        return self.subject[1] - 1

    @property
    def same_first_token(self) -> bool:
        """Whether both objects begin with the same token: comparisons of first tokens are void then."""
        return self.new_ids is not None and bool(self.true_ids[0] == self.new_ids[0])


def align(tokenizer: Any, fact: Fact, *, prepend_bos: bool, template: str | None = None, prefix: str = "") -> Aligned:
    """Tokenise a fact's prompt and find its subject.

    Args:
        tokenizer: The model's own (fast) tokenizer.
        fact: The fact.
        prepend_bos: Whether to put BOS in front.
        template: Another template with one ``"{}"`` to ask with; None for the fact's prompt.
        prefix: Text to put before the prompt (a context).

    Returns:
        The aligned prompt.

    Raises:
        ValueError: The subject doesn't begin or end on a token boundary here, or an object is not
            a continuation of the prompt's tokens.
    """
    template = fact.prompt if template is None else template
    if template.count("{}") != 1:
        raise ValueError(
            f'template {template!r} holds {template.count("{}")} "{{}}", needed exactly one: '
            'put "{}" where the subject goes'
        )
    begin = len(prefix) + template.index("{}")
    text = prefix + fact.fill(template)
    ids, offsets = encode(tokenizer, text, prepend_bos=prepend_bos)
    pieces = spell(tokenizer, ids)
    return Aligned(
        text=text,
        ids=ids,
        pieces=pieces,
        subject=find_span(text, offsets, begin, begin + len(fact.subject), pieces, fact.subject),
        prepend_bos=prepend_bos,
        true_ids=continuation(tokenizer, text, fact.target_true, prepend_bos=prepend_bos),
        new_ids=(
            None if fact.target_new is None else continuation(tokenizer, text, fact.target_new, prepend_bos=prepend_bos)
        ),
    )


def encode(tokenizer: Any, text: str, *, prepend_bos: bool) -> tuple[Int[Tensor, "pos"], list[tuple[int, int]]]:
    """Token ids of a text as run, and the characters that each of them covers ((0, 0) for BOS)."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets, needed to find the subject: "
            "load the fast tokenizer (use_fast=True)"
        )
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise ValueError("prepend_bos=True, but the tokenizer has no BOS token: pass prepend_bos=False")
    # To a tokenizer that adds no BOS of its own TransformerLens gives the BOS as text, and a word after it is
    # not always spelt as one at the very beginning ("▁The" becomes "T", "he").
    spelt = tokenizer.bos_token if prepend_bos and tokenizer("a")["input_ids"][:1] != [bos] else ""
    coded = tokenizer(spelt + text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(coded["input_ids"])
    offsets = [(max(a - len(spelt), 0), max(b - len(spelt), 0)) for a, b in coded["offset_mapping"]]
    if prepend_bos and not spelt:
        ids, offsets = [bos, *ids], [(0, 0), *offsets]
    if not ids:
        raise ValueError(f"text {text!r} has no tokens")
    return torch.tensor(ids), offsets


def spell(tokenizer: Any, ids: Int[Tensor, "pos"]) -> tuple[str, ...]:
    """Each token as a string (bytes of a split character show as the replacement character)."""
    return tuple(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids)


def find_span(
    text: str,
    offsets: Sequence[tuple[int, int]],
    begin: int,
    end: int,
    pieces: Sequence[str],
    what: str,
) -> tuple[int, int]:
    """The tokens that cover the characters ``begin:end`` of a text.

    A token may reach over the span's ends by white space only (" Paris" is one token).

    Returns:
        (start, stop) token positions.

    Raises:
        ValueError: A token holds the span's end, or its start, together with other text.
    """
    # Tokens without characters of their own (BOS) belong to no span.
    inside = [i for i, (a, b) in enumerate(offsets) if b > a and a < end and b > begin]
    if not inside:
        raise ValueError(f"no token covers {what!r} in {text!r}")
    first, last = inside[0], inside[-1]
    if text[end : offsets[last][1]].strip():
        raise ValueError(
            f"subject {what!r} ends inside token {pieces[last]!r} (position {last}) of {text!r}, needed a token "
            "boundary there: extend the subject or change the template"
        )
    if text[offsets[first][0] : begin].strip():
        raise ValueError(
            f"subject {what!r} begins inside token {pieces[first]!r} (position {first}) of {text!r}, needed a token "
            "boundary there: extend the subject or change the template"
        )
    return first, last + 1


def continuation(tokenizer: Any, text: str, target: str, *, prepend_bos: bool = False) -> Int[Tensor, "target"]:
    """The ids of `target` as it is spelt after `text`.

    Raises:
        ValueError: The text's own tokens change when the target follows (the two merge into one
            token), so that a model that has read `text` could not go on with `target`.
    """
    before = encode(tokenizer, text, prepend_bos=prepend_bos)[0].tolist()
    whole = encode(tokenizer, text + target, prepend_bos=prepend_bos)[0].tolist()
    if whole[: len(before)] != before or len(whole) == len(before):
        hint = (
            "the text ends with a space: move it to the front of the target"
            if text[-1:].isspace()
            else "begin the target where a new token begins, e.g. with a space"
        )
        raise ValueError(
            f"target {target!r} merges with the last token of {text!r}, needed a continuation of its tokens; {hint}"
        )
    return torch.tensor(whole[len(before) :])


def batches(costs: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in order of their cost, as many together as the dearest of them allows (one always goes).

    Args:
        costs: Of each, such as its length in tokens: rows of like length go together, so that little is padded.
        most: What a batch may cost, each counted as its dearest.
    """
    batch: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if batch and costs[i] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows: Sequence[Int[Tensor, "_"]], fill: int) -> Int[Tensor, "row pos"]:
    """Rows of unequal length as one tensor, padded on the right (exact for causal models)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
