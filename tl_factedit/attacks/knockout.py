"""Knock-out: does the old object come back when one layer's MLP has nothing to say of the subject?

At the last subject token the MLP output of a layer (or of a few in a row) is replaced by its mean over reference
subjects, and everything above is run again::

    mlp_out[l][S]  ←  mean over reference facts r of the same relation, mlp_out[l][S_r]

An edit that lies over a fact leaves a way to the old object that goes past it, and without the edited layer the old
object is back. A model that never learnt the old object has no such way. Two things have to be seen to: a layer without
which the *unedited* model doesn't know the fact either can't tell, and is masked; and an object comes first by chance
too, so what counts is the excess over control objects.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Hook, HookFn, Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import Aligned, align, batches, pad
from tl_factedit.measure.change import layers_written
from tl_factedit.measure.first_tokens import FIRST, FirstTokens, firsts, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population, Read
from tl_factedit.measure.reading import Reading

Window: TypeAlias = tuple[int, ...]
"""Layers knocked out together; empty: none."""

SURVIVES = 0.5
"""A window is looked at if the unedited model keeps its answer for this share of the facts, or more."""
LEAST_REFERENCES = 5
"""With fewer, the mean is still about somebody."""

ENOUGH_TOKENS = 128
"""In one forward pass: with fewer, most of the time isn't spent on arithmetic."""

QUANTITIES = ("old_first", "new_first", "control_first", "logp_old", "logp_new", "logp_control")


@dataclass(frozen=True)
class KnockOut:
    """Knock out layers at the last subject token, in the unedited and in the changed model.

    The population's references give the mean. Those about a subject that the change was made for, or that is asked, are
    left out by themselves: with a change for each fact the other facts will do.

    Beside what every `Recovery` has, ``before`` and ``after`` hold the case ``()`` (nothing knocked out) and
    the log-probabilities ``logp_old``, ``logp_new`` and ``logp_control`` in nats; ``extra`` has ``survives`` (the share
    of the known facts whose old object is first in the unedited model under the same knock-out), ``of_unedited`` (the
    mean excess as a share of the unedited model's own) and ``half_strength`` (the excess with half of the layer's own
    output and half of the mean; descriptive); ``details`` has ``half`` (that reading) and ``references`` (over how many
    references each fact's mean is).

    Attributes:
        widths: How many neighbouring layers to knock out together: 1 for each alone; 3 for three in a row. An edit of
            several layers needs as many. All windows are corrected for together.
        half: Whether to also read the changed model at half strength.
        means_of: ``"audited"`` takes the mean in the model that is audited, ``"unedited"`` in the unedited one, once
            for all. Both are the same where a change leaves reference subjects alone bit for bit, as a router does. A
            weight edit doesn't quite; ``"unedited"`` saves a pass over all references for each change then.
        most_references: How many of a fact's references its mean is over at most, drawn with `seed`: the mean of a
            hundred is within a tenth of their spread of that of all, and each is run in every changed model.
        partial: Whether facts that can't be asked (no controls, or too few references) are left out, with a note in
            ``details["left_out"]``, instead of being refused.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap, and of that draw.
    """

    widths: Sequence[int] = (1,)
    half: bool = True
    means_of: Literal["audited", "unedited"] = "audited"
    most_references: int = 100
    partial: bool = False
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Knock out every window of layers.

        Raises:
            ValueError: A fact without ``target_new``; fewer than five references of a fact's relation; ``"unedited"``
                means for another model; a width that the model hasn't got layers for.
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
        windows = windows_of(layers, self.widths)
        rows = population.first_tokens
        use = self._used(population)
        others = [
            align(population.model.tokenizer, fact, prepend_bos=population.prepend_bos) for fact in population.reference
        ]
        kept: list[Tensor] = []

        def read(strengths: tuple[float, ...], own: bool) -> Read[Tensor]:
            def of_model(runner: Runner, indices: tuple[int, ...]) -> Tensor:
                chosen = list(indices)
                states = _states(runner, others, use[chosen].any(0), self.batch_tokens) if own else kept[0]
                means = _mean(states, use[chosen])
                return _read(runner, [rows[i] for i in chosen], means, [(), *windows], strengths, self.batch_tokens)

            return of_model

        settings = {
            "reference": [asdict(fact) for fact in population.reference] if population.cache else (),
            "settings": (windows, self.half, self.means_of, self.most_references, self.batch_tokens, self.seed),
        }
        if self.means_of == "unedited":
            with frozen(population.model), torch.no_grad():
                kept.append(_states(Runner(population.model), others, use.any(0), self.batch_tokens))
        strengths = (1.0, 0.5) if self.half else (1.0,)
        before = population.unedited("knock-out", read((1.0,), own=True), settings=settings)[:, 0]
        after = population.after("knock-out", read(strengths, self.means_of == "audited"), settings=settings)
        known = before[:, 0, 0] == 1
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        read_later = any(row.last < len(row.ids) - 1 for row in rows)
        masked = _masked(windows, survives, (layers - 1,) if read_later else None)
        written = [layers_written(part.unedited, part.changed) for part in population.parts]
        cases = [
            Case(window, _label(window), "elsewhere", masked.get(window, ""), window, _covers(window, written))
            for window in windows
        ]
        half = _reading(population.facts, windows, after[:, 1]) if self.half else None
        found = Recovery.of(
            "knock-out",
            population,
            cases,
            _reading(population.facts, windows, before),
            _reading(population.facts, windows, after[:, 0]),
            known=known,
            extra={"survives": survives},
            details={"half": half, "references": tuple(use.sum(1).tolist())},
            seed=self.seed,
        )
        own = torch.stack([found.before.at(case=w, quantity="old_first") for w in windows], 1)
        chance = torch.stack([found.before.at(case=w, quantity="control_first") for w in windows], 1)
        extra = {"survives": survives, "of_unedited": found.excess.mean / (own - chance)[known].nanmean(0)}
        if half is not None:
            gaps = [half.at(case=w, quantity="old_first") - half.at(case=w, quantity="control_first") for w in windows]
            extra["half_strength"] = torch.stack(gaps, 1)[known].nanmean(0)
        return replace(found, extra=extra)

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
        notes = [f"{without} facts weren't knocked out: they have no controls"] if without else []
        notes += [
            f"{count} facts of {relation!r} weren't knocked out: fewer than {LEAST_REFERENCES} references"
            for relation, count in few.items()
        ]
        strict = replace(self, partial=False)
        if able:
            found = strict(population.asking(able))
            return replace(found, details={**found.details, "left_out": tuple(notes)})
        windows = windows_of(n_layers(population.model), self.widths)
        cases = [
            Case(window, _label(window), "elsewhere", "no fact has references and controls", window)
            for window in windows
        ]
        nothing = torch.full((len(population.facts), len(windows), len(FIRST)), math.nan)
        return Recovery.of(
            "knock-out",
            population,
            cases,
            nothing,
            nothing,
            known=torch.zeros(len(population.facts), dtype=torch.bool),
            details={"left_out": tuple(notes)},
        )

    def _used(self, population: Population) -> Bool[Tensor, "fact reference"]:
        """Which references are averaged for which fact; the same ones of a relation, as far as can be."""
        reference = population.reference
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(self.seed))
        return torch.stack(
            [
                _first_of(_uses(fact, reference, population.touched_with(i)), order, self.most_references)
                for i, fact in enumerate(population.facts)
            ]
        )


def _label(window: Window) -> str:
    """In words."""
    return f"MLP of layer {window[0]}" if len(window) == 1 else f"MLPs of layers {window[0]}–{window[-1]}"


def _covers(window: Window, written: Sequence[Window | None]) -> bool:
    """Whether all that was written is knocked out; not where something else was written, or nothing."""
    known = [set(layers) for layers in written if layers]
    return len(known) == len(written) and all(layers <= set(window) for layers in known)


def _masked(windows: Sequence[Window], survives: Float[Tensor, "window"], unread: Window | None) -> dict[Window, str]:
    why = {}
    for window, share in zip(windows, survives.tolist(), strict=True):
        if math.isnan(share):
            why[window] = "the unedited model knows none of the facts"
        elif window == unread:
            why[window] = "after the last layer nothing reads the last subject token"
        elif share < SURVIVES:
            why[window] = (
                f"the unedited model keeps its answer in {share:.0%} of the facts it knows, needed {SURVIVES:.0%}"
            )
    return why


def windows_of(layers: int, widths: Sequence[int]) -> tuple[Window, ...]:
    """All windows of neighbouring layers of these widths, whole ones only, narrow ones first."""
    if not widths or min(widths) < 1 or max(widths) > layers:
        raise ValueError(f"widths are {tuple(widths)}, needed some between 1 and the model's {layers} layers")
    return tuple(
        tuple(range(start, start + width)) for width in sorted(set(widths)) for start in range(layers - width + 1)
    )


# ------------------------------------------------------------------------------------ what is asked


def _uses(fact: Fact, reference: Sequence[Fact], touched: frozenset[str]) -> Bool[Tensor, "reference"]:
    """Which references a fact's mean is over."""
    # A subject asked under several prompts counts under each: the state depends on what stands before it.
    use = torch.tensor([r.group == fact.group and r.subject not in touched for r in reference], dtype=torch.bool)
    subjects = len({r.subject for r, yes in zip(reference, use.tolist(), strict=True) if yes})
    if subjects < LEAST_REFERENCES:
        raise ValueError(
            f"{int(use.sum())} of {len(reference)} reference facts, about {subjects} subjects, are of the relation "
            f"{fact.group!r} of {fact.name!r} and about a subject that isn't changed, needed {LEAST_REFERENCES} "
            "subjects at least: give more facts of this relation"
        )
    return use


def _first_of(use: Bool[Tensor, "reference"], order: Int[Tensor, "reference"], most: int) -> Bool[Tensor, "reference"]:
    """As many of those that can be used as are wanted, the first in some order."""
    if most < LEAST_REFERENCES:
        raise ValueError(f"most_references is {most}, needed {LEAST_REFERENCES} at least")
    return torch.zeros_like(use).index_fill(0, order[use[order]][:most], True)


# ------------------------------------------------------------------------------------ running


def _states(
    runner: Runner, rows: Sequence[Aligned], used: Bool[Tensor, "reference"], batch_tokens: int
) -> Float[Tensor, "reference layer d_model"]:
    """The MLP outputs of all layers at the last subject tokens, 0 where unused; nothing after them is run."""
    places = [component_hook("mlp", layer) for layer in range(runner.n_layers)]
    needed = used.nonzero()[:, 0].tolist()
    # Beginnings shared by prompts of one subject are run for each: this is the smaller part of the work.
    heads = [rows[i].ids[: rows[i].last + 1] for i in needed]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for some in batches([len(head) for head in heads], batch_tokens):
        caught = runner.capture(pad([heads[i] for i in some], 0), places)
        ends = torch.tensor([len(heads[i]) - 1 for i in some])
        at_end = torch.stack([caught[place][torch.arange(len(some)), ends] for place in places], 1)
        for i, state in zip(some, at_end, strict=True):
            found[needed[i]] = state
    nothing = torch.zeros_like(found[needed[0]])
    return torch.stack([state if len(state) else nothing for state in found])


def _mean(
    states: Float[Tensor, "reference layer d_model"], use: Bool[Tensor, "fact reference"]
) -> Float[Tensor, "fact layer d_model"]:
    weights = use.to(states.device).double()
    total = torch.einsum("fr,rld->fld", weights, states.double())
    return (total / weights.sum(1)[:, None, None]).to(states.dtype)


def _read(
    runner: Runner,
    rows: Sequence[FirstTokens],
    means: Float[Tensor, "fact layer d_model"],
    windows: Sequence[Window],
    strengths: Sequence[float],
    batch_tokens: int,
) -> Float[Tensor, "fact strength window quantity"]:
    """`QUANTITIES` under each window's knock-out: only the blocks from its first layer on are run for it."""
    enough = min(ENOUGH_TOKENS, batch_tokens)
    alone = _passes(windows, runner.n_layers, 1, 0)
    most = len(strengths) * max(len(here) for _, here in alone)
    streams = [*(resid_pre(layer) for layer in range(runner.n_layers)), resid_post(runner.n_layers - 1)]
    out = torch.full((len(rows), len(strengths), len(windows), len(QUANTITIES)), math.nan)
    asked = [i for i, row in enumerate(rows) if row.objects]
    for batch in batches([most * len(rows[i].ids) for i in asked], batch_tokens):
        some = [asked[i] for i in batch]
        tokens = pad([rows[i].ids for i in some], 0)
        ends = torch.tensor([len(rows[i].ids) - 1 for i in some])
        last = torch.tensor([rows[i].last for i in some])
        clean = runner.capture(tokens, streams)
        for begin, here in _passes(windows, runner.n_layers, len(strengths) * tokens.numel(), enough):
            # All facts under the first of these cells, then all under the next …
            cells = list(itertools.product(range(len(strengths)), here))
            hooks: list[Hook] = []
            for layer in sorted({layer for w in here for layer in windows[w]}):
                holding = [(j, strengths[s]) for j, (s, w) in enumerate(cells) if layer in windows[w]]
                place = torch.cat([torch.arange(len(some)) + j * len(some) for j, _ in holding])
                share = torch.tensor([strength for _, strength in holding]).repeat_interleave(len(some))
                mean = means[some, layer].repeat(len(holding), 1)
                hooks.append((component_hook("mlp", layer), _mix(place, last.repeat(len(holding)), mean, share)))
            log_p = runner.logits(
                tokens.repeat(len(cells), 1),
                at=ends.repeat(len(cells))[:, None],
                start=(begin, clean[streams[begin]].repeat(len(cells), 1, 1)),
                hooks=hooks,
            )[:, 0]
            log_p = log_p.float().log_softmax(-1).cpu()
            for (s, w), found in zip(cells, log_p.split(len(some)), strict=True):
                for i, row in zip(some, found, strict=True):
                    out[i, s, w] = _quantities(row, rows[i].objects)
    return out


def _passes(windows: Sequence[Window], layers: int, tokens: int, enough: int) -> list[tuple[int, list[int]]]:
    """Which windows are run together, and from which block on.

    Those that begin at one layer go together. Where they are few tokens, as with one fact, those that begin at the
    next layers go with them: running some blocks that nothing changed costs less than another pass.

    Args:
        windows: All of them.
        layers: How many the model has.
        tokens: What one window costs.
        enough: How many tokens a pass may have through those that begin higher.
    """
    begins: dict[int, list[int]] = {}
    for w, window in enumerate(windows):
        begins.setdefault(window[0] if window else layers, []).append(w)
    passes: list[tuple[int, list[int]]] = []
    for begin, here in sorted(begins.items()):
        if passes and begin < layers and (len(passes[-1][1]) + len(here)) * tokens <= enough:
            passes[-1][1].extend(here)
        else:
            passes.append((begin, list(here)))
    return passes


def _mix(rows: Tensor, positions: Tensor, mean: Float[Tensor, "row d_model"], share: Float[Tensor, "row"]) -> HookFn:
    """At one position of some rows, the mean in place of a share of what stands there."""

    def hook_fn(value: Tensor, hook: Any = None) -> Tensor:
        mixed = value.clone()
        own, new, a = mixed[rows, positions], mean.to(value), share.to(value)[:, None]
        mixed[rows, positions] = torch.where(a == 1, new, (1 - a) * own + a * new)
        return mixed

    return hook_fn


def _quantities(log_p: Float[Tensor, "vocab"], objects: tuple[int, ...]) -> Float[Tensor, "quantity"]:
    found = log_p[list(objects)]
    first = firsts(found)
    return torch.stack([*first[:2], first[2:].mean(), *found[:2], found[2:].mean()])


def _reading(facts: Sequence[Fact], windows: Sequence[Window], values: Tensor) -> Reading:
    return Reading(
        name="knock-out at the last subject token",
        values=values,
        axes={"fact": range(len(facts)), "case": [(), *windows], "quantity": QUANTITIES},
        unit="1 where first among the objects (of controls the mean), nats (logp)",
    )
