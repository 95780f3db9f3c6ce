"""Making models of either class, with raw weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tl_factedit.backend.protocol import Kind, Model, UnsupportedModelError, check_unquantised
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.kinds import short


@plain_torch()
def from_hf(hf_model: Any, tokenizer: Any, *, kind: Kind = "bridge", name: str | None = None) -> Model:
    """A transformers model in memory as a TransformerLens model with raw weights; no hub is asked.

    A bridge *wraps* `hf_model` (edits show in both); a HookedTransformer holds copies.

    Args:
        hf_model: A causal language model of transformers.
        tokenizer: Its fast tokenizer.
        kind: ``"bridge"`` or ``"hooked"``.
        name: What to call it in records; None for the config's own name.

    Raises:
        ValueError: ``kind="hooked"`` where TransformerLens has no HookedTransformer, or `hf_model` is no model of
            transformers.
        UnsupportedModelError: There is no tokenizer; the model has no head that says words (a classifier, a bare
            ``LlamaModel``), or quantised layers.
    """
    check_class(kind)
    given: object = hf_model
    if not isinstance(given, nn.Module) or not hasattr(given, "config"):
        raise ValueError(
            f"hf_model is {short(hf_model)}, a {type(hf_model).__name__}: needed a causal model of transformers"
        )
    if tokenizer is None:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} has no tokenizer, needed its own fast one to find a subject in a prompt: give "
            "it as the second argument"
        )
    _check_head(hf_model)
    check_unquantised(hf_model)
    name = str(name or hf_model.config._name_or_path or type(hf_model).__name__)
    if hf_model.config.architectures is None:
        hf_model.config.architectures = [type(hf_model).__name__]
    tokenizer.init_kwargs.setdefault("name_or_path", name)
    model = _boot_bridge(hf_model, tokenizer, name) if kind == "bridge" else _boot_hooked(hf_model, tokenizer)
    model.cfg.model_name = name
    return model


def _check_head(hf_model: Any) -> None:
    """Check that a transformers model says words.

    Raises:
        UnsupportedModelError: It has no unembedding: what is below the head alone, or a classifier.
    """
    head = getattr(hf_model, "get_output_embeddings", None)
    if head is not None and head() is None:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} has no head that says words (a model of states alone, or a classifier), needed "
            "a causal language model: load it with AutoModelForCausalLM"
        )


def from_hub(name: str, *, kind: Kind = "bridge") -> Model:
    """A hub's model by name, with raw weights.

    Raises:
        OSError: The hub can't be reached, or has no such model.
    """
    try:
        if kind == "hooked":
            return _hooked_transformer().from_pretrained_no_processing(name)
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(name)
    except OSError as error:
        raise OSError(
            f"{name!r} could not be had from the model hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): check the name and the network, or take 'smollm2', which needs no hub"
        ) from error


def check_class(kind: str) -> None:
    """Check that there is such a class of models, before anything is loaded.

    Raises:
        ValueError: ``"hooked"`` where TransformerLens has no HookedTransformer, or another kind.
    """
    if kind == "hooked":
        _hooked_transformer()
    elif kind != "bridge":
        raise ValueError(f"kind {kind!r} is unknown, needed 'bridge' or 'hooked'")


def _hooked_transformer() -> Any:
    # TransformerLens 4 raises an ImportError of its own for this name, also from hasattr.
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ValueError(
            "kind='hooked' needs HookedTransformer, which TransformerLens 4 no longer has: "
            "take kind='bridge', or install 'transformer-lens<4'"
        ) from error
    return HookedTransformer


def _boot_bridge(hf_model: Any, tokenizer: Any, name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    dtype = next(hf_model.parameters()).dtype
    where = str(next(hf_model.parameters()).device)
    # TransformerLens re-reads a tokenizer from its path unless it adds BOS itself; ours has no path.
    tokenizer.init_kwargs["add_bos_token"] = True
    return TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer, device=where, dtype=dtype)


def _boot_hooked(hf_model: Any, tokenizer: Any) -> Any:
    import json
    import tempfile
    from pathlib import Path

    hooked_transformer = _hooked_transformer()
    # By its name, as TransformerLens 4 has no such module to be typed by.
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")

    dtype = next(hf_model.parameters()).dtype
    # from_pretrained takes hub names only; the two loaders below it also take a folder with a config.
    with tempfile.TemporaryDirectory(prefix="tl_") as folder:
        hf_model.config.save_pretrained(folder)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text())
        config.setdefault("n_ctx", config.get("n_positions"))
        file.write_text(json.dumps(config))
        where = str(next(hf_model.parameters()).device)
        cfg = loading.get_pretrained_model_config(
            folder, hf_cfg=hf_model.config.to_dict(), fold_ln=False, device=where, dtype=dtype
        )
        weights = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
    if "blocks.0.mlp.W_out" in weights:  # the config says 4 * d_model for GPT-2, GPT-J and GPT-Neo, whatever they have
        cfg.d_mlp = len(weights["blocks.0.mlp.W_out"])
    if cfg.positional_embedding_type == "alibi":  # never read, but otherwise left as uninitialised memory
        weights["pos_embed.W_pos"] = torch.zeros(cfg.n_ctx, cfg.d_model, dtype=dtype)
    model = hooked_transformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.to(where, print_details=False).eval()
