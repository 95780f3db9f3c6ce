"""The white space between a text and what continues it: one rule, for files and for facts.

A target is a *continuation* of its prompt, and tokenizers spell "Paris" after "of" as another token than " Paris".
Whether a space belongs there depends on the script, on what the prompt ends with, and on whether one was given:

- none behind an opening bracket or quote, an elision ("l'", "qu'", "O'"), or inside Chinese or Japanese, even where
  one was given;
- none after a line break (a chat header ends so), a dash, a sign, a tag, a letter of a script without spaces, or inside
  a number or an address, unless one was given;
- none before a closing bracket, a comma, or a clitic ("'s"), unless one was given;
- one space everywhere else, in front of the target and never at the end of the prompt.

Files hold objects, which are words of their own. What somebody writes by hand may be the rest of a word ("super" +
"man"): that alone is left, and warned of.

What was written to continue one text and is asked after another (`moved`) gets the gap that belongs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SPACES = " \u00a0\u202f\u3000\u200b\u2060\ufeff"
"""What is meant as a space where a text ends: those that don't break, the ideographic one and those of no width too."""
BLANK = re.compile(rf"[\s{SPACES}]")
"""White space of any kind: also line breaks and tabs."""
# Chinese and Japanese with their punctuation and full-width forms; with them Thai, Lao, Tibetan, Myanmar, Khmer.
IDEOGRAPHIC = re.compile(
    "[\u3000-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)
WITHOUT_SPACES = re.compile(f"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]|{IDEOGRAPHIC.pattern}")
OPENING = "([{“‘„‚¿¡"
HYPHENS = "‐‑־-"
"""Inside a word, the maqaf of Hebrew too."""
JOINING = f"<>«‹/{HYPHENS}–—_#@$€£¥₪₹\\|=*~^+−±&"
CLOSING = ")]}>»›”,;:!?%…</_|=\\^"
QUOTES = "\"'`"
TAG = re.compile(r"\[/?[A-Z_]+\]$")
"""How some chat templates end: "[/INST]"."""
ELISION = re.compile(
    r"(?<![\w'’])(?:[^\W\d_]|qu|jusqu|lorsqu|puisqu|(?:de|da|a|ne|su|co)ll|un)['’]$",
    re.IGNORECASE,
)
"""A word that lost its last vowel to the next one, without a space between: French "l'" and "qu'", Italian "dell'"; and
the "O'" and "D'" of names."""
BINDING = "#@$€£¥₪₹<*_"
"""Signs that stand before what they belong to, as a line break does."""
WITHIN = f"{HYPHENS}–/\\@"
"""Signs inside a word or an address: what stands behind them without a space goes on with it."""
CLITIC = re.compile(rf"['’{HYPHENS}][^\W\d_]|\.(?!\w)")
"""What hangs on to the word before it: "'s", "-based", a full stop."""

ENDS_A_PHRASE = "?!:;,."


def gap(text: str, target: str, *, spaced: bool = False) -> str:
    """What belongs between a text and a target that is written without a space in front: ``" "`` or ``""``.

    Args:
        text: Without spaces at its end.
        target: Without spaces in front.
        spaced: Whether a space was given between them.

    Example:
        >>> gap("The capital of France is", "Paris"), gap("中国的首都是", "北京"), gap("It is Rome", "'s best")
        (' ', '', '')
    """
    if not text or not target:
        return ""
    opens = text[-1] in QUOTES and not text[-2:-1].strip("([{ \n\t")
    if (
        opens
        or text[-1] in OPENING
        or ELISION.search(text)
        or (IDEOGRAPHIC.match(text[-1]) and IDEOGRAPHIC.match(target[0]))
    ):
        return ""
    return " " if spaced or not _joined(text, target) else ""


def continued(text: str, target: str) -> str:
    """An object, as files write it, as the continuation of a text: nothing behind it, and the right gap in front.

    Example:
        >>> continued("The mother tongue of Danielle Darrieux is", "French ")
        ' French'
    """
    bare = _bare(target)
    return gap(trimmed(text), bare, spaced=trimmed(text) != text or _spaced(target)) + bare


def moved(target: str, was: str, text: str) -> str:
    """What was written to continue one text, as the continuation of another.

    A word gets the gap that belongs there. One that goes on with the text's last word or number is left, and a space
    stays that was given where the rule would put none.

    Args:
        target: Letter for letter as it continues `was`.
        was: The text that it was written for, without spaces at its end.
        text: The text that it is to continue now.

    Example:
        >>> moved(" Paris", "The capital of France is", "“"), moved("巴黎", "法国的首都是", "It is")
        ('Paris', ' 巴黎')
        >>> moved("89", "In the year 18", "It began in 18")
        '89'
    """
    if not text or not was or text == was or text[-1] in SPACES or starts_with_a_break(target):
        return target
    bare, given = target.lstrip(SPACES), _spaced(target)
    if not bare or (not given and _goes_on(was, bare)):
        return target
    binding = (
        BLANK.match(text[-1]) or text[-1] in BINDING or (WITHOUT_SPACES.match(text[-1]) and WITHOUT_SPACES.match(bare))
    )
    return gap(text, bare, spaced=given and not (binding and gap(was, bare))) + bare


def trimmed(template: str) -> str:
    """A template without the spaces at its end, which belong in front of the target."""
    return template.rstrip(SPACES)


def stripped(text: str) -> str:
    """A text without white space around it, that of no width among it."""
    return re.sub(rf"^{BLANK.pattern}+|{BLANK.pattern}+$", "", text)


def starts_with_a_break(target: str) -> bool:
    """Whether a target begins with white space that is no space: a line break or a tab, mostly a token of its own."""
    return bool(BLANK.match(target)) and target[0] not in SPACES


class Mending:
    """The white space of prompts and their continuations as somebody wrote them, mended by one rule, and what was done.

    Attributes:
        said: What changes the text that is run, in words.
    """

    def __init__(self) -> None:
        self.said: list[str] = []

    def subject(self, subject: str, templates: Iterable[str]) -> tuple[str, tuple[str, ...]]:
        """A subject without white space around it, which goes over to the templates where words would be glued."""
        bare, templates = stripped(subject), tuple(templates)
        if bare == subject:
            return subject, templates
        self.said.append(f"subject {subject!r} became {bare!r}")
        left, right = (bool(BLANK.match(subject[end])) for end in (0, -1))

        def filled(template: str) -> str:
            before, slot, after = template.partition("{}")
            if slot and left and before and in_one_word(before[-1], bare[0]):
                before += " "
            if slot and right and after and in_one_word(bare[-1], after[0]):
                after = " " + after
            return before + slot + after

        return bare, tuple(map(filled, templates))

    def prompt(self, template: str, targets: Iterable[str | None]) -> str:
        """A prompt without the spaces at its end; said where a target has its own."""
        found = trimmed(template)
        if found != template and any((target or "").startswith(" ") for target in targets):
            self._left_out(template)
        return found

    def target(self, target: str, text: str, was: str, *, spaced: bool = False) -> str:
        """What continues a text.

        Args:
            target: As it was given.
            text: What it follows, trimmed.
            was: The same before; the space at its end goes over to the target.
            spaced: Whether other continuations, of which it is an alternative, begin with a space: it gets one then
                where it would go on inside the text's last word.
        """
        bare, given = _bare(target), text != was or _spaced(target)
        inside = not given and goes_on_inside(text, bare)
        found = bare if inside and not spaced else gap(text, bare, spaced=given or inside) + bare
        if found != target and text + found != was + target:
            self.said.append(f"{target!r} after {ending(was)!r} became {found!r}")
        elif text + found != was + target:
            self._left_out(was)
        return found

    def _left_out(self, template: str) -> None:
        said = f"the space at the end of {template!r} is left out"
        if said not in self.said:
            self.said.append(said)


def all_spaced(targets: Iterable[str | None]) -> bool:
    """Whether continuations (None for one that isn't there) all begin with a space."""
    given = [target for target in targets if target is not None]
    return bool(given) and all(target.startswith(" ") for target in given)


def goes_on_inside(text: str, target: str) -> bool:
    """Whether a target goes on inside a text's last word: ``"… city of" + "Paris"`` is "ofParis" to a model."""
    if not text or not target:
        return False
    hangs_on = text[-1] in "'’" and text[-2:-1].isalnum() and target[0].isalpha() and not ELISION.search(text)
    return hangs_on or in_one_word(text[-1], target[0])


def ending(text: str, most: int = 30) -> str:
    """The last words of a text, whole ones where it has spaces."""
    cut = text[-most:]
    return text if len(text) <= most else "…" + (cut[cut.find(" ") + 1 :] if " " in cut.rstrip() else cut)


def before_prompts(context: str) -> str:
    """A context as it stands before a prompt: with a space at its end where one belongs.

    None belongs after white space, an opening bracket or quote, or a letter of a script without spaces.

    Example:
        >>> before_prompts("I know this."), before_prompts("我知道。")
        ('I know this. ', '我知道。')
    """
    return context + gap(context, "A")


def in_one_word(left: str, right: str) -> bool:
    """Whether two characters that stand side by side belong to one word, in scripts that put spaces between words."""
    return left.isalnum() and right.isalnum() and not WITHOUT_SPACES.match(left) and not WITHOUT_SPACES.match(right)


def _bare(target: str) -> str:
    return re.sub(rf"{BLANK.pattern}+$", "", target).lstrip(SPACES)


def _spaced(target: str) -> bool:
    return target[:1] in tuple(SPACES)


def _goes_on(text: str, target: str) -> bool:
    """Whether what follows a text without a space may be no word of its own."""
    if ELISION.search(text):
        return False
    inside = text[-1] in ENDS_A_PHRASE and _inside_a_name(text, target)
    return inside or text[-1] in WITHIN or goes_on_inside(text, target)


def _joined(text: str, target: str) -> bool:
    """Whether a text and what continues it stand side by side, where no space was given."""
    if BLANK.match(text[-1]) or BLANK.match(target) or target[0] in CLOSING or CLITIC.match(target):
        return True
    if re.search(r"\s[–—]$", text) or (re.search(rf"\s[{HYPHENS}]$", text) and target[0].isalpha()):
        return False  # a dash between words
    if text[-1] in JOINING or TAG.search(text) or (text[-1].isdecimal() and target[0].isdecimal()):
        return True
    said = text.rstrip(ENDS_A_PHRASE)
    if WITHOUT_SPACES.match((said or text)[-1]):
        return True
    return text[-1] in ENDS_A_PHRASE and _inside_a_name(text, target)


def _inside_a_name(text: str, target: str) -> bool:
    """Whether punctuation stands inside a number ("12:" + "30"), initials ("J." + "R.") or an address ("www." + …)."""
    if text[-1] not in "?!" and text[-2:-1].isdigit() and target[0].isdigit():
        return True
    word = text.split()[-1].lower()
    if "/" in word or word.startswith(("www.", "http:", "https:")):
        return True
    return text[-1] == "." and bool(re.match(r"\w\.", target))
