"""Answer files of questions.

    python -m ltu.inference_batch --model DIR --data_path Q.json --output_path P.json
    python -m ltu.inference_batch --model DIR --data_path Q1.json Q2.json --output_path P1.json P2.json

Q.json has the rows of training; `output` is the reference and may be absent. P.json is a list of
`{"prompt", "pred", "ref", "audio_id", "status", "seconds_heard", ...}` in the order of the questions.
Exits with 1 when more than `--max_bad` clips could not be heard.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from ltu.ask import add_decoding_flags, decoding_of, open_pipeline
from ltu.pipeline_ltu import Answer, Request
from ltu.qa_dataset import read_rows


def prediction(row: dict, answer: Answer) -> dict:
    """One entry of P.json."""
    return {
        "prompt": row["instruction"],
        "pred": answer.text,
        "ref": row.get("output"),
        "audio_id": row.get("audio_id"),
        "status": answer.status,
        "error": answer.error,
        "seconds_heard": round(answer.seconds_heard, 3),
        "seconds_total": round(answer.seconds_total, 3),
        "transcript": answer.transcript,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", required=True, nargs="+", help="questions: JSON list or JSON lines")
    parser.add_argument(
        "--output_path", required=True, nargs="+", help="answers as JSON, one for each file of questions"
    )
    parser.add_argument("--audio_root", help="folder of relative audio_ids (default: that of the data file)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_bad", type=int, default=0, help="clips that may fail without a non-zero exit")
    add_decoding_flags(parser)
    args = parser.parse_args(argv)
    if len(args.data_path) != len(args.output_path):
        parser.error(f"{len(args.data_path)} files of questions, but {len(args.output_path)} --output_path")
    for path in args.output_path:  # Before hours of work, not after.
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            parser.error(f"--output_path {path} is a folder; name a file in it")
    files = [read_rows(path, args.audio_root, need_output=False) for path in args.data_path]
    pipeline = open_pipeline(args)
    statuses: Counter = Counter()
    for rows, output_path in zip(files, args.output_path, strict=True):
        requests = [
            Request(row["instruction"], row["audio"], row.get("input"), row.get("audio_id"), args.mode) for row in rows
        ]
        answers = pipeline(requests, args.batch_size, seed=args.seed, progress=True, **decoding_of(args))
        predictions = [prediction(row, answer) for row, answer in zip(rows, answers, strict=True)]
        text = json.dumps(predictions, indent=1, ensure_ascii=False)
        Path(f"{output_path}.tmp").write_text(text + "\n", encoding="utf-8")
        os.replace(f"{output_path}.tmp", output_path)  # Never half a file.
        counts = Counter(answer.status for answer in answers)
        shown = ", ".join(f"{status} {count}" for status, count in counts.most_common())
        print(f"{output_path}: {len(answers)} answers; {shown}")
        for answer in [answer for answer in answers if answer.status != "ok"][:20]:
            print(f"  {answer.error}", file=sys.stderr)
        statuses += counts
    return int(statuses.total() - statuses["ok"] > args.max_bad)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
