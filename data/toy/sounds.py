"""The sounds of the toy data set and their five folds.

Notable:
- A clip is held out in one fold at most, and only if another recording of its label stays in training.
- Takes of one recording (`recording` in the manifest: one source file cut up, or one drum sample at two strengths) are
  never divided between training and test; a label with a single recording is training only.
- Clips of `lincity-ng-data` are training only: their labels were read off the tags of YAMNet, the ear tested here.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent
AUDIO = HERE / "audio"
NUM_FOLDS = 5
LABELLED_BY_EAR = "lincity-ng-data"

Sound = dict  # One line of manifest.jsonl.


def read_manifest() -> list[Sound]:
    """One dict a clip: file, label, category, caption, seconds, package, licence, author, recording?, ..."""
    with open(HERE / "manifest.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_json(name: str) -> dict:
    """A JSON file that lies beside this module: `split.json`, `questions.json` or `labels.json`."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def recording_of(sound: Sound) -> str:
    """Name of the recording that a clip was taken from; most clips are their own."""
    return sound.get("recording", sound["file"])


def make_split(sounds: list[Sound]) -> dict:
    """Spread the clips that may be held out over five folds, evenly by label, then by category, then by number.

    Returns:
        `{"folds": [[file, ...] x 5], "training_only": [file, ...]}`; a pure function of the manifest.
    """
    recordings = defaultdict(set)
    for sound in sounds:
        recordings[sound["label"]].add(recording_of(sound))
    groups = defaultdict(list)  # (category, label, recording) -> clips that are held out together
    for sound in sounds:
        if len(recordings[sound["label"]]) > 1 and LABELLED_BY_EAR not in sound["package"]:
            groups[sound["category"], sound["label"], recording_of(sound)].append(sound["file"])

    in_category = Counter(key[0] for key, files in groups.items() for _ in files)
    in_label = Counter((category, label) for category, label, _ in groups)
    folds: list[list[str]] = [[] for _ in range(NUM_FOLDS)]
    used: Counter = Counter()  # clips by (fold, category) and groups by (fold, category, label)
    # The largest go first, so that the small ones can even out what is left; the hash in a file's name orders the rest.
    order = sorted(
        groups,
        key=lambda key: (
            -in_category[key[0]],
            key[0],
            -in_label[key[:2]],
            key[1],
            -len(groups[key]),
            min(groups[key]),
        ),
    )
    for category, label, recording in order:
        clips = groups[category, label, recording]
        fold = min(
            range(NUM_FOLDS),
            key=lambda k: (used[k, category, label], used[k, category], len(folds[k]), k),
        )
        folds[fold].extend(clips)
        used[fold, category] += len(clips)
        used[fold, category, label] += 1
    held_out = {file for fold in folds for file in fold}
    return {
        "folds": [sorted(fold) for fold in folds],
        "training_only": sorted(sound["file"] for sound in sounds if sound["file"] not in held_out),
    }


def read_fold(fold: int) -> tuple[list[Sound], list[Sound]]:
    """Training and held-out clips of a fold (0 to 4) of the committed split."""
    folds = read_json("split.json")["folds"]
    if not 0 <= fold < len(folds):
        raise ValueError(f"There is no fold {fold}; the split has folds 0 to {len(folds) - 1}.")
    sounds = read_manifest()
    return [s for s in sounds if s["file"] not in folds[fold]], [
        s for s in sounds if s["file"] in folds[fold]
    ]
