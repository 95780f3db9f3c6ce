"""What comes when a model is asked again and again: sampled answers, before and after a change.

Greedy decoding gives one answer. An old object that an edit put second is still said now and then, and somebody who
asks often enough gets it. So each prompt and paraphrase is answered many times, and it is counted how often the old
object is named, and in how many facts *ever*, beside how often other objects of the relation (`controls`) are: whoever
samples long enough hears any object.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from tl_factedit.backend.protocol import Model, device, told_where_it_is
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core import saved
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact, as_facts, need_old_object
from tl_factedit.core.kinds import as_finite, as_whole, check_flags
from tl_factedit.core.tokens import check_subject, encode
from tl_factedit.core.words import counted
from tl_factedit.evaluation.in_words import names_it, up_to_the_end
from tl_factedit.measure.change import Changed
from tl_factedit.measure.population import Population

if TYPE_CHECKING:
    import pandas as pd

Which = Literal["old", "new", "control"]


@dataclass(frozen=True, eq=False)
class Elicited:
    """The result of `elicit`.

    Attributes:
        facts: What was asked.
        prompts: Each fact's prompts: its own, and paraphrases.
        before: What the unedited model said, [fact][prompt][sample].
        after: What the changed one said.
        temperature: As sampled.
        top_k: As sampled; None for all tokens.
        n_tokens: Most tokens of an answer.
        seed: As sampled.
        provenance: Of the unedited model.
    """

    facts: tuple[Fact, ...]
    prompts: tuple[tuple[str, ...], ...]
    before: tuple[tuple[tuple[str, ...], ...], ...]
    after: tuple[tuple[tuple[str, ...], ...], ...]
    temperature: float
    top_k: int | None
    n_tokens: int
    seed: int
    provenance: Provenance

    @plain_torch()
    def share(self, of: Which = "old", *, ever: bool = False, before: bool = False) -> Estimate:
        """How often an object is named, over facts.

        Args:
            of: ``"old"``, ``"new"``, or ``"control"``: the mean over a fact's controls.
            ever: Whether any sample of a fact names it, in place of the share of samples that do.
            before: In the unedited model.

        Raises:
            ValueError: Another `of`.
        """
        if of not in get_args(Which):
            raise ValueError(f"of is {of!r}, needed one of {', '.join(map(repr, get_args(Which)))}")
        return over_facts([self._share(i, of, ever, before) for i in range(len(self.facts))])

    @plain_torch()
    def excess(self, *, ever: bool = False, before: bool = False) -> Estimate:
        """The old object minus its null, the controls, over the facts that have controls; as in `share`."""
        return over_facts(
            [
                self._share(i, "old", ever, before) - self._share(i, "control", ever, before)
                for i in range(len(self.facts))
            ],
            span=(-1.0, 1.0),
        )

    def _share(self, fact: int, of: Which, ever: bool, before: bool) -> float:
        asked = self.facts[fact]
        said = [text for samples in (self.before if before else self.after)[fact] for text in samples]
        objects = {"old": [asked.old], "new": [asked.target_new], "control": list(asked.controls)}[of]
        together = max if ever else _mean
        each = [together([float(names_it(text, obj.strip())) for text in said]) for obj in objects if obj is not None]
        return _mean(each) if each else math.nan

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a fact: the shares of its samples that name the old object, the new one and a control."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "fact": fact.name,
                    **{
                        f"{of}{'_before' if before else ''}": self._share(i, of, False, before)
                        for before in (True, False)
                        for of in get_args(Which)
                    },
                    "old_ever": self._share(i, "old", True, False) == 1.0,
                }
                for i, fact in enumerate(self.facts)
            ]
        )

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file.

        Raises:
            OSError: The file can't be written; what was there is as it was.
        """
        saved.save(self, path, "elicited")

    @classmethod
    def load(cls, path: str | Path) -> Elicited:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is cut short or changed, holds another kind of thing, or what it holds doesn't fit
                together; the message names it.
        """
        return saved.load(path, "elicited", cls)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return saved.as_plain(self, "elicited")

    def __repr__(self) -> str:
        """How often the old object comes, and in how many facts ever."""
        samples = len(self.after[0][0])
        lines = [f"Elicited({counted(len(self.facts), 'fact')}, {counted(samples, 'sample')} a prompt)"]
        for name, before in (("before", True), ("after", False)):
            old, ever, null = (
                self.share("old", before=before),
                self.share("old", ever=True, before=before),
                self.share("control", ever=True, before=before),
            )
            beside = f" (a control object in {null:.2f})" if null.n else " (no controls: no null)"
            lines.append(
                f"  {name}: the old object in {old:.2f} of the samples, ever in {ever:.2f} of the facts{beside}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The lines, and the table."""
        import html

        return f"<pre>{html.escape(repr(self))}</pre>" + str(
            self.table().to_html(float_format="{:.2f}".format, index=False)
        )


@plain_torch()
def elicit(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    samples: int = 20,
    paraphrases: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    n_tokens: int = 10,
    seed: int = 0,
    prepend_bos: bool | None = None,
    folder: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Elicited:
    """Answer each fact's prompt and paraphrases many times, before and after a change.

    The samples of a prompt depend on the model, the prompt and the seed alone, not on what else is asked.

    Args:
        model: The unedited model.
        changed: A change of it, a list with one for each fact, or the model as it was changed in any other way.
        facts: What to ask; `Fact.controls` are the null.
        samples: How many answers to each prompt.
        paraphrases: How many of each fact's paraphrases are asked beside its prompt; None for all.
        temperature: What logits are divided by.
        top_k: Only so many likeliest tokens are drawn from; None for all.
        n_tokens: Most tokens of an answer; it ends before, at the end of the text or a line break.
        seed: Of the samples.
        prepend_bos: BOS policy of a model changed in another way; None for its default. An edit has its own.
        folder: Where to keep what was said: a call that was killed goes on there.
        force: Whether to ask about facts that a single change wasn't made for.
        progress: Whether to show a bar on what takes longer than a second.

    Raises:
        ValueError: Numbers below 1, a temperature that isn't above 0, a fact without ``target_true``, a text that with
            its answer is longer than the model's context; and as `Population.of`.

    Example:
        >>> fe.evaluation.elicit(model, edit, facts).excess(ever=True)            # doctest: +SKIP
    """
    facts = as_facts(facts)
    need_old_object(facts, "elicit")
    check_flags(force=force, progress=progress)
    as_whole(seed, "seed", least=None)
    for name, value in (("samples", samples), ("n_tokens", n_tokens)):
        as_whole(value, name)
    if top_k is not None:
        as_whole(top_k, "top_k")
    if paraphrases is not None:
        as_whole(paraphrases, "paraphrases", least=0)
    if not as_finite(temperature, "temperature") > 0:
        raise ValueError(f"temperature is {temperature}, needed a number above 0")
    population = Population.of(
        model, changed, facts, prepend_bos=prepend_bos, folder=folder, force=force, progress=progress
    )
    prompts = tuple((fact.text, *map(fact.fill, fact.paraphrases[:paraphrases])) for fact in facts)
    room = getattr(model.cfg, "n_ctx", None)
    ids: dict[str, Tensor] = {}
    for fact, texts in zip(facts, prompts, strict=True):
        check_subject(model.tokenizer, fact)
        for text in texts:
            ids[text] = encode(model.tokenizer, text, prepend_bos=population.prepend_bos)[0]
            if room is not None and len(ids[text]) + n_tokens > room:
                raise ValueError(
                    f"{text!r} has {len(ids[text])} tokens, which with an answer of {n_tokens} are more than the "
                    f"{room} that the model reads: take a smaller n_tokens"
                )

    def read(runner: Runner, indices: tuple[int, ...]) -> list[list[list[str]]]:
        return [
            [sampled(runner.model, ids[text], samples, n_tokens, temperature, top_k, seed) for text in prompts[i]]
            for i in indices
        ]

    settings = (samples, paraphrases, temperature, top_k, n_tokens, seed)
    before = population.unedited("elicit", read, settings=settings)
    after: list[Any] = [None] * len(facts)
    for part, found in population.each("elicit", read, settings=settings):
        for i, said in zip(part.indices, found, strict=True):
            after[i] = said
    return Elicited(
        facts,
        prompts,
        _frozen(before),
        _frozen(after),
        float(temperature),
        top_k,
        n_tokens,
        seed,
        Provenance.of(model, population.prepend_bos),
    )


def sampled(
    model: Model, ids: Int[Tensor, "pos"], samples: int, n_tokens: int, temperature: float, top_k: int | None, seed: int
) -> list[str]:
    """Several answers to one prompt; the state of torch's own draws is as before afterwards."""
    own = hashlib.sha256(repr((seed, ids.tolist())).encode()).digest()
    where = device(model)
    forked = [where] if where.type == "cuda" else []
    with told_where_it_is(model), warnings.catch_warnings(), torch.random.fork_rng(devices=forked):
        warnings.simplefilter("ignore", FutureWarning)  # what TransformerLens' generate asks of transformers
        torch.manual_seed(int.from_bytes(own[:8], "little") % 2**63)
        told: Any = model.generate(
            ids.to(where).expand(samples, -1),
            max_new_tokens=n_tokens,
            stop_at_eos=False,
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
    return [up_to_the_end(model.tokenizer, row, "") for row in told[:, len(ids) :].tolist()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _frozen(said: Sequence[Sequence[Sequence[str]]]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return tuple(tuple(map(tuple, of_fact)) for of_fact in said)
