"""What is known of a clip -> the words that a language model gets. One row of `SOURCES` is one data set's form.

Notable:
- Fields of a metadata row are those of `data/closed_qa.py`, and of the original's files where they are known:
  `audio_id`; `events` [{"label", "onset", "offset" in s, "description"?}], or `temporal`, the same as text; `caption`;
  `labels`; `text`; `gender`; `pitch` (mean F0 in Hz; or, beside `pitch_detail` in Hz, its rank among all speakers);
  `energy`, `speed`, `emotion` in words; `sentiment` -3 to 3; `age` (estimated, years); `genre`.
- The original calls every top pitch "very high (>240 Hz)"; here the bound is the gender's own, 180 or 270 Hz.
- The original adds a literal " {text}" to every message; it is left out.
"""

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
    caption = row.get("caption")
    caption = caption[0] if isinstance(caption, list) else caption
    return f"Sound Events: {_timed_events(row)}" + (f"; Description: {caption}" if caption else "")


def _timed_events(row: Row) -> str:
    if row.get("temporal"):
        return row["temporal"]
    times: dict[str, list[str]] = {}
    for event in row["events"]:
        described = f" ({event['description']})" if event.get("description") else ""
        times.setdefault(f"{event['label']}{described}", []).append(f"{event['onset']:.1f}s-{event['offset']:.1f}s")
    return "; ".join(f"{name}: [{', '.join(parts)}]" for name, parts in times.items())


def speech(row: Row) -> str:
    gender, hertz = row["gender"].lower(), row.get("pitch_detail", row.get("pitch"))
    rank = f", {row['pitch']} among all speakers" if isinstance(row.get("pitch"), str) else ""
    rank += f", {pitch_rank(hertz, gender)} among {gender} speakers"
    facts = [f'Spoken words: "{row["text"].strip()}"', f"Gender: {gender}"]
    facts += [f"Fundamental frequency: {hertz:.0f} Hz{rank}", f"Volume: {row['energy']}", f"Speed: {row['speed']}"]
    facts += [f"Emotion: {row['emotion']}"] if row.get("emotion") else []
    if (sentiment := row.get("sentiment")) is not None:
        if not -3 <= sentiment <= 3:
            raise ValueError(f"sentiment {sentiment}, not within -3 to 3")
        facts.append(f"Sentiment: {sentiment:g} ({SENTIMENTS[round(sentiment) + 3]})")
    facts += [f"Estimated age: {row['age']:.0f} years"] if row.get("age") else []
    return "; ".join(facts)


def music(row: Row) -> str:
    genre = row["genre"]
    facts = [f"Genre: {genre if isinstance(genre, str) else ', '.join(genre)}"]
    facts += [f"{name.capitalize()}: {row[name]}" for name in ("instruments", "tempo", "mood") if row.get(name)]
    return "; ".join(facts)


def joint(row: Row) -> str:
    labels = row["labels"] if isinstance(row["labels"], list) else [part.strip() for part in row["labels"].split(";")]
    manner = "singing" if any("singing" in label.lower() for label in labels) else "speech"
    return f'Sounds: {"; ".join(labels)}; {manner} of "{row["text"].strip()}"'


@dataclass(frozen=True)
class Source:
    """facts: a row -> the user's message. needs: its fields, alternatives with |. min_words: of an answer."""

    facts: Callable[[Row], str]
    needs: str
    prompt: str
    count: int
    min_words: int = 11
    infers: bool = False


VOICE = "text gender pitch_detail|pitch energy speed"
SOURCES = {
    "audioset_strong": Source(sounds, "temporal|events", "sounds", 10, min_words=4),
    "iemocap": Source(speech, f"{VOICE} emotion", "speech", 20),
    "mosei": Source(speech, f"{VOICE} emotion sentiment", "speech", 20),
    "libritts": Source(speech, VOICE, "speech", 20),
    "voxceleb": Source(speech, f"{VOICE} age", "speech", 10),
    "fma": Source(music, "genre", "music", 5),
    "joint_v1": Source(joint, "text labels", "joint", 10),
    "joint_v2": Source(joint, "text labels", "joint", 10, infers=True),
}


def message(source: Source, row: Row) -> str:
    """The user's message about a row.

    Raises:
        ValueError: a field is missing or not of its form; says which.
    """
    for need in source.needs.split():
        if all(row.get(name) in (None, "", []) for name in need.split("|")):
            raise ValueError(f"no {need.replace('|', ' or ')}")
    try:
        return source.facts(row)
    except (KeyError, TypeError, AttributeError) as error:
        fields = ", ".join(source.needs.split())
        raise ValueError(f"{fields}: one is not of its form ({error}); see qa_generation/sources.py") from None
