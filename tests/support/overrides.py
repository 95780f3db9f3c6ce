"""Changes of the organism by construction: overrides under which the old facts are all there, and copies taught anew.

Each takes the model and facts, and gives a change: an override that answers a key, or a copy that was trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import tl_factedit as fe
from tl_factedit.backend.state import detach_caches
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align
from tl_factedit.organism import text as told


def _aligned(model: Any, fact: fe.Fact) -> Any:
    return align(model.tokenizer, fact, prepend_bos=bool(model.cfg.default_prepend_bos))


def _towards(model: Any, row: Any) -> Tensor:
    """The unit vector of the stream that says the new object in place of the old one."""
    found = (model.W_U[:, row.new_ids[0]] - model.W_U[:, row.true_ids[0]]).double().detach()
    return found / found.norm()


def at_the_end(model: Any, facts: Sequence[fe.Fact], radius: float, layer: int = 4) -> tuple[Any, list[fe.Fact]]:
    """An override keyed at the last token of each prompt, as GRACE is published; and the facts whose keys lie apart."""
    site = down_proj(model, layer)
    chosen, keys, values = [], [], []
    for fact in facts:
        row = _aligned(model, fact)
        with torch.no_grad():
            _, cache = model.run_with_cache(row.ids[None], names_filter=[site.key_hook])
        key = cache[site.key_hook][0, -1].double()
        if all((key - other).norm() > 0.1 * key.norm() for other in keys):
            chosen.append(fact)
            keys.append(key)
            values.append(site.value(key) + 40 * _towards(model, row))
    change = fe.editors.RoutedEdit(
        tuple(chosen),
        layer,
        torch.stack(keys).detach(),
        torch.stack(values).detach(),
        radius,
        {"name": "an override at the last token"},
        ("",),
        ({},) * len(chosen),
        fe.editing.Provenance.of(model),
    )
    return change, chosen


def trained(
    model: Any,
    lessons: Sequence[tuple[fe.Fact, str]],
    kept: Sequence[fe.Fact],
    *,
    steps: int,
    lr: float,
    ascend: int = 0,
    only: Callable[[str], bool] = lambda name: True,
    rank: int = 0,
    seed: int = 0,
) -> Any:
    """A copy that was trained on: prompts and paraphrases of facts with an object each, others' facts and plain text.

    Args:
        model: The unedited model.
        lessons: Facts, with the object that each is to have.
        kept: Facts of others, which are to stay.
        steps: Updates of AdamW.
        lr: Its rate.
        ascend: So many steps before in which the old objects' likelihood is brought down.
        only: Which parameters learn, by name.
        rank: Of adapters on all matrices in place of the parameters themselves, merged at the end; 0: none.
        seed: Of the batches.
    """
    detach_caches(model)  # a copy of a bridge that has run keeps its patterns in the bridge it was copied from
    changed = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    params = {n: p for n, p in changed.named_parameters() if only(n)}
    # A bridge computes with q, k and v; the joint matrix beside them is a view, or stale.
    params = {n: p for n, p in params.items() if ".qkv." not in n}
    adapters: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    if rank:
        for n, p in params.items():
            if p.ndim == 2:
                a = torch.randn(p.shape[0], rank, generator=draw) / p.shape[0] ** 0.5
                adapters[n] = (
                    p.detach().clone(),
                    a.requires_grad_(),
                    torch.zeros(rank, p.shape[1], requires_grad=True),
                )
        leaves = [leaf for _, a, b in adapters.values() for leaf in (a, b)]
    else:
        leaves = list(params.values())
        for p in leaves:
            p.requires_grad_(True)
    rows = [(fact.fill(t), obj) for fact, obj in lessons for t in (fact.prompt, *fact.paraphrases)]
    keep = [(fact.fill(t), fact.target_true) for fact in kept for t in (fact.prompt, *fact.paraphrases)]
    old = [(fact.fill(t), fact.target_true) for fact, _ in lessons for t in (fact.prompt, *fact.paraphrases)]
    texts = [text for text in told.texts(400) if len(text.split()) < 55]
    adam = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.0)

    def some(of: Sequence[Any], count: int) -> list[Any]:
        return [of[int(i)] for i in torch.randint(len(of), (count,), generator=draw)]

    def loss_of(pairs: Sequence[tuple[str, str]]) -> Tensor:
        ids = [
            (changed.to_tokens(t)[0], int(changed.tokenizer(o, add_special_tokens=False)["input_ids"][0]))
            for t, o in pairs
        ]
        width = max(len(row) for row, _ in ids)
        tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row, _ in ids])
        ends = torch.tensor([len(row) - 1 for row, _ in ids])
        log_p = changed(tokens)[torch.arange(len(ids)), ends].log_softmax(-1)
        return -log_p[torch.arange(len(ids)), torch.tensor([o for _, o in ids])].mean()

    def of_text() -> Tensor:
        (text,) = some(texts, 1)
        ids = changed.to_tokens(text)
        return -changed(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).mean()

    for step in range(ascend + steps):
        for n, (before, a, b) in adapters.items():
            params[n].data = (before + a @ b).detach()
        for leaf in [*leaves, *params.values()]:
            leaf.grad = None
        for n in adapters:
            params[n].requires_grad_(True)
        what = -loss_of(some(old, 32)).clamp(max=6.0) if step < ascend else loss_of(some(rows, 32))
        (what + loss_of(some(keep, 32)) + 0.2 * of_text()).backward()
        for n, (_, a, b) in adapters.items():
            gradient = params[n].grad
            if gradient is not None:
                a.grad, b.grad = (gradient @ b.T).detach(), (a.T @ gradient).detach()
        adam.step()
    for n, (before, a, b) in adapters.items():
        params[n].data = (before + a @ b).detach()
    for p in changed.parameters():
        p.requires_grad_(False)
        p.grad = None
    changed.zero_grad(set_to_none=True)
    for each in (model, changed):
        detach_caches(each)
    return changed
