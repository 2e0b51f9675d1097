"""Reads loss logs of training runs, checks their learning rates and plots their losses.

A log is a list of entries as in the `log_history` of a `trainer_state.json`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ltu.files import check_regular_file, read_json_object
from ltu.models.locate_checkpoint import list_checkpoints
from ltu.models.provenance import TRAINER_STATE, read_record

PERIOD = 50  # Steps over which losses are averaged; the sawtooth of the released logs has it.
MAX_ERROR = 1e-15  # Relative error of a learning rate: a few roundings of a double.


@dataclass
class Schedule:
    """A linear schedule of the learning rate, and the sizes that the epochs in a log depend on.

    Args:
        base: the full learning rate.
        warmup: steps of warm-up.
        total: steps of the whole run.
        accumulation: micro-batches of a rank in one step, if known.
        per_epoch: micro-batches of a rank in one epoch, if known.
    """

    base: float
    warmup: int
    total: int
    accumulation: int | None = None
    per_epoch: int | None = None

    def rate(self, step: int) -> float:
        """Return the learning rate after `step` optimizer steps."""
        if step < self.warmup:
            return self.base * step / self.warmup
        return self.base * max(0, self.total - step) / max(1, self.total - self.warmup)


def find_state(folder: Path) -> Path:
    """Return the path of a run's `trainer_state.json`: its own, or that of its last checkpoint.

    Raises:
        FileNotFoundError: the run has none.
    """
    for candidate in (folder, *list_checkpoints(folder)):
        path = candidate / TRAINER_STATE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} has no trainer_state.json: is it the --output_dir of a run of ltu.finetune?"
    )


def read_log(path: Path) -> list[dict]:
    """Read a log from a `trainer_state.json`, a CSV or the folder of a run.

    Returns:
        The entries in their order, with step, epoch, learning_rate and loss. A run also has other
        entries, such as held-out losses.

    Raises:
        FileNotFoundError: the file or the folder has no log.
        ValueError: the file is not a log, or contains no losses.
    """
    path = find_state(path) if path.is_dir() else path
    try:
        log = _read_csv(path) if path.suffix == ".csv" else _read_state(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a log ({error!r}). Give a trainer_state.json, or a CSV with a header."
        ) from error
    if not any("loss" in entry for entry in log):
        raise ValueError(
            f"{path} contains no losses: has the run reached its first --logging_steps?"
        )
    return log


def _read_csv(path: Path) -> list[dict]:
    check_regular_file(path)
    log = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry: dict[str, float | int] = {key: float(value) for key, value in row.items()}
            entry["step"] = int(entry["step"])
            log.append(entry)
    return log


def _read_state(path: Path) -> list[dict]:
    log = read_json_object(path)["log_history"]
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise TypeError("log_history is no list of objects")
    return log


def with_loss(log: list[dict]) -> list[dict]:
    """Return the entries with a training loss: no held-out losses and no summary at the end."""
    return [entry for entry in log if "loss" in entry]


def own_schedule(path: Path) -> Schedule | None:
    """Return the schedule that the run at `path` recorded in its `ltu_state.json`, or None.

    Args:
        path: the folder of a run, or its log.
    """
    log_path = find_state(path) if path.is_dir() else path
    state = read_record(log_path.parent)
    if not state:
        return None
    arguments = state["arguments"]
    base = arguments["learning_rate"]
    # The log has the learning rate of the first group of weights; in stage 1, of the projection.
    projector_rate = arguments.get("projector_learning_rate")
    if arguments.get("trainable_params") == "proj" and projector_rate is not None:
        base = projector_rate
    return Schedule(
        base=base,
        warmup=arguments["warmup_steps"],
        total=state["total_steps"],
        accumulation=state.get("accumulation"),
        per_epoch=state.get("batches_per_epoch"),
    )


def infer_schedule(log: list[dict], warmup: int = 100) -> Schedule:
    """Fit a schedule to a log without a record.

    The full learning rate follows from the first entry, the number of steps from the last one.

    Raises:
        ValueError: the log begins after the warm-up, or ends before the learning rate falls.
    """
    entries = with_loss(log)
    step = entries[0]["step"]
    rate = entries[0]["learning_rate"]
    if not 0 < step <= warmup:
        raise ValueError(
            f"The log begins at step {step}, after the {warmup} steps of warm-up: its full "
            "learning rate is unknown."
        )
    base = float(f"{rate * warmup / step:.12g}")  # Full learning rates are short decimals.

    step = entries[-1]["step"]
    rate = entries[-1]["learning_rate"]
    if step <= warmup:
        raise ValueError(
            f"The log ends at step {step}, within its {warmup} steps of warm-up: its number of "
            "steps is unknown."
        )
    if not 0 <= rate < base:
        raise ValueError(
            f"The learning rate is {rate} at step {step}, and {base} after the warm-up: it does "
            "not fall, so the number of steps is unknown."
        )
    total = round((step - warmup * rate / base) / (1 - rate / base))
    return Schedule(base, warmup, total)


def check(log: list[dict], schedule: Schedule) -> list[str]:
    """Return the differences of a log from a schedule, which are none if they agree."""
    differences = []
    entries = with_loss(log)
    for entry in entries:
        step = entry["step"]
        rate = entry["learning_rate"]
        expected_rate = schedule.rate(step)
        # The last learning rate is 0; the second bound allows for it.
        max_error = MAX_ERROR * max(expected_rate, schedule.base * MAX_ERROR)
        if abs(rate - expected_rate) > max_error:
            differences.append(f"step {step}: rate {rate!r}, expected {expected_rate!r}")
        if schedule.per_epoch:
            epoch = entry["epoch"]
            expected_epoch = step * schedule.accumulation / schedule.per_epoch
            if epoch != expected_epoch:
                differences.append(f"step {step}: epoch {epoch!r}, expected {expected_epoch!r}")

    steps = [entry["step"] for entry in entries]
    is_sorted = steps == sorted(set(steps))
    if not is_sorted or (steps and steps[-1] > schedule.total):
        differences.append(f"steps are not in order, or go on after step {schedule.total}")
    return differences


def means(log: list[dict], period: int = PERIOD) -> dict[int, float]:
    """Return the mean loss of each complete period of steps, by the last step of the period."""
    entries = with_loss(log)
    losses_of_period: dict[int, list[float]] = {}
    for entry in entries:
        last_step = -(-entry["step"] // period) * period
        losses_of_period.setdefault(last_step, []).append(entry["loss"])
    end = entries[-1]["step"] if entries else 0
    return {step: mean(losses) for step, losses in losses_of_period.items() if step <= end}


def plot(logs: list[tuple[Path, list[dict]]], output_path: Path) -> None:
    """Write a PNG with losses above learning rates.

    Losses are plotted as logged with a thin line, and as means with a thick one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    all_losses = []
    for number, (path, log) in enumerate(logs):
        entries = with_loss(log)
        color = f"C{number}"
        steps = [entry["step"] for entry in entries]
        losses = [entry["loss"] for entry in entries]
        rates = [entry["learning_rate"] for entry in entries]
        all_losses += losses
        above.plot(steps, losses, alpha=0.35, linewidth=0.8, color=color)
        smooth = means(log)
        if len(smooth) <= 1:
            smooth = dict(zip(steps, losses, strict=True))
        above.plot(list(smooth), list(smooth.values()), label=path.name, color=color)
        below.plot(steps, rates, color=color)

    # The first few losses are so high that they would flatten the rest: let them leave the axes.
    percentile_97 = sorted(all_losses)[int(0.97 * (len(all_losses) - 1))]
    above.set(ylabel="loss (nats per token)", ylim=(0, 1.3 * percentile_97))
    below.set(xlabel="step", ylabel="learning rate")
    above.legend(frameon=False)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=150)


def compare_expected(log: list[dict], expected: dict[int, float], tolerance: float) -> bool:
    """Print the logged losses next to the expected ones.

    Args:
        expected: losses by step.

    Returns:
        Whether every expected loss was logged and is within the tolerance.
    """
    found = {entry["step"]: entry["loss"] for entry in with_loss(log)}
    is_close = True
    for step, loss in expected.items():
        if step not in found:
            result = "not logged"
            is_close = False
        else:
            result = f"{found[step]:.4f}, off by {found[step] - loss:+.4f}"
            is_close &= abs(found[step] - loss) <= tolerance
        print(f"step {step}: expected {loss:.4f} +- {tolerance}, {result}")
    return is_close


def parse_expected(text: str) -> dict[int, float]:
    """Parse losses by step, such as `10:0.6383,20:0.6052`."""
    expected = {}
    for part in text.split(","):
        step, loss = part.split(":")
        expected[int(step)] = float(loss)
    return expected
