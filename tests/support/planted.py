"""States in which the truth is known: Gaussian ones, and overrides planted into a model's states.

A probe, or a verdict, that is right about these may still be wrong about a model; one that is wrong here is wrong.

Gaussian states are ``x = a · m_z + noise`` with orthonormal m_z and white noise, for which the best possible reading is
known in closed form. A planted override makes of a fact's state one of an edited model:

retained
    the new object's part is laid over the state, and the old one's stays;
removed
    the state is another subject's, who has the new object: nothing of the old one is left, whatever reads it;
rotated
    the same, and the old object's part is added along directions in which nothing was read before. A probe trained
    before finds nothing; one trained on such states finds all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.probes.states import HiddenStates

Override = Literal["retained", "removed", "rotated"]


def gaussian_states(
    objects: Int[Tensor, "row"], n_classes: int, dim: int, signal: float, *, seed: int = 0
) -> Float[Tensor, "row dim"]:
    """``signal`` times the object's unit vector, plus white noise of variance 1, float64.

    Raises:
        ValueError: There are fewer dimensions than objects.
    """
    if dim < n_classes:
        raise ValueError(f"{dim} dimensions for {n_classes} objects, needed as many at least: each has one of its own")
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(objects), dim, dtype=torch.float64, generator=draw)
    return noise + signal * torch.nn.functional.one_hot(objects, dim)


def bayes_accuracy(signal: float, n_classes: int) -> float:
    """The best accuracy on `gaussian_states`, objects equally frequent: ∫ φ(u) Φ(u + a)^(K−1) du."""
    u = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * torch.special.ndtr(u + signal) ** (n_classes - 1), u))


def bayes_percentile(signal: float) -> float:
    """The percentile of the object among the others under the best reading of `gaussian_states`: Φ(a/√2)."""
    return float(torch.special.ndtr(torch.tensor(signal / math.sqrt(2), dtype=torch.float64)))


def class_means(
    x: Float[Tensor, "row *cell dim"], objects: Int[Tensor, "row"], n_classes: int
) -> Float[Tensor, "class *cell dim"]:
    """The mean state of each object."""
    total = torch.zeros(n_classes, *x.shape[1:], dtype=torch.float64).index_add_(0, objects, x.double())
    count = torch.bincount(objects, minlength=n_classes).double()
    return total / count.reshape(-1, *[1] * (x.ndim - 1))


def elsewhere(
    means: Float[Tensor, "class dim"], *, avoid: Float[Tensor, "dim direction"] | None = None, seed: int = 0
) -> Float[Tensor, "class dim"]:
    """The means about their centre, turned into a subspace that is orthogonal to theirs: same lengths, same angles.

    Args:
        means: Of the objects.
        avoid: Further directions to stay out of, such as a classifier's weights.
        seed: Of the subspace.

    Raises:
        ValueError: Not enough dimensions are left.
    """
    centred = means.double() - means.double().mean(0)
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-9 * values[0]
    taken = torch.cat([right[kept].T, torch.zeros(means.shape[1], 0) if avoid is None else avoid.double()], 1)
    found, sizes, _ = torch.linalg.svd(taken, full_matrices=True)
    used = int((sizes > 1e-9 * sizes[0]).sum())
    free, wanted = found[:, used:], int(kept.sum())
    if free.shape[1] < wanted:
        raise ValueError(f"{free.shape[1]} of {means.shape[1]} dimensions are left, needed {wanted} to turn into")
    noise = torch.randn(free.shape[1], wanted, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (left[:, kept] * values[kept]) @ (free @ torch.linalg.qr(noise).Q).T


def plant(
    override: Override,
    states: HiddenStates,
    donors: HiddenStates,
    *,
    objects: Sequence[str],
    avoid: Float[Tensor, "layer position d_model direction"] | None = None,
    rotation: int = 0,
    seed: int = 0,
) -> HiddenStates:
    """The states that some facts would have after an override of ``target_true`` by ``target_new``.

    Args:
        override: Which kind.
        states: Of the facts, before.
        donors: Of other subjects in the same model, before: who has what a fact is to have gives its states (drawn for
            each fact, all layers and positions of one subject), and their means by object say what an object's part is.
        objects: The relation's.
        avoid: For ``"rotated"``, directions to stay out of, such as a probe's weights.
        rotation: Seed of the new directions: the same for a population and for what calibrates it.
        seed: Of the draw of donors.

    Raises:
        ValueError: No donor has a fact's new object, or an object.
    """
    place = {name: i for i, name in enumerate(objects)}
    has = torch.tensor([place[fact.target_true] for fact in donors.facts])
    old = torch.tensor([place[fact.target_true] for fact in states.facts])
    new = torch.tensor([place[str(fact.target_new)] for fact in states.facts])
    short = [name for i, name in enumerate(objects) if not bool((has == i).any())]
    if short:
        raise ValueError(f"no donor has {short[0]!r}, needed one at least for every object: give more donors")
    means = class_means(donors.values, has, len(objects))
    if override == "retained":
        planted = states.values.double() + (means - means.mean(0))[new]
    elif override in ("removed", "rotated"):
        planted = donors.values.double()[_drawn(has, new, seed)]
        if override == "rotated":
            for i in range(len(states.layers)):
                for j in range(len(states.positions)):
                    out = None if avoid is None else avoid[i, j]
                    if bool((means[:, i, j] != means[0, i, j]).any()):
                        planted[:, i, j] += elsewhere(means[:, i, j], avoid=out, seed=rotation)[old]
    else:
        raise ValueError(f"override {override!r} is unknown, needed 'retained', 'removed' or 'rotated'")
    return replace(states, values=planted.float(), model=f"{states.model}, {override}")


def _drawn(has: Int[Tensor, "donor"], wanted: Int[Tensor, "fact"], seed: int) -> Int[Tensor, "fact"]:
    """For each fact a donor with what it wants, each as likely."""
    fits = (has == wanted[:, None]).double()
    return torch.multinomial(fits, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
