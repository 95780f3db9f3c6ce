"""Second moments of keys, C = E[k kᵀ]: what an edit is to leave alone.

Uncentred, over the input of ``W_out`` at every token of some text (Meng et al. 2022,
arXiv:2202.05262, eq. 2 and app. E.2), summed in float64.

A sum is symmetric, so only its upper triangle is ever read: that is what files hold, and what a collection that was
killed resumes from, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.fingerprint import Fingerprint
from tl_factedit.backend.hashing import hash_one
from tl_factedit.backend.protocol import Model, check_layer
from tl_factedit.backend.provenance import Provenance, difference
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core import files
from tl_factedit.core.kinds import as_whole
from tl_factedit.core.typed import made
from tl_factedit.stats.published import read_npz
from tl_factedit.stats.sums import pack_sums, unpack_sums

TOKENS_PER_DIMENSION = 10
"""How many tokens a second moment wants for each of its d_mlp dimensions before it is inverted as it is."""


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
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
    @plain_torch()
    def identity(cls, model: Model, layer: int) -> KeyStats:
        """The identity in place of C: turns ROME's update into the plain ``r kᵀ / kᵀk``.

        Raises:
            UnsupportedModelError: The layer has no W_out that can be edited, or the model isn't causal.

        Example:
            >>> edit = fe.Rome(fe.KeyStats.identity(model, 8))(model, [fact])    # doctest: +SKIP
        """
        layer = as_whole(layer, "layer", None)
        size = _size_of_keys(model, layer)
        return cls(layer, torch.eye(size, dtype=torch.float64), 0, "identity", None)

    @classmethod
    @plain_torch()
    def from_npz(cls, path: str | Path, model: Model, layer: int, *, prepend_bos: bool | None = None) -> KeyStats:
        """Statistics as the codes of ROME, MEMIT and EasyEdit publish them (``mom2.mom2``, ``mom2.count``).

        Args:
            path: The ``.npz`` file.
            model: The model that they are of, unedited. The file doesn't say which it is: only its size is checked.
            layer: The block that they are of.
            prepend_bos: Whether they were collected with BOS; None: as the tokenizer does by itself, to which those
                codes leave it (GPT-2's doesn't, Llama's does).

        Raises:
            FileNotFoundError: No such file.
            ValueError: It isn't such a file, or its moment can't be one of this layer.
            UnsupportedModelError: The layer has no W_out that can be edited, or the model isn't causal.

        Example:
            >>> stats = fe.KeyStats.from_npz("h.17.mlp.c_proj_mom2.npz", model, 17)   # doctest: +SKIP
        """
        layer, file = as_whole(layer, "layer", None), files.pinned(path)
        moment, n_tokens = read_npz(file, _size_of_keys(model, layer))
        if prepend_bos is None:
            bos = model.tokenizer.bos_token_id
            prepend_bos = bos is not None and model.tokenizer("a")["input_ids"][:1] == [bos]
        origin = replace(Provenance.of(model, prepend_bos), versions={"file": file.name})
        return cls(layer, moment, n_tokens, f"npz {hash_one(moment)[:16]}", origin)

    @property
    def is_identity(self) -> bool:
        """Whether this is the identity, which stands for no statistics at all."""
        return self.n_tokens == 0 and self.corpus == "identity"

    @cached_property
    def digest(self) -> str:
        """A hash of the moment."""
        return hash_one(self.moment)

    @property
    def wanted_tokens(self) -> int:
        """How many tokens an unridged inverse wants: ten for each dimension.

        Example:
            >>> fe.KeyStats(8, torch.eye(64).double(), 500, "made up", None).wanted_tokens
            640
        """
        return TOKENS_PER_DIMENSION * len(self.moment)

    @plain_torch()
    def check(self, model: Model, weights: Fingerprint) -> None:
        """Check that these statistics are of this model.

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

    @plain_torch()
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
        if differs := difference(mine, theirs):
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

    @plain_torch()
    def save(self, path: str | Path) -> None:
        """Write one file (safetensors: the upper triangle, and where it came from).

        Example:
            >>> stats[8].save("layer_8.safetensors")              # doctest: +SKIP
        """
        write_stats_file([self], Path(path), {})

    @classmethod
    @plain_torch()
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
        _, found = read_stats_file(Path(path))
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


def _size_of_keys(model: Model, layer: int) -> int:
    """d_mlp of a layer; the model is refused as it is where keys are collected (see `check_causal`)."""
    size = down_proj(model, layer).W.shape[0]
    with frozen(model):
        Runner(model)
    return size


@dataclass(frozen=True)
class _Saved:
    """What a file's header says of one layer; `size` is d_mlp."""

    layer: int
    n_tokens: int
    corpus: str
    size: int
    provenance: Provenance | None

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("n_tokens", 0), ("size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, needed {least} or more")


def write_stats_file(stats: Sequence[KeyStats], path: Path, asked: dict[str, Any]) -> None:
    """Write statistics of several layers into one file, with what they were asked with."""
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
    files.write(path, "key statistics", header, {f"layer.{s.layer}": pack_sums(s.moment) for s in stats})


def read_stats_file(path: Path) -> tuple[dict[str, Any], list[KeyStats]]:
    """What was asked for, and the statistics of each layer.

    Raises:
        ValueError: The file is cut short or changed, or what it holds doesn't fit together.
    """
    with files.opened(path, "key statistics") as file:
        found = []
        for i, entry in enumerate(file.fields("layers", dict)):
            said = made(_Saved, entry, f"layers[{i}]", plain=True)
            packed = file.tensor(f"layer.{said.layer}", str(said.size * (said.size + 1) // 2), dtype=torch.float64)
            found.append(
                KeyStats(said.layer, unpack_sums(packed, said.size), said.n_tokens, said.corpus, said.provenance)
            )
        return file.field("asked", dict), found
