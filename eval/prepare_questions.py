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
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from eval.classification import Classes, plain
from eval.report import write_rows
from eval.scorer_interface import EvaluationError
from eval.tasks import TASKS, Task, find_task
from ltu.files import run_command

# Extensions of audio files.
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus", ".aiff", ".au", ".mp4", ".webm"}
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
POSSIBLE = {
    "voxceleb_gender": "male|female",
    "voxceleb_age": "1?[0-9]?[0-9]",
}
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
# Name pattern of the metadata file, column of the clip, columns of the labels. There is one
# question for each column of labels.
TABLE = ("", "audio", "label")
SOURCES = {
    "esc50": ("esc50.csv", "filename", "category"),
    "fsd50k": ("eval.csv", "fname", "labels"),
    "audiocaps": ("test.csv", "youtube_id", "caption"),
    "clotho": ("clotho_captions_evaluation.csv", "file_name", *CAPTIONS),
    "librispeech": ("*.trans.txt", "id", "text"),
}


def find_metadata(pattern: str, root: Path) -> list[Path]:
    """Return the metadata files under a folder: one, or several for LibriSpeech.

    Raises:
        EvaluationError: There is none, or more than one where only one is expected.
    """
    found = sorted(root.rglob(pattern)) if pattern else []
    if not found or (len(found) > 1 and "*" not in pattern):
        name = pattern or "of columns audio and label that are found by name"
        raise EvaluationError(f"{root} has {len(found)} files {name}: name one with --metadata.")
    return found


def read_metadata(
    columns: tuple[str, ...], paths: list[Path]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield file and row, possible names of the clip, and labels of every row.

    Raises:
        EvaluationError: A row lacks one of the columns.
    """
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(_parse_table(path, lines), start=1):
                source = f"{path}, row {number}"
                lacking = [name for name in columns if not (row.get(name) or "").strip()]
                if lacking:
                    reason = f"no {', '.join(lacking)}; it has {', '.join(row)}."
                    raise EvaluationError(f"{source}: {reason}")
                yield source, _clip_names(columns[0], row), [row[name] for name in columns[1:]]


def _parse_table(path: Path, lines: IO[str]) -> Iterator[dict[str, str]]:
    if not path.name.endswith(".trans.txt"):
        yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        return
    for line in lines:
        yield dict(zip(("id", "text"), line.strip().split(" ", 1), strict=False))


def _clip_names(column: str, row: dict[str, str]) -> list[str]:
    """Return the names that the clip of a row may have."""
    name = row[column]
    if column != "youtube_id":
        return [name]
    # Downloaders name clips by the id, with or without a Y and the start.
    names = []
    for end in ("", f"_{row.get('start_time')}"):
        names += [f"{name}{end}", f"Y{name}{end}"]
    return names


def references(task: Task) -> Callable[[str, str], str]:
    """Return a function that maps (file and row, label) to a reference.

    Both protocols can read the spelling of the reference.
    """
    template = REFERENCES.get(task.name, "Labels: {}")
    classes = Classes(task, "strict") if "labels" in task.options else None

    def reference(source: str, label: str) -> str:
        label = label.strip()
        if classes is None:
            if not re.fullmatch(POSSIBLE.get(task.name, ".+"), label):
                raise EvaluationError(f"{source}: {label!r} is no label of {task.name}.")
            return template.format(label)
        separator = task.options.get("separator")
        input_separator = "," if task.name == "fsd50k" else ";"
        keys = [plain(name) for name in (label.split(input_separator) if separator else [label])]
        unknown = [key for key in keys if key not in classes.numbers]
        if unknown:
            raise EvaluationError(
                f"{source}: {unknown[0]!r} is no class of eval/labels/{task.options['labels']}."
            )
        names = [classes.names[classes.numbers[key]] for key in keys]
        return template.format((separator or "").join(names))

    return reference


def build(task: Task, metadata: list[Path], root: Path) -> tuple[list[dict], dict[str, str]]:
    """Return the questions in the order of the metadata, and the missing clips.

    The missing clips are a map from name to the first row that names the clip.

    Raises:
        EvaluationError: A label is no class, or several files fit the name of a clip.
    """
    clips: dict[str, list[str]] = defaultdict(list)  # name without extension -> relative paths
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in SOUNDS):
        clips[path.stem].append(path.relative_to(root).as_posix())
    rows = []
    missing: dict[str, str] = {}
    reference = references(task)
    columns = SOURCES.get(task.name, TABLE)[1:]
    for source, names, labels in read_metadata(columns, metadata):
        outputs = [reference(source, label) for label in labels]
        found = [name for name in names if (root / name).is_file()]
        if not found:
            for name in names:
                found += clips.get(_without_extension(name), ())
        if len(found) > 1:
            raise EvaluationError(
                f"{source}: {root} has {' and '.join(found[:2])}. Leave one, or name its path."
            )
        if not found:
            missing.setdefault(names[0], source)
            continue
        common = {
            "instruction": task.prompt,
            "audio_id": found[0],
            "dataset": task.name,
            "task": "evaluation",
        }
        rows += [common | {"output": output} for output in outputs]
    return rows, missing


def _without_extension(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in SOUNDS else path.name


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    names = [task.name for task in TASKS if task.prompt]
    add = parser.add_argument
    add("--task", required=True, choices=names, metavar="TASK", help="the benchmark")
    add(
        "--audio_root",
        required=True,
        type=Path,
        help="folder of the clips; give eval.run the same",
    )
    add("--metadata", type=Path, help="metadata file, if it cannot be found by its name")
    add("--output_path", required=True, type=Path, help="file to write: .json or .jsonl")
    add("--allow_missing", action="store_true", help="leave out clips that are not on the disk")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the questions of a benchmark."""
    args = parse_args(argv)
    task = find_task(args.task)
    if args.metadata:
        metadata = [args.metadata]
    else:
        metadata = find_metadata(SOURCES.get(task.name, TABLE)[0], args.audio_root)
    rows, missing = build(task, metadata, args.audio_root)
    num_clips = len({row["audio_id"] for row in rows})
    print(f"{task.name}: {len(rows)} questions, {num_clips} clips; {len(missing)} missing")
    for clip, source in list(missing.items())[:20]:
        print(f"  missing: {clip} ({source})", file=sys.stderr)
    if not rows or (missing and not args.allow_missing):
        hint = "Download them, or give --allow_missing."
        raise EvaluationError(f"{args.audio_root} lacks {len(missing)} clips. {hint}")
    write_rows(rows, args.output_path)
    return 0


if __name__ == "__main__":
    run_command(main)
