"""Turns what is known of a clip into the user message for a language model.

Each entry of `SOURCES` is the format of one data set. The fields of a metadata row are those of
`data/closed_qa.py` and, where they are known, of the original's files: `audio_id`; `events`
[{"label", "onset", "offset" in s, "description"?}], or `temporal`, the same as text; `caption`;
`labels`; `text`; `gender`; `pitch` (mean F0 in Hz or, with `pitch_detail` in Hz, the rank among all
speakers); `energy`, `speed` and `emotion` as text; `sentiment` from -3 to 3; `age` (estimated, in
years); `genre`.

The original calls every top pitch "very high (>240 Hz)". Here the bound is that of the gender, 180
or 270 Hz. The original adds a literal " {text}" to every message, which is left out.

`text` and `input` are used as they are, except for white space at their ends. Whisper's transcripts
must already be clean, as `python -m ltu_as.extract_whisper_feature` writes them: otherwise the
language model would treat thanks to viewers, which Whisper hallucinates in silence, as speech.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Upper bounds in Hz of all ranks but the last.
PITCH_CUTS = {"male": (95, 120, 135, 180), "female": (160, 200, 220, 270)}
PITCH_RANKS = ("very low", "relatively low", "medium", "relatively high", "very high")
SENTIMENTS = (
    "highly negative",
    "negative",
    "weakly negative",
    "neutral",
    "weakly positive",
    "positive",
    "highly positive",
)
MetadataRow = dict[str, Any]
TEXT = "text"
TEXTS = "text or a list of texts"
NUMBER = "a number"
# Field -> the type that it must have, as error messages name it.
FORMS = {
    "audio_id": TEXT,
    "dataset": TEXT,
    "input": TEXT,
    "text": TEXT,
    "temporal": TEXT,
    "gender": TEXT,
    "energy": TEXT,
    "speed": TEXT,
    "emotion": TEXT,
    "caption": TEXTS,
    "labels": TEXTS,
    "genre": TEXTS,
    "instruments": TEXTS,
    "tempo": TEXTS,
    "mood": TEXTS,
    "pitch": "text or a number",
    "pitch_detail": NUMBER,
    "age": NUMBER,
    "sentiment": NUMBER,
    "events": "a list of events",
    "label": TEXT,
    "description": TEXT,
    "onset": NUMBER,
    "offset": NUMBER,
}
ALWAYS = "audio_id dataset input text"  # fields of the generated examples, whatever the source


def pitch_rank(hertz: float, gender: str) -> str:
    """Return the rank among speakers of a gender, as in "medium (120-135 Hz)".

    Raises:
        ValueError: The gender is unknown, or the pitch is not that of a voice.
    """
    if gender not in PITCH_CUTS:
        raise ValueError(f"gender {gender!r}, not one of {', '.join(PITCH_CUTS)}")
    if not 0 < hertz < 2000:
        raise ValueError(f"pitch {hertz}, not a frequency of a voice in Hz")
    cuts = PITCH_CUTS[gender]
    rank = sum(hertz >= cut for cut in cuts)
    if rank == 0:
        bound = f"<{cuts[0]}"
    elif rank == len(cuts):
        bound = f">{cuts[-1]}"
    else:
        bound = f"{cuts[rank - 1]}-{cuts[rank]}"
    return f"{PITCH_RANKS[rank]} ({bound} Hz)"


def sounds(row: MetadataRow) -> str:
    """Return the facts of sound events."""
    facts = f"Sound Events: {_timed_events(row)}"
    captions = _texts(row.get("caption"))
    return f"{facts}; Description: {captions[0]}" if captions else facts


def _timed_events(row: MetadataRow) -> str:
    if "temporal" in row:
        return row["temporal"]
    times: dict[str, list[str]] = {}
    for event in row["events"]:
        name = event["label"]
        if event.get("description"):
            name += f" ({event['description']})"
        times.setdefault(name, []).append(f"{event['onset']:.1f}s-{event['offset']:.1f}s")
    return "; ".join(f"{name}: [{', '.join(parts)}]" for name, parts in times.items())


def _texts(value: Any) -> list[str]:
    """Return the texts of a field that is text or a list of texts, without those that are empty."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if not _is_absent(text)]


def speech(row: MetadataRow) -> str:
    """Return the facts of speech.

    Raises:
        ValueError: A value is out of range, or the pitch is only a rank.
    """
    gender = row["gender"].strip().lower()
    hertz = row.get("pitch_detail", row.get("pitch"))
    if isinstance(hertz, str):
        raise ValueError(f"pitch: {hertz!r} is a rank; pitch_detail in Hz is needed too")
    ranks = [f"{pitch_rank(hertz, gender)} among {gender} speakers"]
    if isinstance(row.get("pitch"), str):
        ranks.insert(0, f"{row['pitch']} among all speakers")
    facts = [
        f'Spoken words: "{row["text"].strip()}"',
        f"Gender: {gender}",
        f"Fundamental frequency: {hertz:.0f} Hz, {', '.join(ranks)}",
        f"Volume: {row['energy']}",
        f"Speed: {row['speed']}",
    ]
    if row.get("emotion"):
        facts.append(f"Emotion: {row['emotion']}")
    sentiment = row.get("sentiment")
    if sentiment is not None:
        if not -3 <= sentiment <= 3:
            raise ValueError(f"sentiment {sentiment}, not within -3 to 3")
        facts.append(f"Sentiment: {sentiment:g} ({SENTIMENTS[round(sentiment) + 3]})")
    if row.get("age"):
        facts.append(f"Estimated age: {row['age']:.0f} years")
    return "; ".join(facts)


def music(row: MetadataRow) -> str:
    """Return the facts of music."""
    facts = []
    for name in ("genre", "instruments", "tempo", "mood"):
        texts = _texts(row.get(name))
        if texts:
            facts.append(f"{name.capitalize()}: {', '.join(texts)}")
    return "; ".join(facts)


def joint(row: MetadataRow) -> str:
    """Return the facts of a clip with speech and other sounds."""
    labels = row["labels"] if isinstance(row["labels"], list) else row["labels"].split(";")
    labels = [label.strip() for label in labels if label.strip()]
    manner = "singing" if any("singing" in label.lower() for label in labels) else "speech"
    return f'Sounds: {"; ".join(labels)}; {manner} of "{row["text"].strip()}"'


@dataclass(frozen=True)
class Source:
    """The format of a data set.

    Args:
        facts: Maps the fields of a row that are used to the user message.
        needs: Required fields, alternatives separated by |.
        takes: Optional fields.
        prompt: Name of the file of the system prompt.
        count: Number of questions to generate.
        min_words: Minimum length of an answer.
        infers: A paragraph about the clip is generated first.
    """

    facts: Callable[[MetadataRow], str]
    needs: str
    takes: str
    prompt: str
    count: int
    min_words: int = 11
    infers: bool = False


VOICE = "text gender pitch_detail|pitch energy speed"
MORE = "pitch emotion sentiment age"
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


def message(source: Source, row: MetadataRow) -> str:
    """Return the user message about a row after checking all fields that are used.

    Raises:
        ValueError: A field is missing or has the wrong type. The message names it.
    """
    names = (ALWAYS + " " + source.takes).split()
    for need in source.needs.split():
        found = [name for name in need.split("|") if not _is_absent(row.get(name))]
        if not found:
            raise ValueError(f"no {need.replace('|', ' or ')}")
        names.append(found[0])
    used = {name: row[name] for name in names if not _is_absent(row.get(name))}
    for name, value in used.items():
        _check(name, value)
    return source.facts(used)


def _is_absent(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_absent, value))
    return value is None or (isinstance(value, str) and not value.strip(" \t\r\n;"))


def _check(name: str, value: Any, prefix: str = "") -> None:
    """Check the type of a field.

    Args:
        prefix: Name of the field that contains it, for the error message.

    Raises:
        ValueError: The field has the wrong type.
    """
    if name == "events" and isinstance(value, list):
        if all(isinstance(event, dict) for event in value):
            for event in value:
                _check_event(event)
            return
    form = FORMS[name]
    values = value if form == TEXTS and isinstance(value, list) else [value]
    if "text" in form and all(isinstance(part, str) for part in values):
        if re.search("[\ud800-\udfff]", "".join(values)):
            raise ValueError(
                f"{prefix}{name}: {value!r:.80} has half a character, which no request can carry"
            )
        return
    is_number = type(value) in (int, float) and -1e9 < value < 1e9
    if not (form.endswith(NUMBER) and is_number):
        raise ValueError(f"{prefix}{name}: {value!r:.80} is not {form}")


def _check_event(event: dict) -> None:
    for name in ("label", "onset", "offset", "description"):
        if name != "description" or event.get(name) is not None:
            _check(name, event.get(name), "events: ")
