"""Scores the speech part of the toy test of LTU-AS: the speaker, the manner and the transcript.

    python -m eval.toy_speech --run exp/quickstart/seed0/ltu_as/stage3_all_mix_v2
    python -m eval.toy_speech --run exp/as/fold0/stage3_all_mix_v2 exp/as/fold1/stage3_all_mix_v2

The folder of a run holds `answers/<name>.json`, which `ltu_as.inference_batch` wrote for the
dataset files `speech_*.json` of `data.toy.build --kind ltu_as`. Missing files leave their lines
out.

An answer counts only if, as a whole, it has the form that was trained. An empty or failed answer is
wrong. Transcripts are compared after Whisper's own normalizer; "Spoken text:" is removed where an
answer begins with it.

All runs have the same clips and voices, so each run has a column and a 95 % Wilson interval of its
own; the mean over runs has none. Four training voices and three test voices say little about voices
at large.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from eval.toy import TOY, PredictionError, rate

# Name of the dataset file -> form of an answer; the group is the chosen value.
CHOICES = {
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
# Name of the dataset file -> content of `input`.
WORDS = {
    "speech_words_right": "right words given",
    "speech_words_whisper": "Whisper's words",
    "speech_words_wrong": "another clip's words",
    "speech_words_none": "no words",
}
SPOKEN = re.compile(r"\s*spoken text:\s*", re.IGNORECASE)
Line = dict[str, float]  # "share" with "low" and "high", or "share" alone


def read_choice(file: str, answer: str | None) -> str | None:
    """Return the value that an answer chose, in lower case, None if it has another form."""
    match = re.fullmatch(CHOICES[file], (answer or "").strip(), re.IGNORECASE)
    return match[1].lower() if match else None


def spoken(answer: str | None) -> str:
    """Return the transcript in an answer, without the prefix if it has one."""
    text = answer or ""
    match = SPOKEN.match(text)
    return text[match.end() :] if match else text


def word_error_rate(references: list[str], answers: list[str]) -> float:
    """Return the errors of all answers divided by the words of all references, normalized."""
    normalize = EnglishTextNormalizer({})
    return float(jiwer.wer([*map(normalize, references)], [*map(normalize, answers)]))


def read_run(folder: Path, clips: dict[str, dict]) -> dict[str, list[dict]]:
    """Return the predictions of each dataset file; "clip" of each is its line of the manifest.

    Raises:
        PredictionError: There are no predictions, or they do not fit the data.
    """
    found = {}
    for file in (*CHOICES, *WORDS):
        path = folder / "answers" / f"{file}.json"
        if not path.is_file():
            continue
        found[file] = json.loads(path.read_text(encoding="utf-8"))
        names = [Path(row["audio_id"]).name for row in found[file]]
        if sorted(names) != sorted(expected_clips(file, clips)):
            raise PredictionError(
                f"{path} does not have each held-out clip once. "
                "Build the data and generate the predictions again."
            )
        for row, name in zip(found[file], names, strict=True):
            row["clip"] = clips[name]
            if row["ref"] != reference(file, row["clip"]):
                raise PredictionError(
                    f"{path}: the reference {row['ref']!r} is not what "
                    f"data/toy/speech/manifest.jsonl says of {name}. "
                    "Build the data and generate the predictions again."
                )
    if not found:
        raise PredictionError(
            f"{folder} holds no answers/speech_*.json. "
            "Answer the questions of data.toy.build --kind ltu_as first."
        )
    return found


def expected_clips(file: str, clips: dict[str, dict]) -> list[str]:
    """Return the clips of a dataset file: those held out, for gender only with unknown voices."""
    known = {clip["voice"] for clip in clips.values() if clip["split"] == "train"}
    names = []
    for clip in clips.values():
        is_known = file.startswith("speech_gender") and clip["voice"] in known
        if clip["split"] == "test" and not is_known:
            names.append(clip["file"])
    return names


def reference(file: str, clip: dict) -> str:
    """Return the right answer to the question of a dataset file about a clip."""
    if file in WORDS:
        return f"Spoken text: {clip['text']}"
    if file.startswith("speech_gender"):
        return f"{clip['gender'].capitalize()}."
    key = file.removeprefix("speech_")
    return f"The {key} is {clip[key]}."


def choice_lines(file: str, rows: list[dict]) -> dict[str, Line]:
    """Return the fractions of right and of well-formed answers, and of the majority reference.

    For gender, also the fraction of right answers for each voice.
    """
    title = TITLES[file]
    references = [read_choice(file, row["ref"]) for row in rows]
    chosen = [read_choice(file, row["pred"]) for row in rows]
    hits = [choice == expected for choice, expected in zip(chosen, references, strict=True)]
    lines = {title: rate(hits)}
    if file.startswith("speech_gender"):
        voices: dict[str, list[bool]] = {}
        for hit, row in zip(hits, rows, strict=True):
            voices.setdefault(row["clip"]["voice"], []).append(hit)
        for voice, own_hits in voices.items():
            lines[f"{title}: {voice} ({rows_gender(rows, voice)})"] = rate(own_hits)
    lines[f"{title}: in form"] = rate([choice is not None for choice in chosen])
    _, majority_count = Counter(references).most_common(1)[0]
    lines[f"{title}: if always the most frequent"] = {"share": majority_count / len(references)}
    return lines


def rows_gender(rows: list[dict], voice: str) -> str:
    """Return the gender of a voice."""
    return next(row["clip"]["gender"] for row in rows if row["clip"]["voice"] == voice)


def word_lines(file: str, rows: list[dict]) -> dict[str, Line]:
    """Return word error rates and the fraction of well-formed answers.

    There is a word error rate of all clips, of the recorded voice, of the synthetic voices, and of
    the transcripts that the model was given.
    """
    title = WORDS[file]
    texts = [row["clip"]["text"] for row in rows]
    answers = [spoken(row["pred"]) for row in rows]
    lines: dict[str, Line] = {f"WER, {title}": {"share": word_error_rate(texts, answers)}}
    recorded = [number for number, row in enumerate(rows) if "source_file" in row["clip"]]
    synthetic = [number for number, row in enumerate(rows) if "source_file" not in row["clip"]]
    for name, numbers in (("recorded voice", recorded), ("synthetic", synthetic)):
        if not numbers:
            continue
        own_texts = [texts[number] for number in numbers]
        own_answers = [answers[number] for number in numbers]
        errors = word_error_rate(own_texts, own_answers)
        lines[f"WER, {title}: {name}"] = {"share": errors}
    transcripts = [row.get("transcript") or "" for row in rows]
    if any(transcripts):
        errors = word_error_rate(texts, transcripts)
        lines[f"WER, {title}: those words themselves"] = {"share": errors}
    is_well_formed = [SPOKEN.match(row["pred"] or "") is not None for row in rows]
    lines[f"{title}: in form"] = rate(is_well_formed)
    return lines


def evaluate(folders: list[Path]) -> dict:
    """Return the runs and, for each title of a line, one value per run and their mean.

    Raises:
        PredictionError: A run has no answers, or answers to other questions.
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
        values = [cell["share"] for cell in cells if cell is not None]
        rows.append({"name": title, "runs": cells, "mean": sum(values) / len(values)})
    return {"runs": [folder.name for folder in folders], "rows": rows}


def format_table(result: dict) -> str:
    """Return the table as text."""
    width = max(len(row["name"]) for row in result["rows"])
    has_mean = len(result["runs"]) > 1
    heads = [*result["runs"], "mean"] if has_mean else result["runs"]
    lines = [
        "Held-out speech: fractions with 95 % intervals, and word error rates (WER).",
        "",
        " " * width + "".join(f"  {head:<17}" for head in heads),
    ]
    for row in result["rows"]:
        cells = [format_line(cell) for cell in row["runs"]]
        if has_mean:
            cells.append(f"{row['mean']:.2f}")
        lines.append(f"{row['name']:<{width}}" + "".join(f"  {cell:<17}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_line(line: Line | None) -> str:
    """Return a cell: a fraction with its interval if it has one, a dash without predictions."""
    if line is None:
        return "-"
    if "low" in line:
        return "{share:.2f} [{low:.2f}, {high:.2f}]".format(**line)
    return f"{line['share']:.3f}"


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
        help="JSON file (default: speech_table.json in the first folder)",
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
