"""Texts read once and in order, cut into pieces, and the keys at every token of them.

A `Reader` knows how far it has come, so that what was counted before a kill is passed over and checked, not counted
twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.halving import halving
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import DownProj
from tl_factedit.core.kinds import as_whole, short
from tl_factedit.core.tokens import brings_bos, encode, pad


def check_amounts(texts: Iterable[str], n_tokens: int, context: int, batch_tokens: int = 1) -> None:
    """Check that there is something to read, and how much.

    Raises:
        ValueError: One string in place of several, no tokens asked for, or pieces too short to hold text.
    """
    as_whole(n_tokens, "n_tokens", what="a whole number of tokens")
    as_whole(context, "context", 2, what="a whole number of tokens")
    as_whole(batch_tokens, "batch_tokens", what="a whole number of tokens")
    if isinstance(texts, str):
        raise ValueError("texts is one string, needed an iterable of strings: write [text]")
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts is {short(texts)}, needed an iterable of strings")


@dataclass(frozen=True)
class Place:
    """How far texts have been counted.

    Attributes:
        texts: So many texts whole,
        parts: and so many pieces of the next one.
        digest: A hash of the texts up to and with that next one.
    """

    texts: int
    parts: int
    digest: str


class Reader:
    """An iterable of texts that remembers what was read of it.

    Attributes:
        count: How many texts were read.
        brought_bos: Whether one of them begins with the BOS token itself; False without a tokenizer.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self.brought_bos = False
        self._texts = iter(texts)
        self._hash = hashlib.sha256()
        self._begun: Place | None = None
        self._held: str | None = None
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Each text, and how many of its pieces are counted already."""
        if self._held is not None and self._begun is not None:
            text, self._held = self._held, None
            yield text, self._begun.parts
        for text in self._texts:
            if not isinstance(text, str):
                raise ValueError(f"text {self.count} is a {type(text).__name__}, needed a string")
            self._hash.update(text.encode() + b"\0")
            self.count += 1
            self.brought_bos = self.brought_bos or (self._tokenizer is not None and brings_bos(self._tokenizer, text))
            yield text, 0

    def skip_to(self, place: Place, file: Path) -> None:
        """Read what was counted already, and check that it is what was counted.

        Raises:
            ValueError: These are other texts.
        """
        for text, _ in itertools.islice(self, place.texts + 1):
            self._held = text
        if self.count != place.texts + 1 or self.digest != place.digest:
            raise ValueError(
                f"{file} was collected on other texts than these: give the same texts from their beginning to go on "
                "with it, name another path, or delete it"
            )
        self._begun = place

    @property
    def digest(self) -> str:
        """A hash of all texts read so far."""
        return self._hash.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Piece:
    """Token ids that are run as one row, with BOS if there is one.

    Attributes:
        ids: The ids.
        place: How far texts are counted once this is.
    """

    ids: Int[Tensor, "pos"]
    place: Place


def pieces(model: Model, reader: Reader, bos: bool, context: int) -> Iterator[Piece]:
    """Texts cut to the length of the context; white space alone doesn't count as text."""
    room = min(context, int(getattr(model.cfg, "n_ctx", None) or context))
    for text, done in reader:
        if not text.strip():
            continue
        digest = reader.digest
        ids, _ = encode(model.tokenizer, text, prepend_bos=bos)
        first, body = ids[: int(bos)], ids[int(bos) :]
        for i, part in enumerate(body.split(room - bos)):
            if i >= done:
                yield Piece(torch.cat([first, part]), Place(reader.count - 1, i + 1, digest))


@dataclass(frozen=True, eq=False)
class KeyBatch:
    """The keys of some layers at every token of some pieces.

    Attributes:
        caught: By layer, what went into ``W_out``, [row pos d_mlp].
        real: Which tokens are no padding, [row pos].
        place: How far texts are counted with these.
    """

    caught: Mapping[int, Tensor]
    real: Bool[Tensor, "row pos"]
    place: Place

    @property
    def n_tokens(self) -> int:
        """How many tokens they are of."""
        return int(self.real.sum())

    def keys(self, layer: int, at: torch.device) -> Float[Tensor, "token d_mlp"]:
        """The keys in the order in which texts are counted, in float64."""
        caught = self.caught[layer]
        rows, places = (index.to(caught.device) for index in self.real.nonzero(as_tuple=True))
        return caught[rows, places].to(at).double()


def stream_keys(
    runner: Runner,
    sites: Mapping[int, DownProj],
    reader: Reader,
    bos: bool,
    context: int,
    n_tokens: int,
    batch_tokens: int,
) -> Iterator[KeyBatch]:
    """Keys at every token of some texts, in batches of forward passes that stop at the last layer.

    Args:
        runner: Made inside ``frozen(model)``, which must still hold.
        sites: The layers' ``W_out``.
        reader: The texts.
        bos: Whether pieces begin with BOS.
        context: Longest piece.
        n_tokens: How many to stop after.
        batch_tokens: Padded tokens in one pass.
    """
    model = runner.model
    names = [site.key_hook for site in sites.values()]
    found = _batches(pieces(model, reader, bos, context), n_tokens, batch_tokens)
    for attempt in halving(found, _padded, "tokens in one pass", "a smaller batch_tokens"):
        with attempt as rows:
            ids = pad([row.ids for row in rows], fill=0)
            lengths = torch.tensor([len(row.ids) for row in rows])
            real = torch.arange(ids.shape[1])[None] < lengths[:, None]
            caught = runner.capture(ids, names, stop=max(sites) + 1)
            yield KeyBatch({layer: caught[site.key_hook] for layer, site in sites.items()}, real, rows[-1].place)


def _padded(rows: list[Piece]) -> int:
    return max(len(row.ids) for row in rows) * len(rows)


def _batches(found: Iterable[Piece], n_tokens: int, batch_tokens: int) -> Iterator[list[Piece]]:
    """Rows for one pass each. A batch depends on the pieces from its first one on, never on those before."""
    rows: list[Piece] = []
    longest, left = 0, n_tokens
    if left == 0:
        return
    for piece in found:
        ids = piece.ids[:left]
        if rows and max(longest, len(ids)) * (len(rows) + 1) > batch_tokens:
            yield rows
            rows, longest = [], 0
        rows.append(Piece(ids, piece.place))
        longest, left = max(longest, len(ids)), left - len(ids)
        if left == 0:
            break
    if rows:
        yield rows
