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
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.memory import check_memory
from tl_factedit.backend.packing import gather
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import down_proj, write_all
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import check_one
from tl_factedit.core.solve import Factors, NotPositiveDefiniteError, least_squares, weight_for_unmet
from tl_factedit.core.tokens import align, pad
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.description import describe
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import (
    EditInputs,
    check_contexts,
    check_fit,
    check_number,
    check_objective,
    check_ridge,
    prefixes,
)
from tl_factedit.editing.objectives import EditTarget, Objective, set_subjects
from tl_factedit.editing.value_fit import ValueFit, Where
from tl_factedit.editing.values import fit_values
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts

Divide = Literal["even", "root"]
"""How much of what is missing a layer is asked for when n are left: 1/n of it, or (PMET) 1/√n."""

Solver = Callable[[Float[Tensor, "fact d_mlp"], Float[Tensor, "fact d_model"]], Factors]
"""An editor's closed form for one layer: from its keys and the residuals wanted there to the update."""

AT_ONCE = 4096
"""Most tokens in a forward pass."""


MEMIT_FIT = ValueFit(steps=25, clamp=0.75)
"""How Meng et al. 2023 find z; ROME's clamp is 4."""

MEMIT_CONTEXTS = SampledContexts(lengths=((5, 10),), starts=("The", "Therefore", "Because", "I", "You"))
"""What they begin their contexts with."""


@runtime_checkable
class LayerwiseEditor(Protocol):
    """An editor of this family: a frozen dataclass with these fields, and a closed form for one layer."""

    @property
    def stats(self) -> Mapping[int, KeyStats]:
        """Second moments of the keys by layer, ascending: the layers to edit."""
        ...

    @property
    def objective(self) -> Objective:
        """What is wanted of the facts."""
        ...

    @property
    def fit(self) -> ValueFit:
        """How z is found, at the last of the layers."""
        ...

    @property
    def contexts(self) -> SampledContexts | Sequence[str]:
        """Prefixes to average keys over and to find z under."""
        ...

    @property
    def prepend_bos(self) -> bool | None:
        """BOS policy; None for that of the statistics, or else the model's."""
        ...

    @property
    def memory(self) -> float | None:
        """What activations may take while z is found, in GiB."""
        ...

    @property
    def progress(self) -> bool:
        """Whether to show a bar on what takes longer than a second."""
        ...

    def solver(self, stats: KeyStats) -> Solver:
        """The closed form for the layer of these statistics; made before any forward pass, as C may be singular."""
        ...


def check_layerwise(editor: LayerwiseEditor, *, ridge: float | None) -> dict[int, KeyStats]:
    """Check the fields that all editors of this family share.

    Args:
        editor: The editor, as it was made.
        ridge: What it adds to the second moments; None where none is inverted.

    Returns:
        Its statistics by layer, ascending.

    Raises:
        ValueError: A field isn't what it has to be; the message names it.
    """
    check_memory(editor.memory)
    stats = by_layer(editor.stats)
    if ridge is not None:
        check_ridge(ridge)
    check_objective(editor.objective)
    check_contexts(editor.contexts)
    check_fit(editor.fit)
    return stats


def check_weight(weight: float | None, unmet: float | None) -> None:
    """Check a weight λ, or the share that is to be left unmet in place of it.

    Raises:
        ValueError: Both are given, or one isn't a number in its range.
    """
    for name, value in (("weight", weight), ("unmet", unmet)):
        if value is not None:
            check_number(name, value)
    if weight is not None and unmet is not None:
        raise ValueError(f"weight is {weight} and unmet is {unmet}, needed one of the two")
    if weight is not None and not weight > 0:
        raise ValueError(f"weight is {weight}, needed more than 0 (Emmet meets all residuals exactly)")
    if unmet is not None and not 0 < unmet < 1:
        raise ValueError(f"unmet is {unmet}, needed a share between 0 and 1")


def regularised(lower: Float[Tensor, "d_mlp d_mlp"], weight: float | None, unmet: float | None) -> Solver:
    """MEMIT's closed form, with λ given or found from the share that is to be left unmet.

    Args:
        lower: Cholesky factor of C.
        weight: λ; None to find it.
        unmet: The share.
    """

    def solve(keys: Tensor, residuals: Tensor) -> Factors:
        factor = lower.to(keys.device)
        chosen = weight_for_unmet(keys, residuals, factor, unmet or 0.0) if weight is None else weight
        return least_squares(keys, residuals, factor, chosen)

    return solve


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
        check_one(each, KeyStats, f"stats[{layer!r}]", "KeyStats by layer: key_stats(model, layers, texts)")
        if each.layer != layer:
            raise ValueError(f"stats has the statistics of layer {each.layer} under {layer}: give them by their layer")
    return dict(sorted(stats.items()))


@plain_torch()
def layerwise_edit(
    editor: LayerwiseEditor,
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    ridge: float | None,
    where: Where = "resid",
    divide: Divide = "even",
) -> Edit:
    """The edit of many facts over the layers of an editor's statistics.

    Args:
        editor: The hyperparameters, and the closed form of one layer.
        model: Either class; its weights are as before afterwards.
        facts: With what the objective needs.
        ridge: Added to the second moments (the check of their tokens has to know); None where none is inverted.
        where: Where z is found, and met: in the stream after the last layer, or (for anything else) in what its
            ``W_out`` answers. Which it was stands in the edit's ``editor["where"]``: the second where a norm or a
            multiplier stands between ``W_out`` and the stream.
        divide: How what is missing is divided among the layers that are left.
    """
    layers = list(editor.stats)
    inputs = EditInputs.of(
        model,
        facts,
        layers,
        objective=editor.objective,
        stats=editor.stats.values(),
        ridge=ridge,
        fit=editor.fit,
        prepend_bos=editor.prepend_bos,
    )
    bos = inputs.prepend_bos
    solvers = {layer: editor.solver(stats) for layer, stats in editor.stats.items()}
    contexts = prefixes(editor.contexts, inputs)
    with frozen(model):
        targets = editor.objective.targets(model, inputs.facts, prepend_bos=bos)
        if where == "resid" and not _reach_stream(model, layers, inputs.prompts[0].ids):
            where = "mlp"
        fitted = fit_values(
            model,
            targets,
            layers[-1],
            contexts,
            where=where,
            fit=editor.fit,
            prepend_bos=bos,
            memory=editor.memory,
            progress=editor.progress,
        )
        with torch.no_grad():
            updates, missed = distribute(
                model,
                targets,
                layers,
                torch.stack([fit.outputs[0] + fit.delta for fit in fitted]),
                solvers,
                contexts,
                where=where,
                prepend_bos=bos,
                divide=divide,
                progress=editor.progress,
            )
            return Edit.made(
                inputs,
                updates,
                editor={**describe(editor), "where": where},
                contexts=contexts,
                targets=targets,
                fits=[{**fit.record, "missed": float(share)} for fit, share in zip(fitted, missed, strict=True)],
            )


def _reach_stream(model: Model, layers: Sequence[int], tokens: Int[Tensor, "pos"]) -> bool:
    """Whether what ``W_out`` answers is added to the stream as it is, in all of some layers."""
    sites = [down_proj(model, layer) for layer in layers]
    places = [component_hook("mlp", layer) for layer in layers]
    places += [site.value_at for site in sites if isinstance(site.value_at, str)]
    with torch.no_grad():
        found = Runner(model).capture(tokens[None], list(dict.fromkeys(places)), stop=layers[-1] + 1)
    return all(site.reaches_stream(found) for site in sites)


def _directions(delta: Delta, keys: Float[Tensor, "fact d_mlp"]) -> Float[Tensor, "fact d_mlp"]:
    """The direction along which each fact's key is answered; for more facts than dimensions, its key."""
    return delta.left.T if delta.left.shape[1] == len(keys) else keys


def distribute(
    model: Model,
    targets: Sequence[EditTarget],
    layers: Sequence[int],
    wanted: Float[Tensor, "fact d_model"],
    solvers: Mapping[int, Solver],
    contexts: Sequence[str],
    *,
    where: Where = "resid",
    prepend_bos: bool,
    divide: Divide = "even",
    progress: bool = True,
) -> tuple[list[LayerUpdate], Float[Tensor, "fact"]]:
    """Bring what stands at the last layer for each fact to what is wanted; the weights are as before afterwards.

    Args:
        model: Either class, inside `frozen` and without gradients.
        targets: What is wanted of which facts.
        layers: To be changed, ascending.
        wanted: Z, float64.
        solvers: The editor's closed form, by layer.
        contexts: Prefixes, the bare one first.
        where: What is wanted: the stream after the last layer (``"resid"``), or what its ``W_out`` answers.
        prepend_bos: BOS policy.
        divide: How what is missing is divided among the layers that are left.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The updates, and the share of what each fact lacked that it still lacks at its bare prompt.
    """
    subjects = _Subjects.of(model, targets, contexts, prepend_bos, layers[0])
    reached = subjects.stream_after if where == "resid" else subjects.answers
    updates: list[LayerUpdate] = []
    lacked = torch.empty(0)
    with _restored(model, layers):
        for i, layer in enumerate(tqdm(layers, desc="solving layers", delay=1, disable=not progress, leave=False)):
            site = down_proj(model, layer)
            keys = subjects.keys(layer)
            left = len(layers) - i
            missing = wanted.to(keys.device) - reached(layers[-1])
            lacked = missing.norm(dim=-1) if i == 0 else lacked
            residuals = missing / (left if divide == "even" else math.sqrt(left))
            try:
                factors = solvers[layer](keys, residuals)
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
            keys, residuals = keys.cpu(), residuals.cpu()
            updates.append(LayerUpdate(delta, keys, residuals, _directions(delta, keys), weight=factors.weight))
        lacks = (wanted.to(lacked.device) - reached(layers[-1])).norm(dim=-1)
    return updates, torch.where(lacks == 0, 0.0, lacks / lacked).cpu()


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
        runner: Runs the model.
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
        cls, model: Model, targets: Sequence[EditTarget], contexts: Sequence[str], prepend_bos: bool, first: int
    ) -> _Subjects:
        runner = Runner(model)
        rows, lookups, subjects = [], [], []
        for target in targets:
            for context in contexts:
                row = align(model.tokenizer, target.fact, prepend_bos=prepend_bos, prefix=context)
                rows.append(row.ids[: row.last + 1])  # nothing after the subject matters to it
                lookups.append(row.last)
                subjects.append((target, row.subject))
        kept = []
        for attempt in that_fit([len(row) for row in rows], AT_ONCE):
            with attempt as places:
                tokens = pad([rows[i] for i in places], 0)
                hooks = set_subjects([subjects[i] for i in places])
                stream = runner.capture(tokens, [resid_pre(first)], stop=first, hooks=hooks)[resid_pre(first)]
                kept.append((tokens, torch.tensor([lookups[i] for i in places]), torch.tensor(places), stream))
        return cls(runner, first, len(targets), kept, len(contexts))

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
