"""Routes that a random model goes."""

import functools

import laws
import tiny
import torch

import tl_factedit as fe

CITIES = (" Paris", " Rome", " London", " Berlin", " Madrid", " Vienna")
LONG = (" the Prado Museum", " a famous city", " Paris", " the Louvre")
PROMPTS = ("The native language of {} is", "{} works near", "Where is {} ? In")
SUBJECTS = ("The Eiffel Tower", "Big Ben", "Anna")


@functools.cache
def shared(kind: str, seed: int = 0):
    return tiny.model(kind, "gpt2", seed=seed)


def fact(subject: str) -> fe.Fact:
    return laws.FACT.but(subject=subject, id=subject)


def said(model, prompt: str, offered) -> list[float]:
    """Log-probability of whole answers, one forward pass a token."""
    found = []
    for answer in offered:
        ids, total = model.to_tokens(prompt)[0].tolist(), 0.0
        for token in model.to_tokens(answer, prepend_bos=False)[0].tolist():
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=model.W_E.device))[0, -1]
            total += float(logits.float().log_softmax(-1)[token])
            ids.append(token)
        found.append(total)
    return found


def known(model, subject: str, prompt: str, offered=CITIES, **options) -> fe.Route:
    """A route that a random model goes: its old answer is what the model finds likeliest."""
    text = prompt.replace("{}", subject)
    scores = said(model, text, offered)
    old, new, *rest = sorted(offered, key=lambda answer: -scores[offered.index(answer)])
    return fe.Route(fact(subject), text, old, new, **{"controls": rest, **options})
