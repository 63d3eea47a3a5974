"""Writes text with a Megatron checkpoint or a Hugging Face folder, streaming it as it comes."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_model_flags, run_tool


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--prompt", default="", help="Empty starts a new document.")
    add("--max-new-tokens", type=int, default=100)
    add("--num-samples", type=int, default=1)
    add("--temperature", type=float, default=0.8, help="0: greedy.")
    add("--top-k", type=int, default=0, help="0: all tokens.")
    add("--top-p", type=float, default=0.95)
    add("--seed", type=int, default=1234, help="Of the first sample; each further one adds 1.")
    return parser


def main() -> None:
    """Parses the flags, loads the model and writes the samples."""
    args = vars(_parser().parse_args())
    prompt, number = args.pop("prompt"), args.pop("num_samples")
    if number < 1:
        raise ValueError(f"num_samples ({number}) must be at least 1.")
    # --help and mistakes of the command line do not wait for torch
    from megatron_satformer.analysis.generate import (
        Sampling,
        TextStream,
        encode_prompt,
        generate_text,
        load_model,
    )

    source = {name: args.pop(name) for name in ("load", "step", "tokenizer", "dtype", "device")}
    sampling = Sampling(**args)
    model, tokenizer = load_model(**source)
    encode_prompt(model, tokenizer, prompt, sampling.max_new_tokens)  # before anything is printed
    write = partial(print, end="", flush=True)
    try:
        for n in range(number):
            if number > 1:
                print(f"--- sample {n + 1} of {number}")
            write(prompt)
            generate_text(model, tokenizer, prompt, sampling, n, TextStream(tokenizer, write))
            print()
    except KeyboardInterrupt:
        print()
        raise


if __name__ == "__main__":
    run_tool(main)
