"""Linear probes of the old object: which of a relation's objects do a model's states point to?

A `LinearProbe` is one classifier for each layer and position, trained on the states of some subjects; it reads those of
others. What it is trained on decides what its readout means:

fixed probe
    Trained on the unedited model. A fall under it can be a mere change of code. Between separately trained models it is
    void: there it can't even read unchanged facts (`LinearProbe.transfer`).
own probe
    Trained on the model that is read, on facts that are the same in both models.
adaptive probe
    Trained on the states of calibration edits of *other* subjects, labelled with what each had before its edit.

The score is the *percentile* of the old object among the objects that are neither old nor new, ½ on average in any
model whose states know nothing of it (`tl_factedit.probes.percentile`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, Estimates, over_facts, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.classifier import Linear, LinearClassifier
from tl_factedit.probes.percentile import candidate_percentiles
from tl_factedit.probes.states import HiddenStates

QUANTITIES = ("percentile_old", "percentile_new", "logp_old", "logp_new", "correct_old")


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Linear classifiers over the objects of a relation, one for each layer and position.

    Made by `fit_linear_probe`.

    Attributes:
        objects: The classes.
        cells: The classifiers, by layer and then by position.
        layers: Labels of the layers, as in the states it was trained on.
        positions: Labels of the positions.
        trained_on: What those states were read from, in words.
        subjects: The subjects it was trained on, which it refuses to read again.
        least: The fewest training facts that any object has.
    """

    objects: tuple[str, ...]
    cells: tuple[tuple[Linear, ...], ...]
    layers: tuple[Hashable, ...]
    positions: tuple[Hashable, ...]
    trained_on: str
    subjects: frozenset[str]
    least: int

    @property
    def n_train(self) -> int:
        """Number of facts it was trained on."""
        return self.cells[0][0].n_train

    @property
    @plain_torch()
    def held_out_accuracy(self) -> Float[Tensor, "layer position"]:
        """Accuracy on its own training facts, each read by a fit without it (see `Linear.held_out_accuracy`)."""
        return torch.tensor([[cell.held_out_accuracy for cell in row] for row in self.cells], dtype=torch.float64)

    @plain_torch()
    def scores(self, states: HiddenStates, *, seen: bool = False) -> Float[Tensor, "fact layer position object"]:
        """Log-probability of each object, by layer and position.

        Args:
            states: What to read.
            seen: Whether training subjects may be among them. They are read too well.

        Raises:
            ValueError: The states have other layers or positions than the training states, or hold a training subject.
        """
        if (states.layers, states.positions) != (self.layers, self.positions):
            raise ValueError(
                f"the states have layers {states.layers} and positions {states.positions}, the probe has {self.layers} "
                f"and {self.positions}: read them with the same component"
            )
        known = [] if seen else sorted(self.subjects & {fact.subject for fact in states.facts})
        if known:
            raise ValueError(
                f"{len(known)} of the subjects, such as {known[0]!r}, were used in training, needed others: a probe "
                "recognises those it was trained on"
            )
        return torch.stack(
            [
                torch.stack([cell.log_probs(states.values[:, i, j]) for j, cell in enumerate(row)], 1)
                for i, row in enumerate(self.cells)
            ],
            1,
        )

    @plain_torch()
    def read(
        self,
        states: HiddenStates,
        old: Sequence[str] | None = None,
        new: Sequence[str | None] | None = None,
        *,
        unchanged: HiddenStates | None = None,
        unchanged_objects: Sequence[str] | None = None,
    ) -> ProbeReadout:
        """Read some facts' old objects.

        Args:
            states: States of subjects that it wasn't trained on.
            old: Each fact's old object; None for its ``target_true``.
            new: Each fact's new object, which is left out of the percentile; None for its ``target_new``. Ask a model
                without an edit with the same new objects, so that before and after have the same null.
            unchanged: States of facts that are the same in the model of the training states and in the one that is
                read, about yet other subjects: they show whether the probe transfers.
            unchanged_objects: The objects of those facts; None for each fact's ``target_true``.

        Raises:
            ValueError: An object isn't one of the probe's, an old and a new object are equal, or the states don't fit.
        """
        named = _objects_of(states.facts, old)
        news = [fact.target_new for fact in states.facts] if new is None else list(new)
        truth = _indices(named, self.objects, "old object")
        other = _new_indices(news, self.objects, len(named))
        same = (truth == other).nonzero()[:, 0]
        if len(same):
            i = int(same[0])
            raise ValueError(f"fact {states.facts[i].name!r} has {named[i]!r} as old and new object, needed two")
        scores = self.scores(states)
        table = candidate_percentiles(scores, other)
        index = truth[:, None, None, None].expand(*table.shape[:3], 1)
        transferred = None if unchanged is None else self.transfer(unchanged, unchanged_objects)
        percentile = table.gather(-1, index)[..., 0]
        return ProbeReadout(percentile, scores, truth, other, states.model, states.facts, self, transferred)

    @plain_torch()
    def transfer(self, states: HiddenStates, objects: Sequence[str] | None = None) -> Estimates:
        """Accuracy on facts that nothing changed, [layer position]: whether the probe fits this model at all.

        Args:
            states: States of unchanged facts, about subjects that it wasn't trained on.
            objects: The object of each of them; None for each fact's ``target_true``.
        """
        truth = _indices(_objects_of(states.facts, objects), self.objects, "object")
        return over_facts_each((self.scores(states).argmax(-1) == truth[:, None, None]).double())

    def __repr__(self) -> str:
        """What it was trained on."""
        return (
            f"LinearProbe({len(self.objects)} objects, trained on {self.n_train} facts of {self.trained_on!r} "
            f"({self.least} or more an object), {len(self.layers)} layers)"
        )


@dataclass(frozen=True, eq=False)
class ProbeReadout:
    """What a linear probe reads of some facts' old objects.

    Attributes:
        percentile: Percentile of the old object among those that are neither old nor new, [fact layer position];
            ½ if nothing is known.
        scores: Log-probability of every object, [fact layer position object].
        old: Indices of the old objects among the probe's.
        new: Indices of the new objects; -1 where there is none.
        model: What was read, in words.
        facts: The facts whose states were read.
        probe: The probe that read them.
        unchanged: The probe's accuracy on unchanged facts of what was read, [layer position]; None if none were given.
    """

    percentile: Float[Tensor, "fact layer position"]
    scores: Float[Tensor, "fact layer position object"]
    old: Int[Tensor, "fact"]
    new: Int[Tensor, "fact"]
    model: str
    facts: tuple[Fact, ...]
    probe: LinearProbe
    unchanged: Estimates | None = None

    @property
    @plain_torch()
    def correct(self) -> Bool[Tensor, "fact layer position"]:
        """Whether the old object comes first of all objects, the new one included."""
        return self.scores.argmax(-1) == self.old[:, None, None]

    @property
    @plain_torch()
    def p_old(self) -> Float[Tensor, "fact layer position"]:
        """Probability of the old object."""
        return self._score_of(self.old).exp()

    @property
    @plain_torch()
    def p_new(self) -> Float[Tensor, "fact layer position"]:
        """Probability of the new object; NaN where there is none."""
        return torch.where(self.new[:, None, None] >= 0, self._score_of(self.new.clamp_min(0)).exp(), torch.nan)

    @property
    @plain_torch()
    def by_cell(self) -> Estimates:
        """Mean percentile over facts with its interval, [layer position]."""
        return over_facts_each(self.percentile)

    @property
    @plain_torch()
    def accuracy(self) -> Estimates:
        """Share of facts whose old object comes first, [layer position]."""
        return over_facts_each(self.correct.double())

    @plain_torch()
    def each(self, cells: Bool[Tensor, "layer position"] | None = None) -> Float[Tensor, "fact"]:
        """Mean percentile of each fact over some cells (None: all); NaN over none."""
        kept = torch.ones(self.percentile.shape[1:], dtype=torch.bool) if cells is None else cells
        return self.percentile[:, kept].mean(-1)

    @plain_torch()
    def pooled(self, cells: Bool[Tensor, "layer position"] | None = None, *, seed: int = 0) -> Estimate:
        """Mean percentile over some cells (None: all) and all facts, with its interval over facts."""
        return over_facts(self.each(cells).tolist(), seed=seed)

    @plain_torch()
    def reading(self) -> Reading:
        """The same numbers as a probe's `Reading`, with axes fact, layer, position, quantity."""
        table = candidate_percentiles(self.scores, torch.full_like(self.new, -1))
        any_new = self.new[:, None, None] >= 0
        index = self.new.clamp_min(0)[:, None, None, None].expand(*table.shape[:3], 1)
        values = torch.stack(
            [
                self.percentile,
                torch.where(any_new, table.gather(-1, index)[..., 0], torch.nan),
                self._score_of(self.old),
                torch.where(any_new, self._score_of(self.new.clamp_min(0)), torch.nan),
                self.correct.double(),
            ],
            -1,
        )
        axes = {
            "fact": [fact.name for fact in self.facts],
            "layer": self.probe.layers,
            "position": self.probe.positions,
            "quantity": QUANTITIES,
        }
        return Reading("linear probe", values.float(), axes, "share of other objects below, nats (logp), 0 or 1")

    def __repr__(self) -> str:
        """What was read by what, and the mean percentile over all cells."""
        probe = self.probe
        own = f"{float(probe.held_out_accuracy.max()):.2f} of its own held-out facts"
        other = "not tried" if self.unchanged is None else f"{float(self.unchanged.mean.max()):.2f}"
        return (
            f"ProbeReadout({self.pooled():.3f} of {self.model!r} by a probe of {probe.n_train} facts of "
            f"{probe.trained_on!r}; right, at its best cell, on {own}; on unchanged facts of what it reads: {other})"
        )

    def _score_of(self, indices: Int[Tensor, "fact"]) -> Float[Tensor, "fact layer position"]:
        index = indices[:, None, None, None].expand(*self.scores.shape[:3], 1)
        return self.scores.gather(-1, index)[..., 0]


@plain_torch()
def fit_linear_probe(
    states: HiddenStates,
    labels: Sequence[str] | None = None,
    *,
    objects: Sequence[str] | None = None,
    classifier: LinearClassifier | None = None,
) -> LinearProbe:
    """Fit a classifier of objects at every layer and position.

    Args:
        states: States of the training facts.
        labels: The object that each of them has, or had before its edit; None for each fact's ``target_true``.
        objects: The classes; None for all labels. An object that isn't a class gets no score, so give all the objects
            of the relation.
        classifier: How to fit; None for the defaults.

    Raises:
        ValueError: A label isn't among `objects`, or an object has fewer than two training subjects.

    Example:
        >>> probe = fe.probes.fit_linear_probe(fe.probes.read_states(model, known))       # doctest: +SKIP
        >>> probe.read(fe.probes.read_states(model, facts)).by_cell                       # doctest: +SKIP
    """
    classifier = classifier or LinearClassifier()
    named = _objects_of(states.facts, labels)
    objects = tuple(sorted(set(named)) if objects is None else dict.fromkeys(objects))
    y = _indices(named, objects, "label")
    subjects = {subject: i for i, subject in enumerate(dict.fromkeys(fact.subject for fact in states.facts))}
    groups = torch.tensor([subjects[fact.subject] for fact in states.facts])
    for k, name in enumerate(objects):
        count = len(groups[y == k].unique())
        if count < 2:
            raise ValueError(
                f"object {name!r} has {count} training subjects, needed at least 2: train on more facts, or leave it "
                "out of objects (and the facts that have it out of the facts)"
            )
    cells = tuple(
        tuple(
            classifier.fit(states.values[:, i, j], y, len(objects), groups=groups) for j in range(len(states.positions))
        )
        for i in range(len(states.layers))
    )
    least = int(torch.bincount(y, minlength=len(objects)).min())
    return LinearProbe(objects, cells, states.layers, states.positions, states.model, frozenset(subjects), least)


def _objects_of(facts: Sequence[Fact], given: Sequence[str] | None) -> list[str]:
    named = [fact.old for fact in facts] if given is None else list(given)
    if len(named) != len(facts):
        raise ValueError(f"{len(named)} objects for {len(facts)} facts, needed one each")
    return named


def _indices(named: Sequence[str], objects: Sequence[str], what: str) -> Int[Tensor, "fact"]:
    index = {name: i for i, name in enumerate(objects)}
    unknown = [name for name in dict.fromkeys(named) if name not in index]
    if unknown:
        raise ValueError(
            f"{what} {unknown[0]!r} isn't one of the probe's {len(objects)} objects "
            f"({', '.join(map(repr, objects[:5]))}{', …' if len(objects) > 5 else ''}), needed one of them, letter for "
            "letter"
        )
    return torch.tensor([index[name] for name in named], dtype=torch.long)


def _new_indices(named: Sequence[str | None], objects: Sequence[str], count: int) -> Int[Tensor, "fact"]:
    """As `_indices`; a new object that isn't a class takes no part in percentiles anyway."""
    if len(named) != count:
        raise ValueError(f"{len(named)} new objects for {count} facts, needed one each")
    index = {name: i for i, name in enumerate(objects)}
    return torch.tensor([-1 if name is None else index.get(name, -1) for name in named], dtype=torch.long)
