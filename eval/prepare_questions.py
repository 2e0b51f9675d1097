"""Builds the questions of a benchmark from the metadata of its download.

    python -m eval.prepare_questions --task esc50 --audio_root ESC-50-master \\
        --output_path esc50.json
    python -m eval.prepare_questions --task gtzan --audio_root DIR --metadata t.csv \\
        --output_path gtzan.json

The metadata of ESC-50, FSD50K, AudioCaps, Clotho (CSV files) and LibriSpeech (*.trans.txt) is found
under --audio_root. Any other task takes a table with columns `audio` and `label`, several labels
separated by `; `; commas separate the columns, or tabs in a .tsv.

A clip is found by its path or, anywhere under --audio_root, by its name without extension. All
clips must be there; --allow_missing leaves out, counts and names those that are not. A label that
is no class stops the command with file and row. References are spelled as the evaluators expect.
"""

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from eval.classification import Classes, plain
from eval.report import write_records
from eval.scorer_interface import EvaluationError
from eval.tasks import TASKS, Task, find_task
from ltu.files import run_command

# Extensions of audio files.
AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus", ".aiff", ".au", ".mp4", ".webm"}
SECONDS = r"\d+(?:\.\d+)?"
# A clip of YouTube, named by id, start and end in s or ms. An id may have underscores and digits.
SEGMENT = re.compile(rf"(?P<name>.+)_(?P<start>{SECONDS})_(?P<end>{SECONDS})")
# Templates of references, where they are not "Labels: {}". There is no space where the original
# does not strip one.
REFERENCES = {
    **dict.fromkeys(("esc50", "vocalsound", "tut17", "beijing_opera", "dcase17"), "Labels:{}"),
    **dict.fromkeys(("audiocaps", "clotho"), "Audio caption: {}"),
    **dict.fromkeys(("gtzan", "fma"), "Music genre: {}"),
    **dict.fromkeys(("iemocap", "mosei"), "Emotion: {}."),
    "librispeech": "Spoken text: {}",
    "voxceleb_gender": "The speaker is {}.",
    "voxceleb_age": "The age of the speaker is {}.",
}
# Patterns of the labels of tasks that have no file of classes.
LABEL_PATTERNS = {
    "voxceleb_gender": "male|female",
    "voxceleb_age": "1?[0-9]?[0-9]",
}
CAPTIONS = ("caption_1", "caption_2", "caption_3", "caption_4", "caption_5")


@dataclass(frozen=True)
class Source:
    """Where the metadata of a task is.

    Args:
        pattern: Name pattern of the metadata file, "" if it is not found by its name.
        clip: Column of the clip.
        labels: Columns of the labels. There is one question for each.
    """

    pattern: str
    clip: str
    labels: tuple[str, ...]


TABLE = Source("", "audio", ("label",))
SOURCES = {
    "esc50": Source("esc50.csv", "filename", ("category",)),
    "fsd50k": Source("eval.csv", "fname", ("labels",)),
    "audiocaps": Source("test.csv", "youtube_id", ("caption",)),
    "clotho": Source("clotho_captions_evaluation.csv", "file_name", CAPTIONS),
    "librispeech": Source("*.trans.txt", "id", ("text",)),
}


@dataclass(frozen=True)
class LabelledClip:
    """A row of the metadata.

    Args:
        position: File and row, for messages.
        names: Names that the clip may have.
        labels: Its labels, one for each question.
        start: Where a clip of YouTube starts in its video, in seconds. Such a clip may also have
            one of its names, followed by its start and its end.
    """

    position: str
    names: list[str]
    labels: list[str]
    start: float | None = None


def find_metadata(pattern: str, root: Path) -> list[Path]:
    """Return the metadata files under a folder: one, or several for LibriSpeech.

    Raises:
        EvaluationError: There is none, or more than one where only one is expected.
    """
    found = []
    if pattern:
        found = sorted(root.rglob(pattern))
    if not found or (len(found) > 1 and "*" not in pattern):
        name = pattern or "of columns audio and label that are found by name"
        raise EvaluationError(f"{root} has {len(found)} files {name}: name one with --metadata.")
    return found


def read_metadata(source: Source, paths: list[Path]) -> Iterator[LabelledClip]:
    """Yield every row.

    Raises:
        EvaluationError: A row lacks one of the columns.
    """
    columns = (source.clip, *source.labels)
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(_parse_table(path, lines), start=1):
                position = f"{path}, row {number}"
                lacking = [name for name in columns if not (row.get(name) or "").strip()]
                if lacking:
                    reason = f"no {', '.join(lacking)}; it has {', '.join(row)}."
                    raise EvaluationError(f"{position}: {reason}")
                labels = [row[name] for name in source.labels]
                names = _clip_names(source.clip, row)
                start = None
                if source.clip == "youtube_id":
                    start = _start_time(row, position)
                yield LabelledClip(position, names, labels, start)


def _parse_table(path: Path, lines: IO[str]) -> Iterator[dict[str, str]]:
    if not path.name.endswith(".trans.txt"):
        delimiter = "\t" if path.suffix == ".tsv" else ","
        yield from csv.DictReader(lines, delimiter=delimiter)
        return
    for line in lines:
        yield dict(zip(("id", "text"), line.strip().split(" ", 1), strict=False))


def _clip_names(column: str, row: dict[str, str]) -> list[str]:
    """Return the names that the clip of a row may have."""
    name = row[column]
    if column != "youtube_id":
        return [name]
    # Downloaders name clips by the id, with or without a Y and the start.
    names = [name, f"Y{name}"]
    if row.get("start_time"):
        names += [f"{name}_{row['start_time']}", f"Y{name}_{row['start_time']}"]
    return names


def _start_time(row: dict[str, str], position: str) -> float | None:
    """Return the start of a clip in seconds, None if the row has none.

    Raises:
        EvaluationError: It is no number.
    """
    text = row.get("start_time")
    if not text:
        return None
    if not re.fullmatch(SECONDS, text.strip()):
        raise EvaluationError(f"{position}: start_time {text!r} is no number of seconds.")
    return float(text)


class ReferenceWriter:
    """Spells the references of a task, so that both protocols can read them."""

    def __init__(self, task: Task):
        self.task = task
        self.template = REFERENCES.get(task.name, "Labels: {}")
        self.separator = task.options.get("separator")
        self.input_separator = "," if task.name == "fsd50k" else ";"
        self.classes = None
        if "labels" in task.options:
            self.classes = Classes(task, "strict")

    def write(self, label: str, position: str) -> str:
        """Return the reference of a label of the metadata.

        Args:
            position: File and row of the label, for messages.

        Raises:
            EvaluationError: The label is no class.
        """
        label = label.strip()
        if self.classes is not None:
            label = self._class_names(label, position)
        elif not re.fullmatch(LABEL_PATTERNS.get(self.task.name, ".+"), label):
            raise EvaluationError(f"{position}: {label!r} is no label of {self.task.name}.")
        return self.template.format(label)

    def _class_names(self, label: str, position: str) -> str:
        """Return the names of the classes of a label, joined by the separator of the task."""
        parts = [label]
        if self.separator:
            parts = label.split(self.input_separator)
        names = []
        for part in parts:
            key = plain(part)
            if key not in self.classes.numbers:
                labels = f"eval/labels/{self.task.options['labels']}"
                raise EvaluationError(f"{position}: {key!r} is no class of {labels}.")
            names.append(self.classes.names[self.classes.numbers[key]])
        return (self.separator or "").join(names)


class ClipFinder:
    """Finds clips under a folder by their path, or by their name without extension."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, list[str]] = defaultdict(list)  # name -> relative paths
        # name -> start and relative path of the files NAME_START_END
        self.segments: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                relative = path.relative_to(root).as_posix()
                self.paths[path.stem].append(relative)
                segment = SEGMENT.fullmatch(path.stem)
                if segment and float(segment["start"]) < float(segment["end"]):
                    self.segments[segment["name"]].append((float(segment["start"]), relative))

    def find(self, clip: LabelledClip) -> str | None:
        """Return the relative path of a clip, None if it is missing.

        Raises:
            EvaluationError: Several files fit the names of the clip.
        """
        found = [name for name in clip.names if (self.root / name).is_file()]
        if not found:
            for name in clip.names:
                found += self.paths.get(_without_extension(name), [])
                found += self._find_segments(name, clip.start)
        if len(found) > 1:
            raise EvaluationError(
                f"{clip.position}: {self.root} has {' and '.join(found[:2])}. "
                "Leave one, or name its path."
            )
        return found[0] if found else None

    def _find_segments(self, name: str, start: float | None) -> list[str]:
        """Return the files NAME_START_END whose start, in s or in ms, is that of the clip."""
        found = []
        if start is not None:
            for own_start, path in self.segments.get(name, []):
                if math.isclose(own_start, start) or math.isclose(own_start, 1000 * start):
                    found.append(path)
        return found


def build(task: Task, metadata: list[Path], root: Path) -> tuple[list[dict], dict[str, str]]:
    """Return the questions in the order of the metadata, and the missing clips.

    The missing clips are a map from name to the first row that names the clip.

    Raises:
        EvaluationError: A label is no class, or several files fit the name of a clip.
    """
    questions = []
    missing: dict[str, str] = {}
    writer = ReferenceWriter(task)
    finder = ClipFinder(root)
    for clip in read_metadata(SOURCES.get(task.name, TABLE), metadata):
        outputs = [writer.write(label, clip.position) for label in clip.labels]
        audio_id = finder.find(clip)
        if audio_id is None:
            missing.setdefault(clip.names[0], clip.position)
            continue
        for output in outputs:
            question = {
                "instruction": task.prompt,
                "audio_id": audio_id,
                "dataset": task.name,
                "task": "evaluation",
                "output": output,
            }
            questions.append(question)
    return questions, missing


def _without_extension(name: str) -> str:
    path = Path(name)
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return path.stem
    return path.name


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    names = [task.name for task in TASKS if task.prompt]
    add = parser.add_argument
    add("--task", required=True, choices=names, metavar="TASK", help="The benchmark.")
    add(
        "--audio_root",
        required=True,
        type=Path,
        help="The folder of the clips; give eval.run the same.",
    )
    add("--metadata", type=Path, help="The metadata file, if it cannot be found by its name.")
    add(
        "--output_path",
        required=True,
        type=Path,
        help="The dataset file to write: .json or .jsonl.",
    )
    add("--allow_missing", action="store_true", help="Leave out clips that are not on the disk.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the questions of a benchmark."""
    args = parse_args(argv)
    task = find_task(args.task)
    if args.metadata:
        metadata = [args.metadata]
    else:
        source = SOURCES.get(task.name, TABLE)
        metadata = find_metadata(source.pattern, args.audio_root)
    questions, missing = build(task, metadata, args.audio_root)
    clips = {question["audio_id"] for question in questions}
    print(f"{task.name}: {len(questions)} questions, {len(clips)} clips; {len(missing)} missing")
    for clip, position in list(missing.items())[:20]:
        print(f"  missing: {clip} ({position})", file=sys.stderr)
    if missing and not args.allow_missing:
        hint = "Download them, or give --allow_missing."
        raise EvaluationError(f"{args.audio_root} lacks {len(missing)} clips. {hint}")
    if not questions:
        names = ", ".join(map(str, metadata))
        raise EvaluationError(
            f"No question is left: {names} names {len(missing)} clips, of which {args.audio_root} "
            "has none. Check --audio_root and --metadata."
        )
    write_records(questions, args.output_path)
    return 0


if __name__ == "__main__":
    run_command(main)
