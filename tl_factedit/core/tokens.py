"""From a fact's text to token ids: where the subject lies, and how its objects are spelt.

This is the off-by-one file. Positions are found by *character offsets* on the very ids that are
run (with their BOS), never by searching a separately tokenised string; a target's ids are what
the tokenizer makes of it *after its prompt*, never of the target alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tl_factedit.core.facts import Fact
from tl_factedit.core.spacing import ELISION, stripped
from tl_factedit.core.telling import tell

T = TypeVar("T")

HALF = "\ufffd"
"""What bytes that make no whole character are decoded to."""


@dataclass(frozen=True)
class Aligned:
    """A prompt as the model runs it.

    Attributes:
        text: The text, without BOS.
        ids: Token ids as run, BOS included if there is one.
        pieces: The same tokens as strings, for showing.
        subject: (start, stop) of the subject in `ids`; ``stop - 1`` is the last subject token.
        prepend_bos: Whether a BOS token stands in front.
        old_ids: The ids of ``target_true`` after this prompt, or None.
        new_ids: The ids of ``target_new`` after this prompt, or None.
        old_word: How many of `old_ids` it takes until a whole character that is no white space is said; 1 for most.
        new_word: The same of `new_ids`.
    """

    text: str
    ids: Int[Tensor, "pos"]
    pieces: tuple[str, ...]
    subject: tuple[int, int]
    prepend_bos: bool
    old_ids: Int[Tensor, "true"] | None
    new_ids: Int[Tensor, "new"] | None = None
    old_word: int = 1
    new_word: int = 1

    @property
    def true_ids(self) -> Int[Tensor, "true"]:
        """The ids of ``target_true``.

        Raises:
            ValueError: The fact has no old object.
        """
        if self.old_ids is None:
            raise ValueError(
                f"the fact of {self.text!r} has no target_true, and this call needs the old object: "
                "fact.but(target_true=...)"
            )
        return self.old_ids

    @property
    def last(self) -> int:
        """Position of the last subject token."""
        return self.subject[1] - 1

    @property
    def same_first_token(self) -> bool:
        """Whether both objects begin with the same token: comparisons of first tokens are void then."""
        return self.old_ids is not None and self.new_ids is not None and bool(self.old_ids[0] == self.new_ids[0])


def align(tokenizer: Any, fact: Fact, *, prepend_bos: bool, template: str | None = None, prefix: str = "") -> Aligned:
    """Tokenise a fact's prompt and find its subject.

    Args:
        tokenizer: The model's own (fast) tokenizer.
        fact: The fact.
        prepend_bos: Whether to put BOS in front.
        template: Another template with one ``"{}"`` to ask with; None for the fact's prompt.
        prefix: Text to put before the prompt (a context); of a chat prompt, before what the user says.

    Returns:
        The aligned prompt.

    Raises:
        ValueError: The subject doesn't begin or end on a token boundary here, or holds a control token or a word that
            the tokenizer doesn't know, the tokens don't spell the text, or an object isn't a continuation of the
            prompt's tokens or holds an unknown word.
    """
    template = fact.prompt if template is None else template
    if template.count("{}") != 1:
        raise ValueError(
            f'template {template!r} holds {template.count("{}")} "{{}}", needed exactly one: '
            'put "{}" where the subject goes'
        )
    _check_control(tokenizer, fact.subject, "subject")
    before, after = template.split("{}")
    if prefix:
        header = _header(tokenizer, before)
        before = before[:header] + prefix + before[header:]
    text, begin = before + fact.subject + after, len(before)
    ids, offsets = encode(tokenizer, text, prepend_bos=prepend_bos)
    check_spelling(tokenizer, ids, text)
    pieces = spell(tokenizer, ids)

    def target(given: str | None) -> Int[Tensor, "target"] | None:
        if given is not None and template != fact.prompt:
            given = fact.after(fact.fill(template), given)
        return None if given is None else continuation(tokenizer, text, given, prepend_bos=prepend_bos)

    start, stop = find_span(text, offsets, begin, begin + len(fact.subject), pieces, fact.subject)
    check_known(tokenizer, ids[start:stop], f"subject {fact.subject!r}")
    _tell_unknown(tokenizer, ids, text)
    old_ids, new_ids = target(fact.target_true), target(fact.target_new)
    return Aligned(
        text=text,
        ids=ids,
        pieces=pieces,
        subject=(start, stop),
        prepend_bos=prepend_bos,
        old_ids=old_ids,
        new_ids=new_ids,
        old_word=1 if old_ids is None else up_to_a_word(tokenizer, old_ids),
        new_word=1 if new_ids is None else up_to_a_word(tokenizer, new_ids),
    )


def align_all(
    tokenizer: Any,
    facts: Iterable[Fact],
    *,
    prepend_bos: bool,
    template: str | None = None,
    room: int | None = None,
) -> list[Aligned]:
    """`align` of each of some facts.

    Args:
        tokenizer: The model's own.
        facts: The facts.
        prepend_bos: Whether to put BOS in front.
        template: As for `align`.
        room: Tokens that the model has room for (``cfg.n_ctx``); None for no limit.

    Raises:
        ValueError: Some can't be aligned, or are longer than the model's context: the message names each of them.
    """

    def aligned(fact: Fact) -> Aligned:
        row = align(tokenizer, fact, prepend_bos=prepend_bos, template=template)
        check_room(row.ids, [row.old_ids, row.new_ids], room, row.text)
        return row

    return of_all(facts, aligned)


def check_all(tokenizer: Any, facts: Iterable[Fact], *, prepend_bos: bool, room: int | None = None) -> None:
    """`check_texts` of each of some facts, before anything is run.

    Raises:
        ValueError: Some can't be asked: the message names each of them.
    """
    of_all(facts, lambda fact: check_texts(tokenizer, fact, prepend_bos=prepend_bos, room=room))


def of_all(facts: Iterable[Fact], call: Callable[[Fact], T]) -> list[T]:
    """What a function says of each fact.

    Raises:
        ValueError: It refuses some of them; the message names each.
    """
    found: list[T] = []
    bad: list[tuple[Fact, ValueError]] = []
    for fact in facts:
        try:
            found.append(call(fact))
        except ValueError as error:
            bad.append((fact, error))
    if len(bad) == 1:
        fact, error = bad[0]
        raise ValueError(f"{error} (fact {fact.name!r})") from error
    if bad:
        said = "; ".join(f"{fact.name!r}: {error}" for fact, error in bad)
        raise ValueError(
            f"{len(bad)} of {len(bad) + len(found)} facts can't be asked of this model (fe.alignable sorts them out): "
            f"{said}"
        )
    return found


def check_room(
    ids: Int[Tensor, "pos"], targets: Iterable[Int[Tensor, "_"] | None], room: int | None, text: str
) -> None:
    """Check that a text with its longest target fits into the model's context.

    Raises:
        ValueError: It doesn't.
    """
    longest = max((len(target) for target in targets if target is not None), default=1)
    if room is not None and len(ids) + longest - 1 > room:
        begin = text if len(text) < 80 else text[:77] + "…"
        raise ValueError(
            f"{begin!r} has {len(ids)} tokens and its longest target {longest}, and the model has room for {room} "
            "(cfg.n_ctx): shorten the prompt"
        )


def check_length(tokenizer: Any, text: str, name: str, *, prepend_bos: bool, room: int | None) -> None:
    """Check that a text of its own fits into the model's context.

    Args:
        tokenizer: The model's own.
        text: The text.
        name: What it is, for the message.
        prepend_bos: Whether to put BOS in front.
        room: Tokens that the model has room for (``cfg.n_ctx``); None for no limit.

    Raises:
        ValueError: It doesn't.
    """
    if room is not None and (count := len(encode(tokenizer, text, prepend_bos=prepend_bos)[0])) > room:
        begin = text if len(text) < 80 else text[:77] + "…"
        raise ValueError(
            f"{name}, {begin!r}, has {count} tokens, and the model has room for {room} (cfg.n_ctx): shorten it"
        )


def check_texts(tokenizer: Any, fact: Fact, *, prepend_bos: bool, room: int | None = None) -> None:
    """Check that everything that can be asked of a fact can be tokenised: prompt, paraphrases, neighbours, objects.

    Args:
        tokenizer: The model's own.
        fact: The fact.
        prepend_bos: Whether to put BOS in front.
        room: Tokens that the model has room for (``cfg.n_ctx``); None for no limit.

    Raises:
        ValueError: As `align`; or a text is longer than the model's context.
    """
    objects = [target for target in (fact.target_true, fact.target_new) if target is not None]
    row = align(tokenizer, fact, prepend_bos=prepend_bos)
    asked = [(row.text, [*objects, *fact.controls])]
    texts = (*map(fact.fill, fact.paraphrases), *fact.neighbours)
    asked += [(text, [fact.after(text, target) for target in objects]) for text in texts]
    asked += [
        (text, [target])
        for text, target in zip(fact.neighbours, fact.neighbour_targets, strict=bool(fact.neighbour_targets))
    ]
    for text, targets in asked:
        ids = encode(tokenizer, text, prepend_bos=prepend_bos)[0]
        check_spelling(tokenizer, ids, text)
        spelt = [continuation(tokenizer, text, target, prepend_bos=prepend_bos) for target in targets]
        check_room(ids, spelt, room, text)


def special_tokens(tokenizer: Any) -> list[str]:
    """The control tokens that a tokenizer reads in a text: BOS, EOS, those of chat templates."""
    return [str(token) for token in getattr(tokenizer, "all_special_tokens", ()) if str(token)]


def check_subject(tokenizer: Any, fact: Fact) -> None:
    """Check that a subject is text to the tokenizer.

    Raises:
        ValueError: It holds a control token, or a word in its prompt that the tokenizer doesn't know.
    """
    _check_control(tokenizer, fact.subject, "subject")
    if getattr(tokenizer, "unk_token_id", None) is not None:
        begin = fact.prompt.index("{}")
        end = begin + len(fact.subject)
        ids, offsets = encode(tokenizer, fact.text, prepend_bos=False)
        inside = [i for i, (a, b) in enumerate(offsets) if b > a and a < end and b > begin]
        check_known(tokenizer, ids[inside], f"subject {fact.subject!r}")


def _check_control(tokenizer: Any, text: str, what: str) -> None:
    control = [token for token in special_tokens(tokenizer) if token in text]
    if control:
        raise ValueError(
            f"{what} {text!r} holds {control[0]!r}, which the tokenizer reads as a control token and not as "
            "text: leave it out"
        )


def check_known(tokenizer: Any, ids: Int[Tensor, "_"], what: str) -> None:
    """Check that the tokenizer knows the words of a subject or an object.

    All words that it doesn't know are one token, so that a model can't tell the one from the other.

    Raises:
        ValueError: It doesn't.
    """
    if _holds_unknown(tokenizer, ids):
        raise ValueError(f"{what} {_read_as_unknown(tokenizer)}: give one that it knows")


def _tell_unknown(tokenizer: Any, ids: Int[Tensor, "_"], text: str) -> None:
    """Warn of a text that is asked with a word, neither its subject nor its object, that the tokenizer doesn't know."""
    if _holds_unknown(tokenizer, ids):
        tell(f"{text!r} {_read_as_unknown(tokenizer)}: say it in words that it knows", once="unknown words")


def _holds_unknown(tokenizer: Any, ids: Int[Tensor, "_"]) -> bool:
    unknown = getattr(tokenizer, "unk_token_id", None)  # which in GPT-2 is BOS
    return unknown is not None and unknown != tokenizer.bos_token_id and unknown in ids.tolist()


def _read_as_unknown(tokenizer: Any) -> str:
    return (
        f"holds a word that the tokenizer doesn't know and reads as {str(tokenizer.unk_token)!r}, as every other such "
        "word"
    )


def _header(tokenizer: Any, before: str) -> int:
    r"""Where a context goes in what stands before a subject: in front, or behind the chat header that it stands under.

    A header is a control token with the name of a role behind it and a line break, such as "<|im_start|>user\n".
    """
    ends = [before.rfind(token) + len(token) for token in special_tokens(tokenizer) if token in before]
    if not ends:
        return 0
    role = re.match(r"\s*\w*\n+|\s*", before[max(ends) :])
    return max(ends) + (role.end() if role else 0)


def check_spelling(tokenizer: Any, ids: Int[Tensor, "pos"], text: str) -> None:
    """Check that the tokens of a byte-level tokenizer spell their text: some lack bytes, and drop them without a word.

    Raises:
        ValueError: They spell something else.
    """
    if type(getattr(tokenizer.backend_tokenizer, "decoder", None)).__name__ != "ByteLevel":
        return  # others change spaces, and have an unknown token
    spelt = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    if not _same_text(spelt, text) and not _same_text(spelt.removeprefix(tokenizer.bos_token or ""), text):
        lost = next((c for c in text if c not in spelt and c not in unicodedata.normalize("NFC", spelt)), "")
        raise ValueError(
            f"the tokens of {text!r} spell {spelt!r}: the tokenizer has no token for some byte of "
            f"{lost!r} ({unicodedata.name(lost, 'unnamed') if lost else 'the text'}), and drops it; leave it out"
        )


def _same_text(one: str, other: str) -> bool:
    """Whether texts are equal up to composed or decomposed characters, and a space that a tokenizer puts in front."""
    one, other = (unicodedata.normalize("NFC", text) for text in (one, other))
    return one in (other, " " + other)


def brings_bos(tokenizer: Any, text: str) -> bool:
    """Whether a text begins with the BOS token itself, as chat templates do: no second one is put in front then.

    White space before it changes nothing: some tokenizers swallow it.
    """
    return bool(tokenizer.bos_token) and text.lstrip().startswith(str(tokenizer.bos_token))


def encode(tokenizer: Any, text: str, *, prepend_bos: bool) -> tuple[Int[Tensor, "pos"], list[tuple[int, int]]]:
    """Token ids of a text as run, and the characters that each of them covers ((0, 0) for BOS)."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets, needed to find the subject: "
            "load the fast tokenizer (use_fast=True)"
        )
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise ValueError("prepend_bos=True, but the tokenizer has no BOS token: pass prepend_bos=False")
    if prepend_bos and brings_bos(tokenizer, text):
        tell(
            f"a prompt begins with the BOS token {str(tokenizer.bos_token)!r} itself (a chat template?): no second one "
            "is put in front of it",
            once="BOS",
        )
        prepend_bos = False
    # To a tokenizer that adds no BOS of its own TransformerLens gives the BOS as text, and a word after it is
    # not always spelt as one at the very beginning ("▁The" becomes "T", "he").
    spelt = tokenizer.bos_token if prepend_bos and tokenizer("a")["input_ids"][:1] != [bos] else ""
    coded = tokenizer(spelt + text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(coded["input_ids"])
    offsets = [(max(a - len(spelt), 0), max(b - len(spelt), 0)) for a, b in coded["offset_mapping"]]
    if prepend_bos and not spelt:
        ids, offsets = [bos, *ids], [(0, 0), *offsets]
    if not ids:
        raise ValueError(f"text {text!r} has no tokens")
    return torch.tensor(ids), offsets


def spell(tokenizer: Any, ids: Int[Tensor, "pos"]) -> tuple[str, ...]:
    """Each token as a string (bytes of a split character show as the replacement character)."""
    return tuple(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids)


def up_to_a_word(tokenizer: Any, ids: Int[Tensor, "target"]) -> int:
    """How many tokens of an object it takes until a whole character is said that is no white space.

    Some tokenizers begin " Łódź" with a token that is the space alone, and "กรุงเทพ" with bytes that most letters of its
    script begin with: who says such a token has said nothing of the object yet.
    """
    for i in range(1, len(ids)):
        said = tokenizer.decode(ids[:i].tolist(), clean_up_tokenization_spaces=False)
        if stripped(said.rstrip(HALF)):
            return i
    return len(ids)


def decided_at(said: Sequence[int], wanted: Sequence[int]) -> int:
    """Where it is decided whether one thing is said or another: the first place where tokens differ, or the last."""
    return next((i for i, (one, other) in enumerate(zip(said, wanted, strict=True)) if one != other), len(wanted) - 1)


def find_span(
    text: str,
    offsets: Sequence[tuple[int, int]],
    begin: int,
    end: int,
    pieces: Sequence[str],
    what: str,
) -> tuple[int, int]:
    """The tokens that cover the characters ``begin:end`` of a text.

    A token may reach over the span's ends by white space only (" Paris" is one token).

    Returns:
        (start, stop) token positions.

    Raises:
        ValueError: A token holds the span's end, or its start, together with other text.
    """
    # Tokens without characters of their own (BOS) belong to no span.
    inside = [i for i, (a, b) in enumerate(offsets) if b > a and a < end and b > begin]
    if not inside:
        raise ValueError(f"no token covers {what!r} in {text!r}")
    first, last = inside[0], inside[-1]
    if text[end : offsets[last][1]].strip():
        raise ValueError(
            f"subject {what!r} ends inside token {pieces[last]!r} (position {last}) of {text!r}, needed a token "
            "boundary there: extend the subject or change the template"
        )
    if text[offsets[first][0] : begin].strip():
        raise ValueError(
            f"subject {what!r} begins inside token {pieces[first]!r} (position {first}) of {text!r}, needed a token "
            "boundary there: extend the subject or change the template"
        )
    return first, last + 1


def continuation(tokenizer: Any, text: str, target: str, *, prepend_bos: bool = False) -> Int[Tensor, "target"]:
    """The ids of `target` as it is spelt after `text`.

    Raises:
        ValueError: The text's own tokens change when the target follows (the two merge into one
            token), so that a model that has read `text` could not go on with `target`; or they don't spell the texts;
            or the target holds a control token or a word that the tokenizer doesn't know.
    """
    _check_control(tokenizer, target, "target")
    if text[-1:] == " " and target[:1] == " ":
        raise ValueError(
            f"{text!r} ends with a space and target {target!r} begins with one, needed one of them: take it off the "
            "text"
        )
    before = encode(tokenizer, text, prepend_bos=prepend_bos)[0].tolist()
    whole = encode(tokenizer, text + target, prepend_bos=prepend_bos)[0].tolist()
    if whole[: len(before)] != before or len(whole) == len(before):
        if text[-1:].isspace():
            hint = "the text ends with a space: move it to the front of the target"
        elif elided := ELISION.search(text):
            hint = f"begin the target with the word before it, {elided[0]!r}"
        else:
            hint = "begin the target where a new token begins, e.g. with a space"
        raise ValueError(
            f"target {target!r} merges with the last token of {text!r}, needed a continuation of its tokens; {hint}"
        )
    check_spelling(tokenizer, torch.tensor(whole), text + target)
    found = torch.tensor(whole[len(before) :])
    check_known(tokenizer, found, f"target {target!r}")
    _tell_unknown(tokenizer, torch.tensor(before), text)
    return found


def batches(costs: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in order of their cost, as many together as the dearest of them allows (one always goes).

    Args:
        costs: What each costs, such as its length in tokens: rows of like length go together, so that little is padded.
        most: What a batch may cost, each counted as its dearest (the ``batch_tokens`` of public calls).

    Raises:
        ValueError: `most` isn't a whole number above 0.
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"batch_tokens is {most!r}, needed a whole number of tokens, 1 at least")
    return _batches(costs, most)


def _batches(costs: Sequence[int], most: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if batch and costs[i] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows: Sequence[Int[Tensor, "_"]], fill: int) -> Int[Tensor, "row pos"]:
    """Rows of unequal length as one tensor, padded on the right (exact for causal models)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
