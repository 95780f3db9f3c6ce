"""What an edit is to write: v*, the value that makes the model say the new object.

    L(δ) = mean_j −1/T Σ_i log p(o_i | x_j + prompt; v + δ)  +  a · KL(p_δ ‖ p_0)  +  b · ‖δ‖ / ‖v‖²

after Meng et al. 2022 (arXiv:2202.05262, eq. 4) and their code, where the weight decay takes the norm of δ,
not its square. δ is added at the last subject token of every context: to the output of ``W_out`` (ROME), to the
residual stream after the block (MEMIT), or to the outputs of the attention and of ``W_out``, a δ each (PMET). For an
object that is to become unlikely the first term is mean_j p(o | x_j + prompt), and nothing stops early (Hase et al.
2023, arXiv:2301.04213, app. B).

Only the blocks above are run, only the tokens from the last subject token on (what lies before is read from the
attention keys and values of one clean run), and only the logits that the loss reads; many facts at once, each with its
own stop and clamp. The pieces of sequences that are left stand side by side in rows of one width, so that little is
padded (`PackedRows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tqdm.auto import tqdm

from tl_factedit.backend.halving import halving
from tl_factedit.backend.memory import budget, graph_bytes, logits_bytes, past_bytes, together
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, frozen, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.editing.descent import Descent, FitRows
from tl_factedit.editing.objectives import EditTarget
from tl_factedit.editing.value_fit import Fitted, ValueFit, Where

TRIAL = 8
"""On how many tokens it is tried whether a model can be run packed."""


@plain_torch()
def fit_values(
    model: Model,
    targets: Sequence[Fact | EditTarget],
    layer: int,
    contexts: Sequence[str],
    *,
    where: Where = "mlp",
    fit: ValueFit | None = None,
    prepend_bos: bool,
    memory: float | None = 2.0,
    progress: bool = True,
) -> list[Fitted]:
    """Find, for each target, the δ that makes the model go on with its fact's ``target_new`` (or not, if it says so).

    Args:
        model: Either class; its weights don't change.
        targets: What is wanted; a fact alone: that its ``target_new`` becomes likely.
        layer: Whose output gets δ.
        contexts: Prefixes; the first must be the bare one, ``""``.
        where: Where δ is added; see `Where`.
        fit: Hyperparameters.
        prepend_bos: BOS policy.
        memory: What activations may take, in GiB (None for a share of what is free): sets how many facts are fitted at
            once.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The fitted values; the same as for each fact alone, but for rounding.

    Raises:
        ValueError: A fact has no ``target_new``, or embeddings are given for another number of tokens than its subject
            has.
        RuntimeError: A loss or δ is not finite.
    """
    room = budget(model, memory)
    fit = fit or ValueFit()
    wanted = [EditTarget(each) if isinstance(each, Fact) else each for each in targets]
    for target in wanted:
        if target.fact.target_new is None:
            raise ValueError(
                f"fact {target.fact.name!r} has no target_new, needed one to write: fact.but(target_new=...)"
            )
    if not contexts or contexts[0]:
        raise ValueError('contexts must begin with the bare one, ""')
    down_proj(model, layer)
    asked = [FitRows.of(model, target, contexts, fit, prepend_bos) for target in wanted]
    found: dict[int, Fitted] = {}
    with (
        frozen(model),
        tqdm(total=len(asked) * fit.steps, unit="step", desc="fitting values", delay=1, disable=not progress) as bar,
    ):
        runner = Runner(model)
        with torch.no_grad():
            longest = max((row for each in asked for row in each.rows), key=len)
            packed = not runner.why_not_packed(longest[:TRIAL], len(longest))
        first = layer if where == "modules" else layer + 1  # of the blocks that a gradient goes through
        groups = _batches(model, asked, first, room, mixed=packed and runner.mixes_pasts)
        for attempt in halving(groups, len, "facts at once", "less memory"):
            with attempt as batch:
                some, begun = [asked[i] for i in batch], bar.n
                try:
                    done = Descent(runner, some, layer, where, fit, packed=packed).run(bar.update)
                finally:
                    detach_caches(model)
                found.update(zip(batch, done, strict=True))
                bar.update(begun + len(batch) * fit.steps - bar.n)  # the steps of those that stopped early
    return [found[i] for i in range(len(asked))]


def _batches(model: Model, asked: Sequence[FitRows], first: int, memory: float, *, mixed: bool) -> Iterator[list[int]]:
    """As many facts at a time as their graphs leave room for; those of one width, if shorter rows can't be joined."""
    token, read, past = graph_bytes(model, first), logits_bytes(model), past_bytes(model)
    widths = [0 if mixed else max(rows.queries) for rows in asked]
    order = sorted(range(len(asked)), key=lambda i: widths[i])
    needs = [
        sum(asked[i].queries) * token + sum(map(len, asked[i].read)) * read + sum(map(len, asked[i].rows)) * past
        for i in order
    ]
    for batch in together(needs, memory, [widths[i] for i in order]):
        yield [order[i] for i in batch]
