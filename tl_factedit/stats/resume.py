"""Statistics that were interrupted are resumed, to the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.provenance import Provenance, difference
from tl_factedit.core import files
from tl_factedit.core.typed import fitting
from tl_factedit.stats.key_stats import KeyStats, read_stats_file
from tl_factedit.stats.streaming import Place, Reader
from tl_factedit.stats.sums import Sums, pack_sums, unpack_sums

UNFINISHED = "unfinished key statistics"
"""What the file of a collection calls itself that has not come to its end."""


@dataclass(frozen=True, eq=False)
class _Unfinished:
    """What such a file holds; `packed` are the sums by layer, as of `pack_sums`."""

    asked: Mapping[str, Any]
    layers: tuple[int, ...]
    counted: int
    place: Place
    provenance: Provenance
    packed: dict[int, Float[Tensor, "_"]]


@dataclass(frozen=True)
class Draft:
    """The file of a collection that isn't finished.

    Attributes:
        file: Where it is.
        asked: What was asked for, as plain data.
        layers: All layers asked for.
        provenance: Provenance of the model now.
    """

    file: Path
    asked: Mapping[str, Any]
    layers: tuple[int, ...]
    provenance: Provenance

    def write(self, sums: Sums) -> None:
        """Keep the sums so far, in place of those before."""
        sums.check_finite()
        header = {
            "asked": dict(self.asked),
            "layers": list(self.layers),
            "counted": sums.counted,
            "place": asdict(sums.place),
            "provenance": self.provenance.to_json(),
        }
        files.write(self.file, UNFINISHED, header, {f"layer.{n}": pack_sums(total) for n, total in sums.totals.items()})

    def read_into_(self, empty: Sums) -> Sums:
        """The sums so far of the layers in `empty`, in the same memory.

        Raises:
            ValueError: The file is damaged, or of another collection.
        """
        kept = self._content()
        given = {**kept.asked, "layers": list(kept.layers)}
        wanted = {**self.asked, "layers": list(self.layers)}
        if given != wanted:
            raise ValueError(
                f"{self.file} is an unfinished collection of {given}, asked for {wanted}: ask for the same to finish "
                "it, name another path, or delete it"
            )
        _check_origin(self.file, kept.provenance, self.provenance)
        for layer, total in empty.totals.items():
            if layer not in kept.packed:  # it was finished, and that file is gone
                raise ValueError(f"{self.file} holds no sums of layer {layer}: name another path, or delete it")
            packed, size = kept.packed.pop(layer), len(total)
            if len(packed) != size * (size + 1) // 2 or packed.dtype != total.dtype:
                raise ValueError(
                    f"{self.file} holds {len(packed)} sums of layer {layer} in {packed.dtype}, needed those of d_mlp = "
                    f"{size} in {total.dtype}: name another path, or delete it"
                )
            total.copy_(unpack_sums(packed, size))
        return Sums(empty.totals, kept.counted, kept.place)

    def drop_if_mine(self) -> None:
        """Remove what a kill between writing the result and tidying up has left."""
        if self.file.exists():
            kept = self._content()
            if kept.asked == self.asked and kept.layers == self.layers:
                self.file.unlink()

    def _content(self) -> _Unfinished:
        try:
            with files.opened(self.file, UNFINISHED) as file:
                layers = tuple(file.fields("layers", int))
                return _Unfinished(
                    asked=file.field("asked", dict),
                    layers=layers,
                    counted=file.field("counted", int),
                    place=file.made("place", Place),
                    provenance=Provenance.from_json(file.field("provenance", dict)),
                    packed={
                        n: file.tensor(f"layer.{n}", f"packed.{n}") for n in layers if f"layer.{n}" in file.tensors
                    },
                )
        except ValueError as error:
            raise ValueError(f"{error}; it is only the sums so far: delete it to begin again") from error


def places_for(path: Path | None, layers: Sequence[int]) -> dict[Path, list[int]]:
    """Which file is to hold which layers."""
    if path is None:
        return {}
    if path.suffix == ".safetensors":
        return {path: list(layers)}
    return {path / f"layer_{layer}.safetensors": [layer] for layer in layers}


def unfinished_path(path: Path) -> Path:
    """Where the sums so far are kept."""
    if path.suffix == ".safetensors":
        return path.with_name(f"{path.stem}.unfinished.safetensors")
    return path / "unfinished.safetensors"


def reuse_file(
    there: Mapping[Path, Sequence[int]], texts: Iterable[str], now: Provenance, asked: dict[str, Any]
) -> dict[int, KeyStats]:
    """What is on disk, if it is the collection that was asked for."""
    found: dict[int, KeyStats] = {}
    source = iter(texts)
    digest: str | None = None
    for path, layers in there.items():
        then, stats = read_stats_file(path)
        given = {key: then.get(key) for key in asked}
        if given != asked:
            raise ValueError(f"{path} was collected with {given}, asked for {asked}: name another path or delete it")
        if digest is None:
            digest = _digest_of(source, fitting(then.get("n_texts"), int, f"asked.n_texts of {path}"))
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
    """Check that what is in a file was collected as it would be now."""
    if then is None or not then.weights.matches(now.weights):
        raise ValueError(f"{path} is of other weights than the model's ({now.weights}): name another path")
    if differs := difference(then, now):
        raise ValueError(
            f"{path} was collected with {differs}: name another path, or take it as it is with KeyStats.load"
        )


def _digest_of(texts: Iterator[str], count: int) -> str:
    reader = Reader(itertools.islice(texts, count))
    for _ in reader:
        pass
    return reader.digest
