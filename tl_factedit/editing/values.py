"""What an edit is to write: v*, the value that makes the model say the new object. The only gradient loop.

    L(δ) = mean_j −1/T Σ_i log p(o_i | x_j + prompt; v + δ)  +  a · KL(p_δ ‖ p_0)  +  b · ‖δ‖ / ‖v‖²

after Meng et al. 2022 (arXiv:2202.05262, eq. 4) and their code, where the weight decay takes the norm of δ,
not its square. δ is added at the last subject token of every context: to the output of ``W_out`` (ROME), to the
residual stream after the block (MEMIT), or to the outputs of the attention and of ``W_out``, a δ each (PMET). For an
object that is to become unlikely the first term is mean_j p(o | x_j + prompt), and nothing stops early (Hase et al.
2023, arXiv:2301.04213, app. B).

Only the blocks above are run, only the tokens from the last subject token on (what lies before is read from the
attention keys and values of one clean run), and only the logits that the loss reads; many facts at once, each with its
own stop and clamp. The pieces of sequences that are left stand side by side in rows of one width, so that little is
padded (`model.Packing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.core.facts import Fact
from tl_factedit.backend.model import (
    Hook,
    Model,
    Packing,
    Past,
    Place,
    Runner,
    component_hook,
    down_proj,
    drop_graphs,
    quiet,
    resid_post,
    resid_pre,
)
from tl_factedit.editing.objectives import Wish, set_subjects
from tl_factedit.core.tokens import Aligned, align, pad

Where = Literal["mlp", "resid", "modules"]
"""Where δ is added: to what ``W_out`` answers, to the stream after the block, or (PMET) one δ to what the attention and
one to what ``W_out`` hands on."""

GIB = 1 << 30

TRIAL = 8
"""On how many tokens it is tried whether a model can be run packed."""


@dataclass(frozen=True)
class ValueFit:
    """How a value is optimised; the defaults are those of Meng et al.'s code.

    Attributes:
        steps: Evaluations of the loss; one fewer updates (the last one is only read).
        lr: Of Adam.
        kl_weight: a, the weight of what the subject is said to be staying as it was.
        decay: b, the weight of ‖δ‖ / ‖v‖².
        clamp: ‖δ‖ is kept at or below this many ‖v‖.
        stop_below: Stop early once the loss is below.
        kl_prompts: Templates about the subject whose prediction is to stay as it was.
        kl_at: Where it is read: at the last ``"subject"`` token (Meng et al.), or at the ``"end"``
            of the prompt, which guards the subject's other relations better.
        ease: What the first term counts at the step after one at which the new object came first everywhere (each of
            its tokens, in every context): 1 for the same as always, 0.1 in PMET's code.
        stop_kl: Stop early at such a step if a · KL is at most this (0.01 in PMET's code); None: don't.
    """

    steps: int = 20
    lr: float = 0.5
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    stop_below: float = 0.05
    kl_prompts: Sequence[str] = ("{} is a",)
    kl_at: Literal["subject", "end"] = "subject"
    ease: float = 1.0
    stop_kl: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers and choices."""
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, needed at least 1 (which only reads the loss)")
        for name in ("lr", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, needed more than 0")
        for name in ("kl_weight", "decay", "ease"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, needed 0 or more")
        if self.kl_at not in ("subject", "end"):
            raise ValueError(f"kl_at {self.kl_at!r} is unknown, needed 'subject' or 'end'")
        if isinstance(self.kl_prompts, str):
            raise ValueError(
                f"kl_prompts is the string {self.kl_prompts!r}, needed a list: write [{self.kl_prompts!r}]"
            )
        if not isinstance(self.kl_prompts, Sequence):
            raise ValueError(f"kl_prompts is {self.kl_prompts!r}, needed a list of templates")


@dataclass(frozen=True)
class Fitted:
    """A fitted value, and what happened on the way.

    Attributes:
        delta: δ, [d_model], float64; of two, that of ``W_out``.
        keys: The key at the last subject token in each context, [context d_mlp], float64; the
            bare prompt is the first.
        outputs: What stands there now where δ is added, [context d_model], float64: the answer of ``W_out``, or the
            residual stream after the block.
        losses: The loss before each step.
        target_prob: Mean probability of a token of the object over contexts, before each step.
        stopped: Why it ended: ``"loss"``, ``"kl"`` or ``"steps"``.
        clamped: At how many steps δ had to be projected back.
        attn_delta: The δ of the attention's output, where there are two.
    """

    delta: Float[Tensor, "d_model"]
    keys: Float[Tensor, "context d_mlp"]
    outputs: Float[Tensor, "context d_model"]
    losses: tuple[float, ...]
    target_prob: tuple[float, ...]
    stopped: Literal["loss", "kl", "steps"]
    clamped: int
    attn_delta: Float[Tensor, "d_model"] | None = None


def fit_values(
    model: Model,
    wishes: Sequence[Fact | Wish],
    layer: int,
    contexts: Sequence[str],
    *,
    where: Where = "mlp",
    fit: ValueFit | None = None,
    prepend_bos: bool,
    memory: float = 2.0,
    progress: bool = True,
) -> list[Fitted]:
    """Find, for each wish, the δ that makes the model go on with its fact's ``target_new`` (or not, if it says so).

    Args:
        model: Either class; its weights don't change.
        wishes: What is wanted; a fact alone: that its ``target_new`` becomes likely.
        layer: Whose output gets δ.
        contexts: Prefixes; the first must be the bare one, ``""``.
        where: Of `Where`.
        fit: Hyperparameters.
        prepend_bos: BOS policy.
        memory: What activations may take, in GiB: sets how many facts are fitted at once.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The fitted values; the same as for each fact alone, but for rounding.

    Raises:
        ValueError: A fact has no ``target_new``, or embeddings are given for another number of tokens than its subject
            has.
        RuntimeError: A loss or δ is not finite.
    """
    fit = fit or ValueFit()
    wanted = [Wish(each) if isinstance(each, Fact) else each for each in wishes]
    for wish in wanted:
        if wish.fact.target_new is None:
            raise ValueError(
                f"fact {wish.fact.name!r} has no target_new, needed one to write: fact.but(target_new=...)"
            )
    if not contexts or contexts[0]:
        raise ValueError('contexts must begin with the bare one, ""')
    down_proj(model, layer)
    asked = [_Asked.of(model, wish, contexts, fit, prepend_bos) for wish in wanted]
    found: dict[int, Fitted] = {}
    with (
        quiet(model),
        tqdm(total=len(asked), unit="fact", desc="fitting values", delay=1, disable=not progress) as bar,
    ):
        runner = Runner(model)
        with torch.no_grad():
            longest = max((row for each in asked for row in each.rows), key=len)
            packed = not runner.packs(longest[:TRIAL], len(longest))
        # A HookedTransformer turns the keys of a past by where they stand in it, so that it has to be of one sequence.
        mixed = packed and runner.kind == "bridge"
        for batch in _batches(model, asked, layer, memory, mixed=mixed):
            some = [asked[i] for i in batch]
            try:
                done = _Descent(runner, some, layer, where, fit, packed=packed, mixed=mixed).run()
            finally:
                drop_graphs(model)
            found.update(zip(batch, done, strict=True))
            bar.update(len(batch))
    return [found[i] for i in range(len(asked))]


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class _Asked:
    """The rows of one wish: its contexts, each followed by the target but its last token, then the KL prompts.

    Attributes:
        wish: What is wanted.
        rows: Token ids.
        subjects: Where the subject lies in each row, (start, stop); δ is added at its last token.
        read: Of each row, the positions whose logits the loss reads.
        target: The target's ids, for each context.
    """

    wish: Wish
    rows: tuple[Int[Tensor, "_"], ...]
    subjects: tuple[tuple[int, int], ...]
    read: tuple[range, ...]
    target: Int[Tensor, "context target"]

    @classmethod
    def of(cls, model: Model, wish: Wish, contexts: Sequence[str], fit: ValueFit, prepend_bos: bool) -> _Asked:
        fact = wish.fact
        rewrite = [align(model.tokenizer, fact, prepend_bos=prepend_bos, prefix=x) for x in contexts]
        guard = [align(model.tokenizer, fact, prepend_bos=prepend_bos, template=t) for t in fit.kl_prompts]
        length = rewrite[0].subject[1] - rewrite[0].subject[0]
        if wish.embeddings is not None and len(wish.embeddings) != length:
            raise ValueError(
                f"the wish of {fact.name!r} has embeddings of {len(wish.embeddings)} tokens, needed one for each of "
                f"the {length} tokens of {fact.subject!r} in the prompt"
            )
        targets = [_new_ids(row) for row in rewrite]
        if len({len(t) for t in targets}) > 1:
            raise ValueError(f"target {fact.target_new!r} is spelt in different lengths after different contexts")
        read = [range(len(row.ids) - 1, len(row.ids) - 1 + len(targets[0])) for row in rewrite]
        ends = [row.last if fit.kl_at == "subject" else len(row.ids) - 1 for row in guard]
        # A row needs no token after the last one that is read.
        return cls(
            wish=wish,
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


def _batches(model: Model, asked: Sequence[_Asked], layer: int, memory: float, *, mixed: bool) -> Iterator[list[int]]:
    """As many facts at a time as their graphs leave room for; those of one width, if shorter rows can't be joined."""
    cfg = model.cfg
    above = len(model.blocks) - layer  # type: ignore[attr-defined]
    token = above * (12 * cfg.d_model + 6 * (cfg.d_mlp or 4 * cfg.d_model)) * 4
    widths = [0 if mixed else max(each.queries) for each in asked]
    batch: list[int] = []
    used = 0
    for i in sorted(range(len(asked)), key=lambda i: widths[i]):
        need = sum(asked[i].queries) * token + sum(map(len, asked[i].read)) * 4 * 4 * cfg.d_vocab
        if batch and (used + need > memory * GIB or widths[i] != widths[batch[-1]]):
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += need
    if batch:
        yield batch


# ------------------------------------------------------------------------------------ pieces side by side


@dataclass(frozen=True, eq=False)
class _Sheet:
    """Pieces of sequences, several in a row, each behind what comes before it in its own sequence.

    Attributes:
        row: In which row each piece stands, [piece].
        start: At which of the row's tokens it begins, [piece].
        owner: Which piece each token is of, [row query]; what fills a row up repeats the row's last token.
        places: Each token's place in its own sequence, [row query].
        visible: What each token attends to: what is behind its piece, then the row's tokens, [row query key].
        behind: What is behind the pieces of each row: of which piece, [row past], −1 for nothing.
        behind_places: And its place in that piece's sequence, [row past].
    """

    row: Int[Tensor, "piece"]
    start: Int[Tensor, "piece"]
    owner: Int[Tensor, "row query"]
    places: Int[Tensor, "row query"]
    visible: Bool[Tensor, "row query key"]
    behind: Int[Tensor, "row past"]
    behind_places: Int[Tensor, "row past"]

    @classmethod
    def of(cls, lengths: Sequence[int], begins: Sequence[int], *, apart: bool = False, mixed: bool = True) -> _Sheet:
        """Lay out pieces by how long they are and at which place of its sequence each begins.

        Rows are as wide as the longest piece. A shorter one goes where there is room and the least behind.

        Args:
            lengths: Of each piece.
            begins: How many tokens of its sequence come before it.
            apart: Whether each gets a row of its own.
            mixed: Whether what is behind the pieces of a row may be of several sequences.
        """
        width = max(lengths)
        rows: list[list[int]] = []
        used: list[int] = []
        depth: list[int] = []
        for piece in range(len(lengths)) if apart else sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            free = [
                r
                for r, taken in enumerate(used)
                if taken + lengths[piece] <= width and (mixed or not depth[r] or not begins[piece])
            ]
            if free and not apart:
                r = min(free, key=lambda r: depth[r])
            else:
                r = len(rows)
                rows.append([])
                used.append(0)
                depth.append(0)
            rows[r].append(piece)
            used[r] += lengths[piece]
            depth[r] += begins[piece]
        deepest = max(depth)
        row, start = torch.zeros(len(lengths), dtype=torch.long), torch.zeros(len(lengths), dtype=torch.long)
        owner, places = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        behind = torch.full((len(rows), deepest), -1)
        behind_places = torch.zeros(len(rows), deepest, dtype=torch.long)
        for r, pieces in enumerate(rows):
            here = before = 0
            for piece in pieces:
                n, b = lengths[piece], begins[piece]
                row[piece], start[piece] = r, here
                owner[r, here:] = piece
                places[r, here : here + n] = torch.arange(b, b + n)
                places[r, here + n :] = b + n - 1
                behind[r, before : before + b] = piece
                behind_places[r, before : before + b] = torch.arange(b)
                here += n
                before += b
            real[r, :here] = True
        of_one = (owner[:, :, None] == owner[:, None]) & (places[:, :, None] >= places[:, None])
        alone = torch.eye(width, dtype=torch.bool)  # what fills a row up sees itself
        own = of_one & real[:, :, None] & real[:, None] | alone
        visible = torch.cat([(behind[:, None] == owner[:, :, None]) & real[:, :, None], own], -1)
        return cls(row, start, owner, places, visible, behind, behind_places)

    def at(self, values: Float[Tensor, "row query *rest"], piece: Tensor, place: Tensor) -> Tensor:
        """The values of some pieces at some places, counted from the piece's beginning."""
        return values[self.row[piece].to(values.device), (self.start[piece] + place).to(values.device)]


# ------------------------------------------------------------------------------------ the descent


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
    of_guard: Tensor
    guard_share: Tensor
    stream: Tensor
    packing: Packing | None


class _Descent:
    """The optimisation of some facts' values at once."""

    def __init__(
        self,
        runner: Runner,
        asked: Sequence[_Asked],
        layer: int,
        where: Where,
        fit: ValueFit,
        *,
        packed: bool,
        mixed: bool,
    ) -> None:
        self.runner, self.asked, self.fit, self.where = runner, asked, fit, where
        self.packed, self.mixed = packed, mixed
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
        self.clean = _Sheet.of(lengths, [0] * len(lengths), apart=not self.packed)
        hooks = set_subjects([(each.wish, subject) for each in self.asked for subject in each.subjects])
        if not self.packed:
            return self.runner.capture(self.tokens, places, hooks=hooks), None
        # Each sequence in a row of its own up to the first block, as some models add a place's embedding there.
        stream = self.runner.capture(self.tokens, [resid_pre(0)], stop=0, hooks=hooks)[resid_pre(0)]
        owner, where = self.clean.owner, self.clean.places
        packing = Packing(where.to(stream.device), self.clean.visible.to(stream.device))
        return self.runner.remember(self.tokens[owner, where], places, resid=stream[owner, where], packing=packing)

    def _active(self, facts: list[int]) -> _Rows:
        """The rows of some of the facts."""
        some = [self.asked[i] for i in facts]
        index = [j for i in facts for j in range(self.first[i], self.first[i + 1])]
        begins = [self.lookup[j] if self.packed else 0 for j in index]
        lengths = [len(self.rows[j]) - b for j, b in zip(index, begins, strict=True)]
        sheet = _Sheet.of(lengths, begins, apart=not self.packed, mixed=self.mixed)
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
            unlikely=torch.tensor([each.wish.unlikely for each in some], device=where),
            of_guard=of_guard.to(where),
            guard_share=(1 / of_guard.bincount(minlength=len(facts))[of_guard]).to(where),
            stream=self.clean.at(self.stream, rows[sheet.owner], sheet.places),
            packing=self._packing(sheet, rows) if self.packed else None,
        )

    def _packing(self, sheet: _Sheet, rows: Tensor) -> Packing:
        assert self.past is not None
        where = self.stream.device
        # What is nothing is seen by nobody; any value will do.
        of, places = rows[sheet.behind.clamp(min=0)], sheet.behind_places
        first = min(self.begin, len(self.past) - 1)
        behind = [
            (self.clean.at(keys, of, places), self.clean.at(values, of, places)) for keys, values in self.past[first:]
        ]
        # Blocks below aren't run, but a cache counts them.
        past = (*behind[:1] * first, *behind)
        return Packing(sheet.places.to(where), sheet.visible.to(where), past)

    def run(self) -> list[Fitted]:
        """Step until every fact has stopped."""
        fit, count = self.fit, len(self.asked)
        delta = torch.zeros(count, self.norms.shape[1], self.stream.shape[-1], device=self.stream.device)
        adam_mean, adam_square = torch.zeros_like(delta), torch.zeros_like(delta)
        losses: list[list[float]] = [[] for _ in self.asked]
        probs: list[list[float]] = [[] for _ in self.asked]
        stopped: list[Literal["loss", "kl", "steps"]] = ["steps"] * count
        clamped = [0] * count
        counts = [1.0] * count  # what the first term of each loss does
        rows = self._active(list(range(count)))
        before: list[Tensor | None] = [None] * count  # the KL prompts' log-probabilities without δ
        for step in range(fit.steps):
            moving = torch.tensor(rows.facts)
            with torch.enable_grad():
                own = delta[moving].requires_grad_()
                now = self._loss(rows, own, [counts[i] for i in rows.facts], before)
                total = now.loss.sum()
                if step == 0:
                    # δ is 0 here: what is said now is what was said before.
                    before = [now.guard[rows.of_guard == k].detach() for k in range(count)]
            for k, i in enumerate(rows.facts):
                losses[i].append(float(now.loss[k].detach()))
                probs[i].append(float(now.prob[k]))
                if not torch.isfinite(now.loss[k]):
                    raise RuntimeError(
                        f"the loss of {self.asked[i].wish.fact.name!r} is {losses[i][-1]} at step {step}: the model "
                        "overflows with this value (lower ValueFit.lr or clamp, or load the model in float32)"
                    )
                if self.asked[i].wish.unlikely:
                    continue
                counts[i] = fit.ease if now.first[k] else 1.0
                if losses[i][-1] < fit.stop_below:
                    stopped[i] = "loss"
                elif fit.stop_kl is not None and now.first[k] and now.kl[k] <= fit.stop_kl:
                    stopped[i] = "kl"
            if step == fit.steps - 1:
                break
            going = [k for k, i in enumerate(rows.facts) if stopped[i] == "steps"]
            if not going:
                break
            (gradient,) = torch.autograd.grad(total, own)
            with torch.no_grad():
                for k in going:
                    i = rows.facts[k]
                    moved = _adam(delta[i], gradient[k], adam_mean[i], adam_square[i], step + 1, fit.lr)
                    norm, most = moved.norm(dim=-1), fit.clamp * self.norms[i]
                    if not bool((norm < float("inf")).all()):
                        raise RuntimeError(
                            f"the value of {self.asked[i].wish.fact.name!r} is not finite after step {step}: lower "
                            "ValueFit.lr"
                        )
                    beyond = norm > most
                    clamped[i] += bool(beyond.any())
                    delta[i] = moved * torch.where(beyond, most / norm, 1.0)[:, None]
                if len(going) < len(rows.facts):
                    rows = self._active([rows.facts[k] for k in going])
        found = delta.double().cpu()
        return [
            Fitted(
                delta=found[i, -1],
                keys=self.keys[self.first[i] : self.first[i] + each.contexts].cpu(),
                outputs=self.outputs[self.first[i] : self.first[i] + each.contexts].detach().cpu(),
                losses=tuple(losses[i]),
                target_prob=tuple(probs[i]),
                stopped=stopped[i],
                clamped=clamped[i],
                attn_delta=found[i, 0] if self.where == "modules" else None,
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
                return value.index_put(rows.own, delta[rows.fact, place].to(value.dtype), accumulate=True)

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
        loss = zero.index_add(0, rows.context_fact, wanted * rows.context_share) * torch.tensor(counts).to(zero)
        norms = self.norms[torch.tensor(rows.facts)].to(delta.device)
        loss = loss + self.fit.decay * (delta.norm(dim=-1) / norms**2).sum(-1)
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


def _adam(
    value: Float[Tensor, "place d_model"],
    gradient: Float[Tensor, "place d_model"],
    mean: Float[Tensor, "place d_model"],
    square: Float[Tensor, "place d_model"],
    step: int,
    lr: float,
) -> Float[Tensor, "place d_model"]:
    """One step of Adam (Kingma and Ba 2014, arXiv:1412.6980) with its usual constants; moments are updated in place."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    size = (square / (1 - 0.999**step)).sqrt() + 1e-8
    return value - lr * (mean / (1 - 0.9**step)) / size
