r"""Generates closed-ended questions and answers by rule from the metadata of your own clips.

    python -m data.closed_qa --metadata CLIPS.csv --output_path EXAMPLES.json --dataset my_set
    python -m data.closed_qa --metadata OWNER/NAME::train --output_path EXAMPLES.json \
        --columns labels=category
    python -m data.closed_qa --metadata CLIPS.json --output_path EXAMPLES.jsonl \
        --tasks cla_label cla_label_des --descriptions DESCRIPTIONS.json \
        --columns labels=tags audio_id=file_name --audio_ids OUT/audio_ids.csv

CLIPS is CSV, TSV, JSON, JSON lines, Parquet, a folder of datasets' save_to_disk or a dataset of the
hub, with one record for each clip. A record has `audio_id`, or a column of clips, and any of these
keys, from which the tasks on the right are generated:

    labels            list, or text with ";"    -> cla_label; cla_label_des, if all labels are in
                                                   --descriptions
    caption           text, or a list of texts  -> caption, an example for each
    events            list of {"label", "onset", "offset"} in seconds
                                                -> temporal_order, _first, _single, _all
    gender, age       "female" ..., years       -> gender_cla, age_cla
    pitch, speed, energy   a word, or a number  -> pitch_cla, speed_cla, energy_cla
    emotion           a word                    -> emotion_cla; gender_emotion_cla, with `gender`
    sentiment         of MOSEI, -3 to 3         -> emotion_bin, emotion_score; emotion_detail, with
                                                   `emotion`
    genre             list, or text with ";"    -> genre_cla
    text              the transcript            -> asr
    input             the transcript by Whisper, for every example. Without it, `input` is "" or,
                      if the record has `text`, is left out, so that LTU-AS transcribes the clip.

The answers have the formats of the papers' data and evaluators. The questions are our own; they are
in closed_qa.json. The prefix "Closed-ended question: " of the papers' data is added by
`data.combine`, or here with --prefix_fraction.

A number becomes a name such as "high". For pitch in Hz the cut points depend on the gender, as in
the papers, unless --cuts gives others. The cut points of speed and energy are those of --cuts or,
without them, divide the numbers into thirds.

Every example has a random stream of its own, which the seed, the clip, the task and the
value of the key determine. Other examples do not change it.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import numpy as np

from data.audio_ids import read_cells
from data.combine import CLOSED_ENDED
from data.command_line import command_parser
from data.provenance import audio_root_of, write_examples, write_provenance
from ltu.data.dataset_io import stream_examples
from ltu.data.dataset_source import DatasetSource, find_dataset
from ltu.data.table_reader import map_all_columns, table_examples
from ltu.files import run_command

# Cut points in Hz between the five names of pitch, as in LTU-AS's own generators.
PITCH = {"male": (95.0, 120.0, 135.0, 180.0), "female": (160.0, 200.0, 220.0, 270.0)}
# Key -> names for two cut points, and names for four.
NAMES = {
    "pitch": (("low", "medium", "high"), ("very low", "low", "medium", "high", "very high")),
    "speed": (("slow", "normal", "fast"), ("very slow", "slow", "normal", "fast", "very fast")),
    "energy": (("low", "medium", "high"), ("very low", "low", "medium", "high", "very high")),
}
GENDERS = {
    "m": "male",
    "f": "female",
    "man": "male",
    "woman": "female",
    "male": "male",
    "female": "female",
}

# Keys of a record, by the types of their values; see `check_types`.
TEXT_KEYS = ("dataset", "gender", "emotion", "text", "input")
NUMBER_KEYS = ("age", "pitch", "speed", "energy", "sentiment")
LIST_KEYS = ("labels", "caption", "genre")

CELLS = (".csv", ".tsv")  # Suffixes of metadata that are no dataset.

Fields = dict[str, str]  # Placeholder in a question or an answer -> the text that fills it.


@dataclass
class RuleSettings:
    """Settings of the rules.

    Attributes:
        dataset: name of the dataset, for records without one.
        seed: of the random streams.
        prefix_fraction: fraction of the questions that begin with `CLOSED_ENDED`.
        style: style that questions about captions name, or None.
        descriptions: label -> acoustic descriptions.
        cuts: key -> cut points, or {gender: cut points}.
    """

    dataset: str
    seed: int = 0
    prefix_fraction: float = 0.0
    style: str | None = None
    descriptions: dict[str, list[str]] = field(default_factory=dict)
    cuts: dict[str, Any] = field(default_factory=dict)


def make_question(
    questions: list[str], answer: str, fields: Fields, rng: Random, prefix_fraction: float
) -> tuple[str, str]:
    """Select a question and fill its placeholders and those of the answer.

    Args:
        questions: templates, of which one is selected.
        answer: template of the answer.
        fields: fill both.
        rng: selects the question and whether it begins with `CLOSED_ENDED`.
        prefix_fraction: fraction of the questions that do.

    Returns:
        question and answer.
    """
    question = rng.choice(questions)
    if prefix_fraction and rng.random() < prefix_fraction:
        question = CLOSED_ENDED + question
    return question.format(**fields), answer.format(**fields)


def make_example(
    question: str, answer: str, audio_id: str, dataset: str, task: str, text: str | None = ""
) -> dict[str, str]:
    """Return an example with its keys in the order of the papers' data.

    The key `input` is left out if `text` is None.
    """
    example = {"instruction": question}
    if text is not None:
        example["input"] = text
    return example | {"audio_id": audio_id, "dataset": dataset, "task": task, "output": answer}


def name_of(value: float, cuts: tuple[float, ...], names: tuple[str, ...]) -> str:
    """Return the name of the interval that a value is in.

    A value that equals a cut point is in the upper interval. There is one name more than there are
    cut points.
    """
    return names[sum(value >= cut for cut in cuts)]


def thirds(values: list[float]) -> tuple[float, float]:
    """Return the two values that divide others into thirds."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return float(low), float(high)


def number_of(value: Any) -> float | None:
    """Return the finite number that a value or its text is, or None."""
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def gender_of(record: dict) -> str | None:
    """Return "male", "female" or None."""
    return GENDERS.get(str(record.get("gender")).strip().lower())


def listed(value: Any) -> list[str]:
    """Return the non-empty items of a list, or of a text that separates them with ";"."""
    if isinstance(value, str):
        value = value.split(";")
    items = []
    for item in value or []:
        text = str(item).strip()
        if text:
            items.append(text)
    return items


def check_types(record: dict) -> None:
    """Check the types of all values that a task may use.

    Raises:
        TypeError: text, a number (also as text) or a list of texts (or one text) is expected, and
            the value is another; or events are no list of objects.
    """
    for key in TEXT_KEYS:
        _check_type(key, record.get(key), str)
    for key in NUMBER_KEYS:
        _check_type(key, record.get(key), str, int, float)
    for key in LIST_KEYS:
        value = record.get(key)
        _check_type(key, value, str, list)
        for item in value if isinstance(value, list) else []:
            _check_type(f"an item of {key}", item, str)
    events = record.get("events")
    _check_type("events", events or None, list)
    for event in events or []:
        _check_type("an event", event, dict)
        _check_type("label of an event", event["label"], str)


def _check_type(name: str, value: Any, *types: type) -> None:
    """Check that a value has one of the types or is null; a bool is no number."""
    if value is not None and type(value) not in types:
        expected = " or ".join(kind.__name__ for kind in types)
        raise TypeError(f"{name} is a {type(value).__name__}, not {expected}")


# The functions below return the fields of each example of a task. They take a record, a random
# stream and the settings, and return an empty list if the record does not contain enough.


def label_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    return [{"labels": "; ".join(listed(record["labels"]))}]


def described_label_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    labels = listed(record["labels"])
    descriptions = settings.descriptions
    if not all(descriptions.get(label) for label in labels):
        return []
    described = [f"{rng.choice(descriptions[label])} -> {label}" for label in labels]
    return [{"labels": "; ".join(described)}]


def caption_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    captions = record["caption"]
    if isinstance(captions, str):
        captions = [captions]
    style = f", in {settings.style} style" if settings.style else ""
    return [{"caption": text.strip(), "style": style} for text in captions if text.strip()]


class Event(NamedTuple):
    """A sound event, in seconds. Events are sorted by their onsets."""

    onset: float
    offset: float
    label: str


def event_fields(kind: str, record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    events = []
    for event in record["events"]:
        onset = number_of(event["onset"])
        offset = number_of(event["offset"])
        if onset is None or offset is None:
            raise ValueError(f"onset or offset of {event['label']!r} is not a number")
        events.append(Event(onset, offset, event["label"]))
    events.sort()
    spans = defaultdict(list)
    for event in events:
        spans[event.label].append(f"{event.onset:.1f}-{event.offset:.1f}")
    described = {label: f"{label}: [{', '.join(times)}]" for label, times in spans.items()}
    if kind == "all":
        return [{"events": "; ".join(described.values())}]
    if kind == "single":
        label = rng.choice(list(described))
        return [{"label": label, "events": described[label]}]
    # No event is first if two begin at the same time. None begins and ends first if the one that
    # begins first outlasts another.
    is_tied = len({event.onset for event in events}) < len(events)
    is_outlasting = events[0].offset >= min((event.offset for event in events[1:]), default=0.0)
    if len(spans) < 2 or is_tied or (kind == "first" and is_outlasting):
        return []
    labels = [label for label, _ in groupby(events, key=lambda event: event.label)]
    return [{"first": labels[0], "order": "; ".join(labels)}]


def level_fields(key: str, record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    value = number_of(record[key])
    if value is None:
        word = str(record[key]).strip().lower()
        return [] if word.strip("+-") in ("nan", "inf", "infinity") else [{key: word}]
    cuts = settings.cuts.get(key)
    if isinstance(cuts, dict):
        cuts = cuts.get(gender_of(record))
    if not cuts:
        return []
    names_of_three, names_of_five = NAMES[key]
    names = names_of_five if len(cuts) > 2 else names_of_three
    return [{key: name_of(value, cuts, names)}]


def polarity_of(score: float) -> str:
    """Return "positive", "negative" or, for 0, "neutral"."""
    if score > 0:
        return "positive"
    return "negative" if score < 0 else "neutral"


def emotion_fields(kind: str, record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    emotion = str(record.get("emotion") or "").strip()
    if kind == "gender":
        gender = gender_of(record)
        return [{"gender": gender.capitalize(), "emotion": emotion.lower()}] if gender else []
    fields = {"emotion": emotion.capitalize()} if kind in ("cla", "detail") else {}
    if kind == "cla":
        return [fields]
    score = number_of(record.get("sentiment"))
    if score is None or not -3 <= score <= 3:
        return []
    polarity = polarity_of(score)
    if kind == "bin":
        polarity = polarity.capitalize()
    # Adding 0.0 turns -0.0 into 0.0.
    return [fields | {"side": polarity, "score": f"{score + 0.0:g}"}]


def gender_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    gender = gender_of(record)
    return [{"gender": gender.capitalize()}] if gender else []


def age_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    years = number_of(record["age"])
    return [] if years is None else [{"age": str(round(years))}]


def genre_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    return [{"genre": ", ".join(listed(record["genre"]))}]


def transcript_fields(record: dict, rng: Random, settings: RuleSettings) -> list[Fields]:
    return [{"text": str(record["text"]).strip()}]


class Task(NamedTuple):
    """The key of a record that a task needs, and the function that returns its fields."""

    key: str
    fields_of: Callable[[dict, Random, RuleSettings], list[Fields]]


TASKS: dict[str, Task] = {
    "cla_label": Task("labels", label_fields),
    "cla_label_des": Task("labels", described_label_fields),
    "caption": Task("caption", caption_fields),
    "temporal_order": Task("events", partial(event_fields, "order")),
    "temporal_first": Task("events", partial(event_fields, "first")),
    "temporal_single": Task("events", partial(event_fields, "single")),
    "temporal_all": Task("events", partial(event_fields, "all")),
    "gender_cla": Task("gender", gender_fields),
    "age_cla": Task("age", age_fields),
    "pitch_cla": Task("pitch", partial(level_fields, "pitch")),
    "speed_cla": Task("speed", partial(level_fields, "speed")),
    "energy_cla": Task("energy", partial(level_fields, "energy")),
    "emotion_cla": Task("emotion", partial(emotion_fields, "cla")),
    # A score of 0 is neither positive nor negative; its answer is "Neutral."
    "emotion_bin": Task("sentiment", partial(emotion_fields, "bin")),
    "emotion_detail": Task("emotion", partial(emotion_fields, "detail")),
    "emotion_score": Task("sentiment", partial(emotion_fields, "score")),
    "gender_emotion_cla": Task("emotion", partial(emotion_fields, "gender")),
    "genre_cla": Task("genre", genre_fields),
    "asr": Task("text", transcript_fields),
}


def examples_of(
    record: dict, tasks: list[str], texts: dict, settings: RuleSettings
) -> Iterator[dict[str, str]]:
    """Yield all examples of one record.

    Args:
        record: of a clip; see the docstring of the module.
        tasks: names of `TASKS`.
        texts: content of closed_qa.json: task -> {"answer", "questions"}.
        settings: of the rules.
    """
    for name in tasks:
        task = TASKS[name]
        value = record.get(task.key)
        if value in (None, "", []):
            continue
        rng = Random(f"{settings.seed}/{record['audio_id']}/{name}/{value}")
        for fields in task.fields_of(record, rng, settings):
            # Leave out empty texts; only the style may be empty.
            if any(not text.strip() and key != "style" for key, text in fields.items()):
                continue
            question, answer = make_question(
                texts[name]["questions"],
                texts[name]["answer"],
                fields,
                rng,
                settings.prefix_fraction,
            )
            transcript = record.get("input", None if record.get("text") else "")
            dataset = record.get("dataset") or settings.dataset
            yield make_example(question, answer, record["audio_id"], dataset, name, transcript)


def read_records(
    file: "Path | DatasetSource",
    columns: dict[str, list[str]],
    separator: str,
    audio_ids: dict | None,
) -> Iterator[dict]:
    """Yield the records of a metadata file with the keys that the tasks need.

    A cell of a table may contain JSON.

    Args:
        file: the metadata: a CSV or TSV file, or a dataset.
        columns: our key -> keys of the file; several of them make a list.
        separator: between labels, or genres, in a text.
        audio_ids: id of a clip in the file -> `audio_id`; other clips are left out. None: the ids
            of the file are used.

    Raises:
        ValueError: a record has no `audio_id`, or the file cannot be read.
    """
    records = _rows(file) if isinstance(file, DatasetSource) else _table(file)
    if isinstance(file, DatasetSource):
        file = file.path
    for number, record in enumerate(records, start=1):
        # Rename the columns of --columns.
        for ours, theirs in columns.items():
            values = [record[name] for name in theirs if record.get(name) not in (None, "")]
            if len(theirs) > 1:
                record[ours] = values
            elif values:
                record[ours] = values[0]
            else:
                record[ours] = None
        # Split texts at the separator of --separator; `listed` splits at ";" only.
        for key in ("labels", "genre"):
            if isinstance(record.get(key), str):
                record[key] = record[key].split(separator)
        audio_id = record.get("audio_id")
        if not audio_id:
            raise ValueError(
                f"{file}, record {number} has no audio_id, only {list(record)}: "
                "--columns audio_id=NAME"
            )
        if not isinstance(audio_id, str):
            raise ValueError(
                f"{file}, record {number}: audio_id is a {type(audio_id).__name__}, not text."
            )
        if audio_ids is None:
            yield record
        elif audio_id in audio_ids:
            yield record | {"audio_id": audio_ids[audio_id]}


def _rows(source: DatasetSource) -> Iterator[dict]:
    """Yield the records of a dataset with all their keys, and `audio_id` for a clip in a table."""
    if not _has_clips(source):
        return stream_examples(source)
    return table_examples(source, map_all_columns(source))


def _has_clips(source: DatasetSource) -> bool:
    """Return whether a dataset is a table with a column of clips."""
    return source.kind != "json" and map_all_columns(source) is not None


def _table(file: Path) -> Iterator[dict]:
    """Yield the lines of a CSV or TSV file as dicts, with the names of its first line as keys."""
    lines = read_cells(file)
    _, names = next(lines, (0, []))
    for number, cells in lines:
        if any(cells[len(names) :]):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells under {len(names)} names. "
                "Quote the commas."
            )
        record = {}
        # Spreadsheets leave out empty cells at the end of a line.
        for name, cell in zip(names, cells, strict=False):
            is_json = cell[:2] in ("[{", '["')
            try:
                record[name] = json.loads(cell) if is_json else cell
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{file}, line {number}: a cell begins like JSON but is not JSON: {error}"
                ) from error
        yield record


def find_cuts(records: Iterator[dict], given: dict) -> dict:
    """Return the cut points of every key that has numbers.

    Args:
        records: of all clips.
        given: cut points of --cuts, which replace all others.

    Returns:
        those given, the papers' for pitch, and thirds of the numbers for speed and energy.
    """
    numbers: dict[str, list[float]] = {}
    for key in NAMES:
        if key not in given and key != "pitch":
            numbers[key] = []
    for record in records:
        for key, values in numbers.items():
            number = number_of(record.get(key))
            if number is not None:
                values.append(number)
    cuts = {"pitch": PITCH} | given
    for key, values in numbers.items():
        if not values:
            continue
        low, high = thirds(values)
        if low < high:
            cuts[key] = low, high
        else:  # All equal numbers would be in the upper third.
            print(
                f"{key}: no thirds, too many are {low:g}, so its numbers make no examples. "
                "Give --cuts."
            )
    return cuts


def read_cuts(file: Path) -> dict:
    """Read the file of --cuts.

    Raises:
        ValueError: a key, or a gender of it, does not have 2 or 4 ascending numbers.
    """
    try:
        given = msgspec.json.decode(file.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _cuts_error(file, str(error), None) from error
    if not isinstance(given, dict):
        raise _cuts_error(file, "", given)
    for key, cuts in given.items():
        lists = list(cuts.values()) if isinstance(cuts, dict) else [cuts]
        for points in lists:
            if key not in NAMES or not _are_cut_points(points):
                raise _cuts_error(file, key, cuts)
    return given


def _are_cut_points(points: Any) -> bool:
    """Return whether a value is a list of 2 or 4 ascending numbers."""
    if not isinstance(points, list) or len(points) not in (2, 4):
        return False
    if not all(isinstance(point, int | float) for point in points):
        return False
    return sorted(set(points)) == points


def _cuts_error(file: Path, key: str, cuts: Any) -> ValueError:
    return ValueError(
        f"{file}: {key!r}: {cuts}. Give 2 or 4 ascending numbers for one of {[*NAMES]}."
    )


def read_descriptions(file: Path) -> dict[str, list[str]]:
    """Read the file of --descriptions: label -> acoustic descriptions.

    Raises:
        ValueError: it is anything else.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}. Give a JSON object: label -> list of texts.") from error


def read_audio_ids(file: Path) -> dict[str, str]:
    """Read audio_ids.csv of data.prepare_audio: id -> `audio_id`.

    Raises:
        ValueError: a column is missing.
    """
    try:
        return {line["id"]: line["audio_id"] for line in _table(file)}
    except KeyError as name:
        raise ValueError(
            f"{file} has no column {name}. Let its first line be id,audio_id."
        ) from name


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `columns` becomes a dict, our key -> keys of the file."""
    parser = command_parser(__doc__, data_path=None)
    parser.add_argument(
        "--metadata",
        required=True,
        type=Path,
        metavar="CLIPS",
        help="The metadata of the clips: CSV, TSV, JSON, JSON lines, Parquet, a folder of "
        "datasets' save_to_disk, or OWNER/NAME[:CONFIG[:SPLIT]] of the hub.",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help="The tasks to generate (default: all).",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="Other names of the keys in CLIPS; OURS=A,B makes a list of two columns.",
    )
    parser.add_argument(
        "--separator", default=";", help="The separator of labels and genres in a text."
    )
    parser.add_argument(
        "--audio_ids",
        type=Path,
        help="audio_ids.csv of data.prepare_audio. Clips that are not in it are left out.",
    )
    parser.add_argument(
        "--dataset", default="own", help="The name of the dataset, for records without one."
    )
    parser.add_argument(
        "--descriptions",
        type=Path,
        help="A JSON file: label -> list of short acoustic descriptions.",
    )
    parser.add_argument(
        "--cuts",
        type=Path,
        help="A JSON file: key -> 2 or 4 cut points, or {gender: cut points}.",
    )
    parser.add_argument(
        "--style", help="The style that questions about captions name: AudioCaps, Clotho."
    )
    parser.add_argument(
        "--prefix_fraction",
        type=float,
        default=0.0,
        help=f"The fraction of questions that begin with {CLOSED_ENDED!r}.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the random streams (default: 0)."
    )
    args = parser.parse_args(argv)
    columns = {}
    for pair in args.columns:
        ours, sign, theirs = pair.partition("=")
        if not sign:
            parser.error(f"--columns takes pairs like labels=tags, got {args.columns}")
        columns[ours] = theirs.split(",")
    args.columns = columns
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # Read the templates, and everything that the rules need besides the records.
    metadata = args.metadata
    if metadata.suffix.lower() not in CELLS:
        metadata = find_dataset(metadata)
    inputs = list(filter(None, [metadata, args.audio_ids, args.descriptions, args.cuts]))
    texts = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    audio_ids = read_audio_ids(args.audio_ids) if args.audio_ids else None
    read = partial(read_records, metadata, args.columns, args.separator, audio_ids)
    settings = RuleSettings(args.dataset, args.seed, args.prefix_fraction, args.style)
    if args.descriptions:
        settings.descriptions = read_descriptions(args.descriptions)
    # Cut points are thirds of all numbers, so the metadata is read twice.
    given_cuts = read_cuts(args.cuts) if args.cuts else {}
    settings.cuts = find_cuts(read(), given_cuts)

    # Generate the examples, record by record.
    counts: Counter[str] = Counter()
    with write_examples(args.output_path, inputs) as output:
        for number, record in enumerate(read(), start=1):
            counts["records"] = number
            count_before = output.count
            try:
                check_types(record)
                for example in examples_of(record, args.tasks, texts, settings):
                    output.write(example)
                    counts[example["task"]] += 1
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{args.metadata}, record {number} ({record['audio_id']}): {error!r}. "
                    "Fix the record."
                ) from error
            counts["records without an example"] += output.count == count_before
        if not output.count:
            raise ValueError(
                f"{args.metadata}: none of {counts['records']} records makes an example: name the "
                "keys with --columns; spell ids as --audio_ids does (data.prepare_audio "
                "--clip_list CLIPS)."
            )
    # Record the settings, and print the counts.
    facts = {
        "dataset": settings.dataset,
        "seed": settings.seed,
        "prefix_fraction": settings.prefix_fraction,
        "style": settings.style,
        "cuts": settings.cuts,
        "columns": args.columns,
    }
    # The ids of audio_ids.csv are relative to its folder; those of other metadata may not be paths.
    if args.audio_ids:
        output_source = find_dataset(args.output_path)
        facts |= audio_root_of(args.output_path, [output_source], args.audio_ids.parent)
    elif isinstance(metadata, DatasetSource) and _has_clips(metadata):
        facts |= audio_root_of(args.output_path, [metadata])
    write_provenance(
        args.output_path, "closed_qa", inputs, **facts, tasks=args.tasks, counts=dict(counts)
    )
    listed_counts = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{args.output_path}: {output.count} examples: {listed_counts}")
    return 0


if __name__ == "__main__":
    run_command(main)
