"""What `data.closed_qa` says of sounds: their labels, captions and times.

From a record, a random stream and `about` of `rows_of` to the words of a task's rows: none where it says too little.
"""

from collections import defaultdict
from itertools import groupby
from random import Random
from typing import Any

Words = dict[str, str]


def listed(value: Any) -> list[str]:
    """The parts of a list, or of a text with ";" between them, that are not empty."""
    parts = value.split(";") if isinstance(value, str) else value or []
    return [part for part in (str(part).strip() for part in parts) if part]


def described(record: dict, rng: Random, about: dict) -> list[Words]:
    labels, known = listed(record["labels"]), about["descriptions"]
    if not all(known.get(label) for label in labels):
        return []
    return [{"labels": "; ".join(f"{rng.choice(known[label])} -> {label}" for label in labels)}]


def captions(record: dict, rng: Random, about: dict) -> list[Words]:
    texts = [record["caption"]] if isinstance(record["caption"], str) else record["caption"]
    style = f", in {about['style']} style" if about["style"] else ""
    return [{"caption": text.strip(), "style": style} for text in texts if text.strip()]


def events(kind: str, record: dict, rng: Random, about: dict) -> list[Words]:
    found = sorted(
        (float(event["onset"]), float(event["offset"]), event["label"])
        for event in record["events"]
    )
    spans = defaultdict(list)
    for onset, offset, label in found:
        spans[label].append(f"{onset:.1f}-{offset:.1f}")
    told = {label: f"{label}: [{', '.join(times)}]" for label, times in spans.items()}
    if kind == "all":
        return [{"events": "; ".join(told.values())}]
    if kind == "single":
        label = rng.choice(list(told))
        return [{"label": label, "events": told[label]}]
    # Of sounds that begin together none is first; nor has one ended first that outlasts another.
    is_tied = len({onset for onset, _, _ in found}) < len(found)
    is_outlasted = found[0][1] >= min((offset for _, offset, _ in found[1:]), default=0.0)
    if len(spans) < 2 or is_tied or (kind == "first" and is_outlasted):
        return []
    return [
        {
            "first": found[0][2],
            "order": "; ".join(label for label, _ in groupby(label for _, _, label in found)),
        }
    ]
