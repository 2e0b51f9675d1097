"""Reads loss logs of training runs, checks their learning rates and plots their losses."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

PERIOD = 50  # steps of the sawtooth
MAX_ERROR = 1e-15  # relative, of a rate: a few roundings of a double


@dataclass
class Schedule:
    """Full rate, steps of warm-up and in total; micro-batches of a rank in a step and in an epoch, where known."""

    base: float
    warmup: int
    total: int
    accumulation: int | None = None
    per_epoch: int | None = None

    def rate(self, step: int) -> float:
        """The rate after `step` optimizer steps."""
        if step < self.warmup:
            return self.base * step / self.warmup
        return self.base * max(0, self.total - step) / max(1, self.total - self.warmup)


def find_state(folder: Path) -> Path:
    """The `trainer_state.json` of a run: its own, or that of its last checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    for place in (folder, *reversed(checkpoints)):
        if (place / "trainer_state.json").is_file():
            return place / "trainer_state.json"
    raise FileNotFoundError(
        f"{folder} has no trainer_state.json: is it the --output_dir of a run of ltu.finetune?"
    )


def read_log(path: Path) -> list[dict]:
    """The entries of a log in their order: step, epoch, learning_rate, loss; of a run also its other entries.

    Raises:
        FileNotFoundError: no log is there.
        ValueError: the file is no log, or holds no losses.
    """
    path = find_state(path) if path.is_dir() else path
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as stream:
                rows = [
                    {key: float(value) for key, value in row.items()}
                    for row in csv.DictReader(stream)
                ]
            log = [row | {"step": int(row["step"])} for row in rows]
        else:
            log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no log ({error!r}). Give a trainer_state.json, or a CSV with a header."
        ) from error
    if not any("loss" in entry for entry in log):
        raise ValueError(f"{path} holds no losses: has the run come to its first --logging_steps?")
    return log


def with_loss(log: list[dict]) -> list[dict]:
    """The entries of training: not those of held-out rows, nor the last one, which sums up."""
    return [entry for entry in log if "loss" in entry]


def own_schedule(path: Path) -> Schedule | None:
    """What the run at `path`, or of the log there, was to be by its `ltu_state.json`; None without one."""
    record = (find_state(path) if path.is_dir() else path).parent / "ltu_state.json"
    if not record.is_file():
        return None
    state = json.loads(record.read_text(encoding="utf-8"))
    given, passes = state["arguments"], (state.get("accumulation"), state.get("batches_per_epoch"))
    return Schedule(given["learning_rate"], given["warmup_steps"], state["total_steps"], *passes)


def infer_schedule(log: list[dict], warmup: int = 100) -> Schedule:
    """The schedule that a log without a record must have had: the full rate from its first entry, T from its last.

    Raises:
        ValueError: the log ends before the rate falls.
    """
    rates = [(entry["step"], entry["learning_rate"]) for entry in with_loss(log)]
    step, rate = rates[0]
    if not 0 < step <= warmup:
        raise ValueError(
            f"The log begins at step {step}, after the {warmup} of warm-up: its full rate is unknown."
        )
    base = float(f"{rate * warmup / step:.12g}")  # Full rates are short decimals.
    step, rate = rates[-1]
    if step <= warmup:
        raise ValueError(
            f"The log ends at step {step}, within its {warmup} steps of warm-up: T cannot be told."
        )
    return Schedule(base, warmup, round((step - warmup * rate / base) / (1 - rate / base)))


def check(log: list[dict], schedule: Schedule) -> list[str]:
    """What differs from the schedule; nothing if all is as it should be."""
    wrong = []
    entries = with_loss(log)
    for entry in entries:
        step, expected = entry["step"], schedule.rate(entry["step"])
        if abs(entry["learning_rate"] - expected) > MAX_ERROR * max(
            expected, schedule.base * MAX_ERROR
        ):
            wrong.append(f"step {step}: rate {entry['learning_rate']!r}, expected {expected!r}")
        if (
            schedule.per_epoch
            and entry["epoch"] != step * schedule.accumulation / schedule.per_epoch
        ):
            expected = step * schedule.accumulation / schedule.per_epoch
            wrong.append(f"step {step}: epoch {entry['epoch']!r}, expected {expected!r}")
    steps = [entry["step"] for entry in entries]
    if steps != sorted(set(steps)) or (steps and steps[-1] > schedule.total):
        wrong.append(f"steps are not in order, or go on after step {schedule.total}")
    return wrong


def means(log: list[dict], period: int = PERIOD) -> dict[int, float]:
    """Mean loss of each whole period of steps, by its last step."""
    parts: dict[int, list[float]] = {}
    losses = [(entry["step"], entry["loss"]) for entry in with_loss(log)]
    for step, loss in losses:
        parts.setdefault(-(-step // period) * period, []).append(loss)
    return {step: mean(values) for step, values in parts.items() if losses[-1][0] >= step}


def plot(logs: list[tuple[Path, list[dict]]], output_path: Path) -> None:
    """Write the PNG: losses, thin as logged and thick as means, above rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (path, log) in enumerate(logs):
        entries, style = with_loss(log), {"color": f"C{number}"}
        steps = [entry["step"] for entry in entries]
        above.plot(steps, [entry["loss"] for entry in entries], alpha=0.35, linewidth=0.8, **style)
        smooth = (
            means(log)
            if len(means(log)) > 1
            else dict(zip(steps, (e["loss"] for e in entries), strict=True))
        )
        above.plot(list(smooth), list(smooth.values()), label=path.name, **style)
        below.plot(steps, [entry["learning_rate"] for entry in entries], **style)
    losses = sorted(entry["loss"] for _, log in logs for entry in with_loss(log))
    above.set(
        ylabel="loss (nats per token)", ylim=(0, 1.3 * losses[int(0.97 * (len(losses) - 1))])
    )  # Not the first few.
    below.set(xlabel="step", ylabel="learning rate")
    above.legend(frameon=False)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=150)


def compare_expected(log: list[dict], expected: dict[int, float], tolerance: float) -> bool:
    """Print the losses logged at these steps beside the expected ones; whether all are within the tolerance."""
    found = {entry["step"]: entry["loss"] for entry in with_loss(log)}
    for step, loss in expected.items():
        verdict = (
            "not logged"
            if step not in found
            else f"{found[step]:.4f}, off by {found[step] - loss:+.4f}"
        )
        print(f"step {step}: expected {loss:.4f} +- {tolerance}, {verdict}")
    return all(
        step in found and abs(found[step] - loss) <= tolerance for step, loss in expected.items()
    )


def parse_expected(text: str) -> dict[int, float]:
    """`10:0.6383,20:0.6052`"""
    return {int(step): float(loss) for step, loss in (part.split(":") for part in text.split(","))}
