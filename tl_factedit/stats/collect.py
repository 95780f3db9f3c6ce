"""Collecting second moments of keys, all layers in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_factedit.backend.protocol import Model, as_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core import files
from tl_factedit.core.kinds import as_whole
from tl_factedit.core.telling import tell
from tl_factedit.stats.key_stats import KeyStats, write_stats_file
from tl_factedit.stats.resume import Draft, places_for, reuse_file, unfinished_path
from tl_factedit.stats.streaming import Reader, check_amounts, stream_keys
from tl_factedit.stats.sums import Sums, mirror_, where


@plain_torch()
def key_stats(
    model: Model,
    layers: int | Sequence[int],
    texts: Iterable[str],
    *,
    n_tokens: int = 100_000,
    path: str | Path | None = None,
    prepend_bos: bool | None = None,
    context: int = 256,
    batch_tokens: int = 4096,
    save_every: int = 25_000,
    progress: bool = True,
) -> dict[int, KeyStats]:
    """Collect the second moments of the keys of some layers, in one pass over some texts.

    Long texts are cut into pieces of `context` tokens, each with its own BOS if there is one. The
    keys of BOS are counted: every prompt has them, so an edit must spare them.

    With a `path` the sums so far are kept beside the final files (``….unfinished.safetensors``) until those are
    written. The same call with the same texts resumes there; what was counted already is read and hashed again,
    but not run. The result has the same bits as that of a collection that was never interrupted (in batches of the
    same size, on as many threads).

    Args:
        model: Either class; its weights as they are now.
        layers: The blocks; the forward stops at the last of them.
        texts: Any iterable of texts, read only as far as needed.
        n_tokens: How many tokens to count (fewer, with a warning, if the texts end before).
        path: Where to keep them: a ``.safetensors`` file for all layers, or a folder for one file
            a layer. What is there already is read instead, if it is the same collection.
        prepend_bos: Whether each piece begins with BOS; None for the model's default.
        context: Longest piece, in tokens with BOS.
        batch_tokens: Padded tokens in one forward pass.
        save_every: Tokens between two saves of the sums so far, if there is a `path`. A save writes 4 d_mlp² bytes a
            layer: let it be rarer where a model is wide and fast.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        Statistics by layer.

    Raises:
        ValueError: No such layer, no text, or the files at `path` are damaged or of another model, weights, dtype,
            revision, corpus, number of tokens, BOS policy or versions (they are left as they are).
        RuntimeError: The model overflows.

    Example:
        >>> stats = fe.key_stats(model, [8], texts, n_tokens=20_000)       # doctest: +SKIP
        >>> edit = fe.Rome(stats[8])(model, [fact])                        # doctest: +SKIP
        >>> fe.key_stats(model, [4, 8], texts, path="stats/")              # doctest: +SKIP
    """
    wanted = as_layers(layers)
    if not wanted:
        raise ValueError("layers is empty, needed at least one")
    sites = {layer: down_proj(model, layer) for layer in wanted}
    check_amounts(texts, n_tokens, context, batch_tokens)
    as_whole(save_every, "save_every", what="a whole number of tokens")
    provenance = Provenance.of(model, prepend_bos)
    asked = {"n_asked": n_tokens, "context": context}
    path = None if path is None else files.pinned(path)
    places = places_for(path, wanted)
    there = {file: held for file, held in places.items() if file.exists()}
    # A one-way iterator would be used up by checking what is there; a list or a corpus is simply read twice.
    texts, again = itertools.tee(texts) if there and iter(texts) is texts else (texts, texts)
    kept = reuse_file(there, again, provenance, asked)
    sites = {layer: site for layer, site in sites.items() if layer not in kept}
    draft = None if path is None else Draft(unfinished_path(path), asked, tuple(wanted), provenance)
    if not sites:
        if draft is not None:
            draft.drop_if_mine()
        return {layer: kept[layer] for layer in wanted}

    reader = Reader(texts, model.tokenizer)
    with tqdm(total=n_tokens, unit="token", desc="key statistics", delay=1, disable=not progress) as bar:
        sums = _collect(model, sites, reader, provenance, n_tokens, context, batch_tokens, draft, save_every, bar)
        if sums.counted < n_tokens:  # there is no more to come
            bar.total = sums.counted
            bar.set_postfix_str(f"the texts ended, {n_tokens:,} were asked for")
    provenance = provenance.having_read(reader.brought_bos)
    found = {
        layer: KeyStats(layer, mirror_(total).div_(sums.counted).cpu(), sums.counted, reader.digest, provenance)
        for layer, total in sums.totals.items()
    }
    for file, held in places.items():
        if file not in there:
            write_stats_file([found[layer] for layer in held], file, {**asked, "n_texts": reader.count})
    if draft is not None:
        draft.file.unlink(missing_ok=True)
    return {layer: {**kept, **found}[layer] for layer in wanted}


def _collect(
    model: Model,
    sites: Mapping[int, DownProj],
    reader: Reader,
    provenance: Provenance,
    n_tokens: int,
    context: int,
    batch_tokens: int,
    draft: Draft | None,
    save_every: int,
    bar: Any,
) -> Sums:
    """The sums over the texts, beginning with those in the draft; kept there on the way."""
    with frozen(model), torch.no_grad():
        # Made inside `frozen`: a caller's inference_mode would make tensors that can't be added to in it.
        runner, sums = Runner(model), Sums.zeros(sites, where(model))
        if draft is not None and draft.file.exists():
            sums = draft.read_into_(sums)
            reader.skip_to(sums.place, draft.file)
            bar.update(sums.counted)
        left = n_tokens - sums.counted
        for batch in stream_keys(runner, sites, reader, provenance.prepend_bos, context, left, batch_tokens):
            saved = sums.counted // save_every
            sums.add_(batch)
            bar.update(batch.n_tokens)
            if draft is not None and sums.counted // save_every > saved and sums.counted < n_tokens:
                draft.write(sums)
    if sums.counted == 0:
        raise ValueError("the texts hold no tokens: give some text")
    if sums.counted < n_tokens:
        tell(
            f"the texts ended after {sums.counted:,} of the {n_tokens:,} tokens that were asked for: give more text",
        )
    sums.check_finite()
    return sums
