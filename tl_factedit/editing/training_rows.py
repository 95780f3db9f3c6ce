"""What fine-tuning learns from: rows of prompts and targets, and some facts' rows as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import align, pad
from tl_factedit.editing.objectives import EditTarget, set_subjects


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The rows of one target: each context and the prompt, followed by the target but its last token.

    Attributes:
        edit_target: What is wanted.
        rows: Token ids.
        subject: Where it lies in each row, (start, stop).
        target: The target's ids in each row.
    """

    edit_target: EditTarget
    rows: tuple[Int[Tensor, "_"], ...]
    subject: tuple[tuple[int, int], ...]
    target: tuple[Int[Tensor, "_"], ...]

    @classmethod
    def of(cls, model: Model, edit_target: EditTarget, contexts: Sequence[str], prepend_bos: bool) -> TrainingRows:
        """Align a fact's prompt and target after each context."""
        found = [align(model.tokenizer, edit_target.fact, prepend_bos=prepend_bos, prefix=x) for x in contexts]
        targets = tuple(row.new_ids for row in found if row.new_ids is not None)
        if len(targets) < len(found):
            raise ValueError(f"the target of {edit_target.fact.name!r} has no target_new: the objective must name one")
        rows = tuple(torch.cat([row.ids, target[:-1]]) for row, target in zip(found, targets, strict=True))
        return cls(edit_target, rows, tuple(row.subject for row in found), targets)

    def need(self, token: int, read: int) -> int:
        """Bytes of its graph, at so many a token and a logit row."""
        return sum(map(len, self.rows)) * token + sum(map(len, self.target)) * read


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The rows of some facts that are run at once.

    Attributes:
        facts: Their places among all facts.
        tokens: [row pos].
        stream: Before the first layer that is changed, [row pos d_model].
        at: Rows and positions of the logits that the loss reads, those of a row together.
        target: The token that each is to predict.
        row: The row of each.
        fact: Which of `facts` a row belongs to.
        share: What a row counts in its fact's mean.
        length: How many tokens its target has.
        unlikely: For each of `facts`.
    """

    facts: list[int]
    tokens: Int[Tensor, "row pos"]
    stream: Float[Tensor, "row pos d_model"]
    at: tuple[Tensor, Tensor]
    target: Int[Tensor, "read"]
    row: Int[Tensor, "read"]
    fact: Int[Tensor, "row"]
    share: Float[Tensor, "row"]
    length: Float[Tensor, "row"]
    unlikely: Tensor

    @classmethod
    def of(cls, runner: Runner, asked: Sequence[TrainingRows], facts: list[int], first: int) -> TrainingBatch:
        """Run the rows of some facts up to the first layer that is changed."""
        some = [asked[i] for i in facts]
        tokens = pad([row for each in some for row in each.rows], 0)
        targets = [target for each in some for target in each.target]
        ends = [len(row) for each in some for row in each.rows]
        at = [
            (r, end - len(target) + i)
            for r, (end, target) in enumerate(zip(ends, targets, strict=True))
            for i in range(len(target))
        ]
        with torch.no_grad():
            place = resid_pre(first)
            given = set_subjects([(each.edit_target, span) for each in some for span in each.subject])
            stream = runner.capture(tokens, [place], stop=first, hooks=given)[place]
        where = stream.device
        return cls(
            facts=facts,
            tokens=tokens,
            stream=stream,
            at=(torch.tensor([r for r, _ in at]), torch.tensor([p for _, p in at])),
            target=torch.cat(targets).to(where),
            row=torch.tensor([r for r, _ in at], device=where),
            fact=torch.tensor([k for k, each in enumerate(some) for _ in each.rows], device=where),
            share=torch.tensor([1 / len(each.rows) for each in some for _ in each.rows], device=where),
            length=torch.tensor([float(len(target)) for target in targets], device=where),
            unlikely=torch.tensor([each.edit_target.unlikely for each in some], device=where),
        )
