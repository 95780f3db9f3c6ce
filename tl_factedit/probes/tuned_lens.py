"""Tuned lens: the logit lens with an affine map for each layer, trained to say there what the model says at its end.

Belrose et al. 2023 (arXiv:2303.08112, sec. 2 and 3). After block l the stream h is read by the model's own head as::

    lens_l(h) = W_U · LN_f(h + A_l h + b_l),      A_l, b_l = argmin E[ KL(model's prediction || softmax lens_l(h)) ]

starting from A = 0, b = 0, which is the logit lens. After the last block that is the optimum already, so nothing is
trained there.

A lens that was trained on the unedited model and reads an edited one may find less merely because the edit turned the
stream: see `fixed_and_refitted`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model, centred, check_layer, model_name, n_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core import files
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.lens import read_objects
from tl_factedit.probes.lens_training import (
    LensTraining,
    descend,
    divergence,
    split_held_out,
    token_streams,
    translate,
    zero_translators,
)
from tl_factedit.probes.states import read_states
from tl_factedit.stats.streaming import Reader, check_amounts


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
class TunedLens:
    """Affine translators of a model's layers: a probe with the logit lens's quantities.

    A is ``matrix @ inner`` (``matrix`` alone at full rank). Called with (model, facts) it reads the model as it is,
    with the BOS policy it was trained with; `compare` reads an edited model in the same way, by this fixed lens.

    Attributes:
        layers: The blocks after which it reads, ascending.
        matrix: A, or its outer factor, [layer d_model rank].
        inner: The inner factor of A, [layer rank d_model]; None at full rank.
        bias: b, [layer d_model].
        kl_logit: KL divergence of the logit lens on held-out tokens, nats a token, [layer].
        kl: KL divergence of this lens on the same tokens.
        training: How it was trained.
        centred: Whether the model's stream was centred (``center_writing_weights``): of another stream it says nothing.
        n_tokens: Number of tokens it was trained on.
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
    centred: bool
    n_tokens: int
    corpus: str
    provenance: Provenance

    @plain_torch()
    def translate(self, stream: Float[Tensor, "*row layer d_model"]) -> Float[Tensor, "*row layer d_model"]:
        """Each layer's vector h as h + A h + b."""
        return translate(stream, self.matrix, self.inner, self.bias)

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read some facts; axes are fact, layer (after that block), position, quantity, as for `LogitLens`."""
        facts = as_facts(facts)
        bos = self.provenance.prepend_bos
        return read_objects(model, facts, self.streams(model, facts), self.layers, bos=bos, name="tuned lens")

    def streams(self, model: Model, facts: Sequence[Fact]) -> Iterator[Float[Tensor, "layer position d_model"]]:
        """The translated streams that the model's head reads, fact by fact.

        Raises:
            ValueError: The model has another width, depth or centring than the one it was trained on.
        """
        self.check(model)
        states = read_states(model, facts, prepend_bos=self.provenance.prepend_bos)
        kept = [states.layers.index(layer) for layer in self.layers]
        for of_fact in states.values[:, kept]:
            yield self.translate(of_fact.transpose(0, 1)).transpose(0, 1)

    @plain_torch()
    def divergence(self, model: Model, texts: Iterable[str], *, n_tokens: int = 2_000) -> Float[Tensor, "layer"]:
        """KL divergence of this lens at every layer on some texts, nats a token: how well it fits a model.

        Args:
            model: Any model of this width and depth, such as the edited one.
            texts: Any texts, preferably others than it was trained on.
            n_tokens: Most tokens to measure on.
        """
        self.check(model)
        check_amounts(texts, n_tokens, self.training.context)
        with frozen(model), torch.no_grad():
            runner = Runner(model)
            wanted = replace(self.training, n_tokens=n_tokens)
            streams = token_streams(runner, Reader(texts), self.provenance.prepend_bos, wanted, self.layers)
            return divergence(runner, torch.cat(streams), self.matrix, self.inner, self.bias)

    @plain_torch()
    def refitted(self, model: Model, texts: Iterable[str], *, progress: bool = True) -> TunedLens:
        """A lens trained in the same way, from zero, on another model or on this one as it is now.

        Args:
            model: The model to train it on.
            texts: The texts that this lens was trained on.
            progress: Whether to show a bar on what takes longer than a second.

        Raises:
            ValueError: These are other texts; or as in `train_tuned_lens`.
        """
        self.check(model)
        lens = train_tuned_lens(
            model,
            texts,
            **asdict(self.training),
            layers=self.layers,
            prepend_bos=self.provenance.prepend_bos,
            progress=progress,
        )
        if lens.corpus != self.corpus:
            raise ValueError(
                "the lens was trained on other texts than these: give the same ones from their beginning, as two "
                "lenses differ by their texts too"
            )
        return lens

    def check(self, model: Model) -> None:
        """Check that the lens fits a model: same width, depth and centring of the stream (weights may differ).

        Folded norms and a centred unembedding don't matter: they leave the stream and the probabilities as they are.

        Raises:
            ValueError: It doesn't fit.
        """
        given = (int(model.cfg.d_model), n_layers(model), centred(model))
        fits = (self.bias.shape[1], len(self.provenance.weights.w_out), self.centred)
        if given != fits:
            raise ValueError(
                f"the lens is of {self.provenance.model!r} (d_model {fits[0]}, {fits[1]} layers, centred stream: "
                f"{fits[2]}), but {model_name(model)!r} has d_model {given[0]}, {given[1]} layers, centred stream: "
                f"{given[2]} (center_writing_weights): train a lens on this model"
            )

    @plain_torch()
    def save(self, path: str | Path) -> None:
        """Write one file (safetensors)."""
        header = {
            "layers": list(self.layers),
            "training": asdict(self.training),
            "centred": self.centred,
            "n_tokens": self.n_tokens,
            "corpus": self.corpus,
            "provenance": self.provenance.to_json(),
        }
        tensors = {"matrix": self.matrix, "bias": self.bias, "kl_logit": self.kl_logit, "kl": self.kl}
        files.write(Path(path), "tuned lens", header, tensors | ({} if self.inner is None else {"inner": self.inner}))

    @classmethod
    @plain_torch()
    def load(cls, path: str | Path) -> TunedLens:
        """Back from `save`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or holds something else.
        """
        with files.opened(path, "tuned lens") as file:
            layers = tuple(file.fields("layers", int))
            file.sizes["layer"] = len(layers)
            training = file.made("training", LensTraining)
            low_rank = training.rank is not None
            if not low_rank and "inner" in file.tensors:
                raise ValueError("training.rank is None, and there is a tensor 'inner' of a lens of low rank")
            return cls(
                layers=layers,
                bias=file.tensor("bias", "layer d_model"),
                matrix=file.tensor("matrix", "layer d_model rank" if low_rank else "layer d_model d_model"),
                inner=file.tensor("inner", "layer rank d_model") if low_rank else None,
                kl_logit=file.tensor("kl_logit", "layer"),
                kl=file.tensor("kl", "layer"),
                training=training,
                centred=file.field("centred", bool),
                n_tokens=file.field("n_tokens", int),
                corpus=file.field("corpus", str),
                provenance=Provenance.from_json(file.field("provenance", dict)),
            )

    def __repr__(self) -> str:
        """Layers, tokens and the mean held-out KL divergence."""
        before, after = float(self.kl_logit.mean()), float(self.kl.mean())
        return (
            f"TunedLens({len(self.layers)} layers of {self.provenance.model!r}, {self.n_tokens:,} tokens, held-out KL "
            f"{before:.3f} → {after:.3f} nats)"
        )


@plain_torch()
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
    """Train a tuned lens: one pass over some texts for the states of all layers, then steps of Adam on these.

    The states are held in memory, in float32: n_tokens · (layers + 1) · d_model · 4 bytes. A step costs about three
    unembeddings of the batch per layer; on a CPU, with a large vocabulary, ask for few layers or steps. BOS tokens are
    left out: nothing is read there, and their streams are outliers.

    Args:
        model: The model, unedited; it is left as it is.
        texts: Any iterable of texts, read only as far as needed.
        n_tokens: Most tokens to take; a tenth of the pieces of text are held out from training.
        steps: Steps of Adam.
        lr: Learning rate at the first step; it falls linearly to zero.
        batch: Tokens in one step.
        layers: The blocks after which to read; None for all. The last one needs no training and gets none.
        rank: Rank of A, for a wide model (2 · rank · d_model parameters a layer instead of d_model²); None for full
            rank.
        context: Longest piece of text, in tokens with BOS.
        seed: Seed of the held-out pieces, of the order of tokens and of the initial factors.
        prepend_bos: Whether each piece of text begins with BOS, and each prompt when facts are read; None for the
            model's default.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The lens, with its KL divergence on held-out tokens and that of the logit lens, layer by layer.

    Raises:
        ValueError: No such layer, fewer than two pieces of text, or settings out of range.
        RuntimeError: Training diverged.

    Example:
        >>> lens = fe.probes.train_tuned_lens(model, texts)                      # doctest: +SKIP
        >>> fe.compare(lens, model, edit, facts).after.at(position="last", quantity="percentile_old")  # doctest: +SKIP
    """
    check_amounts(texts, n_tokens, context)
    training = LensTraining(n_tokens, steps, lr, batch, rank, context, seed)
    depth = n_layers(model)
    wanted = tuple(range(depth)) if layers is None else tuple(sorted({check_layer(model, layer) for layer in layers}))
    if not wanted:
        raise ValueError("layers is empty, needed at least one")
    provenance = Provenance.of(model, prepend_bos)
    reader = Reader(texts, model.tokenizer)
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        streams = token_streams(runner, reader, provenance.prepend_bos, training, wanted)
        learnt, held_out = split_held_out(streams, seed)
        # The last block's optimum is the identity; trained, Adam would make steps of rounding noise.
        n_trained = len([layer for layer in wanted if layer != depth - 1])
        matrix, inner, bias = zero_translators(len(wanted), learnt.shape[-1], rank, seed, learnt.device)
        zero = divergence(runner, held_out, matrix, inner, bias)
        parts = [part[:n_trained].clone() for part in (matrix, inner, bias) if part is not None]
        if n_trained:
            descend(runner, learnt, parts, training, progress)
        for whole, part in zip((part for part in (matrix, inner, bias) if part is not None), parts, strict=True):
            whole[:n_trained] = part
        after = divergence(runner, held_out, matrix, inner, bias)
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
        centred=centred(model),
        n_tokens=len(learnt),
        corpus=reader.digest,
        provenance=provenance.having_read(reader.brought_bos),
    )
