"""Plots the training loss of several stages, one next to the other, into one PNG.

python -m train_scripts.quickstart.plot_loss --output_path loss.png exp/ltu/stage1_proj_cla ...
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ltu.files import run_command
from ltu.training.loss_log import read_log, with_loss

FIGURE_SIZE = (8, 4.5)  # Inches; at DPI, 1200 x 675 pixels.
DPI = 150
PADDING = 0.08  # Inches around the panels.
MIN_WIDTH = 0.16  # Of all steps: a stage with fewer is drawn wider, so that its name has room.
MIN_WINDOW = 5  # Logged losses that are averaged in a short stage; in a long one, a tenth of them.
TICK_STEPS = (1, 2, 5, 10)  # Ticks are at multiples of these, times a power of ten.
LOG_SCALE_FROM = 10  # Ratio of the largest loss to the smallest from which on the scale is log.


@dataclass
class Stage:
    """The losses of a stage.

    Args:
        name: of its folder.
        steps, losses: the logged ones.
        held_out_steps, held_out_losses: those of held-out examples, if there are any.
    """

    name: str
    steps: list[int]
    losses: list[float]
    held_out_steps: list[int]
    held_out_losses: list[float]

    @classmethod
    def read(cls, folder: Path) -> "Stage":
        """Read the log of a run.

        Raises:
            FileNotFoundError: the run has no log.
            ValueError: the log has no losses.
        """
        log = read_log(folder)
        training = with_loss(log)
        if not training:
            raise ValueError(f"The log in {folder} has no losses. Train the stage to its end.")
        held_out = [entry for entry in log if "eval_loss" in entry]
        return cls(
            name=folder.name,
            steps=[entry["step"] for entry in training],
            losses=[entry["loss"] for entry in training],
            held_out_steps=[entry["step"] for entry in held_out],
            held_out_losses=[entry["eval_loss"] for entry in held_out],
        )

    @property
    def num_steps(self) -> int:
        return max(self.steps + self.held_out_steps)

    @property
    def title(self) -> str:
        """The name, in two lines if it is one of a stage script: stage1, proj_cla."""
        return re.sub(r"^(stage\d+)_", r"\1\n", self.name)


def running_mean(values: list[float]) -> list[float]:
    """Average each value with its neighbours, of which there are fewer at both ends.

    With windows of 5 values: [1, 2, 6, 3, 3, 1] -> [3, 3, 3, 3, 3.25, 2.33]
    """
    window = max(MIN_WINDOW, len(values) // 10)
    reach = window // 2
    means = []
    for index in range(len(values)):
        means.append(mean(values[max(0, index - reach) : index + reach + 1]))
    return means


def plot(folders: list[Path], output_path: Path, model_name: str = "") -> None:
    """Write a PNG of losses over steps, stage after stage. Held-out losses are dots.

    Args:
        folders: the runs, in the order of the stages.
        output_path: the PNG.
        model_name: of the title.

    Raises:
        FileNotFoundError: a run has no log.
        ValueError: a log has no losses.
    """
    stages = [Stage.read(folder) for folder in folders]

    # The width of a stage is its number of steps, but never too small for its name.
    total = sum(stage.num_steps for stage in stages)
    widths = [max(stage.num_steps, MIN_WIDTH * total) for stage in stages]
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    figure.get_layout_engine().set(wspace=0, w_pad=PADDING, h_pad=PADDING)
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, stage, width in zip(panels, stages, widths, strict=True):
        _draw(axes, stage, num_ticks=max(2, round(8 * width / sum(widths))))
    scale = _scale_losses(panels[0], stages)

    title = "training loss of each stage"
    title = f"{model_name}: {title}" if model_name else title.capitalize()
    figure.suptitle(title, fontweight="bold")
    figure.supxlabel("optimizer steps in the stage", fontsize="medium")
    panels[0].set_ylabel(f"loss (nats per token{scale})")
    for axes in panels[1:]:
        axes.tick_params(axis="y", which="both", left=False)
    _draw_legend(panels[widths.index(max(widths))], any(stage.held_out_steps for stage in stages))
    output_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_path, dpi=DPI)


def _draw(axes: Axes, stage: Stage, num_ticks: int) -> None:
    """Draw the losses of a stage, with its name above."""
    axes.plot(stage.steps, stage.losses, color="C0", alpha=0.4, linewidth=0.8)
    axes.plot(stage.steps, running_mean(stage.losses), color="C0", linewidth=2.2)
    axes.plot(stage.held_out_steps, stage.held_out_losses, "o", color="C1", markersize=5)
    axes.set_title(stage.title, fontsize="medium")
    axes.set_xlim(0, stage.num_steps)
    # A label at the right end would touch the 0 of the next stage.
    locator = MaxNLocator(num_ticks, steps=TICK_STEPS, integer=True, prune="upper")
    axes.xaxis.set_major_locator(locator)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scale_losses(axes: Axes, stages: list[Stage]) -> str:
    """Set the scale of the losses, which the panels share, and return what the label says of it."""
    losses = []
    for stage in stages:
        losses += stage.losses + stage.held_out_losses
    if not max(losses) > LOG_SCALE_FROM * min(losses) > 0:
        axes.set_ylim(bottom=0)
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return ", log scale"


def _draw_legend(axes: Axes, has_held_out: bool) -> None:
    """Draw the legend in a panel, at the right, where losses are low."""
    logged, smooth, held_out = axes.get_lines()
    lines = [logged, smooth]
    names = ["as logged", "running mean"]
    if has_held_out:
        lines.append(held_out)
        names.append("held-out examples")
    axes.legend(lines, names, loc="upper right", fontsize="small", frameon=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="The --output_dir of each stage, in order."
    )
    parser.add_argument("--output_path", type=Path, required=True, help="The PNG that is written.")
    parser.add_argument("--model_name", default="", help="The name of the model, for the title.")
    args = parser.parse_args(argv)
    plot(args.folders, args.output_path, args.model_name)
    print(f"Loss curve: {args.output_path}")


if __name__ == "__main__":
    run_command(main)
