"""What a change turned, and what it removed: a lens trained before the change beside one trained after it.

A lens trained on the unedited model may read less of an edited one merely because the edit turned the stream, with
everything still in it. So the same training is repeated on the edited model: what the refitted lens finds and the fixed
one doesn't was turned, not removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.states import Applicable
from tl_factedit.probes.tuned_lens import TunedLens

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class FixedAndRefitted:
    """What a fixed and a refitted lens read after a change, beside what was read before it.

    Attributes:
        before: Reading of the unchanged model, by its own lens.
        fixed: Reading of the changed model, by that same lens.
        refitted: Reading of the changed model, by a lens trained anew on it.
        lens: The lens trained on the unchanged model.
        refit: The lens trained on the changed one, in the same way on the same texts.
        kl_fixed: KL divergence of `lens` from the changed model's own predictions on those texts, nats a token,
            [layer]: where it is far above `kl_refitted`, the fixed lens doesn't fit this model.
        kl_refitted: The same of `refit`, on the same tokens.
    """

    before: Reading
    fixed: Reading
    refitted: Reading
    lens: TunedLens
    refit: TunedLens
    kl_fixed: Float[Tensor, "layer"]
    kl_refitted: Float[Tensor, "layer"]

    @plain_torch()
    def turned(self, quantity: str = "percentile_old") -> Float[Tensor, "fact layer position"]:
        """Refitted minus fixed: what only a new lens finds, as it was turned and not removed.

        A lower bound where the new lens hasn't converged as far as the old one had (`kl_refitted` above ``lens.kl``):
        both start from zero, and a stream that was turned is further from there.
        """
        return self.refitted.at(quantity=quantity) - self.fixed.at(quantity=quantity)

    @plain_torch()
    def lost(self, quantity: str = "percentile_old") -> Float[Tensor, "fact layer position"]:
        """Before minus refitted: what a new lens doesn't find either."""
        return self.before.at(quantity=quantity) - self.refitted.at(quantity=quantity)

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """All three readings side by side, one row a number."""
        table = self.before.table().rename(columns={"value": "before"})
        return table.assign(fixed=self.fixed.table()["value"], refitted=self.refitted.table()["value"])


@plain_torch()
def fixed_and_refitted(
    lens: TunedLens,
    model: Model,
    changed: Applicable | Model,
    facts: Sequence[Fact],
    texts: Sequence[str],
    *,
    progress: bool = True,
) -> FixedAndRefitted:
    """Read a changed model by the unchanged one's lens, and by one trained on it in the same way.

    Between separately trained models only the refitted reading means anything.

    Args:
        lens: The lens trained on `model`.
        model: The unchanged model.
        changed: An edit or another change of it (applied and taken back here), or the changed model itself.
        facts: What to read about.
        texts: The texts that `lens` was trained on.
        progress: Whether to show a bar on what takes longer than a second.

    Raises:
        ValueError: The lens was trained on other weights than the model's, or on other texts.
    """
    now = Provenance.of(model, lens.provenance.prepend_bos).weights
    if not lens.provenance.weights.matches(now):
        raise ValueError(
            f"the lens was trained on weights {lens.provenance.weights}, but the model has weights {now}: give the "
            "model that it was trained on, unedited"
        )
    before = lens(model, facts)

    def read(other: Model) -> FixedAndRefitted:
        fixed, refit = lens(other, facts), lens.refitted(other, texts, progress=progress)
        kl = [one.divergence(other, texts) for one in (lens, refit)]
        return FixedAndRefitted(before, fixed, refit(other, facts), lens, refit, *kl)

    if isinstance(changed, Applicable):
        with changed.applied(model):
            return read(model)
    return read(changed)
