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

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.backend.model import EMBED, Model, Runner, bos_policy, insist, quiet
from tl_factedit.probes.linear import Decoded, Ruler, candidates, train_ruler
from tl_factedit.probes.states import States
from tl_factedit.core.tokens import align, pad

AT_ONCE = 2_000
"""Permutations held at a time."""


# ---------------------------------------------------------------------------------------- names


def subject_embeddings(model: Model, facts: Sequence[Fact], *, prepend_bos: bool | None = None) -> States:
    """The mean of the subject's token embeddings, before positions: what its spelling alone can tell."""
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    bos = bos_policy(model, prepend_bos)
    rows = [align(model.tokenizer, fact, prepend_bos=bos) for fact in facts]
    found = []
    with quiet(model), torch.no_grad():
        runner = Runner(model)
        for batch in torch.arange(len(rows)).split(64):
            some = [rows[i] for i in batch.tolist()]
            embedded = runner.capture(pad([row.ids for row in some], fill=0), [EMBED], stop=1)[EMBED].float().cpu()
            found += [each[slice(*row.subject)].mean(0) for each, row in zip(embedded, some, strict=True)]
    return States.of_features(torch.stack(found), facts, "token embeddings")


def name_ngrams(
    train: Sequence[Fact], test: Sequence[Fact], *, sizes: Sequence[int] = (1, 2, 3)
) -> tuple[States, States]:
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
        States.of_features(weighted[: len(train)], train, named),
        States.of_features(weighted[len(train) :], test, named),
    )


def _ngrams(name: str, sizes: Sequence[int]) -> Counter[str]:
    spelt = f" {name} "
    return Counter(spelt[i : i + n] for n in sizes for i in range(len(spelt) - n + 1))


# ---------------------------------------------------------------------------------------- the new object


def one_hot_objects(facts: Sequence[Fact], named: Sequence[str], objects: Sequence[str]) -> States:
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
    return States.of_features(torch.nn.functional.one_hot(places, len(objects)).float(), facts, "the object alone")


# ---------------------------------------------------------------------------------------- random weights


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

            insist(put_back)


def _matrices(model: Any) -> list[Any]:
    """Every matrix once; of those that share their numbers (a bridge's joint q, k and v) the largest."""
    owners: dict[int, Any] = {}
    for param in model.parameters():
        if param.ndim > 1 and not param.is_meta:
            where = param.untyped_storage().data_ptr()
            if where not in owners or owners[where].numel() < param.numel():
                owners[where] = param
    return list(owners.values())


# ---------------------------------------------------------------------------------------- control task


@dataclass(frozen=True, eq=False)
class ControlTask:
    """How well the same probe learns labels that mean nothing; all [layer position].

    Attributes:
        accuracy: Of the probe of objects, on subjects that it wasn't trained on.
        control: Of the probe of random labels, on the same subjects. No label can be learnt from others' there, so this
            is at chance unless names or positions leak.
        selectivity: The first minus the second, paired by fact.
        memorised: Of the probe of random labels on its own training facts: how many facts it can hold by heart.
        fitted: Of the probe of objects on its own training facts.
    """

    accuracy: Estimates
    control: Estimates
    selectivity: Estimates
    memorised: Float[Tensor, "layer position"]
    fitted: Float[Tensor, "layer position"]


def control_task(
    ruler: Ruler,
    train: States,
    test: States,
    *,
    train_objects: Sequence[str] | None = None,
    test_objects: Sequence[str] | None = None,
    classifier: LinearClassifier | None = None,
    seed: int = 0,
) -> ControlTask:
    """Train the ruler's classifier once more, on labels shuffled among the training subjects.

    Args:
        ruler: The probe.
        train: What it was trained on.
        test: Other subjects; their control labels are drawn from the same shuffled ones.
        train_objects: What the training facts have; None for each fact's ``target_true``.
        test_objects: What the others have; None for each fact's ``target_true``.
        classifier: How the ruler was fitted; None for the defaults.
        seed: Of the shuffle.
    """
    draw = torch.Generator().manual_seed(seed)
    own = [f.target_true for f in train.facts] if train_objects is None else list(train_objects)
    true = [f.target_true for f in test.facts] if test_objects is None else list(test_objects)
    # One label a subject, with the marginal of the objects over subjects.
    of_subject = {fact.subject: name for fact, name in zip(train.facts, own, strict=True)}
    names = list(of_subject.values())
    random = dict(zip(of_subject, (names[i] for i in torch.randperm(len(names), generator=draw)), strict=True))
    others = list(dict.fromkeys(fact.subject for fact in test.facts))
    drawn = torch.randint(len(names), (len(others),), generator=draw).tolist()
    random |= {subject: names[i] for subject, i in zip(others, drawn, strict=True)}
    labels = [random[fact.subject] for fact in train.facts]
    control = train_ruler(train, labels, objects=ruler.objects, classifier=classifier)

    def right(of: Ruler, states: States, objects: Sequence[str]) -> Float[Tensor, "fact layer position"]:
        truth = torch.tensor([of.objects.index(name) for name in objects])
        return (of.scores(states, seen=True).argmax(-1) == truth[:, None, None]).double()

    found, by_chance = right(ruler, test, true), right(control, test, [random[f.subject] for f in test.facts])
    return ControlTask(
        accuracy=over_facts_each(found),
        control=over_facts_each(by_chance),
        selectivity=over_facts_each(found - by_chance),
        memorised=right(control, train, labels).mean(0),
        fitted=right(ruler, train, own).mean(0),
    )


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


# ---------------------------------------------------------------------------------------- permutation


@dataclass(frozen=True, eq=False)
class Permutation:
    """How a reading compares with those of permuted labels.

    Attributes:
        statistic: The mean over facts as it was found, [layer position].
        p: Share of permutations whose *best cell* is as good as this cell, [layer position]: right for looking at all
            of them. (1 + #≥)/(1 + n).
        p_each: Share whose same cell is as good: for a cell that was chosen beforehand.
        critical: What the best cell stays below in 95 % of permutations (above, if low values are looked for).
        n: Number of permutations.
    """

    statistic: Float[Tensor, "layer position"]
    p: Float[Tensor, "layer position"]
    p_each: Float[Tensor, "layer position"]
    critical: float
    n: int

    @property
    def p_any(self) -> float:
        """For the best cell of all."""
        return float(self.p.min())


def permutation_test(
    decoded: Decoded,
    *,
    statistic: Literal["percentile", "accuracy"] = "percentile",
    side: Literal["above", "below"] = "above",
    n: int = 10_000,
    seed: int = 0,
) -> Permutation:
    """Permute the old objects among the facts, with all scores as they are; against the best of all cells.

    A permutation that would call a fact's new object its old one is none: labels are drawn uniformly from those that
    don't. Where there are new objects, by swaps in pairs: back from the labels as they are to a common start, and from
    it n times independently, which is exact however few the swaps (Besag and Clifford 1989,
    10.1093/biomet/76.4.633).

    Args:
        decoded: The probe's reading.
        statistic: The mean percentile of the old object, or the share of facts where it is put first.
        side: Whether the statistic is asked to be higher than by chance, or lower (the old object avoided).
        n: How many permutations.
        seed: Of them.

    Raises:
        ValueError: There are fewer than two facts, or no permutations.
    """
    if len(decoded.facts) < 2:
        raise ValueError(f"{len(decoded.facts)} facts can't be permuted, needed at least 2")
    if statistic == "percentile":
        table = candidates(decoded.scores, decoded.new)
    elif statistic == "accuracy":
        best = decoded.scores.argmax(-1)
        table = torch.nn.functional.one_hot(best, decoded.scores.shape[-1]).double()
    else:
        raise ValueError(f"statistic {statistic!r} is unknown, needed 'percentile' or 'accuracy'")
    if side not in ("above", "below"):
        raise ValueError(f"side {side!r} is unknown, needed 'above' or 'below'")
    if n < 1:
        raise ValueError(f"n is {n}, needed 1 permutation at least")
    sign = 1 if side == "above" else -1
    facts, cells, objects = len(table), table.shape[1] * table.shape[2], table.shape[3]
    flat = sign * table.reshape(facts, cells, objects).nan_to_num(0.0).float()
    here = _means(flat, decoded.old[None])[0]
    draw = torch.Generator().manual_seed(seed)
    as_good, best_as_good, maxima = torch.zeros(cells), torch.zeros(cells), []
    for labels in _permuted(decoded.old, decoded.new, n, draw):
        there = _means(flat, labels)
        # Equal means differ in the last bits by the order of summation.
        as_good += (there >= here - 1e-6).sum(0)
        best_as_good += (there.max(1, keepdim=True).values >= here - 1e-6).sum(0)
        maxima.append(there.max(1).values)
    shape = table.shape[1:3]
    return Permutation(
        statistic=sign * here.double().reshape(shape),
        p=((1 + best_as_good) / (1 + n)).double().reshape(shape),
        p_each=((1 + as_good) / (1 + n)).double().reshape(shape),
        critical=sign * float(torch.cat(maxima).quantile(0.95)),
        n=n,
    )


def _means(table: Float[Tensor, "fact cell object"], labels: Int[Tensor, "draw fact"]) -> Float[Tensor, "draw cell"]:
    facts = torch.arange(len(table))
    return torch.stack([table[facts, cell][facts, labels].mean(-1) for cell in range(table.shape[1])], -1)


def _permuted(
    old: Int[Tensor, "fact"], new: Int[Tensor, "fact"], n: int, draw: torch.Generator
) -> Iterator[Int[Tensor, "draw fact"]]:
    sizes = [min(AT_ONCE, n - done) for done in range(0, n, AT_ONCE)]
    if not bool((new >= 0).any()):
        for size in sizes:
            yield old[torch.rand(size, len(old), generator=draw).argsort(1)]
        return
    # The test's size is right after any number of rounds; after so many, little is left of where they began, also among
    # few facts, where most swaps may be forbidden.
    rounds = 4 * math.ceil(math.log2(len(old))) + math.ceil(500 / len(old))
    pairings = [torch.randperm(len(old), generator=draw) for _ in range(rounds)]
    start = old[None].clone()
    _walk_(start, new, pairings[::-1], draw)
    for size in sizes:
        labels = start.repeat(size, 1)
        _walk_(labels, new, pairings, draw)
        yield labels


def _walk_(
    labels: Int[Tensor, "draw fact"], new: Int[Tensor, "fact"], pairings: Sequence[Tensor], draw: torch.Generator
) -> None:
    """For each pairing in turn, swap a pair's labels with probability ½, unless one would get its own new object."""
    half = len(new) // 2
    for pairing in pairings:
        one, two = pairing[:half], pairing[half : 2 * half]
        a, b = labels[:, one], labels[:, two]
        go = (torch.rand(a.shape, generator=draw) < 0.5) & (a != new[two]) & (b != new[one])
        labels[:, one], labels[:, two] = torch.where(go, b, a), torch.where(go, a, b)
