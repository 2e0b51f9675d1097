"""What is known of a clip -> the words that a language model gets. One row of `SOURCES` is one data set's form.

Notable:
- Fields of a metadata row are those of `data/closed_qa.py`, and of the original's files where they are known:
  `audio_id`; `events` [{"label", "onset", "offset" in s, "description"?}], or `temporal`, the same as text; `caption`;
  `labels`; `text`; `gender`; `pitch` (mean F0 in Hz; or, beside `pitch_detail` in Hz, its rank among all speakers);
  `energy`, `speed`, `emotion` in words; `sentiment` -3 to 3; `age` (estimated, years); `genre`.
- The original calls every top pitch "very high (>240 Hz)"; here the bound is the gender's own, 180 or 270 Hz.
- `text` and `input` are taken as they are, but for white space at their ends. Whisper's text is expected already clean,
  as `python -m ltu_as.extract_whisper_feature` writes it: thanks to viewers, which Whisper hallucinates in
  silence, would be asked about as if somebody had said them.
- The original adds a literal " {text}" to every message; it is left out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Hz, upper bounds of all ranks but the last.
PITCH_CUTS = {"male": (95, 120, 135, 180), "female": (160, 200, 220, 270)}
PITCH_RANKS = ("very low", "relatively low", "medium", "relatively high", "very high")
SENTIMENTS = (
    "highly negative", "negative", "weakly negative", "neutral", "weakly positive", "positive", "highly positive"
)  # fmt: skip
Row = dict[str, Any]
TEXT, TEXTS, NUMBER = "text", "text or a list of texts", "a number"
FORMS = {
    "audio_id": TEXT, "dataset": TEXT, "input": TEXT, "text": TEXT, "temporal": TEXT, "gender": TEXT, "energy": TEXT,
    "speed": TEXT, "emotion": TEXT, "caption": TEXTS, "labels": TEXTS, "genre": TEXTS, "instruments": TEXTS,
    "tempo": TEXTS, "mood": TEXTS, "pitch": "text or a number", "pitch_detail": NUMBER, "age": NUMBER,
    "sentiment": NUMBER, "events": "a list of events", "label": TEXT, "description": TEXT, "onset": NUMBER,
    "offset": NUMBER,
}  # fmt: skip
ALWAYS = "audio_id dataset input text"  # fields that rows are made of, whatever the source


def pitch_rank(hertz: float, gender: str) -> str:
    """The rank among speakers of a gender, as in "medium (120-135 Hz)"."""
    if gender not in PITCH_CUTS:
        raise ValueError(f"gender {gender!r}, not one of {', '.join(PITCH_CUTS)}")
    if not 0 < hertz < 2000:
        raise ValueError(f"pitch {hertz}, not a frequency of a voice in Hz")
    cuts = PITCH_CUTS[gender]
    place = sum(hertz >= cut for cut in cuts)
    if place == 0:
        return f"{PITCH_RANKS[0]} (<{cuts[0]} Hz)"
    bound = f">{cuts[-1]}" if place == len(cuts) else f"{cuts[place - 1]}-{cuts[place]}"
    return f"{PITCH_RANKS[place]} ({bound} Hz)"


def sounds(row: Row) -> str:
    caption = next(iter(_texts(row.get("caption"))), "")
    return f"Sound Events: {_timed_events(row)}" + (f"; Description: {caption}" if caption else "")


def _timed_events(row: Row) -> str:
    if "temporal" in row:
        return row["temporal"]
    times: dict[str, list[str]] = {}
    for event in row["events"]:
        described = f" ({event['description']})" if event.get("description") else ""
        times.setdefault(f"{event['label']}{described}", []).append(
            f"{event['onset']:.1f}s-{event['offset']:.1f}s"
        )
    return "; ".join(f"{name}: [{', '.join(parts)}]" for name, parts in times.items())


def _texts(value: Any) -> list[str]:
    """Of a field that is text or a list of texts: those that say something."""
    return [
        text for text in (value if isinstance(value, list) else [value]) if not _is_absent(text)
    ]


def speech(row: Row) -> str:
    gender = row["gender"].strip().lower()
    hertz = row.get("pitch_detail", row.get("pitch"))
    if isinstance(hertz, str):
        raise ValueError(f"pitch: {hertz!r} is a rank; pitch_detail in Hz is needed beside it")
    rank = f", {row['pitch']} among all speakers" if isinstance(row.get("pitch"), str) else ""
    rank += f", {pitch_rank(hertz, gender)} among {gender} speakers"
    facts = [f'Spoken words: "{row["text"].strip()}"', f"Gender: {gender}"]
    facts += [
        f"Fundamental frequency: {hertz:.0f} Hz{rank}",
        f"Volume: {row['energy']}",
        f"Speed: {row['speed']}",
    ]
    facts += [f"Emotion: {row['emotion']}"] if row.get("emotion") else []
    if (sentiment := row.get("sentiment")) is not None:
        if not -3 <= sentiment <= 3:
            raise ValueError(f"sentiment {sentiment}, not within -3 to 3")
        facts.append(f"Sentiment: {sentiment:g} ({SENTIMENTS[round(sentiment) + 3]})")
    facts += [f"Estimated age: {row['age']:.0f} years"] if row.get("age") else []
    return "; ".join(facts)


def music(row: Row) -> str:
    known = {
        name: ", ".join(_texts(row.get(name))) for name in ("genre", "instruments", "tempo", "mood")
    }
    return "; ".join(f"{name.capitalize()}: {words}" for name, words in known.items() if words)


def joint(row: Row) -> str:
    labels = row["labels"] if isinstance(row["labels"], list) else row["labels"].split(";")
    labels = [label.strip() for label in labels if label.strip()]
    manner = "singing" if any("singing" in label.lower() for label in labels) else "speech"
    return f'Sounds: {"; ".join(labels)}; {manner} of "{row["text"].strip()}"'


@dataclass(frozen=True)
class Source:
    """facts: what a row says in the fields of `needs` (alternatives with |) and `takes` (others, where they are there)
    -> the user's message. min_words: of an answer."""

    facts: Callable[[Row], str]
    needs: str
    takes: str
    prompt: str
    count: int
    min_words: int = 11
    infers: bool = False


VOICE, MORE = "text gender pitch_detail|pitch energy speed", "pitch emotion sentiment age"
SOURCES = {
    "audioset_strong": Source(sounds, "temporal|events", "caption", "sounds", 10, min_words=4),
    "iemocap": Source(speech, f"{VOICE} emotion", MORE, "speech", 20),
    "mosei": Source(speech, f"{VOICE} emotion sentiment", MORE, "speech", 20),
    "libritts": Source(speech, VOICE, MORE, "speech", 20),
    "voxceleb": Source(speech, f"{VOICE} age", MORE, "speech", 10),
    "fma": Source(music, "genre", "instruments tempo mood", "music", 5),
    "joint_v1": Source(joint, "text labels", "", "joint", 10),
    "joint_v2": Source(joint, "text labels", "", "joint", 10, infers=True),
}


def message(source: Source, row: Row) -> str:
    """The user's message about a row, all of whose fields that count have been looked at.

    Raises:
        ValueError: a field is missing or not of its form; says which.
    """
    used = (ALWAYS + " " + source.takes).split()
    for need in source.needs.split():
        found = [name for name in need.split("|") if not _is_absent(row.get(name))]
        if not found:
            raise ValueError(f"no {need.replace('|', ' or ')}")
        used.append(found[0])
    used = {name: row[name] for name in used if not _is_absent(row.get(name))}
    for name, value in used.items():
        _check(name, value)
    return source.facts(used)


def _is_absent(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_absent, value))
    return value is None or (isinstance(value, str) and not value.strip(" \t\r\n;"))


def _check(name: str, value: Any, within: str = "") -> None:
    """ValueError: a field is not of its form."""
    form = FORMS[name]
    if (
        name == "events"
        and isinstance(value, list)
        and all(isinstance(event, dict) for event in value)
    ):
        for event in value:
            for part in ("label", "onset", "offset", "description"):
                if part != "description" or event.get(part) is not None:
                    _check(part, event.get(part), "events: ")
        return
    values = value if form == TEXTS and isinstance(value, list) else [value]
    if all(isinstance(part, str) for part in values) and "text" in form:
        if re.search("[\ud800-\udfff]", "".join(values)):
            raise ValueError(
                f"{within}{name}: {value!r:.80} has half a character, which no request can carry"
            )
    elif not (form.endswith(NUMBER) and type(value) in (int, float) and -1e9 < value < 1e9):
        raise ValueError(f"{within}{name}: {value!r:.80} is not {form}")
