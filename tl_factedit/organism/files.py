"""The organism's weights in files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_factedit.organism import world as o
from tl_factedit.organism.text import data_seed
from tl_factedit.organism.training import BASE_ROUTES, ROUTES, Recipe, untrained


def record(variant: str, recipe: Recipe, *, threads: int) -> dict[str, Any]:
    """What a training depends on, for the metadata of its file."""
    return {
        "what": "tl_factedit organism",
        "variant": variant,
        "world_seed": o.WORLD_SEED,
        "seed": data_seed(variant),
        "recipe": asdict(recipe),
        "routes": ROUTES.get(variant, BASE_ROUTES),
        "threads": threads,
    }


def save(path: Path, model: Any, record: dict[str, Any]) -> None:
    """Write the weights as float16 safetensors, with `record` as metadata; the same ones as the same bytes."""
    from safetensors.torch import save

    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" and not k.endswith(".attn.bias")}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = save(
        {k: v.half().contiguous() for k, v in state.items()},
        metadata={k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()},
    )
    path.write_bytes(_in_order(written))


def _in_order(written: bytes) -> bytes:
    """The same file with sorted metadata: safetensors writes them in another order each time."""
    size = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + written[8 + size :]


def load(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a model that `save` wrote, and its record."""
    from safetensors import safe_open

    model = untrained()
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        record = dict(file.metadata())
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(name != "lm_head.weight" for name in missing):
        raise ValueError(f"{path} holds other weights than the organism's: it lacks {missing} and has {unexpected}")
    model.tie_weights()
    return model.eval(), record
