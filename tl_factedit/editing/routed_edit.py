"""Keys and values laid over a model by hooks: what a router stores, applies and keeps in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.hooking import hooked
from tl_factedit.backend.packing import gather
from tl_factedit.backend.protocol import Hook, Model, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, one_thread, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core import files
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, pad
from tl_factedit.core.typed import Finite
from tl_factedit.editing.concerns import concerns_of_fits, warn_once
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.ledger import base_fingerprint
from tl_factedit.editing.outcome import as_editor, check_fits


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
class RoutedEdit:
    """Keys and values beside a model, and hooks that look them up. Nothing is written into the model.

    Attributes:
        facts: What it was made for.
        layer: The block.
        keys: k*, the input of ``W_out`` that it answers to, [fact d_mlp], float64.
        values: v*, what it answers in place of ``W_out``, [fact d_model], float64.
        radius: How far a key may be from a stored one, as a share of the stored one's norm.
        editor: How keys and values were found, as plain data.
        contexts: The prefixes they were made under.
        fits: For each fact, how its value was found.
        provenance: Model, weights, BOS policy, versions.

    Raises:
        ValueError: The radius isn't positive; or a stored key lies within another's radius, so that one of two facts
            could never be told from the other.
    """

    facts: tuple[Fact, ...]
    layer: int
    keys: Float[Tensor, "fact d_mlp"]
    values: Float[Tensor, "fact d_model"]
    radius: float
    editor: Mapping[str, Any]
    contexts: tuple[str, ...]
    fits: tuple[Mapping[str, Any], ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        """Check the radius against the keys."""
        if not self.radius > 0:
            raise ValueError(f"radius is {self.radius}, needed more than 0 (a share of a stored key's norm)")
        if not bool((self.keys.norm(dim=-1) > 0).all()):
            raise ValueError("a stored key is 0, needed one with a direction: choose another layer")
        apart = self.distances(self.keys).fill_diagonal_(torch.inf)
        if bool((apart <= self.radius).any()):
            nearest = float(apart.min())
            i, j = divmod(int(apart.argmin()), len(apart))
            raise ValueError(
                f"the keys of {self.facts[i].name!r} and {self.facts[j].name!r} are {nearest:.3f} of a norm apart, "
                f"within the radius of {self.radius}: needed less than {nearest:.3f}, or facts of different subjects"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    @cached_property
    def digest(self) -> str:
        """A hash of what it stores: two routers with one digest are the same change."""
        seen = hashlib.sha256(f"{self.layer} {self.radius!r}".encode())
        for tensor in (self.keys, self.values):
            seen.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()[:16]

    @classmethod
    @plain_torch()
    def of(cls, edit: Edit, radius: float = 0.25) -> RoutedEdit:
        """The router with the keys and values of an edit of one layer: the same answer, laid over instead of written.

        Raises:
            ValueError: The edit writes several layers; or as for the class.
        """
        if len(edit.layers) != 1:
            raise ValueError(
                f"the edit writes layers {list(edit.layers)}, needed one: of several layers no value is the whole "
                "answer"
            )
        (layer,) = edit.layers
        return cls(
            facts=edit.facts,
            layer=layer,
            keys=edit.keys[layer].detach().double().cpu(),
            values=edit.values[layer].detach().double().cpu(),
            radius=radius,
            editor={"name": "Router", "radius": radius, "of": dict(edit.editor)},
            contexts=edit.contexts,
            fits=edit.fits,
            provenance=edit.provenance,
        )

    def distances(self, keys: Float[Tensor, "*token d_mlp"]) -> Float[Tensor, "*token fact"]:
        """How far keys are from the stored ones, as shares of the stored ones' norms."""
        stored = self.keys.to(keys.device)
        apart = torch.cdist(keys.double().reshape(-1, keys.shape[-1]), stored)
        return (apart / stored.norm(dim=-1)).reshape(*keys.shape[:-1], len(stored))

    @plain_torch()
    def check(self, model: Model) -> None:
        """Check that it is of this model; nothing is run.

        Raises:
            ValueError: The model has other weights than it was made for (edits of this package don't count).
        """
        now = base_fingerprint(model)
        if not self.provenance.weights.matches(now):
            raise ValueError(
                f"the router was made for weights {self.provenance.weights} of {self.provenance.model!r}, but "
                f"{model_name(model)} has weights {now}: apply it to the model it was made on"
            )

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The routed model for the length of a ``with`` block, by hooks alone; they go on exit, also on an error.

        Warns:
            EditWarning: It has `concerns`; once for each object.

        Raises:
            ValueError: As for `check`.
            RuntimeError: Another thread is at work on the model. Inside the block other threads are refused.
        """
        with one_thread(model):
            self.check(model)
            warn_once(self, f"the edit of {', '.join(repr(fact.name) for fact in self.facts[:3])}", self.concerns)
            with hooked(model, self.hooks(model)):
                yield model

    @cached_property
    def concerns(self) -> tuple[str, ...]:
        """Of which facts it doesn't do what was wanted; said as an `EditWarning` when it is first applied."""
        last_layer = self.layer == len(self.provenance.weights.w_out) - 1
        falls_short = "take a larger radius, contexts=(), or another layer"
        return tuple(concerns_of_fits(self.facts, self.fits, last_layer=last_layer, falls_short=falls_short))

    @plain_torch()
    def hooks(self, model: Model) -> list[Hook]:
        """The hooks that look values up; the model isn't changed."""
        site = down_proj(model, self.layer)

        def answer(key: Tensor, value: Tensor) -> Tensor:
            apart, nearest = self.distances(key.detach()).min(-1)
            stored = self.values.to(value)[nearest]
            return torch.where((apart <= self.radius)[..., None], stored, value)

        return site.hooks(answer)

    @plain_torch()
    def reach(self, model: Model, others: Sequence[Fact] = ()) -> Reach:
        """How near the stored keys the subjects' own keys come under their paraphrases, and others' subjects.

        Args:
            model: The model it was made on, without it.
            others: Facts that it must leave alone, such as calibration subjects; about other subjects.
        """
        self.check(model)
        bos = self.provenance.prepend_bos
        own = [(i, t) for i, fact in enumerate(self.facts) for t in (fact.prompt, *fact.paraphrases) if "{}" in t]
        rows = [align(model.tokenizer, self.facts[i], prepend_bos=bos, template=t) for i, t in own]
        rows += [align(model.tokenizer, fact, prepend_bos=bos) for fact in others]
        site = down_proj(model, self.layer)
        found = []
        with frozen(model), torch.no_grad():
            runner = Runner(model)
            for some in torch.arange(len(rows)).split(128):
                heads = [rows[i].ids[: rows[i].last + 1] for i in some.tolist()]
                keys = runner.capture(pad(heads, 0), [site.key_hook], stop=self.layer + 1)[site.key_hook]
                at = torch.tensor([[len(head) - 1] for head in heads])
                found.append(self.distances(gather(keys, at)[:, 0]).cpu())
        apart = torch.cat(found)
        mine = torch.tensor([i for i, _ in own])
        farthest = torch.zeros(len(self.facts), dtype=apart.dtype)
        farthest.scatter_reduce_(0, mine, apart[torch.arange(len(own)), mine], "amax")
        among = apart[: len(own)].scatter(1, mine[:, None], torch.inf).amin(0)
        return Reach(self.radius, farthest, among, apart[len(own) :].amin(1))

    @plain_torch()
    def save(self, path: str | Path) -> None:
        """Write one small file (safetensors)."""
        header = {
            "facts": [asdict(fact) for fact in self.facts],
            "layer": self.layer,
            "radius": self.radius,
            "editor": dict(self.editor),
            "contexts": list(self.contexts),
            "fits": [dict(fit) for fit in self.fits],
            "provenance": self.provenance.to_json(),
        }
        files.write(Path(path), "routed edit", header, {"keys": self.keys, "values": self.values})

    @classmethod
    @plain_torch()
    def load(cls, path: str | Path) -> RoutedEdit:
        """Read a file of `save`.

        Raises:
            ValueError: The file is cut short or changed, isn't a router, or what it holds doesn't fit together.
        """
        with files.opened(path, "routed edit") as file:
            facts = file.all_made("facts", Fact)
            file.sizes["fact"] = len(facts)
            fits = tuple(file.fields("fits", dict))
            if len(fits) != len(facts):
                raise ValueError(f"fits are {len(fits)}, needed one for each of {len(facts)} facts")
            check_fits(fits)
            return cls(
                facts=facts,
                layer=file.field("layer", int),
                keys=file.tensor("keys", "fact d_mlp"),
                values=file.tensor("values", "fact d_model"),
                radius=file.field("radius", Finite),
                editor=as_editor(file.field("editor", dict)),
                contexts=tuple(file.fields("contexts", str)),
                fits=fits,
                provenance=Provenance.from_json(file.field("provenance", dict)),
            )

    def __repr__(self) -> str:
        """What it answers for, and where."""
        facts = "; ".join(f"{f.subject!r}:{f.target_true}→{f.target_new}" for f in self.facts[:3])
        more = f" and {len(self.facts) - 3} more" if len(self.facts) > 3 else ""
        line = f"RoutedEdit({facts}{more}, layer {self.layer}, radius {self.radius:g})"
        return "\n".join([line, *(f"  concern: {concern}" for concern in self.concerns)])


@dataclass(frozen=True, eq=False)
class Reach:
    """How far keys are from those of a router, as shares of the stored keys' norms.

    Attributes:
        radius: The router's.
        own: For each stored key, its own subject's farthest key over prompt and paraphrases: beyond the radius
            the router misses it, [fact].
        among: For each stored key, the nearest key of another of the router's subjects; inf for one fact, [fact].
        others: For each other subject, its distance from the nearest stored key: within the radius the router answers
            for it, [other].
    """

    radius: float
    own: Float[Tensor, "fact"]
    among: Float[Tensor, "fact"]
    others: Float[Tensor, "other"]

    @property
    def missed(self) -> int:
        """How many facts have a paraphrase that it doesn't answer."""
        return int((self.own > self.radius).sum())

    @property
    def caught(self) -> int:
        """For how many other subjects it answers."""
        return int((self.others <= self.radius).sum())
