"""Generates the toy examples and the training audio of a fold for LTU-AS: sounds and speech.

    python -m data.toy.build_ltu_as --fold 0 --seed 0 --output_dir exp/toy_data_as/fold0

The sounds are those of `data.toy.build`. The same arguments give the same bytes, JSON and audio.

Examples about committed sounds have no `input`: Whisper transcribes them, in training and in use
alike, and its hallucinated transcript of a drum is part of what the model must cope with. Where a
test replaces the clip, the transcript is that of the new clip.

The folds divide the sounds. Held-out voices and sentences are the same in every fold.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from random import Random

import soundfile
from tqdm import tqdm

from data.toy import build, speech_examples
from data.toy.sound_clips import read_fold
from data.toy.speech_clips import SPEECH, Clip, cut_offs, read_speech
from ltu.data.audio import SAMPLING_RATE

SPEECH_FRACTION = 0.4  # Of the examples of every stage.
# Fraction of each task in the examples about speech.
CLASSIFY = {"speech_gender": 0.5, "speech_pitch": 0.25, "speech_speed": 0.25}
ALL = {
    "spoken_text": 0.35,
    "speech_gender": 0.25,
    "speech_pitch": 0.125,
    "speech_speed": 0.125,
    "speech_joint": 0.15,
}
# Stage of LTU-AS -> stages of data.toy.build whose sound tasks it has, in equal parts, and the
# fractions of the speech tasks. The last stage repeats classification: without it, a model that is
# trained for so few steps forgets the format of its answers.
STAGES = {1: ([1], CLASSIFY), 2: ([2], CLASSIFY), 3: ([2, 4], ALL)}
ROWS = "160,1440,1200"  # Of stages 1 to 3, by default.


def render_speech(
    clips: list[Clip], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Write the changed versions of the training clips.

    Returns:
        file -> versions, and `audio_id` -> provenance.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    versions: dict[str, list[dict]] = {}
    sources = {}
    for clip in tqdm(clips, desc="rendering speech", unit="clip"):
        versions[clip["file"]] = [{"audio_id": committed(clip, folder), "factor": 1.0}]
        for number in range(1, args.versions):
            audio_id = f"audio/speech_{Path(clip['file']).stem}_{number}.flac"
            waveform, provenance = speech_examples.change(clip, Random(f"{args.seed}/{audio_id}"))
            soundfile.write(folder / audio_id, waveform, SAMPLING_RATE, subtype="PCM_16")
            sources[audio_id] = provenance | {"seconds": len(waveform) / SAMPLING_RATE}
            version = {"audio_id": audio_id, "factor": provenance["factor"]}
            versions[clip["file"]].append(version)
    return versions, sources


def committed(clip: Clip, folder: Path) -> str:
    """Return the `audio_id` of a committed clip, relative to the folder of the examples."""
    return Path(os.path.relpath(SPEECH / clip["file"], folder)).as_posix()


def without_input(rows: list[dict]) -> list[dict]:
    """Return the examples without `input`, so that Whisper transcribes their clips.

    Examples on audio that was rendered for training are returned unchanged: to transcribe all of
    it takes longer than the training.
    """
    changed = []
    for row in rows:
        if not speech_examples.is_rendered(row):
            row = {key: value for key, value in row.items() if key != "input"}
        changed.append(row)
    return changed


def show(
    files: dict[str, list[dict]], clips: list[Clip], folder: Path, cuts: dict, name: str
) -> list[dict]:
    """Return five different questions for the demo.

    They are about the label of a sound and the reason for it, a gender without transcript, the
    transcript by Whisper, and who says what.

    Args:
        files: file name -> examples, of which five are chosen.
        clips: held-out clips.
        folder: folder of the examples.
        cuts: of `speech.cut_offs`.
        name: of the random stream.
    """
    rng = Random(f"{name}/show")
    sounds = [row for row in files["heldout_show"] if row["task"] in ("cla_label", "identify_why")]
    clip = rng.choice(clips)
    version = {"audio_id": committed(clip, folder), "factor": 1.0}
    joint = speech_examples.make_row("speech_joint", clip, version, cuts, rng, "test")
    spoken = [rng.choice(files[file]) for file in ("speech_gender_empty", "speech_words_whisper")]
    return [*sounds, *spoken, speech_examples.with_transcript(joint, clip["text"])]


def make(args: argparse.Namespace) -> Counter:
    """Write everything of a fold and return the number of examples by (file, task)."""
    folder = Path(args.output_dir)
    name = f"as/{args.seed}/{args.fold}"
    training, heldout = read_fold(args.fold)
    clips = read_speech()
    cuts = cut_offs(clips)
    train = [clip for clip in clips if clip["split"] == "train"]
    test = [clip for clip in clips if clip["split"] == "test"]
    pools, sources = build.render_all(training, args, folder)
    versions, speech_sources = render_speech(train, args, folder)

    files: dict[str, list[dict]] = {}
    for (stage, (sound_stages, fractions)), count in zip(STAGES.items(), args.rows, strict=True):
        rng = Random(f"{name}/stage{stage}")
        num_speech = round(SPEECH_FRACTION * count)
        rows = []
        for number, sound_stage in enumerate(sound_stages):
            num_sounds = (count - num_speech + number) // len(sound_stages)
            rows += build.stage_rows(sound_stage, num_sounds, training, pools, rng)
        rows = without_input(rows)
        rows += speech_examples.stage_rows(fractions, num_speech, train, versions, cuts, rng)
        rng.shuffle(rows)
        files[f"stage{stage}"] = rows

    sounds = build.heldout_rows(heldout, folder, f"{args.seed}/{args.fold}")
    files |= {file: without_input(rows) for file, rows in sounds.items()}
    known = {clip["voice"] for clip in train}
    files |= speech_examples.heldout_rows(
        test, known, lambda clip: committed(clip, folder), cuts, name
    )
    files["show"] = show(files, test, folder, cuts, name)
    del files["heldout_show"]
    return build.write_files(files, sources | speech_sources, folder)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `rows` becomes a list of three numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fold", type=int, default=0, help="The fold, 0 to 4, whose sounds are held out."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random streams.")
    parser.add_argument(
        "--output_dir", default=None, help="The output folder (default: exp/toy_data_as/fold{K})."
    )
    parser.add_argument(
        "--rows",
        default=ROWS,
        help="The number of examples of stages 1 to 3, two fifths of them about speech.",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=2,
        help="The number of versions of each training sound, including the unchanged one.",
    )
    parser.add_argument(
        "--mixtures",
        type=int,
        default=40,
        help="The number of training clips of two sounds at once.",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=40,
        help="The number of training clips of one sound after another.",
    )
    parser.add_argument(
        "--versions",
        type=int,
        default=5,
        help="The number of versions of each spoken training clip, including the unchanged one.",
    )
    args = parser.parse_args(argv)
    args.rows = build.parse_rows(parser, args.rows, len(STAGES))
    build.require_positive(parser, args, ("crops", "mixtures", "pairs", "versions"))
    args.output_dir = args.output_dir or f"exp/toy_data_as/fold{args.fold}"
    return args


def main() -> None:
    """Build a fold and print the number of examples."""
    args = parse()
    build.print_counts(make(args), args.output_dir)


if __name__ == "__main__":
    main()
