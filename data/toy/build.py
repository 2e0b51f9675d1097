"""Generates the toy examples and the training audio of a fold.

    python -m data.toy.build --fold 0 --seed 0 --output_dir exp/toy_data/fold0
    python -m data.toy.build --write_split          # data/toy/split.json, from the manifest
    python -m data.toy.build --write_attribution    # data/toy/ATTRIBUTION.md, from the manifest

The same arguments give the same bytes, JSON and audio; every item is drawn from a random stream of
its own. Held-out clips are not changed: their examples point at the committed files. `sources.json`
names the clips in every piece of training audio, so that tests can detect leakage.
"""

import argparse
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import soundfile
from tqdm import tqdm

from data.toy import render_sounds
from data.toy.attribution import write_attribution
from data.toy.sound_clips import AUDIO, HERE, Sound, make_split, read_fold, read_manifest
from data.toy.sound_examples import MIXTURE_TASKS, OPEN_TASKS, PAIR_TASKS, make_row
from ltu.data.audio import SAMPLING_RATE

# Fraction of each task in a stage. As in the paper, stages 1 and 2 have classification, stage 3 has
# all closed-ended questions and stage 4 has all questions.
OPEN = {task: 0.3 / (len(OPEN_TASKS) + 1) for task in (*OPEN_TASKS, "how_many")}
CLASSIFY = {"cla_label": 0.75, "cla_label_des": 0.25}
CLOSED = {
    "cla_label": 0.5,
    "cla_label_des": 0.15,
    "caption": 0.1,
    "caption_mixture": 0.05,
    "temporal_first": 0.1,
    "temporal_order": 0.1,
}
STAGES = {
    1: CLASSIFY,
    2: CLASSIFY,
    3: CLOSED,
    4: {task: 0.7 * fraction for task, fraction in CLOSED.items()} | OPEN,
}
ROWS = "240,1500,700,600"  # Of stages 1 to 4, by default.
# Fraction of the draws that gives every category the same probability. The others give it to every
# clip.
BALANCE = 0.25
# Task of each example that the demo shows.
SHOWN = ("cla_label", "cla_label_des", "caption", "identify_why", "scene")


@dataclass
class AudioPools:
    """The training audio of a fold.

    Attributes:
        crops: clip file -> `audio_id`s, of which the first is the committed clip itself.
        mixtures: (`audio_id`, two sounds) of each mixture.
        pairs: (`audio_id`, two sounds) of each ordered pair.
    """

    crops: dict[str, list[str]] = field(default_factory=dict)
    mixtures: list[tuple[str, tuple[Sound, Sound]]] = field(default_factory=list)
    pairs: list[tuple[str, tuple[Sound, Sound]]] = field(default_factory=list)


def sample_sounds(sounds: list[Sound], count: int, rng: Random) -> list[Sound]:
    """Sample `count` sounds in random order, with rare categories above their proportion.

    Within the balanced fraction, the probability of a label grows with the square root of its
    number of clips. The draws are spaced evenly over the probabilities, so that every clip is
    sampled if `count` is large enough.
    """
    in_label = Counter(sound["label"] for sound in sounds)
    in_category: Counter = Counter()
    for label, category in {(sound["label"], sound["category"]) for sound in sounds}:
        in_category[category] += in_label[label] ** 0.5
    probabilities = []
    for sound in sounds:
        weight = len(in_category) * in_category[sound["category"]] * in_label[sound["label"]] ** 0.5
        probabilities.append(BALANCE / weight + (1 - BALANCE) / len(sounds))
    order = list(range(len(sounds)))
    rng.shuffle(order)
    sampled: list[Sound] = []
    cumulated = 0.0
    offset = rng.random()
    for index in order:
        cumulated += probabilities[index] * count
        sampled += [sounds[index]] * (int(cumulated + offset) - len(sampled))
    sampled += [sounds[order[-1]]] * (count - len(sampled))  # Missing because of rounding.
    rng.shuffle(sampled)
    return sampled[:count]


def sample_pairs(sounds: list[Sound], count: int, rng: Random) -> list[tuple[Sound, Sound]]:
    """Sample pairs of sounds of different categories."""
    pairs = []
    for first in sample_sounds(sounds, count, rng):
        others = [sound for sound in sounds if sound["category"] != first["category"]]
        second = sample_sounds(others, 1, rng)[0]
        pairs.append((first, second))
    return pairs


def render_all(
    sounds: list[Sound], args: argparse.Namespace, folder: Path
) -> tuple[AudioPools, dict[str, dict]]:
    """Write the training audio.

    Returns:
        the audio, and `audio_id` -> provenance.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    name = f"{args.seed}/{args.fold}"
    pools = AudioPools()
    plan = []  # (audio_id, function that renders, its sound or sounds)
    for sound in sounds:
        stem = Path(sound["file"]).stem
        crops = [f"audio/{stem}_{number}.flac" for number in range(1, args.crops)]
        plan += [(audio_id, render_sounds.crop, sound) for audio_id in crops]
        pools.crops[sound["file"]] = [committed(sound, folder), *crops]
    for kind, render_two, count, pool in (
        ("mixture", render_sounds.mixture, args.mixtures, pools.mixtures),
        ("pair", render_sounds.pair, args.pairs, pools.pairs),
    ):
        for number, two in enumerate(sample_pairs(sounds, count, Random(f"{name}/{kind}"))):
            audio_id = f"audio/{kind}_{number:03d}.flac"
            plan.append((audio_id, render_two, two))
            pool.append((audio_id, two))
    sources = {}
    for audio_id, render_clip, rendered_sounds in tqdm(plan, desc="rendering", unit="clip"):
        waveform, provenance = render_clip(rendered_sounds, Random(f"{name}/{audio_id}"))
        soundfile.write(folder / audio_id, waveform, SAMPLING_RATE, subtype="PCM_16")
        sources[audio_id] = provenance | {"seconds": len(waveform) / SAMPLING_RATE}
    return pools, sources


def committed(sound: Sound, folder: Path) -> str:
    """Return the `audio_id` of a committed clip, relative to the folder of the examples."""
    return Path(os.path.relpath(AUDIO / sound["file"], folder)).as_posix()


def stage_rows(
    stage: int, count: int, sounds: list[Sound], pools: AudioPools, rng: Random
) -> list[dict]:
    """Return `count` examples of the tasks of a stage, shuffled."""
    fractions = STAGES[stage]
    tasks = []
    for task, fraction in fractions.items():
        tasks += [task] * round(fraction * count)
    tasks = tasks[:count]
    tasks += [next(iter(fractions))] * (count - len(tasks))

    rows = []
    singles = [task for task in tasks if task not in MIXTURE_TASKS + PAIR_TASKS]
    rng.shuffle(singles)
    for task, sound in zip(singles, sample_sounds(sounds, len(singles), rng), strict=True):
        audio_id = rng.choice(pools.crops[sound["file"]])
        rows.append(make_row(task, [sound], audio_id, rng))
    for pool, tasks_of_two in ((pools.mixtures, MIXTURE_TASKS), (pools.pairs, PAIR_TASKS)):
        start = rng.randrange(len(pool))
        selected = [task for task in tasks if task in tasks_of_two]
        for number, task in enumerate(selected):
            audio_id, two = pool[(start + number) % len(pool)]
            rows.append(make_row(task, list(two), audio_id, rng))
    rng.shuffle(rows)
    return rows


def heldout_rows(heldout: list[Sound], folder: Path, name: str) -> dict[str, list[dict]]:
    """Return the test questions: file name (without .json) -> examples.

    The questions are the same with the right clip, with a clip of another category and without
    audio. The reference is always that of the right clip, so that an answer that is right with a
    wrong clip was guessed.

    Args:
        heldout: held-out clips.
        folder: folder of the examples.
        name: of the random streams.
    """
    right = []
    wrong = []
    none = []
    for sound in heldout:
        rng = Random(f"{name}/heldout/{sound['file']}")
        row = make_row("cla_label", [sound], committed(sound, folder), rng, "test")
        other = rng.choice([clip for clip in heldout if clip["category"] != sound["category"]])
        right.append(row)
        wrong.append(row | {"audio_id": committed(other, folder)})
        none.append(row | {"audio_id": "empty"})

    rng = Random(f"{name}/show")
    categories = rng.sample(sorted({sound["category"] for sound in heldout}), len(SHOWN))
    shown = []
    for category in categories:
        shown.append(rng.choice([sound for sound in heldout if sound["category"] == category]))
    show = []
    for task, sound in zip(SHOWN, shown, strict=True):
        show.append(make_row(task, [sound], committed(sound, folder), rng, "test"))
    return {
        "heldout_right": right,
        "heldout_wrong": wrong,
        "heldout_none": none,
        "heldout_show": show,
    }


def build(args: argparse.Namespace) -> Counter:
    """Write everything of a fold and return the number of examples by (file, task)."""
    folder = Path(args.output_dir)
    name = f"{args.seed}/{args.fold}"
    training, heldout = read_fold(args.fold)
    pools, sources = render_all(training, args, folder)
    files = {}
    for stage, count in zip(STAGES, args.rows, strict=True):
        rng = Random(f"{name}/stage{stage}")
        files[f"stage{stage}"] = stage_rows(stage, count, training, pools, rng)
    files |= heldout_rows(heldout, folder, name)
    return write_files(files, sources, folder)


def write_files(
    files: dict[str, list[dict]], sources: dict[str, dict], folder: Path
) -> Counter[tuple[str, str]]:
    """Write dataset files and sources.json; return the number of examples by (file, task)."""
    for file, content in {**files, "sources": sources}.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{file}.json").write_text(text, encoding="utf-8")
    return Counter((file, row["task"]) for file, rows in files.items() for row in rows)


def parse_rows(parser: argparse.ArgumentParser, rows: str, num_stages: int) -> list[int]:
    """Parse the value of --rows, or end with an error."""
    numbers = rows.split(",")
    if len(numbers) != num_stages or not all(number.strip().isdigit() for number in numbers):
        shape = ",".join(["600"] * num_stages)
        parser.error(f"--rows takes {num_stages} numbers like {shape}, got {rows!r}")
    return [int(number) for number in numbers]


def require_positive(
    parser: argparse.ArgumentParser, args: argparse.Namespace, flags: tuple[str, ...]
) -> None:
    """End with an error if one of these flags is less than 1."""
    for flag in flags:
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1, got {getattr(args, flag)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `rows` becomes a list of four numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fold", type=int, default=0, help="The fold, 0 to 4, whose clips are held out."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random streams.")
    parser.add_argument(
        "--output_dir", default=None, help="The output folder (default: exp/toy_data/fold{K})."
    )
    parser.add_argument(
        "--rows",
        default=ROWS,
        help="The number of examples of stages 1 to 4; steps = examples / batch size.",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=6,
        help="The number of versions of each training clip, including the unchanged one.",
    )
    parser.add_argument(
        "--mixtures",
        type=int,
        default=120,
        help="The number of training clips of two sounds at once.",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=160,
        help="The number of training clips of one sound after another.",
    )
    parser.add_argument(
        "--write_split", action="store_true", help="Only write data/toy/split.json."
    )
    parser.add_argument(
        "--write_attribution", action="store_true", help="Only write data/toy/ATTRIBUTION.md."
    )
    args = parser.parse_args(argv)
    args.rows = parse_rows(parser, args.rows, len(STAGES))
    require_positive(parser, args, ("crops", "mixtures", "pairs"))
    args.output_dir = args.output_dir or f"exp/toy_data/fold{args.fold}"
    return args


def print_counts(counts: Counter[tuple[str, str]], folder: str) -> None:
    """Print a line for each file with its number of examples, by task."""
    by_file: dict[str, dict[str, int]] = {}
    for (file, task), number in counts.items():
        by_file.setdefault(file, {})[task] = number
    for file, tasks in by_file.items():
        listed = ", ".join(f"{task} {number}" for task, number in sorted(tasks.items()))
        print(f"{file:{max(14, len(file) + 2)}}{sum(tasks.values()):6} examples: {listed}")
    print(f"in {folder}")


def main() -> None:
    """Build a fold and print the number of examples."""
    args = parse()
    if args.write_split:
        text = json.dumps(make_split(read_manifest()), indent=1) + "\n"
        (HERE / "split.json").write_text(text, encoding="utf-8")
    if args.write_attribution:
        write_attribution(read_manifest(), HERE / "ATTRIBUTION.md")
    if args.write_split or args.write_attribution:
        return
    print_counts(build(args), args.output_dir)


if __name__ == "__main__":
    main()
