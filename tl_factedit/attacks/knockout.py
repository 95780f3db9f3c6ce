"""Knock-out: does the old object come back when some components have nothing to say of the subject?

What a component (an MLP, an attention) says at some tokens is replaced by what it says of other subjects there, and
everything above is run again::

    c[l][p]  ←  mean over reference facts r of the same relation, c[l][p_r]          (or of one of them: a resample)

Two questions are asked so. *Off*: the cells silenced cover half or more of what the change wrote, by its footprint
(`footprint`), or leave less than half of it written, as an edit whose key is silenced, or are what the change consists
of, as without their write the old object leads (`in_force`; both are looked into where the old object comes back). What
comes back then is stored elsewhere, and the change left it. *On*: the change is in force, and what comes back lies
underneath. A knock-out that switches the change off for some facts alone is what it is for most, and the others don't
count in it.

Three things have to be seen to. A case in which the *unedited* model doesn't know the fact either can't tell, and is
masked. An object comes first by chance too, so what counts is the excess over control objects. And an object that many
subjects have comes first because it is common: where the old object comes back, it is looked how often that same object
leads under the same knock-out for subjects who don't have it, and the larger of both nulls counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.asking import LEAST_REFERENCES, QUANTITIES, Asking
from tl_factedit.attacks.attack import LOOKED_INTO, OFF, SURVIVES, Case, Recovery, Shows, why_masked
from tl_factedit.attacks.cells import COMPONENTS, PLACES, Cell, Cells, Place, Silenceable, in_order, singles_of
from tl_factedit.attacks.footprints import Footprint, footprint_of
from tl_factedit.attacks.in_force import back_undone, left_under
from tl_factedit.attacks.silencing import NOTHING, Silencing
from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.core.words import counted
from tl_factedit.measure.first_tokens import FIRST, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.measure.reading import Reading
from tl_factedit.measure.strangers import Strangers

AT_A_TIME = 4
"""So many cases of a question are looked into together, those with the largest excess, until the largest left was."""
MOST_LOOKED = 12
"""So many of a question are looked into at most: where more tie, those left are in excess of controls alone."""


@dataclass(frozen=True)
class KnockOut:
    """Silence components in the unedited and in the changed model.

    What is silenced: every component of every layer at every place alone; neighbouring layers together (`widths`); what
    the footprint names (the 1, 2, 4 … cells that cover most of what was written, and the fewest that cover all of it);
    and what is asked for (`cells`). Cases that switch the change off are also asked with a resample in place of the
    mean, and by half where the unedited model can't spare them.

    The population's references say what stands in. Those about a subject that the change was made for, or that is
    asked, are left out by themselves: with a change for each fact the other facts will do.

    Keys are `Silencing`s. Beside what every `Recovery` has, ``before`` and ``after`` hold the case `NOTHING` (nothing
    silenced) and the log-probabilities ``logp_old``, ``logp_new`` and ``logp_control`` in nats; ``extra`` has ``cover``
    (the mean share of what was written that stands in the silenced cells), ``left`` (the share of it that is still
    written; NaN where that wasn't looked into), ``survives`` (the share of the known facts whose old object is first
    in the unedited model under the same knock-out) and ``of_unedited`` (the mean excess as a share of the unedited
    model's own); ``details`` has ``footprint``, ``references`` (over how many references each fact's mean is),
    ``whole`` (whether a case that takes out all that was written could be tested; None if nothing was) and ``disagree``
    (cases whose mean and resample differ by more than a third of the facts).

    Attributes:
        components: ``"mlp"``, ``"attn"``.
        places: ``"subject"`` (its last token), ``"last"`` (of the prompt), ``"all"`` (every token from the subject's
            first on).
        widths: How many neighbouring layers to silence together: 1 for each alone; 3 for three in a row.
        cells: Further sets of cells; the cells of each set are silenced together.
        resample: Whether cases that switch the change off are also asked with a resample.
        means_of: ``"audited"`` takes what stands in from the model that is audited, ``"unedited"`` from the unedited
            one, once for all. Both are the same where a change leaves reference subjects alone bit for bit, as a router
            does. A weight edit doesn't quite; ``"unedited"`` saves a pass over all references for each change then.
        most_references: How many of a fact's references its mean is over at most, drawn with `seed`: the mean of a
            hundred is within a tenth of their spread of that of all, and each is run in every changed model.
        partial: Whether facts that can't be asked (no controls, or too few references) are left out, with a note in
            ``details["left_out"]``, instead of being refused.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap, and of the draws.
    """

    components: Sequence[Silenceable] = COMPONENTS
    places: Sequence[Place] = PLACES
    widths: Sequence[int] = (1,)
    cells: Sequence[Sequence[Cell]] = ()
    resample: bool = True
    means_of: Literal["audited", "unedited"] = "audited"
    most_references: int = 100
    partial: bool = False
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Knock out.

        Raises:
            ValueError: A fact without ``target_new``; fewer than five references of a fact's relation; ``"unedited"``
                means for another model; a width or a cell that the model hasn't got layers for; an unknown component or
                place.
        """
        with_new_objects(population.facts)
        if self.partial:
            return self._of_those_that_can_be_asked(population)
        if self.means_of == "unedited" and any(isinstance(part.changed, Model) for part in population.parts):
            raise ValueError(
                "means_of='unedited' for another model, whose states are its own: needed 'audited', which takes them "
                "there"
            )
        layers = n_layers(population.model)
        singles = self._singles(layers)
        asking = Asking.of(population, self.most_references, self.batch_tokens, self.seed)
        rows, use = asking.rows, asking.use
        written = footprint_of(population, batch_tokens=self.batch_tokens)
        sets = list(dict.fromkeys([*singles, *_of_footprint(written, self.places), *map(in_order, self.cells)]))
        cover = torch.stack([written.cover(cells) for cells in sets])
        off = [not float(mean) < OFF for mean in cover.nanmean(1)]  # nothing written: nothing is in force
        silencings = [Silencing(cells) for cells in sets]
        for cells, is_off in zip(sets, off, strict=True):
            if is_off:
                silencings += [Silencing(cells, "resample")] * self.resample + [Silencing(cells, "half")]
        settings = {
            **asking.settings(population),
            "settings": (silencings, self.means_of, self.most_references, self.batch_tokens, self.seed),
        }
        given = None
        if self.means_of == "unedited":
            with frozen(population.model), torch.no_grad():
                given = asking.standing_in(Runner(population.model), range(len(rows)))
        before = population.unedited("knock-out", asking.reader([NOTHING, *silencings]), settings=settings)
        after = population.after("knock-out", asking.reader([NOTHING, *silencings], given), settings=settings)
        known = before[:, 0, 0] == 1
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        unread = None if any(row.last == len(row.ids) - 1 for row in rows) else layers - 1
        cover_of, off_of = dict(zip(sets, cover, strict=True)), dict(zip(sets, off, strict=True))
        takes_out = {cells: bool(written.takes_out(cells).all()) for cells in sets}
        spared = {s: float(share) for s, share in zip(silencings, survives, strict=True)}
        cases = [
            Case(
                s,
                str(s),
                "elsewhere" if off_of[s.cells] else "underneath",
                _masked(s, spared, unread),
                tuple(sorted({cell.layer for cell in s.cells})),
                covers=s.by != "half" and takes_out[s.cells],
            )
            for s in silencings
        ]
        readings = [_reading(population.facts, [NOTHING, *silencings], each) for each in (before, after)]
        found = Recovery.of("knock-out", population, cases, *readings, known=known, seed=self.seed)
        common = torch.full((len(rows), len(cases)), math.nan)
        left = torch.full((len(rows), len(cases)), math.nan)
        asked = torch.ones(len(rows), len(cases), dtype=torch.bool)
        looked: dict[int, Shows] = {}
        strangers = Strangers.of(population, seed=self.seed)
        while some := _deciding(found, looked):
            common[:, some] = self._common(population, asking, [silencings[i] for i in some], strangers, settings)
            looked |= {i: cases[i].shows for i in some}
            unclear = [i for i in some if not takes_out[silencings[i].cells] and written.written]
            if unclear:
                gone = self._switched_off(population, asking, [silencings[i] for i in unclear], written, left, unclear)
                for k, i in enumerate(unclear):
                    # Where the old object leads with nothing silenced, the change does nothing in any case.
                    was_off = cases[i].shows == "elsewhere"
                    off_for = torch.where(after[:, 0, 0] == 1, was_off, gone[:, k])
                    is_off = float(off_for[known].double().mean()) >= OFF
                    cases[i] = replace(cases[i], shows="elsewhere" if is_off else "underneath")
                    asked[:, i] = off_for == is_off
            found = Recovery.of(
                "knock-out",
                population,
                cases,
                *readings,
                known=known,
                asked=asked,
                common=common,
                subjects=strangers.fewest,
                seed=self.seed,
            )
        own = torch.stack([readings[0].at(case=s, quantity="old_first") for s in silencings], 1)
        chance = torch.stack([readings[0].at(case=s, quantity="control_first") for s in silencings], 1)
        return replace(
            found,
            extra={
                **found.extra,
                "cover": torch.stack([cover_of[s.cells].nanmean() for s in silencings]),
                "left": left.nanmean(0),
                "survives": survives,
                "of_unedited": found.excess.mean / (own - chance)[known].nanmean(0),
            },
            details={
                "footprint": written,
                "references": tuple(use.sum(1).tolist()),
                "whole": any(case.covers and not case.masked for case in cases) if bool(known.any()) else None,
                "disagree": _disagreeing(found),
            },
        )

    @staticmethod
    def _switched_off(
        population: Population,
        asking: Asking,
        silencings: Sequence[Silencing],
        written: Footprint,
        left: Float[Tensor, "fact case"],
        places: Sequence[int],
    ) -> Bool[Tensor, "fact silencing"]:
        """For which facts each silencing switches the change off, by what it does; `left` is filled in at `places`."""
        left[:, places] = left_under(population, asking, silencings, written)
        gone = ~(left[:, places] >= 1 - OFF)
        touching = [k for k, each in enumerate(silencings) if float(written.cover(each.cells).nansum()) > 0]
        own = torch.zeros_like(gone)
        if touching:
            some = [silencings[k] for k in touching]
            own[:, touching] = back_undone(population, asking, some, written) >= OFF
        # Cells that were written are off by what their write does, and not by how large it is.
        within = torch.stack([written.cover(each.cells) >= OFF for each in silencings], 1)
        return torch.where(within, own, gone | own)

    def _singles(self, layers: int) -> list[Cells]:
        """Each component at each place, of each window of layers."""
        for cell in (cell for cells in self.cells for cell in cells):
            if not 0 <= cell.layer < layers or cell.component not in COMPONENTS or cell.place not in PLACES:
                raise ValueError(f"{cell} is none of the model's cells: it has layers 0 to {layers - 1}")
        return singles_of(layers, self.components, self.places, self.widths)

    def _common(
        self,
        population: Population,
        asking: Asking,
        silencings: Sequence[Silencing],
        strangers: Strangers,
        settings: Any,
    ) -> Float[Tensor, "fact silencing"]:
        """How often a fact's old object leads for subjects who don't have it; NaN where there are none.

        In the changed model, if it is one for all facts; with a change for each, in the unedited one.
        """
        of_fact = [[strangers.references[place] for place in mine] for mine in strangers.of_fact]

        def read(runner: Runner, indices: tuple[int, ...]) -> Tensor:
            return asking.strangers_under(runner, indices, of_fact, silencings)

        settings = {**settings, "silencings": silencings, "strangers": of_fact}
        reading = population.after if len(population.parts) == 1 else population.unedited
        return reading("knock-out of subjects without the object", read, settings=settings)

    def _of_those_that_can_be_asked(self, population: Population) -> Recovery:
        """The same of the facts that have controls, and references enough."""
        of_relation = {(fact.group, fact.subject) for fact in population.reference}
        able, without, few = list[Fact](), 0, Counter[str]()
        for i, fact in enumerate(population.facts):
            touched = population.touched_with(i)
            if not fact.controls:
                without += 1
            elif sum(group == fact.group and s not in touched for group, s in of_relation) < LEAST_REFERENCES:
                few[fact.group] += 1
            else:
                able.append(fact)
        notes = [f"{_not_knocked_out(without)}: no controls"] if without else []
        notes += [
            f"{_not_knocked_out(count, f' of {relation!r}')}: fewer than {LEAST_REFERENCES} references"
            for relation, count in few.items()
        ]
        strict = replace(self, partial=False)
        if able:
            found = strict(population.asking(able))
            return replace(found, details={**found.details, "left_out": tuple(notes)})
        silencings = [Silencing(cells) for cells in self._singles(n_layers(population.model))]
        cases = [Case(s, str(s), "elsewhere", "no fact has references and controls") for s in silencings]
        nothing = torch.full((len(population.facts), len(cases), len(FIRST)), math.nan)
        return Recovery.of(
            "knock-out",
            population,
            cases,
            nothing,
            nothing,
            known=torch.zeros(len(population.facts), dtype=torch.bool),
            details={"left_out": tuple(notes), "whole": None},
        )


def _not_knocked_out(count: int, of: str = "") -> str:
    verb = "wasn't" if count == 1 else "weren't"
    return f"{counted(count, 'fact')}{of} {verb} knocked out"


def _of_footprint(written: Footprint, places: Sequence[Place]) -> list[Cells]:
    """The cells that cover most of what was written, and those that cover all of it."""
    whole = written.whole()
    return [*(cells for place in places for cells in written.nested(place)), *([] if whole is None else [whole])]


def _deciding(found: Recovery, looked: Mapping[int, Shows]) -> list[int]:
    """The cases in which the old object comes back most, by question, until the most of each has been looked into."""
    means = found.excess.mean.nan_to_num(-math.inf).tolist()
    some = list[int]()
    for shows in ("elsewhere", "underneath"):
        mine = [i for i, case in enumerate(found.cases) if case.shows == shows and means[i] > LOOKED_INTO]
        mine.sort(key=lambda i: -means[i])
        counted_so_far = sum(shows == asked == found.cases[i].shows for i, asked in looked.items())
        if mine and mine[0] not in looked and counted_so_far < MOST_LOOKED:
            some += [i for i in mine if i not in looked][:AT_A_TIME]
    return some


def _masked(silencing: Silencing, spared: dict[Silencing, float], unread: int | None) -> str:
    why = why_masked(spared[silencing])
    if math.isnan(spared[silencing]):
        return why
    if all(cell.layer == unread and cell.place == "subject" for cell in silencing.cells):
        return "after the last layer nothing reads the last subject token"
    if silencing.by == "half" and spared[silencing._replace(by="mean")] >= SURVIVES:
        return "the unedited model can spare it whole"
    return why


def _disagreeing(found: Recovery) -> tuple[str, ...]:
    """Cells whose mean and resample don't say the same."""
    means = {case.key: float(found.at(case.key).mean) for case in found.cases if not case.masked}
    return tuple(
        str(key)
        for key, mean in means.items()
        if isinstance(key, Silencing)
        and key.by == "mean"
        and abs(means.get(key._replace(by="resample"), mean) - mean) > 1 / 3
    )


def _reading(facts: Sequence[Fact], silencings: Sequence[Silencing], values: Tensor) -> Reading:
    return Reading(
        name="knock-out",
        values=values,
        axes={"fact": range(len(facts)), "case": list(silencings), "quantity": QUANTITIES},
        unit="1 where first among the objects (of controls the mean), nats (logp)",
    )
