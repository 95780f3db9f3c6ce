"""Nulls: what a probe of the old object finds where there is nothing to find.

Names give objects away (nationalities, makers' brands), probes memorise, the new object can give away the old one, and
the best of many cells is always good. So beside each reading belong

- the same probe on names: token embeddings (`subject_embeddings`), character n-grams (`name_ngrams`);
- the same probe on random weights (`RandomWeights`), and on facts that the model doesn't know;
- the same probe on the states of other subjects (`states_of_others`);
- the same probe on the new object alone (`one_hot_objects`);
- a control task of random labels (`control_task`);
- labels permuted among the facts, against the best of all cells (`permutation_test`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import finish_despite_interrupt, frozen, one_thread, plain_torch
from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align_all, pad
from tl_factedit.probes.linear import ProbeReadout
from tl_factedit.probes.states import HiddenStates


@plain_torch()
def subject_embeddings(model: Model, facts: Sequence[Fact], *, prepend_bos: bool | None = None) -> HiddenStates:
    """The mean of each subject's token embeddings, without positions: what its spelling alone can tell.

    Args:
        model: Whose embeddings to take.
        facts: The facts whose subjects to embed, as spelt in their prompts.
        prepend_bos: BOS policy; None for the model's default.

    Returns:
        One cell of features, [fact 1 1 d_model].

    Raises:
        ValueError: No facts, or a subject that doesn't end on a token boundary.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    bos = bos_policy(model, prepend_bos)
    rows = align_all(model.tokenizer, facts, prepend_bos=bos, room=getattr(model.cfg, "n_ctx", None))
    means: list[Tensor] = []
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for batch in torch.arange(len(rows)).split(64):
            here = [rows[i] for i in batch.tolist()]
            embedded = runner.capture(pad([row.ids for row in here], fill=0), [EMBED], stop=1)[EMBED].float().cpu()
            means += [vectors[slice(*row.subject)].mean(0) for vectors, row in zip(embedded, here, strict=True)]
    return HiddenStates.of_features(torch.stack(means), facts, "token embeddings")


@plain_torch()
def name_ngrams(
    train: Sequence[Fact], test: Sequence[Fact], *, sizes: Sequence[int] = (1, 2, 3)
) -> tuple[HiddenStates, HiddenStates]:
    """Character n-grams of the subjects' names, as features to train on and to read.

    TF-IDF: counts times 1 + the log inverse document frequency in the training names, each name's row scaled to length
    1. N-grams that no training name has don't count.

    Args:
        train: The facts to train on.
        test: The facts to read.
        sizes: The lengths n; the name counts as having a blank at either end.

    Returns:
        The features of `train` and those of `test`, one cell each.
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


@plain_torch()
def one_hot_objects(facts: Sequence[Fact], named: Sequence[str], objects: Sequence[str]) -> HiddenStates:
    """One object of each fact as the only feature: given the new one, a probe must not find the old one.

    If it does, the new objects were chosen by the old ones, and an adaptive probe may read only the new one: draw new
    objects uniformly from all others.

    Args:
        facts: The facts.
        named: The object of each fact, such as its new one.
        objects: All objects of the relation.

    Raises:
        ValueError: An object isn't among `objects`.
    """
    unknown = sorted(set(named) - set(objects))
    if unknown:
        raise ValueError(f"object {unknown[0]!r} isn't one of the {len(objects)} objects, needed one of them")
    places = torch.tensor([list(objects).index(name) for name in named])
    return HiddenStates.of_features(
        torch.nn.functional.one_hot(places, len(objects)).float(), facts, "the object alone"
    )


@plain_torch()
def states_of_others(states: HiddenStates, *, seed: int = 0) -> HiddenStates:
    """Give each fact the states of another fact of its relation, with another old object.

    What a `Patchscope` then reads of the fact's objects comes from the target prompt, and from what all subjects of the
    relation have in common. Where a fact has a new object, the other fact's old object isn't that one either.

    Args:
        states: States of some facts.
        seed: Seed of the draw among the facts that fit.

    Raises:
        ValueError: No other fact fits one of them.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = []
    for fact in states.facts:
        fits = [
            j
            for j, other in enumerate(states.facts)
            if other.relation == fact.relation
            and other.subject != fact.subject
            and other.target_true not in (fact.target_true, fact.target_new)
        ]
        if not fits:
            raise ValueError(
                f"no other fact of relation {fact.relation!r} has another object than {fact.name!r}, needed at least "
                "one: read more facts together"
            )
        chosen.append(fits[int(torch.randint(len(fits), (1,), generator=draw))])
    return replace(states, values=states.values[chosen], model=f"{states.model}, of other subjects")


@dataclass(frozen=True)
class RandomWeights:
    """The same architecture with random weights: the numbers of each matrix in random order.

    Every matrix keeps its size and spread; vectors (norms, most biases) stay as they are. It is applied like an edit,
    with ``with RandomWeights().applied(model)``, or given to `read_states_edited`. Each order depends on the seed and
    on the parameter's name alone: a model that was moved, cast or copied gets the same ones.

    Attributes:
        seed: Seed of the orders.
    """

    seed: int = 0

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """The model with random weights for the length of a ``with`` block; then every bit as it was.

        Raises:
            RuntimeError: Another thread is at work on the model. Inside the block other threads are refused.
        """
        with one_thread(model):
            matrices = _matrices(model)
            kept = [p.detach().clone() for p in matrices.values()]
            try:
                for name, param in matrices.items():
                    _shuffle_(param, f"{self.seed} {name}")
                yield model
            finally:

                def put_back() -> None:
                    with torch.no_grad():
                        for param, before in zip(matrices.values(), kept, strict=True):
                            param.copy_(before)

                finish_despite_interrupt(put_back)


@plain_torch()
def _shuffle_(param: Tensor, seed: str) -> None:
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
    order = torch.randperm(param.numel(), generator=draw).to(param.device)
    with torch.no_grad():
        param.copy_(param.reshape(-1)[order].reshape(param.shape))


def _matrices(model: Any) -> dict[str, Any]:
    """Every matrix once, by name.

    Of those that share storage the smallest, as far as they make up the larger ones: a bridge reads joint q, k and v
    by the parts of them, which are matrices of their own once it was moved or cast.
    """
    named = {name: p for name, p in model.named_parameters() if p.ndim > 1 and not p.is_meta}
    sharing: dict[int, list[str]] = {}
    for name in sorted(named, key=lambda name: named[name].numel()):
        sharing.setdefault(named[name].untyped_storage().data_ptr(), []).append(name)
    found = {names[0] for names in sharing.values()}
    for names in sharing.values():
        if len(names) > 1:
            found |= set(_making_up({name: named[name] for name in names}))
    return {name: param for name, param in named.items() if name in found}


def _making_up(matrices: dict[str, Tensor]) -> Iterator[str]:
    """Of matrices on one storage, from small to large, those with a number that is in none of those before."""
    one = next(iter(matrices.values()))
    taken = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool, device="cpu")
    for name, matrix in matrices.items():
        mine = taken.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())
        if not bool(mine.all()):
            yield name
            mine.fill_(True)


@plain_torch()
def excess_over_nulls(readout: ProbeReadout, nulls: Sequence[ProbeReadout]) -> Estimates:
    """How much more often a probe is right than the best cell of its nulls, paired by fact, [layer position].

    Args:
        readout: What the probe read.
        nulls: Readouts of the same facts by probes of names and the like.

    Raises:
        ValueError: There are no nulls, or they are of other facts.
    """
    if not nulls:
        raise ValueError("nulls is empty, needed at least one readout to compare with")
    if any(null.facts != readout.facts for null in nulls):
        raise ValueError("a null is of other facts, needed the same ones in the same order")
    right = torch.cat([null.correct.double().flatten(1) for null in nulls], 1)
    best = right[:, right.mean(0).argmax()]
    return over_facts_each(readout.correct.double() - best[:, None, None])
