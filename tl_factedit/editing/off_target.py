"""Where else an edit acts: its effect on keys that it wasn't made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Hook, Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, encode, pad
from tl_factedit.editing.delta import Delta, norm_ratio
from tl_factedit.editing.ledger import ledger_of

if TYPE_CHECKING:
    from tl_factedit.editing.edit import Edit

AT_ONCE = 4096
"""Most tokens in a forward pass that reads keys."""


@plain_torch()
def off_target_share(
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
    on = any(other.digest == edit.digest for other in ledger_of(model).edits)
    if not on:
        edit.check(model)
    return measure_off_target(
        model,
        edit.facts,
        edit.deltas,
        prepend_bos=edit.provenance.prepend_bos,
        at=at,
        neighbours=neighbours,
        written=on,
    )


def measure_off_target(
    model: Model,
    facts: Sequence[Fact],
    deltas: Sequence[Delta],
    *,
    prepend_bos: bool,
    at: Literal["subject", "end"] = "subject",
    neighbours: bool = False,
    written: bool = False,
) -> dict[int, tuple[float, ...]]:
    """`off_target_share` of changes that aren't an `Edit` yet, as `Edit.made` asks for it.

    Args:
        model: The model; it isn't looked at whether it has the weights that the changes are for.
        facts: What they were made for.
        deltas: The changes, one a layer.
        prepend_bos: BOS policy.
        at: As in `off_target_share`.
        neighbours: As in `off_target_share`.
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
    return {layer: tuple(norm_ratio(other[layer], meant[layer]).tolist()) for layer in meant}


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
    for attempt in that_fit([len(text) for text in texts], AT_ONCE):
        with attempt as batch:
            below = [delta for delta in deltas if delta.layer < max(sites) and not written]
            hooks = [hook for delta in below for hook in adding_hooks(sites[delta.layer], delta)]
            # Entered for each batch, so that the model is as it was whenever the caller has the word.
            with frozen(model), torch.no_grad():
                tokens = pad([texts[i] for i in batch], 0)
                found = Runner(model).capture(tokens, places, stop=max(sites) + 1, hooks=hooks)
            for row, i in enumerate(batch):
                yield i, {layer: found[site.key_hook][row, : len(texts[i])].double() for layer, site in sites.items()}


def adding_hooks(site: DownProj, delta: Delta) -> list[Hook]:
    """Hooks that add a change to what ``W_out`` answers, at every token."""

    def add(key: Tensor, value: Tensor) -> Tensor:
        change = key.double() @ delta.left.to(value.device) @ delta.right.to(value.device)
        return value + change.to(value.dtype)

    return site.hooks(add)
