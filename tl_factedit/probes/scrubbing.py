"""Erasure comparators: what a model looks like with a relation's objects erased from a state, and placebos of that.

LEACE (Belrose et al. 2023, arXiv:2306.03819) is the least change of x, in mean square, after which no linear classifier
of the object beats a constant one, *on the rows it was fitted on*; with W = Σ_xx^(−1/2) and Z the one-hot object::

    r(x) = x − W⁺ P W (x − μ),    P the orthogonal projection on the columns of W Σ_xz

It needs as many directions as there are objects, less one. Not all that follows: other rows keep a little, a quadratic
classifier may keep much, and later layers may read the object anew from tokens that weren't erased. So it is fitted on
training subjects and tried on others, beside a random subspace of equal rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.hook_names import EMBED, resid_post, resid_pre
from tl_factedit.backend.hooking import hooked
from tl_factedit.backend.protocol import Hook, Model, bos_policy, check_layer, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, pad
from tl_factedit.editing.ledger import base_fingerprint

TOLERANCE = 1e-6
"""Singular values of W Σ_xz below this count as none: correlations, so whatever the scale of x."""

AT_ONCE = 256
"""Subjects spelt in one pass."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """An affine map that takes a subspace out: ``r(x) = x − (x − mean) @ right.T @ left.T``.

    Attributes:
        left: [d_model rank], float64.
        right: [rank d_model], float64.
        mean: [d_model], float64.
        n_train: Rows it was fitted on.
    """

    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "rank d_model"]
    mean: Float[Tensor, "d_model"]
    n_train: int

    @property
    def rank(self) -> int:
        """How many directions it takes."""
        return self.left.shape[1]

    def __call__(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The vectors without the subspace, in their own type."""
        wide = x.double()
        left, right, mean = (part.to(x.device) for part in (self.left, self.right, self.mean))
        return (wide - (wide - mean) @ right.T @ left.T).to(x.dtype)

    def size(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row"]:
        """What it does to each vector: ‖x − r(x)‖ / ‖x‖."""
        return (x.double() - self(x.double())).norm(dim=-1) / x.double().norm(dim=-1)


def leace(
    x: Float[Tensor, "row d_model"],
    y: Int[Tensor, "row"],
    n_classes: int,
    *,
    shrinkage: bool = True,
    tolerance: float = TOLERANCE,
) -> Eraser:
    """Fit LEACE, in float64, with the package concept-erasure.

    Args:
        x: States of the training facts at one layer and position.
        y: Their objects, 0 to ``n_classes - 1``.
        n_classes: How many objects there are.
        shrinkage: Whether to shrink Σ_xx towards a multiple of 1, for fewer rows than would do for it. The guarantee
            holds either way; what changes is how much else is taken.
        tolerance: Singular values of W Σ_xz that count as none.

    Raises:
        ModuleNotFoundError: concept-erasure isn't installed.
        ValueError: There are fewer than two rows.

    Note:
        The package's ``constrain_cov_trace`` is off: where it steps in, the mixture it takes no longer has
        Cov(r(x), z) = 0.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} rows, needed at least 2")
    fitter = _leace_fitter()
    one_hot = torch.nn.functional.one_hot(y, n_classes).double()
    options = {"shrinkage": shrinkage, "svd_tol": tolerance, "constrain_cov_trace": False}
    found = fitter.fit(x.double(), one_hot, **options).eraser
    taken = found.proj_left.norm(dim=0) > 0  # singular values below the tolerance leave columns of zeros
    return Eraser(found.proj_left[:, taken], found.proj_right[taken], found.bias, len(x))


def random_subspace(x: Float[Tensor, "row d_model"], rank: int, *, seed: int = 0) -> Eraser:
    """The placebo: as many directions as LEACE takes, but drawn at random in the whitened space.

    Args:
        x: The rows that LEACE was fitted on: they say what is white.
        rank: How many directions.
        seed: Of the draw.

    Raises:
        ValueError: More directions than the rows span.
    """
    mean = x.double().mean(0)
    apart = x.double() - mean
    values, vectors = torch.linalg.eigh(apart.T @ apart / max(1, len(x) - 1))
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    if rank > len(values):
        raise ValueError(f"rank {rank} is more than the {len(values)} directions that {len(x)} rows span")
    noise = torch.randn(len(values), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(noise).Q
    left = vectors @ (values.sqrt()[:, None] * basis)
    right = (basis.T / values.sqrt()) @ vectors.T
    return Eraser(left, right, mean, len(x))


@dataclass(frozen=True, eq=False)
class Erasure:
    """An eraser at work in a model: a change of its residual stream after one block; weights aren't touched.

    Laid over a model like an edit, ``with erasure.applied(model)``, and audited like one. Made by `erase_states`.

    Attributes:
        eraser: What is taken.
        layer: After which block; -1 for what enters the first.
        facts: Whom it was made for.
        everywhere: Whether it works at every token, and not only at the last one of these facts' subjects.
        spelt: Token embeddings of each way in which such a subject is spelt, by which it is found.
        provenance: Model, weights, BOS policy, versions.
    """

    eraser: Eraser
    layer: int
    facts: tuple[Fact, ...]
    everywhere: bool
    spelt: tuple[Float[Tensor, "_ d_model"], ...]
    provenance: Provenance

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer it changes."""
        return (self.layer,)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the erasure for the length of a ``with`` block.

        Inside it, a pass of your own that begins behind the embeddings (``start_at_layer``) raises a ValueError unless
        the erasure works everywhere: nobody can tell there where the subjects are.

        Raises:
            ValueError: The model has other weights than it was made for (edits of this package don't count).
        """
        now = base_fingerprint(model)
        if not self.provenance.weights.matches(now):
            raise ValueError(
                f"the erasure was made for weights {self.provenance.weights} of {self.provenance.model!r}, but "
                f"{model_name(model)} has weights {now}: apply it to the model it was made on"
            )
        place = _place(model, self.layer)
        if self.everywhere:
            hooks: list[Hook] = [(place, lambda value, hook: self.eraser(value))]
        else:
            finder = _Finder(self.spelt)
            hooks = [(EMBED, finder.look), (place, lambda value, hook: finder.change(value, self.eraser))]
        with hooked(model, hooks):
            yield model

    def __repr__(self) -> str:
        """What it takes, and where."""
        where = "every token" if self.everywhere else f"the last subject token of {len(self.facts)} facts"
        return f"Erasure({self.eraser.rank} of {len(self.eraser.mean)} directions after layer {self.layer}, at {where})"


def erase_states(
    model: Model,
    eraser: Eraser,
    layer: int,
    facts: Sequence[Fact],
    *,
    everywhere: bool = False,
    prepend_bos: bool | None = None,
) -> Erasure:
    """Put an eraser to work, at the last token of some facts' subjects.

    The subjects are found in whatever is run by their token embeddings, spelt as in the facts' prompts and in those of
    their paraphrases that are templates. Other spellings aren't found, nor are subjects whose embeddings are noised.

    Args:
        model: The model whose states it was fitted on.
        eraser: What to take.
        layer: After which block; -1 for what enters the first.
        facts: Whose subjects.
        everywhere: Work at every token of everything that is run instead, whosever it is.
        prepend_bos: BOS policy; None for the model's default.

    Raises:
        ValueError: No facts, no such layer, or another width than the model's.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if len(eraser.mean) != model.cfg.d_model:
        raise ValueError(f"the eraser is for {len(eraser.mean)} dimensions, the model has {model.cfg.d_model}")
    _place(model, layer)
    bos = bos_policy(model, prepend_bos)
    rows = [
        align(model.tokenizer, fact, prepend_bos=bos, template=template)
        for fact in facts
        for template in (fact.prompt, *(p for p in fact.paraphrases if "{}" in p))
    ]
    spelt = [torch.tensor(ids) for ids in sorted({tuple(row.ids[slice(*row.subject)].tolist()) for row in rows})]
    found: list[Tensor] = []
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for begin in range(0, len(spelt), AT_ONCE):
            ids = spelt[begin : begin + AT_ONCE]
            embedded = runner.capture(pad(ids, fill=0), [EMBED], stop=1)[EMBED]
            found += [each[: len(row)].clone() for each, row in zip(embedded, ids, strict=True)]
    provenance = Provenance.of(model, bos, weights=base_fingerprint(model))
    return Erasure(eraser, layer, tuple(facts), everywhere, tuple(found), provenance)


def _place(model: Model, layer: int) -> str:
    return resid_pre(0) if layer == -1 else resid_post(check_layer(model, layer))


class _Finder:
    """Finds sequences of tokens in a pass by their embeddings, which are looked up and so equal to the bit."""

    def __init__(self, spelt: Sequence[Float[Tensor, "_ d_model"]]) -> None:
        self.words: dict[bytes, int] = {}
        self.spelt = {tuple(self.words.setdefault(word, len(self.words)) for word in _words(each)) for each in spelt}
        self.seen: Tensor | None = None

    def look(self, value: Float[Tensor, "row pos d_model"], hook: Any = None) -> None:
        found = torch.zeros(value.shape[:2], dtype=torch.bool)
        lengths = {len(each) for each in self.spelt}
        for i, row in enumerate(value):
            ids = [self.words.get(word, -1) for word in _words(row)]
            for end in range(1, len(ids) + 1):
                found[i, end - 1] = any(tuple(ids[end - n : end]) in self.spelt for n in lengths if n <= end)
        self.seen = found

    def change(self, value: Float[Tensor, "row pos d_model"], eraser: Eraser) -> Float[Tensor, "row pos d_model"]:
        found, self.seen = self.seen, None
        if found is None or found.shape != value.shape[:2]:
            raise ValueError(
                "a pass begins behind the embeddings, so the subjects can't be found in it: run whole prompts, or "
                "erase at every token (everywhere=True)"
            )
        changed = value.clone()
        changed[found.to(value.device)] = eraser(value[found.to(value.device)])
        return changed


def _words(embedded: Float[Tensor, "pos d_model"]) -> Sequence[bytes]:
    flat = embedded.detach().cpu().contiguous().view(torch.uint8).reshape(len(embedded), -1)
    return [row.numpy().tobytes() for row in flat]


def _leace_fitter() -> Any:
    with warnings.catch_warnings():
        # It still scripts a class of its own with torch.jit, of which torch warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from concept_erasure import LeaceFitter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "LEACE needs the package concept-erasure: install it with: pip install 'tl-factedit[probes]'"
            ) from error
    return LeaceFitter
