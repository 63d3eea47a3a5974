"""Picture of a run: the loss curves.

python -m megatron_satformer.analysis.plots --tensorboard-dir DIR --save FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from megatron_satformer.analysis.losses import Losses, read_losses
from megatron_satformer.analysis.unigram import unigram_entropy

DOTS_PER_INCH = 120
TRAIN_COLOR, VALID_COLOR, LINE_COLOR = "#8fb3d9", "#b5402a", "#666666"


def plot_losses(
    path: Path,
    losses: Losses,
    unigram_entropy: float | None = None,
    tokens_per_step: int | None = None,
) -> None:
    """Draws loss over steps, training and validation.

    Args:
        path: PNG file to write.
        losses: Nats per token.
        unigram_entropy: Nats per token, drawn as a line to compare with.
        tokens_per_step: For a second axis on top, in tokens.

    Raises:
        ValueError: If there is no training step to draw.
    """
    if not losses.train:
        raise ValueError("losses must have a training step; the event files and the log have none.")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(*_points(losses.train), color=TRAIN_COLOR, linewidth=1.2, label="training")
    if losses.valid:
        steps, values = _points(losses.valid)
        axes.plot(steps, values, color=VALID_COLOR, marker="o", markersize=5, label="validation")
        axes.annotate(
            f"{values[-1]:.2f}",
            (steps[-1], values[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=VALID_COLOR,
        )
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy,
            color=LINE_COLOR,
            linestyle="--",
            linewidth=1,
            label=f"unigram entropy of the validation text, {unigram_entropy:.2f}",
        )
    axes.set_xlabel("training step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    if tokens_per_step is not None:
        thousand = tokens_per_step / 1e3
        top = axes.secondary_xaxis(
            "top", functions=(lambda x: x * thousand, lambda x: x / thousand)
        )
        top.set_xlabel("training tokens (thousands)")
    _save(figure, path)


def _points(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def main() -> None:
    """Parses the flags and draws loss.png."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tensorboard-dir", type=Path, required=True, help="As in training.")
    parser.add_argument("--log", type=Path, help="What the run printed, for steps it lost.")
    parser.add_argument("--data-path", help="Prefix of the data set, to compare with counting.")
    parser.add_argument("--split", help="As in training.")
    parser.add_argument("--vocab-size", type=int, help="As of the tokenizer.")
    parser.add_argument("--tokens-per-step", type=int, help="For an axis in tokens.")
    parser.add_argument("--save", type=Path, required=True, help="Folder of the PNG file.")
    args = parser.parse_args()
    losses = read_losses(args.tensorboard_dir, args.log)
    entropy = None
    if args.data_path is not None:
        entropy = unigram_entropy(args.data_path, args.split, args.vocab_size)
    plot_losses(args.save / "loss.png", losses, entropy, args.tokens_per_step)
    print(f"loss.png ({len(losses.train)} steps, {len(losses.valid)} validations)")


if __name__ == "__main__":
    main()
