"""What a trained organism knows of what it was told, and by which way it recalls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tl_factedit.organism import world as o
from tl_factedit.organism.vocabulary import word_ids


@torch.no_grad()
def accuracy(model: Any, variant: str = "base", people: int | None = None) -> dict[str, float]:
    """Share of prompts whose answer the model puts first, by kind of prompt.

    Args:
        model: A transformers model, as `train` returns it.
        variant: The variant whose world is asked for.
        people: About how many people to ask for; None for all.

    Returns:
        The shares of ``trained`` and ``held_out`` phrasings of all attributes; of ``two_hop`` prompts about people
        whose two-hop sentences aren't in the text, and ``two_hop_told`` about those whose are; of ``reverse`` prompts
        (all three words right).
    """
    world = o.world(variant)
    asked: dict[str, list[tuple[str, str]]] = {
        "trained": [], "held_out": [], "two_hop": [], "two_hop_told": [], "reverse": []
    }  # fmt: skip
    for person in world.people:
        for relation in o.RELATIONS:
            for i, phrasing in enumerate(relation.phrasings):
                kind = "held_out" if i in person.held_out[relation.name] else "trained"
                asked[kind].append((phrasing.replace("{}", person.name), person.objects[relation.name]))
        for name in o.IMPLIED:
            for phrasing in o.relation(name).phrasings:
                kind = "two_hop_told" if person.told else "two_hop"
                asked[kind].append((phrasing.replace("{}", person.name), world.answer(person, name)))
        if person.reverse:
            asked["reverse"].append((o.REVERSE.format(**person.objects), person.name))
    if people is not None:
        asked = {kind: rows[:: max(1, len(rows) // (people * 5))] for kind, rows in asked.items()}
    was_training = model.training
    model.eval()
    found = {kind: _share_right(model, rows) for kind, rows in asked.items()}
    model.train(was_training)
    return found


@torch.no_grad()
def routes(model: Any, variant: str = "base", people: int = 300) -> dict[str, float]:
    """Share of first phrasings that are answered correctly while parts of the name are hidden.

    Args:
        model: A transformers model, as `train` returns it.
        variant: The variant whose world is asked for.
        people: How many people to ask for.

    Returns:
        ``both`` (nothing hidden), ``subject`` (later positions see only the last part of the name), ``past``
        (the last part doesn't see the others, but later positions do), ``neither`` (both are hidden).
    """
    ids = word_ids()
    world = o.world(variant)
    right = dict.fromkeys(("both", "subject", "past", "neither"), 0)
    for relation in o.RELATIONS:
        before = 1 + len(relation.phrasings[0].split("{}")[0].split())
        spelt = [relation.phrasings[0].replace("{}", p.name).split() for p in world.people[:people]]
        tokens = torch.tensor([[0, *(ids[word] for word in line)] for line in spelt])
        answers = torch.tensor([ids[p.objects[relation.name]] for p in world.people[:people]])
        for hidden in right:
            visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
            if hidden in ("subject", "neither"):
                visible[before + 3 :, before : before + 2] = False
            if hidden in ("past", "neither"):
                visible[before + 2, before : before + 2] = False
            mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
            logits = model(input_ids=tokens, attention_mask=mask.expand(len(tokens), 1, -1, -1)).logits
            right[hidden] += int((logits[:, -1].argmax(-1) == answers).sum())
    return {hidden: count / (people * len(o.RELATIONS)) for hidden, count in right.items()}


def _share_right(model: Any, rows: Iterable[tuple[str, str]], batch: int = 512) -> float:
    ids = word_ids()
    spelt = [([0, *(ids[w] for w in text.split())], [ids[w] for w in answer.split()]) for text, answer in rows]
    spelt.sort(key=lambda row: len(row[0]))
    right = 0
    for begin in range(0, len(spelt), batch):
        part = spelt[begin : begin + batch]
        full = [prompt + answer[:-1] for prompt, answer in part]
        width = max(map(len, full))
        tokens = torch.tensor([line + [2] * (width - len(line)) for line in full])
        best = model(input_ids=tokens).logits.argmax(-1)
        for row, (prompt, answer) in enumerate(part):
            right += best[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist() == answer
    return right / max(1, len(spelt))
