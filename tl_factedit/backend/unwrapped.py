"""The transformers model inside a TransformerBridge, without what TransformerLens wraps around its modules.

A bridge puts its own components in place of the modules of the model that it is given. The weights stay where they
were, one step further in, so that the names of a state dict change and `save_pretrained` writes what no one can load.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tl_factedit.backend.protocol import Model, UnsupportedModelError, kind, layout, model_name


def is_wrapped(hf_model: nn.Module) -> bool:
    """Whether a transformers model lives inside a TransformerBridge: some of its modules are TransformerLens' then."""
    return any(type(module).__module__.startswith("transformer_lens") for module in hf_model.modules())


def unwrapped(model: Model) -> Any:
    """The transformers model inside a bridge with its own modules and names; it shares the bridge's weights.

    Buffers that no file holds (rotary frequencies) are on the meta device: it can be saved, not run.

    Raises:
        UnsupportedModelError: No bridge, one whose weights were processed, or a weight isn't found.

    Example:
        >>> unwrapped(bridge).save_pretrained("edited/")          # doctest: +SKIP
    """
    if kind(model) != "bridge":
        raise UnsupportedModelError(f"{type(model).__name__} holds no transformers model, needed a TransformerBridge")
    if layout(model) != "bridge":
        raise UnsupportedModelError(
            f"{model_name(model)} is in compatibility mode: its norms are folded into other weights, which the classes "
            "of transformers can't hold; boot it again without, apply the edit there, and save that one"
        )
    inner: Any = getattr(model, "original_model")  # noqa: B009 (see `Model`)
    config = copy.deepcopy(inner.config)
    with torch.device("meta"):
        plain = type(inner)(config)
    plain.load_state_dict({name: _tensor(inner, name) for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    if getattr(inner, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(inner.generation_config)
    return plain.eval()


def _tensor(inner: nn.Module, name: str) -> Tensor:
    """A weight by the name that it had before the model was wrapped."""
    found: Any = inner
    for part in name.split("."):
        while isinstance(deeper := getattr(found, "original_component", None), nn.Module):
            found = deeper
        found = getattr(found, part, None)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"{type(inner).__name__} in its bridge has no weight {name!r} any more")
    return found.detach()
