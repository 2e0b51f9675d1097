"""Scoring many candidate answers behind one shared prefix, beside a pass of its own for each.

    python -m benchmarks.label_scoring --labels FILE --model DIR --output_path benchmarks/results/label_scoring.json

Notable:
- FILE has one name a line, such as the 527 of AudioSet's class_labels_indices.csv; their tokens and those of the prefix
  decide what can be gained, so DIR is a checkpoint with a real tokenizer;
- the clip is encoded before; "alone" is the cheapest way without a shared prefix: the whole sequence in one pass,
  logits of the answer only. "no cache" computes those of the whole sequence, as a plain forward does;
- the ways take turns in one process after a warm-up each; medians are compared, and scores must be equal.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # Spinning threads would time the neighbours on a shared machine.

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ltu.inference.engine import LtuEngine  # noqa: E402
from ltu.inference.requests import Request  # noqa: E402

QUESTION = "Classify the sound events in the audio clip."
NEEDED = 10.0  # alone / shared
MAX_ERROR = 1e-3  # of a log-likelihood, fp32


@torch.no_grad()
def score_alone(engine: LtuEngine, request: Request, label: str, all_logits: bool) -> float:
    """One candidate in one pass; the clip is taken from the cache of the engine."""
    processor, clip = engine.processor, engine.cache.encode([request])[0]
    row = {"instruction": request.question, "output": label}
    ids, labels = processor.encode_example(row, 10_000, train_on_inputs=False)
    answer = sum(label >= 0 for label in labels)
    batch = engine.pad_batch([ids], [clip.embeds])
    keep = {} if all_logits else {"logits_to_keep": answer + 1}
    logits = engine.model(**batch, use_cache=False, **keep).logits[0, -answer - 1 : -1].float()
    chosen = torch.tensor(ids[-answer:], device=logits.device)
    return float((logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)).sum())


def measure(engine: LtuEngine, labels: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for all labels, each way, and how far their scores are apart."""
    noise = np.random.default_rng(0).normal(0, 0.1, 160_000).astype(np.float32)
    request = Request(QUESTION, noise, "")
    ways: dict[str, Callable[[list[str]], list[float]]] = {
        "shared": lambda names: [score.log_likelihood for score in engine.score(request, names)],
        "alone": lambda names: [score_alone(engine, request, name, False) for name in names],
        "no cache": lambda names: [score_alone(engine, request, name, True) for name in names],
    }
    for run in ways.values():
        run(labels[:32])
    times: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            scores[name] = run(labels)  # As numbers of Python, so a GPU has finished.
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    prompt = len(engine.processor.encode(engine.processor.prompt(QUESTION)))
    return {
        "labels": len(labels),
        "tokens_of_the_prefix": engine.model.config.num_audio_tokens + prompt,
        "tokens_of_a_label": statistics.mean(
            score.num_tokens for score in engine.score(request, labels)
        ),
        "seconds": medians,
        "speedup": {name: medians[name] / medians["shared"] for name in ("alone", "no cache")},
        "largest_difference": max(
            abs(a - b) for a, b in zip(scores["shared"], scores["alone"], strict=True)
        ),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", required=True, help="a text file, one name a line")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the language model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_path", help="where to write the numbers as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    engine = LtuEngine.from_pretrained(args.model, args.device, args.dtype)
    labels = [
        name for name in Path(args.labels).read_text(encoding="utf-8").splitlines() if name.strip()
    ]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    report |= {"device": args.device, "dtype": args.dtype, "threads": args.threads}
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    report["language_model"] = {
        name: getattr(engine.model.config.text_config, name) for name in names
    }
    report |= {"rounds": args.rounds, "needed": NEEDED} | measure(engine, labels, args)
    print(json.dumps(report, indent=1))
    is_equal = report["largest_difference"] <= MAX_ERROR or args.dtype != "float32"
    reached = "reaches" if report["speedup"]["alone"] >= NEEDED else "falls short of"
    print(f"scores {'equal' if is_equal else 'DIFFER'}; {reached} {NEEDED:g} x")
    if args.output_path:
        Path(args.output_path).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output_path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not is_equal or report["speedup"]["alone"] < NEEDED)


if __name__ == "__main__":
    sys.exit(main())
