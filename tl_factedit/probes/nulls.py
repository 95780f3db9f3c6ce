"""What a probe of the old object finds where there is nothing to find: the nulls that belong beside it.

Names give objects away (nationalities, makers' brands), probes memorise, the new object can tell the old one, and the
best of many cells is always good. So beside each reading stand

- the same probe on names: token embeddings (`subject_embeddings`), character n-grams (`name_ngrams`);
- the same probe on random weights (`RandomWeights`), and on facts that the model doesn't know;
- a control task of random labels (Hewitt and Liang 2019, arXiv:1909.03368; `control_task`);
- the same probe on the new object alone (`one_hot_objects`);
- labels permuted among the facts, against the best of all cells (`permutation_test`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import finish_despite_interrupt, frozen
from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, pad
from tl_factedit.probes.linear import Decoded
from tl_factedit.probes.states import HiddenStates

AT_ONCE = 2_000
"""Permutations held at a time."""


def subject_embeddings(model: Model, facts: Sequence[Fact], *, prepend_bos: bool | None = None) -> HiddenStates:
    """The mean of the subject's token embeddings, before positions: what its spelling alone can tell."""
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    bos = bos_policy(model, prepend_bos)
    rows = [align(model.tokenizer, fact, prepend_bos=bos) for fact in facts]
    found = []
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for batch in torch.arange(len(rows)).split(64):
            some = [rows[i] for i in batch.tolist()]
            embedded = runner.capture(pad([row.ids for row in some], fill=0), [EMBED], stop=1)[EMBED].float().cpu()
            found += [each[slice(*row.subject)].mean(0) for each, row in zip(embedded, some, strict=True)]
    return HiddenStates.of_features(torch.stack(found), facts, "token embeddings")


def name_ngrams(
    train: Sequence[Fact], test: Sequence[Fact], *, sizes: Sequence[int] = (1, 2, 3)
) -> tuple[HiddenStates, HiddenStates]:
    """Character n-grams of the subjects' names, for training and for reading.

    Counts times the log inverse document frequency in the training names, each name's row of length 1. N-grams that no
    training name has don't count.

    Args:
        train: The facts to train on.
        test: The facts to read.
        sizes: The lengths n; a blank at either end of the name counts as a character.
    """
    counted = [_ngrams(fact.subject, sizes) for fact in (*train, *test)]
    known = sorted(set().union(*counted[: len(train)]))
    place = {gram: i for i, gram in enumerate(known)}
    counts = torch.zeros(len(counted), len(known), dtype=torch.float64)
    for i, grams in enumerate(counted):
        for gram, times in grams.items():
            if gram in place:
                counts[i, place[gram]] = times
    share = (counts[: len(train)] > 0).double().mean(0)
    weighted = counts * (1 - share.log())
    weighted = (weighted / weighted.norm(dim=1, keepdim=True).clamp_min(1e-12)).float()
    named = "character n-grams"
    return (
        HiddenStates.of_features(weighted[: len(train)], train, named),
        HiddenStates.of_features(weighted[len(train) :], test, named),
    )


def _ngrams(name: str, sizes: Sequence[int]) -> Counter[str]:
    spelt = f" {name} "
    return Counter(spelt[i : i + n] for n in sizes for i in range(len(spelt) - n + 1))


def one_hot_objects(facts: Sequence[Fact], named: Sequence[str], objects: Sequence[str]) -> HiddenStates:
    """One object of each fact as the only feature: fed with the new one, a probe must not find the old one.

    If it does, the new objects were chosen by the old ones, and an adaptive ruler may read the new one only: draw new
    objects uniformly from all others.

    Raises:
        ValueError: An object is none of `objects`.
    """
    unknown = sorted(set(named) - set(objects))
    if unknown:
        raise ValueError(f"object {unknown[0]!r} is none of the {len(objects)} objects, needed one of them")
    places = torch.tensor([list(objects).index(name) for name in named])
    return HiddenStates.of_features(
        torch.nn.functional.one_hot(places, len(objects)).float(), facts, "the object alone"
    )


@dataclass(frozen=True)
class RandomWeights:
    """The same architecture with random weights: within each matrix, its numbers in random order.

    So every matrix keeps its size and spread; vectors (norms, most biases) stay as they are. A change like an edit:
    ``with RandomWeights().applied(model)``, or for `read_states_edited`.

    Attributes:
        seed: Of the order.
    """

    seed: int = 0

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """The model with random weights for the length of a ``with`` block; then every bit as it was."""
        draw = torch.Generator().manual_seed(self.seed)
        matrices = _matrices(model)
        kept = [p.detach().clone() for p in matrices]
        try:
            with torch.no_grad():
                for param in matrices:
                    order = torch.randperm(param.numel(), generator=draw).to(param.device)
                    param.copy_(param.reshape(-1)[order].reshape(param.shape))
            yield model
        finally:

            def put_back() -> None:
                with torch.no_grad():
                    for param, before in zip(matrices, kept, strict=True):
                        param.copy_(before)

            finish_despite_interrupt(put_back)


def _matrices(model: Any) -> list[Any]:
    """Every matrix once; of those that share their numbers (a bridge's joint q, k and v) the largest."""
    owners: dict[int, Any] = {}
    for param in model.parameters():
        if param.ndim > 1 and not param.is_meta:
            where = param.untyped_storage().data_ptr()
            if where not in owners or owners[where].numel() < param.numel():
                owners[where] = param
    return list(owners.values())


def excess_over_nulls(decoded: Decoded, nulls: Sequence[Decoded]) -> Estimates:
    """By how much a probe is right more often than the best cell of its nulls, paired by fact, [layer position].

    Args:
        decoded: The probe's reading.
        nulls: Readings of the same facts by probes of names and the like.

    Raises:
        ValueError: There are no nulls, or they are of other facts.
    """
    if not nulls:
        raise ValueError("nulls is empty, needed at least one reading to compare with")
    if any(null.facts != decoded.facts for null in nulls):
        raise ValueError("a null is of other facts, needed the same ones in the same order")
    right = torch.cat([null.correct.double().flatten(1) for null in nulls], 1)
    best = right[:, right.mean(0).argmax()]
    return over_facts_each(decoded.correct.double() - best[:, None, None])
