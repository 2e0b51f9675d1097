"""Draw the training loss of several stages, one after the other, into one PNG.

python -m train_scripts.plot_loss --output_path exp/ltu/loss.png exp/ltu/stage1_proj_cla exp/ltu/stage2_all_cla
"""

import argparse
from pathlib import Path

from ltu.training.loss_log import read_log, with_loss


def plot(folders: list[Path], output_path: Path) -> None:
    """Write the PNG: loss over steps, the stages side by side, held-out loss as dots where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    start = 0
    for folder in folders:
        log = read_log(folder)
        train = [(start + entry["step"], entry["loss"]) for entry in with_loss(log)]
        held_out = [
            (start + entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry
        ]
        if train:
            axes.plot(*zip(*train, strict=True), label=folder.name)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", label=f"{folder.name}, held out")
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="the --output_dir of each stage, in order"
    )
    parser.add_argument("--output_path", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        plot(args.folders, args.output_path)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"Loss curve: {args.output_path}")


if __name__ == "__main__":
    main()
