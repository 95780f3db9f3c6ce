"""Facts made ready to be run: aligned with their tokens, their subjects corrupted, in chunks that fit a memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_factedit.backend.halving import Attempt, halving
from tl_factedit.backend.memory import GIB, pass_tokens
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.core import tokens
from tl_factedit.core.facts import Fact, need_old_object
from tl_factedit.core.tokens import Aligned
from tl_factedit.locate.cells import Direction, Question
from tl_factedit.locate.corruption import Corruption, Subject, subject_of
from tl_factedit.locate.metrics import Metric, logit_diff
from tl_factedit.locate.patching import Patching
from tl_factedit.locate.replacement import TokenReplacement

MOST_QUESTIONS = 32
"""In one chunk: what a kill can lose, and how often a bar moves."""

LEAST_SHARE = 1 / 64
"""Of the memory, for passes of a single fact."""


@dataclass(frozen=True, eq=False)
class TraceInputs:
    """What `ask` made of some facts.

    Attributes:
        runner: Runs the model.
        corruption: Calibrated on the facts' subjects.
        subjects: One for each fact.
        each: The same facts, ready to be run; without samples where the corruption has none.
        unpacked: Why cells have to be run as whole sequences; ``""`` if they don't have to.
    """

    runner: Runner
    corruption: Corruption
    subjects: tuple[Subject, ...]
    each: tuple[Question, ...]
    unpacked: str

    @property
    def rows(self) -> tuple[Aligned, ...]:
        """The prompts."""
        return tuple(question.row for question in self.each)

    def chunks(
        self, places: Sequence[str], held: Sequence[str], *, memory: float, skip: frozenset[int] = frozenset()
    ) -> Iterator[Attempt[int]]:
        """The facts that can be run, some at a time; fewer, in smaller passes, where the device has no memory for them.

        Args:
            places: What cells take from the donor runs (see `Patching`).
            held: What they take from the base runs.
            memory: What activations may take, in GiB.
            skip: Facts that are left out.
        """
        return halving(self._chunks(places, held, memory, skip), len, "facts at once", "less memory", least=LEAST_SHARE)

    def _chunks(
        self, places: Sequence[str], held: Sequence[str], memory: float, skip: frozenset[int]
    ) -> Iterator[list[int]]:
        todo = [i for i, question in enumerate(self.each) if question.samples and i not in skip]
        # Prompts that are run again for as many tokens fill their rows best together.
        todo.sort(key=lambda i: (len(self.each[i].ids) - self.each[i].row.subject[0], len(self.each[i].ids)))
        chunk: list[int] = []
        for i in todo:
            if chunk and (len(chunk) == MOST_QUESTIONS or self._bytes([*chunk, i], places, held) > memory * GIB / 2):
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def patching(
        self,
        chunk: Sequence[int],
        places: Sequence[str],
        held: Sequence[str],
        metric: Metric,
        direction: Direction,
        *,
        memory: float,
    ) -> Patching:
        """The clean and corrupted runs of a chunk, from which its cells are run.

        Args:
            chunk: Facts that are run together.
            places: As in `chunks`.
            held: As in `chunks`.
            metric: What is measured.
            direction: As in `Patching`.
            memory: As in `chunks`, times the attempt's share.
        """
        return Patching(
            self.runner,
            [self.each[i] for i in chunk],
            places,
            held,
            metric,
            direction,
            packed=not self.unpacked,
            batch_tokens=pass_tokens(self.runner.model, memory),
        )

    def _bytes(self, chunk: Sequence[int], places: Sequence[str], held: Sequence[str]) -> int:
        """What a chunk's runs keep: residual streams, values asked for, attention keys and values."""
        cfg = self.runner.model.cfg
        longest = max(len(self.each[i].ids) for i in chunk)
        runs = sum(self.each[i].samples + 1 for i in chunk)
        widest = max([cfg.d_model, *(_width(cfg, place) for place in (*places, *held))])
        values = (self.runner.n_layers + 1) * cfg.d_model + len({*places, *held}) * widest
        # Twice, as sheets hold copies of the past.
        past = 4 * self.runner.n_layers * (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head
        return runs * longest * (values + past) * torch.finfo(cfg.dtype).bits // 8


def ask(model: Model, facts: Sequence[Fact], rows: Sequence[Aligned], corruption: Corruption) -> TraceInputs:
    """Corrupt the subjects of some facts.

    Args:
        model: Either class, inside `frozen` and without gradients.
        facts: The facts.
        rows: Their prompts.
        corruption: What to do to their subjects.
    """
    runner = Runner(model)
    subjects = tuple(subject_of(runner, fact, row) for fact, row in zip(facts, rows, strict=True))
    corruption = corruption.calibrated(subjects)
    each = tuple(
        Question(fact, row, drawn, _contrast(corruption, subject, row, len(drawn)))
        for fact, row, subject, drawn in zip(facts, rows, subjects, map(corruption.draw, subjects), strict=True)
    )
    longest = max(each, key=lambda question: len(question.ids))
    return TraceInputs(runner, corruption, subjects, each, runner.why_not_packed(longest.ids, len(longest.ids)))


def check_contrasts(facts: Sequence[Fact], rows: Sequence[Aligned], metric: Metric, corruption: Corruption) -> None:
    """Check that ``logit_diff`` has an answer to set against each fact's: another first token than its own."""
    if metric is not logit_diff or isinstance(corruption, TokenReplacement):
        return
    for fact, row in zip(facts, rows, strict=True):
        if row.same_first_token:
            raise ValueError(
                f"metric 'logit_diff' compares first tokens, but {fact.target_true!r} and {fact.target_new!r} of "
                f"{fact.name!r} have the same: take another metric, or another target_new"
            )
        if fact.target_new is None:
            raise ValueError(
                f"metric 'logit_diff' has nothing to set against {fact.target_true!r} of {fact.name!r}, needed "
                "target_new, or a corruption with an answer of its own: take TokenReplacement()"
            )


def align_all(model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> list[Aligned]:
    """The facts' prompts as the model runs them."""
    need_old_object(facts, "a trace")
    return tokens.align_all(model.tokenizer, facts, prepend_bos=prepend_bos, room=getattr(model.cfg, "n_ctx", None))


def _contrast(corruption: Corruption, subject: Subject, row: Aligned, samples: int) -> Tensor | None:
    own = corruption.contrast(subject)
    if own is not None:
        return own
    return None if row.new_ids is None else row.new_ids[:1].expand(samples)


def _width(cfg: Any, place: str) -> int:
    """How many numbers a place has for a token."""
    if place.endswith("mlp.hook_post"):
        return int(getattr(cfg, "d_mlp", None) or 4 * cfg.d_model)
    if place.endswith("attn.hook_z"):
        return int(cfg.n_heads * cfg.d_head)
    return int(cfg.d_model)


def donor_texts(questions: TraceInputs) -> tuple[tuple[str, ...], ...]:
    """For each fact, whose tokens replace its subject's; empty with noise."""
    if not isinstance(questions.corruption, TokenReplacement):
        return ((),) * len(questions.each)
    donors = questions.corruption.donors
    return tuple(tuple(donor.fact.subject for donor in donors[question.fact]) for question in questions.each)
