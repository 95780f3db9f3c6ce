"""Tuned lens: the logit lens with an affine map for each layer, trained to say there what the model says at its end.

Belrose et al. 2023 (arXiv:2303.08112, sec. 2 and 3). After block l the stream h is read by the model's own head as::

    lens_l(h) = W_U · LN_f(h + A_l h + b_l),      A_l, b_l = argmin E[ KL(model's prediction || softmax lens_l(h)) ]

starting from A = 0, b = 0, which is the logit lens. After the last block that is the optimum already, so nothing is
trained there.

A lens is a *ruler*. Trained on the unedited model and laid on an edited one it may read less merely because the edit
turned the stream, with everything still in it. So the same training is repeated on the edited model: what falls under
the fixed ruler and not under the refitted one was turned, not removed (`fixed_and_refitted`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import resid_post
from tl_factedit.backend.protocol import Model, check_layer, device, layout, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core import files
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import pad
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.lens import read_objects, unembed
from tl_factedit.probes.states import Applicable, read_states
from tl_factedit.stats.streaming import Piece, Reader, check_amounts, pieces

if TYPE_CHECKING:
    import pandas as pd

AT_ONCE = 50_000_000
"""Most logits held at a time."""
HELD_OUT = 10
"""One in so many pieces of text is kept from training, to measure on."""


@dataclass(frozen=True)
class LensTraining:
    """How a lens was trained, so that another can be trained alike.

    Attributes:
        n_tokens: Most tokens to cache states of, held-out ones included; BOS doesn't count.
        steps: Of Adam, whose rate falls linearly to zero.
        lr: Its rate at first.
        batch: Tokens in one step, drawn without replacement until all were seen.
        rank: Of A; None for full.
        context: Longest piece of text, in tokens with BOS.
        seed: Of the held-out pieces, of the order of tokens and, with a rank, of the inner factor.
    """

    n_tokens: int = 20_000
    steps: int = 500
    lr: float = 1e-3
    batch: int = 256
    rank: int | None = None
    context: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("steps", "batch", "rank"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"{name} is {given}, needed at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}, needed more than 0")


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class TunedLens:
    """Affine translators of a model's layers, and a probe with the logit lens's quantities.

    A is ``matrix @ inner`` (``matrix`` alone at full rank). Called with (model, facts) it reads the model as it is,
    with the BOS policy it was trained with; `compare` reads an edited model so too, with this lens as the fixed ruler.

    Attributes:
        layers: The blocks after which it reads, ascending.
        matrix: [layer d_model rank].
        inner: [layer rank d_model]; None at full rank.
        bias: b, [layer d_model].
        kl_logit: KL of the logit lens on held-out tokens, nats a token, [layer].
        kl: KL of this lens on them.
        training: How it was trained.
        n_tokens: On how many tokens.
        corpus: Hash of the texts that were read.
        provenance: Model, weights and BOS policy it was trained with.
    """

    layers: tuple[int, ...]
    matrix: Float[Tensor, "layer d_model rank"]
    inner: Float[Tensor, "layer rank d_model"] | None
    bias: Float[Tensor, "layer d_model"]
    kl_logit: Float[Tensor, "layer"]
    kl: Float[Tensor, "layer"]
    training: LensTraining
    n_tokens: int
    corpus: str
    provenance: Provenance

    def translate(self, stream: Float[Tensor, "*row layer d_model"]) -> Float[Tensor, "*row layer d_model"]:
        """One vector of each layer as h + A h + b."""
        return _translated(stream, self.matrix, self.inner, self.bias)

    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read; axes are fact, layer (after that block), position, quantity, as for `LogitLens`."""
        facts = as_facts(facts)
        bos = self.provenance.prepend_bos
        return read_objects(model, facts, self.streams(model, facts), self.layers, bos=bos, name="tuned lens")

    def streams(self, model: Model, facts: Sequence[Fact]) -> Iterator[Float[Tensor, "layer position d_model"]]:
        """What it gives the model's head to read, fact by fact.

        Raises:
            ValueError: The model has another width, depth or weight processing than the one it was trained on.
        """
        self.check(model)
        states = read_states(model, facts, prepend_bos=self.provenance.prepend_bos)
        kept = [states.layers.index(layer) for layer in self.layers]
        for each in states.values[:, kept]:
            yield self.translate(each.transpose(0, 1)).transpose(0, 1)

    def divergence(self, model: Model, texts: Iterable[str], *, n_tokens: int = 2_000) -> Float[Tensor, "layer"]:
        """KL of this lens at every layer on some texts, nats a token: how well the ruler fits a model.

        Args:
            model: Any model of this width and depth, such as the edited one.
            texts: Better others than it was trained on.
            n_tokens: How many tokens to measure on at most.
        """
        self.check(model)
        check_amounts(texts, n_tokens, self.training.context)
        with frozen(model), torch.no_grad():
            runner = Runner(model)
            asked = replace(self.training, n_tokens=n_tokens)
            streams = _streams(runner, Reader(texts), self.provenance.prepend_bos, asked, self.layers)
            return _divergence(runner, torch.cat(streams), self.matrix, self.inner, self.bias)

    def refitted(self, model: Model, texts: Iterable[str], *, progress: bool = True) -> TunedLens:
        """A lens trained in the same way, from zero, on another model or on this one as it is now.

        Raises:
            ValueError: These are other texts; or as in `train_tuned_lens`.
        """
        self.check(model)
        found = train_tuned_lens(
            model,
            texts,
            **asdict(self.training),
            layers=self.layers,
            prepend_bos=self.provenance.prepend_bos,
            progress=progress,
        )
        if found.corpus != self.corpus:
            raise ValueError(
                "the lens was trained on other texts than these: give the same ones from their beginning, as two "
                "rulers differ by their texts too"
            )
        return found

    def check(self, model: Model) -> None:
        """See that the lens fits a model: same width, depth and weight processing (weights may differ).

        Raises:
            ValueError: It doesn't.
        """
        width, depth = int(model.cfg.d_model), len(self.provenance.weights.w_out)
        theirs = (width, len(model.blocks), layout(model).endswith("+compat"))  # type: ignore[attr-defined]
        mine = (self.bias.shape[1], depth, self.provenance.weights.layout.endswith("+compat"))
        if theirs != mine:
            raise ValueError(
                f"the lens is of {self.provenance.model!r} (d_model {mine[0]}, {mine[1]} layers, processed weights: "
                f"{mine[2]}), but {model_name(model)!r} has d_model {theirs[0]}, {theirs[1]} layers, processed "
                f"weights: {theirs[2]}: train a lens on this model"
            )

    def save(self, path: str | Path) -> None:
        """Write one file (safetensors)."""
        header = {
            "layers": list(self.layers),
            "training": asdict(self.training),
            "n_tokens": self.n_tokens,
            "corpus": self.corpus,
            "provenance": self.provenance.to_json(),
        }
        tensors = {"matrix": self.matrix, "bias": self.bias, "kl_logit": self.kl_logit, "kl": self.kl}
        files.write(Path(path), "tuned lens", header, tensors | ({} if self.inner is None else {"inner": self.inner}))

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Back from `save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is damaged, or holds something else.
        """
        with files.opened(path, "tuned lens") as file:
            layers = tuple(file.fields("layers", int))
            file.sizes["layer"] = len(layers)
            low_rank = "inner" in file.tensors
            return cls(
                layers=layers,
                bias=file.tensor("bias", "layer d_model"),
                matrix=file.tensor("matrix", "layer d_model rank" if low_rank else "layer d_model d_model"),
                inner=file.tensor("inner", "layer rank d_model") if low_rank else None,
                kl_logit=file.tensor("kl_logit", "layer"),
                kl=file.tensor("kl", "layer"),
                training=LensTraining(**file.field("training", dict)),
                n_tokens=file.field("n_tokens", int),
                corpus=file.field("corpus", str),
                provenance=Provenance.from_json(file.field("provenance", dict)),
            )

    def __repr__(self) -> str:
        """Layers, tokens and the mean held-out KL."""
        before, after = float(self.kl_logit.mean()), float(self.kl.mean())
        return (
            f"TunedLens({len(self.layers)} layers of {self.provenance.model!r}, {self.n_tokens:,} tokens, held-out KL "
            f"{before:.3f} → {after:.3f} nats)"
        )


def train_tuned_lens(
    model: Model,
    texts: Iterable[str],
    *,
    n_tokens: int = 20_000,
    steps: int = 500,
    lr: float = 1e-3,
    batch: int = 256,
    layers: Sequence[int] | None = None,
    rank: int | None = None,
    context: int = 128,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> TunedLens:
    """Train a lens on some texts: one pass over them for the states of all layers, then steps on these.

    The states are held in memory, in float32: n_tokens · (layers + 1) · d_model · 4 bytes. A step costs about three
    unembeddings of the batch a layer; on a CPU, with a large vocabulary, ask for few layers or steps. BOS tokens are
    left out: nothing is read there, and their streams are outliers.

    Args:
        model: The model, unedited; it is left as it is.
        texts: Any iterable of texts, read only as far as needed.
        n_tokens: Most tokens to take, a tenth of the pieces of text held out from training.
        steps: Steps of Adam.
        lr: Its rate at first; it falls linearly to zero.
        batch: Tokens in one step.
        layers: After which blocks to read; None for all. The last one needs no training and gets none.
        rank: Of A, for a wide model (2 · rank · d_model parameters a layer instead of d_model²); None for full.
        context: Longest piece, in tokens with BOS.
        seed: Of the draws.
        prepend_bos: Whether each piece begins with BOS, and prompts do when facts are read; None for the model's
            default.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The lens, with the KL on held-out tokens of it and of the logit lens, layer by layer.

    Raises:
        ValueError: No such layer, less than two pieces of text, or settings that can't be.
        RuntimeError: Training diverged.

    Example:
        >>> lens = fe.probes.train_tuned_lens(model, texts)                      # doctest: +SKIP
        >>> fe.compare(lens, model, edit, facts).after.at(position="last", quantity="percentile_old")  # doctest: +SKIP
    """
    check_amounts(texts, n_tokens, context)
    training = LensTraining(n_tokens, steps, lr, batch, rank, context, seed)
    depth = len(model.blocks)  # type: ignore[attr-defined]
    wanted = tuple(range(depth)) if layers is None else tuple(sorted({check_layer(model, layer) for layer in layers}))
    if not wanted:
        raise ValueError("layers is empty, needed at least one")
    provenance = Provenance.of(model, prepend_bos)
    reader = Reader(texts)
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        streams = _streams(runner, reader, provenance.prepend_bos, training, wanted)
        learnt, held_out = _split(streams, seed)
        # The last block's optimum is the identity; trained, Adam would make steps of rounding noise.
        n_trained = len([layer for layer in wanted if layer != depth - 1])
        matrix, inner, bias = _start(len(wanted), learnt.shape[-1], rank, seed, learnt.device)
        zero = _divergence(runner, held_out, matrix, inner, bias)
        parts = [part[:n_trained].clone() for part in (matrix, inner, bias) if part is not None]
        if n_trained:
            _descend(runner, learnt, parts, training, progress)
        for whole, part in zip((part for part in (matrix, inner, bias) if part is not None), parts, strict=True):
            whole[:n_trained] = part
        after = _divergence(runner, held_out, matrix, inner, bias)
    if not bool(after.isfinite().all()):
        raise RuntimeError(f"training the lens diverged (KL {after.tolist()}): take a smaller lr than {lr}")
    return TunedLens(
        layers=wanted,
        matrix=matrix,
        inner=inner,
        bias=bias,
        kl_logit=zero,
        kl=after,
        training=training,
        n_tokens=len(learnt),
        corpus=reader.digest,
        provenance=provenance,
    )


# ---------------------------------------------------------------------------------------- fixed and refitted


@dataclass(frozen=True, eq=False)
class FixedAndRefitted:
    """What two rulers read after a change, beside what was read before it.

    Attributes:
        before: The unchanged model, by its own lens.
        fixed: The changed model, by that same lens.
        refitted: The changed model, by a lens trained anew on it.
        lens: Trained on the unchanged model.
        refit: Trained on the changed one, in the same way on the same texts.
        kl_fixed: KL of `lens` on the changed model's own predictions on those texts, nats a token, [layer]: where it is
            far above `kl_refitted`, the fixed ruler is none for this model.
        kl_refitted: KL of `refit`, on the same tokens.
    """

    before: Reading
    fixed: Reading
    refitted: Reading
    lens: TunedLens
    refit: TunedLens
    kl_fixed: Float[Tensor, "layer"]
    kl_refitted: Float[Tensor, "layer"]

    def turned(self, quantity: str = "percentile_old") -> Float[Tensor, "fact layer position"]:
        """Refitted minus fixed: what only a new ruler finds, as it was turned and not removed.

        A lower bound where the new ruler hasn't come as far as the old one had (`kl_refitted` above ``lens.kl``): both
        start from zero, and a stream that was turned is further from there.
        """
        return self.refitted.at(quantity=quantity) - self.fixed.at(quantity=quantity)

    def lost(self, quantity: str = "percentile_old") -> Float[Tensor, "fact layer position"]:
        """Before minus refitted: what a new ruler doesn't find either."""
        return self.before.at(quantity=quantity) - self.refitted.at(quantity=quantity)

    def table(self) -> pd.DataFrame:
        """All three readings side by side, one row a number."""
        table = self.before.table().rename(columns={"value": "before"})
        return table.assign(fixed=self.fixed.table()["value"], refitted=self.refitted.table()["value"])


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
        lens: Trained on `model`.
        model: The unchanged model.
        changed: An edit or another change of it (applied and taken back here), or the changed model itself.
        facts: What to read about.
        texts: Those that `lens` was trained on.
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
        kl = [each.divergence(other, texts) for each in (lens, refit)]
        return FixedAndRefitted(before, fixed, refit(other, facts), lens, refit, *kl)

    if isinstance(changed, Applicable):
        with changed.applied(model):
            return read(model)
    return read(changed)


# ---------------------------------------------------------------------------------------- reading


# ---------------------------------------------------------------------------------------- training


def _translated(stream: Tensor, matrix: Tensor, inner: Tensor | None, bias: Tensor) -> Tensor:
    stream = stream.to(bias)
    within = stream if inner is None else torch.einsum("...ld,lrd->...lr", stream, inner)
    return stream + torch.einsum("...lr,ldr->...ld", within, matrix) + bias


def _start(
    n_layers: int, width: int, rank: int | None, seed: int, where: torch.device
) -> tuple[
    Float[Tensor, "layer d_model rank"], Float[Tensor, "layer rank d_model"] | None, Float[Tensor, "layer d_model"]
]:
    """Translators that do nothing; of a product only one factor is zero, or neither would ever move."""
    inner = None
    if rank is not None:
        draw = torch.randn(n_layers, rank, width, generator=torch.Generator().manual_seed(seed))
        inner = (draw / math.sqrt(width)).to(where)
    matrix = torch.zeros(n_layers, width, width if rank is None else rank, device=where)
    return matrix, inner, torch.zeros(n_layers, width, device=where)


def _streams(
    runner: Runner, reader: Reader, bos: bool, training: LensTraining, layers: Sequence[int], batch_tokens: int = 4096
) -> list[Float[Tensor, "token column d_model"]]:
    """The streams after some blocks and, as the last column, after the last one; piece by piece, without BOS."""
    names = [resid_post(layer) for layer in (*layers, runner.n_layers - 1)]
    found: list[Tensor] = []
    missing = training.n_tokens

    def run(rows: Sequence[Piece]) -> None:
        caught = runner.capture(pad([piece.ids for piece in rows], fill=0), list(dict.fromkeys(names)))
        stacked = torch.stack([caught[name] for name in names], 2).float().cpu()
        found.extend(each[int(bos) : len(piece.ids)] for each, piece in zip(stacked, rows, strict=True))

    waiting: list[Piece] = []
    for piece in pieces(runner.model, reader, bos, training.context):
        ids = piece.ids[: missing + bos]
        if waiting and max(len(ids), *(len(each.ids) for each in waiting)) * (len(waiting) + 1) > batch_tokens:
            run(waiting)
            waiting = []
        waiting.append(replace(piece, ids=ids))
        missing -= len(ids) - bos
        if missing <= 0:
            break
    if waiting:
        run(waiting)
    if not found:
        raise ValueError("the texts hold no tokens: give some text")
    return found


def _split(
    streams: Sequence[Float[Tensor, "_ column d_model"]], seed: int
) -> tuple[Float[Tensor, "token column d_model"], Float[Tensor, "held column d_model"]]:
    """Tokens to learn from and tokens to measure on, of different pieces of text."""
    if len(streams) < 2:
        raise ValueError(
            f"the texts hold {len(streams)} piece of text within n_tokens, needed at least 2: one is held out. Give "
            "more texts, a larger n_tokens or a smaller context"
        )
    order = torch.randperm(len(streams), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(1, len(streams) // HELD_OUT)])
    learnt = torch.cat([each for i, each in enumerate(streams) if i not in held])
    return learnt, torch.cat([streams[i] for i in sorted(held)])


def _descend(
    runner: Runner,
    streams: Float[Tensor, "token column d_model"],
    parts: Sequence[Tensor],
    training: LensTraining,
    progress: bool,
) -> None:
    """Move the translators of the first layers, in place, down the KL. Layers don't see each other."""
    where = device(runner.model)
    for part in parts:
        part.data = part.data.to(where)
    matrix, *rest = parts
    inner, bias = rest[0] if len(rest) == 2 else None, rest[-1]
    optimiser = torch.optim.Adam([part.requires_grad_(True) for part in parts], lr=training.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / training.steps)
    rows = _draws(len(streams), training)
    for _ in tqdm(range(training.steps), desc="tuned lens", unit="step", delay=1, disable=not progress):
        some = streams[next(rows)].to(where)
        final = unembed(runner, some[:, -1]).log_softmax(-1)
        optimiser.zero_grad()
        for layers in _layers_at_once(len(matrix), final.numel()):
            with torch.enable_grad():
                within = None if inner is None else inner[layers]
                moved = _translated(some[:, layers], matrix[layers], within, bias[layers])
                loss = _kl(final[:, None], unembed(runner, moved).log_softmax(-1)).mean(0).sum()
                loss.backward()
        optimiser.step()
        schedule.step()
    for part in parts:
        part.requires_grad_(False)
        part.data = part.data.cpu()


def _draws(count: int, training: LensTraining) -> Iterator[Int[Tensor, "row"]]:
    draw = torch.Generator().manual_seed(training.seed + 1)
    while True:
        yield from torch.randperm(count, generator=draw).split(min(training.batch, count))


def _layers_at_once(count: int, logits: int) -> list[slice]:
    size = max(1, AT_ONCE // max(1, logits))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _kl(log_p: Float[Tensor, "*#row vocab"], log_q: Float[Tensor, "*#row vocab"]) -> Float[Tensor, "*row"]:
    """KL(p || q) = Σ p (log p − log q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _divergence(
    runner: Runner, streams: Float[Tensor, "token column d_model"], matrix: Tensor, inner: Tensor | None, bias: Tensor
) -> Float[Tensor, "layer"]:
    """Mean KL of translators at every layer; the streams' last column is that of the last block."""
    total = torch.zeros(len(bias), dtype=torch.float64)
    for some in streams.split(256):
        final = unembed(runner, some[:, -1]).log_softmax(-1)
        for layers in _layers_at_once(len(bias), final.numel()):
            within = None if inner is None else inner[layers]
            moved = _translated(some[:, layers], matrix[layers], within, bias[layers])
            total[layers] += _kl(final[:, None], unembed(runner, moved).log_softmax(-1)).double().sum(0).cpu()
    return (total / len(streams)).float()
