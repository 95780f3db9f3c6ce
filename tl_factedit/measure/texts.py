"""Plain text that has nothing to do with any fact, as it is run."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.core.kinds import as_several
from tl_factedit.core.tokens import check_length, encode


def encode_texts(model: Model, texts: Sequence[str], prepend_bos: bool) -> list[Int[Tensor, "_"]]:
    """Token ids of neutral texts.

    Raises:
        ValueError: No texts, one without a token to predict, or one longer than the model's context.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("texts is empty or a string, needed a list of texts")
    texts = as_several(texts, str, "texts", "a text")
    for i, text in enumerate(texts):
        room = getattr(model.cfg, "n_ctx", None)
        check_length(model.tokenizer, text, f"texts[{i}]", prepend_bos=prepend_bos, room=room)
    rows = [encode(model.tokenizer, text, prepend_bos=prepend_bos)[0] for text in texts]
    short = [text for text, row in zip(texts, rows, strict=True) if len(row) < 2]
    if short:
        raise ValueError(f"text {short[0]!r} has no token to predict, needed two tokens at least")
    return rows
