"""Many facts over several layers: the values wanted at the last of them, approached layer by layer (MEMIT's way).

Meng et al. 2023 (arXiv:2210.07229, algorithm 1). For each fact, z is what the residual stream after the last edited
layer L* should be at the last subject token (for PMET: what ``W_out`` of that layer should answer there). Layer by
layer from below, with the layers before already changed, what is still missing is spread over the layers that are
left::

    R_i = (Z − h^{L*}) / (r − i)      i = 0 … r−1
    Δ_i : keys K_i → R_i               by the editor's own closed form

Keys are means over contexts, in which the bare prompt weighs as much as all sampled ones together, as in their code.

What a block adds to the stream isn't always what ``W_out`` answers: Gemma 2 and 3 and OLMo 2 have a norm after the MLP,
Granite a multiplier. A change of the stream can't be written into such a ``W_out`` as it is; there z is what ``W_out``
of the last layer should answer, found through the norm, and met in the same units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.packing import gather
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj, write_all
from tl_factedit.core.facts import Fact
from tl_factedit.core.solve import Factors, NotPositiveDefiniteError
from tl_factedit.core.tokens import align, batches, pad
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.diagnostics import diagnose_many
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import (
    align_facts,
    bos_of,
    check_facts,
    check_stats,
    prefixes,
    record,
)
from tl_factedit.editing.ledger import base_fingerprint, made_on
from tl_factedit.editing.objectives import EditTarget, Inject, Objective, set_subjects
from tl_factedit.editing.off_target import measure_off_target
from tl_factedit.editing.value_fit import ValueFit, Where
from tl_factedit.editing.values import fit_values
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts

Divide = Literal["even", "root"]
"""How what is missing is spread over n layers that are left: 1/n of it, or (PMET) 1/√n."""

Solve = Callable[[Float[Tensor, "fact d_mlp"], Float[Tensor, "fact d_model"]], Factors]
"""An editor's closed form for one layer: from its keys and the residuals wanted there to the update."""

AT_ONCE = 4096
"""Most tokens in a forward pass."""


@dataclass(frozen=True, eq=False)
class Spread:
    """What was written in one layer.

    Attributes:
        delta: The update.
        keys: Of the facts, [fact d_mlp], float64.
        residuals: What each was to change by, [fact d_model], float64.
    """

    delta: Delta
    keys: Float[Tensor, "fact d_mlp"]
    residuals: Float[Tensor, "fact d_model"]


def by_layer(stats: KeyStats | Mapping[int, KeyStats]) -> dict[int, KeyStats]:
    """Statistics by layer, ascending.

    Raises:
        ValueError: None are given, or one stands under another layer.
    """
    if isinstance(stats, KeyStats):
        return {stats.layer: stats}
    if not isinstance(stats, Mapping):
        raise ValueError(
            f"stats is a {type(stats).__name__}, needed KeyStats by layer: key_stats(model, layers, texts)"
        )
    if not stats:
        raise ValueError("stats is empty, needed the statistics of one layer at least: key_stats(model, layers, texts)")
    for layer, each in stats.items():
        if each.layer != layer:
            raise ValueError(f"stats has the statistics of layer {each.layer} under {layer}: give them by their layer")
    return dict(sorted(stats.items()))


def spread_edit(
    model: Model,
    facts: Sequence[Fact],
    stats: Mapping[int, KeyStats],
    prepare: Callable[[KeyStats], Solve],
    *,
    fit: ValueFit,
    contexts: SampledContexts | Sequence[str],
    ridge: float | None,
    prepend_bos: bool | None,
    editor: Mapping[str, Any],
    objective: Objective | None = None,
    where: Where = "resid",
    divide: Divide = "even",
    memory: float = 2.0,
    progress: bool = True,
) -> Edit:
    """An edit of many facts over the layers of some statistics.

    Args:
        model: Either class; its weights are as before afterwards.
        facts: With what the objective needs.
        stats: By layer, ascending.
        prepare: The editor's closed form for one layer, from its statistics; called before any forward pass.
        fit: How z is found, at the last of the layers.
        contexts: Prefixes to average keys over and to find z under.
        ridge: Of the statistics (what the check of their tokens has to know); None where C isn't inverted.
        prepend_bos: BOS policy; None for that of the statistics, or else the model's.
        editor: Name and hyperparameters, as plain data.
        objective: What is wanted of the facts; None for their ``target_new``.
        where: Where z is found, and met: in the stream after the last layer, or (for anything else) in what its
            ``W_out`` answers. In the edit's ``editor["where"]`` is which it was: the second where a norm or a
            multiplier stands between ``W_out`` and the stream.
        divide: Of `Divide`.
        memory: Of `fit_values`.
        progress: Whether to show a bar on what takes longer than a second.
    """
    objective = objective or Inject()
    facts = check_facts(facts, objective)
    layers = list(stats)
    for layer in layers:
        down_proj(model, layer)
    base = base_fingerprint(model)
    check_stats(list(stats.values()), model, base, ridge)
    bos = bos_of(stats.values(), prepend_bos, model)
    rows = align_facts(model, facts, fit, bos)
    solve = {layer: prepare(stats[layer]) for layer in layers}
    texts = prefixes(contexts, model)
    with frozen(model):
        wishes = objective.wishes(model, facts, prepend_bos=bos)
        if where == "resid" and not _reach_stream(model, layers, rows[0].ids):
            where = "mlp"
        fitted = fit_values(
            model, wishes, layers[-1], texts, where=where, fit=fit, prepend_bos=bos, memory=memory, progress=progress
        )
        with torch.no_grad():
            wanted = torch.stack([each.outputs[0] + each.delta for each in fitted])
            found, missed = spread(
                model,
                wishes,
                layers,
                wanted,
                solve,
                texts,
                where=where,
                prepend_bos=bos,
                divide=divide,
                progress=progress,
            )
            sites = {each.delta.layer: down_proj(model, each.delta.layer) for each in found}
            deltas = tuple(each.delta for each in found)
            off_target = measure_off_target(model, facts, deltas, prepend_bos=bos)
            return Edit(
                facts=facts,
                deltas=deltas,
                keys={each.delta.layer: each.keys for each in found},
                values={
                    each.delta.layer: sites[each.delta.layer].value(each.keys.to(wanted.device)).cpu()
                    + each.keys @ each.delta.left @ each.delta.right
                    for each in found
                },
                editor={**editor, "where": where},
                contexts=texts,
                diagnostics=tuple(
                    diagnose_many(
                        sites[each.delta.layer],
                        each.delta,
                        _directions(each),
                        each.keys,
                        each.residuals,
                        off_target=off_target[each.delta.layer],
                    )
                    for each in found
                ),
                fits=tuple(
                    {**record(each, wish, same_first_token=row.same_first_token), "missed": float(share)}
                    for each, wish, row, share in zip(fitted, wishes, rows, missed, strict=True)
                ),
                provenance=made_on(model, bos, base),
            )


def _reach_stream(model: Model, layers: Sequence[int], tokens: Int[Tensor, "pos"]) -> bool:
    """Whether what ``W_out`` answers is added to the stream as it is, in all of some layers."""
    sites = [down_proj(model, layer) for layer in layers]
    places = [component_hook("mlp", layer) for layer in layers]
    places += [site.value_at for site in sites if isinstance(site.value_at, str)]
    with torch.no_grad():
        found = Runner(model).capture(tokens[None], list(dict.fromkeys(places)), stop=layers[-1] + 1)
    return all(site.reaches_stream(found) for site in sites)


def _directions(written: Spread) -> Float[Tensor, "fact d_mlp"]:
    """Along which a fact's key is answered; for more facts than dimensions, along its key."""
    left = written.delta.left
    return left.T if left.shape[1] == len(written.keys) else written.keys


def spread(
    model: Model,
    wishes: Sequence[EditTarget],
    layers: Sequence[int],
    wanted: Float[Tensor, "fact d_model"],
    solve: Mapping[int, Solve],
    contexts: Sequence[str],
    *,
    where: Where = "resid",
    prepend_bos: bool,
    divide: Divide = "even",
    progress: bool = True,
) -> tuple[list[Spread], Float[Tensor, "fact"]]:
    """Bring what stands at the last layer for each fact to what is wanted; the weights are as before afterwards.

    Args:
        model: Either class, inside `frozen` and without gradients.
        wishes: Of which facts, and with which embeddings.
        layers: To be changed, ascending.
        wanted: Z, float64.
        solve: The editor's closed form, by layer.
        contexts: Prefixes, the bare one first.
        where: What is wanted: the stream after the last layer (``"resid"``), or what its ``W_out`` answers.
        prepend_bos: BOS policy.
        divide: Of `Divide`.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        What was written, and the share of what each fact lacked that it still lacks at its bare prompt.
    """
    asked = _Subjects.of(model, wishes, contexts, prepend_bos, layers[0])
    reached = asked.stream_after if where == "resid" else asked.answers
    found: list[Spread] = []
    lacked = torch.empty(0)
    with _restored(model, layers):
        for i, layer in enumerate(tqdm(layers, desc="solving layers", delay=1, disable=not progress, leave=False)):
            site = down_proj(model, layer)
            keys = asked.keys(layer)
            left = len(layers) - i
            missing = wanted.to(keys.device) - reached(layers[-1])
            lacked = missing.norm(dim=-1) if i == 0 else lacked
            residuals = missing / (left if divide == "even" else math.sqrt(left))
            try:
                factors = solve[layer](keys, residuals)
            except NotPositiveDefiniteError as error:
                raise ValueError(
                    f"the keys of the {len(keys)} facts are nearly dependent in layer {layer} ({error}), so that not "
                    "all can be met: pass a larger weight (0.1 for Emmet, 1e-8 or more for AlphaEdit), or leave out "
                    "facts of the same subject"
                ) from error
            delta = Delta(layer, factors.left.cpu(), factors.right.cpu())
            if not bool(torch.isfinite(delta.left).all() and torch.isfinite(delta.right).all()):
                raise RuntimeError(f"the update of layer {layer} is not finite: nothing was written")
            site.write_(delta.on(site.W))
            found.append(Spread(delta, keys.cpu(), residuals.cpu()))
        lacks = (wanted.to(lacked.device) - reached(layers[-1])).norm(dim=-1)
    return found, torch.where(lacks == 0, 0.0, lacks / lacked).cpu()


@contextmanager
def _restored(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """Put the weights of some layers back, bit for bit, whatever happens."""
    sites = [down_proj(model, layer) for layer in layers]
    before = [site.W.clone() for site in sites]
    try:
        yield
    finally:
        write_all(sites, before)


@dataclass(frozen=True, eq=False)
class _Subjects:
    """Every fact's subject in every context, run up to the first layer that changes.

    Attributes:
        runner: Of the model.
        first: That layer.
        facts: How many there are.
        batches: Token ids of some rows, their lookups, their places among all rows, and the stream before `first`.
        contexts: How many contexts a fact has; its rows stand together, the bare one first.
    """

    runner: Runner
    first: int
    facts: int
    batches: list[tuple[Int[Tensor, "row pos"], Int[Tensor, "row"], Int[Tensor, "row"], Tensor]]
    contexts: int

    @classmethod
    def of(
        cls, model: Model, wishes: Sequence[EditTarget], contexts: Sequence[str], prepend_bos: bool, first: int
    ) -> _Subjects:
        runner = Runner(model)
        rows, lookups, subjects = [], [], []
        for wish in wishes:
            for context in contexts:
                row = align(model.tokenizer, wish.fact, prepend_bos=prepend_bos, prefix=context)
                rows.append(row.ids[: row.last + 1])  # nothing after the subject matters to it
                lookups.append(row.last)
                subjects.append((wish, row.subject))
        kept = []
        for places in batches([len(row) for row in rows], AT_ONCE):
            tokens = pad([rows[i] for i in places], 0)
            hooks = set_subjects([subjects[i] for i in places])
            stream = runner.capture(tokens, [resid_pre(first)], stop=first, hooks=hooks)[resid_pre(first)]
            kept.append((tokens, torch.tensor([lookups[i] for i in places]), torch.tensor(places), stream))
        return cls(runner, first, len(wishes), kept, len(contexts))

    def keys(self, layer: int) -> Float[Tensor, "fact d_mlp"]:
        """Of each fact, with the weights as they are now."""
        name = down_proj(self.runner.model, layer).key_hook
        rows = self._at_lookup(name, layer).unflatten(0, (self.facts, self.contexts))
        if self.contexts == 1:
            return rows[:, 0]
        return (rows[:, 0] + rows[:, 1:].mean(1)) / 2

    def stream_after(self, layer: int) -> Float[Tensor, "fact d_model"]:
        """H after a layer in the bare prompts, with the weights as they are now."""
        return self._at_lookup(resid_post(layer), layer, bare=True)

    def answers(self, layer: int) -> Float[Tensor, "fact d_model"]:
        """What a layer's W_out answers in the bare prompts, with the weights as they are now."""
        site = down_proj(self.runner.model, layer)
        return site.value(self._at_lookup(site.key_hook, layer, bare=True))

    def _at_lookup(self, place: str, layer: int, *, bare: bool = False) -> Tensor:
        values: dict[int, Tensor] = {}
        for tokens, lookups, places, stream in self.batches:
            use = (places % self.contexts == 0).nonzero()[:, 0] if bare else torch.arange(len(places))
            if not len(use):
                continue
            found = self.runner.capture(tokens[use], [place], start=(self.first, stream[use]), stop=layer + 1)[place]
            at = gather(found, lookups[use][:, None])[:, 0].double()
            values |= dict(zip(places[use].tolist(), at, strict=True))
        return torch.stack([values[i] for i in sorted(values)])
