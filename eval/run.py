"""Ask and score the benchmarks of both papers.

    python -m eval.run --list
    python -m eval.run --task esc50 --model DIR --questions esc50.json --audio_root ESC-50-master --output_dir OUT
    python -m eval.run --task esc50 --predictions P.json --output_dir OUT                 only scores
    python -m eval.run --task all --model mine=DIR full=DIR2 --questions FOLDER --output_dir OUT       side by side

A model or predictions may have a name, NAME=PATH. With several tasks --questions and --predictions are folders that
hold each task's file: as --list names it, TASK.json or TASK.predictions.json. Flags that are not named here go to
ltu.inference_batch, such as --max_new_tokens 400 --original_decoding --batch_size 16 --max_bad 10.

Notable:
- Stop it at any time and run it again: it goes on. What was asked in full with the same weights, questions and flags is
  not asked again. Sampled answers to a row that repeats (captions: five trials) are drawn anew, with the next seed.
- If --questions says what was asked, a question without a row in the predictions counts as failed.
- OUT has report.json, .md, .png; OUT/NAME has TASK.predictions.json, .provenance.json, .items.jsonl, .confusion.png.

Exits with 1 when more than --max_bad questions of a model got no answer.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from eval import report
from eval.outcome import Context, EvaluationError
from eval.tasks import TASKS, Task, find_task
from ltu.original_files import sha256_of
from ltu.row_files import stream_rows

ENDINGS = (".predictions.json", ".json")  # behind a task's name, of predictions in a folder


class Embedding:
    """The embedder, opened when a scorer asks for it; `name` says which, once it did."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.embedder, self.name = args, None, None

    def __call__(self, texts: list[str]) -> np.ndarray:
        from eval.embed import open_embedder

        self.embedder = self.embedder or open_embedder(self.args.embeddings or self.args.embedder, self.args.cache_dir)
        self.name = self.embedder.name
        return self.embedder(texts)


def open_judge(args: argparse.Namespace) -> Any:
    from eval.judge import Judge
    from qa_generation.llm import LlmSettings

    more = {"is_local": args.judge_local, "base_url": args.judge_url, "token_budget": args.judge_budget}
    settings = LlmSettings(args.judge_model, args.judge_temperature, max_tokens=16, **more)
    return Judge(settings, args.cache_dir / "judge.jsonl")


def read_predictions(path: Path, questions: Path | None) -> list[dict]:
    """Rows with `prompt`, `pred`, `ref` and `audio_id`, then one without an answer for each question without a row.

    Raises:
        EvaluationError: a row lacks something, or answers no question.
    """
    rows, waiting = list(stream_rows(path)), defaultdict(list)
    for row in stream_rows(questions) if questions else ():
        waiting[row.get("audio_id"), row["instruction"]].append(row.get("output"))
    for number, row in enumerate(rows, start=1):
        if lacking := {"prompt", "pred", "ref", "audio_id"} - row.keys():
            raise EvaluationError(f"{path}, row {number}: no {', '.join(sorted(lacking))}. Answer the questions anew.")
        left = waiting[row["audio_id"], row["prompt"]] if questions else [row["ref"]]
        if row["ref"] not in left:
            raise EvaluationError(f"{path}, row {number}: not in {questions}, or not as often: {row['audio_id']}.")
        left.remove(row["ref"])
    if not rows:
        raise EvaluationError(f"{path} holds no rows.")
    for (audio_id, prompt), left in waiting.items():
        rows += [{"prompt": prompt, "pred": None, "ref": ref, "audio_id": audio_id, "status": "no row"} for ref in left]
    return rows


def score(task: Task, name: str, path: Path, args: argparse.Namespace, scores: np.ndarray | None) -> report.Result:
    """The result of one file of predictions; writes its items and its confusion matrix."""
    questions = file_of(args.questions, task) if args.questions and scores is None else None
    rows = read_predictions(path, questions)
    texts = {row["audio_id"]: row["transcript"] for row in rows if row.get("model") == "ltu_as"}
    if args.whisper_text:
        texts = json.loads(args.whisper_text.read_text(encoding="utf-8"))
    embedding, judge = Embedding(args), open_judge(args) if args.judge_model else None
    context = Context(args.protocol, embedding, texts or None, judge, scores, str(path))
    module, function = task.scorer.split(":")
    outcome = getattr(import_module(f"eval.{module}"), function)(rows, task, context)
    folder = args.output_dir / name
    report.write_rows(outcome.items, folder / f"{task.name}.items.jsonl")
    if outcome.confusion:
        report.plot_confusion(*outcome.confusion, folder / f"{task.name}.confusion.png")
    result = {"task": task.name, "model": name, "asked": len(rows)} | report.summarize(outcome, task, args.seed)
    if task.options.get("rows", len(rows)) != len(rows):
        result["notes"].append(f"{len(rows)} rows; the whole set has {task.options['rows']}")
    return result | trace(rows, path, questions) | {"embedder": embedding.name}


def trace(rows: list[dict], path: Path, questions: Path | None) -> dict[str, Any]:
    """What was asked, of which weights and how, as far as the predictions and the file beside them say."""
    prompt, count = Counter(row["prompt"] for row in rows).most_common(1)[0]
    found = {"prompt": prompt if count == len(rows) else f"{count} of {len(rows)}: {prompt}"}
    found |= {"checkpoint": ", ".join(sorted({row.get("checkpoint") or "not recorded" for row in rows}))}
    found |= {"decoding": "not recorded"}
    beside = path.with_name(path.name.removesuffix(ENDINGS[0]) + ".provenance.json")
    if questions:
        found["questions"] = {"path": str(questions), "sha256": sha256_of(questions)}
    if beside.is_file():
        found |= json.loads(beside.read_text(encoding="utf-8"))
    return found | {"predictions": {"path": str(path), "sha256": sha256_of(path)}}


def named(text: str) -> tuple[str, Path]:
    """Name and place: NAME=PATH, or a path whose last part is the name."""
    name, sign, path = text.partition("=")
    return (name, Path(path)) if sign and "/" not in name else (Path(text).resolve().name.split(".json")[0], Path(text))


def file_of(place: Path, task: Task, *endings: str) -> Path:
    """The file itself; in a folder the task's: its name with the first ending that is there, else its questions'."""
    found = [place / f"{task.name}{ending}" for ending in endings if (place / f"{task.name}{ending}").is_file()]
    return found[0] if found else place / task.questions if place.is_dir() else place


def find_files(args: argparse.Namespace, place: Path, *endings: str) -> dict[str, Path]:
    """Task -> its file; with --task all, of those that are there.

    Raises:
        EvaluationError: one is not there, or several tasks would have the same.
    """
    names = args.task if "all" not in args.task else [task.name for task in TASKS]
    files = {name: file_of(place, find_task(name), *endings) for name in names}
    if len(files) > 1 and not place.is_dir():
        raise EvaluationError(f"{place} is no folder; several tasks need one, with each one's file.")
    there = {name: path for name, path in files.items() if path.is_file()}
    if not there or ("all" not in args.task and len(there) < len(files)):
        raise EvaluationError(f"{next(path for path in files.values() if not path.is_file())} is not there.")
    return there


def list_tasks() -> str:
    rows = [(task.name, task.questions, task.metric, report.paper_text(task.paper), task.prompt) for task in TASKS]
    rows.insert(0, ("task", "questions", "metric", "papers", "prompt"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="print the tasks")
    parser.add_argument(
        "--task", nargs="+", default=[], choices=["all", *(task.name for task in TASKS)], metavar="TASK"
    )
    parser.add_argument("--model", nargs="+", type=named, default=[], metavar="[NAME=]DIR", help="checkpoint folders")
    parser.add_argument("--predictions", nargs="+", type=named, default=[], metavar="[NAME=]P.json", help="only score")
    parser.add_argument("--questions", type=Path, help="a file, or a folder of each task's file")
    parser.add_argument("--audio_root", type=Path, help="folder of relative audio_ids (default: that of the questions)")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--protocol", choices=("strict", "original"), default="strict", help="README: what differs")
    parser.add_argument("--embedder", default="minilm", help="minilm, a sentence-transformers folder, or openai:MODEL")
    parser.add_argument("--embeddings", help="ready vectors instead: JSON {text: vector}, or .npz")
    parser.add_argument("--cache_dir", type=Path, default=Path("exp/eval_cache"), help="of embeddings and judgements")
    parser.add_argument("--whisper_text", type=Path, help="JSON audio_id -> transcript (default: that of the answers)")
    parser.add_argument("--score_labels", action="store_true", help="by log-likelihoods of classes, no embeddings")
    parser.add_argument("--label_prompt", default="Closed-ended question: Generate audio labels.")
    parser.add_argument("--label_answer", default="Labels: {}", help="a class as the answer")
    judge = parser.add_argument_group("open-ended answers")
    judge.add_argument("--judge_model", help="at an OpenAI-compatible endpoint; the key is in OPENAI_API_KEY")
    judge.add_argument("--judge_url", help="of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
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
    names = [name for name, _ in args.model + args.predictions]
    if len(set(names)) < len(names):
        parser.error(f"two of the same name among {', '.join(names)}: say NAME=PATH")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print(list_tasks())
        return 0
    code, results = 0, []
    if args.model:
        from eval import asking  # With torch, which takes seconds.
    for _, model in args.model:
        asking.inference_flags(str(model), args)  # Before hours of work, not after.
    for name, model in args.model:
        files, folder, scores = find_files(args, args.questions), args.output_dir / name, {}
        if args.score_labels:
            files = {task: path for task, path in files.items() if "labels" in find_task(task).options}
            scores = {t: asking.score_labels(str(model), find_task(t), path, folder, args) for t, path in files.items()}
            unheard = sum(int(np.isneginf(own).all(1).sum()) for own in scores.values())
            code |= int(unheard > asking.inference_flags(str(model), args).max_bad)
        else:
            code |= asking.ask(str(model), files, folder, args)
        for task in files:
            results.append(score(find_task(task), name, folder / f"{task}{ENDINGS[0]}", args, scores.get(task)))
    for name, place in args.predictions:
        for task, path in find_files(args, place, *ENDINGS).items():
            results.append(score(find_task(task), name, path, args, None))
    order = [task.name for task in TASKS]
    results.sort(key=lambda result: order.index(result["task"]))
    report.write_report(results, {"protocol": args.protocol, "seed": args.seed}, args.output_dir)
    print(report.table(results, args.protocol))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
