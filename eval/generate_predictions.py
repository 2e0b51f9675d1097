"""Ask a model the questions of tasks, or score every class as the answer; what was interrupted goes on."""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ltu_as  # noqa: F401  registers its classes: with them ltu's commands open both models
from eval.closed import Classes
from eval.report import PREDICTIONS, provenance_file, read_provenance, write_json, write_rows
from eval.score_result import ANSWERED
from eval.tasks import Task
from ltu.data.audio import AudioError
from ltu.data.dataset_files import encode_row, stream_rows
from ltu.data.examples import read_rows
from ltu.files import replace_file, sha256_of
from ltu.inference.batch_inference import make_requests
from ltu.inference.generation_flags import open_engine
from ltu.inference.sampling import check_decoding
from ltu.inference_batch import main as inference_batch
from ltu.inference_batch import parse_args
from ltu.models.checkpoint_folder import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights


def inference_flags(model: str, args: argparse.Namespace) -> argparse.Namespace:
    """The flags as ltu.inference_batch reads them; it ends the command if one is wrong."""
    find_checkpoint(model, CHECKPOINT_FILES)
    paths = ["--data_path", "Q.json", "--output_path", "P.json"]
    return parse_args(["--model", model, *paths, "--seed", str(args.seed), *args.rest])


def provenance(model: str, questions: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides the answers, but for the content of clips."""
    folder = find_checkpoint(model, CHECKPOINT_FILES)
    small = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".md"]
    small = [
        path for path in small if not path.name.startswith(("model", "pytorch_model"))
    ]  # Weights are hashed once.
    found = {
        "checkpoint": sha256_of_weights(folder),
        "files": {path.name: sha256_of(path) for path in small},
    }
    found |= {
        "decoding": check_decoding(inference_flags(model, args).decoding),
        "flags": args.rest,
        "seed": args.seed,
    }
    found |= {"questions": {"path": str(questions), "sha256": sha256_of(questions)}}
    return found | {"audio_root": str(args.audio_root or questions.parent)}


def ask(model: str, files: dict[str, Path], folder: Path, args: argparse.Namespace) -> int:
    """Write TASK.predictions.json and TASK.provenance.json. Returns 1 if more than --max_bad questions got no answer.

    The model is opened once a trial: equal questions on equal clips have one answer in a trial, so a row that repeats
    goes into the next one if answers are sampled. `files`: task -> questions.
    """
    wanted = {name: provenance(model, path, args) for name, path in files.items()}
    todo = [name for name in files if not is_done(folder / f"{name}{PREDICTIONS}", wanted[name])]
    trials: dict[str, list[int]] = defaultdict(list)  # of each row
    parts: dict[int, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for name in todo:
        seen: Counter = Counter()
        for row in read_rows(files[name], args.audio_root, need_output=False):
            key = row.get("audio_id"), row["instruction"], row.get("input")
            trial = seen[key] if wanted[name]["decoding"]["do_sample"] else 0
            trials[name].append(trial)
            parts[trial][name].append(row)
            seen[key] += 1
    for trial, questions in sorted(parts.items()):
        places = {name: folder / "asked" / f"{name}.{trial}.json" for name in questions}
        places = {name: path for name, path in places.items() if not is_done(path, wanted[name])}
        if not places:
            continue
        asked = [path.with_suffix(".questions.json") for path in places.values()]
        for name, path in zip(places, asked, strict=True):
            write_rows(questions[name], path)
        flags = [
            "--model",
            model,
            *args.rest,
            "--seed",
            str(args.seed + trial),
            "--max_bad",
            "0",
        ]  # Failures are kept.
        flags += ["--audio_root", wanted[todo[0]]["audio_root"], "--data_path", *map(str, asked)]
        inference_batch([*flags, "--output_path", *map(str, places.values())])
        for name, path in places.items():
            record(path, wanted[name])
    failed = 0
    for name in todo:
        answers = [
            stream_rows(folder / "asked" / f"{name}.{trial}.json")
            for trial in range(max(trials[name]) + 1)
        ]
        rows = [next(answers[trial]) for trial in trials[name]]
        for row in rows:
            del row["seconds"]  # Wall time, of which no two runs have the same.
        record(folder / f"{name}{PREDICTIONS}", wanted[name], rows)
        failed += sum(row["status"] not in ANSWERED for row in rows)
    return int(failed > args.max_bad)


def record(path: Path, wanted: dict[str, Any], rows: list[dict] | None = None) -> None:
    """Write what decided predictions beside them; before that themselves, if `rows` has them."""
    if rows is not None:
        write_rows(rows, path)
    write_json(wanted | {"predictions": sha256_of(path)}, provenance_file(path))


def is_done(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether all of these predictions were asked for just so, and answered."""
    return read_provenance(path) == wanted and all(
        row["status"] in ANSWERED for row in stream_rows(path)
    )


def score_labels(
    model: str, task: Task, questions: Path, folder: Path, args: argparse.Namespace
) -> np.ndarray:
    """Log-likelihood of every class as the answer to every clip, (rows, classes); -inf for clips that cannot be heard.

    Writes the files of `ask`, where the likeliest is the answer. Scores are kept as they come, in
    TASK.label_scores.jsonl, whose first line says of what; a clip that failed is tried again.
    """
    flags = inference_flags(model, args)
    rows = [
        r | {"instruction": args.label_prompt}
        for r in read_rows(questions, args.audio_root, need_output=False)
    ]
    names = [" ".join(name.replace("_", " ").split()) for name in Classes(task, "strict").names]
    candidates = [args.label_answer.format(name) for name in names]
    wanted = provenance(model, questions, args) | {
        "label_prompt": args.label_prompt,
        "candidates": candidates,
    }
    path = folder / f"{task.name}.label_scores.jsonl"
    kept = start_scores(path, wanted)
    engine = open_engine(flags) if len(kept) < len(rows) else None
    failed = {}
    with path.open("ab") as lines:
        for number, request in enumerate(
            tqdm(make_requests(rows, flags), f"labels of {task.name}", unit="clip")
        ):
            if number in kept:
                continue
            try:
                kept[number] = [score.log_likelihood for score in engine.score(request, candidates)]
            except AudioError as error:
                failed[number] = error.reason
                continue
            lines.write(encode_row({"row": number, "scores": kept[number]}) + b"\n")
            lines.flush()
    scores = np.array(
        [kept.get(number, [-np.inf] * len(candidates)) for number in range(len(rows))]
    )
    made = [
        {"prompt": args.label_prompt, "ref": row.get("output"), "audio_id": row.get("audio_id")}
        for row in rows
    ]
    for number, row in enumerate(made):
        status = failed.get(number, "ok")
        row |= {
            "pred": candidates[scores[number].argmax()] if status == "ok" else "",
            "status": status,
        }
    record(folder / f"{task.name}{PREDICTIONS}", wanted, made)
    return scores


def start_scores(path: Path, wanted: dict[str, Any]) -> dict[int, list[float]]:
    """Row -> what is kept of a run like this. Half a line, and all of another run, is taken out of the file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    head = json.dumps(wanted, sort_keys=True).encode()
    kept = lines[1:] if lines[:1] == [head] else []
    replace_file(path, (line + b"\n" for line in [head, *kept]), is_synced=True)
    return {found["row"]: found["scores"] for found in map(json.loads, kept)}
