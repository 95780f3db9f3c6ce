"""The white space between a text and what continues it: one rule, for files and for facts.

A target is a *continuation* of its prompt, and tokenizers spell "Paris" after "of" as another token than " Paris".
Whether a space belongs there depends on the script and on what the prompt ends with:

- none after a line break (a chat header ends so), an opening bracket or quote, or a letter of a script without spaces;
- none before a closing bracket, a comma, or a clitic ("'s");
- one space everywhere else, in front of the target and never at the end of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Thai, Lao, Tibetan, Myanmar, Khmer; Chinese and Japanese with their punctuation and full-width forms.
WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff01-\uff9f\U00020000-\U0003ffff]"
)
OPENING = "([{<«“‘„¿¡/-–—_#@$€£\\"
CLOSING = ")]}>»”,;:!?%…"
QUOTES = "\"'`"
CLITIC = re.compile(r"['’][^\W\d_]|-[^\W\d_]|\.(?!\w)")
"""What hangs on to the word before it: "'s", "-based", a full stop."""

ENDS_A_PHRASE = "?!:;,."


def gap(text: str, target: str) -> str:
    """What belongs between a text and a target that is written without white space in front: ``" "`` or ``""``.

    Example:
        >>> gap("The capital of France is", "Paris"), gap("中国的首都是", "北京"), gap("It is Rome", "'s best")
        (' ', '', '')
    """
    if not text or not target or text[-1].isspace() or target[0].isspace():
        return ""
    opens = text[-1] in QUOTES and not text[-2:-1].strip("([{ \n\t")
    if opens or text[-1] in OPENING or WITHOUT_SPACES.match(text[-1]):
        return ""
    return "" if target[0] in CLOSING or CLITIC.match(target) else " "


def continued(text: str, target: str) -> str:
    """An object, as files write it, as the continuation of a text: nothing behind it, and the right gap in front.

    White space that stands in front already is kept, but of several spaces one.

    Example:
        >>> continued("The mother tongue of Danielle Darrieux is", "French ")
        ' French'
    """
    target = _one_space(target.rstrip())
    return gap(text, target) + target


def mended(text: str, target: str) -> str:
    """A target as somebody wrote it by hand, with only those gaps mended that can't have been meant.

    These are white space at its end, several spaces in front, and none between "?" or ":" and a new word. Parts of one
    word ("18" + "89"), of a number ("12:" + "30") or of an address ("www." + "example") are left as they are.
    """
    target = _one_space(target.rstrip())
    return " " + target if _misses_a_space(text, target) else target


def trimmed(template: str) -> str:
    """A template without the spaces at its end, which belong in front of the target."""
    return template.rstrip(" ")


class Mending:
    """The white space of prompts and their continuations as somebody wrote them, mended by one rule, and what was done.

    Attributes:
        said: What changes the text that is run, in words.
    """

    def __init__(self) -> None:
        self.said: list[str] = []

    def prompt(self, template: str, targets: Iterable[str | None]) -> str:
        """A prompt without the spaces at its end; said where a target has its own."""
        found = trimmed(template)
        if found != template and any((target or "").startswith(" ") for target in targets):
            self.said.append(f"the space at the end of {template!r} is left out, as the target has its own")
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
        given = " " + target if text != was and not target[:1].isspace() else target
        found = mended(text, given)
        if spaced and text and in_one_word(text[-1], found[0]):
            found = " " + found
        if found != given:
            self.said.append(f"{target!r} after {text[-20:]!r} became {found!r}")
        return found


def all_spaced(targets: Iterable[str | None]) -> bool:
    """Whether continuations (None for one that isn't there) all begin with a space."""
    given = [target for target in targets if target is not None]
    return bool(given) and all(target.startswith(" ") for target in given)


def goes_on_inside(text: str, target: str) -> bool:
    """Whether a target goes on inside a text's last word: ``"… city of" + "Paris"`` is "ofParis" to a model."""
    return bool(text and target) and all(each.isascii() and each.isalnum() for each in (text[-1], target[0]))


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


def _one_space(target: str) -> str:
    return re.sub(r"^ {2,}(?=\S)", " ", target)


def _misses_a_space(text: str, target: str) -> bool:
    if not text or not target or text[-1] not in ENDS_A_PHRASE or not target[0].isalnum() or not gap(text, target):
        return False
    if WITHOUT_SPACES.match(target[0]):
        return False
    if text[-1] not in "?!" and text[-2:-1].isdigit() and target[0].isdigit():
        return False
    word = text.split()[-1].lower()
    if "/" in word or word.startswith(("www.", "http:", "https:")):
        return False
    return text[-1] != "." or (len(target) > 1 and target[:2].isalpha())
