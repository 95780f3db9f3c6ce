"""The footprint of a change: where it writes.

Every component of the changed model is given what the unedited model's own component is given, and answers::

    write(c, p)  =  ‖ c₁(x_p) − c₀(x_p) ‖ / ‖ c₀(x_p) ‖        x: what the component reads in the unedited model

for the attention and the MLP of every block at every token, and for the embeddings, the final norm and the unembedding
on the states they see. So what one layer does to the next doesn't count twice: an edit of one matrix has one row, with
the edit's gain times its update in it; a fine-tuned or retrained model may have all of them.

The *share* of a cell is its part of the whole squared change of the stream, Σ ‖c₁(x) − c₀(x)‖², over all tokens of a
prompt; and the *cover* of a set of cells is the sum of their shares: how much of what was written goes if they are
silenced. The final norm and the unembedding can't be silenced; a head that answers a share r otherwise counts as if
the stream before it had been changed by that share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.cells import COMPONENTS, PLACES, Cell, Cells, Place, in_order, positions
from tl_factedit.backend.fingerprint import hashed_once
from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Hook, HookFn, Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import Aligned, align, pad
from tl_factedit.core.words import counted
from tl_factedit.locate.trace_result import ROLES, roles
from tl_factedit.measure.change import Changed
from tl_factedit.measure.population import BATCH_TOKENS, Part, Population

if TYPE_CHECKING:
    import pandas as pd

WRITES = 1e-4
"""A component that answers otherwise by less than this share everywhere wasn't written."""

WHOLE = 0.99
"""Cells that cover this share of what was written take out all of it."""

NORM = "the final norm, as it was run"


@dataclass(frozen=True, eq=False)
class Footprint:
    """Where a change writes.

    Attributes:
        facts: Whose prompts were run.
        components: The rows: (``"embed"``, ``"attn"``, ``"mlp"``, ``"rest"``, ``"norm"`` or ``"unembed"``; its layer,
            or None outside the blocks). ``"rest"`` is what a block changes besides: a norm behind attention or MLP.
        pieces: Each prompt's tokens.
        subject: (start, stop) of the subject in them.
        write: ‖c₁(x) − c₀(x)‖ / ‖c₀(x)‖, [fact component pos]; NaN where a shorter prompt has no token, and where the
            head wasn't looked at (it is at the last token alone).
        squared: ‖c₁(x) − c₀(x)‖², in units of the residual stream, the same shape.
    """

    facts: tuple[Fact, ...]
    components: tuple[tuple[str, int | None], ...]
    pieces: tuple[tuple[str, ...], ...]
    subject: tuple[tuple[int, int], ...]
    write: Float[Tensor, "fact component pos"]
    squared: Float[Tensor, "fact component pos"]

    @cached_property
    def is_written(self) -> Bool[Tensor, "component"]:
        """Which components were written, by more than `WRITES` at some token of some fact."""
        return self.write.nan_to_num(0.0).amax((0, 2)) >= WRITES

    @property
    def written(self) -> tuple[tuple[str, int | None], ...]:
        """The components that were written, with their layers."""
        return tuple(name for name, yes in zip(self.components, self.is_written.tolist(), strict=True) if yes)

    @plain_torch()
    def cover(self, cells: Sequence[Cell]) -> Float[Tensor, "fact"]:
        """The share of what was written that goes if some cells are silenced; NaN where nothing was written."""
        total = self._counted.sum((1, 2))
        gone = sum(
            (torch.where(self.silenced(row, cells), self._counted[:, row], 0.0).sum(1) for row in self._rows(cells)),
            torch.zeros_like(total),
        )
        return gone / total

    @plain_torch()
    def takes_out(self, cells: Sequence[Cell]) -> Bool[Tensor, "fact"]:
        """Whether silencing some cells takes out all that was written: nothing from the subject on is left.

        A share alone won't do: beside a large write that nothing reads, an override's is small. Before the subject,
        where nothing is silenced, what is left may be a hundredth of the whole.
        """
        left = torch.where(self.is_written[None, :, None], self.write.nan_to_num(0.0), 0.0)
        left = torch.where(self._at["all"][:, None], left, 0.0)
        for row in self._rows(cells):
            left[:, row] = torch.where(self.silenced(row, cells), 0.0, left[:, row])
        return (left.amax((1, 2)) < WRITES) & (self.cover(cells) >= WHOLE)

    @plain_torch()
    def shares(self, place: Place) -> dict[Cell, float]:
        """The cells of a place that were written, with the mean share of what was written there, the largest first."""
        written = [(name, layer) for name, layer in self.written if name in COMPONENTS]
        cells = [Cell(name, layer, place) for name, layer in written]  # type: ignore[arg-type]
        found = {cell: float(self.cover([cell]).nanmean()) for cell in cells}
        return dict(sorted(((cell, share) for cell, share in found.items() if share > 0), key=lambda each: -each[1]))

    @plain_torch()
    def nested(self, place: Place) -> tuple[Cells, ...]:
        """The 1, 2, 4, 8 … cells of a place that cover most, until they cover all, or are all there are."""
        order = list(self.shares(place))
        sets, size = list[Cells](), 1
        while order:
            some = in_order(order[:size])
            sets.append(some)
            if size >= len(order) or float(self.cover(some).nanmean()) >= WHOLE:
                break
            size *= 2
        return tuple(sets)

    @plain_torch()
    def whole(self) -> Cells | None:
        """The fewest cells that take out all that was written, at the subject if they can; None if none do.

        Silencing them everywhere from the subject on is the most that can be done.
        """
        places: tuple[Place, ...] = ("subject", "last", "all")
        for place in places:
            order = list(self.shares(place))
            for size in range(1, len(order) + 1):
                if bool(self.takes_out(order[:size]).all()):
                    return in_order(order[:size])
        return None

    @cached_property
    def _counted(self) -> Float[Tensor, "fact component pos"]:
        return torch.where(self.is_written[None, :, None], self.squared.nan_to_num(0.0).double(), 0.0)

    @cached_property
    def _at(self) -> dict[Place, Bool[Tensor, "fact pos"]]:
        """Which tokens are at each place."""
        found: dict[Place, Tensor] = {
            place: torch.zeros(len(self.facts), self.write.shape[2], dtype=torch.bool) for place in PLACES
        }
        for place, there in found.items():
            for i, (pieces, subject) in enumerate(zip(self.pieces, self.subject, strict=True)):
                there[i, list(positions(place, subject, len(pieces)))] = True
        return found

    def _rows(self, cells: Sequence[Cell]) -> list[int]:
        """Each component of some cells once."""
        return [self.components.index(name) for name in dict.fromkeys((cell.component, cell.layer) for cell in cells)]

    def counted(self, row: int) -> Float[Tensor, "fact pos"]:
        """What a component wrote, squared; 0 if it wasn't written."""
        return self._counted[:, row]

    def silenced(self, row: int, cells: Sequence[Cell]) -> Bool[Tensor, "fact pos"]:
        """Where a component is silenced."""
        places = [self._at[cell.place] for cell in cells if (cell.component, cell.layer) == self.components[row]]
        return torch.stack(places).any(0) if places else torch.zeros_like(self._at["all"])

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a component and role of token: the mean over facts of the largest write, and the share there."""
        import pandas as pd

        of_token = [roles(len(pieces), subject) for pieces, subject in zip(self.pieces, self.subject, strict=True)]
        counted, total = self._counted, self._counted.sum((1, 2))
        rows = []
        for c, (component, layer) in enumerate(self.components):
            for role in ROLES:
                write, share = [], []
                for i, each in enumerate(of_token):
                    here = [p for p, name in enumerate(each) if name == role and not bool(self.write[i, c, p].isnan())]
                    if here:
                        write.append(float(self.write[i, c, here].max()))
                        share.append(float(counted[i, c, here].sum() / total[i]))
                if write:
                    rows.append(
                        {
                            "component": component,
                            "layer": layer,
                            "role": role,
                            "write": sum(write) / len(write),
                            "share": sum(share) / len(share),
                            "n": len(write),
                        }
                    )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Where it writes most."""
        found = self.table()
        facts = counted(len(self.facts), "fact")
        if not self.written:
            return f"Footprint({facts}): nothing was written"
        most = found.sort_values("share", ascending=False).head(3)
        told = [
            f"{row.component}{'' if row.layer is None or math.isnan(row.layer) else f' {int(row.layer)}'} at "
            f"{row.role}: {row.share:.0%} (writes {row.write:.2g} of its own)"
            for row in most.itertuples()
        ]
        return f"Footprint({facts}, {counted(len(self.written), 'component')} written): {'; '.join(told)}"

    def _repr_html_(self) -> str:
        """The rows that were written."""
        found = self.table()
        return str(found[found.share > 0].to_html(float_format="{:.4f}".format, index=False))


@plain_torch()
def footprint(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Footprint:
    """Where a change writes: in which components, at which tokens of the facts' prompts, and how much.

    One pass of the unedited model, and one of the changed model in which each component is given the unedited one's
    input.

    Args:
        model: The unedited model.
        changed: An edit of it (or a router), a list with one for each fact, or another model with as many layers.
        facts: Whose prompts to run.
        prepend_bos: BOS policy of a model changed in another way; None for its default. An edit has its own.
        batch_tokens: Most tokens in one forward pass.
        folder: Where to keep what was measured.
        progress: Whether to show a bar.

    Raises:
        ValueError: As in `Population.of`; or another model with another number of layers.

    Example:
        >>> fe.attacks.footprint(model, edit, [fact]).table()      # doctest: +SKIP
    """
    population = Population.of(
        model, changed, as_facts(facts), prepend_bos=prepend_bos, folder=folder, progress=progress, force=True
    )
    return footprint_of(population, batch_tokens=batch_tokens)


@plain_torch()
def footprint_of(population: Population, *, batch_tokens: int = BATCH_TOKENS) -> Footprint:
    """`footprint` of a population."""
    tokenizer, bos = population.model.tokenizer, population.prepend_bos
    population.check_room()
    rows = [align(tokenizer, fact, prepend_bos=bos) for fact in population.facts]
    layers = n_layers(population.model)
    components = (
        ("embed", None),
        *((name, layer) for layer in range(layers) for name in ("attn", "mlp", "rest")),
        ("norm", None),
        ("unembed", None),
    )
    length = max(len(row.ids) for row in rows)
    found = torch.full((2, len(rows), len(components), length), math.nan)
    with hashed_once(population.model):
        for part in population.parts:
            if isinstance(part.changed, Model) and n_layers(part.changed) != layers:
                raise ValueError(
                    f"the changed model has {n_layers(part.changed)} layers, and the unedited one {layers}"
                )

            def compute(part: Part = part) -> Tensor:
                mine = torch.full((2, len(part.indices), len(components), length), math.nan)
                for attempt in that_fit([len(rows[i].ids) for i in part.indices], batch_tokens):
                    with attempt as some:
                        here = [rows[part.indices[j]] for j in some]
                        width = max(len(row.ids) for row in here)
                        mine[:, some, :, :width] = _writes(part, here)
                return mine

            kept = population.keep("footprint", part, compute, settings=batch_tokens)
            for place, i in enumerate(part.indices):
                found[:, i] = kept[:, place]
    return Footprint(
        facts=population.facts,
        components=components,
        pieces=tuple(row.pieces for row in rows),
        subject=tuple(row.subject for row in rows),
        write=found[0],
        squared=found[1],
    )


def _writes(part: Part, rows: Sequence[Aligned]) -> Float[Tensor, "2 fact component pos"]:
    """Relative and squared writes of some prompts that are run together."""
    tokens = pad([row.ids for row in rows], 0)
    ends = torch.tensor([[len(row.ids) - 1] for row in rows])
    with frozen(part.unedited), torch.no_grad():
        clean = answers_of(Runner(part.unedited), tokens, ends, None)
    with part.applied() as tested, frozen(tested), torch.no_grad():
        changed = answers_of(Runner(tested), tokens, ends, clean)
    layers = n_layers(part.unedited)
    inside = [name(layer) for layer in range(layers) for name in (_attn, _mlp, resid_post)]
    last = clean[resid_post(layers - 1)][torch.arange(len(rows)), ends[:, 0]].double().norm(dim=-1)
    out = torch.full((2, len(rows), 3 * layers + 3, tokens.shape[1]), math.nan)
    for c, place in enumerate([resid_pre(0), *inside]):
        moved = (changed[place].double() - clean[place].double()).norm(dim=-1).cpu()
        size = clean[place].double().norm(dim=-1).cpu()
        out[0, :, c], out[1, :, c] = _over(moved, size), moved**2
    for c, place in ((-2, "norm"), (-1, "unembed")):
        moved = (changed[place].double() - clean[place].double()).norm(dim=-1).cpu()
        share = _over(moved, clean[place].double().norm(dim=-1).cpu())
        here = torch.arange(len(rows)), c, ends[:, 0]
        out[0][here], out[1][here] = share.float(), ((share * last.cpu()) ** 2).float()
    for i, row in enumerate(rows):
        out[:, i, :, len(row.ids) :] = math.nan
    return out


def _attn(layer: int) -> str:
    return component_hook("attn", layer)


def _mlp(layer: int) -> str:
    return component_hook("mlp", layer)


def _over(moved: Tensor, size: Tensor) -> Tensor:
    """Moved as a share of size; what answers nothing and now answers something was moved without bound."""
    return torch.where(moved > 0, moved / size, 0.0)


def answers_of(
    runner: Runner, tokens: Tensor, ends: Tensor, clean: dict[str, Tensor] | None, hooks: Sequence[Hook] = ()
) -> dict[str, Tensor]:
    """What every component answers; with `clean`, to what it read there, which then takes its own answer's place.

    Args:
        runner: Runs the model; call inside `frozen` and ``torch.no_grad``.
        tokens: Prompts that are run together, padded.
        ends: The place of each one's last token, in a column.
        clean: What was found in another model; None lets each component read its own.
        hooks: Called before an answer is kept: what they put in its place is what is kept.

    Returns:
        By hook name; ``"norm"`` and ``"unembed"`` at the last tokens.
    """
    model: Any = runner.model
    found: dict[str, Tensor] = {}

    def keep(name: str) -> HookFn:
        def hook_fn(value: Tensor, hook: Any = None) -> Tensor | None:
            found[name] = value.detach().clone()
            return None if clean is None else clean[name].to(value)

        return hook_fn

    places = [name(layer) for layer in range(runner.n_layers) for name in (_attn, _mlp, resid_post)]
    keeping: list[Hook] = [*hooks, *((place, keep(place)) for place in places), (model.ln_final, keep(NORM))]
    start = resid_pre(0)
    found[start] = runner.capture(tokens, [start], stop=0)[start]
    begin = found[start] if clean is None else clean[start].to(found[start])
    logits = runner.logits(tokens, at=ends, start=(0, begin), hooks=keeping)
    found["unembed"] = logits[:, 0]
    normed = found[NORM]
    alone = normed.shape[1] == 1  # the head is run where logits are wanted
    found["norm"] = normed[:, 0] if alone else normed[torch.arange(len(tokens)), ends[:, 0]]
    return found
