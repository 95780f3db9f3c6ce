"""UDS, the unlearning depth score: do a changed model's states lack an object as those of a model that never had it?

Three models: the *full* one (unedited), the *changed* one, and a *retain* model, trained without the facts. After one
block at a time the residual stream of another model is put into the full one, at the positions that predict the tokens
y_1 … y_T of the old object, and the full model's own blocks go on from there. What that costs it, in nats::

    Δ_l = (1/T) Σ_t [ log p_full(y_t) − log p_full, patched after block l(y_t) ]        teacher-forced

    stage 1   Δ¹_l, states of the retain model      a layer counts for a fact if Δ¹_l > τ: there the full model holds it
    stage 2   Δ²_l, states of the changed model

    UDS of a fact = Σ_l Δ¹_l · clip(Δ²_l / Δ¹_l, 0, 1) / Σ_l Δ¹_l        over the layers that count

0: the changed model's states say the old object as the full model's do; 1: they lack it as much as the retain model's.
Facts of which no layer counts have no score and are left out, with the reason. Lee, Kim and Jo 2026 (arXiv:2605.24614).

A score of 1 doesn't say *why* the states lack it. The published positions are the last ones, where the answer has
already been looked up: a change that lies over a fact earlier in the prompt has overwritten what is read there, and is
given the score of one that erased it. ``positions="prompt"`` puts in the whole stream: then a change on layer k can't
be seen in the layers below k. Read the score layer by layer (`UnlearningDepth.table`), and beside a knock-out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import resid_post
from tl_factedit.backend.protocol import Model, kind, model_name, n_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import carries_hooks, frozen, plain_torch
from tl_factedit.core.estimate import Estimate, jointly, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import Aligned, align_all, pad
from tl_factedit.core.words import counted
from tl_factedit.measure.change import Change
from tl_factedit.measure.population import BATCH_TOKENS, Part, Population, check_facts_once

if TYPE_CHECKING:
    import pandas as pd

TAU = 0.05
"""The Δ¹ that a layer has to exceed to count, in nats a token; the published value."""

Positions: TypeAlias = Literal["object", "prompt"]
"""Where states are put in: at the positions that predict the old object's tokens (published), or everywhere."""


@dataclass(frozen=True, eq=False)
class UnlearningDepth:
    """What the states of a changed model lack of some facts, against those of a model that never had them.

    Attributes:
        facts: What was asked.
        layers: The blocks after which states were put in: all of the model.
        full: log p of the old object in the full model, mean over its tokens, nats, [fact].
        retain_drop: Δ¹, what the retain model's states cost, nats a token, [fact layer].
        changed_drop: Δ², what the changed model's states cost, nats a token, [fact layer].
        tau: What Δ¹ has to exceed for a layer to count, nats a token.
        positions: Where states were put in.
        retain: The retain model, in words.
        seed: Seed of the bootstraps.
    """

    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    full: Float[Tensor, "fact"]
    retain_drop: Float[Tensor, "fact layer"]
    changed_drop: Float[Tensor, "fact layer"]
    tau: float
    positions: Positions
    retain: str
    seed: int = 0

    @property
    @plain_torch()
    def counts(self) -> Bool[Tensor, "fact layer"]:
        """Which layers count for which fact: where the full model holds what the retain model lacks, Δ¹ > τ."""
        return self.retain_drop > self.tau

    @property
    @plain_torch()
    def of_each(self) -> Float[Tensor, "fact"]:
        """The score of each fact, 0 to 1; NaN where no layer counts."""
        weight = torch.where(self.counts, self.retain_drop, 0.0)
        return self._erased().sum(1) / weight.sum(1)  # 0 / 0 is NaN

    @property
    @plain_torch()
    def score(self) -> Estimate:
        """The mean over the facts that have a score, with its interval over facts."""
        return over_facts(self.of_each.tolist(), seed=self.seed)

    @property
    @plain_torch()
    def dropped(self) -> tuple[tuple[Fact, str], ...]:
        """The facts that have no score, each with the reason."""
        found = []
        for i in (~self.counts.any(1)).nonzero()[:, 0].tolist():
            layer = int(self.retain_drop[i].argmax())
            why = (
                f"no layer counts: states of the retain model cost {float(self.retain_drop[i, layer]):.3f} nats a "
                f"token at most (after block {self.layers[layer]}), needed more than τ = {self.tau:g}; log p in the "
                f"full model is {float(self.full[i]):.2f}"
            )
            found.append((self.facts[i], why))
        return tuple(found)

    @plain_torch()
    def at(self, layer: int) -> Estimate:
        """The erasure ratio of one layer: Σ Δ¹ · clip(Δ²/Δ¹, 0, 1) / Σ Δ¹ over the facts for which it counts.

        Raises:
            ValueError: There is no such layer.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer!r} is outside the model, needed 0 to {self.layers[-1]}")
        i = self.layers.index(layer)
        counts = self.counts[:, i]
        if not bool(counts.any()):
            return Estimate(math.nan, math.nan, math.nan, 0)
        columns = [self._erased()[counts, i].tolist(), self.retain_drop[counts, i].tolist()]
        return jointly(columns, lambda means: means[0] / means[1], seed=self.seed)

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a layer: for how many facts it counts, the mean drops over these (nats a token), the ratio."""
        import pandas as pd

        rows = []
        for i, layer in enumerate(self.layers):
            counts, erased = self.counts[:, i], self.at(layer)
            rows.append(
                {
                    "layer": layer,
                    "counts_for": int(counts.sum()),
                    "retain_drop": float(self.retain_drop[counts, i].mean()),
                    "changed_drop": float(self.changed_drop[counts, i].mean()),
                    "erased": erased.mean,
                    "low": erased.low,
                    "high": erased.high,
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """The score, and how many facts have none."""
        left = f", {len(self.dropped)} without a layer that counts" if self.dropped else ""
        return (
            f"UnlearningDepth({self.score:.2f} of {counted(len(self.facts), 'fact')}{left}; 0: as in the full model, "
            f"1: as in {self.retain}; states put in at the {self.positions})"
        )

    def _repr_html_(self) -> str:
        """The line, the table, and what was dropped."""
        import html

        dropped = "".join(f"<li>{html.escape(f'{fact.name}: {why}')}</li>" for fact, why in self.dropped)
        return (
            f"<p>{html.escape(repr(self))}</p>"
            + self.table().to_html(float_format="{:.3f}".format, index=False)
            + (f"<p>Dropped:</p><ul>{dropped}</ul>" if dropped else "")
        )

    def _erased(self) -> Float[Tensor, "fact layer"]:
        """Δ¹ · clip(Δ²/Δ¹, 0, 1), which is Δ² between 0 and Δ¹; 0 where a layer doesn't count."""
        return torch.where(self.counts, torch.minimum(self.changed_drop.clamp(min=0), self.retain_drop), 0.0)


@plain_torch()
def unlearning_depth(
    population: Population,
    retain: Model | None = None,
    *,
    tau: float = TAU,
    positions: Positions = "object",
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
) -> UnlearningDepth:
    """The unlearning depth score of a change.

    All layers' states of the facts are held at once, on the CPU: float32, facts x layers x positions x d_model; with
    ``positions="object"`` the positions are as many as the old object has tokens.

    Args:
        population: The full model, the change (or the changed model) and the facts, each with ``target_true``.
        retain: A model of the full model's shape and tokenizer that was trained without the facts. Of the organism's
            people of ``"oracle0"`` that is the variant ``"never"``. A model that was taught *another* object from the
            start (``"oracle0"``) isn't quite one: its states also say that other object.
        tau: What Δ¹ has to exceed for a layer to count for a fact, nats a token.
        positions: ``"object"``: the positions that predict the old object's tokens, from the prompt's last token to the
            last but one of the object, as published; ``"prompt"``: all of them, so that the full model's blocks after l
            go on from all that the other model made of the text.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstraps over facts.

    Raises:
        ValueError: No retain model, or the unedited model as one; one of another shape or vocabulary; a fact without
            ``target_true``, one that is too long, or one given twice; an unknown kind of positions; a negative τ; a
            folder, and a retain model with hooks of its own.

    Example:
        >>> model = fe.models.organism()
        >>> facts = fe.models.organism_facts("city", "oracle0", 8)
        >>> without = fe.models.organism(variant="untrained")           # of a real model: one trained without the facts
        >>> population = fe.Population.of(model, model, facts, progress=False)
        >>> found = fe.probes.unlearning_depth(population, without)     # nothing was changed:
        >>> round(abs(found.score.mean), 3), found.score.n
        (0.0, 8)
    """
    _check(population, retain, tau, positions)
    assert retain is not None
    model, facts, bos = population.model, population.facts, population.prepend_bos
    room = getattr(model.cfg, "n_ctx", None)
    rows = [_Row.of(each) for each in align_all(model.tokenizer, facts, prepend_bos=bos, room=room)]

    def drops(source: Model | Part, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        mine = [rows[i] for i in indices]
        if isinstance(source, Part):
            with source.applied() as tested, frozen(tested), torch.no_grad():
                states = _states(Runner(tested), mine, positions, batch_tokens)
        else:
            with frozen(source), torch.no_grad():
                states = _states(Runner(source), mine, positions, batch_tokens)
        with frozen(model), torch.no_grad():
            return _log_probs(Runner(model), mine, states, positions, batch_tokens)

    settings: dict[str, Any] = {"positions": positions, "batch_tokens": batch_tokens}
    everything = range(len(facts))
    # Where nothing is kept nobody needs to know which retain model it was.
    of_retain = {**settings, "retain": None if population.cache is None else Provenance.of(retain).origin()}
    full, of = population.keep("unlearning depth, retain", None, lambda: drops(retain, everything), settings=of_retain)
    changed = torch.full_like(of, math.nan)
    silent = not population.progress or len(population.parts) == 1
    for part in tqdm(population.parts, desc="unlearning depth", unit="change", delay=1, disable=silent, leave=False):

        def compute(part: Part = part) -> Tensor:
            return drops(part, part.indices)[1]

        changed[list(part.indices)] = population.keep("unlearning depth", part, compute, settings=settings)
    return UnlearningDepth(
        facts=facts,
        layers=tuple(range(n_layers(model))),
        full=full,
        retain_drop=full[:, None] - of,
        changed_drop=full[:, None] - changed,
        tau=float(tau),
        positions=positions,
        retain=model_name(retain),
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """A prompt with its old object, as it is run.

    Attributes:
        ids: Prompt and object, without the object's last token, which predicts nothing.
        target: The object's tokens.
    """

    ids: Tensor
    target: Tensor

    @classmethod
    def of(cls, aligned: Aligned) -> _Row:
        return cls(torch.cat([aligned.ids, aligned.true_ids[:-1]]), aligned.true_ids)

    def span(self, positions: Positions) -> slice:
        """Where states are put in."""
        return slice(len(self.ids) - len(self.target) if positions == "object" else 0, len(self.ids))


def _states(
    runner: Runner, rows: Sequence[_Row], positions: Positions, batch_tokens: int
) -> list[Float[Tensor, "layer _ d_model"]]:
    """The residual stream after every block at each row's own positions, float32, on the CPU."""
    places = [resid_post(layer) for layer in range(runner.n_layers)]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for attempt in that_fit([len(row.ids) for row in rows], batch_tokens):
        with attempt as batch:
            kept = runner.capture(pad([rows[i].ids for i in batch], fill=0), places)
            for j, i in enumerate(batch):
                found[i] = torch.stack([kept[place][j, rows[i].span(positions)].float().cpu() for place in places])
    return found


def _log_probs(
    runner: Runner, rows: Sequence[_Row], states: Sequence[Tensor], positions: Positions, batch_tokens: int
) -> tuple[Float[Tensor, "fact"], Float[Tensor, "fact layer"]]:
    """Mean log p of the objects' tokens: as the model is, and with states put in after each block.

    Only the blocks behind the place are run.
    """
    places = [resid_post(layer) for layer in range(runner.n_layers)]
    full = torch.full((len(rows),), math.nan)
    patched = torch.full((len(rows), len(places)), math.nan)
    for attempt in that_fit([len(row.ids) for row in rows], batch_tokens):
        with attempt as batch:
            tokens = pad([rows[i].ids for i in batch], fill=0)
            most = max(len(rows[i].target) for i in batch)
            ends = torch.tensor([len(rows[i].ids) for i in batch])
            at = (ends[:, None] - most + torch.arange(most)).clamp(min=0)

            def said(logits: Tensor, batch: Sequence[int] = batch) -> Tensor:
                log_p = logits.float().log_softmax(-1).cpu()
                targets = [rows[i].target for i in batch]
                each = [row[-len(t) :].gather(-1, t[:, None]).mean() for row, t in zip(log_p, targets, strict=True)]
                return torch.stack(each)

            streams = runner.capture(tokens, places)
            full[list(batch)] = said(runner.logits(tokens, at=at))
            for layer, place in enumerate(places):
                stream = streams[place].clone()
                for j, i in enumerate(batch):
                    stream[j, rows[i].span(positions)] = states[i][layer].to(stream)
                patched[list(batch), layer] = said(runner.logits(tokens, at=at, start=(layer + 1, stream)))
    return full, patched


def _check(population: Population, retain: Model | None, tau: float, positions: str) -> None:
    if retain is None:
        raise ValueError(
            "no retain model is given, and the score has no meaning without one: it says how far the changed model has "
            "gone on the way from the unedited model to a model that never had the facts. Needed retain=, a model of "
            "the same shape that was trained on the same text without these facts; where there is none, use fe.audit"
        )
    if isinstance(retain, Change):
        raise ValueError(f"retain is a {type(retain).__name__}, needed a model that was trained without the facts")
    kind(retain)
    if retain is population.model:
        raise ValueError(
            "retain is the unedited model itself, which has the facts: needed a model that was trained without them"
        )
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}, needed one of {get_args(Positions)}")
    if not tau >= 0:
        raise ValueError(f"tau is {tau!r}, needed 0 or more nats: a layer where nothing is lacking can't show a loss")
    if population.cache is not None and carries_hooks(retain):
        raise ValueError(
            f"the retain model {model_name(retain)} carries hooks of its own, which no fingerprint of its weights "
            "tells: nothing can be kept of it, needed a population without a folder (or reset_hooks)"
        )
    check_facts_once(population.facts)
    others = [("retain", retain)]
    others += [("changed", part.changed) for part in population.parts if not isinstance(part.changed, Change)]
    for what, other in others:
        mine, theirs = _shape(population.model), _shape(other)
        if mine != theirs:
            raise ValueError(
                f"the {what} model {model_name(other)} has (blocks, width, tokens) {theirs} and the unedited model "
                f"{model_name(population.model)} {mine}: needed two of one shape, as states of one are put into the "
                "other"
            )


def _shape(model: Model) -> tuple[int, int, int]:
    return n_layers(model), int(model.cfg.d_model), int(model.cfg.d_vocab)
