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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Hook, HookFn, Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.estimate import Estimate, Estimates
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import Aligned, align, batches, pad
from tl_factedit.measure.cache import read_each
from tl_factedit.measure.change import Changed
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import FirstTokens, firsts, one_of, with_new_objects
from tl_factedit.measure.population import Part, bos_of_change, each
from tl_factedit.measure.reading import Reading

if TYPE_CHECKING:
    import pandas as pd

Window: TypeAlias = tuple[int, ...]
"""Layers knocked out together; empty: none."""

SURVIVES = 0.5
"""A window is looked at if the unedited model keeps its answer for this share of the facts, or more."""
LEAST_REFERENCES = 5
"""With fewer, the mean is still about somebody."""

ENOUGH_TOKENS = 128
"""In one forward pass: with fewer, most of the time isn't spent on arithmetic."""

QUANTITIES = ("old_first", "new_first", "control_first", "logp_old", "logp_new", "logp_control")


@dataclass(frozen=True, eq=False)
class KnockOut:
    """What is left of some facts' objects when layers are knocked out.

    Objects count by their first tokens, and the first of them is the first among old, new and controls. Facts whose
    objects share a first token, and facts that the unedited model doesn't know (old first, nothing knocked out), are
    left out of all shares.

    Attributes:
        facts: What was asked.
        windows: The layers knocked out together, one window after another.
        known: Whether a fact counts, [fact].
        before: The unedited model: axes fact, window (and ``()``: nothing knocked out), quantity. ``*_first`` are 0 or
            1 (of controls: their mean), ``logp_*`` are nats.
        after: The changed model, the same.
        half: The changed model with half of its own output and half of the mean, or None; descriptive.
        survives: Share of the known facts whose old object is first in the unedited model under the same knock-out,
            [window].
        masked: The windows that can't tell anything, and why: the unedited model doesn't survive them, or nothing reads
            what they change (the last layer, at a token that isn't the last).
        excess: In the changed model, with 95 % intervals; NaN where masked, [window].
        corrected: The same with intervals that hold for all windows together (Bonferroni).
        references: How many subjects the mean of a fact is over, [fact].
        means_of: The model that the means were taken in.
    """

    facts: tuple[Fact, ...]
    windows: tuple[Window, ...]
    known: Bool[Tensor, "fact"]
    before: Reading
    after: Reading
    half: Reading | None
    survives: Float[Tensor, "window"]
    masked: Mapping[Window, str]
    excess: Estimates
    corrected: Estimates
    references: tuple[int, ...]
    means_of: Literal["audited", "unedited"]

    @property
    def of_unedited(self) -> Float[Tensor, "window"]:
        """The mean excess as a share of the unedited model's own under the same knock-out; NaN where masked."""
        first, control = (self.before.at(quantity=f"{what}_first")[self.known, 1:] for what in ("old", "control"))
        return self.excess.mean / (first - control).nanmean(0)

    @property
    def tested(self) -> Bool[Tensor, "window"]:
        """Which windows can tell anything: those that aren't masked."""
        return torch.tensor([window not in self.masked for window in self.windows])

    @property
    def best(self) -> Window | None:
        """The window with the largest excess; None if all are masked."""
        if not bool(self.tested.any()):
            return None
        return self.windows[int(self.excess.mean.nan_to_num(-math.inf).argmax())]

    @property
    def strongest(self) -> Estimate:
        """The excess of the best window, with its corrected interval."""
        if self.best is None:
            return Estimate(math.nan, math.nan, math.nan, 0)
        return self.at(self.best, corrected=True)

    @property
    def at_most(self) -> float:
        """The largest upper end of all windows, not corrected; NaN if none has an interval.

        For "no window brings it back" each has to show its absence, and no correction is due.
        """
        ends = self.excess.high[self.tested & ~self.excess.high.isnan()]
        return float(ends.max()) if len(ends) else math.nan

    def at(self, window: Window, *, corrected: bool = False) -> Estimate:
        """The excess of one window."""
        return one_of(self.corrected if corrected else self.excess, self.windows.index(window))

    def table(self) -> pd.DataFrame:
        """One row a window."""
        import pandas as pd

        def share(reading: Reading | None, quantity: str, window: Window) -> float:
            if reading is None:
                return math.nan
            return float(reading.at(window=window, quantity=quantity)[self.known].nanmean())

        return pd.DataFrame(
            [
                {
                    "layers": "–".join(str(layer) for layer in dict.fromkeys((window[0], window[-1]))),
                    "survives": float(self.survives[i]),
                    "old_first": share(self.after, "old_first", window),
                    "control_first": share(self.after, "control_first", window),
                    "new_first": share(self.after, "new_first", window),
                    "excess": float(self.excess.mean[i]),
                    "low": float(self.excess.low[i]),
                    "high": float(self.excess.high[i]),
                    "corrected_low": float(self.corrected.low[i]),
                    "corrected_high": float(self.corrected.high[i]),
                    "of_unedited": float(self.of_unedited[i]),
                    "half_strength": share(self.half, "old_first", window) - share(self.half, "control_first", window),
                    "masked": self.masked.get(window, ""),
                }
                for i, window in enumerate(self.windows)
            ]
        )

    def __repr__(self) -> str:
        """The strongest window in a line."""
        where = "all windows masked" if self.best is None else f"layers {list(self.best)}: excess {self.strongest:.2f}"
        return (
            f"KnockOut({where}; {int(self.tested.sum())} of {len(self.windows)} windows tested, "
            f"{int(self.known.sum())} of {len(self.facts)} facts known)"
        )


def knock_out(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    reference: Sequence[Fact],
    *,
    widths: Sequence[int] = (1,),
    half: bool = True,
    means_of: Literal["audited", "unedited"] = "audited",
    most_references: int = 100,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> KnockOut:
    """Knock out layers at the last subject token, in the unedited and in the changed model.

    Args:
        model: The unedited model.
        changed: A change of it for all facts, a list with a change for each, or another model.
        facts: What to ask, each with ``target_new`` and with ``controls``.
        reference: Facts of the same relations whose subjects give the mean. Those about a subject that the
            change was made for, or that is asked, are left out by themselves: with a change for each fact the other
            facts will do.
        widths: How many layers to knock out together: 1 for each alone; 3 for three in a row. An edit of several
            layers needs as many. All windows are corrected for together.
        half: Whether to also read the changed model at half strength.
        means_of: ``"audited"`` takes the mean in the model that is audited, ``"unedited"`` in the unedited one, once
            for all. Both are the same where a change leaves reference subjects alone bit for bit, as a router does. A
            weight edit doesn't quite; ``"unedited"`` saves a pass over all references for each change then.
        most_references: How many of a fact's references its mean is over at most, drawn with `seed`: the mean of a
            hundred is within a tenth of their spread of that of all, and each is run in every changed model.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        seed: Of the bootstrap, and of that draw.
        folder: Where to keep what is read of each change; a call that was killed goes on from there.
        progress: Whether to show a bar on several changes that take longer than a second.

    Raises:
        ValueError: No facts; a fact without ``target_new``; fewer than five references of a fact's relation;
            ``"unedited"`` means for another model; a width that the model hasn't got layers for.
    """
    facts = with_new_objects(facts)
    parts = list(each(model, changed, facts))
    if means_of == "unedited" and any(isinstance(part.changed, Model) for part in parts):
        raise ValueError(
            "means_of='unedited' for another model, whose states are its own: needed 'audited', which takes them there"
        )
    bos = bos_of_change(model, changed, prepend_bos)
    windows = windows_of(n_layers(model), widths)
    rows = [FirstTokens.of(model.tokenizer, fact, bos) for fact in facts]
    others = [align(model.tokenizer, fact, prepend_bos=bos) for fact in reference]
    # Who is averaged for which fact, and in which part; the same of one relation, as far as can be.
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    use = torch.stack(
        [_first_of(_uses(fact, reference, _touched(parts, i)), order, most_references) for i, fact in enumerate(facts)]
    )

    with frozen(model), torch.no_grad():
        runner = Runner(model)
        own = _states(runner, others, use.any(0), batch_tokens)
        before = _read(runner, rows, _mean(own, use), [(), *windows], (1.0,), batch_tokens)[:, 0]
    strengths = (1.0, 0.5) if half else (1.0,)

    def read(tested: Model, part: Part) -> Tensor:
        chosen = list(part.indices)
        runner, states = Runner(tested), own
        if means_of == "audited":
            states = _states(runner, others, use[chosen].any(0), batch_tokens)
        means = _mean(states, use[chosen])
        return _read(runner, [rows[i] for i in chosen], means, [(), *windows], strengths, batch_tokens)

    asked = {
        "reference": [asdict(fact) for fact in reference] if folder is not None else (),
        "settings": (windows, strengths, means_of, most_references, bos, batch_tokens, seed),
    }
    after = before.new_full((len(facts), len(strengths), *before.shape[1:]), math.nan)
    for part, found in read_each(parts, read, what="knock-out", asked=asked, folder=folder, progress=progress):
        after[list(part.indices)] = found

    known = before[:, 0, 0] == 1
    survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
    read_later = any(row.last < len(row.ids) - 1 for row in rows)
    masked = _masked(windows, survives, (n_layers(model) - 1,) if read_later else None)
    tested = torch.tensor([window not in masked for window in windows])
    counts = known[:, None] & tested
    first, chance = (torch.where(counts, after[:, 0, 1:, i], math.nan) for i in (0, 2))
    return KnockOut(
        facts=facts,
        windows=windows,
        known=known,
        before=_reading(facts, windows, before),
        after=_reading(facts, windows, after[:, 0]),
        half=_reading(facts, windows, after[:, 1]) if half else None,
        survives=survives,
        masked=masked,
        excess=excess(first, chance, seed=seed),
        corrected=excess(first, chance, tests=max(1, int(tested.sum())), seed=seed),
        references=tuple(use.sum(1).tolist()),
        means_of=means_of,
    )


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


def _touched(parts: Sequence[Any], index: int) -> frozenset[str]:
    return next(part.touched for part in parts if index in part.indices)


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
        axes={"fact": range(len(facts)), "window": [(), *windows], "quantity": QUANTITIES},
        unit="1 where first among the objects (of controls the mean), nats (logp)",
    )
