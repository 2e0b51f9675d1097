"""Computes the loss of the reference answers to the questions of dataset files.

    python -m eval.answer_loss --model DIR --data_path Q.json --output_path L.json
    python -m eval.answer_loss --model DIR --data_path Q1.json Q2.json \\
        --output_path L1.json L2.json

Nothing is generated, so a model that does not answer in whole sentences yet has a loss too. With
the same questions about another clip, or about none, the difference of the losses tells how much
of the answers the model takes from the audio.

L.json is a list of `{"prompt", "ref", "audio_id", "loss", "num_tokens"}` in the order of the
questions. `loss` is the mean over the `num_tokens` tokens of the answer and its end, in nats. A
clip that cannot be decoded is an error, and no file is written.
"""

import argparse
import math
from pathlib import Path

from tqdm import tqdm

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from eval.scorer_interface import EvaluationError
from ltu.data.audio import AudioError
from ltu.data.check_examples import add_ignored_keys, parse_ignored_keys, read_examples
from ltu.files import run_command, write_json
from ltu.inference.batch_inference import BatchSettings, make_requests, refuse_outputs
from ltu.inference.engine import LtuEngine
from ltu.models.audio_front_end import add_front_end_flags, read_front_end_flags

BATCH_SIZE = 64  # Answers whose audio embeddings are in memory at the same time.


def compute_losses(engine: LtuEngine, examples: list[dict]) -> list[dict]:
    """Return an entry of the output for each example, as `read_examples` returns them.

    Raises:
        EvaluationError: a clip cannot be decoded, or a loss is not finite.
    """
    requests = make_requests(examples, BatchSettings())
    answers = [example["output"] for example in examples]
    scores = []
    for start in tqdm(range(0, len(examples), BATCH_SIZE), "loss", unit="batch"):
        batch = slice(start, start + BATCH_SIZE)
        try:
            scores += engine.score_answers(requests[batch], answers[batch])
        except AudioError as error:
            raise EvaluationError(f"{error}. Fix the clip, or leave its questions out.") from error
    entries = []
    for example, score in zip(examples, scores, strict=True):
        loss = -score.log_likelihood / score.num_tokens
        if not math.isfinite(loss):
            raise EvaluationError(
                f"The loss of {example['output']!r} about {example['audio_id']} is {loss}. The "
                "weights of the checkpoint may be damaged."
            )
        entry = {
            "prompt": example["instruction"],
            "ref": example["output"],
            "audio_id": example["audio_id"],
            "loss": loss,
            "num_tokens": score.num_tokens,
        }
        entries.append(entry)
    return entries


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="The checkpoint folder, or its hub id.")
    parser.add_argument(
        "--data_path", type=Path, nargs="+", required=True, help="Dataset files with answers."
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        nargs="+",
        required=True,
        help="The JSON files to write, one for each dataset file.",
    )
    parser.add_argument(
        "--audio_root",
        help="The folder to which audio_ids are relative (default: that of the dataset file).",
    )
    add_ignored_keys(parser)
    add_front_end_flags(parser)
    args = parser.parse_args(argv)
    num_inputs = len(args.data_path)
    if len(args.output_path) != num_inputs:
        parser.error(f"{num_inputs} dataset files, but {len(args.output_path)} --output_path")
    refuse_outputs(parser, args.data_path, args.output_path)
    return args


def main(argv: list[str] | None = None) -> None:
    """Write the losses, and print the mean of each dataset file."""
    args = parse_args(argv)
    ignored_keys = parse_ignored_keys(args.ignored_keys)
    datasets = []
    for path in args.data_path:
        examples = read_examples(path, args.audio_root, ignored_keys=ignored_keys)
        if not examples:
            raise EvaluationError(f"{path} has no examples.")
        datasets.append(examples)
    engine = LtuEngine.from_pretrained(args.model)
    engine.processor.front_end.configure(**read_front_end_flags(args))
    for path, examples, output_path in zip(args.data_path, datasets, args.output_path, strict=True):
        entries = compute_losses(engine, examples)
        write_json(entries, output_path)
        mean = sum(entry["loss"] for entry in entries) / len(entries)
        print(f"{path}: {len(entries)} answers, loss {mean:.3f} nats per token. {output_path}")


if __name__ == "__main__":
    run_command(main)
