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
from tl_factedit.attacks.written import Written, question
from tl_factedit.backend.matrices import Matrix, matrices
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.backend.weights import rewritten
from tl_factedit.core.settings import check_settings
from tl_factedit.measure.first_tokens import FIRST, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.measure.strangers import Strangers

BITS = (8, 4)
QUANTITIES = (*FIRST, "common_first", "cover")


@dataclass(frozen=True)
class Rounding:
    """Round the changed matrices together, in the unedited and in the changed model, and ask.

    The cases are numbers of bits. A case in which the unedited model doesn't know the facts either is masked. One that
    takes away half or more of what was written asks what lies elsewhere, the others what lies underneath: of what the
    changed model has over the unedited one, both rounded, the part along the change counts as left. ``extra`` has
    ``survives``, the share of the known facts that the unedited model still names, and ``cover``, the share of the
    squared change that goes; ``details`` has ``matrices``, those that were rounded for each fact, and ``layers``, those
    of them that are a ``W_out``.

    Attributes:
        bits: To how many bits, each tried alone.
        group: How many numbers share a scale.
        layers: The ``W_out`` of which layers; None for all matrices that the change wrote, whatever they are.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    bits: Sequence[int] = BITS
    group: int = 64
    layers: Sequence[int] | None = None
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Round.

        Raises:
            ValueError: A fact without ``target_new``; another model whose matrices are the unedited one's, without
                `layers`; fewer than two bits, or a group of none.
        """
        with_new_objects(population.facts)
        bits = tuple(sorted(set(self.bits), reverse=True))
        if not bits or min(bits) < 2 or self.group < 1:
            raise ValueError(f"bits are {bits} in groups of {self.group}, needed 2 bits and a group of 1 at least")
        written = Written.of(population, self.layers)
        names, asked, strangers = written.names, population.first_tokens, Strangers.of(population, seed=self.seed)

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact case quantity"]:
            out = torch.full((len(indices), 1 + len(bits), len(QUANTITIES)), math.nan)
            there = matrices(runner.model)
            for mine in dict.fromkeys(names[i] for i in indices):
                rows = [row for row, i in enumerate(indices) if names[i] == mine]
                sites = [there[name] for name in mine]
                here = [indices[row] for row in rows]
                others = strangers.among(here)
                prompts = [*(asked[i].ids for i in here), *(strangers.rows[place] for place in others)]
                for case, count in enumerate((0, *bits)):
                    weights = [rounded(site.W, count, self.group) if count else site.W.clone() for site in sites]
                    out[rows, case, -1] = _cover(sites, weights, written, count, self.group)
                    with rewritten(sites, weights):
                        said = dict(at_the_ends(Runner(runner.model), prompts, self.batch_tokens))
                    for row, i in enumerate(here):
                        out[rows[row], case, : len(FIRST)] = asked[i].first(said[row])
                    by_place = {place: said[len(here) + k] for k, place in enumerate(others)}
                    out[rows, case, len(FIRST)] = strangers.common(here, by_place)
            return out

        def settings(indices: tuple[int, ...]) -> object:
            others = [strangers.rows[place].tolist() for place in strangers.among(indices)]
            return bits, self.group, [names[i] for i in indices], others, self.batch_tokens

        before, after = population.read("rounding", read, settings=settings)
        known = before[:, 0, 0] == 1
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        cover = torch.where(known[:, None], after[:, 1:, -1], math.nan)
        cases = [
            Case(count, f"{count} bits", question(cover[:, c]), why_masked(float(survives[c])))
            for c, count in enumerate(bits)
        ]
        return Recovery.of(
            "rounding",
            population,
            cases,
            before[:, 1:, : len(FIRST)],
            after[:, 1:, : len(FIRST)],
            known=known,
            common=after[:, 1:, len(FIRST)],
            subjects=strangers.fewest,
            extra={"survives": survives, "cover": cover.nanmean(0)},
            details={"matrices": names, "layers": written.layers},
            seed=self.seed,
        )


def _cover(sites: Sequence[Matrix], weights: Sequence[Tensor], written: Written, bits: int, group: int) -> float:
    """The share of the squared change that goes when both models are rounded; NaN where nothing was changed."""
    along = total = 0.0
    for site, weight in zip(sites, weights, strict=True):
        change = written.change(site)
        total += float(change.square().sum())
        plain = written.unedited[site.name]
        plain = rounded(plain, bits, group) if bits else plain
        along += float(((weight.double() - plain.double().to(weight.device)) * change).sum())
    return 1 - min(1.0, max(0.0, along / total) ** 2) if total else math.nan


def rounded(weight: Float[Tensor, "rows columns"], bits: int, group: int) -> Float[Tensor, "rows columns"]:
    """A weight with each of its numbers on a grid of so many bits; numbers of one output and group share a scale."""
    rows = weight.T.float()
    pad = -rows.shape[1] % group
    grouped = torch.nn.functional.pad(rows, (0, pad)).unflatten(1, (-1, group))
    most = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / most
    found = ((grouped / scale).round() * scale).flatten(1)[:, : rows.shape[1]]
    return found.T.to(weight.dtype)
