"""Measures the scoring of AudioSet's 20,000 predictions, and of cosines against a Python loop.

    python -m benchmarks.eval_scoring --output_path benchmarks/results/eval_scoring.json
    python -m benchmarks.eval_scoring --embedder pretrained_mdls/minilm

The predictions name one to four of 527 classes in words of their own, so most texts differ. By
default their embeddings are random, 384 wide as those of MiniLM, from a table: the time is that of
scoring, not of embedding. With `--embedder` they are real, computed before and then cached.

The whole command is timed, with imports and reports; memory is its largest resident memory. The
loop multiplies one Python float after another, as the original's evaluators do. It runs over a few
answers, and its time is extrapolated.
"""

import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure_command import measure_command
from benchmarks.report import print_report, write_report
from data.command_line import command_parser
from eval.classification import LABELS, cosines
from ltu.files import run_command

NUM_PREDICTIONS = 20_000
DIM = 384
LOOP_ANSWERS = 20
BARS = {"seconds": 60, "peak_mb": 2048, "times the loop": 100}
WORDS = (
    "a the loud soft distant sharp echo of and with followed by then near low high rough clear "
    "bright dull"
).split()


def write_predictions(path: Path, count: int, classes: list[str]) -> list[str]:
    """Write predictions in the format of the original, and return every text to be embedded."""
    rng = random.Random(0)
    texts = {"sound of " + name.lower() for name in classes}
    predictions = []
    for number in range(count):
        references = rng.sample(classes, rng.randint(1, 4))
        words = []
        for _ in range(8):
            candidates = [*rng.sample(WORDS, 4), rng.choice(references)]
            words.append(rng.choice(candidates))
        answer = f"{' '.join(words)}."
        predictions.append(
            {
                "prompt": "q",
                "pred": f"Audio caption: {answer}",
                "ref": f"Labels: {'; '.join(references)}",
                "audio_id": f"{number}.flac",
            }
        )
        texts.add("sound of " + answer.lower())
    path.write_text(json.dumps(predictions), encoding="utf-8")
    return sorted(texts)


def loop(answers: list[list[float]], classes: list[list[float]]) -> None:
    """Compute cosines with one Python float after another."""
    for left in answers:
        for right in classes:
            product = norm_left = norm_right = 0.0
            for one, other in zip(left, right, strict=True):
                product += one * other
                norm_left += one * one
                norm_right += other * other
            assert product / (norm_left**0.5 * norm_right**0.5) <= 1.01


def measure_commands(
    folder: Path, count: int, embedder: str | None, classes: list[str], rng: np.random.Generator
) -> dict[str, dict]:
    """Score predictions with each protocol and return the measurements of each command."""
    predictions = folder / "predictions.json"
    texts = write_predictions(predictions, count, classes)
    table = folder / "vectors.npz"
    np.savez(table, texts=np.array(texts), vectors=rng.random((len(texts), DIM), np.float32))
    runs = {"strict": "strict", "original": "original"}  # Name of a run -> protocol.
    embeddings = ["--embeddings", str(table)]
    if embedder:
        embeddings = ["--embedder", embedder]
        runs = {"warm-up": "strict"} | runs
    results = {}
    for name, protocol in runs.items():
        results[name] = measure_command(
            [
                "eval.run",
                *("--task", "audioset"),
                *("--predictions", str(predictions)),
                *("--output_dir", str(folder / name)),
                *("--cache_dir", str(folder / "cache")),
                *embeddings,
                *("--protocol", protocol),
            ]
        )
        print(name, results[name], flush=True)
    return results


def measure_cosines(count: int, num_classes: int, rng: np.random.Generator) -> dict:
    """Return the seconds of the product and of the loop, and their ratio."""
    answers = rng.random((count, DIM))
    classes = rng.random((num_classes, DIM))
    start = time.perf_counter()
    cosines(answers, classes, "strict")
    product_seconds = time.perf_counter() - start
    start = time.perf_counter()
    loop(answers[:LOOP_ANSWERS].tolist(), classes.tolist())
    loop_seconds = (time.perf_counter() - start) * count / LOOP_ANSWERS
    return {
        "product_s": round(product_seconds, 3),
        "loop_s": round(loop_seconds, 1),
        "times": round(loop_seconds / product_seconds),
    }


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--num_predictions", type=int, default=NUM_PREDICTIONS, help="Number of predictions."
    )
    parser.add_argument(
        "--embedder", help="As in eval.run. Embeddings are computed once, before the measurement."
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    args = parser.parse_args(argv)
    lines = (LABELS / "audioset.txt").read_text(encoding="utf-8").splitlines()
    classes = [line.split(" | ")[0] for line in lines]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        results = measure_commands(
            Path(temporary), args.num_predictions, args.embedder, classes, rng
        )
    cosine = measure_cosines(args.num_predictions, len(classes), rng)
    metrics = {
        "seconds": max(results["strict"]["seconds"], results["original"]["seconds"]),
        "peak_mb": max(result["peak_mb"] for result in results.values()),
        "times the loop": cosine["times"],
    }
    is_met = (
        metrics["seconds"] <= BARS["seconds"]
        and metrics["peak_mb"] <= BARS["peak_mb"]
        and metrics["times the loop"] >= BARS["times the loop"]
    )
    report = {
        "num_predictions": args.num_predictions,
        "classes": len(classes),
        "embedder": args.embedder or "random vectors",
        "commands": results,
        "cosines": cosine,
        "metrics": metrics,
        "bars": BARS,
        "reached": is_met,
    }
    print_report(report)
    write_report(report, args.output_path)
    return int(not is_met)


if __name__ == "__main__":
    run_command(main)
