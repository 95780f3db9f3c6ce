"""Traces of many facts in a folder, resumed after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.provenance import Provenance
from tl_factedit.core import files
from tl_factedit.core.files import Unknown, encode
from tl_factedit.locate.inputs import TraceInputs, donor_texts
from tl_factedit.locate.replacement import CORRUPTIONS


@dataclass(frozen=True, eq=False)
class TracePart:
    """What is kept of one fact that is traced.

    Attributes:
        effect: IE of each sample, NaN-free.
        clean: The metric of its clean run, for each sample.
        corrupted: Those of its corrupted runs.
        top: The token that the clean model puts first, and that after each token of white space that the object
            begins with.
    """

    effect: Float[Tensor, "layer pos sample"]
    clean: Float[Tensor, "sample"]
    corrupted: Float[Tensor, "sample"]
    top: tuple[int, ...]


class TraceFolder:
    """Facts that are traced, kept in a folder if there is one."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self.folder, self.digest, self.done = folder, digest, dict[int, TracePart]()

    @classmethod
    def of(
        cls, folder: str | Path | None, questions: TraceInputs, settings: dict[str, Any], provenance: Provenance
    ) -> TraceFolder:
        """With what an earlier call left in the folder."""
        if folder is None:
            return cls(None, "")
        tensors: dict[str, Tensor] = {}
        asked = settings | {
            "facts": [asdict(question.fact) for question in questions.each],
            "corruption": encode(questions.corruption, "corruption", tensors, (*CORRUPTIONS, Unknown)),
            "donors": donor_texts(questions),
            "provenance": provenance.origin(),
        }
        if " at 0x" in json.dumps(asked["corruption"]):
            raise ValueError(
                f"corruption is {questions.corruption!r}, of which a file can't tell one from another: needed a repr "
                "that says what it is (a dataclass has one), or no folder"
            )
        where = files.pinned_folder(folder)
        parts = cls(where, files.digest("trace", json.dumps(asked, default=files.plain_number), tensors))
        for path in sorted(where.glob("part-*.safetensors")):
            with files.opened(path, "part of a trace") as file:
                digest = file.field("digest", str)
                found = {
                    i: TracePart(
                        file.tensor(f"effect.{i}", f"layer pos.{i} sample", missing=True),
                        file.tensor(f"clean.{i}", "clean", missing=True),
                        file.tensor(f"corrupted.{i}", "sample", missing=True),
                        top=top,
                    )
                    for i, top in file.fields("top", tuple[int, tuple[int, ...]])
                }
            if digest != parts.digest:
                raise ValueError(
                    f"{path} belongs to another trace (other facts, settings, weights or versions): give another folder"
                )
            parts.done |= found
        return parts

    def add(self, which: Sequence[int], found: Iterable[TracePart]) -> None:
        """Keep some more."""
        new = dict(zip(which, found, strict=True))
        self.done |= new
        if self.folder is not None:
            tensors = {
                f"{name}.{i}": getattr(part, name)
                for i, part in new.items()
                for name in ("effect", "clean", "corrupted")
            }
            header = {"digest": self.digest, "top": [(i, part.top) for i, part in new.items()]}
            files.write(self.folder / f"part-{min(new):06}.safetensors", "part of a trace", header, tensors)
