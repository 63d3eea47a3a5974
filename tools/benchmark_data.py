"""Times the data tools against Megatron-LM's own and against the bare tokenizer libraries."""

import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.benchmark.preprocessing import (
    Timing,
    check_same_output,
    preprocess_commands,
    repeat_corpus,
    run_timed,
    time_files,
    time_libraries,
)
from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.tokenizers.options import TokenizerOptions

MIB = 1 << 20


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a key text.")
    parser.add_argument("--tokenizer-type", required=True)
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--megatron", type=Path, help="A checkout of Megatron-LM to compare with.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="Runs of each command, in turn.")
    parser.add_argument("--skip-libraries", action="store_true")
    parser.add_argument(
        "--memory-gb",
        type=float,
        nargs="*",
        default=[],
        help="Sizes, in GB, of repeated input to report time and peak memory of.",
    )
    parser.add_argument(
        "--files", type=Path, metavar="PREFIX", help="Time merging and verifying this data set too."
    )
    parser.add_argument("--scratch", type=Path, help="Folder for the output; a temporary one.")
    return parser


def _row(timing: Timing, megabytes: float, baseline: float) -> None:
    print(
        f"{timing.name:28} {timing.median:8.2f} s  {min(timing.seconds):8.2f} min  "
        f"{megabytes / timing.median:8.1f} MB/s  {timing.peak_bytes / MIB:7.0f} MiB  "
        f"{baseline / timing.median:6.2f} x",
        flush=True,
    )


def _report_sizes(
    args: Namespace,
    commands: Mapping[str, tuple[list[str], Path]],
    out: Path,
    megabytes: float,
    library: Timing | None,
) -> None:
    """Time and memory at several sizes, and the speed between the smallest and the largest."""
    for name in ("ours, verify 0.01", "ours, verify 0"):
        done = []
        for gigabytes in args.memory_gb:
            large = out / "large.jsonl"
            repeat_corpus(args.input, large, int(gigabytes * 1e9))
            size = large.stat().st_size / 1e6
            command, _ = commands[name]
            timing = Timing(f"{name}, {gigabytes:g} GB")
            run_timed(timing, [str(large) if w == str(args.input) else w for w in command])
            _row(timing, size, timing.median)
            done.append((size, timing.median))
        if len(done) > 1:
            (small, soon), (large_size, late) = min(done), max(done)
            steady = (large_size - small) / (late - soon)
            share = f", {steady * library.median / megabytes:.0%} of the library" if library else ""
            print(f"{name}: steady state {steady:.1f} MB/s{share}", flush=True)


def _report_files(args: Namespace, out: Path) -> None:
    ends = ("bin", "idx")
    size = 2 * sum(Path(f"{args.files}.{end}").stat().st_size for end in ends) / 1e6
    found = time_files(args.files, out, args.repeat)
    for name, against in (("merge_datasets", "cp"), ("inspect_dataset --verify", "sha256sum")):
        print(f"{size:.1f} MB of data sets; the last column is the speed over {against}")
        for timing in (found[against], found[name]):
            _row(timing, size, found[against].median)


def main() -> None:
    """Parses the flags, runs everything in turn, and prints a table."""
    args = _parser().parse_args()
    if not args.input.is_file():
        raise ValueError(f"input ({args.input}) does not exist. Give a .jsonl file.")
    if args.megatron and not (args.megatron / "tools" / "preprocess_data.py").is_file():
        raise ValueError(
            f"megatron ({args.megatron}) has no tools/preprocess_data.py. Give a checkout."
        )
    flags = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model]
    out = Path(tempfile.mkdtemp(prefix="benchmark-data-", dir=args.scratch))
    try:
        commands = preprocess_commands(
            args.input,
            out,
            flags,
            args.workers,
            args.megatron,
            args.tokenizer_type == "HuggingFaceTokenizer",
        )
        timings = {name: Timing(name) for name in commands}
        for _ in range(args.repeat):
            for name, (command, _) in commands.items():
                run_timed(timings[name], command, args.megatron if "Megatron" in name else None)
        prefixes = [prefix for _, prefix in commands.values()]
        check_same_output(prefixes)
        megabytes = args.input.stat().st_size / 1e6
        print(f"{megabytes:.1f} MB, {args.workers} workers, whole process; all outputs are equal")
        baseline = timings.get("Megatron-LM", timings["ours, reference"])
        print(f"the last column is the speed over {baseline.name}")
        for timing in timings.values():
            _row(timing, megabytes, baseline.median)
        library = None
        if not args.skip_libraries:
            options = TokenizerOptions(args.tokenizer_type, args.tokenizer_model)
            for timing in time_libraries(args.input, options, args.workers):
                _row(timing, megabytes, baseline.median)
                library = library or timing
        _report_sizes(args, commands, out, megabytes, library)
        if args.files:
            _report_files(args, out)
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    run_tool(main)
