"""What a call may not change about a model: its weights' bits, its flags, its hooks, its forwards."""

from __future__ import annotations

from typing import Any

import torch


def used(model: Any) -> Any:
    """The model after its first pass, in which a TransformerBridge adds hooks of its own to its norms."""
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    return model


def state(model: Any) -> dict[str, Any]:
    """Everything a call could leave behind, as values to compare with ``==``."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        found[f"{name} (weights)"] = param.detach().cpu().clone().numpy().tobytes()
        found[f"{name} (flags)"] = (param.requires_grad, param.grad is None, id(param))
    for name, module in model.named_modules():
        found[f"{name} (module)"] = (
            module.training,
            "forward" in vars(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            len(getattr(module, "fwd_hooks", ())),
            len(getattr(module, "bwd_hooks", ())),
        )
    return found
