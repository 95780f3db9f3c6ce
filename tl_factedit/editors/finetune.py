"""Fine-tuning of ``W_out`` in a few layers (FT), or the same held within a box around the old weights (FT-L).

    minimise   mean_facts  −1/T Σ_i log p(o_i | prompt, o_<i)      over W_out of the layers, by Adam
    subject to ‖W − W₀‖_∞ ≤ ε                                     (FT-L; FT has no ε)

The baselines of Meng et al. 2022 (arXiv:2202.05262, app. E.1); over a window of layers those of Hase et al. 2023
(arXiv:2301.04213). What is learnt is of full rank and answers every key, so that nothing keeps it to the fact.

The weights that are learnt stand beside the model's: a hook answers the keys with them, and no weight of the model is
written. Below the first of the layers everything is run once. Above it every token moves, those before the subject too,
so that none can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.protocol import Hook, Model, as_layers, bos_policy, check_layer, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, frozen
from tl_factedit.backend.weights import DownProj, check_own, down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import GIB, align, pad
from tl_factedit.editing.adam import Adam
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.diagnostics import diagnose_many
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import check_contexts, check_facts, check_objective, described, prefixes
from tl_factedit.editing.ledger import base_fingerprint, made_on
from tl_factedit.editing.objectives import EditTarget, Inject, Objective, set_subjects
from tl_factedit.editing.off_target import keys_at, measure_off_target
from tl_factedit.locate.trace_result import window_layers
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class FineTune:
    """The editor; call it with a model and facts.

    Note:
        Meng et al.'s code (baselines/ft/ft_main.py) scores all tokens of an object from the prompt's last position.
        Here each is scored after those before it, which is the same for objects of one token. Theirs also changes the
        bias, whose name holds that of the weight; here the weight alone is changed.

    Attributes:
        layers: The layers to change, or one.
        epsilon: ε, how far an entry may move: 5e-4 is Meng et al.'s for GPT-2 XL, 5e-5 for GPT-J. None for no bound.
        steps: Passes over the facts, with an update for each `batch` of them.
        lr: Of Adam.
        stop_below: Stop early once the mean loss is below. Ignored where an object is to become unlikely.
        batch: How many facts an update is made of, in the order given.
        objective: What is wanted of the facts. Where an object is to become unlikely, the loss is its probability.
        contexts: Prefixes to ask under, beside the bare prompt: how to sample them, or the texts themselves.
        prepend_bos: BOS policy; None for the model's.
        memory: What activations may take, in GiB: sets how many facts are run at once, which changes the result by
            rounding alone.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> edit = fe.FineTune(8, epsilon=5e-4)(model, [fact])    # doctest: +SKIP
        >>> window = fe.FineTune.around(model, 8, width=5)        # doctest: +SKIP
        >>> edit = fe.FineTune(window, epsilon=1e-4)(model, [fact])  # doctest: +SKIP
    """

    layers: int | Sequence[int]
    epsilon: float | None = None
    steps: int = 25
    lr: float = 5e-4
    stop_below: float = 1e-2
    batch: int = 64
    objective: Objective = field(default_factory=Inject)
    contexts: SampledContexts | Sequence[str] = ()
    prepend_bos: bool | None = None
    memory: float = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Sort the layers, and check the numbers."""
        layers = as_layers(self.layers)
        if not layers:
            raise ValueError("layers is empty, needed one at least")
        object.__setattr__(self, "layers", layers)
        if self.epsilon is not None and not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}, needed more than 0, or None for no bound")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}, needed more than 0")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needed at least 1")
        check_objective(self.objective)
        check_contexts(self.contexts)

    @staticmethod
    def around(model: Model, layer: int, width: int = 5) -> tuple[int, ...]:
        """The layers of a window, l−2 … l+2 for a width of 5, fewer at the model's ends (as a trace restores them)."""
        check_layer(model, layer)
        if width < 1:
            raise ValueError(f"width is {width}, needed at least 1")
        return tuple(window_layers(layer, width, n_layers(model)))

    def __call__(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Make the edit; no weight of the model is written.

        Raises:
            ValueError: No facts, a fact that lacks what the objective needs, or a layer outside the model.
            RuntimeError: The optimisation is not finite.
        """
        facts = check_facts(facts, self.objective)
        sites = [down_proj(model, layer) for layer in self._layers]
        check_own(model, self._layers)
        base = base_fingerprint(model)
        bos = bos_policy(model, self.prepend_bos)
        bare = [align(model.tokenizer, fact, prepend_bos=bos) for fact in facts]
        texts = prefixes(self.contexts, model)
        with frozen(model):
            wishes = self.objective.wishes(model, facts, prepend_bos=bos)
            asked = [TrainingRows.of(model, wish, texts, bos) for wish in wishes]
            try:
                tuned = _Descent(Runner(model), asked, sites, self).run()
            finally:
                detach_caches(model)
            deltas = tuple(
                Delta.full(site.layer, (weight.double() - site.W.double()).cpu())
                for site, weight in zip(sites, tuned.weights, strict=True)
            )
            keys = keys_at(model, [row.ids for row in bare], [row.last for row in bare], deltas)
            off_target = measure_off_target(model, facts, deltas, prepend_bos=bos)
            moved = {delta.layer: keys[delta.layer] @ delta.left for delta in deltas}
            return Edit(
                facts=facts,
                deltas=deltas,
                keys=keys,
                values={
                    site.layer: site.value(keys[site.layer].to(site.W.device)).cpu() + moved[site.layer]
                    for site in sites
                },
                editor=self.describe(),
                contexts=texts,
                diagnostics=tuple(
                    replace(
                        diagnose_many(
                            site,
                            delta,
                            keys[site.layer],  # nothing is divided by
                            keys[site.layer],
                            moved[site.layer],
                            off_target=off_target[site.layer],
                        ),
                        unmet=(),
                    )
                    for site, delta in zip(sites, deltas, strict=True)
                ),
                fits=tuple(
                    {**fit, "same_first_token": row.same_first_token} for fit, row in zip(tuned.fits, bare, strict=True)
                ),
                provenance=made_on(model, bos, base),
            )

    def describe(self) -> dict[str, Any]:
        """Name and hyperparameters, as plain data."""
        return {
            "name": "FineTune",
            "layers": list(self._layers),
            "epsilon": self.epsilon,
            "steps": self.steps,
            "lr": self.lr,
            "stop_below": self.stop_below,
            "batch": self.batch,
            "objective": repr(self.objective),
            "contexts": described(self.contexts),
        }

    @property
    def _layers(self) -> tuple[int, ...]:
        assert isinstance(self.layers, tuple)
        return self.layers


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The rows of one wish: each context and the prompt, followed by the target but its last token.

    Attributes:
        wish: What is wanted.
        rows: Token ids.
        subject: Where it lies in each row, (start, stop).
        target: The target's ids in each row.
    """

    wish: EditTarget
    rows: tuple[Int[Tensor, "_"], ...]
    subject: tuple[tuple[int, int], ...]
    target: tuple[Int[Tensor, "_"], ...]

    @classmethod
    def of(cls, model: Model, wish: EditTarget, contexts: Sequence[str], prepend_bos: bool) -> TrainingRows:
        found = [align(model.tokenizer, wish.fact, prepend_bos=prepend_bos, prefix=x) for x in contexts]
        targets = tuple(row.new_ids for row in found if row.new_ids is not None)
        if len(targets) < len(found):
            raise ValueError(f"the wish of {wish.fact.name!r} has no target_new: the objective must name one")
        rows = tuple(torch.cat([row.ids, target[:-1]]) for row, target in zip(found, targets, strict=True))
        return cls(wish, rows, tuple(row.subject for row in found), targets)

    def need(self, token: int, read: int) -> int:
        """Bytes of its graph, at so many a token and a logit row."""
        return sum(map(len, self.rows)) * token + sum(map(len, self.target)) * read


@dataclass(frozen=True, eq=False)
class _Piece:
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
    def of(cls, runner: Runner, asked: Sequence[TrainingRows], facts: list[int], first: int) -> _Piece:
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
            given = set_subjects([(each.wish, span) for each in some for span in each.subject])
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
            unlikely=torch.tensor([each.wish.unlikely for each in some], device=where),
        )


# ------------------------------------------------------------------------------------ the descent


@dataclass(frozen=True, eq=False)
class _Tuned:
    """What came out: the weights in the model's own type, and how each fact fared."""

    weights: list[Float[Tensor, "_ _"]]
    fits: tuple[dict[str, Any], ...]


class _Descent:
    """The optimisation of copies of some layers' weights."""

    def __init__(
        self, runner: Runner, asked: Sequence[TrainingRows], sites: Sequence[DownProj], editor: FineTune
    ) -> None:
        self.runner, self.asked, self.sites, self.editor = runner, asked, sites, editor
        self.first = sites[0].layer
        # Steps of Adam are smaller than what half precision resolves.
        self.weights = [site.W.float() if site.W.dtype.itemsize < 4 else site.W.clone() for site in sites]
        self.bounds = [None if editor.epsilon is None else bounds(site.W, editor.epsilon) for site in sites]
        self.adam = Adam(self.weights, editor.lr)

    def run(self) -> _Tuned:
        """Step until the loss is small, or the steps are over."""
        editor, count = self.editor, len(self.asked)
        starts = range(0, count, editor.batch)
        batches = [list(self._pieces(range(i, min(i + editor.batch, count)))) for i in starts]
        losses: list[list[float]] = [[] for _ in range(count)]
        probs: list[list[float]] = [[] for _ in range(count)]
        stopped: Literal["loss", "steps"] = "steps"
        with tqdm(total=editor.steps, unit="step", desc="fine-tuning", delay=1, disable=not editor.progress) as bar:
            for _ in range(editor.steps):
                done = True
                for pieces in batches:
                    gradients = self._gradients(pieces, losses, probs)
                    if not self._below(pieces, losses):
                        done = False
                        self._update(gradients)
                bar.update()
                if done:
                    stopped = "loss"
                    break
        weights = [weight.to(site.W.dtype) for site, weight in zip(self.sites, self.weights, strict=True)]
        for site, weight in zip(self.sites, weights, strict=True):
            if not bool(weight.isfinite().all()):
                raise RuntimeError(f"the weights of layer {site.layer} are not finite after fine-tuning: lower lr")
        if stopped == "steps":
            with torch.no_grad():
                for pieces in batches:
                    self._gradients(pieces, losses, probs, only_losses=True)
        held = {} if editor.epsilon is None else {"held": self._held(weights)}
        return _Tuned(
            weights=weights,
            fits=tuple(
                {
                    "target": each.wish.fact.target_new,
                    "unlikely": each.wish.unlikely,
                    "losses": losses[i],
                    "target_prob": probs[i],
                    "stopped": stopped,
                    **held,
                }
                for i, each in enumerate(self.asked)
            ),
        )

    def _pieces(self, facts: Sequence[int]) -> Iterator[_Piece]:
        """As many facts at a time as their graphs leave room for."""
        cfg = self.runner.model.cfg
        token = (self.runner.n_layers - self.first) * (12 * cfg.d_model + 6 * len(self.sites[0].W)) * 4
        some: list[int] = []
        used = 0
        for i in facts:
            need = self.asked[i].need(token, 16 * cfg.d_vocab)
            if some and used + need > self.editor.memory * GIB:
                yield _Piece.of(self.runner, self.asked, some, self.first)
                some, used = [], 0
            some.append(i)
            used += need
        yield _Piece.of(self.runner, self.asked, some, self.first)

    def _gradients(
        self,
        pieces: Sequence[_Piece],
        losses: list[list[float]],
        probs: list[list[float]],
        *,
        only_losses: bool = False,
    ) -> list[Tensor]:
        """Of the mean loss of a batch, by each weight; its facts' losses are noted."""
        total = [torch.zeros_like(weight) for weight in self.weights]
        count = sum(len(piece.facts) for piece in pieces)
        for piece in pieces:
            leaves = [weight.detach().requires_grad_(not only_losses) for weight in self.weights]
            with torch.set_grad_enabled(not only_losses):
                loss, prob = self._loss(piece, leaves)
                if not only_losses:
                    for sum_, part in zip(total, torch.autograd.grad(loss.sum() / count, leaves), strict=True):
                        sum_ += part
            for k, i in enumerate(piece.facts):
                losses[i].append(float(loss[k].detach()))
                probs[i].append(float(prob[k]))
                if not torch.isfinite(loss[k]):
                    raise RuntimeError(
                        f"the loss of {self.asked[i].wish.fact.name!r} is {losses[i][-1]} after {self.adam.updates} "
                        "updates: lower lr, or load the model in float32"
                    )
        return total

    def _loss(self, piece: _Piece, leaves: Sequence[Tensor]) -> tuple[Float[Tensor, "fact"], Float[Tensor, "fact"]]:
        """Each fact's loss, and the mean probability of a token of its target."""
        hooks = [hook for site, leaf in zip(self.sites, leaves, strict=True) for hook in _answering(site, leaf)]
        logits = self.runner.logits(piece.tokens, at=piece.at, start=(self.first, piece.stream), hooks=hooks)[0]
        log_p = logits.float().log_softmax(-1).gather(-1, piece.target[:, None])[:, 0]
        row = torch.zeros_like(piece.share).index_add(0, piece.row, log_p)
        per_row = torch.where(piece.unlikely[piece.fact], row.exp(), -row / piece.length)
        fact = torch.zeros(len(piece.facts), device=log_p.device)
        token_prob = torch.zeros_like(piece.share).index_add(0, piece.row, log_p.detach().exp()) / piece.length
        return (
            fact.index_add(0, piece.fact, per_row * piece.share),
            fact.index_add(0, piece.fact, token_prob * piece.share),
        )

    def _below(self, pieces: Sequence[_Piece], losses: Sequence[Sequence[float]]) -> bool:
        facts = [i for piece in pieces for i in piece.facts]
        if any(self.asked[i].wish.unlikely for i in facts):
            return False
        return sum(losses[i][-1] for i in facts) / len(facts) < self.editor.stop_below

    def _update(self, gradients: Sequence[Tensor]) -> None:
        """One step of Adam, then back into the box."""
        self.adam.step(gradients)
        for weight, box in zip(self.weights, self.bounds, strict=True):
            if box is not None:
                torch.clamp(weight, *(bound.to(weight.dtype) for bound in box), out=weight)

    def _held(self, weights: Sequence[Tensor]) -> float:
        """The share of entries that stand at the end of what ε leaves them."""
        at_end = [
            ((weight == box[0]) | (weight == box[1])).double().mean()
            for weight, box in zip(weights, self.bounds, strict=True)
            if box is not None
        ]
        return float(torch.stack(at_end).mean())


def bounds(
    weight: Float[Tensor, "d_mlp d_model"], epsilon: float
) -> tuple[Float[Tensor, "d_mlp d_model"], Float[Tensor, "d_mlp d_model"]]:
    """The least and the largest that each entry may become, numbers of the weight's own type within ε of it.

    An entry whose neighbours in that type are farther away than ε can't move: in bfloat16 all that are larger than
    256 ε.
    """
    exact, kind = weight.double(), torch.finfo(weight.dtype)
    ends = []
    for sign in (-1, 1):
        end = exact + sign * epsilon
        rounded = end.to(weight.dtype)
        # Where rounding goes beyond the end: a step of the type back, but not beyond the weight.
        inside = (end - sign * (end.abs() * kind.eps).clamp(min=kind.tiny * kind.eps)).to(weight.dtype)
        inside = torch.minimum(inside, weight) if sign < 0 else torch.maximum(inside, weight)
        ends.append(torch.where((rounded.double() - exact).abs() <= epsilon, rounded, inside))
    return ends[0], ends[1]


def _answering(site: DownProj, weight: Tensor) -> list[Hook]:
    """Hooks that answer the keys of a layer with another weight."""
    seen: list[Tensor] = []

    def read(key: Tensor, hook: Any = None) -> None:
        seen[:] = [key]

    def answer(value: Tensor, hook: Any = None) -> Tensor:
        out = seen[0] @ weight.to(value.dtype)
        return out if site.bias is None else out + site.bias

    return [(site.key_hook, read), (site.value_at, answer)]
