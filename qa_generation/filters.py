"""Which questions and answers are not worth keeping, and why. Each filter can be left out by name.

Notable:
- A pair repeats another if its clip already has the same question or the same answer, case and punctuation aside:
  in any row of the metadata about that clip, or in the rows of another source that are named with --against.
- "unanswerable" looks for words of refusal ("cannot determine", "not enough information"), so that "loud enough" or
  "cannot miss" stay. The original keeps such rows in its first sets: they teach to refuse.
"""

import re
from collections.abc import Callable

from qa_generation.qa_json import Pair

FILTERS = ("short", "metadata", "unanswerable", "duplicate")
METADATA = re.compile(
    r"\b(meta-?data|according to the (given |provided )?(description|caption|labels?|tags?|text|facts|information|data)"
    r"|(the|this) (given|provided|above|listed) (\w+ )?(description|caption|labels?|tags?|text|facts|information|data"
    r"|events?|context)|(sound|audio) (events?|labels?|tags?) (list|listed|provided|given)"
    r"|(description|caption|label|tag|transcript(ion)?|text)s? (says?|states?|mentions?|indicates?|provided|given)"
    r"|time-?stamps?)\b|Sound Events:|Spoken words:|\[\d+\.\d+s-\d+\.\d+s|\([<>]?\d+(-\d+)? Hz\)",
    re.IGNORECASE,
)
UNANSWERABLE = re.compile(
    r"\b(can ?not|can't|could not|impossible to|not possible to|difficult to|hard to|unable to) "
    r"(be )?(reliably |definitively |accurately )?(determined?|infer(red)?|tell|known?|answer(ed)?|identif(y|ied)|say"
    r"|specify|specified)\b"
    r"|\bnot (specified|provided|mentioned|stated|(enough|sufficient) information)\b|\binsufficient information"
    r"|\b(no|without (more|further|additional)) (\w+ )?(information|context|indication)\b"
    r"|\bunclear (from|what|who|whether|if|why|how|where)\b|\bit is (unclear|not clear)\b"
    r"|^(i'm |i am )?sorry\b|\bas an ai\b",
    re.IGNORECASE,
)


def make_filter(
    text: str, min_words: int, names: tuple[str, ...] = FILTERS, seen: set[str] | None = None
) -> Callable[[Pair], str | None]:
    """A function for pairs of one clip, in their order: why a pair is dropped, or None.

    Args:
        text: words spoken in the clip; a question that repeats six of them in a row counts as "metadata".
        min_words: of an answer.
        names: of FILTERS.
        seen: marks of the pairs that the clip has already; grows by those that are kept.
    """
    seen = set() if seen is None else seen
    spoken = _runs(text)

    def reason(pair: Pair) -> str | None:
        words = {"short": len(pair.answer.split()) < min_words or len(pair.question.split()) < 3}
        words["metadata"] = bool(
            METADATA.search(f"{pair.question}\n{pair.answer}") or spoken & _runs(pair.question)
        )
        words["unanswerable"] = bool(UNANSWERABLE.search(pair.answer))
        both = marks(pair)
        words["duplicate"] = bool(both & seen)
        found = next((name for name in FILTERS if name in names and words[name]), None)
        if found is None:
            seen.update(both)
        return found

    return reason


def marks(pair: Pair) -> set[str]:
    """By which a pair is known again: its question and its answer, each without case and punctuation."""
    return {f"q {_plain(pair.question)}", f"a {_plain(pair.answer)}"}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _runs(text: str, size: int = 6) -> set[str]:
    words = _plain(text).split()
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
