"""Where a number came from: model, weights, BOS policy and versions, kept with every result."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tl_factedit.backend.fingerprint import Fingerprint, fingerprint
from tl_factedit.backend.protocol import Model, bos_policy, check_embedded, kind, model_name
from tl_factedit.backend.state import users_hooks
from tl_factedit.backend.weights import carried
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import brings_bos
from tl_factedit.core.typed import made


@dataclass(frozen=True)
class Provenance:
    """What is needed to repeat a result, beside its own parameters.

    Attributes:
        model: The model's name.
        weights: Fingerprint of the weights that were run.
        prepend_bos: Whether prompts ran with BOS in front.
        dtype: The weights' type, e.g. ``"float32"``.
        versions: Versions of torch, transformers, transformer-lens and tl-factedit.
        revision: The commit of the hub that the weights were taken from, if the model's config says so.
        hooks: Names of the places where hooks were on the model, a user's or those of a change by hooks (a router);
            ``"all modules"`` for one of ``torch.nn.modules.module.register_module_forward_hook``.
        edits: The digests of the edits that were on the model, in the order they were applied. `weights` are with them
            on; for an edit (or an eraser), those below the edits that were on when it was made.
        bos_in_prompt: Whether some prompt or text begins with the BOS token itself (a chat template), so that none was
            put in front of it.
        devices: Where the weights were, e.g. ``("cuda:0",)``: numbers of another kind of device are rounded otherwise.
            Two that differ in this alone are equal, and what was begun on one device is resumed on another.

    Example:
        >>> fe.editing.Provenance.of(model).versions["torch"]             # doctest: +SKIP
    """

    model: str
    weights: Fingerprint
    prepend_bos: bool
    dtype: str
    versions: Mapping[str, str]
    revision: str | None = None
    edits: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    bos_in_prompt: bool = False
    devices: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        model: Model,
        prepend_bos: bool | None = None,
        *,
        weights: Fingerprint | None = None,
        prompts: Iterable[str] = (),
    ) -> Provenance:
        """The provenance of what is run on this model now.

        Args:
            model: Either class.
            prepend_bos: BOS policy; None for the model's default.
            weights: Fingerprint of the weights, where it isn't that of the model now.
            prompts: What is run, as far as it is known: says `bos_in_prompt`. That an edit on the model was made with
                another BOS policy is told, where some are run.
        """
        kind(model)
        bos = bos_policy(model, prepend_bos)
        edits, prompts = carried(model), list(prompts)
        check_embedded(model, prompts)
        others = [made for made in edits.values() if made != bos]
        if others and prompts:
            tell(
                f"what is run has prepend_bos={bos}, and {len(others)} of {len(edits)} edits on the model were made "
                f"with {not bos}: their keys are of other tokens; give prepend_bos={not bos}",
                once="BOS of edits",
            )
        dtype = next(iter(model.parameters())).dtype
        return cls(
            model=model_name(model),
            weights=weights or fingerprint(model),
            prepend_bos=bos,
            dtype=str(dtype).removeprefix("torch."),
            versions=versions(),
            revision=_revision(model),
            edits=tuple(edits),
            hooks=users_hooks(model),
            bos_in_prompt=bos and any(brings_bos(model.tokenizer, prompt) for prompt in prompts),
            devices=tuple(dict.fromkeys(str(param.device) for param in model.parameters())),
        )

    def having_read(self, brought_bos: bool) -> Provenance:
        """That of a result of texts that were read on the way, one of which brought its BOS (or none did)."""
        return replace(self, bos_in_prompt=self.bos_in_prompt or (self.prepend_bos and brought_bos))

    def origin(self) -> dict[str, Any]:
        """Plain data that tells one model from another, and how it is run.

        Where it was is none of it, nor which edits were on: what is run has them in its weights.
        """
        w = self.weights
        return {
            "model": self.model,
            "weights": {"w_out": list(w.w_out), "rest": w.rest, "layout": w.layout},
            "prepend_bos": self.prepend_bos,
            "dtype": self.dtype,
            "versions": dict(self.versions),
            "revision": self.revision,
            "hooks": list(self.hooks),
            "bos_in_prompt": self.bos_in_prompt,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file's header."""
        return self.origin() | {"edits": list(self.edits), "devices": list(self.devices)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """Back from `to_json`; of older files some fields are missing.

        Raises:
            ValueError: A field is missing, or no such thing as it has to be; the message names it.
        """
        return made(
            cls, data, "provenance", plain=True, missing=("revision", "edits", "hooks", "bos_in_prompt", "devices")
        )


def _revision(model: Model) -> str | None:
    """The commit that transformers notes in a config it took from the hub; a HookedTransformer keeps none."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    found = getattr(config, "_commit_hash", None)
    return None if found is None else str(found)


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {}
    for name in ("torch", "transformers", "transformer-lens", "tl-factedit"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def difference(then: Provenance, now: Provenance) -> str | None:
    """What two collections on the same weights differ in. A model's name is none of it: the weights are."""
    if then.prepend_bos != now.prepend_bos:
        return f"prepend_bos={then.prepend_bos} (not {now.prepend_bos})"
    if then.dtype != now.dtype:
        return f"dtype {then.dtype} (not {now.dtype})"
    if then.hooks != now.hooks:
        return f"hooks of a user at {list(then.hooks)} (not at {list(now.hooks)})"
    if None not in (then.revision, now.revision) and then.revision != now.revision:
        return f"revision {then.revision} of the model (not {now.revision})"
    changed = [name for name in {**then.versions, **now.versions} if then.versions.get(name) != now.versions.get(name)]
    if changed:
        return ", ".join(f"{name} {then.versions.get(name)} (not {now.versions.get(name)})" for name in changed)
    return None
