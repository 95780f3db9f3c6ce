"""Relearning: is the old object learnt again sooner than an object that was never taught?

From the changed model on, a fact's prompt is taught an object by Adam on ``W_out`` of some layers, once the old object
and once control objects, each from the same start::

    s(o)     updates until p(o | prompt) > ½, between two updates by the line through their log p
    savings  mean over controls c of s(c) − s(old)

(after Ebbinghaus' savings). Above 0: something of the old object is left that learning can use. Below 0: the old object
is harder to learn than any, it is marked as what the answer is not. The learning rate decides how finely this is
measured: with a large one everything takes one update. It is found on the unedited model beforehand, where control
objects must take eight at least.

The disjoint form teaches the old objects of some facts and looks at others, which nobody taught; only one model for all
facts can be asked this, and while some are taught the others collapse, so that it is descriptive.

No weight of any model is written. What is learnt stands beside ``W_out``, whose output a hook adds it to, so that it
goes together with edits and routers; every row of a batch learns a change of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.measure.change import Changed, bos_of_change, each
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.measure.excess import excess_of
from tl_factedit.core.facts import Fact
from tl_factedit.backend.model import DownProj, Hook, Model, Runner, down_proj, drop_graphs, n_layers, quiet, resid_pre
from tl_factedit.measure.first_tokens import Asked, are_known, at_the_ends, with_new_objects
from tl_factedit.core.tokens import align, batches, continuation, pad
from tl_factedit.editing.values import GIB

if TYPE_CHECKING:
    import pandas as pd

LEARNT = 0.5
"""An object is learnt when it is likelier than this."""
LEAST_STEPS = 8.0
"""What control objects have to take in the unedited model for differences to show."""
RATES = tuple(1e-2 * 2.0**-i for i in range(14))
"""Learning rates to choose from, the largest first."""
TRIED = 12
"""Facts on which the rate is found."""


@dataclass(frozen=True, eq=False)
class Relearning:
    """How many updates it takes to learn the old objects again, and control objects.

    Facts that the unedited model doesn't know (old object first of all), and facts without a control of as many tokens
    as the old object, are left out.

    Attributes:
        facts: What was asked.
        layers: Whose ``W_out`` learnt.
        lr: Of Adam.
        steps: Most updates; what isn't learnt by then counts one more.
        known: Whether a fact counts, [fact].
        old: Updates for the old object, [fact]; 0 if it is there already, NaN if not asked.
        control: The mean over the fact's controls, [fact].
        controls: The control objects, for each fact.
        unlearnt: Share of all objects that were not learnt in time.
        savings: Updates saved, with sign, over facts.
    """

    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    lr: float
    steps: int
    known: Bool[Tensor, "fact"]
    old: Float[Tensor, "fact"]
    control: Float[Tensor, "fact"]
    controls: tuple[tuple[str, ...], ...]
    unlearnt: float
    savings: Estimate

    def table(self) -> pd.DataFrame:
        """One row a fact."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "fact": fact.name,
                    "known": bool(self.known[i]),
                    "steps_old": float(self.old[i]),
                    "steps_control": float(self.control[i]),
                    "savings": float(self.control[i] - self.old[i]),
                    "controls": ", ".join(text.strip() for text in self.controls[i]),
                }
                for i, fact in enumerate(self.facts)
            ]
        )

    def __repr__(self) -> str:
        """The savings in a line."""
        counted = self.known & ~(self.old.isnan() | self.control.isnan())
        old, control = (float(values[counted].mean()) for values in (self.old, self.control))
        return (
            f"Relearning(savings {self.savings:.1f} updates: {old:.1f} for the old object, {control:.1f} for controls; "
            f"lr {self.lr:.2g}, layers {list(self.layers)})"
        )


def relearn(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    lr: float | None = None,
    steps: int = 40,
    controls: int = 2,
    prepend_bos: bool | None = None,
    memory: float = 1.0,
    seed: int = 0,
) -> Relearning:
    """Teach a changed model the old object of each fact, and control objects, each alone and from the same start.

    Args:
        model: The unedited model.
        changed: A change of it for all facts, a list with a change for each, or another model.
        facts: Each with ``target_new`` and with ``controls``.
        layers: Whose ``W_out`` may learn; None for all. A layer that a router answers for learns on top of its answer.
        lr: Of Adam; None finds one with `relearning_rate` on the unedited model.
        steps: Most updates.
        controls: How many control objects for each fact, drawn by `seed`.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        memory: What the learnt changes and activations may take, in GiB: sets how many facts learn at once, which
            changes the result by rounding alone.
        seed: Of the draw and the bootstrap.

    Raises:
        ValueError: No facts; a fact without ``target_new``; no layers, or one outside the model; or, for `lr`, as in
            `relearning_rate`.
        RuntimeError: The learning is not finite.
    """
    facts = with_new_objects(facts)
    parts = list(each(model, changed, facts))
    chosen = _layers(model, layers)
    bos = bos_of_change(model, changed, prepend_bos)
    if lr is None:
        lr = relearning_rate(model, facts, layers=chosen, steps=steps, prepend_bos=bos, memory=memory, seed=seed)
    lessons = [_Lessons.of(model.tokenizer, fact, bos, controls, f"{seed} {fact.name}") for fact in facts]
    with quiet(model), torch.no_grad():
        known = are_known(Runner(model), [each.asked for each in lessons], 4096)
    old, control = (torch.full((len(facts),), math.nan) for _ in range(2))
    late, total = 0, 0
    for part in parts:
        mine = [i for i in part.indices if known[i] and lessons[i].controls]
        if not mine:
            continue
        pupils = [(lessons[i].ids, target) for i in mine for target in lessons[i].targets]
        with part.applied() as tested, quiet(tested):
            taken = _updates_until_learnt(tested, pupils, chosen, lr, steps, memory)
        late, total = late + int((taken > steps).sum()), total + len(taken)
        for i, own in zip(mine, taken.split([len(lessons[i].targets) for i in mine]), strict=True):
            old[i], control[i] = own[0], own[1:].mean()
    return Relearning(
        facts=facts,
        layers=chosen,
        lr=lr,
        steps=steps,
        known=known,
        old=old,
        control=control,
        controls=tuple(each.named for each in lessons),
        unlearnt=late / total if total else math.nan,
        savings=over_facts((control - old).tolist(), span=None, seed=seed),
    )


def relearning_rate(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    least: float = LEAST_STEPS,
    rates: Sequence[float] = RATES,
    steps: int = 40,
    prepend_bos: bool | None = None,
    memory: float = 1.0,
    seed: int = 0,
) -> float:
    """The largest learning rate at which the unedited model needs at least so many updates for a control object.

    A median over a few of the facts, one control each.

    Args:
        model: The unedited model.
        facts: Those to be asked, each with ``controls``.
        layers: As in `relearn`.
        least: So many updates.
        rates: To choose from.
        steps: Most updates.
        prepend_bos: BOS policy; None for the model's.
        memory: As in `relearn`.
        seed: Of the draw of controls.

    Raises:
        ValueError: No fact has a control of as many tokens as its old object; or at no rate control objects take
            `least` to `steps` updates.
    """
    facts = with_new_objects(facts)
    chosen = _layers(model, layers)
    bos = bos_of_change(model, model, prepend_bos)
    lessons = [_Lessons.of(model.tokenizer, fact, bos, 1, f"{seed} {fact.name}") for fact in facts]
    pupils = [(each.ids, each.targets[1]) for each in lessons if each.controls][:TRIED]
    if not pupils:
        raise ValueError(
            "no fact has a control of as many tokens as its old object, needed one at least: give controls"
        )
    with quiet(model):
        for lr in sorted(rates, reverse=True):
            # Whether it is too large shows after a few updates; whether it is too small, only after all of them.
            enough = math.ceil(least)
            if float(_updates_until_learnt(model, pupils, chosen, lr, enough, memory).median()) < least:
                continue
            median = float(_updates_until_learnt(model, pupils, chosen, lr, steps, memory).median())
            if least <= median <= steps:
                return lr
    raise ValueError(
        f"at none of the learning rates {min(rates):.2g} to {max(rates):.2g} control objects take {least:g} to {steps} "
        "updates: allow more steps, or give other rates"
    )


@dataclass(frozen=True, eq=False)
class DisjointRelearning:
    """What teaching the old objects of some facts does to others; descriptive.

    Attributes:
        taught: Whose objects were taught.
        looked_at: Whose weren't.
        updates: After how many updates was looked.
        old: How often the old object is first of the objects of a fact that was not taught, at each update.
        new: How often the new one is.
        excess: The old object's in excess of controls.
        learnt: How often the old object is first of the objects of a fact that *was* taught.
    """

    taught: tuple[Fact, ...]
    looked_at: tuple[Fact, ...]
    updates: tuple[int, ...]
    old: tuple[Estimate, ...]
    new: tuple[Estimate, ...]
    excess: tuple[Estimate, ...]
    learnt: tuple[Estimate, ...]

    def table(self) -> pd.DataFrame:
        """One row a look."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "updates": updates,
                    "old_first": self.old[i].mean,
                    "new_first": self.new[i].mean,
                    "excess": self.excess[i].mean,
                    "low": self.excess[i].low,
                    "high": self.excess[i].high,
                    "learnt": self.learnt[i].mean,
                }
                for i, updates in enumerate(self.updates)
            ]
        )

    def __repr__(self) -> str:
        """The last look in a line."""
        return (
            f"DisjointRelearning({len(self.taught)} taught, after {self.updates[-1]} updates {self.learnt[-1]:.2f} of "
            f"them learnt; excess of the old object in {len(self.looked_at)} others {self.excess[-1]:.2f})"
        )


def relearn_disjoint(
    model: Model,
    changed: Changed,
    teach: Sequence[Fact],
    look: Sequence[Fact],
    *,
    lr: float,
    layers: Sequence[int] | None = None,
    updates: Sequence[int] = (0, 5, 10, 20),
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> DisjointRelearning:
    """Teach the old objects of some facts together, and look whether those of others come along.

    Args:
        model: The unedited model.
        changed: One change for all facts, or another model: single edits have nothing in common that one could teach.
        teach: Whose old objects to teach.
        look: Other facts that were changed, about other subjects; those the unedited model knows count.
        lr: Of Adam, such as `relearning_rate` finds.
        layers: Whose ``W_out`` may learn; None for all.
        updates: After how many updates to look, ascending.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        seed: Of the bootstrap.

    Raises:
        ValueError: A list of changes; no facts to teach or to look at, or the same subject in both; updates that don't
            ascend.
        RuntimeError: The learning is not finite.
    """
    teach, look = with_new_objects(teach), with_new_objects(look)
    parts = list(each(model, changed, [*teach, *look])) if teach and look else []
    if len(parts) != 1:
        raise ValueError(
            f"{len(parts)} models answer for {len(teach)} facts to teach and {len(look)} to look at, needed one for "
            "some of both: one change for all facts, or another model"
        )
    both = {fact.subject for fact in teach} & {fact.subject for fact in look}
    if both:
        raise ValueError(f"{sorted(both)[0]!r} is taught and looked at, needed other subjects")
    if not updates or list(updates) != sorted(set(updates)) or updates[0] < 0:
        raise ValueError(f"updates are {tuple(updates)}, needed numbers that ascend")
    chosen = _layers(model, layers)
    bos = bos_of_change(model, changed, prepend_bos)
    asked = [Asked.of(model.tokenizer, fact, bos) for fact in (*teach, *look)]
    pupils = [
        (one.ids, align(model.tokenizer, fact, prepend_bos=bos).true_ids)
        for one, fact in zip(asked[: len(teach)], teach, strict=True)
    ]
    with quiet(model), torch.no_grad():
        known = are_known(Runner(model), asked, batch_tokens)
    firsts = torch.full((len(updates), len(asked), 3), math.nan)
    with parts[0].applied() as tested, quiet(tested):
        sites = [down_proj(tested, layer) for layer in chosen]
        learner = _Learner(Runner(tested), sites, 1, lr)
        try:
            groups = [
                _Group(learner.runner, [pupils[i] for i in some], chosen[0])
                for some in batches([len(ids) + len(target) - 1 for ids, target in pupils], batch_tokens)
            ]
            for when in range(updates[-1] + 1):
                if when in updates:
                    with torch.no_grad():
                        hooks = _adding(sites, learner.learnt)
                        for i, logits in at_the_ends(learner.runner, [a.ids for a in asked], batch_tokens, hooks=hooks):
                            firsts[list(updates).index(when), i] = asked[i].first(logits)
                if when < updates[-1]:
                    learner.update(groups)
        finally:
            drop_graphs(tested)
    firsts[:, ~known] = math.nan
    mine, others = firsts[:, : len(teach)], firsts[:, len(teach) :]
    return DisjointRelearning(
        taught=teach,
        looked_at=look,
        updates=tuple(updates),
        old=tuple(excess_of(at[:, 0], seed=seed) for at in others),
        new=tuple(excess_of(at[:, 1], seed=seed) for at in others),
        excess=tuple(excess_of(at[:, 0], at[:, 2], seed=seed) for at in others),
        learnt=tuple(excess_of(at[:, 0], seed=seed) for at in mine),
    )


# ------------------------------------------------------------------------------------ what is taught


@dataclass(frozen=True, eq=False)
class _Lessons:
    """What a fact's prompt is taught, one object at a time.

    Attributes:
        asked: The prompt.
        targets: The old object's ids, then those of the controls.
        named: The controls.
    """

    asked: Asked
    targets: tuple[Int[Tensor, "_"], ...]
    named: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, bos: bool, controls: int, seed: str) -> _Lessons:
        if controls < 1:
            raise ValueError(f"controls is {controls}, needed 1 at least for each fact")
        asked = Asked.of(tokenizer, fact, bos)
        row = align(tokenizer, fact, prepend_bos=bos)
        spelt = {text: continuation(tokenizer, row.text, text, prepend_bos=bos) for text in asked.named}
        alike = [text for text, ids in spelt.items() if len(ids) == len(row.true_ids)]
        some = random.Random(seed).sample(alike, min(controls, len(alike)))
        return cls(asked, (row.true_ids, *(spelt[text] for text in some)), tuple(some))

    @property
    def ids(self) -> Int[Tensor, "pos"]:
        return self.asked.ids

    @property
    def controls(self) -> bool:
        """Whether there is anything to compare with."""
        return self.asked.apart and len(self.targets) > 1


Pupil = tuple[Int[Tensor, "_"], Int[Tensor, "_"]]
"""Ids of a prompt, and of what it is to be followed by."""


class _Group:
    """Pupils that are run at once, from the first layer that learns on."""

    def __init__(self, runner: Runner, pupils: Sequence[Pupil], first: int) -> None:
        self.tokens = pad([torch.cat([ids, target[:-1]]) for ids, target in pupils], 0)
        at = [(r, len(ids) - 1 + i) for r, (ids, target) in enumerate(pupils) for i in range(len(target))]
        self.at = torch.tensor([r for r, _ in at]), torch.tensor([place for _, place in at])
        self.target = torch.cat([target for _, target in pupils])
        self.length = torch.tensor([float(len(target)) for _, target in pupils])
        place = resid_pre(first)
        with torch.no_grad():
            self.start = first, runner.capture(self.tokens, [place], stop=first)[place]

    def log_p(self, runner: Runner, hooks: Sequence[Hook]) -> Float[Tensor, "pupil"]:
        """Of each pupil's whole target."""
        logits = runner.logits(self.tokens, at=self.at, start=self.start, hooks=hooks)[0]
        log_p = logits.float().log_softmax(-1).gather(-1, self.target.to(logits.device)[:, None])[:, 0]
        return torch.zeros(len(self.length), device=log_p.device).index_add(0, self.at[0].to(log_p.device), log_p)


class _Learner:
    """Changes of some ``W_out`` that are learnt by Adam: one for each row, or one for all.

    Attributes:
        learnt: For each site, [change d_mlp d_model].
    """

    def __init__(self, runner: Runner, sites: Sequence[DownProj], changes: int, lr: float) -> None:
        self.runner, self.sites, self.lr = runner, sites, lr
        # Steps of Adam are smaller than what half precision resolves.
        kinds = [torch.promote_types(site.W.dtype, torch.float32) for site in sites]
        self.learnt = [
            torch.zeros(changes, *site.W.shape, dtype=kind, device=site.W.device)
            for site, kind in zip(sites, kinds, strict=True)
        ]
        self.mean = [torch.zeros_like(each) for each in self.learnt]
        self.square = [torch.zeros_like(each) for each in self.learnt]
        self.updates = 0

    def update(self, groups: Sequence[_Group]) -> Float[Tensor, "pupil"]:
        """One update towards all targets; log p of each from before it, group after group."""
        total = [torch.zeros_like(each) for each in self.learnt]
        count = 1 if len(self.learnt[0]) > 1 else sum(len(group.length) for group in groups)
        found = []
        for group in groups:
            leaves = [each.detach().requires_grad_() for each in self.learnt]
            with torch.enable_grad():
                log_p = group.log_p(self.runner, _adding(self.sites, leaves))
                loss = (-log_p / group.length.to(log_p.device)).sum() / count
                for sum_, part in zip(total, torch.autograd.grad(loss, leaves), strict=True):
                    sum_ += part
            found.append(log_p.detach().cpu())
        log_p = torch.cat(found)
        if not bool(log_p.isfinite().all()):
            raise RuntimeError(f"a log-probability is not finite after {self.updates} updates: lower lr")
        self.updates += 1
        correct_mean, correct_square = 1 - 0.9**self.updates, 1 - 0.999**self.updates
        for learnt, gradient, mean, square in zip(self.learnt, total, self.mean, self.square, strict=True):
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            learnt -= self.lr * (mean / correct_mean) / ((square / correct_square).sqrt() + 1e-8)
        return log_p


def _adding(sites: Sequence[DownProj], learnt: Sequence[Tensor]) -> list[Hook]:
    """Hooks that add what was learnt to what ``W_out`` (and whatever else is laid over it) answers."""

    def of(site: DownProj, change: Tensor) -> list[Hook]:
        seen: list[Tensor] = []

        def read(key: Tensor, hook: Any = None) -> None:
            seen[:] = [key]

        def add(value: Tensor, hook: Any = None) -> Tensor:
            key = seen.pop().to(change.dtype)
            return value + (key @ (change if len(change) > 1 else change[0])).to(value.dtype)

        return [(site.key_hook, read), (site.value_at, add)]

    return [hook for site, change in zip(sites, learnt, strict=True) for hook in of(site, change)]


def _updates_until_learnt(
    model: Model, pupils: Sequence[Pupil], layers: Sequence[int], lr: float, steps: int, memory: float
) -> Float[Tensor, "pupil"]:
    """For each pupil, learning alone, the updates until its target is likelier than ½; ``steps + 1`` if it isn't."""
    sites = [down_proj(model, layer) for layer in layers]
    runner = Runner(model)
    numbers = sum(site.W.numel() for site in sites)
    per_token = (runner.n_layers - layers[0]) * (12 * model.cfg.d_model + 6 * len(sites[0].W)) + 4 * model.cfg.d_vocab
    # Of each change there are the sum, the gradient, two moments and a step.
    cost = [4 * (6 * numbers + per_token * (len(ids) + len(target))) for ids, target in pupils]
    taken = torch.full((len(pupils),), steps + 1.0)
    try:
        for some in batches(cost, int(memory * GIB)):
            taken[some] = _learn(runner, sites, [pupils[i] for i in some], lr, steps)
    finally:
        drop_graphs(model)
    return taken


def _learn(
    runner: Runner, sites: Sequence[DownProj], pupils: Sequence[Pupil], lr: float, steps: int
) -> Float[Tensor, "pupil"]:
    group = _Group(runner, pupils, sites[0].layer)
    learner = _Learner(runner, sites, len(pupils), lr)
    taken = torch.full((len(pupils),), math.nan)
    wanted, before = math.log(LEARNT), torch.full((len(pupils),), math.nan)
    for update in range(steps + 1):
        if update < steps:
            now = learner.update([group])
        else:
            with torch.no_grad():
                now = group.log_p(runner, _adding(sites, learner.learnt)).cpu()
        there = taken.isnan() & (now > wanted)
        between = update - 1 + (wanted - before) / (now - before) if update else torch.zeros_like(now)
        taken = torch.where(there, between, taken)
        before = now
        if not bool(taken.isnan().any()):
            break
    return taken.nan_to_num(nan=steps + 1.0)


def _layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    chosen = tuple(range(n_layers(model)) if layers is None else sorted(set(layers)))
    if not chosen:
        raise ValueError("layers is empty, needed one at least")
    for layer in chosen:
        down_proj(model, layer)
    return chosen
