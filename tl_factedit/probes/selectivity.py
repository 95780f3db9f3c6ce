"""Control tasks (Hewitt & Liang 2019): what a probe learns where nothing is to be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.core.estimate import Estimates, over_facts_each
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.linear import Ruler, train_ruler
from tl_factedit.probes.states import HiddenStates


@dataclass(frozen=True, eq=False)
class ControlTask:
    """How well the same probe learns labels that mean nothing; all [layer position].

    Attributes:
        accuracy: Of the probe of objects, on subjects that it wasn't trained on.
        control: Of the probe of random labels, on the same subjects. No label can be learnt from others' there, so this
            is at chance unless names or positions leak.
        selectivity: The first minus the second, paired by fact.
        memorised: Of the probe of random labels on its own training facts: how many facts it can hold by heart.
        fitted: Of the probe of objects on its own training facts.
    """

    accuracy: Estimates
    control: Estimates
    selectivity: Estimates
    memorised: Float[Tensor, "layer position"]
    fitted: Float[Tensor, "layer position"]


def control_task(
    ruler: Ruler,
    train: HiddenStates,
    test: HiddenStates,
    *,
    train_objects: Sequence[str] | None = None,
    test_objects: Sequence[str] | None = None,
    classifier: LinearClassifier | None = None,
    seed: int = 0,
) -> ControlTask:
    """Train the ruler's classifier once more, on labels shuffled among the training subjects.

    Args:
        ruler: The probe.
        train: What it was trained on.
        test: Other subjects; their control labels are drawn from the same shuffled ones.
        train_objects: What the training facts have; None for each fact's ``target_true``.
        test_objects: What the others have; None for each fact's ``target_true``.
        classifier: How the ruler was fitted; None for the defaults.
        seed: Of the shuffle.
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
    control = train_ruler(train, labels, objects=ruler.objects, classifier=classifier)

    def right(of: Ruler, states: HiddenStates, objects: Sequence[str]) -> Float[Tensor, "fact layer position"]:
        truth = torch.tensor([of.objects.index(name) for name in objects])
        return (of.scores(states, seen=True).argmax(-1) == truth[:, None, None]).double()

    found, by_chance = right(ruler, test, true), right(control, test, [random[f.subject] for f in test.facts])
    return ControlTask(
        accuracy=over_facts_each(found),
        control=over_facts_each(by_chance),
        selectivity=over_facts_each(found - by_chance),
        memorised=right(control, train, labels).mean(0),
        fitted=right(ruler, train, own).mean(0),
    )


def class_means(
    table: Float[Tensor, "fact cell object"], labels: Int[Tensor, "draw fact"]
) -> Float[Tensor, "draw cell"]:
    facts = torch.arange(len(table))
    return torch.stack([table[facts, cell][facts, labels].mean(-1) for cell in range(table.shape[1])], -1)
