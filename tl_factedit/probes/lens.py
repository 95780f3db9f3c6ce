"""Logit lens: what the model's own head reads off the residual stream, layer by layer.

``W_U · LN_f(h)`` at the last subject token ("subject") and the last token ("last"). At the subject
this measures which attributes the stream holds, not a prediction; either way a rank means little
without its null, which is here the rank of *control objects* of the same relation (`Fact.controls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from tl_factedit.facts import Fact
from tl_factedit.model import Model, Runner, bos_policy, quiet, resid_post
from tl_factedit.probe import Reading
from tl_factedit.tokens import align, continuation

QUANTITIES = ("logp_old", "logp_new", "rank_old", "rank_new", "margin", "percentile_old", "percentile_new")
POSITIONS = ("subject", "last")


@dataclass(frozen=True)
class LogitLens:
    """Log-probability (nats), rank (1 = first) and margin of a fact's objects by layer.

    Objects count by their first token: facts whose objects share it give NaN for what compares
    them. ``margin`` is logit(old) − logit(new). ``percentile_old`` is the share of control objects
    with a lower logit than the old one, .5 if the stream knows nothing of it; NaN without controls.

    Attributes:
        prepend_bos: BOS policy; None for the model's default.
    """

    prepend_bos: bool | None = None

    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read; axes are fact, layer (after that block), position, quantity."""
        facts = (facts,) if isinstance(facts, Fact) else tuple(facts)
        if not facts:
            raise ValueError("facts is empty, needed at least one")
        with quiet(model), torch.no_grad():
            runner = Runner(model)
            values = torch.stack([self._read(runner, fact) for fact in facts])
        return Reading(
            name="logit lens",
            values=values,
            axes={
                "fact": [fact.name for fact in facts],
                "layer": range(runner.n_layers),
                "position": POSITIONS,
                "quantity": QUANTITIES,
            },
            unit="nats (logp, margin), rank from 1, share of controls below",
        )

    def _read(self, runner: Runner, fact: Fact) -> Float[Tensor, "layer position quantity"]:
        tokenizer = runner.model.tokenizer
        bos = bos_policy(runner.model, self.prepend_bos)
        row = align(tokenizer, fact, prepend_bos=bos)
        names = [resid_post(layer) for layer in range(runner.n_layers)]
        caught = runner.capture(row.ids[None], names)
        stream = torch.cat([caught[name] for name in names])
        layers = runner.n_layers
        logits = runner.logits(
            repeat(row.ids, "pos -> layer pos", layer=layers),
            at=torch.tensor([[row.last, len(row.ids) - 1]]).expand(layers, 2),
            start=(runner.n_layers, stream),
        ).float()
        old = int(row.true_ids[0])
        new = None if row.new_ids is None or row.same_first_token else int(row.new_ids[0])
        firsts = {int(continuation(tokenizer, row.text, text, prepend_bos=bos)[0]) for text in fact.controls}
        controls = logits[..., sorted(firsts - {old, new})]
        nothing = torch.full(logits.shape[:2], float("nan"))
        log_p = logits.log_softmax(-1)

        def percentile(token: int) -> Tensor:
            if not controls.shape[-1]:
                return nothing
            mine = logits[..., token, None]
            return ((controls < mine).float() + 0.5 * (controls == mine).float()).mean(-1)

        def rank(token: int) -> Tensor:
            return (logits > logits[..., token, None]).sum(-1).float() + 1

        columns = [
            log_p[..., old],
            nothing if new is None else log_p[..., new],
            rank(old),
            nothing if new is None else rank(new),
            nothing if new is None else logits[..., old] - logits[..., new],
            percentile(old),
            nothing if new is None else percentile(new),
        ]
        return torch.stack([column.cpu() for column in columns], -1)
