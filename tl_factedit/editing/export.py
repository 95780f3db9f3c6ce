"""Edits written into a transformers model, with no TransformerLens around it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_factedit.backend.hashing import hash_one
from tl_factedit.backend.protocol import UnsupportedModelError, kind_of
from tl_factedit.backend.sharing import check_untied, places_of
from tl_factedit.backend.state import finish_despite_interrupt, plain_torch
from tl_factedit.backend.unwrapped import is_wrapped
from tl_factedit.editing.edit import Edit

BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
"""Where transformers keep their blocks."""
DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "mlp.fc2", "fc2")
"""What the output matrix of a block's MLP is called."""


@plain_torch()
def export_hf(edit: Edit, hf_model: Any) -> Any:
    """A copy of a transformers model with an edit written into it; the model itself stays as it is.

    The copy's logits are those of the TransformerLens model with the edit applied. An edit made on processed weights
    (folded norms, centred outputs) is written into the raw ones: keys are the same there, and what a value has along
    the mean direction is nothing to a norm that subtracts it.

    Args:
        edit: The edit. Several go into one model as one: ``export_hf(compose(edits), hf_model)``.
        hf_model: A causal language model of transformers, with the weights that the edit was made for.

    Returns:
        The changed copy, of the same class; weights that are tied in the model are tied in it.

    Warns:
        EditWarning: As `Edit.apply_` does.

    Raises:
        ValueError: The model is one of TransformerLens or lives inside one, has other weights, holds an edit already,
            or the edited weights would not be finite in their type.
        UnsupportedModelError: The model's MLPs weren't found, or one of those to be written is tied to another weight.

    Example:
        >>> edited = fe.export_hf(edit, hf_model)                 # doctest: +SKIP
        >>> edited.save_pretrained("edited/")                     # doctest: +SKIP
    """
    _changed([edit], hf_model)  # before a large model is copied
    changed = copy.deepcopy(hf_model)
    export_hf_(edit, changed)
    return changed


@plain_torch()
def export_hf_(edit: Edit, hf_model: Any) -> None:
    """Write an edit into a transformers model, in place: all of it, or nothing where it is refused or interrupted.

    It can't be taken back there; `export_hf` gives a changed copy. Arguments, warnings and errors are as there.

    Example:
        >>> fe.export_hf_(edit, hf_model)                         # doctest: +SKIP
    """
    write_edits_([edit], hf_model)


def write_edits_(edits: Sequence[Edit], hf_model: Any) -> None:
    """Write edits into a transformers model one after the other, each rounded as `Edit.apply_` would round it."""
    new = _changed(edits, hf_model)
    for i, edit in enumerate(edits):
        edit.warn(edits[:i])
    before = [weight.clone() for weight, _ in new]

    def put_back() -> None:
        with torch.no_grad():
            for (weight, _), old in zip(new, before, strict=True):
                weight.copy_(old)

    try:
        with torch.no_grad():
            for weight, changed in new:
                weight.copy_(changed)
    except BaseException:
        finish_despite_interrupt(put_back)
        raise


def _changed(edits: Sequence[Edit], hf_model: Any) -> list[tuple[Tensor, Tensor]]:
    """The weights to be written, live and as [d_mlp, d_model], and what they become; nothing is written."""
    _check_apart(hf_model)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise ValueError(
                f"edit is a {type(edit).__name__}, needed an Edit: what a router answers stands in no weight, so that "
                "a transformers model can't hold it"
            )
    blocks = _blocks(hf_model)
    wanted = edits[0].provenance.weights.w_out
    if len(blocks) != len(wanted):
        raise ValueError(f"the edit is of a model with {len(wanted)} layers, this one has {len(blocks)}")
    for layer, block in enumerate(blocks):
        if wanted[layer] != "none" and not _same(_down(block, layer), wanted[layer]):
            raise ValueError(
                f"W_out of layer {layer} isn't the one the edit was made for (another model, dtype or revision, or "
                "edited before: several edits are written as one, compose(edits)): nothing was written"
            )
    found: dict[int, tuple[Tensor, Tensor]] = {}
    places = places_of(hf_model)
    for delta in (delta for edit in edits for delta in edit.deltas):
        owner, transposed = _down(blocks[delta.layer], delta.layer)
        param = owner.weight
        if delta.layer not in found:
            check_untied(param, owner, delta.layer, places)
        live, weight = found.get(delta.layer, (param.detach().T if transposed else param.detach(),) * 2)
        changed = delta.on(weight)
        if not bool(changed.isfinite().all()):
            raise ValueError(
                f"the edit makes W_out of layer {delta.layer} overflow {weight.dtype}: nothing was written; load the "
                "model in float32 or bfloat16"
            )
        found[delta.layer] = (live, changed)
    return list(found.values())


def _check_apart(hf_model: Any) -> None:
    """Check that no model of TransformerLens would change unseen."""
    if kind_of(hf_model) is not None:
        raise ValueError(
            f"{type(hf_model).__name__} is a model of TransformerLens, needed one of transformers: write "
            "edit.apply_(model), which can be undone, and save_hf(model, folder) for a folder that transformers loads"
        )
    if isinstance(hf_model, nn.Module) and is_wrapped(hf_model):
        raise ValueError(
            f"this {type(hf_model).__name__} lives inside a TransformerBridge, whose weights would change unseen: "
            "apply the edit to the bridge (edit.apply_(bridge); save_hf(bridge, folder) for a folder that transformers "
            "loads), or give a model that was loaded apart"
        )


def _blocks(hf_model: Any) -> list[nn.Module]:
    for name in BLOCKS:
        found = _walk(hf_model, name)
        if found is not None:
            return list(found)
    raise UnsupportedModelError(f"{type(hf_model).__name__} keeps its blocks in none of {list(BLOCKS)}")


def _down(block: Any, layer: int) -> tuple[Any, bool]:
    """The module that has the weight, and whether that is stored as [d_model, d_mlp]."""
    for name in DOWN:
        found = _walk(block, name)
        if found is not None:
            # GPT-2's Conv1D stores [d_mlp, d_model].
            return found, type(found).__name__ != "Conv1D"
    raise UnsupportedModelError(f"layer {layer} ({type(block).__name__}) has none of {list(DOWN)}")


def _walk(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _same(stored: tuple[Any, bool], digest: str) -> bool:
    owner, transposed = stored
    param: nn.Parameter = owner.weight
    weight: Float[Tensor, "d_mlp d_model"] = param.detach().T if transposed else param.detach()
    # Processing may have centred what is written to the stream, and nothing else.
    return digest in (hash_one(weight), hash_one(weight - weight.mean(-1, keepdim=True)))
