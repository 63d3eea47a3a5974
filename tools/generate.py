"""Writes text with an exported Hugging Face folder, streaming it as it comes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.checkpoint.generate import Sampling, generate_text, load_folder
from megatron_satformer.data.cli import ToolParser, run_tool


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True, help="Folder made by to-hf.")
    parser.add_argument("--prompt", default="", help="Empty starts a new document.")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens)
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument(
        "--temperature", type=float, default=Sampling.temperature, help="0: greedy."
    )
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, help="0: all tokens.")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--seed", type=int, default=Sampling.seed)
    parser.add_argument("--device", default="cpu", help="A torch device, such as cuda.")
    return parser


def main() -> None:
    """Parses the flags, loads the folder and writes the samples."""
    args = vars(_parser().parse_args())
    model, tokenizer = load_folder(args.pop("load"), args.pop("device"))
    prompt, number = args.pop("prompt"), args.pop("num_samples")
    sampling = Sampling(**args)
    from transformers import TextStreamer

    for n in range(number):
        if number > 1:
            print(f"--- sample {n + 1} of {number}")
        print(prompt, end="", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate_text(model, tokenizer, prompt, sampling, n, streamer)


if __name__ == "__main__":
    run_tool(main)
