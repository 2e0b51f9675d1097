"""The spoken part of the toy test of LTU-AS: who speaks, how, and what.

    python -m eval.toy_speech --run exp/quickstart/seed0/ltu_as/stage3_all_mix_v2
    python -m eval.toy_speech --run exp/as/fold0/stage3_all_mix_v2 exp/as/fold1/stage3_all_mix_v2

A run's folder holds `answers/<name>.json`, what `ltu_as.inference_batch` wrote to the question files `speech_*.json` of
`data.toy.build_as`. Files that are not there leave their lines out.

Notable:
- An answer counts only if it has, as a whole, the form that was taught. One that is no word or an error is wrong.
- Words are compared after Whisper's own normaliser; "Spoken text:" is taken off where an answer begins with it.
- All runs ask about the same clips and voices, so each has a column and a Wilson interval (95 %) of its own; the mean
  over runs has none. Four training voices and three test voices say little about voices at large.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from eval.toy import TOY, PredictionError, rate

CHOICES = {  # question file -> the form of an answer; the group is what is asked
    "speech_gender": r"(male|female)\s*\.?",
    "speech_gender_empty": r"(male|female)\s*\.?",
    "speech_pitch": r"the pitch is (low|medium|high)\s*\.?",
    "speech_speed": r"the speed is (slow|normal|fast)\s*\.?",
}
TITLES = {
    "speech_gender": "gender, words given",
    "speech_gender_empty": "gender, no words",
    "speech_pitch": "pitch",
    "speech_speed": "speed",
}
WORDS = {  # question file -> what stood in `input`
    "speech_words_right": "right words given",
    "speech_words_whisper": "Whisper's words",
    "speech_words_wrong": "another clip's words",
    "speech_words_none": "no words",
}
SPOKEN = re.compile(r"\s*spoken text:\s*", re.IGNORECASE)
Line = dict[str, float]  # "share" with "low" and "high", or "share" alone


def read_choice(file: str, answer: str | None) -> str | None:
    """What an answer chose, in lower case; None if it has another form."""
    match = re.fullmatch(CHOICES[file], (answer or "").strip(), re.IGNORECASE)
    return match[1].lower() if match else None


def spoken(answer: str | None) -> str:
    """The words of an answer, without the prefix if it has one."""
    return SPOKEN.sub("", answer or "", count=1) if SPOKEN.match(answer or "") else answer or ""


def word_error_rate(references: list[str], answers: list[str]) -> float:
    """Errors of all answers by words of all references, after normalising both."""
    normalise = EnglishTextNormalizer({})
    return float(
        jiwer.wer([normalise(text) for text in references], [normalise(text) for text in answers])
    )


def read_run(folder: Path, clips: dict[str, dict]) -> dict[str, list[dict]]:
    """Question file -> predictions; each with "clip", the manifest's line of its clip."""
    found = {}
    for file in (*CHOICES, *WORDS):
        path = folder / "answers" / f"{file}.json"
        if not path.is_file():
            continue
        found[file] = json.loads(path.read_text(encoding="utf-8"))
        names = [Path(row["audio_id"]).name for row in found[file]]
        if sorted(names) != sorted(asked(file, clips)):
            raise PredictionError(
                f"{path} does not ask about each held-out clip once. Build the data and answer anew."
            )
        for row, name in zip(found[file], names, strict=True):
            row["clip"] = clips[name]
            if row["ref"] != reference(file, row["clip"]):
                raise PredictionError(
                    f"{path}: the reference {row['ref']!r} is not what data/toy/speech/manifest.jsonl says of {name}. "
                    "Build the data and answer anew."
                )
    if not found:
        raise PredictionError(
            f"{folder} holds no answers/speech_*.json. Answer the questions of data.toy.build_as first."
        )
    return found


def asked(file: str, clips: dict[str, dict]) -> list[str]:
    """The clips that a question file is about: those held out, and for the gender only voices not in training."""
    known = {clip["voice"] for clip in clips.values() if clip["split"] == "train"}
    heldout = [clip for clip in clips.values() if clip["split"] == "test"]
    return [
        clip["file"]
        for clip in heldout
        if clip["voice"] not in known or not file.startswith("speech_gender")
    ]


def reference(file: str, clip: dict) -> str:
    """The right answer to a question file's question about a clip."""
    if file in WORDS:
        return f"Spoken text: {clip['text']}"
    if file.startswith("speech_gender"):
        return f"{clip['gender'].capitalize()}."
    key = file.removeprefix("speech_")
    return f"The {key} is {clip[key]}."


def choice_lines(file: str, rows: list[dict]) -> dict[str, Line]:
    """Share of right answers, per voice for the gender, of answers in form, and of the most frequent reference."""
    title = TITLES[file]
    truths = [read_choice(file, row["ref"]) for row in rows]
    chosen = [read_choice(file, row["pred"]) for row in rows]
    hits = [choice == truth for choice, truth in zip(chosen, truths, strict=True)]
    lines = {title: rate(hits)}
    if file.startswith("speech_gender"):
        for voice in dict.fromkeys(row["clip"]["voice"] for row in rows):
            own = [
                hit for hit, row in zip(hits, rows, strict=True) if row["clip"]["voice"] == voice
            ]
            lines[f"{title}: {voice} ({rows_gender(rows, voice)})"] = rate(own)
    lines[f"{title}: in form"] = rate([choice is not None for choice in chosen])
    lines[f"{title}: if always the most frequent"] = {
        "share": Counter(truths).most_common(1)[0][1] / len(truths)
    }
    return lines


def rows_gender(rows: list[dict], voice: str) -> str:
    """The gender of a voice."""
    return next(row["clip"]["gender"] for row in rows if row["clip"]["voice"] == voice)


def word_lines(file: str, rows: list[dict]) -> dict[str, Line]:
    """Word error rates: of all clips, of the recorded voice, of what the model was given; and the answers in form."""
    title = WORDS[file]
    texts = [row["clip"]["text"] for row in rows]
    answers = [spoken(row["pred"]) for row in rows]
    lines: dict[str, Line] = {f"WER, {title}": {"share": word_error_rate(texts, answers)}}
    recorded = [number for number, row in enumerate(rows) if "source_file" in row["clip"]]
    for name, chosen in (
        ("recorded voice", recorded),
        ("synthetic", sorted(set(range(len(rows))) - set(recorded))),
    ):
        if chosen:
            errors = word_error_rate(
                [texts[number] for number in chosen], [answers[number] for number in chosen]
            )
            lines[f"WER, {title}: {name}"] = {"share": errors}
    given = [row.get("transcript") or "" for row in rows]
    if any(given):
        lines[f"WER, {title}: those words themselves"] = {"share": word_error_rate(texts, given)}
    lines[f"{title}: in form"] = rate([SPOKEN.match(row["pred"] or "") is not None for row in rows])
    return lines


def evaluate(folders: list[Path]) -> dict:
    """Everything that is printed: the runs and, by title of a line, one value a run and their mean.

    Raises:
        PredictionError: a run has no answers, or answers to other questions.
    """
    lines = (TOY / "speech" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    clips = {clip["file"]: clip for clip in map(json.loads, lines)}
    table: dict[str, list[Line | None]] = {}
    for number, folder in enumerate(folders):
        for file, rows in read_run(folder, clips).items():
            scored = choice_lines(file, rows) if file in CHOICES else word_lines(file, rows)
            for title, line in scored.items():
                table.setdefault(title, [None] * len(folders))[number] = line
    rows = []
    for title, cells in table.items():
        shares = [cell["share"] for cell in cells if cell is not None]
        rows.append({"name": title, "runs": cells, "mean": sum(shares) / len(shares)})
    return {"runs": [folder.name for folder in folders], "rows": rows}


def format_table(result: dict) -> str:
    """The table as text."""
    width = max(len(row["name"]) for row in result["rows"])
    several = len(result["runs"]) > 1
    heads = [*result["runs"], *(["mean"] if several else [])]
    lines = [
        "Held-out speech: shares with 95 % intervals, and word error rates (WER).",
        "",
        " " * width + "".join(f"  {head:<17}" for head in heads),
    ]
    for row in result["rows"]:
        cells = [format_line(cell) for cell in row["runs"]] + (
            [f"{row['mean']:.2f}"] if several else []
        )
        lines.append(f"{row['name']:<{width}}" + "".join(f"  {cell:<17}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_line(line: Line | None) -> str:
    """A cell: a share with its interval if it has one, a dash where nothing was answered."""
    if line is None:
        return "-"
    return (
        "{share:.2f} [{low:.2f}, {high:.2f}]".format(**line)
        if "low" in line
        else f"{line['share']:.3f}"
    )


def main(argv: list[str] | None = None) -> None:
    """Print the table and write it as JSON."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument(
        "--run",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="folders that hold answers/",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        default=None,
        help="default: speech_table.json in the first folder",
    )
    args = parser.parse_args(argv)
    try:
        result = evaluate(args.run)
    except PredictionError as error:
        parser.exit(1, f"{error}\n")
    path = args.output_path or args.run[0] / "speech_table.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{format_table(result)}\n\nThe table as JSON: {path}")


if __name__ == "__main__":
    main()
