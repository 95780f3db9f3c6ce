"""Linear probes on the organism, and readings with given scores: what several tests of probes share."""

import functools

import tiny
import torch

import tl_factedit as fe
from tl_factedit.core.facts import Fact
from tl_factedit.organism import world as organism
from tl_factedit.probes.linear import LinearProbe, ProbeReadout, fit_linear_probe
from tl_factedit.probes.percentile import candidate_percentiles
from tl_factedit.probes.states import HiddenStates, read_states

WEIGHTS = tiny.TWINS
CITIES = tuple(f" {city}" for city in organism.CITIES)


@functools.cache
def model(variant: str):
    return fe.models.organism(variant=variant, path=None if variant in ("base", "untrained") else WEIGHTS)


@functools.cache
def facts(people: str) -> tuple[Fact, ...]:
    return tuple(fe.models.organism_facts("city", people))


@functools.cache
def states(variant: str, people: str) -> HiddenStates:
    return read_states(model(variant), facts(people))


@functools.cache
def probe(variant: str) -> LinearProbe:
    """Trained on what a variant has of 600 people whom oracle0 leaves as they are."""
    return fit_linear_probe(states(variant, "calibration"), objects=CITIES)


@functools.cache
def read(variant: str, people: str = "oracle0") -> ProbeReadout:
    """By the variant's own probe."""
    return probe(variant).read(states(variant, people))


@functools.cache
def blank(layers: int, positions: int, k: int) -> LinearProbe:
    """Of the right shape."""
    objects = [f" o{i}" for i in range(k)]
    train = tuple(Fact(f"T{i}", "{} is", objects[i % k]) for i in range(2 * k))
    nothing = HiddenStates(
        torch.zeros(2 * k, layers, positions, 2), (*range(layers),), (*range(positions),), train, "nothing"
    )
    return fit_linear_probe(nothing, objects=objects)


def toy(scores: torch.Tensor, old: list[int], new: list[int | None] | None = None) -> ProbeReadout:
    """A reading with given scores, [fact layer position object]."""
    of = blank(*scores.shape[1:])
    news = [None] * len(scores) if new is None else new
    asked = tuple(
        Fact(f"X{i}", "{} is", of.objects[o], None if k is None else of.objects[k])
        for i, (o, k) in enumerate(zip(old, news, strict=True))
    )
    places = torch.tensor([-1 if k is None else k for k in news])
    table = candidate_percentiles(scores, places)
    mine = table.gather(-1, torch.tensor(old)[:, None, None, None].expand(*table.shape[:3], 1))[..., 0]
    return ProbeReadout(mine, scores, torch.tensor(old), places, "toy", asked, of)
