"""Generates the toy examples and the training audio of a fold.

    python -m data.toy.build --fold 0 --seed 0 --output_dir exp/toy_data/fold0
    python -m data.toy.build --kind ltu_as --fold 0 --output_dir exp/toy_data_as/fold0
    python -m data.toy.build --write_split          # data/toy/split.json, from the manifest
    python -m data.toy.build --write_attribution    # data/toy/ATTRIBUTION.md, from the manifest

--kind ltu generates examples about sounds for the four stages of LTU. --kind ltu_as generates
examples about the same sounds and about speech for the three stages of LTU-AS.

The same arguments give the same bytes, JSON and audio; every item has a random stream of its own.
Held-out clips are not changed: their examples point at the committed files. The folds divide the
sounds; held-out voices and sentences are the same in every fold. `sources.json` names the clips in
every piece of training audio, so that tests can detect leakage. For LTU-AS, `audio_labels.json` has
the labels of the training audio.

In the examples of LTU-AS, the `input` of those about committed clips is what Whisper transcribes of
them: its hallucinated transcript of a drum is part of what the model must cope with. For training
it is in `transcripts.json`. Test questions have no `input`, so that Whisper transcribes the clip
when they are answered. Where a test replaces the clip, the transcript is that of the new clip.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from data.command_line import command_parser
from data.toy import sound_examples, speech_examples
from data.toy.attribution import write_attribution
from data.toy.sound_clips import (
    HERE,
    Sound,
    make_split,
    read_fold,
    read_json,
    read_manifest,
)
from data.toy.speech_clips import PERSONS, Clip, cut_offs, read_speech
from data.toy.training_audio import (
    AudioPools,
    Version,
    render_sound_audio,
    render_speech_audio,
)
from ltu.files import run_command, write_json

SPEECH_FRACTION = 0.4  # Of the examples of every stage of LTU-AS, by default.
# Stage of LTU-AS -> stage of LTU whose sound tasks it has, and the fractions of the speech tasks.
STAGES_AS = {
    1: (1, speech_examples.CLASSIFY),
    2: (2, speech_examples.CLASSIFY),
    3: (4, speech_examples.ALL),
}

Files = dict[str, list[dict]]  # File name without .json -> examples.


@dataclass
class Sizes:
    """How much is generated.

    Attributes:
        num_examples: number of examples of each stage.
        crops: number of versions of each training sound, including the unchanged one.
        mixtures: number of training clips of two sounds at once.
        pairs: number of training clips of one sound after another.
        versions: number of versions of each spoken training clip, including the unchanged one.
    """

    num_examples: list[int]
    crops: int
    mixtures: int
    pairs: int
    versions: int = 3


# Kind -> sizes by default.
DEFAULTS = {
    "ltu": Sizes([240, 1200, 400, 1300], crops=6, mixtures=120, pairs=160),
    "ltu_as": Sizes([160, 1200, 1440], crops=2, mixtures=40, pairs=40),
}
FOLDERS = {"ltu": "exp/toy_data", "ltu_as": "exp/toy_data_as"}


@dataclass
class BuildSettings:
    """What is generated.

    Attributes:
        kind: of the model, "ltu" or "ltu_as".
        output_dir: the folder to write.
        sizes: how much.
        fold: whose sounds are held out.
        seed: of the random streams.
        speech_fraction: of the examples of LTU-AS, those about speech.
        with_transcripts: whether the examples of LTU-AS about sounds have the transcript by
            Whisper, or none.
        with_descriptions: whether some labels come after an acoustic description.
    """

    kind: str
    output_dir: Path
    sizes: Sizes
    fold: int = 0
    seed: int = 0
    speech_fraction: float = SPEECH_FRACTION
    with_transcripts: bool = True
    with_descriptions: bool = True

    def fractions_of(self, stage: int) -> dict[str, float]:
        """Return task -> fraction of the examples about sounds in a stage of LTU."""
        fractions = sound_examples.STAGES[stage]
        if self.with_descriptions:
            return fractions
        return sound_examples.without_descriptions(fractions)


def build(settings: BuildSettings) -> Counter[tuple[str, str]]:
    """Write everything of a fold and return the number of examples by (file, task)."""
    folder = settings.output_dir
    sizes = settings.sizes
    name = f"{settings.seed}/{settings.fold}"
    training, heldout = read_fold(settings.fold)
    pools, sources = render_sound_audio(
        training, folder, name, sizes.crops, sizes.mixtures, sizes.pairs
    )
    heldout_sounds = sound_examples.heldout_examples(heldout, folder, name)
    others: dict[str, list[dict]] = {}  # File name -> what is no example.
    if settings.kind == "ltu":
        files = stages_ltu(settings, name, training, pools) | heldout_sounds
    else:
        clips = read_speech()
        versions, speech_sources = render_speech_audio(
            clips, folder, str(settings.seed), sizes.versions
        )
        sources |= speech_sources
        name = f"as/{name}"
        files = stages_ltu_as(settings, name, training, pools, clips, versions)
        others["audio_labels"] = audio_labels(files, training, clips, sources)
        files |= heldout_ltu_as(settings, name, heldout_sounds, clips, versions)

    counts: Counter[tuple[str, str]] = Counter()
    for file, examples in files.items():
        counts.update((file, example["task"]) for example in examples)
    for file, content in {**files, **others, "sources": sources}.items():
        write_json(content, folder / f"{file}.json")
    return counts


def stages_ltu(
    settings: BuildSettings, name: str, training: list[Sound], pools: AudioPools
) -> Files:
    """Return the examples of the stages of LTU.

    Args:
        settings: of the build.
        name: of the random streams.
        training: training sounds.
        pools: their audio.
    """
    files = {}
    for stage, count in zip(sound_examples.STAGES, settings.sizes.num_examples, strict=True):
        rng = Random(f"{name}/stage{stage}")
        fractions = settings.fractions_of(stage)
        files[f"stage{stage}"] = sound_examples.stage_examples(
            fractions, count, training, pools, rng
        )
    return files


def stages_ltu_as(
    settings: BuildSettings,
    name: str,
    training: list[Sound],
    pools: AudioPools,
    clips: list[Clip],
    versions: dict[str, list[Version]],
) -> Files:
    """Return the examples of the stages of LTU-AS, about sounds and about speech.

    Args:
        settings: of the build.
        name: of the random streams.
        training: training sounds.
        pools: their audio.
        clips: spoken clips.
        versions: file -> the committed clip first, then its changed versions.
    """
    cuts = cut_offs(clips)
    training_clips = [clip for clip in clips if clip["split"] == "train"]
    transcripts = read_json("transcripts.json")
    files = {}
    for stage, count in zip(STAGES_AS, settings.sizes.num_examples, strict=True):
        sound_stage, speech_fractions = STAGES_AS[stage]
        rng = Random(f"{name}/stage{stage}")
        num_speech = round(settings.speech_fraction * count)
        examples = sound_examples.stage_examples(
            settings.fractions_of(sound_stage), count - num_speech, training, pools, rng
        )
        if settings.with_transcripts:
            examples = without_input(examples)
        examples += speech_examples.stage_examples(
            speech_fractions, num_speech, training_clips, versions, cuts, rng
        )
        examples = with_whisper_transcripts(examples, transcripts)
        rng.shuffle(examples)
        files[f"stage{stage}"] = examples
    return files


def audio_labels(
    files: Files, training: list[Sound], clips: list[Clip], sources: dict[str, dict]
) -> list[dict]:
    """Return the labels of the training audio, from which `ltu_as.pretrain_tltr` learns.

    Those of a sound are its label and its category, those of speech "speech" and the gender.

    Args:
        files: file name -> training examples, whose audio it is.
        training: training sounds.
        clips: spoken clips.
        sources: `audio_id` of rendered audio -> its provenance.
    """
    labels = {sound["file"]: [sound["label"], sound["category"]] for sound in training}
    for clip in clips:
        if clip["split"] == "train":
            labels[clip["file"]] = [f"{PERSONS[clip['gender']]} speaking", "speech"]
    records = []
    audio_ids = {example["audio_id"] for examples in files.values() for example in examples}
    for audio_id in sorted(audio_ids):
        parts = [Path(audio_id).name]
        if audio_id in sources:
            parts = [part["clip"] for part in sources[audio_id]["parts"]]
        names = sorted({name for part in parts for name in labels[part]})
        records.append({"audio_id": audio_id, "labels": names})
    return records


def heldout_ltu_as(
    settings: BuildSettings,
    name: str,
    heldout_sounds: Files,
    clips: list[Clip],
    versions: dict[str, list[Version]],
) -> Files:
    """Return the test questions of LTU-AS and the five of its demo.

    Args:
        settings: of the build.
        name: of the random streams.
        heldout_sounds: the test questions about sounds.
        clips: spoken clips.
        versions: file -> the committed clip first.
    """
    files = dict(heldout_sounds)
    if settings.with_transcripts:
        for file, examples in heldout_sounds.items():
            files[file] = without_input(examples)
    files |= speech_examples.heldout_examples(clips, versions, name)
    files["show"] = shown_examples(files, clips, versions, name)
    del files["heldout_show"]
    return files


def without_input(examples: list[dict]) -> list[dict]:
    """Return the examples without `input`, so that Whisper transcribes their clips.

    Examples on audio that was rendered for training are returned unchanged: to transcribe all of
    it takes longer than the training.
    """
    changed = []
    for example in examples:
        if not speech_examples.is_rendered(example):
            example = {key: value for key, value in example.items() if key != "input"}
        changed.append(example)
    return changed


def with_whisper_transcripts(examples: list[dict], transcripts: dict[str, str]) -> list[dict]:
    """Return the examples; those without `input` get the transcript of their clip.

    Args:
        examples: for training.
        transcripts: file name of a committed clip -> what Whisper transcribes of it.
    """
    complete = []
    for example in examples:
        if "input" not in example:
            text = transcripts[Path(example["audio_id"]).name]
            example = speech_examples.with_transcript(example, text)
        complete.append(example)
    return complete


def shown_examples(
    files: Files, clips: list[Clip], versions: dict[str, list[Version]], name: str
) -> list[dict]:
    """Return five different questions for the demo of LTU-AS.

    They are about the label of a sound and the reason for it, a gender without transcript, the
    transcript by Whisper, and who says what.

    Args:
        files: file name -> test questions.
        clips: spoken clips.
        versions: file -> the committed clip first.
        name: of the random stream.
    """
    rng = Random(f"{name}/show")
    shown = []
    for example in files["heldout_show"]:
        if example["task"] in ("cla_label", "identify_why"):
            shown.append(example)
    clip = rng.choice([clip for clip in clips if clip["split"] == "test"])
    joint = speech_examples.make_example(
        "speech_joint", clip, versions[clip["file"]][0], cut_offs(clips), rng, "test"
    )
    shown.append(rng.choice(files["speech_gender_empty"]))
    shown.append(rng.choice(files["speech_words_whisper"]))
    shown.append(speech_examples.with_transcript(joint, clip["text"]))
    return shown


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `settings` becomes a `BuildSettings`."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--kind",
        choices=list(DEFAULTS),
        default="ltu",
        help="The model that the examples are for (default: ltu).",
    )
    parser.add_argument(
        "--fold", type=int, default=0, help="The fold, 0 to 4, whose sounds are held out."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random streams.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="The output folder (default: exp/toy_data/fold{K} or exp/toy_data_as/fold{K}).",
    )
    parser.add_argument(
        "--num_examples",
        metavar="N,N,...",
        help="The number of examples of each stage; steps = examples / batch size.",
    )
    parser.add_argument(
        "--crops",
        type=int,
        help="The number of versions of each training sound, including the unchanged one.",
    )
    parser.add_argument(
        "--mixtures", type=int, help="The number of training clips of two sounds at once."
    )
    parser.add_argument(
        "--pairs", type=int, help="The number of training clips of one sound after another."
    )
    parser.add_argument(
        "--versions",
        type=int,
        help="The number of versions of each spoken training clip, including the unchanged one.",
    )
    parser.add_argument(
        "--speech_fraction",
        type=float,
        help=f"The fraction of LTU-AS's examples that are about speech ({SPEECH_FRACTION}).",
    )
    parser.add_argument(
        "--no_sound_transcripts",
        action="store_true",
        help="LTU-AS gets an empty transcript with sounds, in training and in the test.",
    )
    parser.add_argument(
        "--no_descriptions",
        action="store_true",
        help="No label comes after an acoustic description.",
    )
    parser.add_argument(
        "--write_split", action="store_true", help="Only write data/toy/split.json."
    )
    parser.add_argument(
        "--write_attribution", action="store_true", help="Only write data/toy/ATTRIBUTION.md."
    )
    args = parser.parse_args(argv)
    sizes = replace(DEFAULTS[args.kind])
    if args.num_examples is not None:
        num_stages = len(sizes.num_examples)
        sizes.num_examples = parse_num_examples(parser, args.num_examples, num_stages)
    if args.kind == "ltu":
        for flag in ("versions", "speech_fraction", "no_sound_transcripts"):
            if getattr(args, flag) not in (None, False):
                parser.error(f"--{flag} is for --kind ltu_as only")
    speech_fraction = SPEECH_FRACTION
    if args.speech_fraction is not None:
        speech_fraction = args.speech_fraction
    if not 0 <= speech_fraction < 1:
        parser.error(f"--speech_fraction must be from 0 to below 1, got {speech_fraction:g}")
    for flag in ("crops", "mixtures", "pairs", "versions"):
        value = getattr(args, flag)
        if value is None:
            continue
        if value < 1:
            parser.error(f"--{flag} must be at least 1, got {value}")
        setattr(sizes, flag, value)
    folder = args.output_dir or Path(FOLDERS[args.kind]) / f"fold{args.fold}"
    args.settings = BuildSettings(
        args.kind,
        folder,
        sizes,
        args.fold,
        args.seed,
        speech_fraction,
        not args.no_sound_transcripts,
        not args.no_descriptions,
    )
    return args


def parse_num_examples(parser: argparse.ArgumentParser, text: str, num_stages: int) -> list[int]:
    """Parse the value of --num_examples, or end with an error."""
    numbers = text.split(",")
    if len(numbers) != num_stages or not all(number.strip().isdigit() for number in numbers):
        shape = ",".join(["600"] * num_stages)
        parser.error(f"--num_examples takes {num_stages} numbers like {shape}, got {text!r}")
    return [int(number) for number in numbers]


def print_counts(counts: Counter[tuple[str, str]], folder: Path) -> None:
    """Print a line for each file with its number of examples, by task."""
    by_file: dict[str, dict[str, int]] = {}
    for (file, task), number in counts.items():
        by_file.setdefault(file, {})[task] = number
    for file, tasks in by_file.items():
        listed = ", ".join(f"{task} {number}" for task, number in sorted(tasks.items()))
        print(f"{file:{max(14, len(file) + 2)}}{sum(tasks.values()):6} examples: {listed}")
    print(f"in {folder}")


def main(argv: list[str] | None = None) -> None:
    """Build a fold and print the number of examples."""
    args = parse_args(argv)
    if args.write_split:
        write_json(make_split(read_manifest()), HERE / "split.json")
    if args.write_attribution:
        write_attribution(read_manifest(), HERE / "ATTRIBUTION.md")
    if args.write_split or args.write_attribution:
        return
    print_counts(build(args.settings), args.settings.output_dir)


if __name__ == "__main__":
    run_command(main)
