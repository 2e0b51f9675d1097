"""Answer a file of questions.

    python -m ltu.inference_batch --model DIR --data_path Q.json --output_path P.json

Q.json has the rows of training; `output` is the reference and may be absent. P.json is a list of
`{"prompt", "pred", "ref", "audio_id", "status", "seconds_heard", ...}` in the order of the questions.
Exits with 1 when more than `--max_bad` clips could not be heard.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from ltu.ask import add_decoding_flags, decoding_of
from ltu.pipeline_ltu import LtuPipeline, Request
from ltu.qa_dataset import read_rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", required=True, help="questions: JSON list or JSON lines")
    parser.add_argument("--output_path", required=True, help="answers, as JSON")
    parser.add_argument("--audio_root", help="folder of relative audio_ids (default: that of the data file)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_bad", type=int, default=0, help="clips that may fail without a non-zero exit")
    add_decoding_flags(parser)
    args = parser.parse_args(argv)
    rows = read_rows(args.data_path, args.audio_root, need_output=False)
    pipeline = LtuPipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, language_model=args.llm)
    requests = [Request(row["instruction"], row["audio"], row.get("input") or None) for row in rows]
    answers = pipeline(requests, batch_size=args.batch_size, seed=args.seed, progress=True, **decoding_of(args))
    predictions = [
        {
            "prompt": row["instruction"],
            "pred": answer.text,
            "ref": row.get("output"),
            "audio_id": row.get("audio_id"),
            "status": answer.status,
            "error": answer.error,
            "seconds_heard": round(answer.seconds_heard, 3),
            "seconds_total": round(answer.seconds_total, 3),
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
    Path(args.output_path).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_path).write_text(json.dumps(predictions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    statuses = Counter(answer.status for answer in answers)
    print(
        f"{args.output_path}: {len(answers)} answers; "
        + ", ".join(f"{status} {count}" for status, count in statuses.most_common())
    )
    for answer in [answer for answer in answers if answer.status != "ok"][:20]:
        print(f"  {answer.error}", file=sys.stderr)
    return int(len(answers) - statuses["ok"] > args.max_bad)


if __name__ == "__main__":
    sys.exit(main())
