"""Causal tracing of single heads and neurons, at one chosen token of each fact.

As `causal_trace`, with only one head's output z (before W_O) or one neuron (an entry of W_out's input) restored.
Single units are sufficient for little; what a sum of them does is not the sum of what they do.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import unit_hook
from tl_factedit.backend.memory import budget, check_memory
from tl_factedit.backend.protocol import Model, Unit, as_layers, check_layer, n_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import n_units
from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.core.facts import Fact, as_facts, check_distinct
from tl_factedit.core.tokens import Aligned
from tl_factedit.core.words import counted
from tl_factedit.locate.cells import Cell, Direction, Patch, Write
from tl_factedit.locate.corruption import Corruption, corruption_of
from tl_factedit.locate.inputs import align_all, ask, check_contrasts
from tl_factedit.locate.metrics import Metric, metric_of

if TYPE_CHECKING:
    import pandas as pd

Token: TypeAlias = Literal["last subject", "first subject", "last"] | int


@dataclass(frozen=True, eq=False)
class UnitTrace:
    """The result of `trace_units`.

    Attributes:
        effect: IE of each unit, mean over samples, [fact layer unit]; NaN for facts that couldn't be corrupted.
        sample_effect: The same for each sample, [fact layer unit sample].
        clean: The metric of the clean run, [fact].
        corrupted: The metric of the corrupted runs, mean over samples, [fact].
        facts: What was traced.
        unit: ``"head"`` or ``"neuron"``.
        layers: The layers of the second axis, ascending.
        units: The heads or neurons of the third axis.
        at: Which token.
        positions: Where that is in each fact.
        direction: As in `causal_trace`.
        metric: Its name.
        corruption: With its scale as it was used.
        provenance: Model, weights, BOS policy, versions.
    """

    effect: Float[Tensor, "fact layer unit"]
    sample_effect: Float[Tensor, "fact layer unit sample"]
    clean: Float[Tensor, "fact"]
    corrupted: Float[Tensor, "fact"]
    facts: tuple[Fact, ...]
    unit: Unit
    layers: tuple[int, ...]
    units: tuple[int, ...]
    at: Token
    positions: tuple[int, ...]
    direction: Direction
    metric: str
    corruption: Corruption
    provenance: Provenance

    @property
    def total_effect(self) -> Float[Tensor, "fact"]:
        """TE = clean minus corrupted."""
        return self.clean - self.corrupted

    @plain_torch()
    def average(self, *, seed: int = 0) -> Estimates:
        """Means over facts with bootstrap intervals, [layer unit] each."""
        return over_facts_each(self.effect, seed=seed)

    @plain_torch()
    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row a unit, the largest mean effect first, with its interval over facts."""
        import pandas as pd

        found = self.average(seed=seed)
        rows = [
            {
                "layer": layer,
                self.unit: unit,
                "effect": float(found.mean[i, j]),
                "low": float(found.low[i, j]),
                "high": float(found.high[i, j]),
                "n": int(found.n[i, j]),
            }
            for i, layer in enumerate(self.layers)
            for j, unit in enumerate(self.units)
        ]
        return pd.DataFrame(rows).sort_values("effect", ascending=False, kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        """Size and the largest effect in a line."""
        mean = self.effect.nanmean(0)
        i, j = divmod(int(mean.argmax()), len(self.units))
        facts = counted(len(self.facts), "fact")
        return (
            f"UnitTrace({facts}, {len(self.layers)} layers × {len(self.units)} {self.unit}s at the "
            f"{self.at} token: largest mean effect {float(mean.max()):.3f}, {self.unit} {self.units[j]} of layer "
            f"{self.layers[i]}; total effect {float(self.total_effect.nanmean()):.3f})"
        )


@plain_torch()
def trace_units(
    model: Model,
    facts: Fact | Sequence[Fact],
    unit: Unit = "head",
    *,
    at: Token = "last subject",
    layers: int | Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    corruption: Corruption | None = None,
    metric: str | Metric = "prob",
    direction: Direction = "denoise",
    prepend_bos: bool | None = None,
    memory: float | None = 2.0,
    progress: bool = True,
) -> UnitTrace:
    """Trace single heads or neurons at one token.

    Args:
        model: Either class.
        facts: One fact or several.
        unit: ``"head"`` or ``"neuron"``.
        at: ``"last subject"``, ``"first subject"``, ``"last"`` (the prompt's), or a position.
        layers: Which layer or layers, in whatever order; None for all.
        units: Which heads or neurons; None for all, which takes long for neurons: choose layers then.
        corruption: As in `causal_trace`.
        metric: As in `causal_trace`.
        direction: As in `causal_trace`.
        prepend_bos: As in `causal_trace`.
        memory: As in `causal_trace`.
        progress: As in `causal_trace`.

    Raises:
        ValueError: No such layer, unit or position; as `causal_trace`.

    Example:
        >>> heads = fe.locate.trace_units(model, facts, "head", at="last")   # doctest: +SKIP
        >>> heads.table().head()                                      # doctest: +SKIP
    """
    facts = as_facts(facts)
    check_distinct(facts)
    unit_hook(unit, 0)
    # Ascending, as the sweep goes up through them.
    chosen_layers = tuple(range(n_layers(model))) if layers is None else as_layers(layers)
    for layer in chosen_layers:
        check_layer(model, layer)
    count = n_units(model, unit)
    chosen = tuple(range(count)) if units is None else tuple(map(operator.index, units))
    if not chosen_layers or not chosen or not all(0 <= each < count for each in chosen):
        raise ValueError(f"units is {list(chosen)} of layers {list(chosen_layers)}, needed some of 0 … {count - 1}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"units is {list(chosen)}, needed each of them once")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is {direction!r}, needed 'denoise' or 'noise'")
    check_memory(memory)
    metric_name, measure = metric_of(metric)
    provenance = Provenance.of(model, prepend_bos, prompts=(fact.text for fact in facts))
    rows = align_all(model, facts, prepend_bos=provenance.prepend_bos)
    positions = tuple(_position(row, at) for row in rows)
    corruption = corruption_of(corruption)
    check_contrasts(facts, rows, measure, corruption)
    sign = -1 if direction == "noise" else 1
    with frozen(model), torch.no_grad():
        questions = ask(model, facts, rows, corruption)
        samples = max(question.samples for question in questions.each)
        effect = torch.full((len(rows), len(chosen_layers), len(chosen), samples), torch.nan)
        clean, corrupted = torch.full((2, len(rows)), torch.nan)
        places = [unit_hook(unit, layer) for layer in chosen_layers]
        patches = [Patch(layer, None, (Write(unit_hook(unit, layer)),)) for layer in chosen_layers]
        with tqdm(
            total=len(rows) * len(chosen) * len(patches),
            unit="cell",
            desc=f"tracing {unit}s",
            delay=1,
            disable=not progress,
        ) as bar:
            room = budget(model, memory)
            for attempt in questions.chunks(places, (), memory=room):
                with attempt as chunk:
                    mine = room * attempt.share
                    patching = questions.patching(chunk, places, (), measure, direction, memory=mine)
                    # A token before the subject, or one that no attention carries on, has no effect.
                    reached = [(j, positions[i]) for j, i in enumerate(chunk) if positions[i] >= rows[i].subject[0]]
                    cells = [Cell(j, position, each) for j, position in reached for each in chosen]
                    place_of = {each: k for k, each in enumerate(chosen)}
                    sheets = patching.sheets(cells)
                    for j, i in enumerate(chunk):
                        effect[i, :, :, : questions.each[i].samples] = 0.0
                        clean[i], corrupted[i] = patching.clean[j].mean(), patching.corrupted[j].mean()
                    for sheet in sheets:
                        for k, cell, scores in patching.run(sheet, patches):
                            change = sign * (scores - patching.base[cell.question])
                            effect[chunk[cell.question], k, place_of[cell.unit or 0], : len(change)] = change
                            bar.update()
                    bar.update((len(chunk) - len(reached)) * len(chosen) * len(patches))
    return UnitTrace(
        effect=effect.nanmean(-1),
        sample_effect=effect,
        clean=clean,
        corrupted=corrupted,
        facts=facts,
        unit=unit,
        layers=chosen_layers,
        units=chosen,
        at=at,
        positions=positions,
        direction=direction,
        metric=metric_name,
        corruption=questions.corruption,
        provenance=provenance,
    )


def _position(row: Aligned, at: Token) -> int:
    named = {"last subject": row.last, "first subject": row.subject[0], "last": len(row.ids) - 1}
    position = named.get(at, at) if isinstance(at, str) else operator.index(at)
    if isinstance(position, str) or not 0 <= position < len(row.ids):
        raise ValueError(
            f"at is {at!r}, needed one of {sorted(named)} or a position in the {len(row.ids)} tokens of {row.text!r}"
        )
    return position
