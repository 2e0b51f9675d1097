"""Closed-ended questions and answers by rule, from plain metadata: an OpenAQA-style set of one's own labels.

    python -m data.closed_qa --metadata CLIPS.csv --output_path ROWS.json --dataset my_set
    python -m data.closed_qa --metadata CLIPS.json --output_path ROWS.jsonl --tasks cla_label cla_label_des \
        --descriptions DESCRIPTIONS.json --columns labels=tags audio_id=file_name --audio_ids OUT/audio_ids.csv

CLIPS is CSV, TSV, JSON, JSON lines or Parquet, a record a clip: `audio_id`, and what is known of it:

    labels            list, or text with ";"    -> cla_label; cla_label_des, if all are in --descriptions
    caption           text, or a list of them   -> caption, a row for each
    events            list of {"label", "onset", "offset"} in seconds -> temporal_order, _first, _single, _all
    gender, age       "female" ..., years       -> gender_cla, age_cla
    pitch, speed, energy   a word, or a number  -> pitch_cla, speed_cla, energy_cla
    emotion           a word                    -> emotion_cla; gender_emotion_cla, with `gender`
    sentiment         MOSEI's, -3 to 3          -> emotion_bin, emotion_score; emotion_detail, with `emotion`
    genre             list, or text with ";"    -> genre_cla
    text              the words                 -> asr
    input             what Whisper made of it, for every row. Absent, `input` is "" or, where there is `text`, left out,
                      so that LTU-AS transcribes the clip.

Notable:
- Answers have the forms that the papers' data and evaluators have; questions are our own (closed_qa.json).
- A number becomes a word: pitch in Hz by gender at the papers' cut points, others by --cuts, else by thirds, if any.
- Every row draws from a random stream of its own, named by seed, clip, task and what is known: others do not change it.
- The data's prefix "Closed-ended question: " comes from `data.combine`; --prefix_share adds it here instead.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from data.audio_ids import read_cells
from data.closed_qa_sound import Words, captions, described, events, listed
from data.provenance import audio_root_of, write_provenance, write_rows
from ltu.data.dataset_files import stream_rows
from ltu.files import run_command

PREFIX = "Closed-ended question: "
# Hz, between the five names: the cut points of LTU-AS's own generators.
PITCH = {"male": (95.0, 120.0, 135.0, 180.0), "female": (160.0, 200.0, 220.0, 270.0)}
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


def ask(
    questions: list[str], answer: str, words: Words, rng: Random, prefix_share: float
) -> tuple[str, str]:
    """One of the questions, with the prefix in that share of the cases, and the answer; `words` fill both."""
    question = rng.choice(questions)
    if prefix_share and rng.random() < prefix_share:
        question = PREFIX + question
    return question.format(**words), answer.format(**words)


def make_row(
    asked: tuple[str, str], audio_id: str, dataset: str, task: str, text: str | None = ""
) -> dict[str, str]:
    """A row with its keys in the order of the papers' data; without `input` if `text` is None."""
    given = {} if text is None else {"input": text}
    return (
        {"instruction": asked[0]}
        | given
        | {"audio_id": audio_id, "dataset": dataset, "task": task, "output": asked[1]}
    )


def name_of(value: float, cuts: tuple[float, ...], names: tuple[str, ...]) -> str:
    """Which part a value lies in, of one more than there are cuts; a value on a cut belongs to the upper one."""
    return names[sum(value >= cut for cut in cuts)]


def thirds(values: list[float]) -> tuple[float, float]:
    """The two values that divide others into thirds."""
    import numpy as np

    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return float(low), float(high)


def number_of(value: Any) -> float | None:
    """The finite number that a value is or spells."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def gender_of(record: dict) -> str | None:
    return GENDERS.get(str(record.get("gender")).strip().lower())


# From a record, a random stream and `about` of `rows_of` to the words of a task's rows: none where it says too little.


def level(key: str, record: dict, rng: Random, about: dict) -> list[Words]:
    value, cuts = number_of(record[key]), about["cuts"].get(key)
    if value is None:
        word = str(record[key]).strip().lower()
        return [] if word.strip("+-") in ("nan", "inf", "infinity") else [{key: word}]
    cuts = cuts.get(gender_of(record)) if isinstance(cuts, dict) else cuts
    return [{key: name_of(value, cuts, NAMES[key][len(cuts) > 2])}] if cuts else []


def side(score: float) -> str:
    return "positive" if score > 0 else "negative" if score < 0 else "neutral"


def emotion(kind: str, record: dict, rng: Random, about: dict) -> list[Words]:
    name, score = str(record.get("emotion") or "").strip(), number_of(record.get("sentiment"))
    if kind == "gender":
        return (
            [{"gender": gender_of(record).capitalize(), "emotion": name.lower()}]
            if gender_of(record)
            else []
        )
    words = {"emotion": name.capitalize()} if kind in ("cla", "detail") else {}
    if kind == "cla":
        return [words]
    if score is None or not -3 <= score <= 3:
        return []
    polarity = side(score).capitalize() if kind == "bin" else side(score)
    return [words | {"side": polarity, "score": f"{score + 0.0:g}"}]  # No -0.


def gender(record: dict, rng: Random, about: dict) -> list[Words]:
    return [{"gender": gender_of(record).capitalize()}] if gender_of(record) else []


def age(record: dict, rng: Random, about: dict) -> list[Words]:
    years = number_of(record["age"])
    return [] if years is None else [{"age": str(round(years))}]


# Task -> the key that it needs of a record, and its words.
TASKS: dict[str, tuple[str, Callable[[dict, Random, dict], list[Words]]]] = {
    "cla_label": (
        "labels",
        lambda record, rng, about: [{"labels": "; ".join(listed(record["labels"]))}],
    ),
    "cla_label_des": ("labels", described),
    "caption": ("caption", captions),
    **{
        f"temporal_{kind}": ("events", partial(events, kind))
        for kind in ("order", "first", "single", "all")
    },
    "gender_cla": ("gender", gender),
    "age_cla": ("age", age),
    **{f"{key}_cla": (key, partial(level, key)) for key in NAMES},
    "emotion_cla": ("emotion", partial(emotion, "cla")),
    "emotion_bin": (
        "sentiment",
        partial(emotion, "bin"),
    ),  # A score of 0, neither of the two, is "neutral".
    "emotion_detail": ("emotion", partial(emotion, "detail")),
    "emotion_score": ("sentiment", partial(emotion, "score")),
    "gender_emotion_cla": ("emotion", partial(emotion, "gender")),
    "genre_cla": (
        "genre",
        lambda record, rng, about: [{"genre": ", ".join(listed(record["genre"]))}],
    ),
    "asr": ("text", lambda record, rng, about: [{"text": str(record["text"]).strip()}]),
}


def rows_of(record: dict, tasks: list[str], texts: dict, about: dict) -> Iterator[dict]:
    """All rows of one record.

    Args:
        texts: closed_qa.json: task -> {"answer", "questions"}.
        about: dataset, seed, prefix_share, style (of captions), descriptions (label -> list), cuts (key -> cut points,
            or {gender: cut points}).
    """
    for task in tasks:
        key, words_of = TASKS[task]
        if record.get(key) in (None, "", []):
            continue
        rng = Random(f"{about['seed']}/{record['audio_id']}/{task}/{record[key]}")
        for words in words_of(record, rng, about):
            if not all(value.strip() for name, value in words.items() if name != "style"):
                continue  # An empty text, or a list of them, says nothing.
            asked = ask(
                texts[task]["questions"], texts[task]["answer"], words, rng, about["prefix_share"]
            )
            text = record.get("input", None if record.get("text") else "")
            yield make_row(
                asked, record["audio_id"], record.get("dataset") or about["dataset"], task, text
            )


def read_records(
    file: Path, columns: dict[str, list[str]], separator: str, audio_ids: dict | None
) -> Iterator[dict]:
    """Records with our keys; those whose clip is not in `audio_ids` are left out. A cell of a table may hold JSON.

    Raises:
        ValueError: no `audio_id`, or no file that can be read.
    """
    is_table = file.suffix.lower() in (".csv", ".tsv")
    for number, record in enumerate(_table(file) if is_table else stream_rows(file), start=1):
        for ours, theirs in columns.items():
            values = [record[name] for name in theirs if record.get(name) not in (None, "")]
            record[ours] = values if len(theirs) > 1 else values[0] if values else None
        for key in ("labels", "genre"):
            if isinstance(record.get(key), str):
                record[key] = record[key].split(separator)
        if not record.get("audio_id"):
            raise ValueError(
                f"{file}, record {number} has no audio_id, only {list(record)}: --columns audio_id=NAME"
            )
        if audio_ids is None or record["audio_id"] in audio_ids:
            yield record | {
                "audio_id": (audio_ids or {}).get(record["audio_id"], record["audio_id"])
            }


def _table(file: Path) -> Iterator[dict]:
    lines = read_cells(file)
    _, names = next(lines, (0, []))
    for number, cells in lines:
        if any(cells[len(names) :]):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells under {len(names)} names. Quote the commas."
            )
        try:
            pairs = zip(
                names, cells, strict=False
            )  # Spreadsheets leave out empty cells at the end.
            yield {
                name: json.loads(cell) if cell[:2] in ("[{", '["') else cell for name, cell in pairs
            }
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: a cell begins like JSON but is none: {error}"
            ) from error


def find_cuts(records: Iterator[dict], given: dict) -> dict:
    """Cut points of every key that has numbers: those given, the papers' of pitch, thirds of the numbers of others."""
    values: dict[str, list[float]] = {
        key: [] for key in NAMES if key not in given and key != "pitch"
    }
    for record in records:
        for key, numbers in values.items():
            if (number := number_of(record.get(key))) is not None:
                numbers.append(number)
    cuts = {"pitch": PITCH} | given
    for key, numbers in values.items():
        low, high = thirds(numbers) if numbers else (0, 0)
        if low < high:
            cuts[key] = low, high
        elif numbers:  # All that are equal would be among the highest.
            print(
                f"{key}: no thirds, too many are {low:g}, so its numbers make no rows. Give --cuts."
            )
    return cuts


def read_cuts(file: Path) -> dict:
    """The cut points of --cuts; a ValueError unless they are 2 or 4 ascending numbers for a key, or a gender of it."""
    given = json.loads(file.read_bytes())
    for key, cuts in given.items() if isinstance(given, dict) else [("", given)]:
        for points in cuts.values() if isinstance(cuts, dict) else [cuts]:
            is_list = isinstance(points, list) and all(
                isinstance(point, int | float) for point in points
            )
            if (
                key not in NAMES
                or not is_list
                or len(points) not in (2, 4)
                or sorted(set(points)) != points
            ):
                raise ValueError(
                    f"{file}: {key!r}: {cuts}. Give 2 or 4 ascending numbers for one of {[*NAMES]}."
                )
    return given


def read_audio_ids(file: Path) -> dict[str, str]:
    """What data.prepare_audio wrote: id -> `audio_id`."""
    try:
        return {line["id"]: line["audio_id"] for line in _table(file)}
    except KeyError as name:
        raise ValueError(
            f"{file} has no column {name}. Let its first line be id,audio_id."
        ) from name


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--metadata", required=True, type=Path, metavar="CLIPS")
    parser.add_argument(
        "--output_path", required=True, type=Path, metavar="ROWS", help=".json, .jsonl or .parquet"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help="default: all",
    )
    text = "other names; OURS=A,B makes a list"
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help=text)
    parser.add_argument("--separator", default=";", help="of labels and genres in a text")
    parser.add_argument(
        "--audio_ids",
        type=Path,
        help="audio_ids.csv of data.prepare_audio: only clips that are there",
    )
    parser.add_argument("--dataset", default="own", help="of records that name none")
    parser.add_argument(
        "--descriptions", type=Path, help="JSON: label -> list of short acoustic descriptions"
    )
    parser.add_argument(
        "--cuts", type=Path, help="JSON: key -> 2 or 4 cut points, or gender -> such"
    )
    parser.add_argument("--style", help="of captions: AudioCaps, Clotho")
    parser.add_argument(
        "--prefix_share", type=float, default=0.0, help=f"of questions that begin with {PREFIX!r}"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not all("=" in pair for pair in args.columns):
        parser.error(f"--columns takes pairs like labels=tags, got {args.columns}")
    args.columns = {
        ours: theirs.split(",") for ours, theirs in (pair.split("=", 1) for pair in args.columns)
    }
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    inputs = [
        path for path in (args.metadata, args.audio_ids, args.descriptions, args.cuts) if path
    ]
    texts = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    about = {key: getattr(args, key) for key in ("dataset", "seed", "prefix_share", "style")}
    about["descriptions"] = json.loads(args.descriptions.read_bytes()) if args.descriptions else {}
    audio_ids = args.audio_ids and read_audio_ids(args.audio_ids)
    read = partial(read_records, args.metadata, args.columns, args.separator, audio_ids)
    about["cuts"] = find_cuts(read(), read_cuts(args.cuts) if args.cuts else {})
    counts: Counter = Counter()
    with write_rows(args.output_path, inputs) as output:
        for number, record in enumerate(read(), start=1):
            counts["records"], before = number, output.count
            try:
                for row in rows_of(record, args.tasks, texts, about):
                    output.write(row)
                    counts[row["task"]] += 1
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reason = (
                    f"{args.metadata}, record {number} ({record['audio_id']}): {error!r}. Mend it."
                )
                raise ValueError(reason) from error
            counts["records without a row"] += output.count == before
        if not output.count:
            hint = "name the keys with --columns; spell ids as --audio_ids does (data.prepare_audio --against CLIPS)"
            raise ValueError(
                f"{args.metadata}: none of {counts['records']} records makes a row: {hint}."
            )
    facts = {key: value for key, value in about.items() if key != "descriptions"} | {
        "columns": args.columns
    }
    if (
        args.audio_ids
    ):  # Its ids are relative to its folder; those of other metadata may be names of any kind.
        facts |= audio_root_of(args.output_path, [args.output_path], args.audio_ids.parent)
    write_provenance(
        args.output_path, "closed_qa", inputs, **facts, tasks=args.tasks, counts=dict(counts)
    )
    print(
        f"{args.output_path}: {output.count} rows: {', '.join(f'{count} {name}' for name, count in counts.items())}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
