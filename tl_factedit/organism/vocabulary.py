"""The organism's words and its tokenizer."""

from __future__ import annotations

from typing import Any

from tl_factedit.organism.text import FILLERS, OPENINGS
from tl_factedit.organism.world import FIRST, IMPLIED, LAST, MIDDLE, RELATIONS, REVERSE, relation

SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")


def vocabulary() -> list[str]:
    """All words, special tokens first; a word's index is its token id."""
    known = [*RELATIONS, *(relation(name) for name in IMPLIED)]
    text = [*FIRST, *MIDDLE, *LAST]
    text += [word for r in known for words in (*r.phrasings, *r.objects) for word in words.split()]
    text += [word for _, _, function in IMPLIED.values() for word in function.split()]
    text += [word for line in (REVERSE, *FILLERS, *OPENINGS) for word in line.split()]
    return list(
        dict.fromkeys(
            [*SPECIAL, *(word for word in text if "{" not in word), *(r.name for r in RELATIONS), ".", ",", ":"]
        )
    )


def tokenizer() -> Any:
    """A fast tokenizer of transformers, made in memory: one token per word, and BOS in front."""
    import tokenizers as tk
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = tk.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    bos, eos, pad, unk = SPECIAL
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
    # Without these TransformerLens would load the tokenizer again from its path, to add a BOS.
    made.init_kwargs.update(name_or_path="organism", add_bos_token=True)
    return made


def word_ids() -> dict[str, int]:
    """The token id of each word."""
    return {word: i for i, word in enumerate(vocabulary())}
