"""Rounding: does the old object come back when the changed weights are stored in fewer bits?

    W[g]  ←  s · round(W[g] / s),        s = max |W[g]| / (2^(bits − 1) − 1)

for groups g of neighbouring numbers that are multiplied with one output. A change that is small beside the weight it
was added to may be rounded away, and what it hid is back: an unlearnt model that is served in 4 bits may know again
(Zhang et al. 2024, arXiv:2410.16454). The unedited model is rounded in the same way: where that loses the fact, that
nothing comes back says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery, why_masked
from tl_factedit.attacks.reversal import written_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.backend.weights import down_proj, rewritten
from tl_factedit.measure.first_tokens import FIRST, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population

BITS = (8, 4)


@dataclass(frozen=True)
class Rounding:
    """Round the changed ``W_out``, in the unedited and in the changed model, and ask.

    The cases are numbers of bits. A case in which the
    unedited model doesn't know the facts either is masked. ``extra`` has ``survives``, the share of the known facts
    that the unedited model still names; ``details`` has ``layers``, those that were rounded for each fact.

    Attributes:
        bits: To how many bits, each tried alone.
        group: How many numbers share a scale.
        layers: Which layers; None for those whose ``W_out`` the change wrote.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    bits: Sequence[int] = BITS
    group: int = 64
    layers: Sequence[int] | None = None
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Round.

        Raises:
            ValueError: A fact without ``target_new``; another model whose ``W_out`` are the unedited one's, without
                `layers`; fewer than two bits, or a group of none.
        """
        with_new_objects(population.facts)
        bits = tuple(sorted(set(self.bits), reverse=True))
        if not bits or min(bits) < 2 or self.group < 1:
            raise ValueError(f"bits are {bits} in groups of {self.group}, needed 2 bits and a group of 1 at least")
        layers_of = written_layers(population, self.layers)
        asked = population.first_tokens

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact case quantity"]:
            out = torch.full((len(indices), 1 + len(bits), len(FIRST)), math.nan)
            for layers in dict.fromkeys(layers_of[i] for i in indices):
                rows = [row for row, i in enumerate(indices) if layers_of[i] == layers]
                sites = [down_proj(runner.model, layer) for layer in layers]
                prompts = [asked[indices[row]].ids for row in rows]
                for case, count in enumerate((0, *bits)):
                    weights = [rounded(site.W, count, self.group) if count else site.W.clone() for site in sites]
                    with rewritten(sites, weights):
                        for row, logits in at_the_ends(Runner(runner.model), prompts, self.batch_tokens):
                            out[rows[row], case] = asked[indices[rows[row]]].first(logits)
            return out

        def settings(indices: tuple[int, ...]) -> object:
            return bits, self.group, [layers_of[i] for i in indices], self.batch_tokens

        before, after = population.read("rounding", read, settings=settings)
        known = before[:, 0, 0] == 1
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        cases = [
            Case(count, f"{count} bits", "underneath", why_masked(share))
            for count, share in zip(bits, survives.tolist(), strict=True)
        ]
        return Recovery.of(
            "rounding",
            population,
            cases,
            before[:, 1:],
            after[:, 1:],
            known=known,
            extra={"survives": survives},
            details={"layers": tuple(layers_of)},
            seed=self.seed,
        )


def rounded(weight: Float[Tensor, "d_mlp d_model"], bits: int, group: int) -> Float[Tensor, "d_mlp d_model"]:
    """A weight with each of its numbers on a grid of so many bits; numbers of one output and group share a scale."""
    rows = weight.T.float()
    pad = -rows.shape[1] % group
    grouped = torch.nn.functional.pad(rows, (0, pad)).unflatten(1, (-1, group))
    most = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / most
    found = ((grouped / scale).round() * scale).flatten(1)[:, : rows.shape[1]]
    return found.T.to(weight.dtype)
