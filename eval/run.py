"""Generates and scores predictions for the benchmarks of both papers.

    python -m eval.run --list
    python -m eval.run --task esc50 --model DIR --questions esc50.json --audio_root ESC-50-master \\
        --output_dir OUT
    python -m eval.run --task esc50 --predictions P.json --output_dir OUT             only scores
    python -m eval.run --task all --model mine=DIR full=DIR2 --questions FOLDER --output_dir OUT

The last command compares two models. A model or a predictions file may have a name, NAME=PATH. In a
folder of --questions or --predictions, the file of a task has the name that --list prints or, for
predictions, TASK.predictions.json. Flags that are not named here are passed to ltu.inference_batch,
such as --batch_size 16.

A run can be stopped at any time and resumes when it is started again: answers that were generated
with the same weights, questions and flags are used again. If answers are sampled, a repeated
question (captions: five trials) is sampled with the next seed.

A question of --questions without a prediction counts as failed. The report names what "all" leaves
out. OUT has report.json, .md and .png; OUT/NAME has TASK.predictions.json, .provenance.json,
.items.jsonl and .confusion.png.
"""

import argparse
import json
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from eval import generate_predictions, report, text_embeddings
from eval.judge import Judge
from eval.scorer_interface import Context, EvaluationError
from eval.tasks import TASKS, Task, find_task
from ltu.data.check_examples import read_rows
from ltu.data.dataset_io import stream_rows
from ltu.files import run_command
from qa_generation.llm import LlmSettings


class Embedding:
    """The embedder, opened when a scoring function first needs it.

    `name` is None until then.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.embedder: text_embeddings.Embedder | None = None
        self.name: str | None = None

    def __call__(self, texts: list[str]) -> np.ndarray:
        if self.embedder is None:
            name = self.args.embeddings or self.args.embedder
            self.embedder = text_embeddings.open_embedder(name, self.args.cache_dir)
        self.name = self.embedder.name
        return self.embedder(texts)


def open_judge(args: argparse.Namespace) -> Judge:
    """Return the judge that the flags describe."""
    settings = LlmSettings(
        args.judge_model,
        args.judge_temperature,
        max_tokens=16,
        is_local=args.judge_local,
        base_url=args.judge_url,
        token_budget=args.judge_budget,
    )
    return Judge(settings, args.cache_dir)


def read_predictions(path: Path, questions: Path | None) -> list[dict]:
    """Read predictions with `prompt`, `pred`, `ref` and `audio_id`.

    Each question without a prediction is appended as a prediction without an answer.

    Raises:
        EvaluationError: A prediction lacks a field, or belongs to no question.
    """
    rows = list(stream_rows(path))
    # Collect the references of each question that have no prediction yet.
    open_references: dict[tuple, list[Any]] = defaultdict(list)
    for row in read_rows(questions, need_output=False) if questions else ():
        open_references[row.get("audio_id"), row["instruction"]].append(row.get("output"))
    for number, row in enumerate(rows, start=1):
        lacking = {"prompt", "pred", "ref", "audio_id"} - row.keys()
        if lacking:
            names = ", ".join(sorted(lacking))
            raise EvaluationError(
                f"{path}, row {number}: no {names}. Generate the predictions again."
            )
        if not questions:
            continue
        references = open_references[row["audio_id"], row["prompt"]]
        if row["ref"] not in references:
            raise EvaluationError(
                f"{path}, row {number}: not in {questions}, or not as often: {row['audio_id']}."
            )
        references.remove(row["ref"])
    if not rows:
        raise EvaluationError(f"{path} contains no predictions.")
    for (audio_id, prompt), references in open_references.items():
        missing = {"prompt": prompt, "pred": None, "audio_id": audio_id, "status": "no row"}
        rows += [missing | {"ref": reference} for reference in references]
    return rows


def score(
    name: str,
    task_name: str,
    path: Path,
    questions: Path | None,
    args: argparse.Namespace,
    label_scores: np.ndarray | None = None,
) -> report.Result:
    """Return the result of one predictions file, and write its items and its confusion matrix."""
    task = find_task(task_name)
    rows = read_predictions(path, questions)
    embedding = Embedding(args)
    context = Context(
        protocol=args.protocol,
        embed=embedding,
        whisper=read_transcripts(rows, args.whisper_text) or None,
        judge=open_judge(args) if args.judge_model else None,
        label_scores=label_scores,
        source=str(path),
    )
    module, function = task.scorer.split(":")
    scorer = getattr(import_scorers(module, task), function)
    outcome = scorer(rows, task, context)
    folder = args.output_dir / name
    report.write_rows(outcome.items, folder / f"{task.name}.items.jsonl")
    if outcome.confusion:
        report.plot_confusion(*outcome.confusion, folder / f"{task.name}.confusion.png")
    if label_scores is not None:
        scoring = "label log-likelihood"
    elif embedding.name:
        scoring = "embedding"
    else:
        scoring = function
    result = {"task": task.name, "model": name, "scoring": scoring}
    result |= report.summarize(outcome, task, args.seed)
    if len(rows) != result["asked"]:
        result["rows"] = len(rows)
    expected = task.options.get("rows", len(rows))
    if expected != len(rows):
        result["notes"].append(f"{len(rows)} rows; the whole set has {expected}")
    return result | trace(rows, path, questions) | {"embedder": embedding.name}


def read_transcripts(rows: list[dict], path: Path | None) -> dict[str, str]:
    """Return the transcripts of a file or, without one, those in the predictions of LTU-AS."""
    if path:
        return json.loads(path.read_text(encoding="utf-8"))
    return {row["audio_id"]: row["transcript"] for row in rows if row.get("model") == "ltu_as"}


def import_scorers(module: str, task: Task) -> ModuleType:
    """Import the scoring functions of a task, which may need optional packages."""
    try:
        return import_module(f"eval.{module}")
    except ModuleNotFoundError as error:
        hint = "pip install -e '.[eval]'"
        raise EvaluationError(f"{error}: the task {task.name} needs it. {hint}") from None


def trace(rows: list[dict], path: Path, questions: Path | None) -> dict[str, Any]:
    """Return prompt, weights and decoding, as far as the predictions and their provenance say."""
    prompt, count = Counter(row["prompt"] for row in rows).most_common(1)[0]
    checkpoints = sorted({row.get("checkpoint") or "not recorded" for row in rows})
    found: dict[str, Any] = {
        "prompt": f"{count} of {len(rows)}: {prompt}",
        "decoding": "not recorded",
        "checkpoint": ", ".join(checkpoints),
    }
    if questions:
        found["questions"] = report.file_record(questions)
    return found | report.read_provenance(path) | {"predictions": report.file_record(path)}


def named(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH, or a path whose last part is the name."""
    name, sign, path = text.partition("=")
    if sign and "/" not in name:
        return name, Path(path)
    return Path(text).resolve().name.split(".json")[0], Path(text)


def find_files(args: argparse.Namespace, path: Path, suffix: str = "") -> dict[str, Path]:
    """Return the file of each task.

    It is `path` itself or, if `path` is a folder, TASK and `suffix` in it, else the name that
    --list prints. With the task "all", only files that exist are returned.

    Raises:
        EvaluationError: A file is missing.
    """
    names = [task.name for task in TASKS] if "all" in args.task else args.task
    if not path.is_dir() and len(names) > 1:
        raise EvaluationError(
            f"{path} is no folder; several tasks need one, with the file of each task."
        )
    files = {}
    for name in names:
        files[name] = path / find_task(name).questions if path.is_dir() else path
        if suffix and (path / f"{name}{suffix}").is_file():
            files[name] = path / f"{name}{suffix}"
    found = {name: file for name, file in files.items() if file.is_file()}
    if not found or ("all" not in args.task and len(found) < len(files)):
        missing = next(file for file in files.values() if not file.is_file())
        raise EvaluationError(f"{missing} is not there.")
    return found


def list_tasks() -> str:
    """Return the table of all tasks as text."""
    rows = [("task", "questions", "metric", "papers", "prompt")]
    for task in TASKS:
        papers = report.paper_text(task.paper)
        rows.append((task.name, task.questions, task.metric, papers, task.prompt))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags. `rest` has those for ltu.inference_batch."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the tasks and exit")
    names = ["all", *(task.name for task in TASKS)]
    add(
        "--task",
        nargs="+",
        default=[],
        choices=names,
        metavar="TASK",
        help="tasks to run, or all",
    )
    add(
        "--model",
        nargs="+",
        type=named,
        default=[],
        metavar="[NAME=]DIR",
        help="checkpoint folders whose answers are generated and scored",
    )
    add(
        "--predictions",
        nargs="+",
        type=named,
        default=[],
        metavar="[NAME=]P.json",
        help="predictions files, or folders of them, that are only scored",
    )
    add("--questions", type=Path, help="dataset file, or a folder with the file of each task")
    add(
        "--max_bad",
        type=int,
        default=0,
        help="number of questions that a model may fail without an exit status of 1",
    )
    add(
        "--audio_root",
        type=Path,
        help="folder of relative audio_ids (default: the folder of the questions)",
    )
    add("--output_dir", type=Path, help="folder of the report")
    add(
        "--protocol",
        choices=("strict", "original"),
        default="strict",
        help="the README lists the differences",
    )
    add(
        "--embedder",
        default="minilm",
        help="minilm, a sentence-transformers folder, or openai:MODEL",
    )
    add("--embeddings", help="table of embeddings instead: JSON {text: embedding}, or .npz")
    add(
        "--cache_dir",
        type=Path,
        default=Path("exp/eval_cache"),
        help="folder where embeddings and judgements are cached",
    )
    add(
        "--whisper_text",
        type=Path,
        help="JSON audio_id -> transcript (default: the transcripts in the predictions)",
    )
    add(
        "--score_labels",
        action="store_true",
        help="choose a class by its log-likelihood instead of embeddings",
    )
    add(
        "--label_prompt",
        default="Closed-ended question: Generate audio labels.",
        help="prompt of --score_labels",
    )
    add("--label_answer", default="Labels: {}", help="template of a class as the answer")
    judge = parser.add_argument_group("open-ended answers")
    judge.add_argument(
        "--judge_model",
        help="model at an OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY",
    )
    judge.add_argument(
        "--judge_url", help="URL of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)"
    )
    judge.add_argument("--judge_local", action="store_true", help="--judge_model is a local folder")
    judge.add_argument(
        "--judge_temperature", type=float, default=0.0, help="sampling temperature of the judge"
    )
    judge.add_argument("--judge_budget", type=int, help="tokens that all runs may use together")
    add("--seed", type=int, default=42, help="seed of the bootstrap and of sampling")
    args, args.rest = parser.parse_known_args(argv)
    if not args.list:
        check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command if flags are missing or contradict each other."""
    if not args.task or not args.output_dir or not (args.model or args.predictions):
        parser.error("--task, --output_dir, and --model or --predictions are needed (or --list)")
    if args.model and not args.questions:
        parser.error("--model: give --questions; python -m eval.prepare_questions builds them")
    if args.rest and not args.model:
        parser.error(f"unknown without --model: {' '.join(args.rest)}")
    if args.score_labels and (args.protocol == "original" or not args.model):
        parser.error("--score_labels needs --model and --protocol strict: the original embeds")
    if args.score_labels:
        tasks = [find_task(name) for name in args.task if name != "all"]
        lacking = [task.name for task in tasks if "labels" not in task.options]
        if lacking:
            parser.error(f"--score_labels: {', '.join(lacking)}: no classes. Leave it out")
    names = [name for name, _ in args.model + args.predictions]
    if len(set(names)) < len(names):
        parser.error(f"two of the same name among {', '.join(names)}: give NAME=PATH")


def evaluate_model(
    name: str, model: str, questions: dict[str, Path], args: argparse.Namespace
) -> tuple[list[report.Result], bool]:
    """Generate the predictions of a model for each task and score them.

    Returns:
        The results, and whether the model failed at most --max_bad questions.
    """
    folder = args.output_dir / name
    status = generate_predictions.generate(model, questions, folder, args)
    results = []
    for task, path in questions.items():
        predictions = folder / f"{task}{report.PREDICTIONS}"
        results.append(score(name, task, predictions, path, args))
    return results, status == 0


def evaluate_model_labels(
    name: str, model: str, questions: dict[str, Path], args: argparse.Namespace
) -> tuple[list[report.Result], bool]:
    """Score every class as the answer of a model, for each task.

    Returns:
        The results, and whether the model failed at most --max_bad questions.
    """
    folder = args.output_dir / name
    # Compute the scores of all tasks first.
    scores = {}
    failed = 0
    for task, path in questions.items():
        scores[task] = generate_predictions.score_labels(model, find_task(task), path, folder, args)
        failed += int(np.isneginf(scores[task]).all(1).sum())
    results = []
    for task, label_scores in scores.items():
        predictions = folder / f"{task}{report.PREDICTIONS}"
        results.append(score(name, task, predictions, None, args, label_scores))
    return results, failed <= args.max_bad


def evaluate_predictions(
    name: str, path: Path, questions: dict[str, Path], args: argparse.Namespace
) -> tuple[list[report.Result], list[str]]:
    """Score predictions files.

    Returns:
        The results, and the tasks that were left out.
    """
    files = find_files(args, path, report.PREDICTIONS)
    left_out = []
    if args.questions:
        left_out += [f"{name}, {task}: no questions" for task in files if task not in questions]
        left_out += [f"{name}, {task}: no predictions" for task in questions if task not in files]
        files = {task: file for task, file in files.items() if task in questions}
    results = []
    for task, file in files.items():
        results.append(score(name, task, file, questions.get(task), args))
    return results, left_out


def sort_by_task(results: list[report.Result]) -> None:
    """Sort results in the order of TASKS, in place."""
    order = [task.name for task in TASKS]
    results.sort(key=lambda result: order.index(result["task"]))


def write_report(
    results: list[report.Result], left_out: list[str], args: argparse.Namespace
) -> str:
    """Write the report of all results and return its text."""
    common = {"protocol": args.protocol, "seed": args.seed, "left_out": left_out}
    if args.whisper_text:
        common["whisper_text"] = report.file_record(args.whisper_text)
    return report.write_report(results, common, args.output_dir)


def main(argv: list[str] | None = None) -> int:
    """Generate and score the predictions of all models, and write the report.

    Returns:
        1 if a model left more than --max_bad questions without an answer, else 0.
    """
    args = parse_args(argv)
    if args.list:
        print(list_tasks())
        return 0
    questions = find_files(args, args.questions) if args.questions else {}
    # Check the flags of ltu.inference_batch before hours of work, not after.
    for _, model in args.model:
        generate_predictions.inference_flags(str(model), args)

    results: list[report.Result] = []
    left_out: list[str] = []
    all_passed = True
    for name, model in args.model:
        if args.score_labels:
            with_classes = {}
            for task, path in questions.items():
                if "labels" in find_task(task).options:
                    with_classes[task] = path
                else:
                    left_out.append(f"{name}, {task}: it has no classes")
            found, passed = evaluate_model_labels(name, str(model), with_classes, args)
        else:
            found, passed = evaluate_model(name, str(model), questions, args)
        results += found
        all_passed = all_passed and passed
    for name, path in args.predictions:
        found, own_left_out = evaluate_predictions(name, path, questions, args)
        results += found
        left_out += own_left_out
    if not results:
        raise EvaluationError(f"Nothing is left to score. {'; '.join(left_out)}.")
    sort_by_task(results)
    print(write_report(results, left_out, args))
    return 0 if all_passed else 1


if __name__ == "__main__":
    run_command(main)
