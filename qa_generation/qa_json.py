"""A model's reply -> questions and answers. What is malformed is repaired only if there is one way to read it.

Notable:
- Pairs are found wherever an object opens with a q or an a: in lines, in a list, in a code fence, after a number.
- Each repair is tried on its own on a broken object. If all that succeed agree, that is the pair; else it is rejected.
- The last object of a reply that was cut off is never completed.
"""

import ast
import json
import re
import warnings
from typing import Any, NamedTuple

LONGEST = 200_000  # characters of a reply: twenty questions are about 8,000, and a text without end takes minutes
NAMES = {"q": "q", "question": "q", "a": "a", "answer": "a"}
QUOTES = str.maketrans("“”„‟", '""""')
OPENER = re.compile(
    r"""\{\s*(?:"\w+"\s*:\s*(?:\d+|"[^"]*")\s*,\s*){0,3}["'“”]?(?:q|a|question|answer)["'“”]?\s*:""",
    re.IGNORECASE,
)
OBJECT = re.compile(r"\{[^{}]*\}")
ANSWER = re.compile(r"""(?<!\w)a(?:nswer)?["'“”]\s*:|["'“”]a(?:nswer)?["'“”]?\s*:""", re.IGNORECASE)
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


def parse_pairs(text: str, is_cut: bool = False) -> tuple[list[Pair], list[Reject]]:
    """The pairs of a reply in their order, and what could not be read.

    Args:
        is_cut: the model stopped at its longest reply.
    """
    if not text.strip():
        return [], [Reject("empty reply", text)]
    if len(text) > LONGEST:
        return [], [Reject("too long", text)]
    pairs, rejects, place = [], [], 0
    while place < len(text):
        opener = OPENER.search(text, place)
        start = opener.start() if opener else len(text)
        if ANSWER.search(text[place:start]) or OBJECT.search(text[place:start]):
            rejects.append(Reject("malformed", text[place:start].strip()))
        if opener:
            found, place = _read(text, start, is_cut)
            (pairs if isinstance(found, Pair) else rejects).append(found)
        else:
            break
    if not pairs and not rejects:
        rejects.append(Reject("cut off" if is_cut else "no question and answer", text))
    return pairs, rejects


def _read(text: str, start: int, is_cut: bool) -> tuple[Pair | Reject, int]:
    try:
        found, size = DECODER.raw_decode(text[start:])
        return _pair(found) or Reject(
            "not one question and one answer", text[start : start + size]
        ), start + size
    except (json.JSONDecodeError, RecursionError):
        pass
    following = OPENER.search(text, start + 1)
    end = following.start() if following else len(text)
    broken = text[start:end]
    if len(ANSWER.findall(broken)) > 1:
        return Reject("more than one way to read it", broken.strip()), end
    results = {
        repair(broken.strip()) for repair in (_commas, _typographic, _python, _brace, _inner)
    } - {None}
    if len(results) == 1 and not (is_cut and not following and "}" not in broken):
        return results.pop(), end
    reason = "more than one way to read it" if results else "malformed"
    return Reject("cut off" if is_cut and not following else reason, broken.strip()), end


def _pair(members: Any) -> Pair | None:
    """From the members of an object; None unless there is one question and one answer, both whole texts."""
    values: dict[str, list] = {"q": [], "a": [], "": []}
    for name, value in members:
        values[NAMES.get(str(name).lower(), "")].append(value)
    both = values["q"] + values["a"]
    if len(values["q"]) != 1 or len(both) != 2 or not all(isinstance(value, str) for value in both):
        return None
    is_whole = not re.search(
        "[\ud800-\udfff]", "".join(both)
    )  # Half an emoji can be written to no file.
    return Pair(*[" ".join(value.split()) for value in both]) if is_whole else None


def _loads(text: str) -> Pair | None:
    try:
        return _pair(DECODER.raw_decode(text)[0])
    except (json.JSONDecodeError, RecursionError):
        return None


def _commas(text: str) -> Pair | None:
    """A comma too many before the brace, or none between the two members."""
    text = re.sub(r",\s*\}(?=[\s,\]`]*$)", "}", text)
    return _loads(re.sub(r'"\s*(?="(?:a|q|answer|question)"\s*:)', '", ', text))


def _typographic(text: str) -> Pair | None:
    return _loads(text.translate(QUOTES))


def _python(text: str) -> Pair | None:
    """A dictionary of Python, in single quotes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # An escape that Python does not know is no way to read it.
            found = ast.literal_eval(text[: text.rindex("}") + 1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return _pair(list(found.items())) if isinstance(found, dict) else None


def _brace(text: str) -> Pair | None:
    """No closing brace after a complete string."""
    return _loads(text.rstrip(" ,\n]`") + "}") if "}" not in text else None


def _inner(text: str) -> Pair | None:
    """Quotes within a text that are not escaped; only where members part in one place."""
    match = INNER.match(text)
    if not match or len(SEPARATOR.findall(text)) != 1:
        return None
    values = [re.sub(r'(?<!\\)"', r'\\"', match[name]) for name in ("q", "a")]
    return _loads(f'{{"q": "{values[0]}", "a": "{values[1]}"}}')
