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

A question of --questions without a prediction counts as failed; without --questions, a prediction
that is missing or there twice is not noticed, and the report says so. "all" is every task that has
a file. The report names the tasks that have questions but no predictions, or predictions but no
questions, or no classes for --score_labels. OUT has report.json, .md and .png; OUT/NAME has
TASK.predictions.json, .provenance.json, .items.jsonl and .confusion.png.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from eval import generate_predictions, report, text_embeddings
from eval.generate_predictions import GenerationSettings
from eval.judge import Judge
from eval.scorer_interface import Context, EvaluationError, Outcome, load_predictions
from eval.tasks import TASKS, Task, find_task
from ltu.data.check_examples import add_ignored_keys, parse_ignored_keys, read_examples
from ltu.data.columns import ColumnFlags, add_column_flags, read_column_flags
from ltu.data.dataset_io import describe_columns
from ltu.data.dataset_source import find_dataset, is_dataset_folder, is_dataset_name
from ltu.files import read_json_object, run_command
from ltu.models.locate_checkpoint import find_checkpoint
from ltu.models.model_card import EvaluationResult, save_evaluation
from qa_generation.llm import LlmSettings

NO_QUESTIONS = "no --questions: predictions that are missing or there twice are not noticed"
# How "on all" counts an answer that is missing, by protocol.
MISSING_ANSWERS = {
    "strict": "on all: a missing answer counts as the worst answer that could be there",
    "original": "on all: a missing answer counts as in the original, which may be better than a "
    "wrong answer",
}


@dataclass(frozen=True)
class ScoringSettings:
    """How predictions are scored.

    Args:
        output_dir: Folder of the report.
        protocol: "strict" or "original".
        seed: Seed of the bootstrap.
        open_embedder: Opens the embedder once for all predictions files.
        whisper_text: JSON audio_id -> transcript; None takes the transcripts in the predictions.
        judge: The judge of open-ended answers, None if there is none.
        ignored_keys: Further keys that questions may have.
        columns: Split and names of columns of the questions.
    """

    output_dir: Path
    protocol: str
    seed: int
    open_embedder: Callable[[], text_embeddings.Embedder]
    whisper_text: Path | None
    judge: Judge | None
    ignored_keys: frozenset[str] = frozenset()
    columns: ColumnFlags = field(default_factory=ColumnFlags)


@dataclass(frozen=True)
class ModelRun:
    """A model and the tasks whose predictions it generates.

    Args:
        name: Name in the report.
        checkpoint: Checkpoint folder.
        questions: task -> dataset file.
    """

    name: str
    checkpoint: str
    questions: dict[str, Path]


@dataclass(frozen=True)
class Scoring:
    """A predictions file to score.

    Args:
        model: Name in the report.
        task: Name of the task.
        predictions: The file.
        questions: The dataset file whose questions the predictions must have, if it is given.
        label_scores: (examples, classes) log-likelihoods, used instead of embeddings.
    """

    model: str
    task: str
    predictions: Path
    questions: Path | None = None
    label_scores: np.ndarray | None = None


@dataclass(frozen=True)
class Plan:
    """What a command evaluates.

    Args:
        models: The models that generate predictions.
        scorings: The given predictions files.
        left_out: Models and tasks that "all" leaves out, each with the reason.
    """

    models: list[ModelRun]
    scorings: list[Scoring]
    left_out: list[str]


class LazyEmbedder:
    """The embedder of one predictions file, opened when the scoring function needs it.

    `used` is its name; None until then.
    """

    def __init__(self, open_embedder: Callable[[], text_embeddings.Embedder]):
        self.open_embedder = open_embedder
        self.used: str | None = None

    def __call__(self, texts: list[str]) -> np.ndarray:
        embedder = self.open_embedder()
        self.used = embedder.name
        return embedder(texts)


# --- What to evaluate


def make_plan(args: argparse.Namespace) -> Plan:
    """Return the models and the predictions files that the flags describe.

    Raises:
        EvaluationError: A file is missing.
    """
    questions = {}
    if args.questions:
        questions = find_questions(args.task, args.questions, args.split)
    models = []
    scorings = []
    left_out = []
    for name, checkpoint in args.model:
        own_questions = {}
        for task, path in questions.items():
            if args.score_labels and "labels" not in find_task(task).options:
                left_out.append(f"{name}, {task}: it has no classes")
            else:
                own_questions[task] = path
        models.append(ModelRun(name, str(checkpoint), own_questions))
    for name, path in args.predictions:
        files = find_files(args.task, path, report.PREDICTIONS)
        for task, file in files.items():
            if args.questions and task not in questions:
                left_out.append(f"{name}, {task}: no questions")
            else:
                scorings.append(Scoring(name, task, file, questions.get(task)))
        for task in questions:
            if task not in files:
                left_out.append(f"{name}, {task}: no predictions")
    return Plan(models, scorings, left_out)


def find_questions(tasks: list[str], path: Path, split: str | None) -> dict[str, Path]:
    """Return the data set of each task: those of `find_files`, or one that is no file.

    Raises:
        EvaluationError: A file is missing, or one data set is given for several tasks.
    """
    is_data_set = split is not None or is_dataset_folder(path) or is_dataset_name(path)
    if path.is_file() or not is_data_set:
        return find_files(tasks, path)
    if len(tasks) > 1 or "all" in tasks:
        raise EvaluationError(
            f"{path} is one data set, for one --task; several tasks need a folder with the file of "
            "each task."
        )
    return {tasks[0]: path}


def find_files(tasks: list[str], path: Path, suffix: str = "") -> dict[str, Path]:
    """Return the file of each task.

    It is `path` itself or, if `path` is a folder, TASK and `suffix` in it, else the name that
    --list prints. With the task "all", only files that exist are returned.

    Raises:
        EvaluationError: A file is missing.
    """
    is_all = "all" in tasks
    names = [task.name for task in TASKS] if is_all else tasks
    if not path.is_dir() and len(names) > 1:
        raise EvaluationError(
            f"{path} is no folder; several tasks need one, with the file of each task."
        )
    found = {}
    missing = []
    for name in names:
        file = path
        if path.is_dir():
            file = path / find_task(name).questions
        if suffix and (path / f"{name}{suffix}").is_file():
            file = path / f"{name}{suffix}"
        if file.is_file():
            found[name] = file
        else:
            missing.append(file)
    if not found or (missing and not is_all):
        raise EvaluationError(f"{missing[0]} is not there.")
    return found


def print_columns(plan: Plan, columns: ColumnFlags) -> None:
    """Print which columns of the questions are used for what, where the flags or a table say so."""
    paths: dict[Path, None] = {}  # An ordered set.
    for model in plan.models:
        paths.update(dict.fromkeys(model.questions.values()))
    for path in paths:
        for line in describe_columns(find_dataset(path, columns.split), columns):
            print(f"{path}: {line}")


# --- Generating


def generate(
    model: ModelRun, folder: Path, settings: GenerationSettings
) -> tuple[list[Scoring], int]:
    """Write the predictions of a model for each task.

    Returns:
        What is scored, and the number of questions without an answer.
    """
    num_failed = generate_predictions.generate(model.checkpoint, model.questions, folder, settings)
    scorings = []
    for task, questions in model.questions.items():
        predictions = folder / f"{task}{report.PREDICTIONS}"
        scorings.append(Scoring(model.name, task, predictions, questions))
    return scorings, num_failed


def score_labels(
    model: ModelRun, folder: Path, settings: GenerationSettings
) -> tuple[list[Scoring], int]:
    """Score every class as the answer of a model, for each task, and write the predictions.

    Returns:
        What is scored, and the number of clips that cannot be decoded.
    """
    scorings = []
    num_failed = 0
    for task, questions in model.questions.items():
        label_scores = generate_predictions.score_labels(
            model.checkpoint, find_task(task), questions, folder, settings
        )
        predictions = folder / f"{task}{report.PREDICTIONS}"
        scorings.append(Scoring(model.name, task, predictions, label_scores=label_scores))
        num_failed += int(np.isneginf(label_scores).all(axis=1).sum())
    return scorings, num_failed


# --- Scoring


def read_predictions(
    path: Path,
    questions: Path | None,
    ignored_keys: frozenset[str] = frozenset(),
    columns: ColumnFlags | None = None,
) -> list[dict]:
    """Read predictions with `prompt`, `pred`, `ref` and `audio_id`.

    Each question without a prediction is appended as a prediction without an answer.

    Raises:
        EvaluationError: A prediction lacks a field, has a malformed one, or belongs to no question.
    """
    predictions = load_predictions(path)
    if questions:
        predictions += missing_predictions(predictions, path, questions, ignored_keys, columns)
    return predictions


def missing_predictions(
    predictions: list[dict],
    path: Path,
    questions: Path,
    ignored_keys: frozenset[str],
    columns: ColumnFlags | None = None,
) -> list[dict]:
    """Return a prediction without an answer for each question that has no prediction.

    Raises:
        EvaluationError: A prediction belongs to no question.
    """
    # Collect the references of each question, and remove those that have a prediction.
    open_references: dict[tuple, list[Any]] = defaultdict(list)
    for example in read_examples(
        questions, need_output=False, ignored_keys=ignored_keys, columns=columns
    ):
        question = (example.get("audio_id"), example["instruction"])
        open_references[question].append(example.get("output"))
    for number, prediction in enumerate(predictions, start=1):
        references = open_references[prediction["audio_id"], prediction["prompt"]]
        if prediction["ref"] not in references:
            raise EvaluationError(
                f"{path}, prediction {number}: not in {questions}, or not as often: "
                f"{prediction['audio_id']}."
            )
        references.remove(prediction["ref"])
    missing = []
    for (audio_id, prompt), references in open_references.items():
        for reference in references:
            prediction = {"prompt": prompt, "pred": None, "audio_id": audio_id, "ref": reference}
            missing.append(prediction | {"status": "no prediction"})
    return missing


def score(scoring: Scoring, settings: ScoringSettings) -> report.Result:
    """Return the result of one predictions file, and write its items and its confusion matrix."""
    task = find_task(scoring.task)
    predictions = read_predictions(
        scoring.predictions, scoring.questions, settings.ignored_keys, settings.columns
    )
    embedder = LazyEmbedder(settings.open_embedder)
    context = Context(
        protocol=settings.protocol,
        embed=embedder,
        whisper=read_transcripts(predictions, scoring.predictions, settings.whisper_text) or None,
        judge=settings.judge,
        label_scores=scoring.label_scores,
        source=str(scoring.predictions),
    )
    outcome = find_scorer(task)(predictions, task, context)

    folder = settings.output_dir / scoring.model
    report.write_records(outcome.items, folder / f"{task.name}.items.jsonl")
    if outcome.confusion:
        report.plot_confusion(*outcome.confusion, folder / f"{task.name}.confusion.png")

    _, method = task.scorer.split(":")
    if scoring.label_scores is not None:
        method = "label log-likelihood"
    elif embedder.used:
        method = "embedding"
    num_predictions = len(predictions)
    notes = []
    # A model's own predictions are those of its questions.
    is_given = scoring.questions is None and scoring.label_scores is None
    if is_given:
        notes.append(NO_QUESTIONS)
    expected = task.options.get("num_examples", num_predictions)
    if num_predictions != expected:
        notes.append(f"{num_predictions} predictions; the whole set has {expected}")
    summary = report.summarize(outcome, task, settings.seed, notes)
    return report.Result(
        task=task.name,
        model=scoring.model,
        scoring=method,
        summary=summary,
        num_predictions=None if num_predictions == summary.num_examples else num_predictions,
        origin=trace(predictions, scoring.predictions, scoring.questions, settings.columns),
        embedder=embedder.used,
    )


def read_transcripts(predictions: list[dict], source: Path, path: Path | None) -> dict[str, str]:
    """Return the transcripts of a file or, without one, those in the predictions of LTU-AS.

    Args:
        source: The predictions file, for messages.

    Raises:
        ValueError: A transcript is no text, or the file is no JSON object.
    """
    if path:
        transcripts = read_json_object(path)
    else:
        transcripts = {}
        for prediction in predictions:
            if prediction.get("model") == "ltu_as":
                transcripts[prediction["audio_id"]] = prediction.get("transcript")
    for audio_id, transcript in transcripts.items():
        if not isinstance(transcript, str):
            raise EvaluationError(
                f"{path or source}: the transcript of {audio_id!r} is {transcript!r}, not text."
            )
    return transcripts


def find_scorer(task: Task) -> Callable[[list[dict], Task, Context], Outcome]:
    """Import the scoring function of a task, which may need optional packages.

    Raises:
        EvaluationError: A package is not installed.
    """
    module, function = task.scorer.split(":")
    try:
        return getattr(import_module(f"eval.{module}"), function)
    except ModuleNotFoundError as error:
        hint = "pip install -e '.[eval]'"
        raise EvaluationError(f"{error}: the task {task.name} needs it. {hint}") from None


def trace(
    predictions: list[dict], path: Path, questions: Path | None, columns: ColumnFlags
) -> dict[str, Any]:
    """Return prompt, weights and decoding, as far as the predictions and their provenance say."""
    prompts = Counter(prediction["prompt"] for prediction in predictions)
    prompt, count = prompts.most_common(1)[0]
    checkpoints = {prediction.get("checkpoint") or "not recorded" for prediction in predictions}
    found: dict[str, Any] = {
        "prompt": f"{count} of {len(predictions)}: {prompt}",
        "decoding": "not recorded",
        "checkpoint": ", ".join(sorted(checkpoints)),
    }
    if questions:
        found["questions"] = report.dataset_record(questions, columns)
    return found | report.read_provenance(path) | {"predictions": report.file_record(path)}


def write_report(
    results: list[report.Result], left_out: list[str], settings: ScoringSettings
) -> str:
    """Write the report of all results, in the order of TASKS, and return its text."""
    order = [task.name for task in TASKS]
    results = sorted(results, key=lambda result: order.index(result.task))
    common = {
        "protocol": settings.protocol,
        "missing_answers": MISSING_ANSWERS[settings.protocol],
        "seed": settings.seed,
        "left_out": left_out,
    }
    if settings.whisper_text:
        common["whisper_text"] = report.file_record(settings.whisper_text)
    return report.write_report(results, common, settings.output_dir)


def update_model_card(model: ModelRun, results: list[report.Result], protocol: str) -> None:
    """Write the results of a model into its checkpoint folder, and its model card.

    Raises:
        ValueError: The weights in the folder have changed since they were evaluated.
        OSError: The folder cannot be written.
    """
    entries = []
    checkpoint = None
    for result in results:
        if result.model != model.name:
            continue
        summary = result.summary
        checkpoint = result.origin["checkpoint"]
        entry = EvaluationResult(
            task=result.task,
            metric=summary.metric,
            scoring=result.scoring,
            protocol=protocol,
            num_examples=summary.num_examples,
            **asdict(summary.value),
            failed=summary.failed,
            questions_sha256=result.origin["questions"]["sha256"],
        )
        entries.append(entry)
    if checkpoint is not None:
        save_evaluation(find_checkpoint(model.checkpoint), entries, checkpoint)


# --- The command


def named(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH, or a path whose last part is the name."""
    name, sign, path = text.partition("=")
    if sign and "/" not in name:
        return name, Path(path)
    return Path(text).resolve().name.split(".json")[0], Path(text)


def list_tasks() -> str:
    """Return the table of all tasks as text."""
    rows = [("task", "questions", "metric", "papers", "prompt")]
    for task in TASKS:
        papers = report.paper_text(task.paper)
        rows.append((task.name, task.questions, task.metric, papers, task.prompt))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        line = ""
        for cell, width in zip(row, widths, strict=True):
            line += f"{cell:<{width}}  "
        lines.append(line.rstrip())
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags. `rest` has those for ltu.inference_batch."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--list", action="store_true", help="Print the tasks and exit.")
    names = ["all", *(task.name for task in TASKS)]
    add(
        "--task",
        nargs="+",
        default=[],
        choices=names,
        metavar="TASK",
        help="The tasks to run, or all.",
    )
    add(
        "--model",
        nargs="+",
        type=named,
        default=[],
        metavar="[NAME=]DIR",
        help="The checkpoint folders whose answers are generated and scored.",
    )
    add(
        "--predictions",
        nargs="+",
        type=named,
        default=[],
        metavar="[NAME=]P.json",
        help="The predictions files, or folders of them, that are only scored.",
    )
    add(
        "--questions",
        type=Path,
        help="The data set, or a folder with the dataset file of each task.",
    )
    add(
        "--max_bad",
        type=int,
        default=0,
        help="The number of questions that a model may leave unanswered with an exit status of 0.",
    )
    add(
        "--audio_root",
        type=Path,
        help="Folder of relative audio_ids (default: the folder of the questions).",
    )
    add_ignored_keys(parser)
    add_column_flags(parser)
    add("--output_dir", type=Path, help="The folder of the report.")
    add(
        "--update_model_card",
        action="store_true",
        help="Write the results of each --model into its folder too: evaluation.json and the table "
        "of its model card.",
    )
    add(
        "--protocol",
        choices=("strict", "original"),
        default="strict",
        help="The rules of scoring; docs/evaluation.md#protocols lists the differences.",
    )
    embeddings = parser.add_mutually_exclusive_group()
    embeddings.add_argument(
        "--embedder",
        default="minilm",
        help="The embedder: minilm, a sentence-transformers folder, or openai:MODEL.",
    )
    embeddings.add_argument(
        "--embeddings",
        help="A table of embeddings to use instead: JSON {text: embedding}, or .npz.",
    )
    add(
        "--cache_dir",
        type=Path,
        default=Path("exp/eval_cache"),
        help="The folder where embeddings and judgements are cached.",
    )
    add(
        "--whisper_text",
        type=Path,
        help="A JSON file: audio_id -> transcript (default: the transcripts in the predictions).",
    )
    add(
        "--score_labels",
        action="store_true",
        help="Choose a class by its log-likelihood instead of embeddings.",
    )
    add(
        "--label_prompt",
        default=GenerationSettings.label_prompt,
        help="The prompt of --score_labels.",
    )
    add(
        "--label_answer",
        default=GenerationSettings.label_answer,
        help="The template of a class as the answer, for --score_labels.",
    )
    judge = parser.add_argument_group("open-ended answers")
    judge.add_argument(
        "--judge_model",
        help="The model at an OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.",
    )
    judge.add_argument(
        "--judge_url", help="The URL of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)."
    )
    judge.add_argument(
        "--judge_local",
        action="store_true",
        help="Run the judge on this machine: --judge_model is a folder or a hub id.",
    )
    judge.add_argument(
        "--judge_temperature",
        type=float,
        default=0.0,
        help="Sampling temperature of the judge.",
    )
    judge.add_argument(
        "--judge_budget", type=int, help="Number of tokens that all runs may use together."
    )
    add(
        "--seed",
        type=int,
        default=42,
        help="Seed of the random generators used for the bootstrap and for sampling.",
    )
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
    if args.update_model_card:
        check_model_folders(parser, args.model)
    if args.rest and not args.model:
        parser.error(f"unknown without --model: {' '.join(args.rest)}")
    if (args.judge_url or args.judge_local or args.judge_budget) and not args.judge_model:
        parser.error("--judge_url, --judge_local and --judge_budget need --judge_model")
    if args.score_labels and (args.protocol == "original" or not args.model):
        parser.error("--score_labels needs --model and --protocol strict: the original embeds")
    label_flags = (args.label_prompt, args.label_answer)
    defaults = (GenerationSettings.label_prompt, GenerationSettings.label_answer)
    if label_flags != defaults and not args.score_labels:
        parser.error("--label_prompt and --label_answer need --score_labels")
    if args.score_labels:
        lacking = []
        for name in args.task:
            if name != "all" and "labels" not in find_task(name).options:
                lacking.append(name)
        if lacking:
            parser.error(f"--score_labels: {', '.join(lacking)}: no classes. Leave it out")
    names = [name for name, _ in args.model + args.predictions]
    if len(set(names)) < len(names):
        parser.error(f"two of the same name among {', '.join(names)}: give NAME=PATH")


def check_model_folders(parser: argparse.ArgumentParser, models: list[tuple[str, Path]]) -> None:
    """End the command if the results of a model cannot be written into its folder."""
    if not models:
        parser.error("--update_model_card needs --model")
    for _, path in models:
        if not path.is_dir() and not Path("pretrained_mdls", path).is_dir():
            parser.error(f"--update_model_card: {path} is no folder of this machine")


def scoring_settings(args: argparse.Namespace) -> ScoringSettings:
    """Return the settings that the flags describe."""
    judge = None
    if args.judge_model:
        llm = LlmSettings(
            args.judge_model,
            args.judge_temperature,
            max_tokens=16,
            is_local=args.judge_local,
            base_url=args.judge_url,
            token_budget=args.judge_budget,
        )
        judge = Judge(llm, args.cache_dir)
    embedder = args.embeddings or args.embedder
    return ScoringSettings(
        output_dir=args.output_dir,
        protocol=args.protocol,
        seed=args.seed,
        open_embedder=cache(partial(text_embeddings.open_embedder, embedder, args.cache_dir)),
        whisper_text=args.whisper_text,
        judge=judge,
        ignored_keys=parse_ignored_keys(args.ignored_keys),
        columns=read_column_flags(args),
    )


def generation_settings(args: argparse.Namespace) -> GenerationSettings:
    """Return the settings that the flags describe."""
    return GenerationSettings(
        flags=args.rest,
        seed=args.seed,
        audio_root=args.audio_root,
        ignored_keys=parse_ignored_keys(args.ignored_keys),
        columns=read_column_flags(args),
        label_prompt=args.label_prompt,
        label_answer=args.label_answer,
    )


def main(argv: list[str] | None = None) -> int:
    """Generate and score the predictions of all models, and write the report.

    Returns:
        1 if a model left more than --max_bad questions without an answer, else 0.
    """
    args = parse_args(argv)
    if args.list:
        print(list_tasks())
        return 0
    plan = make_plan(args)
    if not plan.scorings and not any(model.questions for model in plan.models):
        raise EvaluationError(f"Nothing is left to score. {'; '.join(plan.left_out)}.")
    print_columns(plan, read_column_flags(args))
    generation = generation_settings(args)
    settings = scoring_settings(args)
    # Check the flags of ltu.inference_batch before hours of work, not after.
    for model in plan.models:
        generation.parse_flags(model.checkpoint)

    results = []
    has_failed = False
    for model in plan.models:
        folder = args.output_dir / model.name
        make = score_labels if args.score_labels else generate
        scorings, num_failed = make(model, folder, generation)
        has_failed = has_failed or num_failed > args.max_bad
        for scoring in scorings:
            results.append(score(scoring, settings))
    for scoring in plan.scorings:
        results.append(score(scoring, settings))
    print(write_report(results, plan.left_out, settings))
    if args.update_model_card:
        for model in plan.models:
            update_model_card(model, results, settings.protocol)
    return int(has_failed)


if __name__ == "__main__":
    run_command(main)
