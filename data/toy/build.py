"""Build the toy rows and the training audio of a fold.

    python -m data.toy.build --fold 0 --seed 0 --output_dir exp/toy_data/fold0
    python -m data.toy.build --write_split          # data/toy/split.json anew, from the manifest
    python -m data.toy.build --write_attribution    # data/toy/ATTRIBUTION.md anew, from the manifest

Notable:
- The same arguments give the same bytes, JSON and audio; every item draws from a random stream of its own.
- Held-out clips are not touched: their rows point at the committed files.
- `sources.json` names the clips in every piece of training audio, so that leakage is tested, not trusted.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import soundfile
from tqdm import tqdm

from data.toy import render
from data.toy.attribution import write_attribution
from data.toy.rows import MIXTURE_TASKS, OPEN_TASKS, PAIR_TASKS, make_row
from data.toy.sounds import AUDIO, HERE, Sound, make_split, read_fold, read_manifest
from ltu.data.audio import SAMPLING_RATE

# Share of each task in a stage, as in the paper: 1 and 2 classification, 3 all closed-ended questions, 4 all.
OPEN_SHARE = {task: 0.3 / (len(OPEN_TASKS) + 1) for task in (*OPEN_TASKS, "how_many")}
CLASSIFY = {"cla_label": 0.75, "cla_label_des": 0.25}
CLOSED = {"cla_label": 0.5, "cla_label_des": 0.15, "caption": 0.1, "caption_mixture": 0.05} | {
    "temporal_first": 0.1,
    "temporal_order": 0.1,
}
STAGES = {
    1: CLASSIFY,
    2: CLASSIFY,
    3: CLOSED,
    4: {task: 0.7 * share for task, share in CLOSED.items()} | OPEN_SHARE,
}
ROWS = "240,1500,700,600"  # of stages 1 to 4, by default
BALANCE = 0.25  # share of the draws that gives every category the same chance; the rest gives every clip the same
SHOWN = (
    "cla_label",
    "cla_label_des",
    "caption",
    "identify_why",
    "scene",
)  # one for each clip on display


def draw(sounds: list[Sound], count: int, rng: Random) -> list[Sound]:
    """`count` sounds, rare categories more often than their number, in random order.

    Within the balanced share a label's chance grows with the square root of its number of clips. Draws are spaced
    evenly over the chances, so that no clip is forgotten when `count` is large enough.
    """
    in_label = Counter(sound["label"] for sound in sounds)
    in_category: Counter = Counter()
    for label, category in {(sound["label"], sound["category"]) for sound in sounds}:
        in_category[category] += in_label[label] ** 0.5
    chances = [
        BALANCE
        / (len(in_category) * in_category[sound["category"]] * in_label[sound["label"]] ** 0.5)
        + (1 - BALANCE) / len(sounds)
        for sound in sounds
    ]
    order = list(range(len(sounds)))
    rng.shuffle(order)
    drawn, reached, offset = [], 0.0, rng.random()
    for index in order:
        reached += chances[index] * count
        drawn += [sounds[index]] * (int(reached + offset) - len(drawn))
    drawn += [sounds[order[-1]]] * (count - len(drawn))  # rounding at the very end
    rng.shuffle(drawn)
    return drawn[:count]


def draw_two(sounds: list[Sound], count: int, rng: Random) -> list[tuple[Sound, Sound]]:
    """Pairs of sounds of different categories."""
    pairs = []
    for first in draw(sounds, count, rng):
        others = [sound for sound in sounds if sound["category"] != first["category"]]
        pairs.append((first, draw(others, 1, rng)[0]))
    return pairs


def render_all(sounds: list[Sound], args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """Write the training audio.

    Returns:
        pools: "crop" -> {clip file: [audio_id, ...]} (the first is the committed clip itself), "mixture" and "pair" ->
            [(audio_id, (sound, sound)), ...]
        sources: audio_id -> recipe
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    name = f"{args.seed}/{args.fold}"
    plan: list[tuple[str, tuple]] = []
    pools: dict = {"crop": {}, "mixture": [], "pair": []}
    for sound in sounds:
        stem = Path(sound["file"]).stem
        crops = [f"audio/{stem}_{number}.flac" for number in range(1, args.crops)]
        plan += [(audio_id, (render.crop, sound)) for audio_id in crops]
        pools["crop"][sound["file"]] = [committed(sound, folder), *crops]
    for kind, make, count in (
        ("mixture", render.mixture, args.mixtures),
        ("pair", render.pair, args.pairs),
    ):
        for number, two in enumerate(draw_two(sounds, count, Random(f"{name}/{kind}"))):
            audio_id = f"audio/{kind}_{number:03d}.flac"
            plan.append((audio_id, (make, two)))
            pools[kind].append((audio_id, two))
    sources = {}
    for audio_id, (make, what) in tqdm(plan, desc="rendering", unit="clip"):
        waveform, recipe = make(what, Random(f"{name}/{audio_id}"))
        soundfile.write(folder / audio_id, waveform, SAMPLING_RATE, subtype="PCM_16")
        sources[audio_id] = recipe | {"seconds": len(waveform) / SAMPLING_RATE}
    return pools, sources


def committed(sound: Sound, folder: Path) -> str:
    """`audio_id` of a committed clip, relative to the rows."""
    return Path(os.path.relpath(AUDIO / sound["file"], folder)).as_posix()


def stage_rows(stage: int, count: int, sounds: list[Sound], pools: dict, rng: Random) -> list[dict]:
    """`count` rows of a stage's tasks, shuffled."""
    tasks = [task for task, share in STAGES[stage].items() for _ in range(round(share * count))]
    tasks = tasks[:count] + [next(iter(STAGES[stage]))] * (count - len(tasks))
    rows = []
    singles = [task for task in tasks if task not in MIXTURE_TASKS + PAIR_TASKS]
    rng.shuffle(singles)
    for task, sound in zip(singles, draw(sounds, len(singles), rng), strict=True):
        rows.append(make_row(task, [sound], rng.choice(pools["crop"][sound["file"]]), rng))
    for kind, kinds in (("mixture", MIXTURE_TASKS), ("pair", PAIR_TASKS)):
        start = rng.randrange(len(pools[kind]))
        for number, task in enumerate(task for task in tasks if task in kinds):
            audio_id, two = pools[kind][(start + number) % len(pools[kind])]
            rows.append(make_row(task, list(two), audio_id, rng))
    rng.shuffle(rows)
    return rows


def heldout_rows(heldout: list[Sound], folder: Path, name: str) -> dict[str, list[dict]]:
    """The questions of the test: the same with the right clip, with another category's clip and without audio.

    The reference is always that of the clip asked about first, so what is right with a wrong clip was guessed.
    """
    right, wrong, none = [], [], []
    for sound in heldout:
        rng = Random(f"{name}/heldout/{sound['file']}")
        row = make_row("cla_label", [sound], committed(sound, folder), rng, "test")
        other = rng.choice([clip for clip in heldout if clip["category"] != sound["category"]])
        right.append(row)
        wrong.append(row | {"audio_id": committed(other, folder)})
        none.append(row | {"audio_id": "empty"})
    rng = Random(f"{name}/show")
    categories = rng.sample(sorted({sound["category"] for sound in heldout}), len(SHOWN))
    shown = [
        rng.choice([sound for sound in heldout if sound["category"] == category])
        for category in categories
    ]
    show = [
        make_row(task, [s], committed(s, folder), rng, "test")
        for task, s in zip(SHOWN, shown, strict=True)
    ]
    return {
        "heldout_right": right,
        "heldout_wrong": wrong,
        "heldout_none": none,
        "heldout_show": show,
    }


def build(args: argparse.Namespace) -> Counter:
    """Write everything of a fold; the number of rows by (file, task)."""
    folder = Path(args.output_dir)
    name = f"{args.seed}/{args.fold}"
    training, heldout = read_fold(args.fold)
    pools, sources = render_all(training, args, folder)
    files = {
        f"stage{stage}": stage_rows(stage, count, training, pools, Random(f"{name}/stage{stage}"))
        for stage, count in zip(STAGES, args.rows, strict=True)
    }
    files |= heldout_rows(heldout, folder, name)
    for file, content in {**files, "sources": sources}.items():
        (folder / f"{file}.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return Counter((file, row["task"]) for file, rows in files.items() for row in rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--rows` becomes a list of four numbers."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--fold", type=int, default=0, help="0 to 4: whose clips are held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=None, help="default: exp/toy_data/fold{K}")
    parser.add_argument(
        "--rows", default=ROWS, help="rows of stages 1 to 4; steps = rows / batch size"
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=6,
        help="versions of each training clip, with the untouched one",
    )
    parser.add_argument(
        "--mixtures", type=int, default=120, help="training clips of two sounds at once"
    )
    parser.add_argument(
        "--pairs", type=int, default=160, help="training clips of two sounds in order"
    )
    parser.add_argument(
        "--write_split", action="store_true", help="write data/toy/split.json anew and stop"
    )
    parser.add_argument(
        "--write_attribution",
        action="store_true",
        help="write data/toy/ATTRIBUTION.md anew and stop",
    )
    args = parser.parse_args(argv)
    numbers = args.rows.split(",")
    if len(numbers) != len(STAGES) or not all(number.strip().isdigit() for number in numbers):
        parser.error(f"--rows takes {len(STAGES)} numbers like 600,600,600,600, got {args.rows!r}")
    args.rows = [int(number) for number in numbers]
    for flag in ("crops", "mixtures", "pairs"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    args.output_dir = args.output_dir or f"exp/toy_data/fold{args.fold}"
    return args


def print_counts(counts: Counter, folder: str) -> None:
    """One line a file: its rows, by task."""
    for file in dict.fromkeys(file for file, _ in counts):
        tasks = {task: number for (of, task), number in counts.items() if of == file}
        listed = ", ".join(f"{task} {number}" for task, number in sorted(tasks.items()))
        print(f"{file:{max(14, len(file) + 2)}}{sum(tasks.values()):6} rows: {listed}")
    print(f"in {folder}")


def main() -> None:
    """Build a fold and print what was made."""
    args = parse()
    if args.write_split:
        (HERE / "split.json").write_text(
            json.dumps(make_split(read_manifest()), indent=1) + "\n", encoding="utf-8"
        )
    if args.write_attribution:
        write_attribution(read_manifest(), HERE / "ATTRIBUTION.md")
    if args.write_split or args.write_attribution:
        return
    print_counts(build(args), args.output_dir)


if __name__ == "__main__":
    main()
