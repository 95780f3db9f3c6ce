"""TransformerLens' names of the places that are read and written here."""

from __future__ import annotations

from tl_factedit.backend.protocol import Component, Unit


def resid_post(layer: int) -> str:
    """Hook name of the residual stream after a block, h^(l)."""
    return f"blocks.{layer}.hook_resid_post"


def resid_pre(layer: int) -> str:
    """Hook name of the residual stream before a block."""
    return f"blocks.{layer}.hook_resid_pre"


def component_hook(component: Component, layer: int) -> str:
    """Hook name of what a component hands to the residual stream (for ``resid``: the stream after the block)."""
    names = {
        "resid": "hook_resid_post",
        "resid_pre": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
        "mlp": "hook_mlp_out",
        "attn": "hook_attn_out",
    }
    if not isinstance(component, str) or component not in names:
        raise ValueError(f"component {component!r} is unknown, needed one of {sorted(names)}")
    return f"blocks.{layer}.{names[component]}"


def unit_hook(unit: Unit, layer: int) -> str:
    """Hook name of the values of single heads (z) or neurons (the input of W_out)."""
    names = {"head": "attn.hook_z", "neuron": "mlp.hook_post"}
    if unit not in names:
        raise ValueError(f"unit {unit!r} is unknown, needed one of {sorted(names)}")
    return f"blocks.{layer}.{names[unit]}"


EMBED = "hook_embed"
"""Hook name of the token embeddings, before any positional embedding."""
