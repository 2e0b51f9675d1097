"""Reads the sounds of the toy dataset and splits them into five folds.

A clip is held out in at most one fold, and only if another recording of its label is in
training. Takes of one recording (`recording` in the manifest: one source file that was cut up, or
one drum sample at two strengths) are never divided between training and test. A label with a single
recording is training only.

Clips of `lincity-ng-data` are training only too: their labels were taken from the tags of YAMNet,
the audio encoder that is tested on this dataset.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent
AUDIO = HERE / "audio"
NUM_FOLDS = 5
LABELLED_BY_YAMNET = "lincity-ng-data"

Sound = dict  # One line of manifest.jsonl.


def read_manifest() -> list[Sound]:
    """Return a dict for each clip: file, label, category, caption, seconds, package, ..."""
    return read_json_lines(HERE / "manifest.jsonl")


def read_json_lines(path: Path) -> list[dict]:
    """Return the objects of a file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_json(name: str) -> dict:
    """Return a JSON file next to this module: `split.json`, `questions.json` or `labels.json`."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def recording_of(sound: Sound) -> str:
    """Return the name of the recording that a clip was taken from; most clips are their own."""
    return sound.get("recording", sound["file"])


def make_split(sounds: list[Sound]) -> dict:
    """Distribute the clips that may be held out over five folds.

    They are distributed evenly by label, then by category, then by number. The split depends on
    nothing but the manifest.

    Returns:
        `{"folds": [[file, ...] x 5], "training_only": [file, ...]}`.
    """
    recordings = defaultdict(set)
    for sound in sounds:
        recordings[sound["label"]].add(recording_of(sound))
    # (category, label, recording) -> clips that are held out together
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for sound in sounds:
        if len(recordings[sound["label"]]) > 1 and LABELLED_BY_YAMNET not in sound["package"]:
            groups[sound["category"], sound["label"], recording_of(sound)].append(sound["file"])

    clips_of_category: Counter = Counter()
    groups_of_label: Counter = Counter()
    for (category, label, _), files in groups.items():
        clips_of_category[category] += len(files)
        groups_of_label[category, label] += 1

    def size_order(key: tuple[str, str, str]) -> tuple:
        category, label, _ = key
        return (
            -clips_of_category[category],
            category,
            -groups_of_label[category, label],
            label,
            -len(groups[key]),
            min(groups[key]),
        )

    # Distribute the largest groups first, so that the small ones can even out the differences. The
    # hash in a file name decides between equal ones.
    folds: list[list[str]] = [[] for _ in range(NUM_FOLDS)]
    used: Counter = Counter()  # Clips by (fold, category), groups by (fold, category, label).
    for category, label, recording in sorted(groups, key=size_order):
        loads = []
        for fold in range(NUM_FOLDS):
            num_groups = used[fold, category, label]
            num_clips = used[fold, category]
            loads.append((num_groups, num_clips, len(folds[fold]), fold))
        *_, fold = min(loads)
        clips = groups[category, label, recording]
        folds[fold].extend(clips)
        used[fold, category] += len(clips)
        used[fold, category, label] += 1
    held_out = set().union(*folds)
    training_only = {sound["file"] for sound in sounds} - held_out
    return {
        "folds": [sorted(fold) for fold in folds],
        "training_only": sorted(training_only),
    }


def read_fold(fold: int) -> tuple[list[Sound], list[Sound]]:
    """Return the training clips and the held-out clips of a fold (0 to 4) of the committed split.

    Raises:
        ValueError: there is no such fold.
    """
    folds = read_json("split.json")["folds"]
    if not 0 <= fold < len(folds):
        raise ValueError(f"There is no fold {fold}; the split has folds 0 to {len(folds) - 1}.")
    training = []
    held_out = []
    for sound in read_manifest():
        if sound["file"] in folds[fold]:
            held_out.append(sound)
        else:
            training.append(sound)
    return training, held_out
