"""From a completion to an answer: which text counts, and when two answers are the same.

Everything here reads model output, so everything is linear in the length of the text, bounded, and
executes nothing: no `eval`, no regular expression that can backtrack, no conversion of a number whose
size was not checked first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

MAX_COMPLETION = 100_000
"""Characters of a completion that are read; a longer completion is wrong."""
MAX_ANSWER = 4_000
"""Characters of an extracted answer; a longer answer is wrong."""
MAX_DIGITS = 60
"""Characters of a number literal; a longer one is compared as text."""
MAX_EXPONENT = 300

_DIGITS = frozenset("0123456789")


def completion_text(completion: Any) -> str | None:
    """The text a model wrote: a string, or the contents of the assistant messages of a conversation.

    Args:
        completion: a string, one message, or a list of messages (`{"role": ..., "content": ...}`) whose
            content is a string or a list of parts with a `text`.

    Returns:
        The text, or None when there is none to judge (None, or an object of another type).
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        return _content_text(completion.get("content"))
    if not isinstance(completion, Sequence) or isinstance(completion, (bytes, bytearray)):
        return None
    written = [m for m in completion if isinstance(m, Mapping) and m.get("role", "assistant") == "assistant"]
    texts = [text for m in written if (text := _content_text(m.get("content"))) is not None]
    return "\n".join(texts) if texts else None


def _content_text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        parts = [p.get("text") for p in content if isinstance(p, Mapping)]
        return "".join(p for p in parts if isinstance(p, str))
    return None


def final_answer(text: str) -> str:
    """The answer in a text: inside the last `<answer>...</answer>`, else the last line that is not blank.

    An `<answer>` that is never closed runs to the end of the text.
    """
    start = text.rfind("<answer>")
    if start >= 0:
        start += len("<answer>")
        end = text.find("</answer>", start)
        return text[start : end if end >= 0 else len(text)].strip()
    return text.rstrip().rpartition("\n")[2].strip()


def unboxed(text: str) -> str:
    r"""The content of the last `\boxed{...}` with its braces balanced, or the text itself if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end].strip()
    return text


def as_number(text: str) -> Fraction | None:
    """An exact number from `7`, `-1,234.50`, `3/4`, `2e-3`; None for anything else.

    Only ASCII digits count: `int` and `float` also accept the digits of other scripts, `1_000`, `inf` and
    `nan`. The literal is bounded (`MAX_DIGITS` characters, exponent at most `MAX_EXPONENT`) before it is
    converted, so `1e999999999` costs nothing.
    """
    text = text.strip()
    if not text or len(text) > MAX_DIGITS or not text.isascii():
        return None
    over, slash, under = text.partition("/")
    top = _decimal(over.strip())
    if not slash:
        return top
    bottom = _decimal(under.strip())
    return None if top is None or not bottom else top / bottom


def _decimal(text: str) -> Fraction | None:
    mantissa, mark, exponent = text.replace("E", "e").partition("e")
    sign, body = (mantissa[:1], mantissa[1:]) if mantissa[:1] in ("+", "-") else ("", mantissa)
    whole, point, rest = body.partition(".")
    if "," in whole and not _grouped_in_thousands(whole):
        return None
    whole = whole.replace(",", "")
    if not (whole or rest) or (point and not (whole + rest)) or not _DIGITS.issuperset(whole + rest):
        return None
    power = _small_integer(exponent) if mark else 0
    if power is None:
        return None
    value = Fraction(int(whole + rest), 10 ** len(rest)) * Fraction(10) ** power
    return -value if sign == "-" else value


def _grouped_in_thousands(whole: str) -> bool:
    head, *groups = whole.split(",")
    return 1 <= len(head) <= 3 and all(len(group) == 3 for group in groups)


def _small_integer(text: str) -> int | None:
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not 1 <= len(digits) <= 4 or not _DIGITS.issuperset(digits) or int(digits) > MAX_EXPONENT:
        return None
    return -int(digits) if text[0] == "-" else int(digits)


def normalised(text: str) -> str:
    """An answer without what does not change it: box, dollar signs, case, spacing, a final full stop."""
    text = unboxed(text).strip().strip("$").strip()
    return " ".join(text.removesuffix(".").casefold().split())


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers agree: as exact numbers if both are numbers, else as normalised text."""
    if len(given) > MAX_ANSWER:
        return False
    left, right = normalised(given), normalised(expected)
    if left == right:
        return True
    a, b = as_number(left), as_number(right)
    return a is not None and a == b
