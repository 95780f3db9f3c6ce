"""Runs of several facts with the states of one run put into another, at the least arithmetic.

A *cell* puts the value that a place has in one run (the donor) into another run (the base) at one token. What it
needs is only this: the blocks above the first changed place, the tokens from the changed one on, and the logits that
follow the prompt. The tokens before are read from the base run's attention keys and values, and the
pieces of all cells of a fact stand side by side in one row for each sample (`model.Packing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.hook_names import EMBED, resid_post, resid_pre
from tl_factedit.backend.packed_rows import PackedRows
from tl_factedit.backend.packing import Packing, Past, past_at
from tl_factedit.backend.protocol import Hook, HookFn
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import pad
from tl_factedit.locate.cell_rows import CellRows
from tl_factedit.locate.cells import Cell, Direction, Patch, Question, Source
from tl_factedit.locate.metrics import Metric, MetricInput, stacked


class Patching:
    """The clean and the corrupted runs of some questions, and cells between them.

    Args:
        runner: Runs the model.
        questions: What to run; each has at least one sample.
        donor_places: Hook names whose values the cells take from the donor runs.
        frozen_places: Hook names whose values they take from the base runs.
        metric: What is measured.
        direction: ``"denoise"`` puts clean values into corrupted runs, ``"noise"`` the reverse.
        packed: Whether cells are run packed; otherwise each as a whole sequence.
        batch_tokens: Most tokens in one forward pass.

    Attributes:
        top: For each question, the token that the clean model puts first, and that after each token of white space
            that its object begins with.
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
        self.top = [
            tuple(logits[: question.row.old_word].argmax(-1).tolist())
            for question, logits in zip(questions, clean_logits, strict=True)
        ]
        self._asked = [
            MetricInput(question.fact, question.row.true_ids, logits, question.contrast)
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

    def sheets(self, cells: Sequence[Cell]) -> list[CellRows]:
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
            few = rows * self._width(part) <= min(self._batch_tokens, 1.1 * filled)
            if sheets and few and self._can_be_seen(self._width(part), max(map(self._behind, together))):
                sheets[-1].append(part)
            else:
                sheets.append([part])
        return [self._sheet(groups) for groups in sheets]

    def run(self, sheet: CellRows, patches: Sequence[Patch]) -> Iterator[tuple[int, Cell, Float[Tensor, "sample"]]]:
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

        starts = [question.row.subject[0] for question in questions]
        lengths = [len(question.ids) - start for question, start in zip(questions, starts, strict=True)]
        laid = PackedRows.of(lengths, starts, apart=True)
        packing = laid.packing(past_at(clean_past, of_run, laid.behind.shape[1]), first.device)
        where, every = packing.positions, torch.arange(len(ids), device=first.device)[:, None]
        real = torch.arange(where.shape[1], device=first.device) < torch.tensor(lengths, device=first.device)[:, None]
        found, past = self._runner.remember(
            ids.to(first.device)[every, where], places, resid=first[every, where], packing=packing
        )

        queries = real.nonzero(as_tuple=True)
        at = queries[0], where[queries]

        def spread(values: Tensor, whole: Tensor) -> Tensor:
            device = whole.device  # of its layer
            whole[at[0].to(device), at[1].to(device)] = values[queries[0].to(device), queries[1].to(device)]
            return whole

        unknown = {
            name: value.new_full((len(ids), ids.shape[1], *value.shape[2:]), float("nan"))
            for name, value in found.items()
        }
        return (
            {name: spread(value, unknown[name]) for name, value in found.items()},
            tuple(
                (spread(keys, old_keys[of_run.to(keys.device)]), spread(values, old_values[of_run.to(values.device)]))
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

    def _behind(self, cells: Sequence[Cell]) -> int:
        return max(cell.position for cell in cells) if self._packed else 0

    def _can_be_seen(self, width: int, behind: int) -> bool:
        """Whether the model's attention reaches over a row and what is behind it."""
        most = self._runner.most_keys
        return not self._packed or most is None or width + behind <= most

    def _split(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """Cells of one question in parts, none of which is more than a pass can hold unless it is a single cell."""
        part: list[Cell] = []
        for cell in cells:
            more = [*part, cell]
            few = self._rows(more) * self._width(more) <= self._batch_tokens
            if part and not (few and self._can_be_seen(self._width(more), self._behind(more))):
                yield part
                part = []
            part.append(cell)
        yield part

    def _sheet(self, groups: Sequence[Sequence[Cell]]) -> CellRows:
        of = []
        for cells in groups:
            which = cells[0].question
            first, question = self._first_run[which], self._questions[which]
            of.append((cells, question, range(first, first + question.samples)))
        return CellRows.of(of, self._packing if self._packed else None)

    def _packing(self, rows: PackedRows, runs: Tensor) -> Packing:
        past, index = self._past
        assert past is not None
        # What is behind a row is the beginning of one run, with nothing left out.
        return rows.packing(past_at(past, index[runs], rows.behind.shape[1]), past[0][0].device)

    def _logits(self, sheet: CellRows, patches: Sequence[Patch]) -> Iterator[Float[Tensor, "row vocab"]]:
        """For each patch, in the order (group, cell, sample, target)."""
        together = max(1, self._batch_tokens // sheet.places.numel()) if sheet.packing is not None else 1
        above = [patch for patch in patches if patch.begin < self._runner.n_layers]
        for first in range(0, len(above), together):
            yield from self._sweep(sheet, above[first : first + together])
        for patch in patches[len(above) :]:
            yield self._end(sheet, patch)

    def _sweep(self, sheet: CellRows, patches: Sequence[Patch]) -> Iterator[Float[Tensor, "row vocab"]]:
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

    def _end(self, sheet: CellRows, patch: Patch) -> Float[Tensor, "row vocab"]:
        """Only the head is left: of the tokens, only those whose logits are read."""
        base, index = self._values["base"]
        runs, places = sheet.runs[sheet.at[0]], sheet.places[sheet.at]
        resid = base[self._stream[patch.begin]][index[runs], places]
        if patch.stream is not None:
            changed = places == sheet.own_places[sheet.at_of_own]
            donor = self._source("donor", patch.stream, sheet)[sheet.at_of_own]
            resid = torch.where(changed[:, None].to(resid.device), donor.to(resid), resid)
        return self._head(resid)

    def _source(self, source: Source, place: str, sheet: CellRows) -> Tensor:
        values, index = self._values[source]
        return values[place][index[sheet.own_runs], sheet.own_places]


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
