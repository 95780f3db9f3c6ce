"""What every attack shares: it is called with a population, and gives a `Recovery`.

An attack tries to get the old object out of a changed model. It tries one or several *cases* (windows of layers,
prefixes, numbers of directions), each of which says which question it asks:

elsewhere
    what the change wrote is switched off: does the network still hold the old fact?
underneath
    the change is in force: does the old object come back?
residue
    can the old object still be read or learnt, whatever the model says? Alone never a verdict.

What counts is never how often the old object is back, but by how much that exceeds what control objects do, which the
relation could have had and nobody was taught (`measure.first_tokens`), with one interval for all cases together; in a
verdict for all cases of all attacks (`Recovery.among`).

An attack of your own is a frozen value with a ``__call__``::

    @dataclass(frozen=True)
    class Whisper:
        def __call__(self, population):
            def read(runner, indices):      # [fact case quantity], quantities as in `FIRST`
                ...
            before, after = population.read("whisper", read, settings=repr(self))
            return Recovery.of("Whisper", population, [Case("soft", "in a whisper", "underneath")], before, after)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, Estimates
from tl_factedit.core.facts import Fact
from tl_factedit.core.words import counted
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import FIRST, one_of
from tl_factedit.measure.population import Population
from tl_factedit.measure.reading import Reading
from tl_factedit.measure.strangers import MOST, about_strangers

if TYPE_CHECKING:
    import pandas as pd

Shows: TypeAlias = Literal["elsewhere", "underneath", "residue"]
"""Which question a case asks; see the module."""

AsksWeights: TypeAlias = Literal["directions", "teaching"]
"""How an attack asks the changed weights: without their largest directions, or after other facts were taught."""

SURVIVES = 0.5
"""A case counts if the unedited model keeps its answer under it for this share of the facts, or more."""

LOOKED_INTO = 0.02
"""Where the excess over controls is larger, it is looked whether the object is merely common."""

OFF = 0.5
"""What takes away this share of what was written switches the change off."""

TIE = 1e-9
"""Means of the same facts that differ by no more are equal but for rounding."""


@dataclass(frozen=True)
class Case:
    """One thing that an attack tries.

    Attributes:
        key: What tells it from the attack's other cases, e.g. the layers that are knocked out.
        label: The same in words.
        shows: Which question it asks.
        masked: Why it can't tell anything; empty if it can.
        layers: The layers of the cells that it silences, if it silences any.
        covers: Whether it takes out all that every change wrote.
    """

    key: Hashable
    label: str
    shows: Shows
    masked: str = ""
    layers: tuple[int, ...] = ()
    covers: bool = False

    def __post_init__(self) -> None:
        """Check the question.

        Raises:
            ValueError: `shows` is none of the three.
        """
        if self.shows not in get_args(Shows):
            raise ValueError(f"case {self.key!r} shows {self.shows!r}, needed one of {get_args(Shows)}")


@dataclass(frozen=True, eq=False)
class Recovery:
    """What an attack brings back.

    Objects count by their first tokens. Facts whose objects share one, and facts that the unedited model doesn't know
    (old object first of all objects, nothing attacked), are left out of all shares.

    Attributes:
        attack: The attack's name.
        facts: What was asked.
        cases: What was tried.
        known: Whether a fact counts, [fact].
        before: The unedited model under the same attack: axes fact, case, quantity. ``old_first``, ``new_first`` and
            ``control_first`` say whether the old object comes first, the new one, and the mean of this over the
            controls; an attack may read more, and more cases than it draws conclusions from.
        after: The changed model, the same.
        excess: The old object's in the changed model over the controls', with 95 % intervals over facts; NaN where
            masked, [case].
        corrected: The same with intervals that hold for all cases together (Bonferroni), [case].
        extra: Further numbers of each case, by name, [case]: columns of the table.
        details: What this attack has to say beside, by name; see the attack.
        asks_weights: How it asks the changed weights as a whole; None if it doesn't. Where not all that was written can
            be silenced, a claim of absence needs an attack of each kind.
        counted: What the excess is of: whether the old object comes first, and its null; NaN where it doesn't count.
        unsplit: The same of all known facts, also where a case asks another question of some (`asked` in `of`):
            what the bounds of an absence are of, as nothing may be left out in its favour. None where it is no other.
        shared: Of how many subjects a case's null is, where it is theirs, otherwise infinite, [case]; and the largest
            share of the facts that one of them can count for (see `measure.excess`). None: all nulls are the controls'.
        seed: Seed of the bootstrap.
    """

    attack: str
    facts: tuple[Fact, ...]
    cases: tuple[Case, ...]
    known: Bool[Tensor, "fact"]
    before: Reading
    after: Reading
    excess: Estimates
    corrected: Estimates
    extra: Mapping[str, Float[Tensor, "case"]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    asks_weights: AsksWeights | None = None
    counted: tuple[Float[Tensor, "fact case"], Float[Tensor, "fact case"]] | None = None
    unsplit: tuple[Float[Tensor, "fact case"], Float[Tensor, "fact case"]] | None = None
    shared: tuple[Float[Tensor, "case"], float] | None = None
    seed: int = 0

    @classmethod
    @plain_torch()
    def of(
        cls,
        attack: str,
        population: Population,
        cases: Sequence[Case],
        before: Float[Tensor, "fact case quantity"] | Reading,
        after: Float[Tensor, "fact case quantity"] | Reading,
        *,
        known: Bool[Tensor, "fact"] | None = None,
        asked: Bool[Tensor, "fact case"] | None = None,
        common: Float[Tensor, "fact case"] | None = None,
        subjects: int = 1,
        extra: Mapping[str, Float[Tensor, "case"]] | None = None,
        details: Mapping[str, Any] | None = None,
        asks_weights: AsksWeights | None = None,
        seed: int = 0,
    ) -> Recovery:
        """From readings of the unedited and the changed model.

        Args:
            attack: The attack's name.
            population: What was attacked.
            cases: What was tried.
            before: The unedited model, quantities as in `FIRST`; or a reading with axes fact, case and quantity that
                has the cases' keys and these quantities among others.
            after: The changed model, the same.
            known: Which facts count; None for those that the unedited model knows, `Population.known`.
            asked: In which cases each of them counts; None for all.
            common: How often each fact's old object comes first in the changed model, under the same attack, for
                subjects who don't have it; NaN where that wasn't looked into. Of a case, the larger of the two nulls
                counts: the mean of the controls, or this.
            subjects: Of how many subjects `common` is, for a fact: the interval then holds their error too.
            extra: See `Recovery`.
            details: See `Recovery`.
            asks_weights: See `Recovery`.
            seed: Seed of the bootstrap.

        Raises:
            ValueError: Readings of another shape than the facts, the cases and three quantities; or one that lacks a
                case's key or one of `FIRST`.
        """
        cases = tuple(cases)
        readings = [
            given
            if isinstance(given, Reading)
            else Reading(
                name=attack,
                values=given,
                axes={
                    "fact": range(len(population.facts)),
                    "case": [case.key for case in cases],
                    "quantity": FIRST,
                },
                unit="1 where first among the objects (of controls the mean)",
            )
            for given in (before, after)
        ]
        known = population.known if known is None else known
        tested = torch.tensor([not case.masked for case in cases], dtype=torch.bool)
        extra, shared = dict(extra or {}), None
        here = known[:, None] & tested

        def counted_where(counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Old object, the larger null, where that is the strangers', and theirs."""
            old, control = (
                torch.where(
                    counts,
                    torch.stack([readings[1].at(case=case.key, quantity=name) for case in cases], 1),
                    math.nan,
                )
                for name in ("old_first", "control_first")
            )
            null = torch.full_like(old, math.nan) if common is None else common.to(old)
            null = torch.where(counts & ~old.isnan(), null, math.nan)
            larger = null.nanmean(0) > torch.where(null.isnan(), math.nan, control).nanmean(0)
            return old, torch.where(larger & ~null.isnan(), null, control), larger, null

        old, control, larger, null = counted_where(here if asked is None else here & asked)
        unsplit = None if asked is None else counted_where(here)[:2]
        if common is not None:
            extra["common"] = null.nanmean(0)
            shared = (torch.where(larger, float(subjects), math.inf).double(), _at_once(population.facts, known))
        return cls(
            attack=attack,
            facts=population.facts,
            cases=cases,
            known=known,
            before=readings[0],
            after=readings[1],
            excess=_excess(old, control, shared, seed=seed),
            corrected=_excess(old, control, shared, tests=max(1, int(tested.sum())), seed=seed),
            extra=extra,
            details=dict(details or {}),
            asks_weights=asks_weights,
            counted=(old, control),
            unsplit=unsplit,
            shared=shared,
            seed=seed,
        )

    @plain_torch()
    def in_excess_of_common(
        self, population: Population, ask: Callable[[Population], Float[Tensor, "asked case"]], *, most: int = MOST
    ) -> Recovery:
        """The same in excess of the larger null, where the old object comes back: controls, or how common it is.

        For attacks that ask a fact in some way, which can be asked about other subjects in the same way.

        Args:
            population: What was attacked; without references nothing is done.
            ask: Whether the old object comes first in the changed model, in each case, of facts about other subjects.
            most: About how many subjects each fact is asked.
        """
        if not population.reference or not bool((self.excess.mean > LOOKED_INTO).any()):
            return self
        others, of_fact = about_strangers(population, most=most, seed=self.seed)
        if not others.facts:
            return self
        first, common = ask(others), torch.full((len(self.facts), len(self.cases)), math.nan)
        for i, places in enumerate(of_fact):
            if places:
                common[i] = first[list(places)].nanmean(0)
        return Recovery.of(
            self.attack,
            population,
            self.cases,
            self.before,
            self.after,
            known=self.known,
            common=common,
            subjects=min(len(places) for places in of_fact if places),
            extra=self.extra,
            details=self.details,
            asks_weights=self.asks_weights,
            seed=self.seed,
        )

    @plain_torch()
    def among(self, tests: int) -> Recovery:
        """The same with intervals that hold for so many cases together, as of all attacks of a verdict.

        Raises:
            ValueError: Fewer than were tested here, or a `Recovery` that wasn't made by `of`.
        """
        if self.counted is None or tests < int(self.tested.sum()):
            raise ValueError(
                f"{tests} cases together with {int(self.tested.sum())} of this attack, needed as many at least"
                if self.counted is not None
                else f"{self.attack} holds no counts, needed one that Recovery.of made"
            )
        return replace(self, corrected=_excess(*self.counted, self.shared, tests=max(1, tests), seed=self.seed))

    @property
    @plain_torch()
    def undivided(self) -> Recovery:
        """The same over all known facts, whichever question a case asks of them: what comes back at all."""
        if self.unsplit is None:
            return self
        whole = replace(self, counted=self.unsplit, unsplit=None)
        return replace(whole, excess=_excess(*self.unsplit, self.shared, seed=self.seed)).among(
            max(1, int(self.tested.sum()))
        )

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """The cases' keys."""
        return tuple(case.key for case in self.cases)

    @property
    @plain_torch()
    def tested(self) -> Bool[Tensor, "case"]:
        """Which cases can tell anything: those that aren't masked."""
        return torch.tensor([not case.masked for case in self.cases], dtype=torch.bool)

    @property
    def masked(self) -> Mapping[Hashable, str]:
        """The cases that can't tell anything, by key, and why."""
        return {case.key: case.masked for case in self.cases if case.masked}

    @property
    @plain_torch()
    def best(self) -> Case | None:
        """The case with the largest excess; None if all are masked.

        In a tie it is one that takes out all that was written, if there is one among them, and otherwise the first.
        """
        if not bool(self.tested.any()):
            return None
        means = self.excess.mean.nan_to_num(-math.inf).tolist()
        able = [(case, mean) for case, mean in zip(self.cases, means, strict=True) if not case.masked]
        largest = max(mean for _, mean in able)
        tied = [case for case, mean in able if mean >= largest - TIE]
        return next((case for case in tied if case.covers), tied[0])

    @property
    def strongest(self) -> Estimate:
        """The excess of the best case, with its corrected interval."""
        if self.best is None:
            return Estimate(math.nan, math.nan, math.nan, 0)
        return self.at(self.best.key, corrected=True)

    @property
    @plain_torch()
    def at_most(self) -> float:
        """The largest upper bound of all cases, each at 95 % (one-sided), not corrected; NaN if none has one.

        For "nothing brings it back" each has to show its absence: a test of equivalence, and no correction is due.
        """
        bound = self.excess
        counted = self.counted if self.unsplit is None else self.unsplit
        if counted is not None:
            bound = _excess(*counted, self.shared, alpha=0.1, seed=self.seed)
        ends = bound.high[self.tested & ~bound.high.isnan()]
        return float(ends.max()) if len(ends) else math.nan

    @property
    @plain_torch()
    def old_back(self) -> Float[Tensor, "fact"]:
        """For each fact, whether the old object is first in the best case; NaN if all are masked."""
        if self.best is None:
            return torch.full((len(self.facts),), math.nan)
        return self.after.at(case=self.best.key, quantity="old_first")

    @plain_torch()
    def at(self, key: Hashable, *, corrected: bool = False) -> Estimate:
        """The excess of one case."""
        return one_of(self.corrected if corrected else self.excess, self.keys.index(key))

    @plain_torch()
    def share(self, quantity: str, key: Hashable, *, before: bool = False) -> float:
        """The mean of a quantity over the facts that count in a case, in the changed (or the unedited) model.

        Of a masked case, in which none counts, over those that count in the others.
        """
        reading, mine = self.before if before else self.after, self.known
        if self.counted is not None and key in self.keys:
            here = self.known & ~self.counted[0][:, self.keys.index(key)].isnan()
            mine = here if bool(here.any()) else mine
        return float(reading.at(case=key, quantity=quantity)[mine].nanmean())

    @plain_torch()
    def showing(self, shows: Shows) -> Recovery | None:
        """The cases that ask one question; None if there are none. Intervals stay corrected for all cases."""
        mine = [i for i, case in enumerate(self.cases) if case.shows == shows]
        if not mine:
            return None
        picked = torch.tensor(mine)
        return replace(
            self,
            cases=tuple(self.cases[i] for i in mine),
            excess=Estimates(*(values[picked] for values in _columns(self.excess))),
            corrected=Estimates(*(values[picked] for values in _columns(self.corrected))),
            extra={name: values[picked] for name, values in self.extra.items()},
            counted=None if self.counted is None else (self.counted[0][:, picked], self.counted[1][:, picked]),
            unsplit=None if self.unsplit is None else (self.unsplit[0][:, picked], self.unsplit[1][:, picked]),
            shared=None if self.shared is None else (self.shared[0][picked], self.shared[1]),
        )

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a case."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "case": case.label,
                    "shows": case.shows,
                    **{name: self.share(name, case.key) for name in FIRST},
                    "excess": (found := self.at(case.key)).mean,
                    "low": found.low,
                    "high": found.high,
                    "corrected_low": (corrected := self.at(case.key, corrected=True)).low,
                    "corrected_high": corrected.high,
                    "n": found.n,
                    "old_first_before": self.share("old_first", case.key, before=True),
                    **{name: float(values[i]) for name, values in self.extra.items()},
                    "masked": case.masked,
                }
                for i, case in enumerate(self.cases)
            ]
        )

    def __repr__(self) -> str:
        """The strongest case in a line."""
        where = "all cases masked" if self.best is None else f"{self.best.label}: excess {self.strongest:.2f}"
        return (
            f"Recovery({self.attack}, {where}; {int(self.tested.sum())} of {counted(len(self.cases), 'case')} tested, "
            f"{int(self.known.sum())} of {counted(len(self.facts), 'fact')} known)"
        )

    def _repr_html_(self) -> str:
        """The line, and the table."""
        import html

        return f"<p>{html.escape(repr(self))}</p>" + self.table().to_html(float_format="{:.3f}".format, index=False)


@runtime_checkable
class Attack(Protocol):
    """Anything that tries to get old objects back: a frozen value with its settings as fields."""

    def __call__(self, population: Population, /) -> Recovery:
        """Attack; nothing of the models changes."""
        ...


def _excess(
    old: Tensor,
    null: Tensor,
    shared: tuple[Tensor, float] | None,
    *,
    tests: int = 1,
    alpha: float = 0.05,
    seed: int = 0,
) -> Estimates:
    if shared is None:
        return excess(old, null, tests=tests, alpha=alpha, seed=seed)
    return excess(old, null, tests=tests, alpha=alpha, subjects=shared[0], at_once=shared[1], seed=seed)


def _at_once(facts: Sequence[Fact], known: Bool[Tensor, "fact"]) -> float:
    """The largest share of the facts that count which have one old object."""
    objects = Counter(fact.target_true for fact, yes in zip(facts, known.tolist(), strict=True) if yes)
    return max(objects.values(), default=1) / max(1, sum(objects.values()))


def _columns(found: Estimates) -> tuple[Tensor, ...]:
    return found.mean, found.low, found.high, found.n


def why_masked(survives: float) -> str:
    """Why a case can't tell anything, by the share of known facts that the unedited model keeps; empty if it can."""
    if math.isnan(survives):
        return "the unedited model knows none of the facts"
    if survives < SURVIVES:
        return f"the unedited model keeps its answer in {survives:.0%} of the facts it knows, needed {SURVIVES:.0%}"
    return ""
