"""Converts checkpoints between Megatron, Hugging Face and others' layouts, on the CPU."""

import argparse
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_satformer.cli import DTYPES, ToolParser, run_tool

OURS = "Hugging Face folder"
THEIRS = "folder in the layout of the paper's own repository, or of an architecture's authors"


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_to_hf(commands)
    _add_from_hf(commands)
    for name, former, source, made in (
        ("from-paper", "from-reference", THEIRS, OURS),
        ("to-paper", "to-reference", OURS, THEIRS),
    ):
        command = commands.add_parser(
            name, aliases=[former], help=f"A {source} to a {made}, exactly."
        )
        command.set_defaults(command=name)
        _add_load_and_save(command, f"A {source}.")
        if name == "to-paper":
            _add_accept_qk_norm_eps(command)
    _add_inspect(commands)
    _add_compare(commands)
    return parser


def _add_load_and_save(command: argparse.ArgumentParser, source: str) -> None:
    command.add_argument("--load", type=Path, required=True, help=source)
    command.add_argument("--save", type=Path, required=True, help="Folder to make.")
    command.add_argument(
        "--overwrite", action="store_true", help="Replace an earlier output at --save."
    )


def _add_accept_qk_norm_eps(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--accept-qk-norm-eps",
        action="store_true",
        help="Convert a model whose QK-norm gets another epsilon: Megatron has one for all norms, "
        "the paper's repository 1e-5 for this one. The logits move.",
    )


def _add_to_hf(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "to-hf",
        help="A Megatron checkpoint to a Hugging Face folder.",
        description="Turns a Megatron checkpoint (torch_dist, any layout) into a folder that "
        "transformers loads: stock Llama or Qwen3 where that is exact, else with "
        "trust_remote_code=True.",
    )
    _add_load_and_save(command, "Folder given as --save in training, or one step's.")
    command.add_argument("--step", type=int, help="Iteration; default: the last one saved.")
    command.add_argument("--dtype", choices=DTYPES, help="Default: the one trained in.")
    command.add_argument(
        "--tokenizer",
        help="SentencePiece .model file, Hugging Face folder or tokenizer.json, folder of GPT-2's "
        "two files, TikToken vocabulary, or none. Default: the checkpoint's.",
    )
    command.add_argument("--max-shard-size", default="5GB", help="Of one safetensors file.")
    command.add_argument(
        "--verify",
        action="store_true",
        help="Run both models on 4 x 256 tokens and write the difference into the model card.",
    )


def _add_from_hf(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "from-hf",
        help="A Hugging Face folder to a Megatron checkpoint.",
        description="Turns an exported folder, or a Llama, Mistral, Qwen2 or Qwen3, into a "
        "checkpoint that pretrain_satformer.py --load --finetune continues at any layout.",
    )
    _add_load_and_save(command, "Folder with config.json and safetensors.")
    command.add_argument(
        "--architecture",
        help="What a plain model becomes, with zeros for what that adds: satformer, say. Its own "
        "options follow as in pretrain_satformer.py; its gates are tanh, since relu could not "
        "leave zero. Default: what it is.",
    )
    _add_accept_qk_norm_eps(command)
    command.add_argument("--dtype", choices=DTYPES, help="Default: the folder's.")
    command.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="Of the embedding's rows, on each tensor-parallel rank; as the flag of training.",
    )
    command.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="For that padding alone: the checkpoint fits any layout.",
    )


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("inspect", help="What a checkpoint or folder holds.")
    command.add_argument("checkpoint", type=Path, metavar="CKPT")
    command.add_argument("--step", type=int, help="Iteration; default: the last one saved.")
    command.add_argument("--json", action="store_true", help="Print JSON.")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="Logits of two models, Megatron or Hugging Face.",
        description="Exits with 1 if the largest difference is over --tolerance.",
    )
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument("--text", type=Path, help="Text file to read. Default: random tokens.")
    command.add_argument("--tolerance", type=float, default=1e-4, help="Of one logit, absolute.")
    command.add_argument("--sequences", type=int, default=4, help="Number of them.")
    command.add_argument(
        "--seq-length",
        type=int,
        help="Default: 256, or fewer where a model was made for fewer.",
    )
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="Both are run in.")
    command.add_argument("--seed", type=int, default=1234, help="Of the random tokens.")
    command.add_argument("--json", action="store_true", help="Print JSON.")


def _parse_own_options(
    parser: ToolParser, architecture: str | None, words: list[str]
) -> dict[str, Any]:
    """What the user gave of an architecture's own options."""
    if architecture is None:
        return {}
    from transformers import HfArgumentParser

    from megatron_satformer.model.architectures import find_architecture

    record = find_architecture(architecture)
    own_fields = [
        (option.name, option.type, field(default=option.default))
        for option in fields(record.options)
        if option.name in record.model_options
    ]
    options = make_dataclass("OwnOptions", own_fields)
    own = HfArgumentParser(options, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    own.error = parser.error
    for action in own._actions:
        action.default = argparse.SUPPRESS
    return vars(own.parse_args(words))


def main() -> int:
    """Parses the flags and calls the one function of the command."""
    parser = _parser()
    parsed, own = parser.parse_known_args()
    args = vars(parsed)
    command = args.pop("command")
    if own and not args.get("architecture"):
        parser.error(f"unrecognized arguments: {' '.join(own)}")
    as_json = args.pop("json", False)
    # each command imports what it needs: --help without torch
    if command == "to-hf":
        from megatron_satformer.checkpoint.convert.to_hf import export_to_hf

        print(export_to_hf(**args))
    elif command == "from-hf":
        from megatron_satformer.checkpoint.convert.from_hf import import_from_hf

        print(import_from_hf(**args, options=_parse_own_options(parser, args["architecture"], own)))
    elif command == "from-paper":
        from megatron_satformer.checkpoint.convert.paper_layout import convert_from_paper

        print(convert_from_paper(**args))
    elif command == "to-paper":
        from megatron_satformer.checkpoint.convert.paper_layout import convert_to_paper

        print(convert_to_paper(**args))
    elif command == "inspect":
        from megatron_satformer.checkpoint.compare.inspection import inspect_checkpoint

        report = inspect_checkpoint(**args)
        print(report.to_json() if as_json else report)
        return 1 if report.problems else 0
    else:
        from megatron_satformer.checkpoint.compare.logits import compare_models

        tolerance = args.pop("tolerance")
        comparison = compare_models(**args)
        print(comparison.to_json() if as_json else comparison)
        if not comparison.within(tolerance):
            print(f"error: not within --tolerance ({tolerance}).", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    run_tool(main)
