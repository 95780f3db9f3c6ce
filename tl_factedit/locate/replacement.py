"""Symmetric token replacement: another subject in place of the subject, instead of noise.

Zhang and Nanda 2023 (arXiv:2309.16042): noise takes a model to embeddings it never saw, and what is found then may
be an answer to that. With another subject of the same length in the same prompt, the corrupted run is an
ordinary one that has an answer of its own, r'::

    The Eiffel Tower is in the city of  →  Paris (r)
    The Big Ben      is in the city of  →  London (r')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.locate.corruption import GaussianNoise, GivenNoise, MultivariateNoise, Subject, UniformNoise


@dataclass(frozen=True)
class TokenReplacement:
    """The subject's tokens replaced by those of another fact's subject.

    A donor has the same relation and prompt (in tokens too), as many subject tokens, other ones, and another answer,
    which the model knows. Donors are looked for among the facts that are traced; a fact without one can't be
    corrupted in this way: its effects are NaN, and `Trace.corruptible` says so.

    Attributes:
        samples: How many donors a fact has at most, drawn at random.
        seed: Seed of the draw.
        known: Whether the model has to put a donor's answer first.
        donors: What was found for each fact: filled in by `causal_trace`, and of the model that was traced.
    """

    samples: int = 1
    seed: int = 0
    known: bool = True
    donors: Mapping[Fact, tuple[Subject, ...]] = field(default_factory=dict, repr=False, compare=False)
    _own: Mapping[Fact, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """The embeddings of the facts' own subjects: they tell another model."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_settings(self, least={"samples": 1})

    @plain_torch()
    def calibrated(self, subjects: Sequence[Subject]) -> TokenReplacement:
        """With `donors` found among these subjects, unless they were found for all of them before.

        Raises:
            ValueError: No fact has a donor; or they were found on another model.
        """
        if all(subject.fact in self.donors for subject in subjects):
            for subject in subjects:
                if not torch.equal(self._own.get(subject.fact, subject.embeddings), subject.embeddings):
                    raise ValueError(
                        "the donors were found on another model, whose embeddings they have: take "
                        f"TokenReplacement(samples={self.samples}, seed={self.seed}), which looks for them anew"
                    )
            return self
        found = {subject.fact: self._donors(subject, subjects) for subject in subjects}
        if not any(found.values()):
            raise ValueError(
                f"none of {len(subjects)} facts has a donor, needed another fact with the same prompt and relation, as "
                "many subject tokens and another answer that the model knows: trace more facts of a relation together, "
                "or take noise"
            )
        return replace(self, donors=found, _own={subject.fact: subject.embeddings for subject in subjects})

    @plain_torch()
    def draw(self, subject: Subject) -> Float[Tensor, "sample position d_model"]:
        """The donors' embeddings; none if there is no donor."""
        found = self.donors[subject.fact]
        if not found:
            return subject.embeddings.new_zeros(0, *subject.embeddings.shape)
        return torch.stack([donor.embeddings for donor in found])

    @plain_torch()
    def contrast(self, subject: Subject) -> Int[Tensor, "sample"]:
        """The donors' answers."""
        return torch.tensor([donor.answer[0] for donor in self.donors[subject.fact]], dtype=torch.long)

    def _donors(self, subject: Subject, others: Sequence[Subject]) -> tuple[Subject, ...]:
        fit = [
            other
            for other in others
            if (other.fact.prompt, other.fact.relation) == (subject.fact.prompt, subject.fact.relation)
            and other.around == subject.around
            and len(other.ids) == len(subject.ids)
            and not torch.equal(other.ids, subject.ids)
            and other.answer[0] != subject.answer[0]
            and (not self.known or other.top() == other.answer)
        ]
        # Sorted, each once, and drawn by the subject's own seed: the order of the list doesn't matter.
        fit.sort(key=lambda other: (other.ids.tolist(), other.answer), reverse=True)
        each = list({tuple(other.ids.tolist()): other for other in fit}.values())
        order = np.random.RandomState([self.seed, *subject.ids.tolist()]).permutation(len(each))
        # Without the model that `top` holds.
        return tuple(replace(each[i], top=_nothing_more) for i in order[: self.samples])


def _nothing_more() -> tuple[int, ...]:
    raise ValueError("a donor isn't asked again")


CORRUPTIONS = (GaussianNoise, UniformNoise, MultivariateNoise, GivenNoise, TokenReplacement)
