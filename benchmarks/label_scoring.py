"""Measures the scoring of many candidate answers: with a shared prefix, and one by one.

    python -m benchmarks.label_scoring --labels FILE --model DIR \\
        --output_path benchmarks/results/label_scoring.json

FILE has one name a line, such as the 527 of AudioSet's class_labels_indices.csv. DIR is a
checkpoint with a real tokenizer, because the number of tokens in the labels and in the prefix
decides what can be gained.

The clip is encoded before. "alone" is the cheapest way without a shared prefix: the whole sequence
in one forward pass, with logits of the answer only. "no cache" computes the logits of the whole
sequence, as a plain forward pass does. The ways alternate in one process after a warm-up of each.
Medians are compared, and the scores must be equal.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.device import device_name  # noqa: E402
from benchmarks.report import print_report, write_report  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu.files import run_command  # noqa: E402
from ltu.inference.engine import LtuEngine  # noqa: E402
from ltu.inference.requests import Request  # noqa: E402
from ltu.models.configuration_ltu import IGNORED  # noqa: E402

QUESTION = "Classify the sound events in the audio clip."
NEEDED = 10.0  # alone / shared
MAX_ERROR = 1e-3  # of a log-likelihood, fp32
WARM_UP_LABELS = 32


@torch.no_grad()
def score_alone(engine: LtuEngine, request: Request, label: str, all_logits: bool) -> float:
    """Return the log-likelihood of one candidate, by one forward pass.

    The audio embeddings of the clip are taken from the cache of the engine.
    """
    processor = engine.processor
    clip = engine.cache.encode([request])[0]
    example = {"instruction": request.question, "output": label}
    tokens, labels = processor.encode_example(example, 10_000, train_on_inputs=False)
    num_answer_tokens = len(labels) - labels.count(IGNORED)
    batch = engine.pad_batch([tokens], [clip.embeds])
    if not all_logits:
        batch["logits_to_keep"] = num_answer_tokens + 1
    logits = engine.model(**batch, use_cache=False).logits
    logits = logits[0, -num_answer_tokens - 1 : -1].float()  # (answer tokens, vocabulary)
    answer = torch.tensor(tokens[-num_answer_tokens:], device=logits.device)
    chosen = logits.gather(1, answer[:, None])[:, 0]  # (answer tokens,)
    return float((chosen - logits.logsumexp(1)).sum())


def measure(engine: LtuEngine, labels: list[str], rounds: int) -> dict[str, Any]:
    """Return the seconds for all labels, for each way, and the largest difference of scores."""
    noise = np.random.default_rng(0).normal(0, 0.1, 160_000).astype(np.float32)
    request = Request(QUESTION, noise, "")

    def shared(names: list[str]) -> list[float]:
        return [score.log_likelihood for score in engine.score(request, names)]

    def alone(names: list[str]) -> list[float]:
        return [score_alone(engine, request, name, False) for name in names]

    def no_cache(names: list[str]) -> list[float]:
        return [score_alone(engine, request, name, True) for name in names]

    ways: dict[str, Callable[[list[str]], list[float]]] = {
        "shared": shared,
        "alone": alone,
        "no cache": no_cache,
    }
    for run in ways.values():
        run(labels[:WARM_UP_LABELS])
    times: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            scores[name] = run(labels)  # Python numbers, so a GPU has finished.
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    prompt = len(engine.processor.encode(engine.processor.prompt(QUESTION)))
    label_lengths = [score.num_tokens for score in engine.score(request, labels)]
    differences = np.subtract(scores["shared"], scores["alone"])
    return {
        "labels": len(labels),
        "tokens_of_the_prefix": engine.model.config.num_audio_tokens + prompt,
        "tokens_of_a_label": statistics.mean(label_lengths),
        "seconds": medians,
        "speedup": {
            "alone": medians["alone"] / medians["shared"],
            "no cache": medians["no cache"] / medians["shared"],
        },
        "largest_difference": float(np.abs(differences).max()),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--labels", required=True, help="A text file with one name a line.")
    parser.add_argument("--model", required=True, help="A checkpoint folder.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="float32", help="Dtype of the language model.")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="Threads of torch."
    )
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each way.")
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    engine = LtuEngine.from_pretrained(args.model, args.device, args.dtype)
    lines = Path(args.labels).read_text(encoding="utf-8").splitlines()
    labels = [line for line in lines if line.strip()]
    llm_config = engine.model.config.text_config
    report = {
        "machine": device_name("cpu"),
        "torch": torch.__version__,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "language_model": {
            "model_type": llm_config.model_type,
            "vocab_size": llm_config.vocab_size,
            "hidden_size": llm_config.hidden_size,
            "num_hidden_layers": llm_config.num_hidden_layers,
        },
        "rounds": args.rounds,
        "needed": NEEDED,
    }
    report |= measure(engine, labels, args.rounds)
    print_report(report)
    is_equal = report["largest_difference"] <= MAX_ERROR or args.dtype != "float32"
    is_fast = report["speedup"]["alone"] >= NEEDED
    equal = "equal" if is_equal else "DIFFER"
    verdict = "reaches" if is_fast else "falls short of"
    print(f"scores {equal}; {verdict} {NEEDED:g} x")
    write_report(report, args.output_path)
    return int(not (is_equal and is_fast))


if __name__ == "__main__":
    run_command(main)
