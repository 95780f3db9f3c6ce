"""Coverage: does an edit fire wherever the fact is asked for, and nowhere else?

An edit adds k_t ΔW at a token. Of what it was written to add, r = k* ΔW, that is the gain (for a rank-one edit
g = uᵀk / uᵀk*)::

    g = (k ΔW) · r / ‖r‖²

In a prompt that asks for the fact, the new object should lead where the gain at the last subject token is at least the
critical dose a* (`dose_curve`, which leaves all other tokens alone); coverage is the share of contexts where it is.
Elsewhere, for the subject's other facts and for other subjects, a gain is off_target.

Descriptive: it tells how robust a key is, and nothing corresponds to it in a model that was retrained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, check_room, encode, of_all, pad
from tl_factedit.editing.edit import Edit
from tl_factedit.evaluation.dose import Dose, dose_curve
from tl_factedit.measure.first_tokens import with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Part, Population

if TYPE_CHECKING:
    import pandas as pd

ASKING = ("prompt", "paraphrases", "prefixed")
"""Groups of contexts that ask for the fact itself."""
GROUPS = (*ASKING, "same_subject", "neighbours")


@dataclass(frozen=True, eq=False)
class Coverage:
    """The gains of some edits over contexts.

    Attributes:
        facts: What was asked.
        critical: a*, the dose at which the new object overtakes the old in the fact's own prompt, [fact]; NaN where it
            never does.
        gains: For each group of contexts (`GROUPS`) and fact, its gains: at the last subject token, and for neighbours
            the one of largest size among all tokens.
        covered: For each group that asks for the fact, the share of contexts where the gain is at least a*, over facts.
    """

    facts: tuple[Fact, ...]
    critical: Float[Tensor, "fact"]
    gains: Mapping[str, tuple[Float[Tensor, "_"], ...]]
    covered: Mapping[str, Estimate]

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a group of contexts."""
        import pandas as pd

        rows = []
        for group, of_facts in self.gains.items():
            all_ = torch.cat(list(of_facts)).double()
            low, middle, high = (
                all_.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
                if len(all_)
                else (math.nan,) * 3
            )
            found = self.covered.get(group, Estimate(math.nan, math.nan, math.nan, 0))
            rows.append(
                {
                    "contexts": group,
                    "n": len(all_),
                    "gain_5": low,
                    "gain_50": middle,
                    "gain_95": high,
                    "covered": found.mean,
                    "low": found.low,
                    "high": found.high,
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """The coverage of each group that was asked."""
        shown = [f"{group} {found:.2f}" for group, found in self.covered.items() if found.n]
        return f"Coverage({'; '.join(shown)})"


@plain_torch()
def gain_coverage(
    population: Population,
    *,
    prefixes: Sequence[str] = (),
    same_subject: Sequence[Fact] = (),
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
) -> Coverage:
    """The gains of edits of one layer over the contexts of their facts.

    Args:
        population: An edit of one layer, or one for each fact, and the facts it was made for, with ``target_new``;
            their paraphrases (templates) and neighbours are contexts.
        prefixes: Texts to put before the prompt and each paraphrase.
        same_subject: Other facts about the same subjects.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: A fact without ``target_new``, or that the edit wasn't made for; an edit of several layers, or a
            change that isn't an `Edit`.
    """
    facts, model, bos = with_new_objects(population.facts), population.model, population.prepend_bos
    parts = population.parts
    for part in parts:
        if not isinstance(part.changed, Edit):
            raise ValueError(f"{type(part.changed).__name__} isn't an Edit, needed one, whose gain is known")
        if len(part.changed.deltas) != 1:
            raise ValueError(
                f"the edit writes layers {list(part.changed.layers)}, needed one: of several there is no one gain"
            )
    contexts_of = of_all(facts, lambda fact: _contexts(model, fact, prefixes, same_subject, bos))  # before any pass
    found: dict[str, list[Tensor]] = {group: [torch.empty(0)] * len(facts) for group in GROUPS}
    critical, least = torch.full((2, len(facts)), math.nan)
    for part in parts:
        made = part.changed
        assert isinstance(made, Edit)

        def gather(part: Part = part, made: Edit = made) -> tuple[Tensor, Tensor, tuple[tuple[Tensor, ...], ...]]:
            dose = dose_curve(model, made, part.facts, batch_tokens=batch_tokens)
            gains: list[tuple[Tensor, ...]] = []
            for i in part.indices:
                fact, contexts = facts[i], contexts_of[i]
                fired = _gains(model, made, fact, [ids for _, ids, _ in contexts], batch_tokens)
                values = {
                    group: [
                        float(gain[gain.abs().argmax()] if at is None else gain[at])
                        for (theirs, _, at), gain in zip(contexts, fired, strict=True)
                        if theirs == group
                    ]
                    for group in GROUPS
                }
                gains.append(tuple(torch.tensor(values[group]) for group in GROUPS))
            return dose.critical, _least(dose), tuple(gains)

        asked = (tuple(prefixes), [asdict(fact) for fact in same_subject], batch_tokens)
        mine = list(part.indices)
        critical[mine], least[mine], gains_of = population.keep("gain coverage", part, gather, settings=asked)
        for i, of_fact in zip(part.indices, gains_of, strict=True):
            for group, values in zip(GROUPS, of_fact, strict=True):
                found[group][i] = values
    covered = {
        group: over_facts(
            [
                float((gains >= a).float().mean()) if len(gains) and not math.isnan(a) else math.nan
                for gains, a in zip(found[group], least.tolist(), strict=True)
            ],
            seed=seed,
        )
        for group in ASKING
    }
    return Coverage(facts, critical, {group: tuple(of_facts) for group, of_facts in found.items()}, covered)


def _least(dose: Dose) -> Float[Tensor, "fact"]:
    """The smallest gain at which the new object leads: a*, or ∞ where it never does, −∞ where it always does."""
    ends = dose.margin[:, -1]
    always = torch.where(ends < 0, math.inf, torch.where(ends > 0, -math.inf, math.nan))
    return torch.where(dose.critical.isnan(), always, dose.critical)


def _contexts(
    model: Model, fact: Fact, prefixes: Sequence[str], same_subject: Sequence[Fact], bos: bool
) -> list[tuple[str, Tensor, int | None]]:
    """Group, token ids and position of the last subject token (None: any) of each context."""
    tokenizer = model.tokenizer
    templates = [template for template in fact.paraphrases if "{}" in template]
    rows = [("prompt", align(tokenizer, fact, prepend_bos=bos))]
    rows += [("paraphrases", align(tokenizer, fact, prepend_bos=bos, template=template)) for template in templates]
    rows += [
        ("prefixed", align(tokenizer, fact, prepend_bos=bos, template=template, prefix=prefix))
        for prefix in prefixes
        for template in (fact.prompt, *templates)
    ]
    rows += [("same_subject", align(tokenizer, a, prepend_bos=bos)) for a in same_subject if a.subject == fact.subject]
    found: list[tuple[str, Tensor, int | None]] = [(group, row.ids, row.last) for group, row in rows]
    found += [("neighbours", encode(tokenizer, text, prepend_bos=bos)[0], None) for text in fact.neighbours]
    for group, ids, _ in found:
        check_room(ids, [], getattr(model.cfg, "n_ctx", None), f"{group}: {tokenizer.decode(ids)}")
    return found


def _gains(
    model: Model, edit: Edit, fact: Fact, texts: Sequence[Tensor], batch_tokens: int
) -> list[Float[Tensor, "_"]]:
    """The gain of a fact's change at every token of some texts; keys of the first edited layer don't feel the edit."""
    (delta,) = edit.deltas
    mine = [i for i, other in enumerate(edit.facts) if (other.subject, other.prompt) == (fact.subject, fact.prompt)]
    if not mine:
        raise ValueError(f"the edit wasn't made for {fact.name!r}, needed its key: ask for the facts of the edit")
    written = edit.keys[delta.layer][mine[0]].double().cpu() @ delta.left.cpu() @ delta.right.cpu()
    unit = delta.left.cpu() @ (delta.right.cpu() @ written) / (written @ written)
    site = down_proj(model, delta.layer)
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for attempt in that_fit([len(ids) for ids in texts], batch_tokens):
            with attempt as some:
                keys = runner.capture(pad([texts[i] for i in some], 0), [site.key_hook], stop=delta.layer + 1)
                for i, own in zip(some, keys[site.key_hook], strict=True):
                    out[i] = own[: len(texts[i])].double().cpu() @ unit
    return out
