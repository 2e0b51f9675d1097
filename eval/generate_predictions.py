"""Generates the predictions of a model for tasks, or scores every class as the answer.

An interrupted run resumes where it stopped.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ltu_as  # noqa: F401  registers its classes, so that the engine opens both models
from eval.classification import Classes
from eval.report import (
    PREDICTIONS,
    dataset_record,
    provenance_file,
    read_provenance,
    write_records,
)
from eval.scorer_interface import ANSWERED
from eval.tasks import Task
from ltu.data.audio import AudioError
from ltu.data.check_examples import read_examples
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import encode_line, stream_examples
from ltu.files import replace_file, sha256_of, write_json
from ltu.inference.batch_inference import (
    BatchSettings,
    add_batch_flags,
    answer_files,
    make_requests,
)
from ltu.inference.generation_flags import open_engine
from ltu.inference.sampling import check_decoding
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.model_card import EVALUATION


@dataclass(frozen=True)
class GenerationSettings:
    """Everything but model and questions that decides the predictions.

    Args:
        flags: flags of ltu.inference_batch, as given on the command line.
        seed: seed of sampling in the first trial; the next trial has the next seed.
        audio_root: folder of relative `audio_id`s; None is the folder of the questions.
        ignored_keys: further keys that questions may have.
        columns: split and names of columns of the questions.
        label_prompt: question of `score_labels`.
        label_answer: template of a class as the answer, for `score_labels`.
    """

    flags: list[str] = field(default_factory=list)
    seed: int = 42
    audio_root: Path | None = None
    ignored_keys: frozenset[str] = frozenset()
    columns: ColumnFlags = field(default_factory=ColumnFlags)
    label_prompt: str = "Closed-ended question: Generate audio labels."
    label_answer: str = "Labels: {}"

    def read_questions(self, path: Path) -> list[dict]:
        """Return the questions of a data set.

        Raises:
            DatasetError: as `ltu.data.check_examples.checked_examples`.
        """
        return read_examples(path, self.audio_root, False, self.ignored_keys, self.columns)

    def parse_flags(self, model: str) -> argparse.Namespace:
        """Return the flags of the engine and of generation for a model.

        A flag that is wrong ends the command.

        Raises:
            OSError: The checkpoint is not there.
        """
        find_checkpoint(model, CHECKPOINT_FILES)
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_batch_flags(parser)
        return parser.parse_args(["--model", model, "--seed", str(self.seed), *self.flags])


def provenance(model: str, questions: Path, settings: GenerationSettings) -> dict[str, Any]:
    """Return everything that decides the answers, except the content of the clips."""
    folder = find_checkpoint(model, CHECKPOINT_FILES)
    small_files = {}
    for path in sorted(folder.iterdir()):
        # The weights are hashed once, by `sha256_of_weights`.
        is_weights = path.name.startswith(("model", "pytorch_model"))
        is_about_model = path.suffix == ".md" or path.name == EVALUATION
        if path.is_file() and not is_about_model and not is_weights:
            small_files[path.name] = sha256_of(path)
    batch_settings = BatchSettings.from_flags(settings.parse_flags(model))
    return {
        "checkpoint": sha256_of_weights(folder),
        "files": small_files,
        "decoding": check_decoding(batch_settings.decoding),
        "flags": settings.flags,
        "seed": settings.seed,
        "questions": dataset_record(questions, settings.columns),
        "audio_root": str(settings.audio_root or questions.parent),
    }


def generate(
    model: str, questions: dict[str, Path], folder: Path, settings: GenerationSettings
) -> int:
    """Write TASK.predictions.json and TASK.provenance.json of each task into a folder.

    In a trial, equal questions on equal clips have one answer, so a repeated question belongs to
    the next trial if answers are sampled. The model is opened once, if there is anything to
    generate.

    Args:
        questions: task -> dataset file.

    Returns:
        The number of questions without an answer.
    """
    # Find the tasks without predictions of these weights and settings, and divide them into trials.
    wanted = {}
    todo = {}  # task -> examples
    trials = {}  # task -> trial of each example
    num_trials = 0
    for task, path in questions.items():
        wanted[task] = provenance(model, path, settings)
        if not is_done(folder / f"{task}{PREDICTIONS}", wanted[task]):
            todo[task] = settings.read_questions(path)
            is_sampled = wanted[task]["decoding"]["do_sample"]
            trials[task] = number_trials(todo[task], is_sampled)
            num_trials = max(num_trials, max(trials[task]) + 1)

    # Generate each trial with its own seed.
    flags = settings.parse_flags(model)
    open_once = cache(partial(open_engine, flags))
    for trial in range(num_trials):
        outputs = {}  # predictions file of the trial -> examples
        provenances = {}  # predictions file of the trial -> provenance
        for task, examples in todo.items():
            path = _trial_file(folder, task, trial)
            own_examples = _examples_of_trial(examples, trials[task], trial)
            if own_examples and not is_done(path, wanted[task]):
                outputs[path] = own_examples
                provenances[path] = wanted[task]
        if outputs:
            batch_settings = BatchSettings.from_flags(flags)
            batch_settings = replace(batch_settings, seed=settings.seed + trial)
            # Questions without an answer are counted below, over all trials.
            answer_files(outputs, open_once, batch_settings, max_bad=0)
        for path, own_provenance in provenances.items():
            write_provenance(path, own_provenance)

    # Merge the trials of each task.
    num_failed = 0
    for task, numbers in trials.items():
        predictions = _merge_trials(task, numbers, folder)
        path = folder / f"{task}{PREDICTIONS}"
        write_records(predictions, path)
        write_provenance(path, wanted[task])
        num_failed += sum(prediction["status"] not in ANSWERED for prediction in predictions)
    return num_failed


def number_trials(examples: list[dict], is_sampled: bool) -> list[int]:
    """Return the trial of each example: how often the same question was there before.

    All examples are in trial 0 if answers are not sampled, because repeats have equal answers.
    """
    repeats: Counter = Counter()
    numbers = []
    for example in examples:
        question = (example.get("audio_id"), example["instruction"], example.get("input"))
        numbers.append(repeats[question] if is_sampled else 0)
        repeats[question] += 1
    return numbers


def _examples_of_trial(examples: list[dict], trials: list[int], trial: int) -> list[dict]:
    found = []
    for example, number in zip(examples, trials, strict=True):
        if number == trial:
            found.append(example)
    return found


def _trial_file(folder: Path, task: str, trial: int) -> Path:
    return folder / "trials" / f"{task}.{trial}.json"


def _merge_trials(task: str, trials: list[int], folder: Path) -> list[dict]:
    """Return the predictions of all trials in the order of the questions, without wall times.

    Args:
        trials: The trial of each question.
    """
    streams = {}
    for number in sorted(set(trials)):
        streams[number] = stream_examples(_trial_file(folder, task, number))
    predictions = []
    for number in trials:
        prediction = next(streams[number])
        del prediction["seconds"]  # It differs between any two runs.
        predictions.append(prediction)
    return predictions


def write_provenance(predictions: Path, wanted: dict[str, Any]) -> None:
    """Write the provenance of a predictions file next to it."""
    write_json(wanted | {"predictions": sha256_of(predictions)}, provenance_file(predictions))


def is_done(predictions: Path, wanted: dict[str, Any]) -> bool:
    """Return whether these predictions have this provenance and all have an answer."""
    if read_provenance(predictions) != wanted:
        return False
    return all(prediction["status"] in ANSWERED for prediction in stream_examples(predictions))


def score_labels(
    model: str, task: Task, questions: Path, folder: Path, settings: GenerationSettings
) -> np.ndarray:
    """Return the log-likelihood of every class as the answer to every clip, (examples, classes).

    It is -inf for clips that cannot be decoded. Writes the files of `generate`, with the likeliest
    class as the answer. Scores are stored as they are computed, in TASK.label_scores.jsonl, whose
    first line is their provenance; a clip that failed is retried by the next run.
    """
    examples = []
    for example in settings.read_questions(questions):
        examples.append(example | {"instruction": settings.label_prompt})
    candidates = label_candidates(task, settings.label_answer)
    wanted = provenance(model, questions, settings)
    wanted |= {"label_prompt": settings.label_prompt, "candidates": candidates}
    scores_path = folder / f"{task.name}.label_scores.jsonl"
    scores = start_scores(scores_path, wanted)
    failed = {}
    if len(scores) < len(examples):
        flags = settings.parse_flags(model)
        failed = _add_scores(scores, scores_path, task.name, examples, candidates, flags)

    matrix = np.full((len(examples), len(candidates)), -np.inf)
    for number, own_scores in scores.items():
        matrix[number] = own_scores
    predictions = []
    for number, example in enumerate(examples):
        likeliest = candidates[matrix[number].argmax()]
        prediction = {
            "prompt": settings.label_prompt,
            "ref": example.get("output"),
            "audio_id": example.get("audio_id"),
            "pred": "" if number in failed else likeliest,
            "status": failed.get(number, "ok"),
        }
        predictions.append(prediction)
    predictions_path = folder / f"{task.name}{PREDICTIONS}"
    write_records(predictions, predictions_path)
    write_provenance(predictions_path, wanted)
    return matrix


def label_candidates(task: Task, template: str) -> list[str]:
    """Return the answer that names each class of a task."""
    candidates = []
    for name in Classes(task, "strict").names:
        words = name.replace("_", " ").split()
        candidates.append(template.format(" ".join(words)))
    return candidates


def _add_scores(
    scores: dict[int, list[float]],
    path: Path,
    task: str,
    examples: list[dict],
    candidates: list[str],
    flags: argparse.Namespace,
) -> dict[int, str]:
    """Score the candidates for the examples that have no scores yet.

    Each example's scores are added to `scores` and to the file.

    Returns:
        Number of an example whose clip cannot be decoded -> reason.
    """
    engine = open_engine(flags)
    failed = {}
    requests = make_requests(examples, BatchSettings.from_flags(flags))
    with path.open("ab") as lines:
        for number, request in enumerate(tqdm(requests, f"labels of {task}", unit="clip")):
            if number in scores:
                continue
            try:
                found = engine.score(request, candidates)
            except AudioError as error:
                failed[number] = error.reason
                continue
            scores[number] = [score.log_likelihood for score in found]
            lines.write(encode_line({"example": number, "scores": scores[number]}) + b"\n")
            lines.flush()
    return failed


def start_scores(path: Path, wanted: dict[str, Any]) -> dict[int, list[float]]:
    """Return the stored scores of a run with this provenance: number of an example -> scores.

    Half a line, and all lines of another run, are removed from the file.
    """
    head = json.dumps(wanted, sort_keys=True).encode()
    stored = []
    if path.is_file():
        first, *rest = path.read_bytes().split(b"\n")
        if first == head:
            stored = rest[:-1]  # The last line is empty or incomplete.
    content = b"".join(line + b"\n" for line in [head, *stored])
    replace_file(path, content, is_synced=True)
    scores = {}
    for line in stored:
        entry = json.loads(line)
        scores[entry["example"]] = entry["scores"]
    return scores
