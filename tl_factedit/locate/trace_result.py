"""What a causal trace gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Component
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.state import plain_torch
from tl_factedit.core import files
from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.files import Unknown, decode, encode
from tl_factedit.core.typed import fitting, hints_of
from tl_factedit.locate.cells import Direction
from tl_factedit.locate.corruption import Corruption
from tl_factedit.locate.replacement import CORRUPTIONS

if TYPE_CHECKING:
    import pandas as pd

ROLES = ("before", "first subject", "middle subject", "last subject", "first after", "further", "last")
"""What a token is in its prompt, each one thing; the last token is ``last`` unless it is of the subject."""


LEAST_SHARE = 0.05
"""A token whose largest effect is a smaller share of the total effect than this carries nothing."""


class BestCell(NamedTuple):
    """A cell of a trace: what its token is in the prompt (of `ROLES`), its layer, and its mean effect."""

    role: str
    layer: int
    effect: float


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
class Trace:
    """The result of `causal_trace`.

    Attributes:
        effect: IE in units of `metric`, mean over samples, [fact layer pos]; NaN where a shorter fact has no
            token, and for facts that couldn't be corrupted.
        sample_effect: The same for each sample of the corruption, [fact layer pos sample]; NaN where a fact has fewer.
        clean: The metric of the clean run, [fact] (mean over samples where it depends on them).
        corrupted: The metric of the corrupted runs, mean over samples, [fact].
        sample_corrupted: For each sample, [fact sample].
        tokens: Token strings of each fact's prompt.
        subject: (start, stop) of the subject in each fact's tokens.
        facts: What was traced.
        top: For each fact, the token that the clean model puts first (with the next, where the object begins with a
            token of white space alone or of half a character, and so does what the model says).
        known: Whether that is how ``target_true`` begins; where it isn't, there is little to trace.
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
    @plain_torch()
    def corruptible(self) -> tuple[bool, ...]:
        """For each fact, whether it could be corrupted; without a donor it can't, and isn't traced."""
        return tuple((~self.corrupted.isnan()).tolist())

    @property
    @plain_torch()
    def at_last_subject_token(self) -> Float[Tensor, "fact layer"]:
        """IE at each fact's last subject token."""
        last = torch.tensor([stop - 1 for _, stop in self.subject])
        return self.effect[torch.arange(len(last)), :, last]

    @property
    @plain_torch()
    def counted(self) -> tuple[bool, ...]:
        """For each fact, whether it counts in what is said of all of them: those that the model knows.

        Where it knows none that could be corrupted, all count. `by_role`, `average` and the tables take every fact.
        """
        known = [known and able for known, able in zip(self.known, self.corruptible, strict=True)]
        return tuple(known) if any(known) else (True,) * len(known)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the facts that count, of those that have a value."""
        return values[torch.tensor(self.counted, dtype=torch.bool)].nanmean(0)

    @property
    @plain_torch()
    def peak_layer(self) -> int:
        """The layer of the largest mean effect at the last subject token, over the facts that count (`counted`).

        Where that token carries nothing (`carries_subject`) this is a largest among noise: look at `best_cell`.
        """
        return int(self._mean(self.at_last_subject_token).argmax())

    @property
    @plain_torch()
    def carries_subject(self) -> bool:
        """Whether the largest mean effect at the last subject token is a twentieth of the total effect or more.

        Of several facts, those that count (`counted`), and the mean size of their total effects: total effects of
        opposite sign don't make up for one another.
        """
        peak = float(self._mean(self.at_last_subject_token).max())
        return peak >= LEAST_SHARE * float(self._mean(self.total_effect.abs())) and peak > 0

    @property
    @plain_torch()
    def best_cell(self) -> BestCell:
        """The cell of the largest mean effect anywhere but at the prompt's last token.

        The residual stream after the last block at the last token has all of the effect, whatever the fact. Of several
        facts (those that count, `counted`), cells are those of `by_role`; a prompt that ends with its subject has that
        token's cell all the same.

        Raises:
            ValueError: No fact could be corrupted.
        """
        mean = self._mean(self.by_role())[:-1].nan_to_num(-torch.inf)
        if not bool((mean > -torch.inf).any()):
            raise ValueError("no fact of this trace could be corrupted, so that no cell has an effect")
        role, layer = divmod(int(mean.argmax()), mean.shape[1])
        return BestCell(ROLES[role], layer, float(mean[role, layer]))

    @property
    @plain_torch()
    def partial_window(self) -> tuple[int, ...]:
        """Layers whose window is cut by the model's ends: their cells restore fewer layers."""
        count = self.effect.shape[1]
        return tuple(layer for layer in range(count) if len(window_layers(layer, self.window, count)) < self.window)

    @plain_torch()
    def fraction(self, min_effect: float = 0.05) -> Float[Tensor, "fact layer pos"]:
        """IE / TE: the share of the effect that a cell accounts for.

        Args:
            min_effect: Facts with a smaller total effect (or a negative one) are left out (NaN): a share of little says
                little.
        """
        total = self.total_effect[:, None, None]
        return torch.where(total >= min_effect, self.effect / total, torch.nan)

    @plain_torch()
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

    @plain_torch()
    def by_role(self, *, normalised: bool = False, min_effect: float = 0.05) -> Float[Tensor, "fact role layer"]:
        """Effects by what a token is in its prompt (`ROLES`), mean over a fact's tokens of that role.

        Args:
            normalised: Give shares of the total effect instead (`fraction`).
            min_effect: As in `fraction`.
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

    @plain_torch()
    def average(self, *, normalised: bool = False, min_effect: float = 0.05, seed: int = 0) -> Estimates:
        """Means over facts by role and layer, with bootstrap intervals over facts, [role layer] each."""
        return over_facts_each(self.by_role(normalised=normalised, min_effect=min_effect), seed=seed)

    @plain_torch()
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

    @plain_torch()
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

    @plain_torch()
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
    @plain_torch()
    def load(cls, path: str | Path) -> Trace:
        """Read a file of `save`.

        Raises:
            ValueError: The file is cut short or changed, isn't a trace, or what it holds doesn't fit together.
        """
        with files.opened(path, "trace") as file:
            kinds = hints_of(cls)
            plain = {name: file.field(name, kinds[name]) for name in _PLAIN}
            facts = file.all_made("facts", Fact)
            file.sizes["fact"] = len(facts)
            effect = file.tensor("sample_effect", "fact layer pos sample", missing=True)
            corrupted = file.tensor("sample_corrupted", "fact sample", missing=True)
            clean = file.tensor("clean", "fact", missing=True)
            _check_lengths(plain, len(facts), effect.shape[2])
            _check_missing(effect, corrupted, clean, [len(pieces) for pieces in plain["tokens"]])
            return cls(
                **sample_means(effect, corrupted),
                clean=clean,
                facts=facts,
                corruption=fitting(
                    decode(file.header["corruption"], "corruption", file.tensors, (*CORRUPTIONS, Unknown)),
                    kinds["corruption"],
                    "corruption",
                ),
                provenance=Provenance.from_json(file.field("provenance", dict)),
                **plain,
            )

    def __repr__(self) -> str:
        """Size, effects and peak in a line."""
        what = self.facts[0].text if len(self.facts) == 1 else f"{len(self.facts)} facts"
        without = self.corruptible.count(False)
        missing = f", {without} without a donor" if without else ""
        severed = f" with severed {self.severed}" if self.severed else ""
        window = f"window {self.window}" + (", noising" if self.direction == "noise" else "")
        peak = float(self._mean(self.at_last_subject_token).max())
        found = (
            "nothing was corrupted: both runs score the same"
            if torch.allclose(self.clean, self.corrupted, rtol=1e-6, atol=1e-9)
            else f"last subject token {'peaks' if self.carries_subject else 'carries nothing: its largest is'} at "
            f"layer {self.peak_layer} with {peak:.3f}{self._elsewhere(peak)}"
        )
        return (
            f"Trace({what!r}{missing}{self._unknown()}, {self.component}{severed}, {window}: "
            f"clean {float(self._mean(self.clean)):.3f}, corrupted {float(self._mean(self.corrupted)):.3f}; "
            f"{found}"
            f"{f'; cells run as whole sequences: {self.unpacked}' if self.unpacked else ''})"
        )

    def _unknown(self) -> str:
        """What the model doesn't know, in a few words."""
        if all(self.known):
            return ""
        if len(self.facts) == 1:
            return f", not known: it says {self.top[0]!r}"
        unknown = self.known.count(False)
        return f", {unknown} not known" + (" and left out here" if not all(self.counted) and unknown else "")

    def _elsewhere(self, peak: float) -> str:
        """The best cell, where it isn't the one at the last subject token."""
        if not any(self.corruptible):
            return ""
        best = self.best_cell
        if best.role == "last subject" or not best.effect > peak:
            return ""
        return f"; largest before the last token: {best.role} token, layer {best.layer}, {best.effect:.3f}"


_PLAIN = tuple(
    "tokens subject top known donors component window severed direction metric unpacked".split()  # noqa: SIM905
)
"""The attributes of a trace that a file's header holds as they are."""


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


def sample_means(effect: Tensor, corrupted: Tensor) -> dict[str, Tensor]:
    """The fields of a trace that hold samples, and those that hold their means."""
    return {
        "effect": effect.nanmean(-1),
        "sample_effect": effect,
        "corrupted": corrupted.nanmean(-1),
        "sample_corrupted": corrupted,
    }


def _check_lengths(plain: dict[str, Any], facts: int, positions: int) -> None:
    """Check that what a file says of each fact is there for each, and that subjects lie within their tokens."""
    for name in ("tokens", "subject", "top", "known", "donors"):
        if len(plain[name]) != facts:
            raise ValueError(f"{name} is {plain[name]!r}, needed one for each of {facts} facts")
    for i, (pieces, (start, stop)) in enumerate(zip(plain["tokens"], plain["subject"], strict=True)):
        if not 0 < len(pieces) <= positions:
            raise ValueError(f"tokens[{i}] is {pieces!r}, needed 1 to {positions} tokens, as the effects have")
        if not 0 <= start < stop <= len(pieces):
            raise ValueError(f"subject[{i}] is {(start, stop)}, needed a start and a stop within {len(pieces)} tokens")
    if plain["window"] < 1:
        raise ValueError(f"window is {plain['window']}, needed 1 or more")


def _check_missing(effect: Tensor, corrupted: Tensor, clean: Tensor, lengths: Sequence[int]) -> None:
    """Check that NaN stands only where a fact has no token or no sample."""
    sampled = ~corrupted.isnan()
    token = torch.arange(effect.shape[2]) < torch.tensor(lengths)[:, None]
    there = (token[:, :, None] & sampled[:, None])[:, None]
    if bool((effect.isnan() == there).any()):
        raise ValueError(
            "sample_effect has NaN elsewhere than where a fact has no token, or no number in sample_corrupted"
        )
    if bool((clean.isnan() & sampled.any(-1)).any()):
        raise ValueError("clean is NaN for a fact that was corrupted")
