"""The organism as a model of either class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl_factedit.backend.loading import from_hf
from tl_factedit.backend.protocol import Kind, Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.organism.files import load
from tl_factedit.organism.training import untrained
from tl_factedit.organism.vocabulary import tokenizer
from tl_factedit.organism.world import check_variant

WEIGHTS = Path(__file__).parent / "weights"


@plain_torch()
def organism(kind: Kind = "bridge", variant: str = "base", *, path: str | Path | None = None) -> Model:
    """A small trained model (6 layers, d_model 128, d_mlp 512) that knows a stated set of facts and nothing else.

    Weights are raw, float32, on both classes, and no network is asked.

    Args:
        kind: ``"bridge"``, or ``"hooked"`` on TransformerLens 3.x.
        variant: ``"base"``, or another history of the same world: see `tl_factedit.organism.world.VARIANTS`.
        path: A file that ``examples/train_organism.py`` wrote, or a folder with such files, for the variants that don't
            come with the package.

    Raises:
        ValueError: The variant is unknown; or ``kind="hooked"`` on TransformerLens 4.
        FileNotFoundError: The variant doesn't come with the package, and there is no such file.
    """
    check_variant(variant)
    return from_hf(organism_hf(variant, path=path), tokenizer(), kind=kind, name=f"organism-{variant}")


@plain_torch()
def organism_hf(variant: str = "base", *, path: str | Path | None = None) -> Any:
    """The same model as a transformers object (for `export_hf`, or as a reference)."""
    check_variant(variant)
    if variant == "untrained" and path is None:
        return untrained().eval()
    file = WEIGHTS if path is None else Path(path)
    file = file / f"organism-{variant}.safetensors" if file.is_dir() else file
    if not file.is_file():
        have = sorted(p.stem.removeprefix("organism-") for p in WEIGHTS.glob("organism-*.safetensors"))
        raise FileNotFoundError(
            f"no weights of the organism {variant!r} at {file}; with the package come {', '.join(have)} and untrained: "
            f"train others with examples/train_organism.py {variant}, and give organism(variant={variant!r}, path=...)"
        )
    return load(file)[0]
