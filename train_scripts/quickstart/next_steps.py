"""Prints commands that ask the trained models about held-out clips, and where the results are.

python -m train_scripts.quickstart.next_steps --exp_dir exp/quickstart/seed0 --kinds ltu ltu_as
"""

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from data.toy.sound_clips import AUDIO, read_fold, read_json
from data.toy.speech_clips import SPEECH, read_speech
from ltu.files import run_command

PYTHON = ".venv/bin/python"
FOLD = 0  # Held out by quickstart.sh.
LABEL = "dog"  # Of the sound to ask about, if one of the held-out clips has it.
PAGE = "http://127.0.0.1:7860"  # Address of a page, if no other one runs.
TITLES = {"ltu": "LTU", "ltu_as": "LTU-AS"}


@dataclass
class Example:
    """A held-out clip and questions about it, in phrasings that training never had."""

    clip: str
    questions: list[str]


def sound_example() -> Example:
    """Return a held-out sound with a closed-ended and an open-ended question."""
    _, held_out = read_fold(FOLD)
    dogs = [sound for sound in held_out if sound["label"] == LABEL]
    sound = (dogs or held_out)[0]
    questions = read_json("questions.json")
    closed_ended = questions["closed"]["cla_label"]["test"][0]
    open_ended = questions["open"]["identify_why"]["test"][0]
    return Example(os.path.relpath(AUDIO / sound["file"]), [closed_ended, open_ended])


def speech_example() -> Example:
    """Return a clip of a speaker whom training never had, and a question about its words."""
    clips = read_speech()
    known_speakers = {clip["speaker"] for clip in clips if clip["split"] == "train"}
    new_speakers = [clip for clip in clips if clip["speaker"] not in known_speakers]
    questions = read_json("speech/questions.json")
    question = questions["closed"]["spoken_text"]["test"][0]
    return Example(os.path.relpath(SPEECH / new_speakers[0]["file"]), [question])


def last_stage(folder: Path) -> Path:
    """Return the checkpoint folder of the last stage in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    stages = sorted(folder.glob("stage*"))
    if not stages:
        raise FileNotFoundError(f"{folder} has no stage*: train the model with quickstart.sh.")
    return stages[-1]


def describe(exp_dir: Path, kinds: list[str]) -> str:
    """Return the text that is printed.

    Args:
        exp_dir: the folder of a run of quickstart.sh.
        kinds: the models that it has trained.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    folders = {"ltu": exp_dir, "ltu_as": exp_dir / "ltu_as"}
    pages = []
    questions = []
    results = []
    sound = sound_example()
    for kind in kinds:
        folder = folders[kind]
        checkpoint = last_stage(folder)
        model = ["--model", str(checkpoint)]
        pages.append([PYTHON, "-m", f"{kind}.inference_gradio", *model])
        examples = [sound]
        if kind == "ltu_as":
            examples.append(speech_example())
        for example in examples:
            for question in example.questions:
                questions.append([PYTHON, "-m", f"{kind}.ask", example.clip, question, *model])
        tables = [folder / "table.json", *sorted(checkpoint.glob("*_table.json"))]
        results += [
            TITLES[kind],
            f"  pictures  {folder / 'loss.png'}, {folder / 'confusion.png'}",
            f"  answers   {checkpoint / 'answers'}",
            f"  tables    {', '.join(map(str, tables))}",
        ]

    closed_ended, open_ended = sound.questions
    lines = [
        f"A page in the browser, at the address that the command prints ({PAGE}):",
        *_indent(pages),
        "",
        f"A clip for it that training never had: {sound.clip}",
        f"  a closed-ended question: {closed_ended}",
        f"  an open-ended question:  {open_ended}",
        "",
        "The same on the command line:",
        *_indent(questions),
        "",
        *results,
    ]
    return "\n".join(lines)


def _indent(commands: list[list[str]]) -> list[str]:
    """Return each command as an indented line for a shell."""
    return [f"  {shlex.join(words)}" for words in commands]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--exp_dir", type=Path, required=True, help="The folder of a run of quickstart.sh."
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(TITLES),
        default=list(TITLES),
        help="The models that were trained.",
    )
    args = parser.parse_args(argv)
    print(describe(args.exp_dir, args.kinds))


if __name__ == "__main__":
    run_command(main)
