"""Linear probes of the old object: which of a relation's objects do a model's states point to?

A `Ruler` is one classifier for each layer and position, trained on the states of some subjects; it reads those of
others. What it is trained on decides what its reading means:

fixed ruler
    trained on the unedited model. A fall under it can be a mere change of code. Between separately trained models it is
    void: there, not even unchanged facts are read right (`Ruler.transfer`).
own ruler
    trained on the model that is read, on facts that are the same in both models.
adaptive ruler
    trained on the states of calibration edits of *other* subjects, labelled with what each had before its edit.

The score is the *percentile* of the old object: the share of the objects that are neither old nor new to which the
ruler gives less, ties half. If the states know nothing of the old object it is ½ on average, in any model, provided
that the old object could as well have been any of the others; accuracy and p(old) have no such null once a
new object takes their mass.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.core.estimate import Estimate, Estimates, over_facts, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.classifier import Linear, LinearClassifier
from tl_factedit.probes.states import HiddenStates, read_states

QUANTITIES = ("percentile_old", "percentile_new", "logp_old", "logp_new", "correct_old")
AT_ONCE = 20_000_000
"""Most comparisons of two objects at a time."""


@dataclass(frozen=True, eq=False)
class Ruler:
    """Linear classifiers over the objects of a relation, one for each layer and position.

    Attributes:
        objects: The classes.
        cells: The classifiers, by layer and then by position.
        layers: Labels, as in the states it was trained on.
        positions: Labels.
        trained_on: What these states were read from, in words.
        subjects: Whom it was trained on; it refuses to read them again.
        least: The fewest training facts that an object has.
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
        """Facts it was trained on."""
        return self.cells[0][0].n_train

    @property
    def held_out_accuracy(self) -> Float[Tensor, "layer position"]:
        """On its own training facts, each read by a fit without it (see `Linear.held_out_accuracy`)."""
        return torch.tensor([[cell.held_out_accuracy for cell in row] for row in self.cells], dtype=torch.float64)

    def scores(self, states: HiddenStates, *, seen: bool = False) -> Float[Tensor, "fact layer position object"]:
        """Log-probability of each object, as each cell has it.

        Args:
            states: What to read.
            seen: Whether subjects that it was trained on may be among them: they are read too well.

        Raises:
            ValueError: Other layers or positions than it was trained on, or a subject that it was trained on.
        """
        if (states.layers, states.positions) != (self.layers, self.positions):
            raise ValueError(
                f"the states have layers {states.layers} and positions {states.positions}, the ruler has {self.layers} "
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

    def transfer(self, states: HiddenStates, objects: Sequence[str] | None = None) -> Estimates:
        """Accuracy on facts that nothing changed: whether the ruler is one for this model at all, [layer position].

        Args:
            states: Of unchanged facts, of other subjects than those it was trained on.
            objects: What each of them has; None for each fact's ``target_true``.
        """
        truth = _places(_named(states.facts, objects), self.objects, "object")
        return over_facts_each((self.scores(states).argmax(-1) == truth[:, None, None]).double())

    def __repr__(self) -> str:
        """What it was trained on."""
        return (
            f"Ruler({len(self.objects)} objects, trained on {self.n_train} facts of {self.trained_on!r} "
            f"({self.least} or more an object), {len(self.layers)} layers)"
        )


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a ruler reads of some facts' old objects.

    Attributes:
        percentile: Of the old object among those that are neither old nor new, [fact layer position]; null ½.
        scores: Log-probability of every object, [fact layer position object].
        old: Places of the old objects in the ruler's.
        new: Places of the new ones; -1 where there is none.
        model: What was read, in words.
        facts: Whose states.
        ruler: By what.
        unchanged: Accuracy of the ruler on unchanged facts of what was read, [layer position]; None if none were given.
    """

    percentile: Float[Tensor, "fact layer position"]
    scores: Float[Tensor, "fact layer position object"]
    old: Int[Tensor, "fact"]
    new: Int[Tensor, "fact"]
    model: str
    facts: tuple[Fact, ...]
    ruler: Ruler
    unchanged: Estimates | None = None

    @property
    def correct(self) -> Bool[Tensor, "fact layer position"]:
        """Whether the old object is put first, before the new one too: for unchanged facts."""
        return self.scores.argmax(-1) == self.old[:, None, None]

    @property
    def p_old(self) -> Float[Tensor, "fact layer position"]:
        """Probability of the old object."""
        return self._score_of(self.old).exp()

    @property
    def p_new(self) -> Float[Tensor, "fact layer position"]:
        """Probability of the new object; NaN where there is none."""
        return torch.where(self.new[:, None, None] >= 0, self._score_of(self.new.clamp_min(0)).exp(), torch.nan)

    @property
    def by_cell(self) -> Estimates:
        """Mean percentile with its interval, [layer position]."""
        return over_facts_each(self.percentile)

    @property
    def accuracy(self) -> Estimates:
        """Share of facts whose old object is put first, [layer position]."""
        return over_facts_each(self.correct.double())

    def each(self, cells: Bool[Tensor, "layer position"] | None = None) -> Float[Tensor, "fact"]:
        """Mean percentile of each fact over some cells (None: all); NaN over none."""
        kept = torch.ones(self.percentile.shape[1:], dtype=torch.bool) if cells is None else cells
        return self.percentile[:, kept].mean(-1)

    def pooled(self, cells: Bool[Tensor, "layer position"] | None = None, *, seed: int = 0) -> Estimate:
        """Mean percentile over some cells (None: all) and facts."""
        return over_facts(self.each(cells).tolist(), seed=seed)

    def reading(self) -> Reading:
        """The same as a probe's reading, axes fact, layer, position, quantity."""
        table = candidates(self.scores, torch.full_like(self.new, -1))
        any_new = self.new[:, None, None] >= 0
        place = self.new.clamp_min(0)[:, None, None, None].expand(*table.shape[:3], 1)
        values = torch.stack(
            [
                self.percentile,
                torch.where(any_new, table.gather(-1, place)[..., 0], torch.nan),
                self._score_of(self.old),
                torch.where(any_new, self._score_of(self.new.clamp_min(0)), torch.nan),
                self.correct.double(),
            ],
            -1,
        )
        axes = {
            "fact": [fact.name for fact in self.facts],
            "layer": self.ruler.layers,
            "position": self.ruler.positions,
            "quantity": QUANTITIES,
        }
        return Reading("linear probe", values.float(), axes, "share of other objects below, nats (logp), 0 or 1")

    def __repr__(self) -> str:
        """What was read by what, and the mean percentile over all cells."""
        ruler = self.ruler
        own = f"{float(ruler.held_out_accuracy.max()):.2f} of its own held-out facts"
        other = "not tried" if self.unchanged is None else f"{float(self.unchanged.mean.max()):.2f}"
        return (
            f"Decoded({self.pooled():.3f} of {self.model!r} by a ruler of {ruler.n_train} facts of "
            f"{ruler.trained_on!r}; right, at its best cell, on {own}; on unchanged facts of what it reads: {other})"
        )

    def _score_of(self, places: Int[Tensor, "fact"]) -> Float[Tensor, "fact layer position"]:
        index = places[:, None, None, None].expand(*self.scores.shape[:3], 1)
        return self.scores.gather(-1, index)[..., 0]


def train_ruler(
    states: HiddenStates,
    labels: Sequence[str] | None = None,
    *,
    objects: Sequence[str] | None = None,
    classifier: LinearClassifier | None = None,
) -> Ruler:
    """Train a classifier of objects at every layer and position.

    Args:
        states: Of the training facts.
        labels: The object that each of them has, or had before its edit; None for each fact's ``target_true``.
        objects: The classes; None for all labels. Objects that could have been asked for but are no classes would
            have no score, so give the relation's.
        classifier: How to fit; None for the defaults.

    Raises:
        ValueError: A label is not among `objects`, or an object has fewer than two training subjects.
    """
    classifier = classifier or LinearClassifier()
    named = _named(states.facts, labels)
    objects = tuple(sorted(set(named)) if objects is None else dict.fromkeys(objects))
    y = _places(named, objects, "label")
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
    return Ruler(objects, cells, states.layers, states.positions, states.model, frozenset(subjects), least)


def decode(
    ruler: Ruler,
    states: HiddenStates,
    old: Sequence[str] | None = None,
    new: Sequence[str | None] | None = None,
    *,
    unchanged: HiddenStates | None = None,
    unchanged_objects: Sequence[str] | None = None,
) -> Decoded:
    """Read some facts' old objects.

    Args:
        ruler: Trained on other subjects.
        states: What to read.
        old: Each fact's old object; None for its ``target_true``.
        new: Each fact's new object, which is left out of the percentile; None for its ``target_new``. A model without
            an edit is asked with the same new objects, so that before and after have the same null.
        unchanged: HiddenStates of facts that are the same in what the ruler was trained on and in what it reads, of yet other
            subjects: they show whether it transfers.
        unchanged_objects: What these have; None for each fact's ``target_true``.

    Raises:
        ValueError: An object is none of the ruler's, old and new are equal, or states and ruler don't fit.
    """
    named = _named(states.facts, old)
    news = [fact.target_new for fact in states.facts] if new is None else list(new)
    truth = _places(named, ruler.objects, "old object")
    other = _new_places(news, ruler.objects, len(named))
    same = (truth == other).nonzero()[:, 0]
    if len(same):
        i = int(same[0])
        raise ValueError(f"fact {states.facts[i].name!r} has {named[i]!r} as old and new object, needed two")
    scores = ruler.scores(states)
    table = candidates(scores, other)
    index = truth[:, None, None, None].expand(*table.shape[:3], 1)
    moved = None if unchanged is None else ruler.transfer(unchanged, unchanged_objects)
    percentile = table.gather(-1, index)[..., 0]
    return Decoded(percentile, scores, truth, other, states.model, states.facts, ruler, moved)


def candidates(
    scores: Float[Tensor, "fact layer position object"], new: Int[Tensor, "fact"]
) -> Float[Tensor, "fact layer position object"]:
    """The percentile that each object would have if it were the old one, ties half.

    Args:
        scores: Of every object.
        new: Places of the new objects, which don't count; -1 for none.

    Returns:
        Shares of the objects that are neither this one nor the new one; NaN for the new one itself.

    Raises:
        ValueError: There is no object left to compare with.
    """
    k = scores.shape[-1]
    has = new >= 0
    if k - 1 - int(has.any()) < 1:
        raise ValueError(f"{k} objects leave none that is neither old nor new, needed at least 3")
    parts = []
    size = max(1, AT_ONCE // max(1, scores[0].numel() * k)) if len(scores) else 1
    for part, without, any_new in zip(scores.split(size), new.split(size), has.split(size), strict=True):
        mine, other = part[..., :, None], part[..., None, :]
        below = (other < mine).double() + 0.5 * (other == mine).double()
        counted = torch.ones(len(part), k, dtype=torch.bool)
        counted[any_new, without[any_new]] = False
        # Its comparison with itself, a tie, is not one of the others.
        share = (below * counted[:, None, None, None, :]).sum(-1) - 0.5
        share = share / (counted.sum(-1) - 1)[:, None, None, None]
        parts.append(torch.where(counted[:, None, None, :], share, torch.nan))
    return torch.cat(parts) if parts else scores.double()


@dataclass(frozen=True)
class LinearProbe:
    """A fixed (or adaptive) ruler as a probe of models.

    Attributes:
        ruler: Trained beforehand.
        prepend_bos: BOS policy; None for the model's default.
    """

    ruler: Ruler
    prepend_bos: bool | None = None

    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read; axes are fact, layer, position, quantity."""
        return decode(self.ruler, read_states(model, facts, prepend_bos=self.prepend_bos)).reading()


@dataclass(frozen=True)
class OwnLinearProbe:
    """An own ruler as a probe of models: trained anew on each model that it reads.

    Attributes:
        train: Facts that every model read has in common.
        objects: The relation's; None for all that `train` has.
        classifier: How to fit.
        prepend_bos: BOS policy; None for the model's default.
    """

    train: tuple[Fact, ...]
    objects: tuple[str, ...] | None = None
    classifier: LinearClassifier = field(default_factory=LinearClassifier)
    prepend_bos: bool | None = None

    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Train on `train` and read `facts`; axes are fact, layer, position, quantity."""
        learnt = read_states(model, self.train, prepend_bos=self.prepend_bos)
        ruler = train_ruler(learnt, objects=self.objects, classifier=self.classifier)
        return decode(ruler, read_states(model, facts, prepend_bos=self.prepend_bos)).reading()


def _named(facts: Sequence[Fact], given: Sequence[str] | None) -> list[str]:
    named = [fact.old for fact in facts] if given is None else list(given)
    if len(named) != len(facts):
        raise ValueError(f"{len(named)} objects for {len(facts)} facts, needed one each")
    return named


def _places(named: Sequence[str], objects: Sequence[str], what: str) -> Int[Tensor, "fact"]:
    place = {name: i for i, name in enumerate(objects)}
    unknown = [name for name in dict.fromkeys(named) if name not in place]
    if unknown:
        raise ValueError(
            f"{what} {unknown[0]!r} is none of the ruler's {len(objects)} objects ({', '.join(map(repr, objects[:5]))}"
            f"{', …' if len(objects) > 5 else ''}), needed one of them, letter for letter"
        )
    return torch.tensor([place[name] for name in named], dtype=torch.long)


def _new_places(named: Sequence[str | None], objects: Sequence[str], count: int) -> Int[Tensor, "fact"]:
    """As `_places`; a new object that is no class takes no part in percentiles anyway."""
    if len(named) != count:
        raise ValueError(f"{len(named)} new objects for {count} facts, needed one each")
    place = {name: i for i, name in enumerate(objects)}
    return torch.tensor([-1 if name is None else place.get(name, -1) for name in named], dtype=torch.long)
