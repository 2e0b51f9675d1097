"""Decides which questions and answers are dropped, and why. Each filter can be disabled by name.

A pair duplicates another if its clip already has the same question or the same answer, apart from
case and punctuation: in any example of the metadata about that clip, or in the examples of another
source that are named with --previous_files.

"unanswerable" looks for phrases of refusal ("cannot determine", "not enough information"), so that
"loud enough" or "cannot miss" stay. The original keeps such examples in its first sets, because
they teach to refuse.
"""

import re
from collections.abc import Callable

from qa_generation.qa_json import Pair

FILTERS = ("short", "metadata", "unanswerable", "duplicate")
METADATA = re.compile(
    r"\b(meta-?data"
    r"|according to the (given |provided )?"
    r"(description|caption|labels?|tags?|text|facts|information|data)"
    r"|(the|this) (given|provided|above|listed) (\w+ )?"
    r"(description|caption|labels?|tags?|text|facts|information|data|events?|context)"
    r"|(sound|audio) (events?|labels?|tags?) (list|listed|provided|given)"
    r"|(description|caption|label|tag|transcript(ion)?|text)s? "
    r"(says?|states?|mentions?|indicates?|provided|given)"
    r"|time-?stamps?)\b|Sound Events:|Spoken words:|\[\d+\.\d+s-\d+\.\d+s|\([<>]?\d+(-\d+)? Hz\)",
    re.IGNORECASE,
)
UNANSWERABLE = re.compile(
    r"\b(can ?not|can't|could not|impossible to|not possible to|difficult to|hard to|unable to) "
    r"(be )?(reliably |definitively |accurately )?"
    r"(determined?|infer(red)?|tell|known?|answer(ed)?|identif(y|ied)|say|specify|specified)\b"
    r"|\bnot (specified|provided|mentioned|stated|(enough|sufficient) information)\b"
    r"|\binsufficient information"
    r"|\b(no|without (more|further|additional)) (\w+ )?(information|context|indication)\b"
    r"|\bunclear (from|what|who|whether|if|why|how|where)\b|\bit is (unclear|not clear)\b"
    r"|^(i'm |i am )?sorry\b|\bas an ai\b",
    re.IGNORECASE,
)


def make_filter(
    text: str, min_words: int, names: tuple[str, ...] = FILTERS, seen: set[str] | None = None
) -> Callable[[Pair], str | None]:
    """Return a function that maps a pair to the reason why it is dropped, or to None.

    Call it with the pairs of one clip, in their order.

    Args:
        text: Transcript of the clip; a question that repeats six of its words in a row counts as
            "metadata".
        min_words: Minimum length of an answer.
        names: Enabled filters, of FILTERS.
        seen: Keys of the pairs that the clip already has; the keys of pairs that are not dropped
            are added.
    """
    if seen is None:
        seen = set()
    spoken = _runs(text)

    def reason(pair: Pair) -> str | None:
        keys = duplicate_keys(pair)
        is_short = len(pair.answer.split()) < min_words or len(pair.question.split()) < 3
        names_metadata = METADATA.search(f"{pair.question}\n{pair.answer}")
        applies = {
            "short": is_short,
            "metadata": bool(names_metadata or spoken & _runs(pair.question)),
            "unanswerable": bool(UNANSWERABLE.search(pair.answer)),
            "duplicate": bool(keys & seen),
        }
        for name in FILTERS:
            if name in names and applies[name]:
                return name
        seen.update(keys)
        return None

    return reason


def duplicate_keys(pair: Pair) -> set[str]:
    """Return the keys by which duplicates of a pair are found.

    They are its question and its answer, without case and punctuation.
    """
    return {f"q {_plain(pair.question)}", f"a {_plain(pair.answer)}"}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _runs(text: str, size: int = 6) -> set[str]:
    """Return all runs of `size` words of a text."""
    words = _plain(text).split()
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
