"""Generates the predictions of a model for tasks, or scores every class as the answer.

An interrupted run resumes where it stopped.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ltu_as  # noqa: F401  registers its classes: with them ltu's commands open both models
from eval.classification import Classes
from eval.report import PREDICTIONS, provenance_file, read_provenance, write_json, write_rows
from eval.scorer_interface import ANSWERED
from eval.tasks import Task
from ltu.data.audio import AudioError
from ltu.data.check_examples import read_rows
from ltu.data.dataset_io import encode_row, stream_rows
from ltu.files import replace_file, sha256_of
from ltu.inference.batch_inference import make_requests
from ltu.inference.generation_flags import open_engine
from ltu.inference.sampling import check_decoding
from ltu.inference_batch import main as inference_batch
from ltu.inference_batch import parse_args
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights


def inference_flags(model: str, args: argparse.Namespace) -> argparse.Namespace:
    """Parse the flags as ltu.inference_batch does, which ends the command if one is wrong."""
    find_checkpoint(model, CHECKPOINT_FILES)
    paths = ["--data_path", "Q.json", "--output_path", "P.json"]
    return parse_args(["--model", model, *paths, "--seed", str(args.seed), *args.rest])


def provenance(model: str, questions: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides the answers, except the content of the clips."""
    folder = find_checkpoint(model, CHECKPOINT_FILES)
    small_files = {}
    for path in sorted(folder.iterdir()):
        # The weights are hashed once, by `sha256_of_weights`.
        is_weights = path.name.startswith(("model", "pytorch_model"))
        if path.is_file() and path.suffix != ".md" and not is_weights:
            small_files[path.name] = sha256_of(path)
    return {
        "checkpoint": sha256_of_weights(folder),
        "files": small_files,
        "decoding": check_decoding(inference_flags(model, args).decoding),
        "flags": args.rest,
        "seed": args.seed,
        "questions": {"path": str(questions), "sha256": sha256_of(questions)},
        "audio_root": str(args.audio_root or questions.parent),
    }


def generate(model: str, files: dict[str, Path], folder: Path, args: argparse.Namespace) -> int:
    """Write TASK.predictions.json and TASK.provenance.json of each task.

    The model is opened once for each trial. In a trial, equal questions on equal clips have one
    answer, so a repeated question belongs to the next trial if answers are sampled.

    Args:
        files: task -> questions.

    Returns:
        1 if more than --max_bad questions got no answer, else 0.
    """
    wanted = {name: provenance(model, path, args) for name, path in files.items()}
    todo = [name for name in files if not is_done(folder / f"{name}{PREDICTIONS}", wanted[name])]
    trials: dict[str, list[int]] = defaultdict(list)  # task -> trial of each question
    questions: dict[int, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for name in todo:
        seen: Counter = Counter()
        for row in read_rows(files[name], args.audio_root, need_output=False):
            key = row.get("audio_id"), row["instruction"], row.get("input")
            trial = seen[key] if wanted[name]["decoding"]["do_sample"] else 0
            trials[name].append(trial)
            questions[trial][name].append(row)
            seen[key] += 1
    for trial, own_questions in sorted(questions.items()):
        audio_root = wanted[todo[0]]["audio_root"]
        _generate_trial(model, trial, own_questions, folder, wanted, audio_root, args)
    failed = 0
    for name in todo:
        rows = _merge_trials(name, trials[name], folder)
        record(folder / f"{name}{PREDICTIONS}", wanted[name], rows)
        failed += sum(row["status"] not in ANSWERED for row in rows)
    return int(failed > args.max_bad)


def _generate_trial(
    model: str,
    trial: int,
    questions: dict[str, list[dict]],
    folder: Path,
    wanted: dict[str, dict[str, Any]],
    audio_root: str,
    args: argparse.Namespace,
) -> None:
    """Run ltu.inference_batch for the questions of one trial, except those that are done."""
    outputs = {}
    for name in questions:
        path = _trial_file(folder, name, trial)
        if not is_done(path, wanted[name]):
            outputs[name] = path
    if not outputs:
        return
    inputs = []
    for name, path in outputs.items():
        inputs.append(path.with_suffix(".questions.json"))
        write_rows(questions[name], inputs[-1])
    flags = ["--model", model, *args.rest]
    flags += ["--seed", str(args.seed + trial)]
    flags += ["--max_bad", "0"]  # Failures stay in the partial file.
    flags += ["--audio_root", audio_root]
    flags += ["--data_path", *map(str, inputs)]
    flags += ["--output_path", *map(str, outputs.values())]
    inference_batch(flags)
    for name, path in outputs.items():
        record(path, wanted[name])


def _trial_file(folder: Path, task: str, trial: int) -> Path:
    return folder / "asked" / f"{task}.{trial}.json"


def _merge_trials(task: str, trials: list[int], folder: Path) -> list[dict]:
    """Return the predictions of all trials in the order of the questions, without wall times."""
    streams = [stream_rows(_trial_file(folder, task, n)) for n in range(max(trials) + 1)]
    rows = [next(streams[trial]) for trial in trials]
    for row in rows:
        del row["seconds"]  # It differs between any two runs.
    return rows


def record(path: Path, wanted: dict[str, Any], rows: list[dict] | None = None) -> None:
    """Write the provenance of predictions next to them; first the predictions, if given."""
    if rows is not None:
        write_rows(rows, path)
    write_json(wanted | {"predictions": sha256_of(path)}, provenance_file(path))


def is_done(path: Path, wanted: dict[str, Any]) -> bool:
    """Return whether these predictions have this provenance and all have an answer."""
    if read_provenance(path) != wanted:
        return False
    return all(row["status"] in ANSWERED for row in stream_rows(path))


def score_labels(
    model: str, task: Task, questions: Path, folder: Path, args: argparse.Namespace
) -> np.ndarray:
    """Return the log-likelihood of every class as the answer to every clip, (rows, classes).

    It is -inf for clips that cannot be decoded. Writes the files of `generate`, with the likeliest
    class as the answer. Scores are stored as they are computed, in TASK.label_scores.jsonl, whose
    first line is their provenance; a clip that failed is retried by the next run.
    """
    flags = inference_flags(model, args)
    rows = []
    for row in read_rows(questions, args.audio_root, need_output=False):
        rows.append(row | {"instruction": args.label_prompt})
    classes = Classes(task, "strict").names
    names = [" ".join(name.replace("_", " ").split()) for name in classes]
    candidates = [args.label_answer.format(name) for name in names]
    wanted = provenance(model, questions, args)
    wanted |= {"label_prompt": args.label_prompt, "candidates": candidates}
    path = folder / f"{task.name}.label_scores.jsonl"
    known = start_scores(path, wanted)
    engine = open_engine(flags) if len(known) < len(rows) else None
    failed = {}
    with path.open("ab") as lines:
        requests = tqdm(make_requests(rows, flags), f"labels of {task.name}", unit="clip")
        for number, request in enumerate(requests):
            if number in known:
                continue
            try:
                scores = engine.score(request, candidates)
            except AudioError as error:
                failed[number] = error.reason
                continue
            known[number] = [score.log_likelihood for score in scores]
            lines.write(encode_row({"row": number, "scores": known[number]}) + b"\n")
            lines.flush()
    no_scores = [-np.inf] * len(candidates)
    matrix = np.array([known.get(number, no_scores) for number in range(len(rows))])
    predictions = []
    for number, row in enumerate(rows):
        is_failed = number in failed
        predictions.append(
            {
                "prompt": args.label_prompt,
                "ref": row.get("output"),
                "audio_id": row.get("audio_id"),
                "pred": "" if is_failed else candidates[matrix[number].argmax()],
                "status": failed.get(number, "ok"),
            }
        )
    record(folder / f"{task.name}{PREDICTIONS}", wanted, predictions)
    return matrix


def start_scores(path: Path, wanted: dict[str, Any]) -> dict[int, list[float]]:
    """Return the stored scores of a run with this provenance: row -> scores.

    Half a line, and all lines of another run, are removed from the file.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    head = json.dumps(wanted, sort_keys=True).encode()
    stored = lines[1:] if lines[:1] == [head] else []
    replace_file(path, (line + b"\n" for line in [head, *stored]), is_synced=True)
    entries = map(json.loads, stored)
    return {entry["row"]: entry["scores"] for entry in entries}
