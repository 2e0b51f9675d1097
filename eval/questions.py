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
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from eval.closed import Classes, plain
from eval.report import write_rows
from eval.score_result import EvaluationError
from eval.tasks import TASKS, Task, find_task
from ltu.files import run_command

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
POSSIBLE = {
    "voxceleb_gender": "male|female",
    "voxceleb_age": "1?[0-9]?[0-9]",
}  # truths that no file of classes has


CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
TABLE = (
    "",
    "audio",
    "label",
)  # pattern of the metadata's file; column of the clip; columns of a truth a question
SOURCES = {
    "esc50": ("esc50.csv", "filename", "category"),
    "fsd50k": ("eval.csv", "fname", "labels"),
    "audiocaps": ("test.csv", "youtube_id", "caption"),
    "clotho": ("clotho_captions_evaluation.csv", "file_name", *CAPTIONS),
    "librispeech": ("*.trans.txt", "id", "text"),
}


def find_metadata(pattern: str, root: Path) -> list[Path]:
    """The metadata's files under a folder; one, but for LibriSpeech's."""
    found = sorted(root.rglob(pattern)) if pattern else []
    if not found or (len(found) > 1 and "*" not in pattern):
        name = pattern or "of columns audio and label that are found by name"
        raise EvaluationError(f"{root} has {len(found)} files {name}: name one with --metadata.")
    return found


def read_metadata(
    columns: tuple[str, ...], paths: list[Path]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(file and row, names its clip may have, truths) of every row."""
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if path.name.endswith(".trans.txt"):
                rows = (
                    dict(zip(("id", "text"), line.strip().split(" ", 1), strict=False))
                    for line in lines
                )
            else:
                rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
            for number, row in enumerate(rows, start=1):
                if lacking := [name for name in columns if not (row.get(name) or "").strip()]:
                    raise EvaluationError(
                        f"{path}, row {number}: no {', '.join(lacking)}; it has {', '.join(row)}."
                    )
                names = [row[columns[0]]]
                if (
                    columns[0] == "youtube_id"
                ):  # Downloaders name clips by it, with or without a Y and the start.
                    names = [
                        f"{y}{names[0]}{end}"
                        for end in ("", f"_{row.get('start_time')}")
                        for y in ("", "Y")
                    ]
                yield f"{path}, row {number}", names, [row[name] for name in columns[1:]]


def references(task: Task) -> Callable[[str, str], str]:
    """(file and row, truth) -> reference, in the spelling that either protocol reads."""
    form = REFERENCES.get(task.name, "Labels: {}")
    classes = Classes(task, "strict") if "labels" in task.options else None

    def reference(place: str, truth: str) -> str:
        truth = truth.strip()
        if classes is None:
            if not re.fullmatch(POSSIBLE.get(task.name, ".+"), truth):
                raise EvaluationError(f"{place}: {truth!r} is no truth of {task.name}.")
            return form.format(truth)
        separator = task.options.get("separator")
        mark = "," if task.name == "fsd50k" else ";"
        keys = [plain(name) for name in (truth.split(mark) if separator else [truth])]
        if unknown := [key for key in keys if key not in classes.numbers]:
            raise EvaluationError(
                f"{place}: {unknown[0]!r} is no class of eval/labels/{task.options['labels']}."
            )
        return form.format(
            (separator or "").join(classes.names[classes.numbers[key]] for key in keys)
        )

    return reference


def build(task: Task, metadata: list[Path], root: Path) -> tuple[list[dict], dict[str, str]]:
    """Questions in the order of the metadata, and the clips that are missing: name -> its first row."""
    clips: dict[str, list[str]] = defaultdict(list)  # by name without ending
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in SOUNDS):
        clips[path.stem].append(path.relative_to(root).as_posix())
    rows, missing, reference = [], {}, references(task)
    for place, names, truths in read_metadata(SOURCES.get(task.name, TABLE)[1:], metadata):
        outputs = [reference(place, truth) for truth in truths]
        found = [name for name in names if (root / name).is_file()]
        if not found:
            bare = [
                Path(name).stem if Path(name).suffix.lower() in SOUNDS else Path(name).name
                for name in names
            ]
            found = [path for name in bare for path in clips.get(name, ())]
        if len(found) > 1:
            raise EvaluationError(
                f"{place}: {root} has {' and '.join(found[:2])}. Leave one, or name its path."
            )
        if not found:
            missing.setdefault(names[0], place)
        common = {
            "instruction": task.prompt,
            "audio_id": "".join(found),
            "dataset": task.name,
            "task": "evaluation",
        }
        rows += [common | {"output": output} for output in outputs if found]
    return rows, missing


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument(
        "--task",
        required=True,
        choices=[task.name for task in TASKS if task.prompt],
        metavar="TASK",
    )
    parser.add_argument(
        "--audio_root", required=True, type=Path, help="folder of the clips, later eval.run's too"
    )
    parser.add_argument("--metadata", type=Path, help="its file, where it is not found by its name")
    parser.add_argument("--output_path", required=True, type=Path, help=".json or .jsonl")
    parser.add_argument(
        "--allow_missing", action="store_true", help="leave out clips that are not on the disk"
    )
    args = parser.parse_args(argv)
    task = find_task(args.task)
    metadata = (
        [args.metadata]
        if args.metadata
        else find_metadata(SOURCES.get(task.name, TABLE)[0], args.audio_root)
    )
    rows, missing = build(task, metadata, args.audio_root)
    print(
        f"{task.name}: {len(rows)} questions, {len({row['audio_id'] for row in rows})} clips; {len(missing)} missing"
    )
    for clip, place in list(missing.items())[:20]:
        print(f"  missing: {clip} ({place})", file=sys.stderr)
    if not rows or (missing and not args.allow_missing):
        raise EvaluationError(
            f"{args.audio_root} lacks {len(missing)} clips. Bring them, or give --allow_missing."
        )
    write_rows(rows, args.output_path)
    return 0


if __name__ == "__main__":
    run_command(main)
