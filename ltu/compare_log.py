"""Compares the log of a run with the schedule that it should have, and with a released log.

    python -m ltu.compare_log exp/ltu/stage2_all_cla --output_path stage2.png
    python -m ltu.compare_log exp/ltu/stage2_all_cla --with checkpoint-9200/trainer_state.json
    python -m ltu.compare_log exp/ltu/finetune_toy --expected 10:0.6383,20:0.6052

A log is a `trainer_state.json`, the folder of a run that has one, or a CSV with the columns step,
epoch, learning_rate and loss.

Steps, epochs and learning rates are checked exactly. The learning rate logged at step s is the one
after it: it rises linearly to the full rate during warm-up, then falls linearly to zero at the last
step T. The record of a run determines T by the number of examples, the batch size and the number of
processes; for a log without a record, T is fitted.

Losses are compared as means of 50 steps, because examples grouped by length give the released logs
a sawtooth of that period.

The exit status is 1 if the schedule differs from the one expected, or if an expected loss is missed
by more than the tolerance.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ltu.files import run_command
from ltu.training.loss_log import (
    PERIOD,
    Schedule,
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

MAX_PRINTED_DIFFERENCES = 5
MAX_PRINTED_MEANS = 20


@dataclass
class CheckedLog:
    """A log and the schedule that it was checked against."""

    path: Path
    log: list[dict]
    schedule: Schedule
    is_exact: bool


def check_log(path: Path, log: list[dict], warmup_steps: int) -> CheckedLog:
    """Check a log against its recorded or fitted schedule, and print the result."""
    schedule = own_schedule(path)
    origin = "as recorded"
    if schedule is None:
        schedule = infer_schedule(log, warmup_steps)
        origin = "fitted"
    differences = check(log, schedule)
    last_step = with_loss(log)[-1]["step"]
    result = differences[:MAX_PRINTED_DIFFERENCES] if differences else "exact"
    print(f"{path}: step {last_step} of {schedule.total}, {schedule}, {origin}: {result}")
    return CheckedLog(path, log, schedule, is_exact=not differences)


def compare_schedules(run: Schedule, other: Schedule) -> bool:
    """Print and return whether two schedules have the same learning rates."""
    is_same = (run.base, run.warmup, run.total) == (other.base, other.warmup, other.total)
    print(f"The two schedules are {'the same' if is_same else 'NOT the same'}.")
    return is_same


def print_means(run: list[dict], other: list[dict]) -> None:
    """Print the mean losses of two logs side by side, at most about `MAX_PRINTED_MEANS` lines."""
    run_means = means(run)
    other_means = means(other)
    print(f"{'step':>7}{'loss':>10}{'other':>10}{'difference':>12}   means of {PERIOD} steps")
    shared_steps = [step for step in run_means if step in other_means]
    stride = max(1, len(shared_steps) // MAX_PRINTED_MEANS)
    for step in shared_steps[::stride]:
        difference = run_means[step] - other_means[step]
        print(f"{step:7}{run_means[step]:10.4f}{other_means[step]:10.4f}{difference:+12.4f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="The --output_dir of ltu.finetune, or a log.")
    parser.add_argument("--with", dest="other", type=Path, help="A released log.")
    parser.add_argument(
        "--expected",
        type=parse_expected,
        default={},
        help="Expected losses by step, for example 10:0.6383,20:0.6052.",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.03,
        help="The largest difference from an expected loss. The author's own runs differ by 0.03.",
    )
    parser.add_argument(
        "--warmup_steps",
        type=int,
        default=100,
        help="The steps of warm-up of a log without a record.",
    )
    parser.add_argument("--output_path", type=Path, help="The PNG to which losses are plotted.")
    args = parser.parse_args(argv)

    # Read both logs first, so that a wrong path is an error before anything is printed.
    logs = [(path, read_log(path)) for path in (args.run, args.other) if path]
    checked = [check_log(path, log, args.warmup_steps) for path, log in logs]
    is_right = all(log.is_exact for log in checked)
    run = checked[0]
    if args.other:
        other = checked[1]
        is_right &= compare_schedules(run.schedule, other.schedule)
        print_means(run.log, other.log)
    is_right &= compare_expected(run.log, args.expected, args.tolerance)
    if args.output_path:
        plot(logs, args.output_path)
        print(f"Plot: {args.output_path}")
    return 0 if is_right else 1


if __name__ == "__main__":
    run_command(main)
