"""Control tasks: how well the same probe learns labels that mean nothing (Hewitt and Liang 2019, arXiv:1909.03368)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.linear import LinearProbe, fit_linear_probe
from tl_factedit.probes.states import HiddenStates


@dataclass(frozen=True, eq=False)
class ControlTask:
    """How well a probe and its control learn; all [layer position].

    Attributes:
        accuracy: Accuracy of the probe of objects, on subjects that it wasn't trained on.
        control: Accuracy of the probe of random labels, on the same subjects. Nothing that other subjects teach helps
            there, so this is at chance unless names or positions leak.
        selectivity: The first minus the second, paired by fact.
        memorised: Accuracy of the probe of random labels on its own training facts: how much it can learn by heart.
        fitted: Accuracy of the probe of objects on its own training facts.
    """

    accuracy: Estimates
    control: Estimates
    selectivity: Estimates
    memorised: Float[Tensor, "layer position"]
    fitted: Float[Tensor, "layer position"]


@plain_torch()
def control_task(
    probe: LinearProbe,
    train: HiddenStates,
    test: HiddenStates,
    *,
    train_objects: Sequence[str] | None = None,
    test_objects: Sequence[str] | None = None,
    classifier: LinearClassifier | None = None,
    seed: int = 0,
) -> ControlTask:
    """Fit the probe's classifier once more, on labels shuffled among the training subjects.

    Args:
        probe: The probe of objects.
        train: The states it was trained on.
        test: States of other subjects; their control labels are drawn from the shuffled ones.
        train_objects: Objects of the training facts; None for each fact's ``target_true``.
        test_objects: Objects of the other facts; None for each fact's ``target_true``.
        classifier: How the probe was fitted; None for the defaults.
        seed: Seed of the shuffle.
    """
    draw = torch.Generator().manual_seed(seed)
    own = [f.old for f in train.facts] if train_objects is None else list(train_objects)
    true = [f.old for f in test.facts] if test_objects is None else list(test_objects)
    # One label a subject, with the marginal of the objects over subjects.
    of_subject = {fact.subject: name for fact, name in zip(train.facts, own, strict=True)}
    names = list(of_subject.values())
    random = dict(zip(of_subject, (names[i] for i in torch.randperm(len(names), generator=draw)), strict=True))
    others = list(dict.fromkeys(fact.subject for fact in test.facts))
    drawn = torch.randint(len(names), (len(others),), generator=draw).tolist()
    random |= {subject: names[i] for subject, i in zip(others, drawn, strict=True)}
    labels = [random[fact.subject] for fact in train.facts]
    control = fit_linear_probe(train, labels, objects=probe.objects, classifier=classifier)

    def right(of: LinearProbe, states: HiddenStates, objects: Sequence[str]) -> Float[Tensor, "fact layer position"]:
        truth = torch.tensor([of.objects.index(name) for name in objects])
        return (of.scores(states, seen=True).argmax(-1) == truth[:, None, None]).double()

    found, by_chance = right(probe, test, true), right(control, test, [random[f.subject] for f in test.facts])
    return ControlTask(
        accuracy=over_facts_each(found),
        control=over_facts_each(by_chance),
        selectivity=over_facts_each(found - by_chance),
        memorised=right(control, train, labels).mean(0),
        fitted=right(probe, train, own).mean(0),
    )
