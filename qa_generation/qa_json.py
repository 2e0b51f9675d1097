"""Parses questions and answers from the reply of a language model.

Pairs are found wherever an object opens with a q or an a: in lines, in a list, in a code fence,
after a number.

A malformed object is repaired only if there is one way to read it. Each repair is tried on its own.
If all that succeed agree, their result is the pair; else the object is rejected. The last object of
a truncated reply is never completed.
"""

import ast
import json
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Maximum characters of a reply. Twenty questions are about 8,000, and an endless text would take
# minutes.
MAX_CHARACTERS = 200_000
NAMES = {"q": "q", "question": "q", "a": "a", "answer": "a"}
QUOTES = str.maketrans("“”„‟", '""""')
# The beginning of an object, up to its first key of a pair.
OPENER = re.compile(
    r"""\{\s*(?:"\w+"\s*:\s*(?:\d+|"[^"]*")\s*,\s*){0,3}"""
    r"""["'“”]?(?:q|a|question|answer)["'“”]?\s*:""",
    re.IGNORECASE,
)
OBJECT = re.compile(r"\{[^{}]*\}")
ANSWER = re.compile(r"""(?<!\w)a(?:nswer)?["'“”]\s*:|["'“”]a(?:nswer)?["'“”]?\s*:""", re.IGNORECASE)
# A whole object whose texts may contain quotes.
INNER = re.compile(
    r"""\{\s*"q(?:uestion)?"\s*:\s*"(?P<q>.*)"\s*,\s*"a(?:nswer)?"\s*:\s*"(?P<a>.*)"\s*,?\s*\}""",
    re.DOTALL | re.IGNORECASE,
)
DECODER = json.JSONDecoder(object_pairs_hook=list, strict=False)
SEPARATOR = re.compile(r'"\s*,\s*"a(?:nswer)?"\s*:\s*"', re.IGNORECASE)


class Pair(NamedTuple):
    question: str
    answer: str


class Reject(NamedTuple):
    reason: str
    text: str


@dataclass
class ParsedReply:
    """The pairs of a reply in their order, and what was dropped of it."""

    pairs: list[Pair] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def parse_pairs(text: str, is_truncated: bool = False) -> ParsedReply:
    """Parse the pairs of a reply."""
    if not text.strip():
        return ParsedReply(rejects=[Reject("empty reply", text)])
    if len(text) > MAX_CHARACTERS:
        return ParsedReply(rejects=[Reject("too long", text)])
    parsed = ParsedReply()
    position = 0
    while position < len(text):
        opener = OPENER.search(text, position)
        start = opener.start() if opener else len(text)
        skipped = text[position:start]
        if ANSWER.search(skipped) or OBJECT.search(skipped):
            parsed.rejects.append(Reject("malformed", skipped.strip()))
        if not opener:
            break
        found, position = _parse_object(text, start, is_truncated)
        if isinstance(found, Pair):
            parsed.pairs.append(found)
        else:
            parsed.rejects.append(found)
    if not parsed.pairs and not parsed.rejects:
        reason = "cut off" if is_truncated else "no question and answer"
        parsed.rejects.append(Reject(reason, text))
    return parsed


def _parse_object(text: str, start: int, is_truncated: bool) -> tuple[Pair | Reject, int]:
    """Parse the object at `start`. Return a pair or a reject, and the position after it."""
    try:
        members, size = DECODER.raw_decode(text[start:])
        end = start + size
        found = _pair(members)
        return found or Reject("not one question and one answer", text[start:end]), end
    except (json.JSONDecodeError, RecursionError):
        pass
    # The object is malformed. It ends where the next one begins.
    following = OPENER.search(text, start + 1)
    end = following.start() if following else len(text)
    broken = text[start:end]
    if len(ANSWER.findall(broken)) > 1:
        return Reject("more than one way to read it", broken.strip()), end
    repairs = (_commas, _typographic, _python, _brace, _inner)
    results = {repair(broken.strip()) for repair in repairs} - {None}
    is_last_and_truncated = is_truncated and not following
    if len(results) == 1 and not (is_last_and_truncated and "}" not in broken):
        return results.pop(), end
    if is_last_and_truncated:
        reason = "cut off"
    elif results:
        reason = "more than one way to read it"
    else:
        reason = "malformed"
    return Reject(reason, broken.strip()), end


def _pair(members: Any) -> Pair | None:
    """Return the pair in the members of an object.

    It is None unless there is one question and one answer, both whole texts.
    """
    values: dict[str, list] = {"q": [], "a": [], "": []}
    for name, value in members:
        values[NAMES.get(str(name).lower(), "")].append(value)
    if len(values["q"]) != 1 or len(values["a"]) != 1:
        return None
    texts = values["q"] + values["a"]
    if not all(isinstance(text, str) for text in texts):
        return None
    if re.search("[\ud800-\udfff]", "".join(texts)):
        return None  # Half an emoji cannot be written to a file.
    question, answer = texts
    return Pair(" ".join(question.split()), " ".join(answer.split()))


def _loads(text: str) -> Pair | None:
    try:
        return _pair(DECODER.raw_decode(text)[0])
    except (json.JSONDecodeError, RecursionError):
        return None


def _commas(text: str) -> Pair | None:
    """Remove a comma before the brace, and add one that is missing between the two members."""
    text = re.sub(r",\s*\}(?=[\s,\]`]*$)", "}", text)
    return _loads(re.sub(r'"\s*(?="(?:a|q|answer|question)"\s*:)', '", ', text))


def _typographic(text: str) -> Pair | None:
    """Replace typographic quotes."""
    return _loads(text.translate(QUOTES))


def _python(text: str) -> Pair | None:
    """Read a dictionary of Python, in single quotes."""
    try:
        with warnings.catch_warnings():
            # An escape that Python does not know makes the text unreadable.
            warnings.simplefilter("error")
            found = ast.literal_eval(text[: text.rindex("}") + 1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return _pair(list(found.items()))


def _brace(text: str) -> Pair | None:
    """Add a missing closing brace after a complete string."""
    if "}" in text:
        return None
    return _loads(text.rstrip(" ,\n]`") + "}")


def _inner(text: str) -> Pair | None:
    """Escape quotes within a text, only if there is one place where the members separate."""
    match = INNER.match(text)
    if not match or len(SEPARATOR.findall(text)) != 1:
        return None
    question = re.sub(r'(?<!\\)"', r'\\"', match["q"])
    answer = re.sub(r'(?<!\\)"', r'\\"', match["a"])
    return _loads(f'{{"q": "{question}", "a": "{answer}"}}')
