"""Plots the training loss of several stages, one after the other, into one PNG.

python -m train_scripts.quickstart.plot_loss --output_path loss.png exp/ltu/stage1_proj_cla ...
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltu.files import run_command
from ltu.training.loss_log import read_log, with_loss


def plot(folders: list[Path], output_path: Path) -> None:
    """Write a PNG of losses over steps, stage after stage. Held-out losses are dots.

    Args:
        folders: the runs, in the order of the stages.

    Raises:
        FileNotFoundError: a run has no log.
        ValueError: a log has no losses.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    start = 0
    for folder in folders:
        log = read_log(folder)
        training = with_loss(log)
        _draw(axes, training, "loss", start, "-", folder.name)
        held_out = [entry for entry in log if "eval_loss" in entry]
        _draw(axes, held_out, "eval_loss", start, "o", f"{folder.name}, held out")
        start += max((entry["step"] for entry in log), default=0)
        axes.axvline(start, color="0.8", linewidth=0.8)
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title="Training loss, stage after stage",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=150)


def _draw(axes: Axes, entries: list[dict], key: str, start: int, style: str, label: str) -> None:
    """Draw the values of a key over the steps from `start` on, if there are any."""
    if not entries:
        return
    steps = [start + entry["step"] for entry in entries]
    values = [entry[key] for entry in entries]
    axes.plot(steps, values, style, label=label)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="The --output_dir of each stage, in order."
    )
    parser.add_argument("--output_path", type=Path, required=True, help="The PNG that is written.")
    args = parser.parse_args(argv)
    plot(args.folders, args.output_path)
    print(f"Loss curve: {args.output_path}")


if __name__ == "__main__":
    run_command(main)
