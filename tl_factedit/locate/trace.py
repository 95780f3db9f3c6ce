"""Causal tracing: which states, restored, bring the object back after the subject was corrupted.

Meng et al. 2022 (arXiv:2202.05262, sec. 2.1). Three kinds of run: clean; corrupted (other embeddings of the
subject's tokens); corrupted with the activations of some layers at one token restored to their clean values. With m
the metric (by default the probability of ``target_true``), averaged over samples of the corruption::

    total effect     TE      = m(clean)    − m(corrupted)
    indirect effect  IE(l,t) = m(restored) − m(corrupted)

The other way round (``direction="noise"``) corrupted values are put into the clean run, and
IE(l,t) = m(clean) − m(noised): what is lost with this state.

Positions before the subject can't have an effect in a causal model: theirs is exactly 0 and isn't run.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.core import files
from tl_factedit.locate.corruption import Corruption, GaussianNoise, GivenNoise, MultivariateNoise, UniformNoise
from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.core.facts import Fact, as_facts, check_distinct
from tl_factedit.locate.metrics import Metric, identity, metric_of
from tl_factedit.backend.model import Component, Model, component_hook, n_layers, quiet, resid_post, resid_pre
from tl_factedit.locate.patching import Cell, Direction, Patch, Patching, Write
from tl_factedit.backend.provenance import Provenance
from tl_factedit.locate.inputs import Questions, align_all, ask, check_contrasts, check_memory
from tl_factedit.core.records import Unknown, decode, encode
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.core.tokens import Aligned

if TYPE_CHECKING:
    import pandas as pd

CORRUPTIONS = (GaussianNoise, UniformNoise, MultivariateNoise, GivenNoise, TokenReplacement)
ROLES = ("before", "first subject", "middle subject", "last subject", "first after", "further", "last")
"""What a token is in its prompt, each one thing; the last token is ``last`` unless it is of the subject."""


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class Trace:
    """The result of `causal_trace`.

    Attributes:
        effect: IE in units of `metric`, mean over samples, [fact layer pos]; NaN where a shorter fact has no
            token, and for facts that couldn't be corrupted.
        sample_effect: The same for each sample of the corruption, [fact layer pos sample]; NaN where a fact has fewer.
        clean: The metric of the clean run, [fact] (mean over samples where it depends on them).
        corrupted: Of the corrupted runs, mean over samples, [fact].
        sample_corrupted: For each sample, [fact sample].
        tokens: Token strings of each fact's prompt.
        subject: (start, stop) of the subject in each fact's tokens.
        facts: What was traced.
        top: For each fact, the token that the clean model puts first.
        known: Whether that is the first token of ``target_true``; where it isn't, there is little to trace.
        donors: For each fact, whose tokens replaced its subject's (`TokenReplacement`); empty with noise.
        component: ``"resid"`` (the stream after the block), ``"resid_pre"``, ``"resid_mid"``, ``"mlp"`` or
            ``"attn"`` (outputs).
        window: How many layers are restored together.
        severed: ``"mlp"`` or ``"attn"``: these outputs of the layers above stayed as in the corrupted run.
        direction: ``"denoise"`` or ``"noise"``.
        metric: Its name.
        corruption: With its scale as it was used.
        unpacked: Why cells were run as whole sequences, which is slower; ``""`` if they weren't.
        provenance: Model, weights, BOS policy, versions.
    """

    effect: Float[Tensor, "fact layer pos"]
    sample_effect: Float[Tensor, "fact layer pos sample"]
    clean: Float[Tensor, "fact"]
    corrupted: Float[Tensor, "fact"]
    sample_corrupted: Float[Tensor, "fact sample"]
    tokens: tuple[tuple[str, ...], ...]
    subject: tuple[tuple[int, int], ...]
    facts: tuple[Fact, ...]
    top: tuple[str, ...]
    known: tuple[bool, ...]
    donors: tuple[tuple[str, ...], ...]
    component: Component
    window: int
    severed: Literal["mlp", "attn"] | None
    direction: Direction
    metric: str
    corruption: Corruption | Unknown
    unpacked: str
    provenance: Provenance

    @property
    def total_effect(self) -> Float[Tensor, "fact"]:
        """TE = clean minus corrupted."""
        return self.clean - self.corrupted

    @property
    def corruptible(self) -> tuple[bool, ...]:
        """For each fact, whether it could be corrupted; without a donor it can't, and isn't traced."""
        return tuple((~self.corrupted.isnan()).tolist())

    @property
    def at_last_subject_token(self) -> Float[Tensor, "fact layer"]:
        """IE at each fact's last subject token."""
        last = torch.tensor([stop - 1 for _, stop in self.subject])
        return self.effect[torch.arange(len(last)), :, last]

    @property
    def peak_layer(self) -> int:
        """The layer of the largest mean effect at the last subject token."""
        return int(self.at_last_subject_token.nanmean(0).argmax())

    @property
    def partial_window(self) -> tuple[int, ...]:
        """Layers whose window is cut by the model's ends: their cells restore fewer layers."""
        count = self.effect.shape[1]
        return tuple(layer for layer in range(count) if len(window_layers(layer, self.window, count)) < self.window)

    def fraction(self, min_effect: float = 0.05) -> Float[Tensor, "fact layer pos"]:
        """IE / TE: the share of the effect that a cell accounts for.

        Args:
            min_effect: Facts with a smaller total effect (or a negative one) are left out (NaN): a share of little says
                little.
        """
        total = self.total_effect[:, None, None]
        return torch.where(total >= min_effect, self.effect / total, torch.nan)

    def best_fraction(self, min_effect: float = 0.05) -> Float[Tensor, "fact layer"]:
        """The largest share over tokens, by layer (Hase et al. 2023, arXiv:2301.04213, sec. 4.1).

        The largest of noisy numbers is too large on average. So one half of the samples chooses the token
        (or none, whose share is 0) and the other half says its share, and the reverse; the mean of both is unbiased
        for the token chosen, and may come out below 0. With one sample it is simply the largest; a fact that has one
        where others have more is left out (NaN), as are facts with a total effect below `min_effect`.
        """
        total = self.total_effect[:, None, None, None]
        share = self.sample_effect / total
        share = torch.cat([0 * share[:, :, :1], share], 2)  # no token: NaN only where a fact lacks the sample
        if share.shape[-1] < 2:
            best = share[..., 0].nan_to_num(-torch.inf).amax(-1)
        else:
            halves = [share[..., half::2].nanmean(-1) for half in (0, 1)]
            chosen = [half.nan_to_num(-torch.inf).argmax(-1, keepdim=True) for half in halves]
            best = sum(half.gather(-1, other)[..., 0] for half, other in zip(halves, reversed(chosen), strict=True)) / 2
        return torch.where(total[..., 0, 0] >= min_effect, best, torch.nan)

    def by_role(self, *, normalised: bool = False, min_effect: float = 0.05) -> Float[Tensor, "fact role layer"]:
        """Effects by what a token is in its prompt (`ROLES`), mean over a fact's tokens of that role.

        Args:
            normalised: Give shares of the total effect instead (`fraction`).
            min_effect: Of `fraction`.
        """
        effect = self.fraction(min_effect) if normalised else self.effect
        found = torch.full((len(self.facts), len(ROLES), effect.shape[1]), torch.nan)
        for i, (pieces, subject) in enumerate(zip(self.tokens, self.subject, strict=True)):
            of_token = roles(len(pieces), subject)
            for r, role in enumerate(ROLES):
                positions = [p for p, each in enumerate(of_token) if each == role]
                if positions:
                    found[i, r] = effect[i][:, positions].mean(-1)
        return found

    def average(self, *, normalised: bool = False, min_effect: float = 0.05, seed: int = 0) -> Estimates:
        """Means over facts by role and layer, with bootstrap intervals over facts, [role layer] each."""
        return over_facts_each(self.by_role(normalised=normalised, min_effect=min_effect), seed=seed)

    def roles_table(self, *, normalised: bool = False, min_effect: float = 0.05, seed: int = 0) -> pd.DataFrame:
        """`average` as a table: one row a (role, layer), with mean, interval and the number of facts."""
        import pandas as pd

        found = self.average(normalised=normalised, min_effect=min_effect, seed=seed)
        return pd.DataFrame(
            [
                {
                    "role": role,
                    "layer": layer,
                    "effect": float(found.mean[r, layer]),
                    "low": float(found.low[r, layer]),
                    "high": float(found.high[r, layer]),
                    "n": int(found.n[r, layer]),
                }
                for r, role in enumerate(ROLES)
                for layer in range(self.effect.shape[1])
                if found.n[r, layer]
            ]
        )

    def table(self) -> pd.DataFrame:
        """One row a (fact, layer, token): effect, its spread over samples, and the token's role."""
        import pandas as pd

        rows = []
        for i, (fact, pieces, (start, stop)) in enumerate(zip(self.facts, self.tokens, self.subject, strict=True)):
            samples = self.sample_effect[i, :, :, ~self.sample_effect[i, 0, 0].isnan()]
            one = samples.shape[-1] < 2  # which says nothing of a spread
            spread = torch.full(samples.shape[:-1], torch.nan) if one else samples.std(-1)
            of_token = roles(len(pieces), (start, stop))
            for layer in range(self.effect.shape[1]):
                rows += [
                    {
                        "fact": fact.name,
                        "layer": layer,
                        "position": p,
                        "token": piece,
                        "role": of_token[p],
                        "subject": start <= p < stop,
                        "effect": float(self.effect[i, layer, p]),
                        "sample_sd": float(spread[layer, p]),
                    }
                    for p, piece in enumerate(pieces)
                ]
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file."""
        tensors = {
            "sample_effect": self.sample_effect,
            "clean": self.clean,
            "sample_corrupted": self.sample_corrupted,
        }
        header = {
            "corruption": encode(self.corruption, "corruption", tensors, (*CORRUPTIONS, Unknown)),
            "facts": [asdict(fact) for fact in self.facts],
            "provenance": self.provenance.to_json(),
        } | {name: getattr(self, name) for name in _PLAIN}
        files.write(Path(path), "trace", header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a file of `save`.

        Raises:
            ValueError: The file is cut short, changed, or no trace.
        """
        header, tensors = files.read(Path(path), "trace")
        plain = {name: _frozen(header[name]) for name in _PLAIN}
        return cls(
            **_means(tensors["sample_effect"], tensors["sample_corrupted"]),
            clean=tensors["clean"],
            facts=tuple(Fact(**fact) for fact in header["facts"]),
            corruption=decode(header["corruption"], tensors, (*CORRUPTIONS, Unknown)),
            provenance=Provenance.from_json(header["provenance"]),
            **plain,
        )

    def __repr__(self) -> str:
        """Size, effects and peak in a line."""
        what = self.facts[0].text if len(self.facts) == 1 else f"{len(self.facts)} facts"
        without = self.corruptible.count(False)
        missing = f", {without} without a donor" if without else ""
        severed = f" with severed {self.severed}" if self.severed else ""
        window = f"window {self.window}" + (", noising" if self.direction == "noise" else "")
        return (
            f"Trace({what!r}{missing}, {self.component}{severed}, {window}: clean {float(self.clean.nanmean()):.3f}, "
            f"corrupted {float(self.corrupted.nanmean()):.3f}; last subject token peaks at layer {self.peak_layer} "
            f"with {float(self.at_last_subject_token.nanmean(0).max()):.3f})"
        )


_PLAIN = tuple(
    "tokens subject top known donors component window severed direction metric unpacked".split()  # noqa: SIM905
)
"""The attributes of a trace that a file's header holds as they are."""


def causal_trace(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    component: Component = "resid",
    window: int = 1,
    severed: Literal["mlp", "attn"] | None = None,
    corruption: Corruption | None = None,
    metric: str | Metric = "prob",
    direction: Direction = "denoise",
    prepend_bos: bool | None = None,
    memory: float = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Trace where a model's recall of some facts passes through.

    Args:
        model: Either class.
        facts: One fact or several; only ``target_true`` is asked for (``metric="logit_diff"`` may need ``target_new``).
        component: ``"resid"`` (the residual stream after a block), ``"resid_pre"`` (before it), ``"resid_mid"``
            (between attention and MLP, where they follow one another), ``"mlp"`` or ``"attn"`` (their outputs).
        window: Restore this many layers around each, ``l − w//2 … l + (w−1)//2``, fewer at the
            model's ends (`Trace.partial_window`). Meng et al. use 10 for MLP and attention.
        severed: Hold the outputs of ``"mlp"`` or ``"attn"`` of all layers at the restored token at what they are in the
            corrupted run (Meng et al., fig. 3): what is then left of an effect didn't pass through them. For
            single layers of the residual stream.
        corruption: Default: `GaussianNoise` (three standard deviations, ten samples).
        metric: ``"prob"``, ``"logprob"``, ``"logit_diff"``, ``"kl"``, or a function like those in `fe.metrics`.
        direction: ``"denoise"`` restores clean values in corrupted runs (what suffices), ``"noise"`` puts corrupted
            values into the clean run (what is needed).
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        memory: What activations may take, in GiB, beside the model: sets the size of batches.
        folder: Where to keep what is done; a call that was killed goes on from there.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The trace.

    Raises:
        ValueError: A subject or target can't be aligned with its tokens; unknown component or metric; a fact given
            twice; no fact can be corrupted; `folder` holds another trace, or is given with a metric or corruption that
            can't be told from others.
        RuntimeError: What is measured of a run is NaN.
        UnsupportedModelError: The model has no such component.

    Example:
        >>> trace = fe.causal_trace(model, fact)                  # doctest: +SKIP
        >>> trace.peak_layer                                      # doctest: +SKIP
    """
    facts = as_facts(facts)
    window = operator.index(window)
    _check(facts, component, window, severed, direction, memory)
    metric_name, measure = metric_of(metric)
    corruption = corruption or GaussianNoise()
    provenance = Provenance.of(model, prepend_bos)
    rows = align_all(model, facts, prepend_bos=provenance.prepend_bos)
    check_contrasts(facts, rows, measure, corruption)
    count = n_layers(model)
    with quiet(model), torch.no_grad():
        questions = ask(model, facts, rows, corruption)
        settings = {
            "component": component,
            "window": window,
            "severed": severed,
            "direction": direction,
            "metric": metric_name,
        }
        told = settings | {"metric": metric_name if folder is None else identity(metric)}
        parts = _Parts.of(folder, questions, told, provenance)
        frozen = [component_hook(severed, layer) for layer in range(count)] if severed else []
        places = [component_hook(component, layer) for layer in range(count)]
        cells = {i: count * len(_positions(rows[i])) for i, q in enumerate(questions.each) if q.samples > 0}
        with tqdm(
            total=sum(cells.values()),
            initial=sum(cells[i] for i in parts.done),
            unit="cell",
            desc=f"tracing {component}",
            delay=1,
            disable=not progress,
        ) as bar:
            for chunk, patching in questions.chunks(
                places, frozen, measure, direction, memory=memory, skip=frozenset(parts.done)
            ):
                effects = _effects(patching, [rows[i] for i in chunk], component, window, severed, count, bar.update)
                sign = -1 if direction == "noise" else 1
                found = [
                    _Part(sign * effect, clean, corrupted, top)
                    for effect, clean, corrupted, top in zip(
                        effects, patching.clean, patching.corrupted, patching.top, strict=True
                    )
                ]
                parts.add(chunk, found)
        top = [parts.done[i].top if i in parts.done else subject.top() for i, subject in enumerate(questions.subjects)]
    samples = max(question.samples for question in questions.each)
    effect = torch.full((len(rows), count, max(len(row.ids) for row in rows), samples), torch.nan)
    corrupted = torch.full((len(rows), samples), torch.nan)
    clean = torch.full((len(rows),), torch.nan)
    for i, part in parts.done.items():
        _, length, own = part.effect.shape
        effect[i, :, :length, :own], corrupted[i, :own], clean[i] = part.effect, part.corrupted, part.clean.mean()
    return Trace(
        **_means(effect, corrupted),
        clean=clean,
        tokens=tuple(row.pieces for row in rows),
        subject=tuple(row.subject for row in rows),
        facts=facts,
        top=tuple(model.tokenizer.decode([token]) for token in top),
        known=tuple(token == int(row.true_ids[0]) for token, row in zip(top, rows, strict=True)),
        donors=_donors(questions),
        corruption=questions.corruption,
        unpacked=questions.unpacked,
        provenance=provenance,
        **settings,
    )


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """The layers restored for a cell at `layer`: a window of 10 is l−5 … l+4, cut at the model's ends."""
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))


def roles(length: int, subject: tuple[int, int]) -> list[str]:
    """What each token of a prompt is: one of `ROLES`."""
    start, stop = subject
    found = ["before"] * start + ["middle subject"] * (stop - start) + ["further"] * (length - stop)
    found[start] = "first subject"
    found[stop - 1] = "last subject"
    if stop < length:
        found[stop] = "first after"
        found[-1] = "last"
    return found


# ------------------------------------------------------------------------------------ the cells


def _effects(
    patching: Patching,
    rows: Sequence[Aligned],
    component: Component,
    window: int,
    severed: Literal["mlp", "attn"] | None,
    count: int,
    done: Any,
) -> list[Float[Tensor, "layer pos sample"]]:
    """For each question, the metric with a cell changed minus that of the base run."""
    effects = [torch.zeros(count, len(row.ids), len(base)) for row, base in zip(rows, patching.base, strict=True)]
    cells = [Cell(i, p) for i, row in enumerate(rows) for p in _positions(row)]
    everywhere = patching.sheets(cells)
    at_the_end = patching.sheets([cell for cell in cells if patching.at_the_end(cell)])
    patches = [_patch(component, layer, window, severed, count) for layer in range(count)]
    # Where no attention comes after it, a change elsewhere than at the end is never read.
    carried = [patch for patch, carries in patches if carries]
    for sheet in everywhere:
        for layer, cell, scores in patching.run(sheet, carried):
            effects[cell.question][layer, cell.position] = scores - patching.base[cell.question]
            done()
    for layer in range(len(carried), count):
        for sheet in at_the_end:
            for _, cell, scores in patching.run(sheet, [patches[layer][0]]):
                effects[cell.question][layer, cell.position] = scores - patching.base[cell.question]
        done(len(cells))
    return effects


def _positions(row: Aligned) -> range:
    """Where a change has an effect: what lies before the subject is the same in all runs."""
    return range(row.subject[0], len(row.ids))


def _patch(
    component: Component, layer: int, window: int, severed: Literal["mlp", "attn"] | None, count: int
) -> tuple[Patch, bool]:
    """What the cells of a layer change, and whether an attention comes after it that can carry it to other tokens."""
    layers = window_layers(layer, window, count)
    first = layers[0]
    writes = tuple(Write(component_hook(component, each)) for each in layers)
    hold = tuple(Write(component_hook(severed, each), "base") for each in range(layer + 1, count)) if severed else ()
    if component == "resid":
        # The stream after a block is the stream before the next: begin there, one block later.
        return Patch(first + 1, resid_post(first), writes[1:] + hold), first + 1 < count
    if component == "resid_pre":
        hold = (Write(component_hook(severed, layer), "base"), *hold) if severed else ()
        return Patch(first, resid_pre(first), writes[1:] + hold), True
    return Patch(first, None, writes), first + 1 < count


def _means(effect: Tensor, corrupted: Tensor) -> dict[str, Tensor]:
    return {
        "effect": effect.nanmean(-1),
        "sample_effect": effect,
        "corrupted": corrupted.nanmean(-1),
        "sample_corrupted": corrupted,
    }


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


def _donors(questions: Questions) -> tuple[tuple[str, ...], ...]:
    if not isinstance(questions.corruption, TokenReplacement):
        return ((),) * len(questions.each)
    donors = questions.corruption.donors
    return tuple(tuple(donor.fact.subject for donor in donors[question.fact]) for question in questions.each)


# ------------------------------------------------------------------------------------ what is kept


@dataclass(frozen=True, eq=False)
class _Part:
    effect: Float[Tensor, "layer pos sample"]
    clean: Float[Tensor, "sample"]
    corrupted: Float[Tensor, "sample"]
    top: int


class _Parts:
    """Facts that are traced, kept in a folder if there is one."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self.folder, self.digest, self.done = folder, digest, dict[int, _Part]()

    @classmethod
    def of(
        cls, folder: str | Path | None, questions: Questions, settings: dict[str, Any], provenance: Provenance
    ) -> _Parts:
        """With what an earlier call left in the folder."""
        if folder is None:
            return cls(None, "")
        tensors: dict[str, Tensor] = {}
        asked = settings | {
            "facts": [asdict(question.fact) for question in questions.each],
            "corruption": encode(questions.corruption, "corruption", tensors, (*CORRUPTIONS, Unknown)),
            "donors": _donors(questions),
            "provenance": provenance.to_json(),
        }
        if " at 0x" in json.dumps(asked["corruption"]):
            raise ValueError(
                f"corruption is {questions.corruption!r}, of which a file can't tell one from another: needed a repr "
                "that says what it is (a dataclass has one), or no folder"
            )
        where = Path(folder).expanduser()
        parts = cls(where, files.digest("trace", json.dumps(asked, default=files.plain_number), tensors))
        for path in sorted(where.glob("part-*.safetensors")):
            header, found = files.read(path, "part of a trace")
            if header["digest"] != parts.digest:
                raise ValueError(
                    f"{path} belongs to another trace (other facts, settings, weights or versions): give another folder"
                )
            for i, top in header["top"]:
                kept = (found[f"{name}.{i}"] for name in ("effect", "clean", "corrupted"))
                parts.done[i] = _Part(*kept, top=top)
        return parts

    def add(self, which: Sequence[int], found: Iterable[_Part]) -> None:
        """Keep some more."""
        new = dict(zip(which, found, strict=True))
        self.done |= new
        if self.folder is not None:
            tensors = {
                f"{name}.{i}": getattr(part, name)
                for i, part in new.items()
                for name in ("effect", "clean", "corrupted")
            }
            header = {"digest": self.digest, "top": [(i, part.top) for i, part in new.items()]}
            files.write(self.folder / f"part-{min(new):06}.safetensors", "part of a trace", header, tensors)


# ------------------------------------------------------------------------------------ checks


def _check(
    facts: Sequence[Fact],
    component: Component,
    window: int,
    severed: str | None,
    direction: str,
    memory: float,
) -> None:
    check_distinct(facts)
    if window < 1:
        raise ValueError(f"window is {window}, needed at least 1")
    component_hook(component, 0)
    if severed not in (None, "mlp", "attn"):
        raise ValueError(f"severed is {severed!r}, needed 'mlp', 'attn' or None")
    if severed and (component not in ("resid", "resid_pre") or window > 1):
        raise ValueError(
            f"severed={severed!r} is for single layers of the residual stream, but component is {component!r} and "
            f"window {window}: take component='resid', window=1"
        )
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is {direction!r}, needed 'denoise' or 'noise'")
    check_memory(memory)
