"""The percentile of an object among a relation's others: a score whose null is ½ whatever the model.

The share of the objects that are neither old nor new which score below the old one, ties counting half::

    percentile(o) = mean over j ∉ {o, new} of [s_j < s_o] + ½ [s_j = s_o]

If the scores know nothing of the old object, and it could as well have been any of the others, its percentile is ½ on
average. Accuracy and p(old) have no such null once a new object takes their mass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

AT_ONCE = 20_000_000
"""Most comparisons of two objects held at a time."""


def candidate_percentiles(
    scores: Float[Tensor, "fact layer position object"], new: Int[Tensor, "fact"]
) -> Float[Tensor, "fact layer position object"]:
    """The percentile that each object would have if it were the old one.

    Args:
        scores: Any score of every object, higher for likelier ones.
        new: Index of each fact's new object, which doesn't count; -1 where there is none.

    Returns:
        Shares of the objects that are neither this one nor the new one; NaN for the new one itself.

    Raises:
        ValueError: No object is left to compare with.
    """
    k = scores.shape[-1]
    has = new >= 0
    if k - 1 - int(has.any()) < 1:
        raise ValueError(f"{k} objects leave none that is neither old nor new, needed at least 3")
    parts = []
    size = max(1, AT_ONCE // max(1, scores[0].numel() * k)) if len(scores) else 1
    for part, without, any_new in zip(scores.split(size), new.split(size), has.split(size), strict=True):
        candidate, other = part[..., :, None], part[..., None, :]
        below = (other < candidate).double() + 0.5 * (other == candidate).double()
        counted = torch.ones(len(part), k, dtype=torch.bool)
        counted[any_new, without[any_new]] = False
        # Its comparison with itself, a tie, is not one of the others.
        share = (below * counted[:, None, None, None, :]).sum(-1) - 0.5
        share = share / (counted.sum(-1) - 1)[:, None, None, None]
        parts.append(torch.where(counted[:, None, None, :], share, torch.nan))
    return torch.cat(parts) if parts else scores.double()
