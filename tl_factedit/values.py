"""What an edit is to write: v*, the value that makes the model say the new object. The only gradient loop.

    L(δ) = mean_j −1/T Σ_i log p(o_i | x_j + prompt; v + δ)  +  a · KL(p_δ ‖ p_0)  +  b · ‖δ‖ / ‖v‖²

after Meng et al. 2022 (arXiv:2202.05262, eq. 4) and their code, where the weight decay takes the norm of δ,
not its square. δ is added at the last subject token of every context: to the output of ``W_out`` (ROME), or to the
residual stream after the block (MEMIT).

Only the blocks above are run, only the tokens from the last subject token on (what lies before is read from the
attention keys and values of one clean run), and only the logits that the loss reads; many facts at once, each with its
own stop and clamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.facts import Fact
from tl_factedit.model import (
    Hook,
    Model,
    Packing,
    Runner,
    component_hook,
    down_proj,
    gather,
    past_at,
    quiet,
    resid_post,
    resid_pre,
)
from tl_factedit.tokens import Aligned, align, pad

Where = Literal["mlp", "resid"]
GIB = 1 << 30


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
    """

    steps: int = 20
    lr: float = 0.5
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    stop_below: float = 0.05
    kl_prompts: Sequence[str] = ("{} is a",)
    kl_at: Literal["subject", "end"] = "subject"

    def __post_init__(self) -> None:
        """Check the numbers and choices."""
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, needed at least 1 (which only reads the loss)")
        if self.kl_at not in ("subject", "end"):
            raise ValueError(f"kl_at {self.kl_at!r} is unknown, needed 'subject' or 'end'")
        if isinstance(self.kl_prompts, str):
            raise ValueError(
                f"kl_prompts is the string {self.kl_prompts!r}, needed a list: write [{self.kl_prompts!r}]"
            )


@dataclass(frozen=True)
class Fitted:
    """A fitted value, and what happened on the way.

    Attributes:
        delta: δ, [d_model], float64.
        keys: The key at the last subject token in each context, [context d_mlp], float64; the
            bare prompt is the first.
        outputs: What stands there now where δ is added, [context d_model], float64: the answer of ``W_out``, or the
            residual stream after the block.
        losses: The loss before each step.
        target_prob: Mean probability of a token of the new object over contexts, before each step.
        stopped: Why it ended: ``"loss"`` or ``"steps"``.
        clamped: At how many steps δ had to be projected back.
    """

    delta: Float[Tensor, "d_model"]
    keys: Float[Tensor, "context d_mlp"]
    outputs: Float[Tensor, "context d_model"]
    losses: tuple[float, ...]
    target_prob: tuple[float, ...]
    stopped: Literal["loss", "steps"]
    clamped: int


def fit_value(
    model: Model,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
    *,
    fit: ValueFit | None = None,
    prepend_bos: bool,
    progress: bool = True,
) -> Fitted:
    """`fit_values` of one fact, at the output of ``W_out``."""
    return fit_values(model, [fact], layer, contexts, fit=fit, prepend_bos=prepend_bos, progress=progress)[0]


def fit_values(
    model: Model,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    *,
    where: Where = "mlp",
    fit: ValueFit | None = None,
    prepend_bos: bool,
    memory: float = 2.0,
    progress: bool = True,
) -> list[Fitted]:
    """Find, for each fact, the δ that makes the model go on with ``fact.target_new``.

    Args:
        model: Either class; its weights don't change.
        facts: Each with a ``target_new``.
        layer: Whose output gets δ.
        contexts: Prefixes; the first must be the bare one, ``""``.
        where: ``"mlp"``: δ is added to what ``W_out`` answers; ``"resid"``: to the stream after the block.
        fit: Hyperparameters.
        prepend_bos: BOS policy.
        memory: What activations may take, in GiB: sets how many facts are fitted at once.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The fitted values; the same as for each fact alone, but for rounding.

    Raises:
        ValueError: A fact has no ``target_new``.
        RuntimeError: A loss or δ is not finite.
    """
    fit = fit or ValueFit()
    for fact in facts:
        if fact.target_new is None:
            raise ValueError(f"fact {fact.name!r} has no target_new, needed one to write: fact.but(target_new=...)")
    if not contexts or contexts[0]:
        raise ValueError('contexts must begin with the bare one, ""')
    down_proj(model, layer)
    asked = [_Asked.of(model, fact, contexts, fit, prepend_bos) for fact in facts]
    found: list[Fitted] = []
    with (
        quiet(model),
        tqdm(total=len(asked), unit="fact", desc="fitting values", delay=1, disable=not progress) as bar,
    ):
        runner = Runner(model)
        with torch.no_grad():
            longest = max((row for each in asked for row in each.rows), key=len)
            packed = not runner.packs(longest, len(longest))
        for batch in _batches(model, asked, layer, memory):
            try:
                found += _Descent(runner, batch, layer, where, fit, packed=packed).run()
            finally:
                _drop_graphs(model)
            bar.update(len(batch))
    return found


def _drop_graphs(model: Model) -> None:
    """Detach what the model's modules keep of the last forward pass.

    The attention of a TransformerBridge keeps its last pattern, with the whole graph behind it: memory
    that is never freed, and a model that ``copy.deepcopy`` refuses.
    """
    for module in model.modules():  # type: ignore[attr-defined]
        for name, kept in list(vars(module).items()):
            if isinstance(kept, Tensor) and kept.grad_fn is not None:
                vars(module)[name] = kept.detach()


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class _Asked:
    """The rows of one fact: its contexts, each followed by the target but its last token, then the KL prompts.

    Attributes:
        fact: The fact.
        rows: Token ids.
        lookup: Of each row, the position of the last subject token.
        read: Of each row, the positions whose logits the loss reads.
        target: The target's ids, for each context.
    """

    fact: Fact
    rows: tuple[Int[Tensor, "_"], ...]
    lookup: tuple[int, ...]
    read: tuple[range, ...]
    target: Int[Tensor, "context target"]

    @classmethod
    def of(cls, model: Model, fact: Fact, contexts: Sequence[str], fit: ValueFit, prepend_bos: bool) -> _Asked:
        rewrite = [align(model.tokenizer, fact, prepend_bos=prepend_bos, prefix=x) for x in contexts]
        guard = [align(model.tokenizer, fact, prepend_bos=prepend_bos, template=t) for t in fit.kl_prompts]
        targets = [_new_ids(row) for row in rewrite]
        if len({len(t) for t in targets}) > 1:
            raise ValueError(f"target {fact.target_new!r} is spelt in different lengths after different contexts")
        read = [range(len(row.ids) - 1, len(row.ids) - 1 + len(targets[0])) for row in rewrite]
        ends = [row.last if fit.kl_at == "subject" else len(row.ids) - 1 for row in guard]
        # A row needs no token after the last one that is read.
        return cls(
            fact=fact,
            rows=(
                *(torch.cat([row.ids, t[:-1]]) for row, t in zip(rewrite, targets, strict=True)),
                *(row.ids[: end + 1] for row, end in zip(guard, ends, strict=True)),
            ),
            lookup=tuple(row.last for row in (*rewrite, *guard)),
            read=(*read, *(range(end, end + 1) for end in ends)),
            target=torch.stack(targets),
        )

    @property
    def contexts(self) -> int:
        """How many of the rows are contexts."""
        return len(self.target)

    @property
    def queries(self) -> int:
        """How many tokens have to be run at a step."""
        return sum(len(row) - at for row, at in zip(self.rows, self.lookup, strict=True))


def _new_ids(row: Aligned) -> Int[Tensor, "target"]:
    if row.new_ids is None:
        raise ValueError("the fact has no target_new")
    return row.new_ids


def _batches(model: Model, asked: Sequence[_Asked], layer: int, memory: float) -> Iterator[list[_Asked]]:
    """As many facts at a time as their graphs leave room for."""
    cfg = model.cfg
    above = len(model.blocks) - layer  # type: ignore[attr-defined]
    token = above * (12 * cfg.d_model + 6 * (cfg.d_mlp or 4 * cfg.d_model)) * 4
    batch: list[_Asked] = []
    used = 0
    for each in asked:
        need = each.queries * token + sum(map(len, each.read)) * 4 * 4 * cfg.d_vocab
        if batch and used + need > memory * GIB:
            yield batch
            batch, used = [], 0
        batch.append(each)
        used += need
    if batch:
        yield batch


# ------------------------------------------------------------------------------------ the descent


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of the facts that are still moving.

    Attributes:
        facts: Their places in the batch.
        fact: Which of `facts` a row belongs to, [row].
        tokens: [row query].
        own: The query at the last subject token, [row].
        at: Rows and queries of the logits: first those of targets, then those of KL prompts.
        target: The ids of the first.
        of_target: Which of `facts` they belong to.
        of_guard: The same of the second.
        share: What each log-probability of a target counts in its fact's mean.
        guard_share: The same of KL prompts.
        stream: Before the first block that is run, [row query d_model].
        packing: None where rows are whole sequences.
    """

    facts: list[int]
    fact: Tensor
    tokens: Tensor
    own: Tensor
    at: tuple[Tensor, Tensor]
    target: Tensor
    of_target: Tensor
    of_guard: Tensor
    share: Tensor
    guard_share: Tensor
    stream: Tensor
    packing: Packing | None


class _Descent:
    """The optimisation of some facts' values at once."""

    def __init__(
        self, runner: Runner, asked: Sequence[_Asked], layer: int, where: Where, fit: ValueFit, *, packed: bool
    ) -> None:
        self.runner, self.asked, self.fit, self.packed = runner, asked, fit, packed
        self.rows = [row for each in asked for row in each.rows]
        self.lookup = torch.tensor([at for each in asked for at in each.lookup])
        self.first = [sum(len(each.rows) for each in asked[:i]) for i in range(len(asked) + 1)]
        site = down_proj(runner.model, layer)
        tokens = pad(self.rows, 0)
        with torch.no_grad():
            places = [site.key_hook, resid_pre(layer), resid_post(layer)]
            if isinstance(site.value_at, str):
                places += [site.value_at, component_hook("mlp", layer)]
            below, self.past = self._clean(tokens, [*dict.fromkeys(places)], layer)
            self.keys = gather(below[site.key_hook], self.lookup[:, None])[:, 0].double()
            after = below[resid_post(layer)]
            if where == "resid":
                self.outputs = gather(after, self.lookup[:, None])[:, 0].double()
            else:
                self.outputs = site.value(self.keys)
            # Where nothing stands between W_out and the stream, δ goes into the stream, and the block isn't run again.
            straight = isinstance(site.value_at, str) and torch.equal(
                below[site.value_at], below[component_hook("mlp", layer)]
            )
            self.hook_at = None if where == "resid" or straight else site.value_at
            self.begin = layer if self.hook_at is not None else layer + 1
            self.stream = below[resid_pre(layer)] if self.hook_at is not None else after

    def _clean(self, tokens: Tensor, places: list[str], layer: int) -> tuple[dict[str, Tensor], Any]:
        if not self.packed:
            wanted = [place for place in places if place != resid_post(layer)]
            found = self.runner.capture(tokens, [*wanted, resid_post(layer)])
            return found, None
        stream = self.runner.capture(tokens, [resid_pre(0)], stop=0)[resid_pre(0)]
        here = torch.arange(tokens.shape[1], device=stream.device)
        causal = Packing(here.expand(len(tokens), -1), (here[:, None] >= here).expand(len(tokens), -1, -1))
        return self.runner.remember(tokens, places, resid=stream, packing=causal)

    def _active(self, facts: list[int]) -> _Rows:
        """The rows of some of the facts."""
        index = torch.cat([torch.arange(self.first[i], self.first[i + 1]) for i in facts])
        rows = [self.rows[i] for i in index.tolist()]
        lookup = self.lookup[index]
        begins = lookup if self.packed else torch.zeros_like(lookup)
        lengths = torch.tensor([len(row) for row in rows]) - begins
        query = torch.arange(int(lengths.max()))
        places = (begins[:, None] + query).minimum((begins + lengths - 1)[:, None])
        read = [self.asked[i].read[j] for i in facts for j in range(len(self.asked[i].rows))]
        fact = torch.tensor([k for k, i in enumerate(facts) for _ in self.asked[i].rows])
        is_context = torch.tensor([j < self.asked[i].contexts for i in facts for j in range(len(self.asked[i].rows))])
        context_rows, guard_rows = is_context.nonzero()[:, 0].tolist(), (~is_context).nonzero()[:, 0].tolist()
        at = [(r, p - int(begins[r])) for r in (*context_rows, *guard_rows) for p in read[r]]
        of_target = torch.tensor([int(fact[r]) for r in context_rows for _ in read[r]])
        of_guard = torch.tensor([int(fact[r]) for r in guard_rows], dtype=torch.long)
        device = self.stream.device
        counts = of_target.bincount(minlength=len(facts))
        guards = of_guard.bincount(minlength=len(facts))
        return _Rows(
            facts=facts,
            fact=fact.to(device),
            tokens=pad(rows, 0).gather(1, places),
            own=(lookup - begins).to(device),
            at=(torch.tensor([r for r, _ in at]), torch.tensor([q for _, q in at])),
            target=torch.cat([self.asked[i].target.flatten() for i in facts]).to(device),
            of_target=of_target.to(device),
            of_guard=of_guard.to(device),
            share=(1 / counts[of_target]).to(device),
            guard_share=(1 / guards[of_guard]).to(device),
            stream=self.stream[index[:, None], places],
            packing=self._packing(index, places, lengths, begins, query) if self.packed else None,
        )

    def _packing(self, index: Tensor, places: Tensor, lengths: Tensor, begins: Tensor, query: Tensor) -> Packing:
        real = query < lengths[:, None]
        before = int(begins.max())
        behind = (torch.arange(before) < begins[:, None, None]) & real[..., None]
        own = (query[:, None] >= query) & real[:, None] & real[..., None] | torch.eye(len(query), dtype=torch.bool)
        device = self.stream.device
        return Packing(places.to(device), torch.cat([behind, own], -1).to(device), past_at(self.past, index, before))

    def run(self) -> list[Fitted]:
        """Step until every fact has stopped."""
        fit, count = self.fit, len(self.asked)
        norms = self.outputs[torch.tensor(self.first[:-1])].norm(dim=-1).float()
        delta = torch.zeros(count, self.stream.shape[-1], device=self.stream.device)
        adam_mean, adam_square = torch.zeros_like(delta), torch.zeros_like(delta)
        losses: list[list[float]] = [[] for _ in self.asked]
        probs: list[list[float]] = [[] for _ in self.asked]
        stopped: list[Literal["loss", "steps"]] = ["steps"] * count
        clamped = [0] * count
        rows = self._active(list(range(count)))
        before: list[Tensor | None] = [None] * count  # the KL prompts' log-probabilities without δ
        for step in range(fit.steps):
            moving = torch.tensor(rows.facts)
            with torch.enable_grad():
                own = delta[moving].requires_grad_()
                loss, prob, guard = self._loss(rows, own, norms[moving].to(own.device), before)
                total = loss.sum()
                if step == 0:
                    # δ is 0 here: what is said now is what was said before.
                    before = [guard[rows.of_guard == k].detach() for k in range(count)]
            for k, i in enumerate(rows.facts):
                losses[i].append(float(loss[k].detach()))
                probs[i].append(float(prob[k]))
                if not torch.isfinite(loss[k]):
                    raise RuntimeError(
                        f"the loss of {self.asked[i].fact.name!r} is {losses[i][-1]} at step {step}: the model "
                        "overflows with this value (lower ValueFit.lr or clamp, or load the model in float32)"
                    )
                if losses[i][-1] < fit.stop_below:
                    stopped[i] = "loss"
            if step == fit.steps - 1:
                break
            going = [k for k, i in enumerate(rows.facts) if stopped[i] != "loss"]
            if not going:
                break
            (gradient,) = torch.autograd.grad(total, own)
            with torch.no_grad():
                for k in going:
                    i = rows.facts[k]
                    moved = _adam(delta[i], gradient[k], adam_mean[i], adam_square[i], step + 1, fit.lr)
                    norm, most = float(moved.norm()), fit.clamp * float(norms[i])
                    if not norm < float("inf"):
                        raise RuntimeError(
                            f"the value of {self.asked[i].fact.name!r} is not finite after step {step}: lower "
                            "ValueFit.lr"
                        )
                    if norm > most:
                        moved *= most / norm
                        clamped[i] += 1
                    delta[i] = moved
                if len(going) < len(rows.facts):
                    rows = self._active([rows.facts[k] for k in going])
        return [
            Fitted(
                delta=delta[i].double().cpu(),
                keys=self.keys[self.first[i] : self.first[i] + each.contexts].cpu(),
                outputs=self.outputs[self.first[i] : self.first[i] + each.contexts].detach().cpu(),
                losses=tuple(losses[i]),
                target_prob=tuple(probs[i]),
                stopped=stopped[i],
                clamped=clamped[i],
            )
            for i, each in enumerate(self.asked)
        ]

    def _loss(
        self, rows: _Rows, delta: Float[Tensor, "fact d_model"], norms: Tensor, before: Sequence[Tensor | None]
    ) -> tuple[Float[Tensor, "fact"], Float[Tensor, "fact"], Float[Tensor, "guard vocab"]]:
        """Each fact's loss and mean probability of a target token, and what its KL prompts say now."""
        every = torch.arange(len(rows.fact), device=delta.device)

        def add(value: Tensor, hook: Any = None) -> Tensor:
            return value.index_put((every, rows.own), delta[rows.fact].to(value.dtype), accumulate=True)

        hooks: list[Hook] = [] if self.hook_at is None else [(self.hook_at, add)]
        stream = add(rows.stream) if self.hook_at is None else rows.stream
        logits = self.runner.logits(
            rows.tokens, at=rows.at, start=(self.begin, stream), hooks=hooks, packing=rows.packing
        )[0]
        log_p = logits.float().log_softmax(-1)
        n = len(rows.target)
        target_log_p = log_p[:n].gather(-1, rows.target[:, None])[:, 0]
        zero = torch.zeros(len(delta), device=delta.device)
        loss = -zero.index_add(0, rows.of_target, target_log_p * rows.share)
        loss = loss + self.fit.decay * delta.norm(dim=-1) / norms**2
        guard = log_p[n:]
        if len(guard):
            was = [before[i] for i in rows.facts]
            reference = guard.detach() if was[0] is None else torch.cat([each for each in was if each is not None])
            kl = (guard.exp() * (guard - reference)).sum(-1)
            loss = loss + self.fit.kl_weight * zero.index_add(0, rows.of_guard, kl * rows.guard_share)
        prob = zero.index_add(0, rows.of_target, target_log_p.detach().exp() * rows.share)
        return loss, prob, guard


def _adam(
    value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, lr: float
) -> Float[Tensor, "d_model"]:
    """One step of Adam (Kingma and Ba 2014, arXiv:1412.6980) with its usual constants; moments are updated in place."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    size = (square / (1 - 0.999**step)).sqrt() + 1e-8
    return value - lr * (mean / (1 - 0.9**step)) / size
