"""Ask and score the benchmarks of both papers.

    python -m eval.run --list
    python -m eval.run --task esc50 --model DIR --questions esc50.json --audio_root ESC-50-master --output_dir OUT
    python -m eval.run --task esc50 --predictions P.json --output_dir OUT                 only scores
    python -m eval.run --task all --model mine=DIR full=DIR2 --questions FOLDER --output_dir OUT       side by side

A model or predictions may have a name, NAME=PATH. In a folder of --questions or --predictions a task's file is the one
that --list names, or (answers) TASK.predictions.json. Flags not named here go to ltu.inference_batch: --batch_size 16.

Notable:
- Stop it at any time and run it again: it goes on. What was answered with the same weights, questions and flags is not
  asked again. Sampled answers to a row that repeats (captions: five trials) are drawn anew, with the next seed.
- A question of --questions without a row in the predictions counts as failed. What "all" leaves out the report names.
- OUT has report.json, .md, .png; OUT/NAME has TASK.predictions.json, .provenance.json, .items.jsonl, .confusion.png.
"""

import argparse
import json
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from eval import embed, generate_predictions, report
from eval.judge import Judge
from eval.score_result import Context, EvaluationError
from eval.tasks import TASKS, find_task
from ltu.data.dataset_files import stream_rows
from ltu.data.examples import read_rows
from ltu.files import run_command
from qa_generation.llm import LlmSettings


class Embedding:
    """The embedder, opened when a scorer asks for it; `name` says which, once it did."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.embedder, self.name = args, None, None

    def __call__(self, texts: list[str]) -> np.ndarray:
        name = self.args.embeddings or self.args.embedder
        self.embedder = self.embedder or embed.open_embedder(name, self.args.cache_dir)
        self.name = self.embedder.name
        return self.embedder(texts)


def open_judge(args: argparse.Namespace) -> Any:
    more = {
        "is_local": args.judge_local,
        "base_url": args.judge_url,
        "token_budget": args.judge_budget,
    }
    settings = LlmSettings(args.judge_model, args.judge_temperature, max_tokens=16, **more)
    return Judge(settings, args.cache_dir)


def read_predictions(path: Path, questions: Path | None) -> list[dict]:
    """Rows with `prompt`, `pred`, `ref` and `audio_id`, then one without an answer for each question without a row."""
    rows, waiting = list(stream_rows(path)), defaultdict(list)
    for row in read_rows(questions, need_output=False) if questions else ():
        waiting[row.get("audio_id"), row["instruction"]].append(row.get("output"))
    for number, row in enumerate(rows, start=1):
        if lacking := {"prompt", "pred", "ref", "audio_id"} - row.keys():
            raise EvaluationError(
                f"{path}, row {number}: no {', '.join(sorted(lacking))}. Answer the questions anew."
            )
        left = waiting[row["audio_id"], row["prompt"]] if questions else [row["ref"]]
        if row["ref"] not in left:
            raise EvaluationError(
                f"{path}, row {number}: not in {questions}, or not as often: {row['audio_id']}."
            )
        left.remove(row["ref"])
    if not rows:
        raise EvaluationError(f"{path} holds no rows.")
    for (audio_id, prompt), left in waiting.items():
        rows += [
            {"prompt": prompt, "pred": None, "ref": ref, "audio_id": audio_id, "status": "no row"}
            for ref in left
        ]
    return rows


def score(
    name: str,
    task_name: str,
    path: Path,
    questions: Path | None,
    args: argparse.Namespace,
    scores: Any = None,
) -> report.Result:
    """The result of one file of predictions; writes its items and its confusion matrix."""
    task, rows = find_task(task_name), read_predictions(path, questions)
    texts = {row["audio_id"]: row["transcript"] for row in rows if row.get("model") == "ltu_as"}
    if args.whisper_text:
        texts = json.loads(args.whisper_text.read_text(encoding="utf-8"))
    embedding, judge = Embedding(args), open_judge(args) if args.judge_model else None
    context = Context(args.protocol, embedding, texts or None, judge, scores, str(path))
    module, function = task.scorer.split(":")
    try:
        scorers = import_module(f"eval.{module}")
    except ModuleNotFoundError as error:
        hint = "pip install -e '.[eval]'"
        raise EvaluationError(f"{error}: the task {task.name} needs it. {hint}") from None
    outcome = getattr(scorers, function)(rows, task, context)
    folder = args.output_dir / name
    report.write_rows(outcome.items, folder / f"{task.name}.items.jsonl")
    if outcome.confusion:
        report.plot_confusion(*outcome.confusion, folder / f"{task.name}.confusion.png")
    scoring = (
        "label log-likelihood"
        if scores is not None
        else "embedding"
        if embedding.name
        else function
    )
    result = {"task": task.name, "model": name, "scoring": scoring} | report.summarize(
        outcome, task, args.seed
    )
    result |= {"rows": len(rows)} if len(rows) != result["asked"] else {}
    if task.options.get("rows", len(rows)) != len(rows):
        result["notes"].append(f"{len(rows)} rows; the whole set has {task.options['rows']}")
    return result | trace(rows, path, questions) | {"embedder": embedding.name}


def trace(rows: list[dict], path: Path, questions: Path | None) -> dict[str, Any]:
    """What was asked, of which weights and how, as far as the predictions and the file beside them say."""
    prompt, count = Counter(row["prompt"] for row in rows).most_common(1)[0]
    found = {"prompt": f"{count} of {len(rows)}: {prompt}", "decoding": "not recorded"}
    found |= {
        "checkpoint": ", ".join(sorted({row.get("checkpoint") or "not recorded" for row in rows}))
    }
    found |= {"questions": report.file_record(questions)} if questions else {}
    return found | report.read_provenance(path) | {"predictions": report.file_record(path)}


def named(text: str) -> tuple[str, Path]:
    """Name and place: NAME=PATH, or a path whose last part is the name."""
    name, sign, path = text.partition("=")
    return (
        (name, Path(path))
        if sign and "/" not in name
        else (Path(text).resolve().name.split(".json")[0], Path(text))
    )


def find_files(args: argparse.Namespace, place: Path, own: str = "") -> dict[str, Path]:
    """Task -> its file: `place`, or in it TASK and `own`, else what --list names; with "all" where it is there."""
    names = args.task if "all" not in args.task else [task.name for task in TASKS]
    if not place.is_dir() and len(names) > 1:
        raise EvaluationError(
            f"{place} is no folder; several tasks need one, with each one's file."
        )
    files = {name: place / find_task(name).questions if place.is_dir() else place for name in names}
    files |= {name: path for name in names if own and (path := place / f"{name}{own}").is_file()}
    there = {name: path for name, path in files.items() if path.is_file()}
    if not there or ("all" not in args.task and len(there) < len(files)):
        raise EvaluationError(
            f"{next(path for path in files.values() if not path.is_file())} is not there."
        )
    return there


def list_tasks() -> str:
    rows = [
        (task.name, task.questions, task.metric, report.paper_text(task.paper), task.prompt)
        for task in TASKS
    ]
    rows.insert(0, ("task", "questions", "metric", "papers", "prompt"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="print the tasks")
    names = ["all", *(task.name for task in TASKS)]
    parser.add_argument("--task", nargs="+", default=[], choices=names, metavar="TASK")
    parser.add_argument(
        "--model",
        nargs="+",
        type=named,
        default=[],
        metavar="[NAME=]DIR",
        help="checkpoint folders",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        type=named,
        default=[],
        metavar="[NAME=]P.json",
        help="only score",
    )
    parser.add_argument("--questions", type=Path, help="a file, or a folder of each task's file")
    parser.add_argument(
        "--max_bad",
        type=int,
        default=0,
        help="questions a model may fail without an exit status of 1",
    )
    parser.add_argument(
        "--audio_root",
        type=Path,
        help="folder of relative audio_ids (default: that of the questions)",
    )
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument(
        "--protocol", choices=("strict", "original"), default="strict", help="README: what differs"
    )
    parser.add_argument(
        "--embedder",
        default="minilm",
        help="minilm, a sentence-transformers folder, or openai:MODEL",
    )
    parser.add_argument("--embeddings", help="ready vectors instead: JSON {text: vector}, or .npz")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=Path("exp/eval_cache"),
        help="of embeddings and judgements",
    )
    parser.add_argument(
        "--whisper_text",
        type=Path,
        help="JSON audio_id -> transcript (default: that of the answers)",
    )
    parser.add_argument(
        "--score_labels", action="store_true", help="by log-likelihoods of classes, no embeddings"
    )
    parser.add_argument("--label_prompt", default="Closed-ended question: Generate audio labels.")
    parser.add_argument("--label_answer", default="Labels: {}", help="a class as the answer")
    judge = parser.add_argument_group("open-ended answers")
    judge.add_argument(
        "--judge_model", help="at an OpenAI-compatible endpoint; the key is in OPENAI_API_KEY"
    )
    judge.add_argument(
        "--judge_url", help="of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)"
    )
    judge.add_argument("--judge_local", action="store_true", help="--judge_model is a local folder")
    judge.add_argument("--judge_temperature", type=float, default=0.0)
    judge.add_argument("--judge_budget", type=int, help="tokens, over all runs")
    parser.add_argument("--seed", type=int, default=42, help="of the bootstrap and of sampling")
    args, args.rest = parser.parse_known_args(argv)
    if args.list:
        return args
    if not args.task or not args.output_dir or not (args.model or args.predictions):
        parser.error("--task, --output_dir, and --model or --predictions are needed (or --list)")
    if args.model and not args.questions:
        parser.error("--model: give --questions; python -m eval.questions builds them")
    if args.rest and not args.model:
        parser.error(f"unknown without --model: {' '.join(args.rest)}")
    if args.score_labels and (args.protocol == "original" or not args.model):
        parser.error(
            "--score_labels is of a --model, and of --protocol strict: the original embeds"
        )
    named_tasks = [find_task(name) for name in args.task if name != "all"]
    if lacking := [
        task.name for task in named_tasks if args.score_labels and "labels" not in task.options
    ]:
        parser.error(f"--score_labels: {', '.join(lacking)}: no classes. Leave it out")
    names = [name for name, _ in args.model + args.predictions]
    if len(set(names)) < len(names):
        parser.error(f"two of the same name among {', '.join(names)}: say NAME=PATH")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print(list_tasks())
        return 0
    code, results, left_out = 0, [], []
    asked = find_files(args, args.questions) if args.questions else {}
    for _, model in args.model:
        generate_predictions.inference_flags(str(model), args)  # Before hours of work, not after.
    for name, model in args.model:
        files, folder, scores = asked, args.output_dir / name, {}  # scores: task -> of labels
        if args.score_labels:
            files = {
                task: path for task, path in asked.items() if "labels" in find_task(task).options
            }
            left_out += [
                f"{name}, {task}: it has no classes" for task in asked if task not in files
            ]
            scores = {
                t: generate_predictions.score_labels(str(model), find_task(t), path, folder, args)
                for t, path in files.items()
            }
            code |= int(
                sum(int(np.isneginf(own).all(1).sum()) for own in scores.values()) > args.max_bad
            )
        else:
            code |= generate_predictions.ask(str(model), files, folder, args)
        for task, questions in files.items():
            place, questions = (
                folder / f"{task}{report.PREDICTIONS}",
                None if args.score_labels else questions,
            )
            results.append(score(name, task, place, questions, args, scores.get(task)))
    for name, place in args.predictions:
        files = find_files(args, place, report.PREDICTIONS)
        if args.questions:
            left_out += [f"{name}, {task}: no questions" for task in files if task not in asked]
            left_out += [f"{name}, {task}: no predictions" for task in asked if task not in files]
            files = {task: path for task, path in files.items() if task in asked}
        results += [score(name, task, path, asked.get(task), args) for task, path in files.items()]
    if not results:
        raise EvaluationError(f"Nothing is left to score. {'; '.join(left_out)}.")
    order = [task.name for task in TASKS]
    results.sort(key=lambda result: order.index(result["task"]))
    common = {"protocol": args.protocol, "seed": args.seed, "left_out": left_out}
    common |= {"whisper_text": report.file_record(args.whisper_text)} if args.whisper_text else {}
    print(report.write_report(results, common, args.output_dir))
    return code


if __name__ == "__main__":
    run_command(main)
