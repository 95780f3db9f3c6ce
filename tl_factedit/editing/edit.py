"""Edits as things: low-rank changes of ``W_out`` that can be applied, taken back bit for bit, and kept.

A model carries a ledger of what is applied to it: the weights of each touched layer as they were before the first edit,
and the edits in order. Undoing one edit restores those weights and writes the others again, in their order; with none
left, the bits are those of before.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.sharing import check_own
from tl_factedit.backend.state import one_thread, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core import files
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import as_finite
from tl_factedit.editing.concerns import concerns_of, warn_once
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.diagnostics import Diagnostics, diagnose, value_norm
from tl_factedit.editing.inputs import EditInputs
from tl_factedit.editing.ledger import base_fingerprint, commit_all, ledger_of, made_on
from tl_factedit.editing.objectives import EditTarget, Inject
from tl_factedit.editing.off_target import adding_hooks, measure_off_target
from tl_factedit.editing.outcome import as_editor, check_fits, outcomes, unmeasured

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
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
        fits: For each fact, how its value was found: losses, target probabilities, why it stopped; what became of its
            target with the edit (see `outcomes`); whether both objects begin with one token; over several layers
            ``missed``, the share of what its bare prompt lacked that it still lacks.
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

    OF_SEVERAL: ClassVar[str] = ", which several can be made: compose(edits)"
    """What whoever gives a list of edits is told (see `plain_torch`)."""

    def __post_init__(self) -> None:
        """Check that each layer is changed once."""
        changed = [delta.layer for delta in self.deltas]
        if len(set(changed)) < len(changed):
            raise ValueError(f"the changes are of layers {changed}, needed one a layer: add them up (compose does)")

    @classmethod
    @plain_torch()
    def made(
        cls,
        inputs: EditInputs,
        updates: Sequence[LayerUpdate],
        *,
        editor: Mapping[str, Any],
        contexts: Sequence[str] = ("",),
        fits: Sequence[Mapping[str, Any]],
        targets: Sequence[EditTarget] | None = None,
        at: Literal["subject", "end"] = "subject",
    ) -> Edit:
        """The edit that some updates make up, with everything that is measured of one: where every editor ends.

        Args:
            inputs: What the editor started from.
            updates: One a layer.
            editor: Name and hyperparameters, as plain data (see `describe`).
            contexts: The prefixes the keys and values were made under.
            fits: For each fact, how its update was found; what became of its target is added (see `outcomes`).
            targets: What is wanted of the facts; None for their ``target_new``, of those that have one.
            at: Where the updates are to write: at the last ``"subject"`` token, or at the ``"end"`` of the prompt.
        """
        model = inputs.model
        sites = {update.delta.layer: down_proj(model, update.delta.layer) for update in updates}
        deltas = tuple(update.delta for update in updates)
        off_target = measure_off_target(model, inputs.facts, deltas, prepend_bos=inputs.prepend_bos, at=at)
        wanted = [EditTarget(fact) for fact in inputs.facts if fact.target_new] if targets is None else list(targets)
        hooks = [hook for delta in deltas for hook in adding_hooks(sites[delta.layer], delta)]
        said = {
            target.fact.text: outcome
            for target, outcome in zip(
                wanted, outcomes(model, wanted, hooks, prepend_bos=inputs.prepend_bos), strict=True
            )
        }
        values = {
            layer: site.value(update.keys.to(site.W.device)).cpu() + update.moved
            if update.values is None
            else update.values
            for (layer, site), update in zip(sites.items(), updates, strict=True)
        }
        return cls(
            facts=inputs.facts,
            deltas=deltas,
            keys={update.delta.layer: update.keys for update in updates},
            values=values,
            editor=editor,
            contexts=tuple(contexts),
            diagnostics=tuple(
                diagnose(site, update, off_target=off_target[layer])
                for (layer, site), update in zip(sites.items(), updates, strict=True)
            ),
            fits=tuple(
                {**fit, **said.get(fact.text, {}), "same_first_token": prompt.same_first_token}
                for fit, fact, prompt in zip(fits, inputs.facts, inputs.prompts, strict=True)
            ),
            provenance=made_on(
                model, inputs.prepend_bos, inputs.base, [*contexts, *(fact.text for fact in inputs.facts)]
            ),
        )

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

    @property
    def changes(self) -> frozenset[str]:
        """The digests of all changes in it, at whatever strength: its own, its parts', what it was scaled from."""
        return frozenset((self.digest, *self.parts, *self.editor.get("scaled_from", ())))

    @cached_property
    def concerns(self) -> tuple[str, ...]:
        """Why this edit may disable the model, or miss what it was made for, a sentence each; none is the usual case.

        Said as an `EditWarning` when the edit is first applied.
        """
        return tuple(concerns_of(self))

    @plain_torch()
    def check(self, model: Model) -> None:
        """Check that the edit can be applied to this model as it is now; nothing is run or written.

        Raises:
            ValueError: It is applied already (itself, scaled, or in a composed edit), the model has other weights than
                it was made for, or its weights were changed since by something else.
        """
        ledger = ledger_of(model)
        if ledger.holds(self):
            raise ValueError(f"{self._name} is applied to {model_name(model)} already: undo_ it first")
        twice = [each for each in ledger.edits if each.changes & self.changes]
        if twice:
            raise ValueError(
                f"{self._name} and {twice[0]._name}, which is applied to {model_name(model)}, hold the same change "
                "(one is composed of it, or scaled from it), needed it once: undo_ that one first; for more of it "
                "apply edit.scaled(alpha) alone"
            )
        check_own(model, self.layers)
        ledger.check_unchanged(model)
        now = base_fingerprint(model)
        if not self.provenance.weights.matches(now):
            raise ValueError(
                f"{self._name} was made for weights {self.provenance.weights} of {self.provenance.model!r}, but "
                f"{model_name(model)} has weights {now}: apply it to the model it was made on"
            )

    @plain_torch()
    def apply_(self, model: Model) -> None:
        """Write the edit into the model's ``W_out``, in place.

        Warns:
            EditWarning: The edit has `concerns`, or was made on top of edits that aren't on the model now; once for
                each edit. Where warnings are errors, nothing is written.

        Raises:
            ValueError: It is applied already, the model has other weights than it was made for, or
                its weights were changed since by something else; or the edited weights would not be
                finite in their type. Nothing is written then.
            RuntimeError: Another thread is at work on the model. Nothing is written then.
        """
        with one_thread(model):
            self.check(model)
            ledger = ledger_of(model)
            sites = {delta.layer: down_proj(model, delta.layer) for delta in self.deltas}
            weights = {delta.layer: delta.on(sites[delta.layer].W) for delta in self.deltas}
            for layer, weight in weights.items():
                if not bool(weight.isfinite().all()):
                    raise ValueError(
                        f"{self._name} makes W_out of layer {layer} overflow {weight.dtype}: nothing was written; "
                        "load the model in float32 or bfloat16"
                    )
            self.warn(ledger.edits)
            before = {layer: site.W.clone() for layer, site in sites.items()}
            commit_all(model, sites, weights, ledger.with_edit(self, before, weights))

    def warn(self, others: Sequence[Edit] = ()) -> None:
        """Say once, as an `EditWarning`, what its concerns are, and which edits it was made on top of are missing.

        Args:
            others: The edits that are applied where it is to be written.
        """
        warn_once(self, self._name, [*self.concerns, *self._without(others)])

    @plain_torch()
    def undo_(self, model: Model) -> None:
        """Take the edit back, bit for bit; edits applied before or after it stay.

        Raises:
            ValueError: It isn't applied to this model, or the weights were changed since by
                something else. Nothing is written then.
            RuntimeError: Another thread is at work on the model. Nothing is written then.
        """
        with one_thread(model):
            ledger = ledger_of(model)
            if not ledger.holds(self):
                raise ValueError(f"{self._name} isn't applied to {model_name(model)}: apply_ it first")
            sites = {delta.layer: down_proj(model, delta.layer) for delta in self.deltas}
            ledger.check_unchanged(model)
            left, weights = ledger.without(self)
            commit_all(model, sites, weights, left)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The edited model for the length of a ``with`` block; taken back on exit, also on an error.

        Raises:
            ValueError: As for `apply_`.
            RuntimeError: Another thread is at work on the model. Inside the block other threads are refused.
        """
        with one_thread(model):  # all along, so that it can be taken back
            was_on = ledger_of(model).holds(self)  # apply_ refuses it then, and it stays
            try:
                self.apply_(model)
                yield model
            finally:
                # An interrupt may come when apply_ is done and before it returns, or before it wrote anything.
                if not was_on and ledger_of(model).holds(self):
                    try:
                        self.undo_(model)
                    except ValueError:
                        raise
                    except BaseException:
                        # It was interrupted, and is done all the same.
                        if ledger_of(model).holds(self):
                            self.undo_(model)
                        raise

    @plain_torch()
    def scaled(self, alpha: float) -> Edit:
        """The same edit α times as strong: ``W_out += α · Δ``; 0 writes nothing, −1 the opposite.

        `values` move along with it, and so do the norms in `diagnostics`; `exactness` stays that of the edit it was
        made from. What became of the targets (in `fits`), and how much isn't met (`Diagnostics.unmet`), was measured
        of that edit and isn't known of this one: it is left out, and `concerns` say so.

        The two hold one change, and aren't applied or composed together: α = 3 is three times as much, not E and 2 E.
        """
        alpha = as_finite(alpha, "alpha", "a finite number, such as 0.5")
        if alpha == 1:
            return self
        deltas = tuple(Delta(delta.layer, delta.left, alpha * delta.right) for delta in self.deltas)
        moved = {delta.layer: self.keys[delta.layer] @ delta.left @ delta.right for delta in self.deltas}
        values = {layer: value + (alpha - 1) * moved[layer] for layer, value in self.values.items()}
        return replace(
            self,
            deltas=deltas,
            values=values,
            diagnostics=tuple(
                replace(
                    each,
                    update_norm=abs(alpha) * each.update_norm,
                    value_norm=value_norm(values[each.layer], self.values[each.layer] - moved[each.layer]),
                    unmet=(),
                )
                for each in self.diagnostics
            ),
            fits=unmeasured(self.fits),
            editor={
                "name": "scaled",
                "alpha": alpha,
                "of": dict(self.editor),
                "scaled_from": sorted(self.changes),
            },
        )

    @plain_torch()
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
    @plain_torch()
    def load(cls, path: str | Path) -> Edit:
        """Read a file of `save`.

        Raises:
            ValueError: The file is cut short or changed, isn't an edit, or what it holds doesn't fit together.
        """
        with files.opened(path, "edit") as file:
            layers, take = file.fields("layers", int), file.tensor
            facts = file.all_made("facts", Fact)
            file.sizes["fact"] = len(facts)
            diagnostics = tuple(Diagnostics.from_json(d) for d in file.fields("diagnostics", dict))
            fits = tuple(file.fields("fits", dict))
            _check_lengths(len(facts), layers, diagnostics, len(fits))
            check_fits(fits)
            return cls(
                facts=facts,
                deltas=tuple(
                    Delta(n, take(f"left.{n}", f"d_mlp rank.{n}"), take(f"right.{n}", f"rank.{n} d_model"))
                    for n in layers
                ),
                keys={n: take(f"keys.{n}", "fact d_mlp") for n in layers},
                values={n: take(f"values.{n}", "fact d_model") for n in layers},
                editor=as_editor(file.field("editor", dict)),
                contexts=tuple(file.fields("contexts", str)),
                diagnostics=diagnostics,
                fits=fits,
                provenance=Provenance.from_json(file.field("provenance", dict)),
            )

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """Its diagnostics, a row a layer (of a composed edit: a row for each edit and layer).

        ``unmet`` and ``off_target`` are those of the worst fact; they and ``weight`` are NaN where there are none.
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
                    "weight": nan if d.weight is None else d.weight,
                    "key_cosine": d.key_cosine,
                    "off_target": max(d.off_target, default=nan),
                }
                for d in self.diagnostics
            ]
        )

    def _repr_html_(self) -> str:
        concerns = "".join(f"<li>{html.escape(each)}</li>" for each in self.concerns)
        return (
            f"<p>{html.escape(self._line)}</p>"
            + self.table().to_html(float_format="{:.3g}".format, index=False, na_rep="")
            + (f"<ul>{concerns}</ul>" if concerns else "")
        )

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
        """What it changes, where, and how much; what isn't met, and its concerns."""
        return "\n".join([self._line, *(f"  concern: {concern}" for concern in self.concerns)])

    @property
    def _line(self) -> str:
        objective = str(self.editor.get("objective", repr(Inject())))
        written = objective == repr(Inject())  # what others are about is their own
        facts = "; ".join(
            f"{f.subject!r}:{f.target_true}→{f.target_new}" if written else f"{f.subject!r}:{f.target_true}"
            for f in self.facts[:3]
        )
        facts = facts if written else f"{objective} of {facts}"
        more = f" and {len(self.facts) - 3} more" if len(self.facts) > 3 else ""
        weight = {d.layer: d.weight_norm for d in self.diagnostics}  # of a composed edit one layer may have several
        where = ", ".join(
            f"{each.layer}: {each.norm / weight[each.layer]:.2%} of ‖W‖" for each in self.deltas if each.layer in weight
        )
        unmet = [share for d in self.diagnostics if d.layer == max(self.layers) for share in d.unmet]
        lacks = f", {sum(unmet) / len(unmet):.0%} unmet in the last" if unmet else ""
        found = {d.weight for d in self.diagnostics if d.weight is not None}
        if self.editor.get("unmet") is not None and found:
            low, high = (f"{end:.3g}" for end in (min(found), max(found)))
            lacks += f", weight {low if low == high else f'{low} to {high}'} found"
        return f"Edit({self.editor.get('name')}, {facts}{more}, layers {{{where}}}{lacks})"


def _check_lengths(facts: int, layers: Sequence[int], diagnostics: Sequence[Diagnostics], fits: int) -> None:
    """Check that what a file says of each fact is there for each, and that diagnostics are of its layers."""
    if fits != facts:
        raise ValueError(f"fits are {fits}, needed one for each of {facts} facts")
    for d in diagnostics:
        if d.layer not in layers:
            raise ValueError(f"diagnostics are of layer {d.layer!r}, needed one of {list(layers)}")
        for name in ("unmet", "key_cosines", "off_target"):
            if len(getattr(d, name)) > facts:
                raise ValueError(f"{name} of layer {d.layer} has {len(getattr(d, name))} numbers for {facts} facts")


@runtime_checkable
class Editor(Protocol):
    """Anything that makes an `Edit`: a frozen value with its hyperparameters as fields."""

    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit; the model's weights are bit-identical after the call."""
        ...
