"""Edits as things: low-rank changes of ``W_out`` that can be applied, taken back bit for bit, and kept.

A model carries a ledger of what is applied to it: the weights of each touched layer as they were
before the first edit, and the edits in order. Undoing one edit restores those weights and writes
the others again, in their order; with none left, the bits are those of before.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.core import files
from tl_factedit.core.facts import Fact
from tl_factedit.backend.model import (
    DownProj,
    FactoredMatrix,
    Fingerprint,
    Hook,
    Model,
    Runner,
    check_own,
    down_proj,
    fingerprint,
    hash_weight,
    model_name,
    quiet,
    write_all,
)
from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.tokens import align, batches, encode, pad

if TYPE_CHECKING:
    import pandas as pd

AT_ONCE = 4096
"""Most tokens in a forward pass that reads keys."""


class EditWarning(UserWarning):
    """An edit that may disable the model, or miss what it was made for; the message says why and what to do."""


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class Delta:
    """A low-rank change of one layer's weight, ``W_out += left @ right``.

    Attributes:
        layer: The block.
        left: Which keys it answers to, [d_mlp, rank], float64.
        right: What it adds to the value, [rank, d_model], float64.
    """

    layer: int
    left: Float[Tensor, "d_mlp rank"]
    right: Float[Tensor, "rank d_model"]

    @classmethod
    def full(cls, layer: int, change: Float[Tensor, "d_mlp d_model"]) -> Delta:
        """A change of full rank: the matrix itself beside the identity, so that it is added to the bit as it is."""
        return cls(layer, change.double(), torch.eye(change.shape[1], dtype=torch.float64, device=change.device))

    @property
    def matrix(self) -> FactoredMatrix:
        """The change as a TransformerLens `FactoredMatrix` (norm, SVD, products without the dense form)."""
        return FactoredMatrix(self.left, self.right)

    @property
    def dense(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change as one matrix, float64."""
        return self.left @ self.right

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), without the dense form where the rank is small."""
        if self.left.shape[1] >= min(len(self.left), self.right.shape[1]):
            return float(self.dense.norm())
        return float((torch.linalg.qr(self.left, mode="r").R @ self.right).norm())

    def on(self, weight: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, "d_mlp d_model"]:
        """`weight` with the change: added in float64, rounded once to the weight's type."""
        dense = (self.left.to(weight.device) @ self.right.to(weight.device)).to(torch.float64)
        return (weight.double() + dense).to(weight.dtype)


@dataclass(frozen=True)
class Diagnostics:
    """How an edit sits in one layer.

    Attributes:
        layer: The block.
        division_factor: uᵀk / (‖u‖ ‖k‖) of the update direction and its key, in [-1, 1]; near 0 the
            update must be huge to write at its key (disabling edits, Gupta et al. 2024, arXiv:2403.07175).
            1 where the editor divides by nothing of the kind.
        update_norm: ‖ΔW‖ (Frobenius).
        weight_norm: ‖W‖ before.
        exactness: What rounding to the weight's own type loses, ‖K (ΔW as written) − R‖ / ‖R‖, with R what the update
            is to add at its keys (what it leaves out of a fact's wish is `unmet`).
        value_norm: ‖v*‖ / ‖v‖ of the value written and the one replaced.
        unmet: For each fact, the share of its residual that the update doesn't meet, ‖k ΔW − r‖ / ‖r‖ before
            rounding; empty where all is met by construction.
        key_cosines: For each fact, the largest cosine, in size, of its key with another fact's; empty for one fact.
        spill: For each fact, the largest ‖k_t ΔW‖ / ‖k ΔW‖ over the other tokens t of its prompt (BOS is one), with k
            the key where the edit is to write: how much of it is added where it isn't meant. Empty where it wasn't
            measured (see the function `spill`, which can ask neighbours too).

    With several facts, `division_factor` is the smallest over facts and `value_norm` the largest.
    """

    layer: int
    division_factor: float
    update_norm: float
    weight_norm: float
    exactness: float
    value_norm: float
    unmet: Sequence[float] = ()
    key_cosines: Sequence[float] = ()
    spill: Sequence[float] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diagnostics:
        """From plain data; files of before have no spill, no unmet, and one cosine for all facts."""
        known: dict[str, Any] = {name: value for name, value in data.items() if name != "key_cosine"}
        known |= {name: tuple(data.get(name, ())) for name in ("unmet", "key_cosines", "spill")}
        return cls(**known)

    @property
    def key_cosine(self) -> float:
        """The largest of `key_cosines`; 0 for one fact."""
        return max(self.key_cosines, default=0.0)

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.update_norm / self.weight_norm


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class Edit:
    """A change of a model's weights, made for some facts.

    Attributes:
        facts: What it was made for.
        deltas: One a layer.
        keys: By layer, the keys it writes at, [fact d_mlp], float64.
        values: By layer, what it makes ``W_out`` answer to them, [fact d_model], float64.
        editor: Name and hyperparameters of the editor, as plain data.
        contexts: The prefixes the keys and values were made under.
        diagnostics: One a layer.
        fits: For each fact, how its value was found: losses, target probabilities, why it stopped; whether both objects
            begin with one token; over several layers ``missed``, the share of what its bare prompt lacked that it still
            lacks.
        provenance: Model, weights (before any edit), BOS policy, versions, and which edits were on the model.
    """

    facts: tuple[Fact, ...]
    deltas: tuple[Delta, ...]
    keys: Mapping[int, Float[Tensor, "fact d_mlp"]]
    values: Mapping[int, Float[Tensor, "fact d_model"]]
    editor: Mapping[str, Any]
    contexts: tuple[str, ...]
    diagnostics: tuple[Diagnostics, ...]
    fits: tuple[Mapping[str, Any], ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        """See that each layer is changed once."""
        changed = [delta.layer for delta in self.deltas]
        if len(set(changed)) < len(changed):
            raise ValueError(f"the changes are of layers {changed}, needed one a layer: add them up (compose does)")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it writes, ascending."""
        return tuple(sorted(delta.layer for delta in self.deltas))

    @cached_property
    def digest(self) -> str:
        """A hash of its deltas: two edits with one digest are the same change."""
        seen = hashlib.sha256()
        for delta in self.deltas:
            seen.update(str(delta.layer).encode())
            for factor in (delta.left, delta.right):
                seen.update(factor.detach().double().cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()[:16]

    @property
    def parts(self) -> tuple[str, ...]:
        """Of a composed edit, the digests of the edits that it holds, theirs included; none of any other."""
        return tuple(self.editor.get("digests", ()))

    @cached_property
    def concerns(self) -> tuple[str, ...]:
        """Why this edit may disable the model, or miss what it was made for, a sentence each; none is the usual case.

        Said as an `EditWarning` when the edit is first applied.
        """
        return tuple(_concerns(self))

    def check(self, model: Model) -> None:
        """See that the edit can be applied to this model as it is now; nothing is run or written.

        Raises:
            ValueError: It is applied already, the model has other weights than it was made for, or
                its weights were changed since by something else.
        """
        ledger = _ledger(model)
        if self._is_on(ledger):
            raise ValueError(f"{self._name} is applied to {model_name(model)} already: undo_ it first")
        twice = [each for each in ledger.edits if {*each.parts, each.digest} & {*self.parts, self.digest}]
        if twice:
            raise ValueError(
                f"{self._name} and {twice[0]._name}, which is applied to {model_name(model)}, hold the same change "
                "(one is composed of it), needed it once: undo_ that one first"
            )
        check_own(model, self.layers)
        ledger.check_unchanged(model)
        now = base_fingerprint(model)
        if not self.provenance.weights.matches(now):
            raise ValueError(
                f"{self._name} was made for weights {self.provenance.weights} of {self.provenance.model!r}, but "
                f"{model_name(model)} has weights {now}: apply it to the model it was made on"
            )

    def apply_(self, model: Model) -> None:
        """Write the edit into the model's ``W_out``, in place.

        Warns:
            EditWarning: The edit has `concerns`, or was made on top of edits that aren't on the model now; once for
                each edit. Where warnings are errors, nothing is written.

        Raises:
            ValueError: It is applied already, the model has other weights than it was made for, or
                its weights were changed since by something else; or the edited weights would not be
                finite in their type. Nothing is written then.
        """
        self.check(model)
        ledger = _ledger(model)
        sites = {delta.layer: down_proj(model, delta.layer) for delta in self.deltas}
        weights = {delta.layer: delta.on(sites[delta.layer].W) for delta in self.deltas}
        for layer, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise ValueError(
                    f"{self._name} makes W_out of layer {layer} overflow {weight.dtype}: nothing was written; "
                    "load the model in float32 or bfloat16"
                )
        self.warn(ledger.edits)
        base = {**{layer: site.W.clone() for layer, site in sites.items()}, **ledger.base}
        _commit(model, sites, weights, _Ledger.of(base, (*ledger.edits, self), {**ledger.written, **_hashes(weights)}))

    def warn(self, others: Sequence[Edit] = ()) -> None:
        """Say once, as an `EditWarning`, what its concerns are, and which edits it was made on top of are missing.

        Args:
            others: The edits that are applied where it is to be written.
        """
        concerns = [*self.concerns, *self._without(others)]
        if concerns and not vars(self).get(_WARNED):
            warnings.warn(f"{self._name}: {'; '.join(concerns)}", EditWarning, stacklevel=_outside(sys._getframe()))
            vars(self)[_WARNED] = True

    def undo_(self, model: Model) -> None:
        """Take the edit back, bit for bit; edits applied before or after it stay.

        Raises:
            ValueError: It isn't applied to this model, or the weights were changed since by
                something else. Nothing is written then.
        """
        ledger = _ledger(model)
        if not self._is_on(ledger):
            raise ValueError(f"{self._name} isn't applied to {model_name(model)}: apply_ it first")
        sites = {delta.layer: down_proj(model, delta.layer) for delta in self.deltas}
        ledger.check_unchanged(model)
        left = tuple(edit for edit in ledger.edits if edit.digest != self.digest)
        weights = {layer: ledger.base[layer].clone() for layer in sites}
        for edit in left:
            for delta in edit.deltas:
                if delta.layer in weights:
                    weights[delta.layer] = delta.on(weights[delta.layer])
        _commit(model, sites, weights, _Ledger.of(ledger.base, left, {**ledger.written, **_hashes(weights)}))

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The edited model for the length of a ``with`` block; taken back on exit, also on an error."""
        was_on = self._is_on(_ledger(model))  # apply_ refuses it then, and it stays
        try:
            self.apply_(model)
            yield model
        finally:
            # An interrupt may come when apply_ is done and before it returns, or before it wrote anything.
            if not was_on and self._is_on(_ledger(model)):
                try:
                    self.undo_(model)
                except ValueError:
                    raise
                except BaseException:
                    # It was interrupted, and is done all the same.
                    if self._is_on(_ledger(model)):
                        self.undo_(model)
                    raise

    def scaled(self, alpha: float) -> Edit:
        """The same edit α times as strong: ``W_out += α · Δ``; 0 writes nothing, −1 the opposite.

        `values` move along with it; `diagnostics` and `fits` are those of the edit it was made from.
        """
        if alpha == 1:
            return self
        deltas = tuple(Delta(delta.layer, delta.left, alpha * delta.right) for delta in self.deltas)
        moved = {delta.layer: self.keys[delta.layer] @ delta.left @ delta.right for delta in self.deltas}
        return replace(
            self,
            deltas=deltas,
            values={layer: value + (alpha - 1) * moved[layer] for layer, value in self.values.items()},
            editor={"name": "scaled", "alpha": alpha, "of": dict(self.editor)},
        )

    def save(self, path: str | Path) -> None:
        """Write one small file (safetensors): factors, keys, values, provenance."""
        tensors: dict[str, Tensor] = {}
        for delta in self.deltas:
            tensors[f"left.{delta.layer}"] = delta.left
            tensors[f"right.{delta.layer}"] = delta.right
            tensors[f"keys.{delta.layer}"] = self.keys[delta.layer]
            tensors[f"values.{delta.layer}"] = self.values[delta.layer]
        header = {
            "facts": [asdict(fact) for fact in self.facts],
            "layers": [delta.layer for delta in self.deltas],
            "editor": dict(self.editor),
            "contexts": list(self.contexts),
            "diagnostics": [asdict(d) for d in self.diagnostics],
            "fits": [dict(fit) for fit in self.fits],
            "provenance": self.provenance.to_json(),
        }
        files.write(Path(path), "edit", header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a file of `save`.

        Raises:
            ValueError: The file is cut short, changed, or no edit.
        """
        header, tensors = files.read(Path(path), "edit")
        layers = header["layers"]
        return cls(
            facts=tuple(Fact(**fact) for fact in header["facts"]),
            deltas=tuple(Delta(layer, tensors[f"left.{layer}"], tensors[f"right.{layer}"]) for layer in layers),
            keys={layer: tensors[f"keys.{layer}"] for layer in layers},
            values={layer: tensors[f"values.{layer}"] for layer in layers},
            editor=header["editor"],
            contexts=tuple(header["contexts"]),
            diagnostics=tuple(Diagnostics.from_json(d) for d in header["diagnostics"]),
            fits=tuple(header["fits"]),
            provenance=Provenance.from_json(header["provenance"]),
        )

    def table(self) -> pd.DataFrame:
        """Its diagnostics, a row a layer (of a composed edit: a row for each edit and layer).

        ``unmet`` and ``spill`` are those of the worst fact, NaN where there are none.
        """
        import pandas as pd

        nan = float("nan")
        return pd.DataFrame(
            [
                {
                    "layer": d.layer,
                    "relative_norm": d.relative_norm,
                    "division_factor": d.division_factor,
                    "exactness": d.exactness,
                    "value_norm": d.value_norm,
                    "unmet": max(d.unmet, default=nan),
                    "key_cosine": d.key_cosine,
                    "spill": max(d.spill, default=nan),
                }
                for d in self.diagnostics
            ]
        )

    def _repr_html_(self) -> str:
        concerns = "".join(f"<li>{html.escape(each)}</li>" for each in self.concerns)
        return (
            f"<p>{html.escape(repr(self))}</p>"
            + self.table().to_html(float_format="{:.3g}".format, index=False, na_rep="")
            + (f"<ul>{concerns}</ul>" if concerns else "")
        )

    def _is_on(self, ledger: _Ledger) -> bool:
        return any(edit.digest == self.digest for edit in ledger.edits)

    def _without(self, others: Sequence[Edit]) -> Iterator[str]:
        on = {digest for edit in others for digest in (edit.digest, *edit.parts)}
        missing = set(self.provenance.edits) - on
        if missing:
            yield (
                f"it was made on top of {len(self.provenance.edits)} other edits, of which {len(missing)} aren't on "
                "the model now: its keys and values are of the model with them; apply them first, or make it again"
            )

    @property
    def _name(self) -> str:
        return f"the edit of {', '.join(repr(fact.name) for fact in self.facts[:3])}"

    def __repr__(self) -> str:
        """What it changes, where, and how much."""
        facts = "; ".join(f"{f.subject!r}:{f.target_true}→{f.target_new}" for f in self.facts[:3])
        more = f" and {len(self.facts) - 3} more" if len(self.facts) > 3 else ""
        where = ", ".join(f"{d.layer}: {d.relative_norm:.2%} of ‖W‖" for d in self.diagnostics)
        return f"Edit({self.editor.get('name')}, {facts}{more}, layers {{{where}}})"


def compose(edits: Sequence[Edit]) -> Edit:
    """Several edits of the same base weights as one: their changes of a layer added up, which no order matters to.

    Facts, fits and diagnostics stand one after the other; `keys` and `values` of a layer are those of the edits that
    write it, as each was made. Applied, it may differ in the last bit from the edits applied one by one, which round
    each time. Where the ranks add up to more than a matrix can have, the changes are kept as one matrix.

    Raises:
        ValueError: No edit is given, one is given twice (itself or inside a composed one), or they are of different
            weights or BOS policies.
    """
    if isinstance(edits, Edit):
        raise ValueError("edits is one Edit, needed a list of them: write [edit]")
    edits = list(edits)
    if not edits:
        raise ValueError("edits is empty, needed at least one")
    held = [digest for edit in edits for digest in (edit.digest, *edit.parts)]
    if len(set(held)) < len(held):
        raise ValueError("one change is in several of the edits, needed it once: leave it out of the others")
    first = edits[0]
    for edit in edits[1:]:
        if not edit.provenance.weights.matches(first.provenance.weights):
            raise ValueError(
                f"the edits are of weights {first.provenance.weights} and {edit.provenance.weights}, needed the same: "
                "make them on one model (an edit made while another is applied is still of the base)"
            )
        if edit.provenance.prepend_bos != first.provenance.prepend_bos:
            raise ValueError(
                "some of the edits were made with BOS and some without, needed one policy: make them again"
            )
    layers = sorted({layer for edit in edits for layer in edit.layers})
    factors = {layer: [d for edit in edits for d in edit.deltas if d.layer == layer] for layer in layers}
    return Edit(
        facts=tuple(fact for edit in edits for fact in edit.facts),
        deltas=tuple(_sum(layer, parts) for layer, parts in factors.items()),
        keys={layer: torch.cat([edit.keys[layer] for edit in edits if layer in edit.keys]) for layer in layers},
        values={layer: torch.cat([edit.values[layer] for edit in edits if layer in edit.values]) for layer in layers},
        editor={
            "name": "composed",
            "of": [dict(edit.editor) for edit in edits],
            "digests": held,
        },
        contexts=tuple(dict.fromkeys(context for edit in edits for context in edit.contexts)),
        diagnostics=tuple(diagnostics for edit in edits for diagnostics in edit.diagnostics),
        fits=tuple(fit for edit in edits for fit in edit.fits),
        provenance=replace(
            first.provenance,
            edits=tuple(
                dict.fromkeys(
                    below
                    for edit in edits
                    for below in edit.provenance.edits
                    if below not in {each.digest for each in edits}
                )
            ),
        ),
    )


def _sum(layer: int, parts: Sequence[Delta]) -> Delta:
    """Changes of one layer as one, in the smaller of two forms: factors side by side, or one matrix."""
    if len(parts) == 1:
        return parts[0]
    rank = sum(part.left.shape[1] for part in parts)
    if rank > min(len(parts[0].left), parts[0].right.shape[1]):
        total = torch.zeros_like(parts[0].dense)
        for part in parts:
            total += part.dense
        return Delta.full(layer, total)
    return Delta(layer, torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts]))


def edits_on(model: Model) -> tuple[Edit, ...]:
    """The edits that are applied to a model now, in the order they were applied."""
    return _ledger(model).edits


def undo_all_(model: Model) -> None:
    """Take all edits back at once: the weights are those of before the first, bit for bit.

    However many there are it copies each layer once, where undoing a thousand one by one writes the ones left anew each
    time. Nothing happens if none is applied.

    Raises:
        ValueError: The weights were changed since by something else. Nothing is written then.
    """
    ledger = _ledger(model)
    ledger.check_unchanged(model)
    _commit(model, {layer: down_proj(model, layer) for layer in ledger.base}, ledger.base, _Ledger())


@runtime_checkable
class Editor(Protocol):
    """Anything that makes an `Edit`: a frozen value with its hyperparameters as fields."""

    def __call__(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Make the edit; the model's weights are bit-identical after the call."""
        ...


def base_fingerprint(model: Model) -> Fingerprint:
    """Fingerprint of the weights without the edits that are applied to the model now."""
    now = fingerprint(model)
    ledger = _ledger(model)
    hashes = list(now.w_out)
    for layer, weight in ledger.base.items():
        if hashes[layer] == ledger.written[layer]:
            hashes[layer] = hash_weight(weight)
    return Fingerprint(tuple(hashes), now.rest, now.layout)


def made_on(model: Model, prepend_bos: bool, base: Fingerprint) -> Provenance:
    """The provenance of an edit that is made now: of the weights without edits, and which edits were on them."""
    edits = tuple(edit.digest for edit in _ledger(model).edits)
    return Provenance.of(model, prepend_bos, weights=base, edits=edits)


# ------------------------------------------------------------------------------------ diagnostics


def diagnose(
    site: DownProj, delta: Delta, direction: Tensor, key: Tensor, value: Tensor, *, spill: Sequence[float] = ()
) -> Diagnostics:
    """Diagnostics of a rank-one change: of its direction u, its key k* and its value v* (and of `measure_spill`)."""
    u, k = direction.double().cpu(), key.double().cpu()
    weight = site.W.cpu()
    changed = delta.on(weight)
    residual = value.double().cpu() - site.value(key.to(site.W.device)).cpu()
    moved = k @ (changed.double() - weight.double())
    something = bool(residual.norm() > 1e-12 * value.norm())  # else it's the rounding of two equal values
    return Diagnostics(
        layer=delta.layer,
        division_factor=float(u @ k / (u.norm() * k.norm())),
        update_norm=float(delta.dense.norm()),
        weight_norm=float(weight.double().norm()),
        exactness=float((moved - residual).norm() / residual.norm()) if something else 0.0,
        value_norm=float(value.double().cpu().norm() / site.value(key.to(site.W.device)).cpu().norm()),
        spill=tuple(spill),
    )


def diagnose_many(
    site: DownProj,
    delta: Delta,
    directions: Float[Tensor, "fact d_mlp"],
    keys: Float[Tensor, "fact d_mlp"],
    residuals: Float[Tensor, "fact d_model"],
    *,
    spill: Sequence[float] = (),
) -> Diagnostics:
    """Diagnostics of a change for several facts: of their directions C⁻¹k, keys and wanted residuals.

    Args:
        site: Where it is written.
        delta: The change.
        directions: Of each fact, along which its key is answered; the key itself where nothing is divided by.
        keys: Of each fact.
        residuals: What the answer to each key was to change by.
        spill: Of each fact, as `measure_spill` finds it.
    """
    u, k, r = (each.double().cpu() for each in (directions, keys, residuals))
    weight = site.W.cpu()
    wanted = k @ delta.left.cpu() @ delta.right.cpu()
    moved = k @ (delta.on(weight).double() - weight.double())
    now = site.value(keys.to(site.W.device)).cpu()
    unit = torch.nn.functional.normalize(k, dim=-1)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0.0)
    return Diagnostics(
        layer=delta.layer,
        division_factor=float(((u * k).sum(-1) / (u.norm(dim=-1) * k.norm(dim=-1))).min()),
        update_norm=delta.norm,
        weight_norm=float(weight.double().norm()),
        exactness=float((moved - wanted).norm() / wanted.norm()) if bool(wanted.any()) else 0.0,
        value_norm=float(((now + wanted).norm(dim=-1) / now.norm(dim=-1)).max()),
        unmet=tuple(_ratio((wanted - r).norm(dim=-1), r.norm(dim=-1)).tolist()),
        key_cosines=tuple(cosines.amax(-1).tolist()) if len(k) > 1 else (),
        spill=tuple(spill),
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, and 0 for nothing of nothing."""
    return torch.where(part == 0, 0.0, part / whole)


def spill(
    model: Model, edit: Edit, *, at: Literal["subject", "end"] = "subject", neighbours: bool = False
) -> dict[int, tuple[float, ...]]:
    """How much of each fact's change is added at tokens where it isn't meant, by layer.

    ::

        max_t ‖k_t ΔW‖ / ‖k ΔW‖        over the tokens t of the fact's prompt but the one the edit writes at

    k is the key there, in the same prompt, and all keys are those of the edited model. 0: only that token gets
    anything; 1: another one gets as much. BOS counts, which other tokens attend to a lot.

    Args:
        model: The model the edit was made on, with it or without it.
        edit: The edit.
        at: Where it is to write: at the last ``"subject"`` token, or at the ``"end"`` of the prompt.
        neighbours: Whether all tokens of the neighbours' prompts count too.

    Returns:
        A number for each fact, by layer.

    Raises:
        ValueError: The model has other weights than the edit was made for.
    """
    on = any(other.digest == edit.digest for other in _ledger(model).edits)
    if not on:
        edit.check(model)
    return measure_spill(
        model,
        edit.facts,
        edit.deltas,
        prepend_bos=edit.provenance.prepend_bos,
        at=at,
        neighbours=neighbours,
        written=on,
    )


def measure_spill(
    model: Model,
    facts: Sequence[Fact],
    deltas: Sequence[Delta],
    *,
    prepend_bos: bool,
    at: Literal["subject", "end"] = "subject",
    neighbours: bool = False,
    written: bool = False,
) -> dict[int, tuple[float, ...]]:
    """`spill` of changes that are no `Edit` yet: what an editor hands to `diagnose` or `diagnose_many`.

    Args:
        model: The model; it isn't looked at whether it has the weights that the changes are for.
        facts: What they were made for.
        deltas: The changes, one a layer.
        prepend_bos: BOS policy.
        at: As in `spill`.
        neighbours: As in `spill`.
        written: Whether they are in the weights already; otherwise they are added on the way.
    """
    if at not in ("subject", "end"):
        raise ValueError(f"at {at!r} is unknown, needed 'subject' or 'end'")
    texts: list[Int[Tensor, "_"]] = []
    owner: list[tuple[int, int | None]] = []  # the fact, and the token that is meant
    for i, fact in enumerate(facts):
        row = align(model.tokenizer, fact, prepend_bos=prepend_bos)
        texts.append(row.ids)
        owner.append((i, row.last if at == "subject" else len(row.ids) - 1))
        for neighbour in fact.neighbours if neighbours else ():
            texts.append(encode(model.tokenizer, neighbour, prepend_bos=prepend_bos)[0])
            owner.append((i, None))
    meant = {delta.layer: torch.zeros(len(facts), dtype=torch.float64) for delta in deltas}
    other = {delta.layer: torch.zeros(len(facts), dtype=torch.float64) for delta in deltas}
    factors = {delta.layer: (delta.left, delta.right) for delta in deltas}
    for which, keys in keys_with(model, texts, deltas, written=written):
        i, own = owner[which]
        for layer, each in keys.items():
            left, right = (factor.to(each.device) for factor in factors[layer])
            moved = (each @ left @ right).norm(dim=-1).cpu()
            if own is not None:
                meant[layer][i] = moved[own]
                moved[own] = 0.0
            other[layer][i] = max(other[layer][i], moved.max())
    return {layer: tuple(_ratio(other[layer], meant[layer]).tolist()) for layer in meant}


def keys_at(
    model: Model, texts: Sequence[Int[Tensor, "_"]], at: Sequence[int], deltas: Sequence[Delta]
) -> dict[int, Float[Tensor, "text d_mlp"]]:
    """The key at one token of each text, by layer, with the changes in place (see `keys_with`)."""
    found = {delta.layer: [torch.empty(0)] * len(texts) for delta in deltas}
    for i, keys in keys_with(model, texts, deltas):
        for layer, each in keys.items():
            found[layer][i] = each[at[i]].cpu()
    return {layer: torch.stack(each) for layer, each in found.items()}


def keys_with(
    model: Model, texts: Sequence[Int[Tensor, "_"]], deltas: Sequence[Delta], *, written: bool = False
) -> Iterator[tuple[int, dict[int, Float[Tensor, "pos d_mlp"]]]]:
    """The keys at every token of some texts, in the layers that are changed, with the changes in place.

    Args:
        model: The model; no weight is written.
        texts: Token ids.
        deltas: The changes, added to what ``W_out`` answers.
        written: Whether they are in the weights already.

    Yields:
        A text's place in `texts`, and its keys by layer, float64; in no particular order.
    """
    sites = {delta.layer: down_proj(model, delta.layer) for delta in deltas}
    places = [site.key_hook for site in sites.values()]
    for batch in batches([len(text) for text in texts], AT_ONCE):
        below = [delta for delta in deltas if delta.layer < max(sites) and not written]
        hooks = [hook for delta in below for hook in _adding(sites[delta.layer], delta)]
        # Entered for each batch, so that the model is as it was whenever the caller has the word.
        with quiet(model), torch.no_grad():
            tokens = pad([texts[i] for i in batch], 0)
            found = Runner(model).capture(tokens, places, stop=max(sites) + 1, hooks=hooks)
        for row, i in enumerate(batch):
            yield i, {layer: found[site.key_hook][row, : len(texts[i])].double() for layer, site in sites.items()}


def _adding(site: DownProj, delta: Delta) -> list[Hook]:
    """Hooks that add a change to what ``W_out`` answers, at every token."""
    seen: list[Tensor] = []

    def read(key: Tensor, hook: Any = None) -> None:
        seen[:] = [key]

    def add(value: Tensor, hook: Any = None) -> Tensor:
        change = seen[0].double() @ delta.left.to(value.device) @ delta.right.to(value.device)
        return value + change.to(value.dtype)

    return [(site.key_hook, read), (site.value_at, add)]


# ------------------------------------------------------------------------------------ concerns


# ROME edits of the model that comes with this package, in 3 layers, with statistics and with the identity, were scaled
# from 1 to 12 times (168 in all), and the neighbours asked: the bounds are where they begin to fall.
SMALL_DIVISION = 0.05
"""Of |uᵀk| / (‖u‖ ‖k‖). One key throughout gives 0.5 to 0.7 there. Gupta et al. 2024 (arXiv:2403.07175) and Yang et al.
2024 (arXiv:2406.11263) trace disabling edits to denominators near 0, which two different keys can make."""
LARGE_UPDATE = 1.5
"""Of ‖ΔW‖ / ‖W‖. Neighbourhood 0.998 below 0.3, 0.94 between 0.6 and 1, 0.90 up to 1.5, 0.78 beyond."""
LARGE_SPILL = 0.2
"""Of spill · ‖ΔW‖ / ‖W‖: to be told another token's share says little of an update that is small. Neighbourhood 0.99
below 0.02, 0.93 between 0.02 and 0.2, 0.74 beyond."""
INEXACT = 0.1
"""Of what rounding to the weights' type loses: above, the value is another than the one that was fitted."""
LARGE_UNMET = 0.5
"""Of the share that isn't met in the last layer, mean over facts: above, less than half of the change is written."""

SAME_KEY = 0.999
"""Of the cosine between two facts' keys."""

_WARNED = "_warned"


def _outside(frame: FrameType) -> int:
    """How far up from a frame a warning has to point for the first line of whoever called this package."""
    level = 1
    ours = {"tl_factedit", contextlib.__name__, "jaxtyping"}
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ours:
        level, frame = level + 1, frame.f_back
    return level


def _concerns(edit: Edit) -> Iterator[str]:
    weight = {d.layer: d.weight_norm for d in edit.diagnostics}
    relative = {each.layer: each.norm / weight[each.layer] for each in edit.deltas if each.layer in weight}
    for layer, size in relative.items():
        if size > LARGE_UPDATE:
            yield (
                f"the update of layer {layer} is {size:.0%} of ‖W‖, and other answers fall from {LARGE_UPDATE:.0%} on: "
                "make it smaller (a lower clamp, fewer steps, an ε), or write fewer facts"
            )
    for d in edit.diagnostics:
        if abs(d.division_factor) < SMALL_DIVISION:
            yield (
                f"the update direction of layer {d.layer} hardly sees its key (division factor "
                f"{d.division_factor:.3f}), so that the update is huge wherever else it fires: use one key throughout "
                "(Rome's consistent variant), more tokens for the statistics, or a ridge"
            )
        if max(d.spill, default=0.0) * relative.get(d.layer, 0.0) > LARGE_SPILL:
            yield (
                f"another token of a prompt gets {max(d.spill):.2g} times as much of the update of layer {d.layer} as "
                f"the one it is meant for, and the update is {relative[d.layer]:.0%} of ‖W‖: take statistics (of more "
                "text, or at all instead of the identity), an ε in fine-tuning, or another layer"
            )
        if d.exactness > INEXACT:
            yield (
                f"rounding to the weights' type loses {d.exactness:.0%} of the update of layer {d.layer}: load the "
                "model in float32"
            )
    last = [d for d in edit.diagnostics if d.layer == max(edit.layers)]
    unmet = [share for d in last for share in d.unmet]
    one_key = bool(unmet) and max(d.key_cosine for d in last) > SAME_KEY
    if one_key:
        yield (
            f"two of the facts have one key in layer {max(edit.layers)} (prompts that begin with the same subject), "
            "which can have one answer only: write them one after the other, or leave one out"
        )
    if unmet and not one_key and sum(unmet) / len(unmet) > LARGE_UNMET:
        yield (
            f"{sum(unmet) / len(unmet):.0%} of what the facts need is not met in the last layer, {max(edit.layers)}: "
            "they are hardly written; lower the weight"
        )


# ------------------------------------------------------------------------------------ the ledger


@dataclass(frozen=True)
class _Ledger:
    """What is applied to one model. Lives on the model, so that a copy of the model has its own."""

    base: Mapping[int, Tensor] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    written: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Mapping[int, Tensor], edits: tuple[Edit, ...], written: Mapping[int, str]) -> _Ledger:
        """With the layers only that these edits touch."""
        touched = {delta.layer for edit in edits for delta in edit.deltas}
        return cls(
            {layer: weight for layer, weight in base.items() if layer in touched},
            edits,
            {layer: digest for layer, digest in written.items() if layer in touched},
        )

    def check_unchanged(self, model: Model) -> None:
        for layer, expected in self.written.items():
            if hash_weight(down_proj(model, layer).W) != expected:
                raise ValueError(
                    f"W_out of layer {layer} was changed since an edit was applied to {model_name(model)} (by "
                    "training, loading or weight processing): nothing was written; reload the model"
                )


_LEDGER = "_tl_factedit_ledger"


def _ledger(model: Model) -> _Ledger:
    return model.__dict__.get(_LEDGER) or _Ledger()


def _keep(model: Model, ledger: _Ledger) -> None:
    # Straight into __dict__: a bridge hands other attributes on to the model it wraps.
    if ledger.edits:
        model.__dict__[_LEDGER] = ledger
    else:
        model.__dict__.pop(_LEDGER, None)


def _hashes(weights: Mapping[int, Tensor]) -> dict[int, str]:
    return {layer: hash_weight(weight) for layer, weight in weights.items()}


def _commit(model: Model, sites: Mapping[int, DownProj], weights: Mapping[int, Tensor], ledger: _Ledger) -> None:
    """All layers and the ledger, or none of it, whatever interrupts it."""
    before, was = {layer: site.W.clone() for layer, site in sites.items()}, _ledger(model)
    try:
        for layer, site in sites.items():
            site.write_(weights[layer])
        _keep(model, ledger)
    except BaseException:
        write_all(list(sites.values()), list(before.values()))
        _keep(model, was)
        raise
