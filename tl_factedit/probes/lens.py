"""Logit lens: what the model's own head reads off the residual stream, layer by layer.

``W_U · LN_f(h)`` at the last subject token ("subject") and the last token ("last"). At the subject this measures which
attributes the stream holds, not a prediction; either way a rank means little without its null, which here is the rank
of *control objects* of the same relation (`Fact.controls`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model, bos_policy, device
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import Aligned, align, continuation
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.states import POSITIONS, read_states

QUANTITIES = ("logp_old", "logp_new", "rank_old", "rank_new", "margin", "percentile_old", "percentile_new")


@dataclass(frozen=True)
class LogitLens:
    """Log-probability (nats), rank (1 = first) and margin of a fact's objects by layer.

    Objects count by their first token: facts whose objects share it give NaN for what compares them. ``margin`` is
    logit(old) − logit(new). ``percentile_old`` is the share of control objects with a lower logit than the old one
    (ties half), ½ on average if the stream knows nothing of it; NaN without controls.

    Attributes:
        prepend_bos: BOS policy; None for the model's default.
    """

    prepend_bos: bool | None = None

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read some facts; axes are fact, layer (after that block), position, quantity."""
        facts = as_facts(facts)
        bos = bos_policy(model, self.prepend_bos)
        states = read_states(model, facts, prepend_bos=bos)
        # The first label is what enters the first block.
        return read_objects(model, facts, states.values[:, 1:], states.layers[1:], bos=bos, name="logit lens")


def read_objects(
    model: Model,
    facts: Sequence[Fact],
    streams: Iterable[Float[Tensor, "layer position d_model"]],
    layers: Sequence[Hashable],
    *,
    bos: bool,
    name: str,
) -> Reading:
    """The lens's quantities of each fact's objects, as the model's head reads them off some streams of its own."""
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        values = [
            _objects(model.tokenizer, unembed(runner, stream), align(model.tokenizer, fact, prepend_bos=bos), fact)
            for fact, stream in zip(facts, streams, strict=True)
        ]
    return Reading(
        name=name,
        values=torch.stack(values),
        axes={
            "fact": [fact.name for fact in facts],
            "layer": layers,
            "position": POSITIONS,
            "quantity": QUANTITIES,
        },
        unit="nats (logp, margin), rank from 1, share of controls below",
    )


def unembed(runner: Runner, stream: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
    """The model's own final norm and unembedding (and its soft cap) on any vectors; float32.

    Args:
        runner: A runner of the model; call this inside `frozen`.
        stream: Residual streams.
    """
    rows = stream.reshape(-1, 1, stream.shape[-1])
    rows = rows.to(device(runner.model), next(iter(runner.model.parameters())).dtype)
    tokens = torch.zeros(len(rows), 1, dtype=torch.long)
    logits = runner.logits(tokens, start=(runner.n_layers, rows)).float()
    return logits.reshape(*stream.shape[:-1], logits.shape[-1])


def _objects(
    tokenizer: Any, logits: Float[Tensor, "layer position vocab"], row: Aligned, fact: Fact
) -> Float[Tensor, "layer position quantity"]:
    """`QUANTITIES` of a fact's objects; NaN for what first tokens can't tell apart."""
    old = int(row.true_ids[0])
    new = None if row.new_ids is None or row.same_first_token else int(row.new_ids[0])
    spelt = [continuation(tokenizer, row.text, text, prepend_bos=row.prepend_bos) for text in fact.controls]
    controls = logits[..., sorted({int(ids[0]) for ids in spelt} - {old, new})]
    log_p = logits.log_softmax(-1)
    nothing = torch.full(logits.shape[:2], math.nan, device=logits.device)

    def rank(token: int) -> Tensor:
        return (logits > logits[..., token, None]).sum(-1).float() + 1

    def percentile(token: int) -> Tensor:
        own = logits[..., token, None]
        # The mean over no controls is NaN, as it should be.
        return ((controls < own).float() + 0.5 * (controls == own).float()).mean(-1)

    columns = [
        log_p[..., old],
        nothing if new is None else log_p[..., new],
        rank(old),
        nothing if new is None else rank(new),
        nothing if new is None else logits[..., old] - logits[..., new],
        percentile(old),
        nothing if new is None else percentile(new),
    ]
    return torch.stack(columns, -1).cpu()
