"""Integrated gradients of an answer's probability along the keys of each layer, at a prompt's last token.

    Attr_i = k_i · ∫₀¹ ∂P(o | x) / ∂k_i (α k) dα

Dai et al. 2022 (arXiv:2104.08696, eq. 2). The integral is taken at the midpoints of equal steps, and the attributions
of a layer then add up to P at the whole key less P at none; their code takes both ends too and divides by the number of
points, which doesn't add up. Since the value is linear in the key, one gradient by the value gives those by all
neurons: ∂P/∂k = W ∂P/∂v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.memory import NUMBER, budget, graph_bytes, logits_bytes, together
from tl_factedit.backend.packing import Packing, gather, past_at
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.tokens import pad


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
    memory: float | None = 2.0,
    progress: bool = True,
) -> Iterator[NeuronAttribution]:
    """Integrated gradients of the answers' probabilities along the keys at the prompts' last tokens.

    One layer's key is scaled at a time, at that token only; all scalings of a layer run at once, from that layer on,
    and only that token and the answer's (the rest is read from the attention keys and values of one clean run).

    Args:
        model: Either class, inside `frozen`.
        prompts: What is asked.
        layers: Whose keys.
        steps: How many points the integral is taken at, by the midpoint rule.
        memory: What activations may take, in GiB (None for a share of what is free).
        progress: Whether to show a bar on what takes longer than a second.

    Yields:
        An attribution for each prompt, in their order.

    Raises:
        RuntimeError: A probability is not finite.
    """
    room = budget(model, memory)
    runner = Runner(model)
    sites = [down_proj(model, layer) for layer in layers]
    # Midpoints count; the two ends are there for the gap.
    shares = torch.cat([(torch.arange(steps) + 0.5) / steps, torch.tensor([0.0, 1.0])])
    with torch.no_grad():
        longest = max((prompt.ids for prompt in prompts), key=len)
        packed = not runner.why_not_packed(longest, len(longest))
    with tqdm(total=len(prompts), unit="prompt", desc="looking for neurons", delay=1, disable=not progress) as bar:
        for group in _groups(runner, prompts, sites, len(shares), room, packed=packed):
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
    model, d_mlp = runner.model, len(sites[0].W)
    token, read = graph_bytes(model, sites[0].layer), logits_bytes(model)
    kept = len(sites) * (model.cfg.d_model + d_mlp) * NUMBER
    needs = [
        shares * ((len(prompt.target) if packed else len(prompt.ids) + len(prompt.target)) * token)
        + shares * len(prompt.target) * read
        + (len(prompt.ids) + len(prompt.target)) * kept
        for prompt in prompts
    ]
    for group in together(needs, memory):
        yield [prompts[i] for i in group]


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
        weight = site.W.double()
        key = self.keys[site.layer].to(weight.device)
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
        return scores.to(prob.device), prob[:, -1] - prob[:, -2]

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
