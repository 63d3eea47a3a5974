"""The numbers of a run, and whether its model has learnt more than to count tokens.

python -m megatron_satformer.analysis.summary --model hf --log train.log --data-path PREFIX
    --split 95,5,0 --tokens-per-step 2048 --save summary.json
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from safetensors import safe_open

from megatron_satformer.analysis.losses import read_log
from megatron_satformer.analysis.unigram import unigram_entropy
from megatron_satformer.files.atomic import write_atomically


def count_parameters(folder: Path) -> int:
    """Returns the number of parameters in an exported folder, from its files' headers alone."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            shapes = (weights.get_slice(name).get_shape() for name in weights.keys())  # noqa: SIM118
            total += sum(map(math.prod, shapes))
    return total


def summarize_log(log: Path, tokens_per_step: int) -> dict[str, float]:
    """Returns tokens, speed, and the first and the last validation loss in nats per token.

    Args:
        log: What the run printed.
        tokens_per_step: Of the global batch.

    Raises:
        ValueError: If it tells of no training step or no validation.
    """
    with log.open(errors="replace") as lines:
        losses = read_log(lines)
    if not losses.train or not losses.valid:
        raise ValueError(f"log ({log}) must tell of a training step and of a validation.")
    milliseconds = statistics.median(losses.milliseconds.values())
    first, last = min(losses.valid), max(losses.valid)
    return {
        "train_tokens": max(losses.train) * tokens_per_step,
        "tokens_per_second": round(tokens_per_step / milliseconds * 1e3, 1),
        "first_val_loss": losses.valid[first],
        "first_val_step": first,
        "final_val_loss": losses.valid[last],
    }


def main() -> None:
    """Parses the flags, writes the numbers; exit code 1 if the model has not learnt enough."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="Exported folder.")
    parser.add_argument("--log", type=Path, required=True, help="What the run printed.")
    parser.add_argument("--data-path", required=True, help="Prefix of the data set.")
    parser.add_argument("--split", required=True, help="As in training; validation is read.")
    parser.add_argument("--vocab-size", type=int, required=True, help="As of the tokenizer.")
    parser.add_argument("--tokens-per-step", type=int, required=True, help="Of the global batch.")
    parser.add_argument("--min-gain", type=float, help="Nats that the model must have learnt.")
    parser.add_argument("--seconds", type=json.loads, default={}, help="JSON: step -> seconds.")
    parser.add_argument("--save", type=Path, required=True, help="JSON file to write.")
    args = parser.parse_args()
    entropy = unigram_entropy(args.data_path, args.split, args.vocab_size)
    numbers = {
        "parameters": count_parameters(args.model),
        **summarize_log(args.log, args.tokens_per_step),
        "unigram_entropy": entropy,
        "wall_seconds": args.seconds,
        "total_wall_seconds": round(sum(args.seconds.values()), 2),
    }
    write_atomically(args.save, (json.dumps(numbers, indent=2) + "\n").encode())
    final = numbers["final_val_loss"]
    gain = entropy - final
    if args.min_gain is not None and not gain >= args.min_gain:  # NaN is no gain
        sys.exit(
            f"error: the final validation loss ({final:.3f}) must be at least {args.min_gain} nats "
            f"below the unigram entropy ({entropy:.3f}); it is {gain:.3f} below. Look at the loss "
            "curve, and train longer (--train-iters)."
        )
    print(
        f"validation loss {final:.3f} nats per token, {gain:.3f} below what counting tokens gives "
        f"({entropy:.3f})"
    )


if __name__ == "__main__":
    main()
