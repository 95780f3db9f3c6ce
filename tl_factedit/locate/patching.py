"""Runs of several facts with the states of one run put into another, at the least arithmetic.

A *cell* puts the value that a place has in one run (the donor) into another run (the base) at one token. What it
needs is only this: the blocks above the first changed place, the tokens from the changed one on, and the logits that
follow the prompt. The tokens before are read from the base run's attention keys and values, and the
pieces of all cells of a fact stand side by side in one row for each sample (`model.Packing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.core.facts import Fact
from tl_factedit.locate.metrics import Asked, Metric, stacked
from tl_factedit.backend.model import (
    EMBED,
    Hook,
    HookFn,
    Packing,
    Past,
    Runner,
    past_at,
    resid_post,
    resid_pre,
)
from tl_factedit.core.tokens import Aligned, pad

Direction = Literal["denoise", "noise"]
Source = Literal["donor", "base"]


@dataclass(frozen=True, eq=False)
class Question:
    """A fact ready to be run.

    Attributes:
        fact: The fact.
        row: Its prompt.
        corrupted: Its subject's corrupted embeddings, [sample position d_model].
        contrast: Of `metrics.Asked`.
    """

    fact: Fact
    row: Aligned
    corrupted: Float[Tensor, "sample position d_model"]
    contrast: Int[Tensor, "#sample"] | None

    @property
    def ids(self) -> Int[Tensor, "pos"]:
        """The prompt and all but the last token of the target."""
        return torch.cat([self.row.ids, self.row.true_ids[:-1]])

    @property
    def samples(self) -> int:
        """How many corrupted runs it has."""
        return len(self.corrupted)

    @property
    def logits_at(self) -> range:
        """The positions whose logits are asked for."""
        return range(len(self.row.ids) - 1, len(self.row.ids) - 1 + len(self.row.true_ids))


@dataclass(frozen=True)
class Cell:
    """One change: of which question, at which token, of which head or neuron (None: of all)."""

    question: int
    position: int
    unit: int | None = None


@dataclass(frozen=True)
class Write:
    """At `place`, the cell's token gets the value it has in the donor run (or, to freeze it, in the base run)."""

    place: str
    source: Source = "donor"


@dataclass(frozen=True)
class Patch:
    """What the cells of a layer change.

    Attributes:
        begin: The first block that has to be run again; as many as the model has: none.
        stream: Where the residual stream before that block gets its changed value from; None: it stays.
        writes: What is changed from there on.
    """

    begin: int
    stream: str | None
    writes: tuple[Write, ...]


class Patching:
    """The clean and the corrupted runs of some questions, and cells between them.

    Args:
        runner: Of the model.
        questions: What to run; each has at least one sample.
        donor_places: Hook names whose values the cells take from the donor runs.
        frozen_places: Hook names whose values they take from the base runs.
        metric: What is measured.
        direction: ``"denoise"`` puts clean values into corrupted runs, ``"noise"`` the reverse.
        packed: Whether cells are run packed; otherwise each as a whole sequence.
        batch_tokens: Most tokens in one forward pass.

    Attributes:
        top: For each question, the token that the clean model puts first.
        clean: The metric of the clean runs, for each question [sample].
        base: The same of the base runs.
        corrupted: The same of the corrupted runs.
    """

    def __init__(
        self,
        runner: Runner,
        questions: Sequence[Question],
        donor_places: Sequence[str],
        frozen_places: Sequence[str],
        metric: Metric,
        direction: Direction,
        *,
        packed: bool,
        batch_tokens: int,
    ) -> None:
        self._runner, self._questions, self._metric = runner, questions, metric
        self._packed, self._batch_tokens = packed, batch_tokens
        samples = torch.tensor([question.samples for question in questions])
        self._first_run = (samples.cumsum(0) - samples).tolist()
        of_run = torch.arange(len(questions)).repeat_interleave(samples)
        runs = torch.arange(len(of_run))

        self._stream = [*(resid_pre(layer) for layer in range(runner.n_layers)), resid_post(runner.n_layers - 1)]
        of_base = [*dict.fromkeys([*self._stream, *frozen_places])]
        of_donor = [*dict.fromkeys([*donor_places, self._stream[-1]])]
        clean_is_base = direction == "noise"
        ids = pad([question.ids for question in questions], 0)
        clean, clean_past = self._run_clean(ids, of_base if clean_is_base else of_donor)
        corrupted, corrupted_past = self._run_corrupted(
            ids[of_run], of_run, of_donor if clean_is_base else of_base, clean_past
        )
        self._values: dict[Source, tuple[dict[str, Tensor], Tensor]] = {
            "base": (clean, of_run) if clean_is_base else (corrupted, runs),
            "donor": (corrupted, runs) if clean_is_base else (clean, of_run),
        }
        self._past = (clean_past, of_run) if clean_is_base else (corrupted_past, runs)

        last = self._stream[-1]
        clean_logits = [self._head(clean[last][i, list(q.logits_at)]) for i, q in enumerate(questions)]
        self.top = [int(logits[0].argmax()) for logits in clean_logits]
        self._asked = [
            Asked(question.fact, question.row.true_ids, logits, question.contrast)
            for question, logits in zip(questions, clean_logits, strict=True)
        ]
        self.clean = [
            metric(logits.expand(1, question.samples, -1, -1), asked)[0].cpu()
            for question, logits, asked in zip(questions, clean_logits, self._asked, strict=True)
        ]
        self.corrupted = []
        for first, question, asked in zip(self._first_run, questions, self._asked, strict=True):
            rows = corrupted[last][first : first + question.samples, list(question.logits_at)]
            logits = self._head(rows.flatten(0, 1))
            self.corrupted.append(metric(stacked(logits, question.samples, len(question.logits_at)), asked)[0].cpu())
        self.base = self.clean if clean_is_base else self.corrupted
        for question, *runs in zip(questions, self.clean, self.corrupted, strict=True):
            for which, scores in zip(("clean", "corrupted"), runs, strict=True):
                if bool(scores.isnan().any()):
                    raise RuntimeError(
                        f"what is measured of the {which} run of {question.fact.name!r} is NaN: the model overflows "
                        "(load it in float32 or bfloat16, or take less noise), or the metric does"
                    )

    # -- cells

    def sheets(self, cells: Sequence[Cell]) -> list[Sheet]:
        """Put cells into rows: one list of sheets serves every layer."""
        groups: dict[int, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.question, []).append(cell)
        parts = [part for group in groups.values() for part in self._split(group)]
        parts.sort(key=self._width)
        sheets: list[list[list[Cell]]] = []
        for part in parts:
            # Wider ones come later, so the newest sets how far the others are padded.
            together = [*sheets[-1], part] if sheets else [part]
            rows = sum(self._rows(each) for each in together)
            filled = sum(self._rows(each) * self._width(each) for each in together)
            if sheets and rows * self._width(part) <= min(self._batch_tokens, 1.1 * filled):
                sheets[-1].append(part)
            else:
                sheets.append([part])
        return [self._sheet(groups) for groups in sheets]

    def run(self, sheet: Sheet, patches: Sequence[Patch]) -> Iterator[tuple[int, Cell, Float[Tensor, "sample"]]]:
        """The metric of each cell under each patch (by its number), for each sample.

        Args:
            sheet: The cells.
            patches: By `Patch.begin`, ascending: the sweep goes up through them once.
        """
        for number, logits in enumerate(self._logits(sheet, patches)):
            for cells, own in zip(sheet.groups, logits.split(sheet.sizes), strict=True):
                question = self._questions[cells[0].question]
                rows = stacked(own, question.samples, len(question.logits_at))
                for cell, scores in zip(cells, self._metric(rows, self._asked[cells[0].question]).cpu(), strict=True):
                    yield number, cell, scores

    def at_the_end(self, cell: Cell) -> bool:
        """Whether the cell changes a token from which logits are read: what it does needs no attention."""
        return cell.position in self._questions[cell.question].logits_at

    # -- the runs

    def _run_clean(self, ids: Tensor, places: Sequence[str]) -> tuple[dict[str, Tensor], Past | None]:
        if not self._packed:
            return self._runner.capture(ids, places), None
        resid = self._runner.capture(ids, [resid_pre(0)], stop=0)[resid_pre(0)]
        here = torch.arange(ids.shape[1], device=resid.device)
        packing = Packing(here.expand(len(ids), -1), (here[:, None] >= here).expand(len(ids), -1, -1))
        return self._runner.remember(ids, places, resid=resid, packing=packing)

    def _run_corrupted(
        self, ids: Tensor, of_run: Tensor, places: Sequence[str], clean_past: Past | None
    ) -> tuple[dict[str, Tensor], Past | None]:
        """The same for each sample; what lies before the subject is the clean run's, and left out of the values."""
        questions = [self._questions[i] for i in of_run.tolist()]
        subjects = [torch.arange(*question.row.subject) for question in questions]
        rows = torch.cat([torch.full((len(subject),), i) for i, subject in enumerate(subjects)])
        changed = torch.cat([question.corrupted.flatten(0, 1) for question in self._questions])
        set_subject = (EMBED, _putter((rows, torch.cat(subjects)), None, changed))
        if clean_past is None:
            return self._runner.capture(ids, places, hooks=[set_subject]), None
        first = self._runner.capture(ids, [resid_pre(0)], stop=0, hooks=[set_subject])[resid_pre(0)]

        starts = torch.tensor([question.row.subject[0] for question in questions], device=first.device)
        ends = torch.tensor([len(question.ids) for question in questions], device=first.device)
        query = torch.arange(int((ends - starts).max()), device=first.device)
        real = query < (ends - starts)[:, None]
        where = (starts[:, None] + query).minimum(ends[:, None] - 1)
        before = int(starts.max())
        behind = torch.arange(before, device=first.device) < starts[:, None, None]
        own = (query[:, None] >= query) & real[:, None] | torch.eye(len(query), dtype=torch.bool, device=first.device)
        visible = torch.cat([behind & real[..., None], own], -1)
        every = torch.arange(len(ids), device=first.device)[:, None]
        found, past = self._runner.remember(
            ids.to(first.device)[every, where],
            places,
            resid=first[every, where],
            packing=Packing(where, visible, past_at(clean_past, of_run, before)),
        )

        def spread(values: Tensor, whole: Tensor) -> Tensor:
            whole[every.expand_as(where)[real], where[real]] = values[real]
            return whole

        unknown = {
            name: value.new_full((len(ids), ids.shape[1], *value.shape[2:]), float("nan"))
            for name, value in found.items()
        }
        return (
            {name: spread(value, unknown[name]) for name, value in found.items()},
            tuple(
                (spread(keys, old_keys[of_run]), spread(values, old_values[of_run]))
                for (keys, values), (old_keys, old_values) in zip(past, clean_past, strict=True)
            ),
        )

    def _head(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        tokens = torch.zeros(len(resid), 1, dtype=torch.long)
        pieces = zip(tokens.split(self._batch_tokens), resid[:, None].split(self._batch_tokens), strict=True)
        return torch.cat(
            [self._runner.logits(some, start=(self._runner.n_layers, each))[:, 0] for some, each in pieces]
        )

    # -- rows

    def _rows(self, cells: Sequence[Cell]) -> int:
        return self._questions[cells[0].question].samples * (1 if self._packed else len(cells))

    def _width(self, cells: Sequence[Cell]) -> int:
        length = len(self._questions[cells[0].question].ids)
        return sum(length - cell.position for cell in cells) if self._packed else length

    def _split(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """Cells of one question in parts, none of which is more than a pass can hold unless it is a single cell."""
        part: list[Cell] = []
        for cell in cells:
            if part and self._rows([*part, cell]) * self._width([*part, cell]) > self._batch_tokens:
                yield part
                part = []
            part.append(cell)
        yield part

    def _sheet(self, groups: Sequence[Sequence[Cell]]) -> Sheet:
        rows = _Rows()
        for cells in groups:
            question = self._questions[cells[0].question]
            runs = range(self._first_run[cells[0].question], self._first_run[cells[0].question] + question.samples)
            rows.add(cells, question, runs, packed=self._packed)
        return rows.sheet(None if self._past[0] is None else self._past)  # type: ignore[arg-type]

    def _logits(self, sheet: Sheet, patches: Sequence[Patch]) -> Iterator[Float[Tensor, "row vocab"]]:
        """For each patch, in the order (group, cell, sample, target)."""
        together = max(1, self._batch_tokens // sheet.places.numel()) if sheet.packing is not None else 1
        above = [patch for patch in patches if patch.begin < self._runner.n_layers]
        for first in range(0, len(above), together):
            yield from self._sweep(sheet, above[first : first + together])
        for patch in patches[len(above) :]:
            yield self._end(sheet, patch)

    def _sweep(self, sheet: Sheet, patches: Sequence[Patch]) -> Iterator[Float[Tensor, "row vocab"]]:
        """Several patches upward together: the rows of each join at the block where it begins."""
        base, index = self._values["base"]
        rows, (own_rows, own_queries) = len(sheet.places), sheet.own
        streams = []
        puts: dict[str, list[tuple[int, Tensor]]] = {}
        for number, patch in enumerate(patches):
            stream = base[self._stream[patch.begin]][index[sheet.runs][:, None], sheet.places]
            if patch.stream is not None:
                stream[sheet.own] = self._source("donor", patch.stream, sheet).to(stream)
            streams.append(stream)
            for write in patch.writes:
                new = self._source(write.source, write.place, sheet)
                puts.setdefault(write.place, []).append((number, new))
        hooks: list[Hook] = []
        for place, of_place in puts.items():
            at = torch.cat([own_rows + number * rows for number, _ in of_place])
            units = None if sheet.own_units is None else sheet.own_units.repeat(len(of_place))
            put = _putter((at, own_queries.repeat(len(of_place))), units, torch.cat([new for _, new in of_place]))
            hooks.append((place, put))
        count = len(patches)
        at_rows, at_queries = sheet.at
        logits = self._runner.logits(
            sheet.tokens.repeat(count, 1),
            at=(
                torch.cat([at_rows + number * rows for number in range(count)]),
                at_queries.repeat(count),
            ),
            start=(patches[0].begin, torch.cat(streams)),
            hooks=hooks,
            packing=None if sheet.packing is None else self._joined(sheet.packing, [patch.begin for patch in patches]),
        )[0]
        yield from logits.split(len(at_rows))

    def _joined(self, packing: Packing, begins: Sequence[int]) -> Packing:
        """The same rows once for each patch; its rows join where it begins."""
        count = len(begins)
        if count == 1:
            return packing
        began = [max(1, sum(begin <= layer for begin in begins)) for layer in range(self._runner.n_layers)]
        past = None
        if packing.past is not None:
            past = tuple(
                (keys.repeat(times, 1, 1, 1), values.repeat(times, 1, 1, 1))
                for (keys, values), times in zip(packing.past, began, strict=True)
            )
        return Packing(
            packing.positions.repeat(count, 1),
            packing.visible.repeat(count, 1, 1),
            past,
            tuple(times * len(packing.positions) for times in began),
        )

    def _end(self, sheet: Sheet, patch: Patch) -> Float[Tensor, "row vocab"]:
        """Only the head is left: of the tokens, only those whose logits are read."""
        base, index = self._values["base"]
        runs, places = sheet.runs[sheet.at[0]], sheet.places[sheet.at]
        resid = base[self._stream[patch.begin]][index[runs], places]
        if patch.stream is not None:
            changed = places == sheet.own_places[sheet.at_of_own]
            donor = self._source("donor", patch.stream, sheet)[sheet.at_of_own]
            resid = torch.where(changed[:, None].to(resid.device), donor.to(resid), resid)
        return self._head(resid)

    def _source(self, source: Source, place: str, sheet: Sheet) -> Tensor:
        values, index = self._values[source]
        return values[place][index[sheet.own_runs], sheet.own_places]


# ------------------------------------------------------------------------------------ rows of cells


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows of cells, the same for all layers.

    Attributes:
        groups: The cells, by question.
        tokens: [row query].
        runs: Which corrupted run a row belongs to, [row].
        places: Which position of its question a token is, [row query].
        own: Rows and queries of the changed tokens, in the order (cell, sample).
        own_runs: The runs of the same.
        own_places: Their positions.
        own_units: Their heads or neurons; None if none are given.
        at: Rows and queries of the logits, in the order (cell, sample, target).
        at_of_own: Which entry of `own` each of them belongs to.
        sizes: How many of them a group has.
        packing: None where rows are whole sequences.
    """

    groups: tuple[tuple[Cell, ...], ...]
    tokens: Tensor
    runs: Tensor
    places: Tensor
    own: tuple[Tensor, Tensor]
    own_runs: Tensor
    own_places: Tensor
    own_units: Tensor | None
    at: tuple[Tensor, Tensor]
    at_of_own: Tensor
    sizes: list[int]
    packing: Packing | None


class _Rows:
    """Collects the rows of a `Sheet`."""

    def __init__(self) -> None:
        self.groups: list[tuple[Cell, ...]] = []
        self.tokens: list[Tensor] = []
        self.places: list[Tensor] = []
        self.cell_of: list[Tensor] = []  # of each token, within its row
        self.runs: list[int] = []
        self.own: list[tuple[int, int, int, int, int]] = []  # row, query, run, position, unit
        self.at: list[tuple[int, int, int]] = []  # row, query, place in `own`
        self.sizes: list[int] = []

    def add(self, cells: Sequence[Cell], question: Question, runs: range, *, packed: bool) -> None:
        """All samples of some cells of one question: in a row each, or in a row for every cell."""
        length = len(question.ids)
        starts: list[tuple[int, int]] = []  # for each cell, its first row, and what makes a position a query
        for row_cells in [cells] if packed else [[cell] for cell in cells]:
            here, begin = 0, len(self.runs)
            pieces = []
            for cell in row_cells:
                from_ = cell.position if packed else 0
                starts.append((begin, here - from_))
                pieces.append(torch.arange(from_, length))
                here += length - from_
            places = torch.cat(pieces)
            owner = torch.arange(len(pieces)).repeat_interleave(torch.tensor([len(piece) for piece in pieces]))
            for run in runs:
                self.runs.append(run)
                self.places.append(places)
                self.tokens.append(question.ids[places])
                self.cell_of.append(owner)
        for cell, (row, shift) in zip(cells, starts, strict=True):
            for sample, run in enumerate(runs):
                self.at += [(row + sample, place + shift, len(self.own)) for place in question.logits_at]
                unit = -1 if cell.unit is None else cell.unit
                self.own.append((row + sample, cell.position + shift, run, cell.position, unit))
        self.groups.append(tuple(cells))
        self.sizes.append(len(cells) * len(runs) * len(question.logits_at))

    def sheet(self, past: tuple[Past, Tensor] | None) -> Sheet:
        """Pad, and say what sees what."""
        own, at, runs = torch.tensor(self.own), torch.tensor(self.at), torch.tensor(self.runs)
        cell_of = pad(self.cell_of, -1)
        # Rows are filled up with a token of their own: what lies before a subject has no value in a corrupted run.
        width = cell_of.shape[1]
        places = torch.stack([torch.cat([row, row[-1:].repeat(width - len(row))]) for row in self.places])
        units = own[:, 4]
        return Sheet(
            groups=tuple(self.groups),
            tokens=pad(self.tokens, 0),
            runs=runs,
            places=places,
            own=(own[:, 0], own[:, 1]),
            own_runs=own[:, 2],
            own_places=own[:, 3],
            own_units=None if bool((units < 0).any()) else units,
            at=(at[:, 0], at[:, 1]),
            at_of_own=at[:, 2],
            sizes=self.sizes,
            packing=None if past is None else self._packing(places, cell_of, past, runs),
        )

    def _packing(self, places: Tensor, cell_of: Tensor, past: tuple[Past, Tensor], runs: Tensor) -> Packing:
        real = cell_of >= 0
        same = (cell_of[:, :, None] == cell_of[:, None]) & (places[:, :, None] >= places[:, None]) & real[:, None]
        alone = torch.eye(places.shape[1], dtype=torch.bool)  # what fills a row up sees itself
        # Cells lie in a row one after the other: where a token's cell begins is where it, or a cell before it, does.
        new = torch.ones_like(real)
        new[:, 1:] = cell_of[:, 1:] != cell_of[:, :-1]
        index = torch.arange(places.shape[1]).expand_as(places)
        begins = places.gather(1, torch.where(new, index, 0).cummax(1).values)
        before = int(begins[real].max())
        behind = (torch.arange(before) < begins[..., None]) & real[..., None]
        keys, index_of_run = past
        device = keys[0][0].device
        visible = torch.cat([behind, same & real[..., None] | alone], -1)
        return Packing(places.to(device), visible.to(device), past_at(keys, index_of_run[runs], before))


def _putter(own: tuple[Tensor, Tensor], units: Tensor | None, new: Tensor) -> HookFn:
    """A hook that sets some tokens (or a head or neuron of each) to new values."""

    def put(value: Tensor, hook: object = None) -> Tensor:
        value = value.clone()
        if units is None:
            value[own] = new.to(value)
        else:
            value[(*own, units)] = new[torch.arange(len(units)), units].to(value)
        return value

    return put
