"""Hold a run's log against the schedule that it should have had, and against a released log.

    python -m ltu.compare_log exp/ltu/stage2_all_cla --output_path stage2.png
    python -m ltu.compare_log exp/ltu/stage2_all_cla --with checkpoint-9200/trainer_state.json --output_path stage2.png
    python -m ltu.compare_log exp/ltu/finetune_toy --expected 10:0.6383,20:0.6052

A log is a `trainer_state.json`, a folder of a run that holds one, or a CSV with step, epoch, learning_rate and loss.

Notable:
- Steps, epochs and rates are checked exactly. The rate logged at step s is the one after it: s / warm-up of the full
  one, then linear to zero at step T. T follows from rows, batch and processes; a log without them must fit one T alone.
- Losses are compared as means of 50 steps: rows grouped by length make a sawtooth of that period in the released logs.
- Exit status 1: the schedule is another than it should be, or an expected loss is missed by more than the tolerance.
"""

import argparse
from pathlib import Path

from ltu.files import run_command
from ltu.training.loss_log import (
    PERIOD,
    check,
    compare_expected,
    infer_schedule,
    means,
    own_schedule,
    parse_expected,
    plot,
    read_log,
    with_loss,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="--output_dir of ltu.finetune, or a log")
    parser.add_argument("--with", dest="other", type=Path, help="a released log")
    parser.add_argument(
        "--expected", type=parse_expected, default={}, help="losses at steps: 10:0.6383,20:0.6052"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.03,
        help="of --expected (the author's own runs differ so)",
    )
    parser.add_argument("--warmup_steps", type=int, default=100, help="of logs that do not say it")
    parser.add_argument("--output_path", type=Path, help="a PNG")
    args = parser.parse_args(argv)
    logs = [(path, read_log(path)) for path in (args.run, args.other) if path]
    schedules, is_right = [], True
    for path, log in logs:
        record = own_schedule(path)
        schedules.append(record or infer_schedule(log, args.warmup_steps))
        wrong = check(log, schedules[-1])
        is_right &= not wrong
        kind = "as recorded" if record else "fitted"
        reached = f"step {with_loss(log)[-1]['step']} of {schedules[-1].total}"
        print(f"{path}: {reached}, {schedules[-1]}, {kind}: {'exact' if not wrong else wrong[:5]}")
    if args.other:
        run, other = schedules
        is_same = (run.base, run.warmup, run.total) == (other.base, other.warmup, other.total)
        is_right &= is_same
        print(f"The two schedules are {'the same' if is_same else 'NOT the same'}.")
        ours, theirs = (means(log) for _, log in logs)
        print(f"{'step':>7}{'loss':>10}{'other':>10}{'difference':>12}   means of {PERIOD} steps")
        shared = [step for step in ours if step in theirs]
        for step in shared[:: max(1, len(shared) // 20)]:
            print(
                f"{step:7}{ours[step]:10.4f}{theirs[step]:10.4f}{ours[step] - theirs[step]:+12.4f}"
            )
    is_right &= compare_expected(logs[0][1], args.expected, args.tolerance)
    if args.output_path:
        plot(logs, args.output_path)
        print(f"Picture: {args.output_path}")
    return 0 if is_right else 1


if __name__ == "__main__":
    run_command(main)
