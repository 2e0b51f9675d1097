"""Scores the speech part of the toy test of LTU-AS: the speaker, the manner and the transcript.

    python -m eval.toy_speech --run exp/quickstart/seed0/ltu_as/stage3_all_mix_v2
    python -m eval.toy_speech --run exp/as/fold0/stage3_all_mix_v2 exp/as/fold1/stage3_all_mix_v2

The folder of a run holds `answers/<name>.json`, which `ltu_as.inference_batch` wrote for the
dataset files `speech_*.json` of `data.toy.build --kind ltu_as`. Missing files leave their lines
out.

An answer counts only if, as a whole, it has the form that was trained. An empty or failed answer is
wrong. Transcripts are compared after Whisper's normalizer, without its table of British spellings.
"Spoken text:" is removed where an answer begins with it. An answer with more wrong words than its
reference has words raises the word error rate more than an empty one; in the rows "at most 1 a
clip" it counts as one, so that no answer is never better than a wrong one.

All runs have the same clips and voices, so each run has a column and a 95 % Wilson interval of its
own; the mean over runs has none. Seven test voices say little about voices at large.
"""

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from eval.scorer_interface import EvaluationError, failure, load_predictions
from eval.toy import TOY, Rate, format_row
from ltu.files import missing_package, run_command, write_json

try:
    import jiwer

    from eval.speech import error_rate  # It imports jiwer, too.
except ImportError as error:
    raise missing_package(error, "eval") from error

# Name of the dataset file -> form of an answer; the group is the chosen value.
CHOICES = {
    "speech_gender": r"(male|female)\s*\.?",
    "speech_gender_empty": r"(male|female)\s*\.?",
    "speech_pitch": r"the pitch is (low|medium|high)\s*\.?",
    "speech_speed": r"the speed is (slow|normal|fast)\s*\.?",
}
TITLES = {
    "speech_gender": "gender, transcript given",
    "speech_gender_empty": "gender, no transcript",
    "speech_pitch": "pitch",
    "speech_speed": "speed",
}
# Name of the dataset file -> content of `input`.
TRANSCRIPTS = {
    "speech_words_right": "right transcript given",
    "speech_words_whisper": "Whisper's transcript",
    "speech_words_wrong": "another clip's transcript",
    "speech_words_none": "no transcript",
}
SPOKEN = re.compile(r"\A\s*spoken text:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class WordErrorRate:
    """The errors of all answers divided by the words of all references."""

    wer: float

    @property
    def value(self) -> float:
        return self.wer

    def __str__(self) -> str:
        return f"{self.wer:.3f}"


@dataclass(frozen=True)
class Majority:
    """The fraction of right answers if all were the most frequent reference."""

    fraction: float

    @property
    def value(self) -> float:
        return self.fraction

    def __str__(self) -> str:
        return f"{self.fraction:.3f}"


Score = Rate | WordErrorRate | Majority


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: Title of the row.
        scores: The score of each run, None for a run without predictions.
    """

    name: str
    scores: list[Score | None]

    @property
    def mean(self) -> float:
        """The mean over the runs that have predictions."""
        values = [score.value for score in self.scores if score is not None]
        return sum(values) / len(values)

    def to_json(self) -> dict[str, Any]:
        cells = [asdict(score) if score else None for score in self.scores]
        return {"name": self.name, "runs": cells, "mean": self.mean}


@dataclass(frozen=True)
class Table:
    """The result of an evaluation: the names of the runs, and the rows."""

    runs: list[str]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Return the content of speech_table.json."""
        return {"runs": self.runs, "rows": [row.to_json() for row in self.rows]}


def read_choice(file: str, answer: str | None) -> str | None:
    """Return the value that an answer chose, in lower case, None if it has another form."""
    match = re.fullmatch(CHOICES[file], (answer or "").strip(), re.IGNORECASE)
    if match is None:
        return None
    return match[1].lower()


def spoken(answer: str | None) -> str:
    """Return the transcript in an answer, without the prefix if it has one."""
    return SPOKEN.sub("", answer or "", count=1)


def word_error_rate(references: list[str], answers: list[str]) -> float:
    """Return the errors of all answers divided by the words of all references, normalized."""
    normalize = EnglishTextNormalizer({})
    return float(jiwer.wer([*map(normalize, references)], [*map(normalize, answers)]))


def bounded_word_error_rate(references: list[str], answers: list[str]) -> float:
    """Return the word error rate if an answer has at most as many errors as its reference words."""
    normalize = EnglishTextNormalizer({})
    counts = []
    for reference, answer in zip(references, answers, strict=True):
        found = jiwer.process_words(normalize(reference), normalize(answer))
        words = found.hits + found.substitutions + found.deletions
        errors = found.substitutions + found.deletions + found.insertions
        counts.append((min(errors, words), words))
    return error_rate(np.array(counts))


def read_run(folder: Path, clips: dict[str, dict]) -> dict[str, list[dict]]:
    """Read the predictions of each dataset file; "clip" of each is its line of the manifest.

    Raises:
        EvaluationError: There are no predictions, or they do not fit the data.
    """
    found = {}
    for file in (*CHOICES, *TRANSCRIPTS):
        path = folder / "answers" / f"{file}.json"
        if path.is_file():
            found[file] = read_answers(path, file, clips)
    if not found:
        raise EvaluationError(
            f"{folder} holds no answers/speech_*.json. "
            "Answer the questions of data.toy.build --kind ltu_as first."
        )
    return found


def read_answers(path: Path, file: str, clips: dict[str, dict]) -> list[dict]:
    """Read the predictions of one dataset file.

    Raises:
        EvaluationError: They do not have each held-out clip once, or another reference.
    """
    predictions = load_predictions(path)
    names = [Path(prediction["audio_id"] or "").name for prediction in predictions]
    if sorted(names) != sorted(expected_clips(file, clips)):
        raise EvaluationError(
            f"{path} does not have each held-out clip once. "
            "Build the data and generate the predictions again."
        )
    for prediction, name in zip(predictions, names, strict=True):
        prediction["clip"] = clips[name]
        if failure(prediction, "strict"):
            prediction["pred"] = None
        if prediction["ref"] != reference(file, clips[name]):
            raise EvaluationError(
                f"{path}: the reference {prediction['ref']!r} is not what "
                f"data/toy/speech/manifest.jsonl says of {name}. "
                "Build the data and generate the predictions again."
            )
    return predictions


def expected_clips(file: str, clips: dict[str, dict]) -> list[str]:
    """Return the clips of a dataset file: those held out, for gender only with unknown voices."""
    known_voices = set()
    for clip in clips.values():
        if clip["split"] == "train":
            known_voices.add(clip["voice"])
    names = []
    for clip in clips.values():
        is_excluded = file.startswith("speech_gender") and clip["voice"] in known_voices
        if clip["split"] == "test" and not is_excluded:
            names.append(clip["file"])
    return names


def reference(file: str, clip: dict) -> str:
    """Return the right answer to the question of a dataset file about a clip."""
    if file in TRANSCRIPTS:
        return f"Spoken text: {clip['text']}"
    if file.startswith("speech_gender"):
        return f"{clip['gender'].capitalize()}."
    key = file.removeprefix("speech_")
    return f"The {key} is {clip[key]}."


def choice_scores(file: str, predictions: list[dict]) -> dict[str, Score]:
    """Return the fractions of right and of well-formed answers, and of the majority reference.

    For gender, also the fraction of right answers for each voice.

    Returns:
        title of a row -> score
    """
    references = []
    hits = []
    well_formed = []
    hits_of_voice: dict[str, list[bool]] = {}
    genders = {}
    for prediction in predictions:
        expected = read_choice(file, prediction["ref"])
        choice = read_choice(file, prediction["pred"])
        references.append(expected)
        hits.append(choice == expected)
        well_formed.append(choice is not None)
        clip = prediction["clip"]
        hits_of_voice.setdefault(clip["voice"], []).append(choice == expected)
        genders[clip["voice"]] = clip["gender"]
    title = TITLES[file]
    scores: dict[str, Score] = {title: Rate.of(hits)}
    if file.startswith("speech_gender"):
        for voice, own_hits in hits_of_voice.items():
            scores[f"{title}: {voice} ({genders[voice]})"] = Rate.of(own_hits)
    scores[f"{title}: well-formed"] = Rate.of(well_formed)
    _, majority_count = Counter(references).most_common(1)[0]
    majority = Majority(majority_count / len(references))
    scores[f"{title}: if always the most frequent"] = majority
    return scores


def transcript_scores(file: str, predictions: list[dict]) -> dict[str, Score]:
    """Return word error rates and the fraction of well-formed answers.

    There is a word error rate of all clips, of the recorded voice, of the synthetic voices, and of
    the transcripts that the model was given; and one of all clips to which a clip adds at most 1.

    Returns:
        title of a row -> score
    """
    title = TRANSCRIPTS[file]
    recorded = []
    synthetic = []
    for prediction in predictions:
        is_recorded = "source_file" in prediction["clip"]
        part = recorded if is_recorded else synthetic
        part.append(prediction)
    scores: dict[str, Score] = {f"WER, {title}": answers_wer(predictions)}
    if recorded:
        scores[f"WER, {title}: recorded voice"] = answers_wer(recorded)
    if synthetic:
        scores[f"WER, {title}: synthetic"] = answers_wer(synthetic)
    texts = [prediction["clip"]["text"] for prediction in predictions]
    answers = [spoken(prediction["pred"]) for prediction in predictions]
    bounded = WordErrorRate(bounded_word_error_rate(texts, answers))
    scores[f"WER, {title}: at most 1 a clip"] = bounded
    transcripts = [prediction.get("transcript") or "" for prediction in predictions]
    if any(transcripts):
        errors = word_error_rate(texts, transcripts)
        scores[f"WER, {title}: the transcript itself"] = WordErrorRate(errors)
    well_formed = []
    for prediction in predictions:
        match = SPOKEN.match(prediction["pred"] or "")
        well_formed.append(match is not None)
    scores[f"{title}: well-formed"] = Rate.of(well_formed)
    return scores


def answers_wer(predictions: list[dict]) -> WordErrorRate:
    """Return the word error rate of the transcripts in answers."""
    texts = [prediction["clip"]["text"] for prediction in predictions]
    answers = [spoken(prediction["pred"]) for prediction in predictions]
    return WordErrorRate(word_error_rate(texts, answers))


def evaluate(folders: list[Path]) -> Table:
    """Return the table with a column for each run.

    Raises:
        EvaluationError: A run has no answers, or answers to other questions.
    """
    clips = {}
    for line in (TOY / "speech" / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        clip = json.loads(line)
        clips[clip["file"]] = clip
    rows: dict[str, Row] = {}
    for number, folder in enumerate(folders):
        for file, predictions in read_run(folder, clips).items():
            make_scores = choice_scores if file in CHOICES else transcript_scores
            for title, score in make_scores(file, predictions).items():
                row = rows.setdefault(title, Row(title, [None] * len(folders)))
                row.scores[number] = score
    return Table([folder.name for folder in folders], list(rows.values()))


def format_table(table: Table) -> str:
    """Return the table as text."""
    width = max(len(row.name) for row in table.rows)
    has_mean = len(table.runs) > 1
    titles = list(table.runs)
    if has_mean:
        titles.append("mean")
    lines = [
        "Held-out speech: fractions with 95 % intervals, and word error rates (WER).",
        "",
        format_row("", width, titles),
    ]
    for row in table.rows:
        cells = [str(score or "-") for score in row.scores]
        if has_mean:
            cells.append(f"{row.mean:.2f}")
        lines.append(format_row(row.name, width, cells))
    return "\n".join(lines)


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
        help="The folders that contain answers/.",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        help="The JSON file to write (default: speech_table.json in the first folder).",
    )
    args = parser.parse_args(argv)
    table = evaluate(args.run)
    path = args.output_path or args.run[0] / "speech_table.json"
    write_json(table.to_json(), path)
    print(f"{format_table(table)}\n\nThe table as JSON: {path}")


if __name__ == "__main__":
    run_command(main)
