"""Writes text with a Megatron checkpoint or a Hugging Face folder, streaming it as it comes."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool

DTYPES = ("bf16", "fp16", "fp32")


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add(
        "--load",
        type=Path,
        required=True,
        help="Megatron checkpoint (what --save named in training, or one step's folder), or "
        "Hugging Face folder: an export, a Llama, a Qwen3. Code that the folder holds is run.",
    )
    add("--step", type=int, help="Iteration of a checkpoint; default: the last one saved.")
    add("--tokenizer", help="File or folder; default: the model's own.")
    add("--dtype", choices=DTYPES, help="Default: the one saved.")
    add("--prompt", default="", help="Empty starts a new document.")
    add("--max-new-tokens", type=int, default=100)
    add("--num-samples", type=int, default=1)
    add("--temperature", type=float, default=0.8, help="0: greedy.")
    add("--top-k", type=int, default=0, help="0: all tokens.")
    add("--top-p", type=float, default=0.95)
    add("--seed", type=int, default=1234, help="Of the first sample; each further one adds 1.")
    add("--device", default="cpu", help="A torch device, such as cuda.")
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
