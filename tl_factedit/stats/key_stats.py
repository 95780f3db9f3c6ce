"""Second moments of keys, C = E[k kᵀ]: what an edit is to leave alone.

Uncentred, over the input of ``W_out`` at every token of some text (Meng et al. 2022,
arXiv:2202.05262, eq. 2 and app. E.2), summed in float64.

A sum is symmetric, so only its upper triangle is ever read: that is what files hold, and what a collection that was
killed goes on from, bit for bit.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.core import files
from tl_factedit.backend.model import (
    DownProj,
    Fingerprint,
    Model,
    Runner,
    as_layers,
    check_layer,
    device,
    down_proj,
    hash_weight,
    quiet,
)
from tl_factedit.backend.provenance import Provenance
from tl_factedit.stats.streaming import KeyBatch, Place, Reader, check_amounts, stream_keys

TOKENS_PER_DIMENSION = 10
"""How many tokens a second moment wants for each of its d_mlp dimensions before it is inverted as it is."""
UNFINISHED = "unfinished key statistics"
"""What the file of a collection calls itself that has not come to its end."""


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class KeyStats:
    """The second moment of one layer's keys.

    Attributes:
        layer: The block.
        moment: E[k kᵀ], [d_mlp, d_mlp], float64.
        n_tokens: How many tokens it averages; 0 for the identity, which averages none.
        corpus: What was read: a hash of the texts (of merged statistics those of all parts, joined by ``+``), or
            ``"identity"``.
        provenance: Model, weights and BOS policy; None for the identity, and for what was collected by other means:
            these fit any weights of the same size.

    Example:
        >>> fe.KeyStats(8, torch.eye(64).double(), 1_000, "made up", None)
        KeyStats(layer=8, 1,000 tokens, d_mlp=64, any model)
    """

    layer: int
    moment: Float[Tensor, "d_mlp d_mlp"]
    n_tokens: int
    corpus: str
    provenance: Provenance | None

    @classmethod
    def identity(cls, model: Model, layer: int) -> KeyStats:
        """The identity in place of C: turns ROME's update into the plain ``r kᵀ / kᵀk``.

        Example:
            >>> edit = fe.Rome(fe.KeyStats.identity(model, 8))(model, [fact])    # doctest: +SKIP
        """
        layer = operator.index(layer)
        size = down_proj(model, layer).W.shape[0]
        return cls(layer, torch.eye(size, dtype=torch.float64), 0, "identity", None)

    @property
    def is_identity(self) -> bool:
        """Whether this is the identity, which stands for no statistics at all."""
        return self.n_tokens == 0 and self.corpus == "identity"

    @cached_property
    def digest(self) -> str:
        """A hash of the moment."""
        return hash_weight(self.moment)

    @property
    def wanted_tokens(self) -> int:
        """How many tokens an unridged inverse wants: ten for each dimension.

        Example:
            >>> fe.KeyStats(8, torch.eye(64).double(), 500, "made up", None).wanted_tokens
            640
        """
        return TOKENS_PER_DIMENSION * len(self.moment)

    def check(self, model: Model, weights: Fingerprint) -> None:
        """See that these statistics are of this model.

        Args:
            model: The model to be edited.
            weights: Fingerprint of its weights before any edit.

        Raises:
            ValueError: Another layer, size, model or weights.

        Example:
            >>> stats[8].check(model, fingerprint(model))         # doctest: +SKIP
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
            ValueError: They are of different layers, weights, BOS policies or versions, or of the same texts.

        Example:
            >>> both = fe.key_stats(model, 8, books)[8] + fe.key_stats(model, 8, news)[8]    # doctest: +SKIP
        """
        mine, theirs = self.provenance, other.provenance
        if self.layer != other.layer or mine is None or theirs is None:
            raise ValueError(
                f"can't merge statistics of layer {self.layer} ({self.corpus}) and {other.layer} ({other.corpus}): "
                "needed two collections on one layer"
            )
        if not mine.weights.matches(theirs.weights) or mine.prepend_bos != theirs.prepend_bos:
            raise ValueError("can't merge statistics of different weights or BOS policies: collect both on one model")
        if differs := _difference(mine, theirs):
            raise ValueError(f"can't merge statistics that were collected with {differs}: collect both alike")
        parts = [*self.corpus.split("+"), *other.corpus.split("+")]
        if twice := sorted({part for part in parts if parts.count(part) > 1}):
            raise ValueError(f"both statistics are of the same texts ({', '.join(twice)}), which would count twice")
        total = self.n_tokens + other.n_tokens
        moment = (self.moment * (self.n_tokens / total)).add_(other.moment, alpha=other.n_tokens / total)
        return KeyStats(self.layer, moment, total, "+".join(sorted(parts)), mine)

    def __radd__(self, other: object) -> KeyStats:
        """So that ``sum`` takes them, which begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def save(self, path: str | Path) -> None:
        """Write one file (safetensors: the upper triangle, and where it came from).

        Example:
            >>> stats[8].save("layer_8.safetensors")              # doctest: +SKIP
        """
        _write([self], Path(path), {})

    @classmethod
    def load(cls, path: str | Path, layer: int | None = None) -> KeyStats:
        """Read one layer of a file of `save` or `key_stats`, whatever versions it was made with.

        Args:
            path: The file.
            layer: Which of its layers; may be left out if it holds only one.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is cut short or changed, holds several layers and none was named, or not this one.

        Example:
            >>> stats = fe.KeyStats.load("layer_8.safetensors")   # doctest: +SKIP
        """
        _, found = _read(Path(path))
        chosen = [s for s in found if layer is None or s.layer == layer]
        if len(chosen) != 1:
            raise ValueError(
                f"{path} holds layers {[s.layer for s in found]}, asked for {'one' if layer is None else layer}: "
                "name one of them with KeyStats.load(path, layer=...)"
            )
        return chosen[0]

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
    save_every: int = 25_000,
    progress: bool = True,
) -> dict[int, KeyStats]:
    """Collect the second moments of the keys of some layers, in one pass over some texts.

    Long texts are cut into pieces of `context` tokens, each with its own BOS if there is one. The
    keys of BOS are counted: every prompt has them, so an edit must spare them.

    With a `path` the sums so far are kept beside the final files (``….unfinished.safetensors``) until those are
    written. The same call with the same texts goes on from there; what was counted already is read and hashed again,
    but not run. The result has the same bits as that of a collection that was never interrupted (in batches of the
    same size, on as many threads).

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
        save_every: Tokens between two saves of the sums so far, if there is a `path`. A save writes 4 d_mlp² bytes a
            layer: let it be rarer where a model is wide and fast.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        Statistics by layer.

    Raises:
        ValueError: No such layer, no text, or the files at `path` are damaged or of another model, weights, dtype,
            revision, corpus, number of tokens, BOS policy or versions (they are left as they are).
        RuntimeError: The model overflows.

    Example:
        >>> stats = fe.key_stats(model, [8], texts, n_tokens=20_000)       # doctest: +SKIP
        >>> edit = fe.Rome(stats[8])(model, [fact])                        # doctest: +SKIP
        >>> fe.key_stats(model, [4, 8], texts, path="stats/")              # doctest: +SKIP
    """
    wanted = as_layers(layers)
    if not wanted:
        raise ValueError("layers is empty, needed at least one")
    sites = {layer: down_proj(model, layer) for layer in wanted}
    check_amounts(texts, n_tokens, context)
    if save_every <= 0:
        raise ValueError(f"save_every is {save_every}, needed at least 1 token")
    provenance = Provenance.of(model, prepend_bos)
    asked = {"n_asked": n_tokens, "context": context}
    path = None if path is None else Path(path).expanduser()
    places = _places(path, wanted)
    there = {file: held for file, held in places.items() if file.exists()}
    # A one-way iterator would be used up by checking what is there; a list or a corpus is simply read twice.
    texts, again = itertools.tee(texts) if there and iter(texts) is texts else (texts, texts)
    kept = _reuse(there, again, provenance, asked)
    sites = {layer: site for layer, site in sites.items() if layer not in kept}
    draft = None if path is None else _Draft(_unfinished(path), asked, tuple(wanted), provenance)
    if not sites:
        if draft is not None:
            draft.drop_if_mine()
        return {layer: kept[layer] for layer in wanted}

    reader = Reader(texts)
    with tqdm(total=n_tokens, unit="token", desc="key statistics", delay=1, disable=not progress) as bar:
        sums = _collect(model, sites, reader, provenance, n_tokens, context, batch_tokens, draft, save_every, bar)
    found = {
        layer: KeyStats(layer, mirror_(total).div_(sums.counted).cpu(), sums.counted, reader.digest, provenance)
        for layer, total in sums.totals.items()
    }
    for file, held in places.items():
        if file not in there:
            _write([found[layer] for layer in held], file, {**asked, "n_texts": reader.count})
    if draft is not None:
        draft.file.unlink(missing_ok=True)
    return {layer: {**kept, **found}[layer] for layer in wanted}


def _collect(
    model: Model,
    sites: Mapping[int, DownProj],
    reader: Reader,
    provenance: Provenance,
    n_tokens: int,
    context: int,
    batch_tokens: int,
    draft: _Draft | None,
    save_every: int,
    bar: tqdm,
) -> _Sums:
    """The sums over the texts, beginning with those in the draft; kept there on the way."""
    with quiet(model), torch.no_grad():
        # Made inside `quiet`: a caller's inference_mode would make tensors that can't be added to in it.
        runner, sums = Runner(model), _Sums.zeros(sites, where(model))
        if draft is not None and draft.file.exists():
            sums = draft.read_into_(sums)
            reader.skip_to(sums.place, draft.file)
            bar.update(sums.counted)
        left = n_tokens - sums.counted
        for batch in stream_keys(runner, sites, reader, provenance.prepend_bos, context, left, batch_tokens):
            saved = sums.counted // save_every
            sums.add_(batch)
            bar.update(batch.n_tokens)
            if draft is not None and sums.counted // save_every > saved and sums.counted < n_tokens:
                draft.write(sums)
    if sums.counted == 0:
        raise ValueError("the texts hold no tokens: give some text")
    sums.check_finite()
    return sums


# ------------------------------------------------------------------------------------ sums


def where(model: Model) -> torch.device:
    """Where sums are kept: with the model, unless that is where float64 isn't known (Apple's MPS)."""
    return torch.device("cpu") if device(model).type == "mps" else device(model)


@dataclass(eq=False)
class _Sums:
    """Σ k kᵀ by layer, so far; of each matrix only the upper triangle (with the diagonal) is meant."""

    totals: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    counted: int
    place: Place

    @classmethod
    def zeros(cls, sites: Mapping[int, DownProj], at: torch.device) -> _Sums:
        """Nothing summed yet."""
        sizes = {layer: len(site.W) for layer, site in sites.items()}
        totals = {layer: torch.zeros(size, size, dtype=torch.float64, device=at) for layer, size in sizes.items()}
        return cls(totals, 0, Place(0, 0, ""))

    def add_(self, batch: KeyBatch) -> None:
        """Count a batch. In place, as one matrix of a wide layer is a large part of the memory."""
        for layer, total in self.totals.items():
            keys = batch.keys(layer, total.device)
            total.addmm_(keys.T, keys)
        self.counted += batch.n_tokens
        self.place = batch.place

    def check_finite(self) -> None:
        """By the diagonal, as |C_ij|² <= C_ii C_jj."""
        if not all(bool(total.diagonal().isfinite().all()) for total in self.totals.values()):
            raise RuntimeError("key statistics are not finite: the model overflows on this text (try another dtype)")


def mirror_(upper: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """Overwrite the lower triangle by the upper one."""
    upper.triu_()
    return upper.add_(upper.triu(1).T)


@dataclass(frozen=True)
class _Draft:
    """The file of a collection that isn't finished.

    Attributes:
        file: Where it is.
        asked: What was asked for, as plain data.
        layers: All layers asked for.
        provenance: Of the model now.
    """

    file: Path
    asked: Mapping[str, Any]
    layers: tuple[int, ...]
    provenance: Provenance

    def write(self, sums: _Sums) -> None:
        """Keep the sums so far, in place of those before."""
        sums.check_finite()
        header = {
            "asked": dict(self.asked),
            "layers": list(self.layers),
            "counted": sums.counted,
            "place": asdict(sums.place),
            "provenance": self.provenance.to_json(),
        }
        files.write(self.file, UNFINISHED, header, {f"layer.{n}": _pack(total) for n, total in sums.totals.items()})

    def read_into_(self, empty: _Sums) -> _Sums:
        """The sums so far of the layers in `empty`, in the same memory.

        Raises:
            ValueError: The file is damaged, or of another collection.
        """
        header, tensors = self._content()
        given = {**header["asked"], "layers": header["layers"]}
        wanted = {**self.asked, "layers": list(self.layers)}
        if given != wanted:
            raise ValueError(
                f"{self.file} is an unfinished collection of {given}, asked for {wanted}: ask for the same to finish "
                "it, name another path, or delete it"
            )
        _check_origin(self.file, Provenance.from_json(header["provenance"]), self.provenance)
        for layer, total in empty.totals.items():
            if f"layer.{layer}" not in tensors:  # it was finished, and that file is gone
                raise ValueError(f"{self.file} holds no sums of layer {layer}: name another path, or delete it")
            total.copy_(_unpack(tensors.pop(f"layer.{layer}"), len(total)))
        return _Sums(empty.totals, header["counted"], Place(**header["place"]))

    def drop_if_mine(self) -> None:
        """Remove what a kill between writing the result and tidying up has left."""
        if self.file.exists():
            header, _ = self._content()
            if header["asked"] == self.asked and tuple(header["layers"]) == self.layers:
                self.file.unlink()

    def _content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            return files.read(self.file, UNFINISHED)
        except ValueError as error:
            raise ValueError(f"{error}; it is only the sums so far: delete it to begin again") from error


# ------------------------------------------------------------------------------------ files


def _places(path: Path | None, layers: Sequence[int]) -> dict[Path, list[int]]:
    """Which file is to hold which layers."""
    if path is None:
        return {}
    if path.suffix == ".safetensors":
        return {path: list(layers)}
    return {path / f"layer_{layer}.safetensors": [layer] for layer in layers}


def _unfinished(path: Path) -> Path:
    """Where the sums so far are kept."""
    if path.suffix == ".safetensors":
        return path.with_name(f"{path.stem}.unfinished.safetensors")
    return path / "unfinished.safetensors"


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
            _check_origin(path, s.provenance, now)
            if s.corpus != digest:
                raise ValueError(f"{path} was collected on other texts: name another path or delete it")
            found[layer] = s
    return found


def _check_origin(path: Path, then: Provenance | None, now: Provenance) -> None:
    """See that what is in a file was collected as it would be now."""
    if then is None or not then.weights.matches(now.weights):
        raise ValueError(f"{path} is of other weights than the model's ({now.weights}): name another path")
    if differs := _difference(then, now):
        raise ValueError(
            f"{path} was collected with {differs}: name another path, or take it as it is with KeyStats.load"
        )


def _difference(then: Provenance, now: Provenance) -> str | None:
    """What two collections on the same weights differ in. A model's name is none of it: the weights are."""
    if then.prepend_bos != now.prepend_bos:
        return f"prepend_bos={then.prepend_bos} (not {now.prepend_bos})"
    if then.dtype != now.dtype:
        return f"dtype {then.dtype} (not {now.dtype})"
    if None not in (then.revision, now.revision) and then.revision != now.revision:
        return f"revision {then.revision} of the model (not {now.revision})"
    changed = [name for name in {**then.versions, **now.versions} if then.versions.get(name) != now.versions.get(name)]
    if changed:
        return ", ".join(f"{name} {then.versions.get(name)} (not {now.versions.get(name)})" for name in changed)
    return None


def _digest_of(texts: Iterator[str], count: int) -> str:
    reader = Reader(itertools.islice(texts, count))
    for _ in reader:
        pass
    return reader.digest


def _pack(moment: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "packed"]:
    """The upper triangle row by row: an index of it would be as large as the matrix."""
    return torch.cat([row[i:] for i, row in enumerate(moment.cpu())])


def _unpack(packed: Float[Tensor, "packed"], size: int) -> Float[Tensor, "size size"]:
    moment = torch.zeros(size, size, dtype=packed.dtype)
    for i, row in enumerate(packed.split(list(range(size, 0, -1)))):
        moment[i, i:] = row
    return mirror_(moment)
