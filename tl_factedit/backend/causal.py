"""Whether a model is causal: what a token's state is made of lies at it and before it."""

from __future__ import annotations

from typing import Any

import torch

from tl_factedit.backend.protocol import Model, UnsupportedModelError, device, model_name

PROBES = ((1, 2, 3), (1, 2, 4))
"""Token ids that differ in the last place only."""


def check_causal(model: Model) -> None:
    """Check that a later token doesn't change what the first block makes of an earlier one.

    Everything here rests on it: rows of unequal length are padded on the right, states before the subject are those of
    a clean run, and a target is scored behind its prompt.

    Raises:
        UnsupportedModelError: It does: the model is masked or bidirectional (BERT, a diffusion model,
            ``attention_dir="bidirectional"``).
    """
    run: Any = model
    with torch.no_grad():
        after = run(torch.tensor(PROBES, device=device(model)), stop_at_layer=1)
    one, other = (row[:-1].float() for row in after)
    if bool((one - other).norm() > 1e-3 * one.norm()):  # of one that overflows nothing can be told: NaN passes
        raise UnsupportedModelError(
            f"{model_name(model)} ({type(getattr(model, 'original_model', model)).__name__}) isn't causal: in blocks.0 "
            "a later token changes an earlier one's state. Needed a causal language model, which reads from left to "
            "right"
        )
