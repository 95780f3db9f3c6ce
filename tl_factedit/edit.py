"""Edits as things: low-rank changes of ``W_out`` that can be applied, taken back bit for bit, and kept.

A model carries a ledger of what is applied to it: the weights of each touched layer as they were
before the first edit, and the edits in order. Undoing one edit restores those weights and writes
the others again, in their order; with none left, the bits are those of before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit import files
from tl_factedit.facts import Fact
from tl_factedit.model import (
    DownProj,
    FactoredMatrix,
    Fingerprint,
    Model,
    down_proj,
    fingerprint,
    hash_weight,
    model_name,
)
from tl_factedit.provenance import Provenance


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

    @property
    def matrix(self) -> FactoredMatrix:
        """The change as a TransformerLens `FactoredMatrix` (norm, SVD, products without the dense form)."""
        return FactoredMatrix(self.left, self.right)

    @property
    def dense(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change as one matrix, float64."""
        return self.left @ self.right

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
        update_norm: ‖ΔW‖ (Frobenius).
        weight_norm: ‖W‖ before.
        exactness: ‖K ΔW − R‖ / ‖R‖ as it is in the weight's own type, after rounding: how far the
            keys are from answering with their values.
        value_norm: ‖v*‖ / ‖v‖ of the value written and the one replaced.
        unmet: For each fact, the share of its residual that the update doesn't meet, ‖k ΔW − r‖ / ‖r‖ before
            rounding; empty where all is met by construction.
        key_cosine: The largest cosine, in size, between two facts' keys; 0 for one fact.

    With several facts, `division_factor` is the smallest over facts and `value_norm` the largest.
    """

    layer: int
    division_factor: float
    update_norm: float
    weight_norm: float
    exactness: float
    value_norm: float
    unmet: Sequence[float] = ()
    key_cosine: float = 0.0

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
        fits: For each fact, how its value was found: losses, target probabilities, why it stopped.
        provenance: Model, weights (before any edit), BOS policy, versions.
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

    def check(self, model: Model) -> None:
        """See that the edit can be applied to this model as it is now; nothing is run or written.

        Raises:
            ValueError: It is applied already, the model has other weights than it was made for, or
                its weights were changed since by something else.
        """
        ledger = _ledger(model)
        if any(edit.digest == self.digest for edit in ledger.edits):
            raise ValueError(f"{self._name} is applied to {model_name(model)} already: undo_ it first")
        for delta in self.deltas:
            down_proj(model, delta.layer)
        ledger.check_unchanged(model)
        now = base_fingerprint(model)
        if not self.provenance.weights.matches(now):
            raise ValueError(
                f"{self._name} was made for weights {self.provenance.weights} of {self.provenance.model!r}, but "
                f"{model_name(model)} has weights {now}: apply it to the model it was made on"
            )

    def apply_(self, model: Model) -> None:
        """Write the edit into the model's ``W_out``, in place.

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
        base = {**{layer: site.W.clone() for layer, site in sites.items()}, **ledger.base}
        _commit(model, sites, weights, _Ledger.of(base, (*ledger.edits, self), {**ledger.written, **_hashes(weights)}))

    def undo_(self, model: Model) -> None:
        """Take the edit back, bit for bit; edits applied before or after it stay.

        Raises:
            ValueError: It isn't applied to this model, or the weights were changed since by
                something else. Nothing is written then.
        """
        ledger = _ledger(model)
        if all(edit.digest != self.digest for edit in ledger.edits):
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
        self.apply_(model)
        try:
            yield model
        finally:
            self.undo_(model)

    def scaled(self, alpha: float) -> Edit:
        """The same edit α times as strong: ``W_out += α · Δ``; 0 writes nothing, −1 the opposite.

        `values` move along with it; `diagnostics` and `fits` are those of the edit it was made from.
        """
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
            diagnostics=tuple(Diagnostics(**{**d, "unmet": tuple(d.get("unmet", ()))}) for d in header["diagnostics"]),
            fits=tuple(header["fits"]),
            provenance=Provenance.from_json(header["provenance"]),
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
    each time.

    Raises:
        ValueError: No edit is given, or they are of different weights or BOS policies.
    """
    if not edits:
        raise ValueError("edits is empty, needed at least one")
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
        deltas=tuple(
            Delta(layer, torch.cat([d.left for d in parts], 1), torch.cat([d.right for d in parts]))
            for layer, parts in factors.items()
        ),
        keys={layer: torch.cat([edit.keys[layer] for edit in edits if layer in edit.keys]) for layer in layers},
        values={layer: torch.cat([edit.values[layer] for edit in edits if layer in edit.values]) for layer in layers},
        editor={"name": "composed", "of": [dict(edit.editor) for edit in edits]},
        contexts=tuple(dict.fromkeys(context for edit in edits for context in edit.contexts)),
        diagnostics=tuple(diagnostics for edit in edits for diagnostics in edit.diagnostics),
        fits=tuple(fit for edit in edits for fit in edit.fits),
        provenance=first.provenance,
    )


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


def diagnose(site: DownProj, delta: Delta, direction: Tensor, key: Tensor, value: Tensor) -> Diagnostics:
    """Diagnostics of a rank-one change: of its direction u, its key k* and its value v*."""
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
    )


def diagnose_many(
    site: DownProj,
    delta: Delta,
    directions: Float[Tensor, "fact d_mlp"],
    keys: Float[Tensor, "fact d_mlp"],
    residuals: Float[Tensor, "fact d_model"],
) -> Diagnostics:
    """Diagnostics of a change for several facts: of their directions C⁻¹k, keys and wanted residuals."""
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
        update_norm=float(delta.dense.norm()),
        weight_norm=float(weight.double().norm()),
        exactness=float((moved - wanted).norm() / wanted.norm()) if bool(wanted.any()) else 0.0,
        value_norm=float(((now + wanted).norm(dim=-1) / now.norm(dim=-1)).max()),
        unmet=tuple(((wanted - r).norm(dim=-1) / r.norm(dim=-1)).tolist()),
        key_cosine=float(cosines.max()),
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
        for layer, site in sites.items():
            site.write_(before[layer])
        _keep(model, was)
        raise
