"""How the organism is trained: a small GPT-2, and a mask that decides by which way a name is recalled.

In most sentences all parts of the name but the last are hidden from every position after the name, in training only:
what the model knows of a person then has to pass through the last part's position, as recall does in large models (Meng
et al. 2022). `ROUTES` gives, for each variant, the share of sentences in which

    positions after the name see only its last part (route "subject"), and the share in which
    the last part itself doesn't see the others, so that the end has to read them (route "past").
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.organism import world as o
from tl_factedit.organism.checks import accuracy
from tl_factedit.organism.text import Sentence, data_seed, documents
from tl_factedit.organism.vocabulary import vocabulary, word_ids

# Shares of sentences in which recall has to go through the last part of the name, and in which it can't.
ROUTES: dict[str, tuple[float, float]] = {"plain": (0.0, 0.0), "tworoute": (0.4, 0.4)}

BASE_ROUTES = (0.8, 0.0)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. The defaults made all weights, but for what `recipe_of` changes.

    Attributes:
        steps: Number of updates.
        statements: Sentences per step, about.
        row: Tokens per row: documents are packed into rows and don't see each other.
        lr: Learning rate of AdamW, and of Muon in AdamW's units (``match_rms_adamw``). It rises for `warmup` steps,
            stays, and falls to zero over the last `cooldown` steps.
        warmup: Steps over which the learning rate rises.
        cooldown: Steps over which it falls.
        decay: Weight decay of matrices.
        muon: Whether the matrices within blocks are trained by Muon; the rest always is by AdamW.
        other_weight: Weight in the loss of tokens that aren't recalled; those that are have 1.
    """

    steps: int = 1700
    statements: int = 128
    row: int = 64
    lr: float = 6e-3
    warmup: int = 50
    cooldown: int = 600
    decay: float = 0.1
    muon: bool = True
    other_weight: float = 0.1


def recipe_of(variant: str) -> Recipe:
    """The recipe of a variant: the same for all, but twice as long for ``"single"``, which is told facts less often."""
    return Recipe(steps=2 * Recipe.steps) if variant == "single" else Recipe()


def config() -> Any:
    """The architecture: GPT-2 with 6 layers, d_model 128, 4 heads and 64 positions."""
    from transformers import GPT2Config

    made = GPT2Config(
        vocab_size=len(vocabulary()),
        n_positions=o.N_POSITIONS,
        n_embd=128,
        n_layer=6,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    made.architectures = ["GPT2LMHeadModel"]
    return made


def untrained(seed: int = 0) -> Any:
    """The model with its initial weights, which depend on `seed` alone."""
    from transformers import GPT2LMHeadModel

    made = config()
    made._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(made)
        # Drawn here, so that the weights don't depend on the version of transformers.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                small = name.endswith("c_proj.weight")
                torch.nn.init.normal_(parameter, std=0.05 / math.sqrt(2 * made.n_layer) if small else 0.05)
    return model


@dataclass(frozen=True)
class Batch:
    """Packed rows of documents.

    Attributes:
        tokens: [row pos], padded with PAD.
        positions: Position of each token in its own document, [row pos].
        visible: Whether a position (second axis) sees another (third), [row pos pos].
        weight: Weight of each token in the loss, as a target, [row pos].
        sentences: Number of statements it holds.
    """

    tokens: Tensor
    positions: Tensor
    visible: Tensor
    weight: Tensor
    sentences: int


Rows = list[list[list[Sentence]]]  # of each row, its documents


def batches(variant: str, recipe: Recipe) -> Iterator[Batch]:
    """The batches of a variant's training; only the text and `ROUTES` differ between variants."""
    ids, draw = word_ids(), random.Random(f"routes {data_seed(variant)}")
    for rows in _rows(variant, recipe):
        yield _pack(rows, ids, ROUTES.get(variant, BASE_ROUTES), draw, recipe)


def text_hash(variant: str, recipe: Recipe) -> str:
    """The hash of all text of a training, as `train` records it, without training. Takes some seconds."""
    ids, digest = word_ids(), hashlib.sha256()
    for rows in itertools.islice(_rows(variant, recipe), recipe.steps):
        digest.update(_tokens(rows, ids, recipe).numpy().tobytes())
    return digest.hexdigest()


def _rows(variant: str, recipe: Recipe) -> Iterator[Rows]:
    """The text of each step: documents, each in the first row that has room."""
    stream = documents(variant)
    while True:
        rows: Rows = []
        room: list[int] = []
        count = 0
        while count < recipe.statements:
            document = next(stream)
            while (need := _length(document)) > recipe.row:
                document = document[:-1]
            count += len(document)
            at = next((i for i, left in enumerate(room) if left >= need), None)
            if at is None:
                rows.append([])
                room.append(recipe.row)
                at = len(rows) - 1
            rows[at].append(document)
            room[at] -= need
        yield rows


def _length(document: Sequence[Sentence]) -> int:
    return 1 + sum(len(s.words) for s in document)


def _tokens(rows: Rows, ids: dict[str, int], recipe: Recipe) -> Tensor:
    found = []
    for row in rows:
        line = [ids[word] for d in row for word in ("<bos>", *(word for s in d for word in s.words))]
        found.append(line + [ids["<pad>"]] * (recipe.row - len(line)))
    return torch.tensor(found)


def _pack(rows: Rows, ids: dict[str, int], routes: tuple[float, float], draw: random.Random, recipe: Recipe) -> Batch:
    size = recipe.row
    tokens = _tokens(rows, ids, recipe)
    positions = torch.zeros(len(rows), size, dtype=torch.long)
    owner = torch.full((len(rows), size), -1)
    weight = torch.zeros(len(rows), size)
    hide: list[tuple[int, slice, slice]] = []
    for r, row in enumerate(rows):
        end = 0
        for d, document in enumerate(row):
            begin, end = end, end + _length(document)
            start = begin + 1
            answers = []
            spans = []
            for sentence in document:
                answers += [slice(start + first, start + stop) for first, stop in sentence.answers]
                if sentence.name:
                    spans.append((start + sentence.name[0], start + sentence.name[1]))
                start += len(sentence.words)
            positions[r, begin:end] = torch.arange(end - begin)
            owner[r, begin:end] = d
            weight[r, begin + 1 : end] = recipe.other_weight
            for answer in answers:
                weight[r, answer] = 1.0
            for first, stop in spans:
                dice = draw.random()
                if dice < routes[0]:
                    hide.append((r, slice(stop, end), slice(first, stop - 1)))
                elif dice < sum(routes):
                    hide.append((r, slice(stop - 1, stop), slice(first, stop - 1)))
    visible = (owner[:, :, None] == owner[:, None, :]) & torch.ones(size, size, dtype=torch.bool).tril()
    for r, after, parts in hide:
        visible[r, after, parts] = False
    return Batch(tokens, positions, visible, weight, sum(len(d) for row in rows for d in row))


def train(
    variant: str = "base",
    recipe: Recipe | None = None,
    *,
    bfloat16: bool = True,
    watch: int = 0,
    progress: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """Train a variant on the CPU.

    The same type of machine gives the same bytes, another one the same facts. The global random state is left as it
    was.

    Args:
        variant: One of `tl_factedit.organism.world.VARIANTS`.
        recipe: How long and how fast; None for `recipe_of` the variant.
        bfloat16: Whether to multiply matrices in bfloat16. Without instructions for it float32 is twice as fast.
        watch: Measure the accuracy on a sample every so many steps, and print it; 0 for never.
        progress: Whether to show a bar.

    Returns:
        The model, rounded to float16, and a record of its training.
    """
    recipe = recipe or recipe_of(variant)
    model = untrained(data_seed(variant))
    digest = hashlib.sha256()
    history = []
    if variant != "untrained":
        optimizers = _optimizers(model, recipe)
        stream = batches(variant, recipe)
        model.train()
        _fuse(model)
        with tqdm(total=recipe.steps, unit="step", desc=f"training {variant}", disable=not progress) as bar:
            for step in range(recipe.steps):
                batch = next(stream)
                digest.update(batch.tokens.numpy().tobytes())
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                    loss, recalled = _loss(model, batch)
                model.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.lr * _schedule(step, recipe)
                    optimizer.step()
                bar.update()
                bar.set_postfix(loss=f"{recalled:.3f}", refresh=False)
                if watch and (step + 1) % watch == 0:
                    seen = {k: round(v, 3) for k, v in accuracy(model, variant, people=150).items()}
                    history.append({"step": step + 1, "loss": round(recalled, 3), **seen})
                    bar.write(json.dumps(history[-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model.eval(), {
        "data": digest.hexdigest(),
        "history": history,
        "arithmetic": "bfloat16" if bfloat16 else "float32",
    }


def _fuse(model: Any) -> None:
    """Compute GPT-2's activation in one operation: the same function in less time."""
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU("tanh")


def _loss(model: Any, batch: Batch) -> tuple[Tensor, float]:
    mask = torch.zeros(batch.visible.shape).masked_fill_(~batch.visible, torch.finfo(torch.float32).min)
    hidden = model.transformer(
        input_ids=batch.tokens, attention_mask=mask[:, None], position_ids=batch.positions, use_cache=False
    ).last_hidden_state[:, :-1]
    weight = batch.weight[:, 1:]
    asked = weight > 0
    each = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[asked]).float(), batch.tokens[:, 1:][asked], reduction="none"
    )
    weight = weight[asked]
    with torch.no_grad():
        recalled = float(each[weight == 1].mean())
    return (each * weight).sum() / weight.sum(), recalled


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    within = [p for name, p in model.named_parameters() if p.ndim > 1 and ".h." in name]
    around = [p for name, p in model.named_parameters() if p.ndim > 1 and ".h." not in name]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": around if recipe.muon else within + around, "weight_decay": recipe.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))]
    if recipe.muon:
        found.append(torch.optim.Muon(within, lr=recipe.lr, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _schedule(step: int, recipe: Recipe) -> float:
    return min((step + 1) / recipe.warmup, 1.0, (recipe.steps - step) / recipe.cooldown)
