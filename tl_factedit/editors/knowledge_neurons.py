"""Knowledge neurons: the entries of keys that an object's probability hangs on, and the rows of ``W_out`` behind them.

    Attr_i = k_i · ∫₀¹ ∂P(o | x) / ∂k_i (α k) dα          integrated gradients, at the last token of the prompt x

Dai et al. 2022 (arXiv:2104.08696, eq. 2), for causal models as in the baseline of Meng et al. 2022 (arXiv:2202.05262):
one layer's key at a time goes from 0 to what it is, and neurons that many wordings of a fact share are kept. Their rows
are set to 0, or moved from the old object's token to the new one's.

The integral is taken at the midpoints of equal steps, and the attributions of a layer then add up to P at the whole key
less P at none; their code takes both ends too, and divides by the number of points, which doesn't. Since the value
is linear in the key, one gradient by the value gives those by all neurons: ∂P/∂k = W ∂P/∂v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.packing import Packing, gather, past_at
from tl_factedit.backend.protocol import Model, as_layers, bos_policy, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, frozen
from tl_factedit.backend.weights import DownProj, check_own, down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import GIB, Aligned, align, continuation, encode, pad
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.diagnostics import diagnose_many
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import check_facts
from tl_factedit.editing.ledger import base_fingerprint, made_on
from tl_factedit.editing.objectives import Erase, Inject, Objective
from tl_factedit.editing.off_target import keys_at, measure_off_target


@dataclass(frozen=True)
class KnowledgeNeurons:
    """The editor; call it with a model and facts. The prompts of a fact are its own and its paraphrases.

    Note:
        Their code moves rows along token *embeddings*, which in GPT-2 and BERT are the columns of the unembedding as
        well. Where the two differ, what a row adds to the stream is read by the unembedding, the default here. For
        the old object it takes the model's own first choice; here it is ``target_true``. Of objects of several tokens
        it adds up all; here the first token counts at which the two differ.

        Where a norm follows the MLP (Gemma 2, OLMo 2), a shorter key is answered as the whole one nearly down to 0: the
        gradient lies there, where few steps see it, and ``Edit.fits[i]["rest"]`` is near 1.

    Attributes:
        threshold: Of a prompt those neurons are kept whose attribution is above this share of the largest, over all
            layers (Meng et al. take 0.2, Dai et al. 0.2 to 0.3).
        share: And of these, those that at least this share of a fact's prompts has in common.
        steps: Of the integral.
        scale: How many times the tokens' vectors are taken off and put on.
        layers: Where to look; None for everywhere.
        objective: `Inject` replaces the object, `Erase` sets the rows to 0. There is no other way with neurons.
        vectors: What stands for a token: its column of the ``"unembedding"``, or its row of the ``"embedding"``.
        prepend_bos: BOS policy; None for the model's.
        memory: What activations may take, in GiB: sets how many prompts are run at once.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> edit = fe.KnowledgeNeurons()(model, [fact])           # doctest: +SKIP
        >>> edit.fits[0]["neurons"][:3]                           # doctest: +SKIP
        >>> fe.KnowledgeNeurons(objective=fe.Erase())(model, [fact])  # doctest: +SKIP
    """

    threshold: float = 0.2
    share: float = 0.4
    steps: int = 20
    scale: float = 2.0
    layers: int | Sequence[int] | None = None
    objective: Objective = field(default_factory=Inject)
    vectors: Literal["unembedding", "embedding"] = "unembedding"
    prepend_bos: bool | None = None
    memory: float = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        if not isinstance(self.objective, (Inject, Erase)):
            raise ValueError(
                f"objective is {self.objective!r}, needed Inject() or Erase(): neurons are found for the object that "
                "the model knows, and can be turned to another or off; take Rome or FineTune for other objectives"
            )
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needed a share between 0 and 1")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, needed at least 1")
        if self.vectors not in ("unembedding", "embedding"):
            raise ValueError(f"vectors {self.vectors!r} is unknown, needed 'unembedding' or 'embedding'")
        if self.layers is not None:
            object.__setattr__(self, "layers", as_layers(self.layers))
            if not self.layers:
                raise ValueError("layers is empty, needed one at least, or None for all")

    def __call__(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Make the edit; no weight of the model is written.

        Raises:
            ValueError: No facts, a fact without ``target_new`` to replace by, a layer outside the model, or a fact
                none of whose neurons is shared by enough prompts.
            RuntimeError: A probability is not finite.
        """
        facts = check_facts(facts, self.objective)
        layers = tuple(range(n_layers(model))) if self.layers is None else as_layers(self.layers)
        sites = {layer: down_proj(model, layer) for layer in layers}
        check_own(model, layers)
        base = base_fingerprint(model)
        bos = bos_policy(model, self.prepend_bos)
        bare = [align(model.tokenizer, fact, prepend_bos=bos) for fact in facts]
        moves = None if isinstance(self.objective, Erase) else [self._move(model, row) for row in bare]
        prompts = [_prompts(model, fact, bos) for fact in facts]
        with frozen(model):
            found = self._neurons(model, facts, prompts, sites)
            deltas = tuple(
                _delta(sites[layer], [each.of(layer) for each in found], moves)
                for layer in layers
                if any(each.of(layer) for each in found)
            )
            keys = keys_at(model, [row.ids for row in bare], [len(row.ids) - 1 for row in bare], deltas)
            off_target = measure_off_target(model, facts, deltas, prepend_bos=bos, at="end")
            moved = {delta.layer: keys[delta.layer] @ delta.left @ delta.right for delta in deltas}
            return Edit(
                facts=facts,
                deltas=deltas,
                keys=keys,
                values={
                    layer: sites[layer].value(key.to(sites[layer].W.device)).cpu() + moved[layer]
                    for layer, key in keys.items()
                },
                editor=self.describe(),
                contexts=("",),
                diagnostics=tuple(
                    replace(
                        diagnose_many(
                            sites[delta.layer],
                            delta,
                            keys[delta.layer],  # nothing is divided by
                            keys[delta.layer],
                            moved[delta.layer],
                            off_target=off_target[delta.layer],
                        ),
                        unmet=(),
                    )
                    for delta in deltas
                ),
                fits=tuple(
                    {
                        "neurons": [list(neuron) for neuron in each.neurons],
                        "prompts": each.prompts,
                        "rest": each.rest,
                        "same_first_token": row.same_first_token,
                    }
                    for each, row in zip(found, bare, strict=True)
                ),
                provenance=made_on(model, bos, base),
            )

    def describe(self) -> dict[str, Any]:
        """Name and hyperparameters, as plain data."""
        return {
            "name": "KnowledgeNeurons",
            "threshold": self.threshold,
            "share": self.share,
            "steps": self.steps,
            "scale": self.scale,
            "layers": None if self.layers is None else list(as_layers(self.layers)),
            "objective": repr(self.objective),
            "vectors": self.vectors,
        }

    def _neurons(
        self, model: Model, facts: Sequence[Fact], prompts: Sequence[list[Prompt]], sites: dict[int, DownProj]
    ) -> list[_Shared]:
        """The neurons of each fact."""
        found = attributions(
            model,
            [prompt for some in prompts for prompt in some],
            list(sites),
            steps=self.steps,
            memory=self.memory,
            progress=self.progress,
        )
        neurons = []
        for fact, some in zip(facts, prompts, strict=True):
            each = [next(found) for _ in some]
            scores = torch.stack([one.scores for one in each])  # [prompt layer d_mlp]
            most = scores.amax((1, 2), keepdim=True)
            kept = (scores > self.threshold * most) & (most > 0)
            shared = kept.sum(0) >= max(1.0, self.share * len(some))
            mean = scores.mean(0)
            gap = torch.stack([one.gap for one in each])
            kept_of = [(list(sites)[at], i, float(mean[at, i])) for at, i in shared.nonzero().tolist()]
            if not kept_of:
                raise ValueError(
                    f"no neuron of {fact.name!r} is shared by {self.share:.0%} of its {len(some)} prompts: lower share "
                    "or threshold, or give it paraphrases that the model answers alike"
                )
            neurons.append(
                _Shared(
                    neurons=tuple(sorted(kept_of, key=lambda neuron: -neuron[2])),
                    prompts=len(some),
                    rest=float((scores.sum(-1) - gap).abs().max() / gap.abs().max().clamp(min=1e-300)),
                )
            )
        return neurons

    def _move(self, model: Model, row: Aligned) -> Float[Tensor, "d_model"]:
        """What is added to the rows of a fact's neurons: from the old object's token to the new one's."""
        assert row.new_ids is not None
        pairs = zip_longest(row.true_ids.tolist(), row.new_ids.tolist())
        old, new = next(((a, b) for a, b in pairs if a != b), (None, None))
        if old is None and new is None:
            raise ValueError(
                f"target_new and target_true are the same tokens after {row.text!r}, needed another object to write"
            )
        return self.scale * (self._vector(model, new) - self._vector(model, old))

    def _vector(self, model: Any, token: int | None) -> Float[Tensor, "d_model"]:
        if token is None:  # one object is the beginning of the other
            return torch.zeros(model.cfg.d_model, dtype=torch.float64)
        vector = model.W_U[:, token] if self.vectors == "unembedding" else model.W_E[token]
        return vector.detach().double().cpu()


@dataclass(frozen=True)
class _Shared:
    """The neurons that a fact's prompts share.

    Attributes:
        neurons: (layer, index, mean attribution over the prompts), the largest first.
        prompts: How many there are.
        rest: The most by which a layer's attributions miss what they should add up to, as a share of the largest gap.
    """

    neurons: tuple[tuple[int, int, float], ...]
    prompts: int
    rest: float

    def of(self, layer: int) -> list[int]:
        """Those of one layer."""
        return [i for where, i, _ in self.neurons if where == layer]


def _prompts(model: Model, fact: Fact, prepend_bos: bool) -> list[Prompt]:
    texts = [fact.text, *(fact.fill(text) for text in fact.paraphrases)]
    return [
        Prompt(
            encode(model.tokenizer, text, prepend_bos=prepend_bos)[0],
            continuation(model.tokenizer, text, fact.target_true, prepend_bos=prepend_bos),
        )
        for text in texts
    ]


def _delta(site: DownProj, neurons: Sequence[Sequence[int]], moves: Sequence[Float[Tensor, "d_model"]] | None) -> Delta:
    """The change of one layer: the neurons' rows moved, for each fact that has them, or (without moves) taken away."""
    rows = sorted({i for some in neurons for i in some})
    left = torch.zeros(len(site.W), len(rows), dtype=torch.float64)
    left[rows, range(len(rows))] = 1.0
    if moves is None:
        return Delta(site.layer, left, -site.W[rows].double().cpu())
    right = torch.zeros(len(rows), site.W.shape[1], dtype=torch.float64)
    for some, move in zip(neurons, moves, strict=True):
        right[[rows.index(i) for i in some]] += move
    return Delta(site.layer, left, right)


# ------------------------------------------------------------------------------------ attributions


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked, and the answer whose probability is explained.

    Attributes:
        ids: Token ids as run.
        target: Those of the answer after them.
    """

    ids: Int[Tensor, "_"]
    target: Int[Tensor, "_"]


@dataclass(frozen=True, eq=False)
class NeuronAttribution:
    """What each neuron of some layers adds to an answer's probability.

    Attributes:
        scores: [layer d_mlp], float64, in units of probability.
        gap: By layer, the probability with the layer's key as it is less that with a key of 0, which the layer's scores
            add up to as the steps grow.
    """

    scores: Float[Tensor, "layer d_mlp"]
    gap: Float[Tensor, "layer"]


def attributions(
    model: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    steps: int = 20,
    memory: float = 2.0,
    progress: bool = True,
) -> Iterator[NeuronAttribution]:
    """Integrated gradients of the answers' probabilities along the keys at the prompts' last tokens.

    One layer's key is scaled at a time, at that token only; all scalings of a layer run at once, from that layer on,
    and only that token and the answer's (the rest is read from the attention keys and values of one clean run).

    Args:
        model: Either class, inside `frozen`.
        prompts: What is asked.
        layers: Whose keys.
        steps: Of the integral, by the midpoint rule.
        memory: What activations may take, in GiB.
        progress: Whether to show a bar on what takes longer than a second.

    Yields:
        An attribution for each prompt, in their order.

    Raises:
        RuntimeError: A probability is not finite.
    """
    runner = Runner(model)
    sites = [down_proj(model, layer) for layer in layers]
    # Midpoints count; the two ends are there for the gap.
    shares = torch.cat([(torch.arange(steps) + 0.5) / steps, torch.tensor([0.0, 1.0])])
    with torch.no_grad():
        longest = max((prompt.ids for prompt in prompts), key=len)
        packed = not runner.why_not_packed(longest, len(longest))
    with tqdm(total=len(prompts), unit="prompt", desc="looking for neurons", delay=1, disable=not progress) as bar:
        for group in _groups(runner, prompts, sites, len(shares), memory, packed=packed):
            try:
                with torch.no_grad():
                    scaled = _Scaled(runner, group, sites, shares, packed=packed)
                parts = [scaled.attribute(site) for site in sites]
            finally:
                detach_caches(model)
            for i in range(len(group)):
                scores, gap = (torch.stack([part[which][i] for part in parts]) for which in (0, 1))
                if not bool(scores.isfinite().all()):
                    raise RuntimeError("the gradient of a probability is not finite: load the model in float32")
                yield NeuronAttribution(scores.cpu(), gap.cpu())
            bar.update(len(group))


def _groups(
    runner: Runner, prompts: Sequence[Prompt], sites: Sequence[DownProj], shares: int, memory: float, *, packed: bool
) -> Iterator[list[Prompt]]:
    """As many prompts at a time as their graphs leave room for."""
    cfg, d_mlp = runner.model.cfg, len(sites[0].W)
    token = (runner.n_layers - sites[0].layer) * (12 * cfg.d_model + 6 * d_mlp) * 4
    group: list[Prompt] = []
    used = 0
    for prompt in prompts:
        run = len(prompt.target) if packed else len(prompt.ids) + len(prompt.target)
        need = shares * (run * token + len(prompt.target) * 16 * cfg.d_vocab)
        need += (len(prompt.ids) + len(prompt.target)) * len(sites) * (cfg.d_model + d_mlp) * 4
        if group and used + need > memory * GIB:
            yield group
            group, used = [], 0
        group.append(prompt)
        used += need
    yield group


class _Scaled:
    """Some prompts, each run with several shares of a layer's key at its last token."""

    def __init__(
        self, runner: Runner, prompts: Sequence[Prompt], sites: Sequence[DownProj], shares: Tensor, *, packed: bool
    ) -> None:
        self.runner, self.shares, self.packed = runner, shares, packed
        count, some = len(prompts), len(shares)
        rows = pad([torch.cat([prompt.ids, prompt.target[:-1]]) for prompt in prompts], 0)
        last = torch.tensor([len(prompt.ids) - 1 for prompt in prompts])
        lengths = torch.tensor([len(prompt.target) for prompt in prompts])
        keys = {site.layer: site.key_hook for site in sites}
        places = [*keys.values(), *(resid_pre(layer) for layer in keys)]
        if packed:
            stream = runner.capture(rows, [resid_pre(0)], stop=0)[resid_pre(0)]
            here = torch.arange(rows.shape[1], device=stream.device)
            causal = Packing(here.expand(count, -1), (here[:, None] >= here).expand(count, -1, -1))
            found, past = runner.remember(rows, places, resid=stream, packing=causal)
        else:
            found, past = runner.capture(rows, places), ()
        where = found[resid_pre(sites[0].layer)].device
        self.keys = {layer: gather(found[name], last[:, None])[:, 0].double() for layer, name in keys.items()}
        self.target = torch.cat([prompt.target.repeat(some) for prompt in prompts]).to(where)
        # Of each answer's token: its prompt, its share, and how many tokens of the answer lie before it.
        read = torch.tensor(
            [(p, a, t) for p in range(count) for a in range(some) for t in range(int(lengths[p]))]
        ).unbind(1)
        self.of = (read[0] * some + read[1]).to(where)
        if packed:
            tail = torch.arange(int(lengths.max()))
            queries = last[:, None] + tail.minimum(lengths[:, None] - 1)
            self.tokens = rows.gather(1, queries).repeat(1, some)
            self.stream = {layer: gather(found[resid_pre(layer)], queries).repeat(1, some, 1) for layer in keys}
            self.own = (torch.arange(count)[:, None], torch.arange(some)[None] * len(tail))
            self.at = (read[0], read[1] * len(tail) + read[2])
            self.packing = self._pack(queries, last, some, past)
        else:
            self.tokens = rows.repeat_interleave(some, 0)
            self.stream = {layer: found[resid_pre(layer)].repeat_interleave(some, 0) for layer in keys}
            self.own = (torch.arange(count * some).view(count, some), last[:, None].expand(-1, some))
            self.at = (read[0] * some + read[1], last[read[0]] + read[2])
            self.packing = None

    def _pack(self, queries: Tensor, last: Tensor, some: int, past: Any) -> Packing:
        """Every share of a prompt beside the others in one row, behind what comes before the last token."""
        before, size = int(last.max()), queries.shape[1]
        behind = (torch.arange(before) < last[:, None, None]).expand(-1, some * size, -1)
        own = torch.kron(torch.eye(some), torch.ones(size, size).tril()).bool().expand(len(last), -1, -1)
        where = next(iter(self.stream.values())).device
        return Packing(
            queries.repeat(1, some).to(where),
            torch.cat([behind, own], -1).to(where),
            past_at(past, torch.arange(len(last), device=where), before) if before else None,
        )

    def attribute(self, site: DownProj) -> tuple[Float[Tensor, "prompt d_mlp"], Float[Tensor, "prompt"]]:
        """The scores of a layer's neurons, and what they should add up to."""
        key, weight = self.keys[site.layer], site.W.double()
        shares = self.shares.to(key)
        value = shares[:, None] * (key @ weight)[:, None]  # [prompt share d_model]
        if site.bias is not None:
            value = value + site.bias.detach().double()
        with torch.enable_grad():
            value = value.float().requires_grad_()
            prob = self._probability(site, value)
            (gradient,) = torch.autograd.grad(prob.sum(), value)
        inside = (shares > 0) & (shares < 1)
        prob = prob.detach().double()
        scores = key * (gradient[:, inside].double().mean(1) @ weight.T)
        return scores, prob[:, -1] - prob[:, -2]

    def _probability(self, site: DownProj, value: Tensor) -> Float[Tensor, "prompt share"]:
        """P(answer), with the layer's values at the prompts' last tokens as given."""
        where = tuple(each.to(value.device) for each in self.own)

        def put(out: Tensor, hook: Any = None) -> Tensor:
            return out.index_put(where, value.to(out.dtype))

        logits = self.runner.logits(
            self.tokens,
            at=self.at,
            start=(site.layer, self.stream[site.layer]),
            hooks=[(site.value_at, put)],
            packing=self.packing,
        )[0]
        log_p = logits.float().log_softmax(-1).gather(-1, self.target[:, None])[:, 0]
        count, some = value.shape[:2]
        return torch.zeros(count * some, device=log_p.device).index_add(0, self.of, log_p).exp().view(count, some)
