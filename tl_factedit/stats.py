"""Second moments of keys, C = E[k kᵀ]: what an edit is to leave alone.

Uncentred, over the input of ``W_out`` at every token of some text (Meng et al. 2022,
arXiv:2202.05262, eq. 2 and app. E.2), summed in float64.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit import files
from tl_factedit.model import Fingerprint, Model, Runner, check_layer, device, down_proj, quiet
from tl_factedit.provenance import Provenance
from tl_factedit.tokens import encode, pad

TOKENS_PER_DIMENSION = 10
"""How many tokens a second moment wants for each of its d_mlp dimensions before it is inverted as it is."""


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class KeyStats:
    """The second moment of one layer's keys.

    Attributes:
        layer: The block.
        moment: E[k kᵀ], [d_mlp, d_mlp], float64.
        n_tokens: How many tokens it averages; 0 for the identity, which averages none.
        corpus: What was read: a hash of the texts, or ``"identity"``.
        provenance: Model, weights and BOS policy; None for the identity, which fits any weights.
    """

    layer: int
    moment: Float[Tensor, "d_mlp d_mlp"]
    n_tokens: int
    corpus: str
    provenance: Provenance | None

    @classmethod
    def identity(cls, model: Model, layer: int) -> KeyStats:
        """The identity in place of C: turns ROME's update into the plain ``r kᵀ / kᵀk``."""
        size = down_proj(model, layer).W.shape[0]
        return cls(layer, torch.eye(size, dtype=torch.float64), 0, "identity", None)

    @property
    def wanted_tokens(self) -> int:
        """How many tokens an unridged inverse wants: ten for each dimension."""
        return TOKENS_PER_DIMENSION * len(self.moment)

    def check(self, model: Model, weights: Fingerprint) -> None:
        """See that these statistics are of this model.

        Args:
            model: The model to be edited.
            weights: Fingerprint of its weights before any edit.

        Raises:
            ValueError: Another layer, size, model or weights.
        """
        check_layer(model, self.layer)
        size = down_proj(model, self.layer).W.shape[0]
        if self.moment.shape != (size, size):
            raise ValueError(
                f"key statistics are {tuple(self.moment.shape)}, but layer {self.layer} has d_mlp = {size}: "
                "they are of another model; collect them on this one"
            )
        if self.provenance is not None and not self.provenance.weights.matches(weights):
            raise ValueError(
                f"key statistics are of {self.provenance.model!r} with weights {self.provenance.weights}, but the "
                f"model has weights {weights}: collect them on these (before any edit that this package didn't make)"
            )

    def __add__(self, other: KeyStats) -> KeyStats:
        """Both together, weighted by their tokens.

        Raises:
            ValueError: They are of different layers, weights or BOS policies.
        """
        mine, theirs = self.provenance, other.provenance
        if self.layer != other.layer or mine is None or theirs is None:
            raise ValueError(
                f"can't merge statistics of layer {self.layer} ({self.corpus}) and {other.layer} ({other.corpus}): "
                "needed two collections on one layer"
            )
        if not mine.weights.matches(theirs.weights) or mine.prepend_bos != theirs.prepend_bos:
            raise ValueError("can't merge statistics of different weights or BOS policies: collect both on one model")
        total = self.n_tokens + other.n_tokens
        moment = (self.moment * self.n_tokens + other.moment * other.n_tokens) / total
        corpus = hashlib.sha256(f"{self.corpus} {other.corpus}".encode()).hexdigest()[:16]
        return KeyStats(self.layer, moment, total, corpus, mine)

    def save(self, path: str | Path) -> None:
        """Write one file (safetensors: the upper triangle, and where it came from)."""
        _write([self], Path(path), {})

    @classmethod
    def load(cls, path: str | Path) -> KeyStats:
        """Read a file of `save`.

        Raises:
            ValueError: The file is cut short, changed, or holds several layers.
        """
        _, found = _read(Path(path))
        if len(found) != 1:
            raise ValueError(f"{path} holds layers {[s.layer for s in found]}: read it with key_stats(..., path=...)")
        return found[0]

    def __repr__(self) -> str:
        """Layer, tokens and size in a line."""
        where = self.provenance.model if self.provenance else "any model"
        return f"KeyStats(layer={self.layer}, {self.n_tokens:,} tokens, d_mlp={len(self.moment)}, {where})"


def key_stats(
    model: Model,
    layers: int | Sequence[int],
    texts: Iterable[str],
    *,
    n_tokens: int = 100_000,
    path: str | Path | None = None,
    prepend_bos: bool | None = None,
    context: int = 256,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> dict[int, KeyStats]:
    """Collect the second moments of the keys of some layers, in one pass over some texts.

    Long texts are cut into pieces of `context` tokens, each with its own BOS if there is one. The
    keys of BOS are counted: every prompt has them, so an edit must spare them.

    Args:
        model: Either class; its weights as they are now.
        layers: The blocks; the forward stops at the last of them.
        texts: Any iterable of texts, read only as far as needed.
        n_tokens: How many tokens to count (fewer if the texts end before).
        path: Where to keep them: a ``.safetensors`` file for all layers, or a folder for one file
            a layer. What is there already is read instead, if it is the same collection.
        prepend_bos: Whether each piece begins with BOS; None for the model's default.
        context: Longest piece, in tokens with BOS.
        batch_tokens: Padded tokens in one forward pass.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        Statistics by layer.

    Raises:
        ValueError: No such layer, no text, or the files at `path` are damaged or of another
            model, weights, corpus or number of tokens (they are left as they are).

    Example:
        >>> stats = fe.key_stats(model, [8], texts, n_tokens=20_000)       # doctest: +SKIP
        >>> edit = fe.Rome(stats[8])(model, [fact])                        # doctest: +SKIP
    """
    wanted = [layers] if isinstance(layers, int) else sorted(set(layers))
    if not wanted:
        raise ValueError("layers is empty, needed at least one")
    sites = {layer: down_proj(model, layer) for layer in wanted}
    if n_tokens <= 0:
        raise ValueError(f"n_tokens is {n_tokens}, needed at least 1")
    if context < 2:
        raise ValueError(f"context is {context}, needed at least 2 tokens")
    if isinstance(texts, str):
        raise ValueError("texts is one string, needed an iterable of strings: write [text]")
    provenance = Provenance.of(model, prepend_bos)
    bos = provenance.prepend_bos
    asked = {"n_asked": n_tokens, "context": context}
    places = _places(None if path is None else Path(path), wanted)
    there = {file: held for file, held in places.items() if file.exists()}
    texts, again = itertools.tee(texts) if there else (texts, texts)
    kept = _reuse(there, again, provenance, asked)
    sites = {layer: site for layer, site in sites.items() if layer not in kept}
    if not sites:
        return {layer: kept[layer] for layer in wanted}

    reader = _Reader(texts)
    counted = 0
    with (
        quiet(model),
        torch.no_grad(),
        tqdm(total=n_tokens, unit="token", desc="key statistics", delay=1, disable=not progress) as bar,
    ):
        runner = Runner(model)
        # Made inside `quiet`: a caller's inference_mode would make tensors that can't be added to in it.
        sums = {
            layer: torch.zeros(len(site.W), len(site.W), dtype=torch.float64, device=device(model))
            for layer, site in sites.items()
        }
        for rows in _batches(_pieces(model, reader, bos, context), n_tokens, batch_tokens):
            ids = pad(rows, fill=0)
            real = (torch.arange(ids.shape[1])[None] < torch.tensor([len(r) for r in rows])[:, None]).to(device(model))
            caught = runner.capture(ids, [s.key_hook for s in sites.values()], stop=max(sites) + 1)
            for layer, site in sites.items():
                keys = caught[site.key_hook][real].double()
                sums[layer] += keys.T @ keys
            counted += int(real.sum())
            bar.update(int(real.sum()))
    if counted == 0:
        raise ValueError("the texts hold no tokens: give some text")
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        raise RuntimeError("key statistics are not finite: the model overflows on this text (try another dtype)")
    found = {
        layer: KeyStats(layer, ((total + total.T) / (2 * counted)).cpu(), counted, reader.digest, provenance)
        for layer, total in sums.items()
    }
    for file, held in places.items():
        if file not in there:
            _write([found[layer] for layer in held], file, {**asked, "n_texts": reader.count})
    return {layer: {**kept, **found}[layer] for layer in wanted}


# ------------------------------------------------------------------------------------ reading text


class _Reader:
    """An iterable of texts that remembers what was read of it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self._hash = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self._hash.update(text.encode() + b"\0")
            self.count += 1
            yield text

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()[:16]


def _pieces(model: Model, texts: Iterable[str], bos: bool, context: int) -> Iterator[Int[Tensor, "pos"]]:
    room = min(context, int(getattr(model.cfg, "n_ctx", None) or context))
    for text in texts:
        if not text.strip():
            continue
        ids, _ = encode(model.tokenizer, text, prepend_bos=bos)
        first, body = ids[: int(bos)], ids[int(bos) :]
        for part in body.split(room - bos):
            yield torch.cat([first, part])


def _batches(
    pieces: Iterable[Int[Tensor, "pos"]], n_tokens: int, batch_tokens: int
) -> Iterator[list[Int[Tensor, "pos"]]]:
    rows: list[Tensor] = []
    longest, left = 0, n_tokens
    for piece in pieces:
        piece = piece[:left]
        if rows and max(longest, len(piece)) * (len(rows) + 1) > batch_tokens:
            yield rows
            rows, longest = [], 0
        rows.append(piece)
        longest, left = max(longest, len(piece)), left - len(piece)
        if left == 0:
            break
    if rows:
        yield rows


# ------------------------------------------------------------------------------------ files


def _places(path: Path | None, layers: Sequence[int]) -> dict[Path, list[int]]:
    """Which file is to hold which layers."""
    if path is None:
        return {}
    if path.suffix == ".safetensors":
        return {path: list(layers)}
    return {path / f"layer_{layer}.safetensors": [layer] for layer in layers}


def _write(stats: Sequence[KeyStats], path: Path, asked: dict[str, Any]) -> None:
    header = {
        "asked": asked,
        "layers": [
            {
                "layer": s.layer,
                "n_tokens": s.n_tokens,
                "corpus": s.corpus,
                "size": len(s.moment),
                "provenance": None if s.provenance is None else s.provenance.to_json(),
            }
            for s in stats
        ],
    }
    files.write(path, "key statistics", header, {f"layer.{s.layer}": _pack(s.moment) for s in stats})


def _read(path: Path) -> tuple[dict[str, Any], list[KeyStats]]:
    header, tensors = files.read(path, "key statistics")
    return header["asked"], [
        KeyStats(
            layer=entry["layer"],
            moment=_unpack(tensors[f"layer.{entry['layer']}"], entry["size"]),
            n_tokens=entry["n_tokens"],
            corpus=entry["corpus"],
            provenance=None if entry["provenance"] is None else Provenance.from_json(entry["provenance"]),
        )
        for entry in header["layers"]
    ]


def _reuse(
    there: Mapping[Path, Sequence[int]], texts: Iterable[str], now: Provenance, asked: dict[str, Any]
) -> dict[int, KeyStats]:
    """What is on disk, if it is the collection that was asked for."""
    found: dict[int, KeyStats] = {}
    source = iter(texts)
    digest: str | None = None
    for path, layers in there.items():
        then, stats = _read(path)
        given = {key: then.get(key) for key in asked}
        if given != asked:
            raise ValueError(f"{path} was collected with {given}, asked for {asked}: name another path or delete it")
        if digest is None:
            digest = _digest_of(source, then["n_texts"])
            if stats[0].n_tokens < asked["n_asked"] and next(source, None) is not None:
                digest = None  # those texts ended before the tokens that were asked for; these go on
        held = {s.layer: s for s in stats}
        missing = sorted(set(layers) - set(held))
        if missing:
            raise ValueError(f"{path} holds layers {sorted(held)}, not {missing}: name another path or delete it")
        for layer in layers:
            s = held[layer]
            if s.provenance is None or not s.provenance.weights.matches(now.weights):
                raise ValueError(f"{path} is of other weights than the model's ({now.weights}): name another path")
            if s.provenance.prepend_bos != now.prepend_bos:
                raise ValueError(f"{path} was collected with prepend_bos={s.provenance.prepend_bos}: name another path")
            if s.corpus != digest:
                raise ValueError(f"{path} was collected on other texts: name another path or delete it")
            found[layer] = s
    return found


def _digest_of(texts: Iterator[str], count: int) -> str:
    reader = _Reader(itertools.islice(texts, count))
    for _ in reader:
        pass
    return reader.digest


def _pack(moment: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "packed"]:
    rows, cols = torch.triu_indices(*moment.shape)
    return moment.cpu()[rows, cols]


def _unpack(packed: Float[Tensor, "packed"], size: int) -> Float[Tensor, "size size"]:
    rows, cols = torch.triu_indices(size, size)
    moment = torch.zeros(size, size, dtype=packed.dtype)
    moment[rows, cols] = packed
    moment[cols, rows] = packed
    return moment
