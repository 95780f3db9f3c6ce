"""The optimisation of values: rows, losses and steps of many facts at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.packed_rows import PackedRows
from tl_factedit.backend.packing import Packing, Past
from tl_factedit.backend.protocol import Hook, Model, Place
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import Aligned, align, pad
from tl_factedit.editing.objectives import EditTarget, set_subjects
from tl_factedit.editing.value_fit import Fitted, ValueFit, Where


@dataclass(frozen=True, eq=False)
class FitRows:
    """The rows of one target: its contexts, each followed by the target but its last token, then the KL prompts.

    Attributes:
        edit_target: What is wanted.
        rows: Token ids.
        subjects: Where the subject lies in each row, (start, stop); δ is added at its last token.
        read: For each row, the positions whose logits the loss reads.
        target: The target's ids, for each context.
    """

    edit_target: EditTarget
    rows: tuple[Int[Tensor, "_"], ...]
    subjects: tuple[tuple[int, int], ...]
    read: tuple[range, ...]
    target: Int[Tensor, "context target"]

    @classmethod
    def of(
        cls, model: Model, edit_target: EditTarget, contexts: Sequence[str], fit: ValueFit, prepend_bos: bool
    ) -> FitRows:
        """Align a fact's prompt and target after each context, and its KL prompts."""
        fact = edit_target.fact
        rewrite = [align(model.tokenizer, fact, prepend_bos=prepend_bos, prefix=x) for x in contexts]
        guard = [align(model.tokenizer, fact, prepend_bos=prepend_bos, template=t) for t in fit.kl_prompts]
        length = rewrite[0].subject[1] - rewrite[0].subject[0]
        if edit_target.embeddings is not None and len(edit_target.embeddings) != length:
            raise ValueError(
                f"the target of {fact.name!r} has embeddings of {len(edit_target.embeddings)} tokens, needed one for "
                f"each of the {length} tokens of {fact.subject!r} in the prompt"
            )
        targets = [_new_ids(row) for row in rewrite]
        if len({len(t) for t in targets}) > 1:
            raise ValueError(f"target {fact.target_new!r} is spelt in different lengths after different contexts")
        read = [range(len(row.ids) - 1, len(row.ids) - 1 + len(targets[0])) for row in rewrite]
        ends = [row.last if fit.kl_at == "subject" else len(row.ids) - 1 for row in guard]
        # A row needs no token after the last one that is read.
        return cls(
            edit_target=edit_target,
            rows=(
                *(torch.cat([row.ids, t[:-1]]) for row, t in zip(rewrite, targets, strict=True)),
                *(row.ids[: end + 1] for row, end in zip(guard, ends, strict=True)),
            ),
            subjects=tuple(row.subject for row in (*rewrite, *guard)),
            read=(*read, *(range(end, end + 1) for end in ends)),
            target=torch.stack(targets),
        )

    @property
    def contexts(self) -> int:
        """How many of the rows are contexts."""
        return len(self.target)

    @property
    def lookup(self) -> list[int]:
        """Of each row, the position of the last subject token."""
        return [stop - 1 for _, stop in self.subjects]

    @property
    def queries(self) -> list[int]:
        """How many tokens of each row have to be run at a step."""
        return [len(row) - at for row, at in zip(self.rows, self.lookup, strict=True)]


def _new_ids(row: Aligned) -> Int[Tensor, "target"]:
    if row.new_ids is None:
        raise ValueError("the fact has no target_new")
    return row.new_ids


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is run at a step: the facts that are still moving.

    Attributes:
        facts: Their places in the batch.
        fact: Which of `facts` each piece is of, [piece].
        tokens: [row query].
        own: Rows and queries of the last subject tokens, a pair for each piece.
        at: Rows and queries of the logits: first those of targets, then those of KL prompts.
        target: The ids of the first.
        of_context: Which context (counted over all facts) they belong to.
        context_fact: Which of `facts` each context is of.
        context_share: What it counts in its fact's mean.
        length: How many tokens its target has.
        unlikely: Which of `facts` are to become unlikely.
        norms: What δ is measured by, [fact place].
        of_guard: Which of `facts` each KL prompt is of.
        guard_share: What it counts in its fact's mean.
        stream: Before the first block that is run, [row query d_model].
        packing: None where rows are whole sequences.
    """

    facts: list[int]
    fact: Tensor
    tokens: Tensor
    own: tuple[Tensor, Tensor]
    at: tuple[Tensor, Tensor]
    target: Tensor
    of_context: Tensor
    context_fact: Tensor
    context_share: Tensor
    length: Tensor
    unlikely: Tensor
    norms: Tensor
    of_guard: Tensor
    guard_share: Tensor
    stream: Tensor
    packing: Packing | None


class Descent:
    """The optimisation of some facts' values at once."""

    def __init__(
        self,
        runner: Runner,
        asked: Sequence[FitRows],
        layer: int,
        where: Where,
        fit: ValueFit,
        *,
        packed: bool,
    ) -> None:
        self.runner, self.asked, self.fit, self.where = runner, asked, fit, where
        self.packed = packed
        self.rows = [row for each in asked for row in each.rows]
        self.lookup = [at for each in asked for at in each.lookup]
        self.first = [sum(len(each.rows) for each in asked[:i]) for i in range(len(asked) + 1)]
        self.tokens = pad(self.rows, 0)
        site = down_proj(runner.model, layer)
        attention = component_hook("attn", layer)
        with torch.no_grad():
            places = [site.key_hook, resid_pre(layer), resid_post(layer)]
            if isinstance(site.value_at, str):
                places += [site.value_at, component_hook("mlp", layer)]
            if where == "modules":
                places.append(attention)
            below, self.past = self._clean([*dict.fromkeys(places)])

            def at_lookup(place: str) -> Tensor:
                return self.clean.at(below[place], torch.arange(len(self.rows)), torch.tensor(self.lookup)).double()

            self.keys = at_lookup(site.key_hook)
            self.outputs = at_lookup(resid_post(layer)) if where == "resid" else site.value(self.keys)
            bare = torch.tensor(self.first[:-1])
            before = [at_lookup(attention), self.outputs] if where == "modules" else [self.outputs]
            self.norms = torch.stack([each[bare].norm(dim=-1).float() for each in before], 1)
            # Where nothing stands between W_out and the stream, δ goes into the stream, and the block isn't run again.
            into_stream = where == "resid" or (where == "mlp" and site.reaches_stream(below))
            self.hooked: list[Place] = [attention] if where == "modules" else []
            self.hooked += [] if into_stream else [site.value_at]
            self.begin = layer + 1 if into_stream else layer
            self.stream = below[resid_post(layer) if into_stream else resid_pre(layer)]

    def _clean(self, places: list[str]) -> tuple[dict[str, Tensor], Past | None]:
        """One run without δ of all rows: what stands at some places, and the attention keys and values."""
        lengths = list(map(len, self.rows))
        self.clean = PackedRows.of(lengths, [0] * len(lengths), apart=not self.packed, most_keys=self.runner.most_keys)
        hooks = set_subjects([(each.edit_target, subject) for each in self.asked for subject in each.subjects])
        if not self.packed:
            return self.runner.capture(self.tokens, places, hooks=hooks), None
        # Each sequence in a row of its own up to the first block, as some models add a place's embedding there.
        stream = self.runner.capture(self.tokens, [resid_pre(0)], stop=0, hooks=hooks)[resid_pre(0)]
        owner, where = self.clean.owner, self.clean.places
        packing = self.clean.packing(None, stream.device)
        return self.runner.remember(self.tokens[owner, where], places, resid=stream[owner, where], packing=packing)

    def _active(self, facts: list[int]) -> _Rows:
        """The rows of some of the facts."""
        some = [self.asked[i] for i in facts]
        index = [j for i in facts for j in range(self.first[i], self.first[i + 1])]
        begins = [self.lookup[j] if self.packed else 0 for j in index]
        lengths = [len(self.rows[j]) - b for j, b in zip(index, begins, strict=True)]
        sheet = PackedRows.of(
            lengths,
            begins,
            apart=not self.packed,
            mixed=self.runner.mixes_pasts,
            most_keys=self.runner.most_keys,
        )
        offset = sheet.start - torch.tensor(begins)  # from a place in the sequence to a query
        read = [each.read[j] for each in some for j in range(len(each.rows))]
        is_context = [j < each.contexts for each in some for j in range(len(each.rows))]
        contexts = [p for p, yes in enumerate(is_context) if yes]
        guards = [p for p, yes in enumerate(is_context) if not yes]
        at = [(int(sheet.row[p]), int(offset[p]) + place) for p in (*contexts, *guards) for place in read[p]]
        fact = torch.tensor([k for k, each in enumerate(some) for _ in each.rows])
        of_context = torch.tensor([c for c, p in enumerate(contexts) for _ in read[p]])
        context_fact, of_guard = fact[contexts], fact[guards]
        where = self.stream.device
        rows = torch.tensor(index)
        return _Rows(
            facts=facts,
            fact=fact.to(where),
            tokens=self.tokens[rows[sheet.owner], sheet.places],
            own=(sheet.row.to(where), (offset + torch.tensor([self.lookup[j] for j in index])).to(where)),
            at=(torch.tensor([r for r, _ in at]), torch.tensor([q for _, q in at])),
            target=torch.cat([each.target.flatten() for each in some]).to(where),
            of_context=of_context.to(where),
            context_fact=context_fact.to(where),
            context_share=(1 / context_fact.bincount(minlength=len(facts))[context_fact]).to(where),
            length=torch.tensor([float(len(read[p])) for p in contexts], device=where),
            unlikely=torch.tensor([each.edit_target.unlikely for each in some], device=where),
            norms=self.norms[torch.tensor(facts)].to(where),
            of_guard=of_guard.to(where),
            guard_share=(1 / of_guard.bincount(minlength=len(facts))[of_guard]).to(where),
            stream=self.clean.at(self.stream, rows[sheet.owner], sheet.places),
            packing=self._packing(sheet, rows) if self.packed else None,
        )

    def _packing(self, sheet: PackedRows, rows: Tensor) -> Packing:
        assert self.past is not None
        # What is nothing is seen by nobody; any value will do.
        of, places = rows[sheet.behind.clamp(min=0)], sheet.behind_places
        first = min(self.begin, len(self.past) - 1)
        behind = [
            (self.clean.at(keys, of, places), self.clean.at(values, of, places)) for keys, values in self.past[first:]
        ]
        # Blocks below aren't run, but a cache counts them.
        past = (*behind[:1] * first, *behind)
        return sheet.packing(past, self.stream.device)

    def run(self, stepped: Callable[[int], Any] = lambda _: None) -> list[Fitted]:
        """Step until every fact has stopped.

        Args:
            stepped: Told after each step how many facts have made it.
        """
        fit, count = self.fit, len(self.asked)
        where = self.stream.device
        found = torch.zeros(count, self.norms.shape[1], self.stream.shape[-1], device=where)
        losses: list[list[float]] = [[] for _ in self.asked]
        probs: list[list[float]] = [[] for _ in self.asked]
        stopped: list[Literal["loss", "kl", "steps"]] = ["steps"] * count
        clamped = [0] * count
        counts = [1.0] * count  # what the first term of each loss does
        rows = self._active(list(range(count)))
        # Of the facts that are still moving; what is to be known of them on the CPU is fetched once a step.
        search = fit.method.begin(found.clone(), fit.clamp * rows.norms, fit.lr)
        moved = torch.tensor([[1.0, 0.0]], device=where).expand(count, 2)  # finite, and clamped
        before: list[Tensor | None] = [None] * count  # the KL prompts' log-probabilities without δ
        for step in range(fit.steps):
            with torch.enable_grad():
                own = search.at.clone().requires_grad_()
                now = self._loss(rows, own, [counts[i] for i in rows.facts], before)
                total = now.loss.sum()
                if step == 0:
                    # δ is 0 here: what is said now is what was said before.
                    before = [now.guard[rows.of_guard == k].detach() for k in range(count)]
            stepped(len(rows.facts))
            for i, (loss, prob, kl, first, finite, beyond) in zip(rows.facts, now.table(moved), strict=True):
                name = self.asked[i].edit_target.fact.name
                if not finite:
                    raise RuntimeError(f"the value of {name!r} is not finite after step {step - 1}: lower ValueFit.lr")
                clamped[i] += bool(beyond)
                losses[i].append(loss)
                probs[i].append(prob)
                if not math.isfinite(loss):
                    raise RuntimeError(
                        f"the loss of {name!r} is {loss} at step {step}: the model overflows with this value (lower "
                        "ValueFit.lr or clamp, or load the model in float32)"
                    )
                if self.asked[i].edit_target.unlikely:
                    continue
                counts[i] = fit.ease if first else 1.0
                if loss < fit.stop_below:
                    stopped[i] = "loss"
                elif fit.stop_kl is not None and first and kl <= fit.stop_kl:
                    stopped[i] = "kl"
            going = [k for k, i in enumerate(rows.facts) if stopped[i] == "steps"]
            last = step == fit.steps - 1 or not going
            if last or len(going) < len(rows.facts):
                with torch.no_grad():
                    found[torch.tensor(rows.facts)] = search.found(now.loss.detach())
            if last:
                break
            (gradient,) = torch.autograd.grad(total, own)
            with torch.no_grad():
                loss = now.loss.detach()
                if len(going) < len(rows.facts):
                    rows = self._active([rows.facts[k] for k in going])
                    left = torch.tensor(going, device=where)
                    search, loss, gradient = search.of(left), loss[left], gradient[left]
                moved = search.step(loss, gradient)
        delta, keys, outputs = found.double().cpu(), self.keys.cpu(), self.outputs.detach().cpu()
        return [
            Fitted(
                delta=delta[i, -1],
                keys=keys[self.first[i] : self.first[i] + each.contexts],
                outputs=outputs[self.first[i] : self.first[i] + each.contexts],
                losses=tuple(losses[i]),
                target_prob=tuple(probs[i]),
                stopped=stopped[i],
                clamped=clamped[i],
                attn_delta=delta[i, 0] if self.where == "modules" else None,
            )
            for i, each in enumerate(self.asked)
        ]

    def _loss(
        self,
        rows: _Rows,
        delta: Float[Tensor, "fact place d_model"],
        counts: Sequence[float],
        before: Sequence[Tensor | None],
    ) -> _Loss:
        def adder(place: int) -> Any:
            def add(value: Tensor, hook: Any = None) -> Tensor:
                own = (rows.own[0].to(value.device), rows.own[1].to(value.device))
                return value.index_put(own, delta[rows.fact, place].to(value), accumulate=True)

            return add

        hooks: list[Hook] = [(place, adder(i)) for i, place in enumerate(self.hooked)]
        stream = rows.stream if hooks else adder(0)(rows.stream)
        logits = self.runner.logits(
            rows.tokens, at=rows.at, start=(self.begin, stream), hooks=hooks, packing=rows.packing
        )[0]
        log_p = logits.float().log_softmax(-1)
        said, guard = log_p[: len(rows.target)], log_p[len(rows.target) :]
        target = said.gather(-1, rows.target[:, None])[:, 0]
        zero = torch.zeros(len(delta), device=delta.device)
        per_context = torch.zeros_like(rows.length).index_add(0, rows.of_context, target)
        wanted = torch.where(rows.unlikely[rows.context_fact], per_context.exp(), -per_context / rows.length)
        loss = zero.index_add(0, rows.context_fact, wanted * rows.context_share)
        if any(each != 1 for each in counts):
            loss = loss * torch.tensor(counts).to(zero)
        loss = loss + self.fit.decay * (delta.norm(dim=-1) / rows.norms**2).sum(-1)
        kl = zero
        if len(guard):
            was = [before[i] for i in rows.facts]
            reference = guard.detach() if was[0] is None else torch.cat([each for each in was if each is not None])
            each = (guard.exp() * (guard - reference)).sum(-1)
            kl = self.fit.kl_weight * zero.index_add(0, rows.of_guard, each * rows.guard_share)
            loss = loss + kl
        share = (rows.context_share / rows.length)[rows.of_context]
        of_target = rows.context_fact[rows.of_context]
        first = zero.bool()
        if self.fit.ease != 1 or self.fit.stop_kl is not None:
            behind = (said.detach().max(-1).values > target.detach()).float()
            first = zero.index_add(0, of_target, behind) == 0
        return _Loss(
            loss=loss,
            prob=zero.index_add(0, of_target, target.detach().exp() * share),
            kl=kl.detach(),
            first=first,
            guard=guard,
        )


@dataclass(frozen=True, eq=False)
class _Loss:
    """Each fact's loss at a step, and what else is read there.

    Attributes:
        loss: With its graph.
        prob: Mean probability of a target token.
        kl: a · KL.
        first: Whether the target comes first everywhere; False if nobody asks.
        guard: What the KL prompts say now, log-probabilities.
    """

    loss: Float[Tensor, "fact"]
    prob: Float[Tensor, "fact"]
    kl: Float[Tensor, "fact"]
    first: Bool[Tensor, "fact"]
    guard: Float[Tensor, "guard vocab"]

    def table(self, moved: Float[Tensor, "fact 2"]) -> list[list[float]]:
        """Each fact's loss, probability, KL and whether the target comes first, then what is given; fetched at once."""
        said = torch.stack([self.loss.detach(), self.prob, self.kl, self.first.float()], 1)
        return torch.cat([said, moved], 1).tolist()
