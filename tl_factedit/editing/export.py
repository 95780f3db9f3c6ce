"""Edits written into a transformers model, with no TransformerLens around it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_factedit.backend.fingerprint import hash_weight
from tl_factedit.backend.protocol import UnsupportedModelError, kind_of
from tl_factedit.backend.state import plain_torch
from tl_factedit.editing.edit import Edit

BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
"""Where transformers keep their blocks."""
DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "mlp.fc2", "fc2")
"""What the output matrix of a block's MLP is called."""


@plain_torch()
def export_hf(edit: Edit, hf_model: Any) -> None:
    """Write an edit into a transformers model, in place.

    The model's logits are then those of the TransformerLens model with the edit applied. An edit made on processed
    weights (folded norms, centred outputs) is written into the raw ones: keys are the same there, and what a value has
    along the mean direction is nothing to a norm that subtracts it.

    Args:
        edit: The edit.
        hf_model: A causal language model of transformers, with the weights that the edit was made for.

    Several edits go into one model as one: ``export_hf(compose(edits), hf_model)``.

    Warns:
        EditWarning: As `Edit.apply_` does.

    Raises:
        ValueError: The model is one of TransformerLens, has other weights, holds an edit already, or the edited
            weights would not be finite in their type. Nothing is written.
        UnsupportedModelError: The model's MLPs weren't found.

    Example:
        >>> fe.export_hf(edit, hf_model)                          # doctest: +SKIP
        >>> hf_model.save_pretrained("edited/")                   # doctest: +SKIP
    """
    if kind_of(hf_model) is not None:
        raise ValueError(
            f"{type(hf_model).__name__} is a model of TransformerLens, needed one of transformers: write "
            "edit.apply_(model), which can be undone"
        )
    blocks = _blocks(hf_model)
    wanted = edit.provenance.weights.w_out
    if len(blocks) != len(wanted):
        raise ValueError(f"the edit is of a model with {len(wanted)} layers, this one has {len(blocks)}")
    for layer, block in enumerate(blocks):
        if wanted[layer] != "none" and not _same(_down(block, layer), wanted[layer]):
            raise ValueError(
                f"W_out of layer {layer} isn't the one the edit was made for (another model, dtype or revision, or "
                "edited before: several edits are written as one, compose(edits)): nothing was written"
            )
    new = []
    for delta in edit.deltas:
        param, transposed = _down(blocks[delta.layer], delta.layer)
        weight = param.detach().T if transposed else param.detach()
        changed = delta.on(weight)
        if not bool(changed.isfinite().all()):
            raise ValueError(
                f"the edit makes W_out of layer {delta.layer} overflow {weight.dtype}: nothing was written; load the "
                "model in float32 or bfloat16"
            )
        new.append((weight, changed))
    edit.warn()
    before = [weight.clone() for weight, _ in new]
    try:
        with torch.no_grad():
            for weight, changed in new:
                weight.copy_(changed)
    except BaseException:
        with torch.no_grad():
            for (weight, _), old in zip(new, before, strict=True):
                weight.copy_(old)
        raise


def _blocks(hf_model: Any) -> list[nn.Module]:
    for name in BLOCKS:
        found = _walk(hf_model, name)
        if found is not None:
            return list(found)
    raise UnsupportedModelError(f"{type(hf_model).__name__} keeps its blocks in none of {list(BLOCKS)}")


def _down(block: Any, layer: int) -> tuple[nn.Parameter, bool]:
    """The parameter, and whether it is stored as [d_model, d_mlp]."""
    # First as a TransformerBridge wraps it, which changes the model it is given.
    for name in ("mlp.out.original_component", *DOWN):
        found = _walk(block, name)
        if found is not None:
            # GPT-2's Conv1D stores [d_mlp, d_model].
            return found.weight, type(found).__name__ != "Conv1D"
    raise UnsupportedModelError(f"layer {layer} ({type(block).__name__}) has none of {list(DOWN)}")


def _walk(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _same(stored: tuple[nn.Parameter, bool], digest: str) -> bool:
    param, transposed = stored
    weight: Float[Tensor, "d_mlp d_model"] = param.detach().T if transposed else param.detach()
    # Processing may have centred what is written to the stream, and nothing else.
    return digest in (hash_weight(weight), hash_weight(weight - weight.mean(-1, keepdim=True)))
