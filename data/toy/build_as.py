"""Build the toy rows and the training audio of a fold for LTU-AS: the sounds of `data.toy.build`, and speech.

    python -m data.toy.build_as --fold 0 --seed 0 --output_dir exp/toy_data_as/fold0

Notable:
- The same arguments give the same bytes, JSON and audio.
- Rows about committed sounds have no `input`: Whisper transcribes them, in training and in use alike, and what it reads
  into a drum is part of what the model must live with. Where a test swaps the clip, the transcript is swapped with it.
- The folds divide the sounds; held-out voices and sentences are the same in every fold.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import soundfile
from tqdm import tqdm

from data.toy import build, speech_rows
from data.toy.sounds import read_fold
from data.toy.speech import SPEECH, Clip, cut_offs, read_speech
from ltu.data.audio import SAMPLING_RATE

SPEECH_SHARE = 0.4  # of the rows of every stage
CLASSIFY = {"speech_gender": 0.5, "speech_pitch": 0.25, "speech_speed": 0.25}
ALL = {
    "spoken_text": 0.35,
    "speech_gender": 0.25,
    "speech_pitch": 0.125,
    "speech_speed": 0.125,
    "speech_joint": 0.15,
}
# Stage of LTU-AS -> stages of data.toy.build whose sound tasks it has, in equal parts, and shares of the speech tasks.
# The last one goes on with classification: without, so few steps forget the form of its answers.
STAGES = {1: ([1], CLASSIFY), 2: ([2], CLASSIFY), 3: ([2, 4], ALL)}
ROWS = "160,1440,1200"  # of stages 1 to 3, by default


def render_speech(clips: list[Clip], args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """Write the changed versions of the training clips; (file -> versions, audio_id -> recipe)."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    versions, sources = {}, {}
    for clip in tqdm(clips, desc="rendering speech", unit="clip"):
        versions[clip["file"]] = [{"audio_id": committed(clip, folder), "factor": 1.0}]
        for number in range(1, args.versions):
            audio_id = f"audio/speech_{Path(clip['file']).stem}_{number}.flac"
            waveform, recipe = speech_rows.change(clip, Random(f"{args.seed}/{audio_id}"))
            soundfile.write(folder / audio_id, waveform, SAMPLING_RATE, subtype="PCM_16")
            sources[audio_id] = recipe | {"seconds": len(waveform) / SAMPLING_RATE}
            versions[clip["file"]].append({"audio_id": audio_id, "factor": recipe["factor"]})
    return versions, sources


def committed(clip: Clip, folder: Path) -> str:
    """`audio_id` of a committed clip, relative to the rows."""
    return Path(os.path.relpath(SPEECH / clip["file"], folder)).as_posix()


def without_input(rows: list[dict]) -> list[dict]:
    """The rows without their `input`, so that Whisper transcribes the clip, unless it is one rendered for training:
    to transcribe all of those costs more than to train."""
    return [
        row
        if row["audio_id"].startswith("audio/")
        else {key: value for key, value in row.items() if key != "input"}
        for row in rows
    ]


def show(
    files: dict[str, list[dict]], clips: list[Clip], folder: Path, cuts: dict, name: str
) -> list[dict]:
    """Five varied questions: a sound's label and why, a gender without words, Whisper's words, and who says what."""
    rng = Random(f"{name}/show")
    sounds = [row for row in files["heldout_show"] if row["task"] in ("cla_label", "identify_why")]
    clip = rng.choice(clips)
    joint = speech_rows.make_row(
        "speech_joint",
        clip,
        {"audio_id": committed(clip, folder), "factor": 1.0},
        cuts,
        rng,
        "test",
    )
    spoken = [rng.choice(files[file]) for file in ("speech_gender_empty", "speech_words_whisper")]
    return [*sounds, *spoken, speech_rows.with_words(joint, clip["text"])]


def make(args: argparse.Namespace) -> Counter:
    """Write everything of a fold; the number of rows by (file, task)."""
    folder = Path(args.output_dir)
    name = f"as/{args.seed}/{args.fold}"
    training, heldout = read_fold(args.fold)
    clips = read_speech()
    cuts = cut_offs(clips)
    train, test = (
        [clip for clip in clips if clip["split"] == split] for split in ("train", "test")
    )
    pools, sources = build.render_all(training, args, folder)
    versions, speech_sources = render_speech(train, args, folder)
    files: dict[str, list[dict]] = {}
    for (stage, (of, shares)), count in zip(STAGES.items(), args.rows, strict=True):
        rng = Random(f"{name}/stage{stage}")
        spoken = round(SPEECH_SHARE * count)
        parts = [(count - spoken + number) // len(of) for number in range(len(of))]
        rows = [
            row
            for kind, part in zip(of, parts, strict=True)
            for row in build.stage_rows(kind, part, training, pools, rng)
        ]
        rows = without_input(rows)
        rows += speech_rows.stage_rows(shares, spoken, train, versions, cuts, rng)
        rng.shuffle(rows)
        files[f"stage{stage}"] = rows
    sounds = build.heldout_rows(heldout, folder, f"{args.seed}/{args.fold}")
    files |= {file: without_input(rows) for file, rows in sounds.items()}
    known = {clip["voice"] for clip in train}
    files |= speech_rows.heldout_rows(test, known, lambda clip: committed(clip, folder), cuts, name)
    files["show"] = show(files, test, folder, cuts, name)
    del files["heldout_show"]
    for file, content in {**files, "sources": sources | speech_sources}.items():
        (folder / f"{file}.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return Counter((file, row["task"]) for file, rows in files.items() for row in rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--rows` becomes a list of three numbers."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--fold", type=int, default=0, help="0 to 4: whose sounds are held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=None, help="default: exp/toy_data_as/fold{K}")
    parser.add_argument(
        "--rows", default=ROWS, help="rows of stages 1 to 3, two fifths of them about speech"
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=2,
        help="versions of each training sound, with the untouched one",
    )
    parser.add_argument(
        "--mixtures", type=int, default=40, help="training clips of two sounds at once"
    )
    parser.add_argument(
        "--pairs", type=int, default=40, help="training clips of two sounds in order"
    )
    parser.add_argument(
        "--versions",
        type=int,
        default=5,
        help="of each spoken training clip, with the untouched one",
    )
    args = parser.parse_args(argv)
    numbers = args.rows.split(",")
    if len(numbers) != len(STAGES) or not all(number.strip().isdigit() for number in numbers):
        parser.error(f"--rows takes {len(STAGES)} numbers like {ROWS}, got {args.rows!r}")
    args.rows = [int(number) for number in numbers]
    for flag in ("crops", "mixtures", "pairs", "versions"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    args.output_dir = args.output_dir or f"exp/toy_data_as/fold{args.fold}"
    return args


def main() -> None:
    """Build a fold and print what was made."""
    args = parse()
    build.print_counts(make(args), args.output_dir)


if __name__ == "__main__":
    main()
