"""Mediation: through which later reads would the old object come, and through which does the new one?

In the changed model the state of one place is replaced by the unedited model's, one layer at a time, and everything
above is run again::

    share(place) = (m_changed − m_patched) / (m_changed − m_unedited),      m = log p(new) − log p(old)

1: this place alone undoes the change, 0: it has no part in it. By default the residual stream at the last subject token
(how far up the subject's state still decides), and the outputs of attention and MLP at the last token (what reads the
subject, what is made of it). Xie et al. 2025 (arXiv:2505.12636) find late attention at the last token to bring old
objects back.

Descriptive: that an unedited model's state brings its own answer is no finding. The residual stream of all tokens at
once gives share 1 at every layer from the last changed one on, whatever the change: an identity. Shares of
layers and places don't add up. Against a separately trained model, whose states mean something else, they mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Component, Hook, HookFn, Model, model_name, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.estimate import Estimate, Estimates, jointly, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import pad
from tl_factedit.core.words import counted
from tl_factedit.measure.first_tokens import FirstTokens, one_of, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Part, Population
from tl_factedit.measure.reading import Reading

if TYPE_CHECKING:
    import pandas as pd

Where: TypeAlias = Literal["subject", "last", "all"]
"""The last subject token, the last token, or all tokens."""
Site: TypeAlias = tuple[Component, Where]
SITES: tuple[Site, ...] = (("resid", "subject"), ("attn", "last"), ("mlp", "last"))
QUANTITIES = ("old_first", "new_first", "control_first", "margin")
LEAST_SHIFT = 0.05
"""A change of m by less than this (nats, in the mean) has no shares."""


@dataclass(frozen=True, eq=False)
class Mediation:
    """What comes back when one place gets its old state.

    Objects count by their first tokens; facts whose objects share one, and facts that the unedited model doesn't know,
    are left out.

    Attributes:
        facts: What was asked.
        places: (component, where) that were patched.
        known: Whether a fact counts, [fact].
        unedited: m of the unedited model, nats, [fact].
        changed: m of the changed model, [fact].
        patched: Axes fact, place, layer, quantity: whether the old object is first (the new; the mean of the
            controls), and m.
        share: The share of the change of m that the place undoes, over facts (a ratio of means), [place layer]; NaN if
            m was hardly changed.
        old_first: How often the old object is first, [place layer].
    """

    facts: tuple[Fact, ...]
    places: tuple[Site, ...]
    known: Bool[Tensor, "fact"]
    unedited: Float[Tensor, "fact"]
    changed: Float[Tensor, "fact"]
    patched: Reading
    share: Estimates
    old_first: Estimates

    @plain_torch()
    def at(self, place: Site, layer: int) -> Estimate:
        """The share of one place in one layer."""
        return one_of(self.share, self.places.index(place), layer)

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a place and layer."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "component": component,
                    "where": where,
                    "layer": layer,
                    "share": float(self.share.mean[i, layer]),
                    "low": float(self.share.low[i, layer]),
                    "high": float(self.share.high[i, layer]),
                    "old_first": float(self.old_first.mean[i, layer]),
                }
                for i, (component, where) in enumerate(self.places)
                for layer in range(self.share.mean.shape[1])
            ]
        )

    def __repr__(self) -> str:
        """The strongest layer of each place."""
        shown = []
        for i, (component, where) in enumerate(self.places):
            layer = int(self.share.mean[i].nan_to_num(-math.inf).argmax())
            shown.append(f"{component} at {where} {float(self.share.mean[i, layer]):.2f} in layer {layer}")
        return (
            f"Mediation(largest shares: {'; '.join(shown)}; {int(self.known.sum())} of "
            f"{counted(len(self.facts), 'fact')} known)"
        )


@plain_torch()
def mediate(
    population: Population, *, places: Sequence[Site] = SITES, batch_tokens: int = BATCH_TOKENS, seed: int = 0
) -> Mediation:
    """Patch single places of the changed model with the unedited model's states, layer by layer.

    Args:
        population: What to ask, each fact with ``target_new``; without controls, ``control_first`` is NaN. Another
            model has to have the same layers.
        places: What to patch: a component's output (``"resid"``: the stream after the block), and where.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: No places; a fact without ``target_new``; another model with other layers.
    """
    facts, places, model = with_new_objects(population.facts), tuple(places), population.model
    if not places:
        raise ValueError("places is empty, needed one at least")
    for component, where in places:
        component_hook(component, 0)
        if where not in ("subject", "last", "all"):
            raise ValueError(f"place {where!r} is unknown, needed 'subject', 'last' or 'all'")
    for part in population.parts:
        other = part.changed
        if isinstance(other, Model) and _shape(other) != _shape(model):
            raise ValueError(
                f"{model_name(other)} has {_shape(other)} layers and dimensions, {model_name(model)} {_shape(model)}: "
                "states can only be put into a model of the same form"
            )
    asked, known = population.first_tokens, population.known
    layers = n_layers(model)
    patched = torch.full((len(facts), len(places), layers, len(QUANTITIES)), math.nan)
    unedited, now = (torch.full((len(facts),), math.nan) for _ in range(2))
    for part in population.parts:

        def both(part: Part = part) -> tuple[Tensor, Tensor, Tensor]:
            found = [torch.full_like(values[list(part.indices)], math.nan) for values in (unedited, now, patched)]
            # The dearest pass has a row for each place.
            for attempt in that_fit([len(places) * len(asked[i].ids) for i in part.indices], batch_tokens):
                with attempt as some:
                    rows = [asked[part.indices[i]] for i in some]
                    with frozen(model), torch.no_grad():
                        donor, found[0][some] = _run(Runner(model), rows, places)
                    with part.applied() as tested, frozen(tested), torch.no_grad():
                        runner = Runner(tested)
                        own, found[1][some] = _run(runner, rows, places)
                        found[2][some] = _patched(runner, rows, places, donor, own)
            return found[0], found[1], found[2]

        mine = list(part.indices)
        unedited[mine], now[mine], patched[mine] = population.keep(
            "mediation", part, both, settings=(places, batch_tokens)
        )
    counted = torch.where(known[:, None, None, None], patched, math.nan)
    return Mediation(
        facts=facts,
        places=places,
        known=known,
        unedited=unedited,
        changed=now,
        patched=Reading(
            name="mediation",
            values=patched,
            axes={"fact": range(len(facts)), "place": places, "layer": range(layers), "quantity": QUANTITIES},
            unit="1 where first among the objects (of controls the mean), nats (margin)",
        ),
        share=share_undone(unedited, now, counted[..., 3], seed=seed),
        old_first=over_facts_each(counted[..., 0], seed=seed),
    )


def share_undone(
    unedited: Float[Tensor, "fact"], changed: Float[Tensor, "fact"], patched: Float[Tensor, "fact *cell"], *, seed: int
) -> Estimates:
    """For each cell (changed − patched) / (changed − unedited): a ratio of means, over facts that have all three.

    NaN where the change has hardly moved m (`LEAST_SHIFT`): there is nothing to have a share of.
    """
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    found = []
    for cell in patched.reshape(len(patched), -1).unbind(-1):
        undone, whole = changed - cell, changed - unedited
        here = ~(undone.isnan() | whole.isnan())
        if not bool(here.any()) or abs(float(whole[here].mean())) < LEAST_SHIFT:
            found.append(nothing)
            continue
        columns = [torch.where(here, values, math.nan).tolist() for values in (undone, whole)]
        found.append(jointly(columns, lambda means: means[0] / means[1], seed=seed))
    shape = patched.shape[1:]
    columns = zip(*((e.mean, e.low, e.high, e.n) for e in found), strict=True)
    return Estimates(*(torch.tensor(column).reshape(shape) for column in columns))


def _shape(model: Model) -> tuple[int, int]:
    return n_layers(model), int(model.cfg.d_model)


def _names(layers: int, places: Sequence[Site]) -> list[str]:
    found = (component_hook(component, layer) for component, _ in places for layer in range(layers))
    return list(dict.fromkeys(found))


def _run(
    runner: Runner, rows: Sequence[FirstTokens], places: Sequence[Site]
) -> tuple[dict[str, Tensor], Float[Tensor, "fact"]]:
    """States of a plain run, at the places and before each block; and m."""
    tokens, ends = pad([row.ids for row in rows], 0), torch.tensor([row.end for row in rows])
    streams = [*(resid_pre(layer) for layer in range(runner.n_layers)), resid_post(runner.n_layers - 1)]
    found = runner.capture(tokens, [*dict.fromkeys([*streams, *_names(runner.n_layers, places)])])
    last = found[streams[-1]][torch.arange(len(rows)), ends]
    logits = runner.logits(tokens[:, :1], start=(runner.n_layers, last[:, None]))[:, 0].float().cpu()
    return found, torch.stack([row.margin(own) for row, own in zip(rows, logits, strict=True)])


def _patched(
    runner: Runner,
    rows: Sequence[FirstTokens],
    places: Sequence[Site],
    donor: dict[str, Tensor],
    own: dict[str, Tensor],
) -> Float[Tensor, "fact place layer quantity"]:
    tokens, ends = pad([row.ids for row in rows], 0), torch.tensor([row.end for row in rows])
    out = torch.full((len(rows), len(places), runner.n_layers, len(QUANTITIES)), math.nan)
    for layer in range(runner.n_layers):
        hooks: list[Hook] = []
        for p, (component, where) in enumerate(places):
            name = component_hook(component, layer)
            first = p * len(rows)  # all facts under the first place, then all under the next …
            hooks.append((name, _put(first, donor[name], _positions(rows, where))))
        logits = runner.logits(
            tokens.repeat(len(places), 1),
            at=ends.repeat(len(places))[:, None],
            start=(layer, own[resid_pre(layer)].repeat(len(places), 1, 1)),
            hooks=hooks,
        )[:, 0]
        for p, found in enumerate(logits.float().cpu().split(len(rows))):
            for i, (row, of_fact) in enumerate(zip(rows, found, strict=True)):
                out[i, p, layer] = torch.cat([row.first(of_fact), row.margin(of_fact)[None]])
    return out


def _positions(rows: Sequence[FirstTokens], where: Where) -> list[slice]:
    if where == "all":
        return [slice(None)] * len(rows)
    at = [row.last if where == "subject" else row.end for row in rows]
    return [slice(i, i + 1) for i in at]


def _put(first: int, states: Float[Tensor, "row pos d_model"], where: Sequence[slice]) -> HookFn:
    """The given states at some positions of as many rows, from one row on."""

    def hook_fn(value: Tensor, hook: object = None) -> Tensor:
        value = value.clone()
        for i, positions in enumerate(where):
            value[first + i, positions] = states[i, positions].to(value)
        return value

    return hook_fn
