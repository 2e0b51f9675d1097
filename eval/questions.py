"""The questions of a benchmark, from the metadata that its download has.

    python -m eval.questions --task esc50 --audio_root ESC-50-master --output_path esc50.json
    python -m eval.questions --task gtzan --audio_root DIR --metadata table.csv --output_path gtzan.json

ESC-50, FSD50K, AudioCaps, Clotho (their CSV files) and LibriSpeech (*.trans.txt) are found under --audio_root. Any
other task takes a table with columns `audio` and `label`, several labels with `; ` between; commas, or tabs in a .tsv.

Notable:
- A clip is found by its path or, anywhere under --audio_root, by its name without ending. All must be there;
  --allow_missing leaves out, counts and names those that are not.
- A label that is no class stops the command with file and row; references have the evaluators' spelling of it.
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eval.closed import Classes, plain
from eval.outcome import EvaluationError
from eval.report import write_rows
from eval.tasks import TASKS, Task, find_task

SHOWN = 20  # missing clips
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus", ".aiff", ".au", ".mp4", ".webm"}
# Around a truth, where it is not "Labels: {}". No space where the original does not strip one.
REFERENCES = {
    **dict.fromkeys(("esc50", "vocalsound", "tut17", "beijing_opera", "dcase17"), "Labels:{}"),
    **dict.fromkeys(("audiocaps", "clotho"), "Audio caption: {}"),
    **dict.fromkeys(("gtzan", "fma"), "Music genre: {}"),
    **dict.fromkeys(("iemocap", "mosei"), "Emotion: {}."),
    "librispeech": "Spoken text: {}",
    "voxceleb_gender": "The speaker is {}.",
    "voxceleb_age": "The age of the speaker is {}.",
}
# Truths of tasks that have no file of classes: what they may be.
POSSIBLE: dict[str, Callable[[str], bool]] = {
    "voxceleb_gender": lambda truth: truth in ("male", "female"),
    "voxceleb_age": lambda truth: truth.isdecimal() and int(truth) < 120,
}


@dataclass(frozen=True)
class Source:
    """File of the metadata, columns it must have, and a row of it -> (names its clip may have, a truth a question)."""

    pattern: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, str]], tuple[list[str], list[str]]]


def audiocaps(row: dict[str, str]) -> tuple[list[str], list[str]]:
    """One of a clip's five rows. Downloaders name clips by the video, with or without a Y and the start."""
    ends = "", f"_{row['start_time']}"
    return [f"{y}{row['youtube_id']}{end}" for end in ends for y in ("", "Y")], [row["caption"]]


CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
TABLE = Source("", ("audio", "label"), lambda row: ([row["audio"]], [row["label"]]))
SOURCES = {
    "esc50": Source("esc50.csv", ("filename", "category"), lambda row: ([row["filename"]], [row["category"]])),
    "fsd50k": Source("eval.csv", ("fname", "labels"), lambda row: ([row["fname"]], [row["labels"].replace(",", "; ")])),
    "audiocaps": Source("test.csv", ("youtube_id", "start_time", "caption"), audiocaps),
    "clotho": Source(
        "clotho_captions_evaluation.csv",
        ("file_name", *CAPTIONS),
        lambda row: ([row["file_name"]], [row[name] for name in CAPTIONS]),
    ),
    "librispeech": Source("*.trans.txt", ("id", "text"), lambda row: ([row["id"]], [row["text"]])),
}


def find_metadata(source: Source, root: Path) -> list[Path]:
    """The metadata's files under a folder; one, but for LibriSpeech's."""
    if not source.pattern:
        raise EvaluationError("Its metadata has no fixed name: give --metadata, a table with columns audio and label.")
    found = sorted(root.rglob(source.pattern))
    if not found or (len(found) > 1 and "*" not in source.pattern):
        raise EvaluationError(f"{root} has {len(found)} files {source.pattern}: name one with --metadata.")
    return found


def read_metadata(source: Source, paths: list[Path]) -> Iterator[tuple[str, list[str], list[str]]]:
    """(file and row, names its clip may have, truths) of every row."""
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if path.name.endswith(".trans.txt"):
                rows = (dict(zip(("id", "text"), line.strip().split(" ", 1), strict=False)) for line in lines)
            else:
                rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
            for number, row in enumerate(rows, start=1):
                if lacking := [name for name in source.columns if not (row.get(name) or "").strip()]:
                    raise EvaluationError(f"{path}, row {number}: no {', '.join(lacking)}; it has {', '.join(row)}.")
                yield f"{path}, row {number}", *source.read(row)


def references(task: Task) -> Callable[[str, str], str]:
    """(file and row, truth) -> reference, in the spelling that either protocol reads."""
    form = REFERENCES.get(task.name, "Labels: {}")
    classes = Classes(task, "strict") if "labels" in task.options else None

    def reference(place: str, truth: str) -> str:
        truth = truth.strip()
        if classes is None:
            if not POSSIBLE.get(task.name, bool)(truth):
                raise EvaluationError(f"{place}: {truth!r} is no truth of {task.name}.")
            return form.format(truth)
        separator = task.options.get("separator")
        keys = [plain(name) for name in (truth.split(";") if separator else [truth])]
        if unknown := [key for key in keys if key not in classes.numbers]:
            raise EvaluationError(f"{place}: {unknown[0]!r} is no class of eval/labels/{task.options['labels']}.")
        return form.format((separator or "").join(classes.names[classes.numbers[key]] for key in keys))

    return reference


def build(task: Task, metadata: list[Path], root: Path) -> tuple[list[dict], list[str]]:
    """Questions in the order of the metadata, and the clips that are missing.

    Raises:
        EvaluationError: the metadata is malformed, a truth is no class, or two clips have one name.
    """
    clips: dict[str, list[str]] = defaultdict(list)  # by name without ending
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in SOUNDS):
        clips[path.stem].append(path.relative_to(root).as_posix())
    rows, missing, reference = [], [], references(task)
    for place, names, truths in read_metadata(SOURCES.get(task.name, TABLE), metadata):
        outputs = [reference(place, truth) for truth in truths]
        found = [name for name in names if (root / name).is_file()]
        if not found:
            bare = [Path(name).stem if Path(name).suffix.lower() in SOUNDS else Path(name).name for name in names]
            found = [path for name in bare for path in clips.get(name, ())]
        if len(found) > 1:
            raise EvaluationError(f"{place}: {root} has {' and '.join(found[:2])}. Leave one, or name its path.")
        missing += [] if found else [f"{names[0]} ({place})"]
        common = {"instruction": task.prompt, "audio_id": "".join(found), "dataset": task.name, "task": "evaluation"}
        rows += [common | {"output": output} for output in outputs if found]
    return rows, missing


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=[task.name for task in TASKS if task.prompt], metavar="TASK")
    parser.add_argument("--audio_root", required=True, type=Path, help="folder of the clips, later eval.run's too")
    parser.add_argument("--metadata", type=Path, help="its file, where it is not found by its name")
    parser.add_argument("--output_path", required=True, type=Path, help=".json or .jsonl")
    parser.add_argument("--allow_missing", action="store_true", help="leave out clips that are not on the disk")
    args = parser.parse_args(argv)
    task = find_task(args.task)
    metadata = [args.metadata] if args.metadata else find_metadata(SOURCES.get(task.name, TABLE), args.audio_root)
    rows, missing = build(task, metadata, args.audio_root)
    print(f"{task.name}: {len(rows)} questions, {len({row['audio_id'] for row in rows})} clips; {len(missing)} missing")
    for clip in missing[:SHOWN]:
        print(f"  missing: {clip}", file=sys.stderr)
    if not rows or (missing and not args.allow_missing):
        way = "Bring them, or give --allow_missing."
        raise EvaluationError(f"{args.audio_root} lacks {len(missing)} clips of the metadata. {way}")
    write_rows(rows, args.output_path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
