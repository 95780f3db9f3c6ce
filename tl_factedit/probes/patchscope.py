"""Patchscope: put a state of the fact's prompt into another prompt, and let a model go on from it.

Ghandeharioun et al. 2024 (arXiv:2401.06102). The state h_S^(l) at the last subject token, after block l, replaces the
state of a placeholder token of a target prompt after block l'; what follows is the model's own reading of it. A target
prompt that repeats tokens asks what the state stands for; one that states a relation ("The city of ? is") asks for the
object, and can find what no fixed projection finds.

Two nulls belong beside it: control objects, and the states of other subjects (`states_of_others`). Across an edit, read
with `crossed_patchscope`, as the model that runs the target prompt may be the edited one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import resid_post, resid_pre
from tl_factedit.backend.protocol import Model, bos_policy, device, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import check_length, continuation, encode, find_span, of_all, spell
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.states import INPUT, POSITIONS, HiddenStates, read_states

QUANTITIES = ("logp_old", "logp_new", "percentile_old", "percentile_new")
IDENTITY = "sun -> sun; 27 -> 27; table -> table; {} ->"
"""A target prompt that repeats what stands before each arrow."""


@dataclass(frozen=True)
class Patchscope:
    """Log-probability (nats) of a fact's objects after a target prompt with its state, by source and target layer.

    Objects are scored whole, as continuations of the target prompt. ``percentile_old`` is the share of the control
    objects that are less likely than the old one (ties half); NaN without controls. It is ½ on average if the state
    knows nothing of the old object *and* that object could as well have been any of the controls. Objects of real facts
    aren't like that: famous things have frequent objects, which any prompt favours. Read `states_of_others` beside
    them.

    Layers are labelled by the block that a state comes out of, -1 for what goes into the first block.

    Attributes:
        template: The target prompt, with one ``"{}"`` where the placeholder goes.
        placeholder: The text that stands there; its last token is patched.
        source_layers: Where states are taken from; None for all, from -1 on.
        target_layers: Where states are put in; None for all, from -1 on.
        position: Where states are taken from: the last token of the subject, or of the prompt.
        prepend_bos: BOS policy of both prompts; None for the model's default.
        batch_tokens: Most tokens in one forward pass.

    Example:
        >>> scope = fe.probes.Patchscope("The city of {} is called", target_layers=range(4))          # doctest: +SKIP
        >>> fe.compare(scope, model, edit, facts).after.at(quantity="percentile_old").mean(0)   # doctest: +SKIP
    """

    template: str = IDENTITY
    placeholder: str = "?"
    source_layers: Sequence[int] | None = None
    target_layers: Sequence[int] | None = None
    position: Literal["subject", "last"] = "subject"
    prepend_bos: bool | None = None
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        """Check the target prompt."""
        check_settings(self, least={"batch_tokens": 1})
        if self.template.count("{}") != 1:
            raise ValueError(
                f'template {self.template!r} holds {self.template.count("{}")} "{{}}", needed exactly one: put "{{}}" '
                "where the placeholder goes"
            )
        if not self.placeholder.strip():
            raise ValueError(f"placeholder is {self.placeholder!r}, needed some text, such as '?'")
        if self.position not in POSITIONS:
            raise ValueError(f"position {self.position!r} is unknown, needed one of {POSITIONS}")
        for name in ("source_layers", "target_layers"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read states of a model by the same model; axes are fact, source_layer, target_layer, quantity."""
        facts = as_facts(facts)
        self._prompt(model)  # checked before the states are read
        return self.read(model, read_states(model, facts, prepend_bos=self.prepend_bos))

    @plain_torch()
    def read(self, model: Model, states: HiddenStates) -> Reading:
        """Read states of one model, as `read_states` gives them, by another model or the same one.

        Args:
            model: The model that runs the target prompt.
            states: States of the facts' own prompts.

        Raises:
            ValueError: No such layer, states of another width, an object that doesn't continue the target prompt's
                tokens, or a placeholder that doesn't end on a token boundary.
        """
        if states.values.shape[-1] != model.cfg.d_model:
            raise ValueError(
                f"states of {states.model!r} have {states.values.shape[-1]} dimensions, the target's model has "
                f"{model.cfg.d_model}: needed the same"
            )
        sources = states.layers if self.source_layers is None else self.source_layers
        targets = range(INPUT, n_layers(model)) if self.target_layers is None else self.target_layers
        _check(sources, states.layers, "source")
        _check(targets, range(INPUT, n_layers(model)), "target")
        place = [states.layers.index(layer) for layer in sources]
        vectors = states.values[:, place, states.positions.index(self.position)]
        prompt = self._prompt(model)
        objects = of_all(states.facts, lambda fact: _Objects.of(model, prompt, fact))
        with frozen(model), torch.no_grad():
            log_p = _log_probs(Runner(model), prompt, vectors, tuple(targets), objects, self.batch_tokens)
        values = [_quantities(table, own) for table, own in zip(log_p, objects, strict=True)]
        return Reading(
            name="patchscope",
            values=torch.stack(values),
            axes={
                "fact": [fact.name for fact in states.facts],
                "source_layer": tuple(sources),
                "target_layer": tuple(targets),
                "quantity": QUANTITIES,
            },
            unit="nats (logp), share of controls below",
        )

    def _prompt(self, model: Model) -> _Prompt:
        bos = bos_policy(model, self.prepend_bos)
        text = self.template.replace("{}", self.placeholder)
        check_length(
            model.tokenizer, text, "the target prompt", prepend_bos=bos, room=getattr(model.cfg, "n_ctx", None)
        )
        ids, offsets = encode(model.tokenizer, text, prepend_bos=bos)
        begin = self.template.index("{}")
        end = begin + len(self.placeholder)
        span = find_span(text, offsets, begin, end, spell(model.tokenizer, ids), self.placeholder)
        return _Prompt(text, ids, span[1] - 1, bos)


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A target prompt as run, and the position that is patched."""

    text: str
    ids: Int[Tensor, "pos"]
    place: int
    bos: bool


@dataclass(frozen=True, eq=False)
class _Objects:
    """A fact's objects as continuations of the target prompt: the old one, the new one if any, the controls."""

    ids: tuple[tuple[int, ...], ...]
    any_new: bool

    @classmethod
    def of(cls, model: Model, prompt: _Prompt, fact: Fact) -> _Objects:
        def spelt(text: str) -> tuple[int, ...]:
            there = fact.after(prompt.text, text)
            return tuple(continuation(model.tokenizer, prompt.text, there, prepend_bos=prompt.bos).tolist())

        both = [spelt(fact.old)] + ([] if fact.target_new is None else [spelt(fact.target_new)])
        controls = dict.fromkeys(spelt(text) for text in fact.controls)
        return cls((*both, *(ids for ids in controls if ids not in both)), fact.target_new is not None)


def _log_probs(
    runner: Runner,
    prompt: _Prompt,
    vectors: Float[Tensor, "fact source d_model"],
    targets: Sequence[int],
    objects_of: Sequence[_Objects],
    batch_tokens: int,
) -> list[Float[Tensor, "source target object"]]:
    """Log-probability of each fact's objects with its vectors patched in; only the blocks behind a patch are run."""
    out = [torch.full((vectors.shape[1], len(targets), len(objects.ids)), math.nan) for objects in objects_of]
    # An object's tokens but the last stand behind the prompt: objects that share them share the rows.
    beginnings: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for i, objects in enumerate(objects_of):
        for j, ids in enumerate(objects.ids):
            beginnings.setdefault(ids[:-1], {}).setdefault(i, []).append(j)
    for beginning, wanted in beginnings.items():
        ids = torch.cat([prompt.ids, torch.tensor(beginning, dtype=torch.long)])
        at = torch.arange(len(prompt.ids) - 1, len(ids))
        names = [resid_pre(0) if layer == INPUT else resid_post(layer) for layer in targets]
        streams = runner.capture(ids[None], list(dict.fromkeys(names)))
        facts = list(wanted)
        rows = vectors[facts].flatten(0, 1).to(streams[names[0]])
        for t, (layer, name) in enumerate(zip(targets, names, strict=True)):
            parts: list[Tensor] = []
            for attempt in that_fit([len(ids)] * len(rows), batch_tokens):  # of one length: in their order
                with attempt as batch:
                    patched = streams[name].repeat(len(batch), 1, 1)
                    patched[:, prompt.place] = rows[batch[0] : batch[-1] + 1]
                    tokens = ids.to(device(runner.model)).expand(len(batch), -1)
                    logits = runner.logits(tokens, at=at.expand(len(batch), -1), start=(layer + 1, patched))
                    parts.append(logits.float().log_softmax(-1).cpu())
            log_p = torch.cat(parts).unflatten(0, (len(facts), -1))
            for row, i in zip(log_p, facts, strict=True):
                for j in wanted[i]:
                    target = torch.tensor(objects_of[i].ids[j])
                    out[i][:, t, j] = row[:, torch.arange(len(target)), target].sum(-1)
    return out


def _quantities(
    log_p: Float[Tensor, "source target object"], objects: _Objects
) -> Float[Tensor, "source target quantity"]:
    nothing = torch.full(log_p.shape[:2], math.nan)
    controls = log_p[..., 1 + objects.any_new :]

    def percentile(log_p_of: Tensor) -> Tensor:
        # The mean over no controls is NaN, as it should be.
        return ((controls < log_p_of[..., None]).float() + 0.5 * (controls == log_p_of[..., None]).float()).mean(-1)

    old, new = log_p[..., 0], log_p[..., 1] if objects.any_new else None
    columns = [old, nothing if new is None else new, percentile(old), nothing if new is None else percentile(new)]
    return torch.stack(columns, -1)


def _check(layers: Sequence[Hashable], there: Sequence[Hashable], what: str) -> None:
    if not len(layers):
        raise ValueError(f"{what}_layers is empty, needed at least one")
    unknown = [layer for layer in layers if layer not in there]
    if unknown:
        raise ValueError(f"{what} layer {unknown[0]} is outside the model, which has {list(there)}: -1 is its input")
