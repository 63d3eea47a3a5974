#!/usr/bin/env python3
"""Tells what works on this machine, and what to install or change, a line each.

python tools/doctor.py --folder /runs

Ends with 1 if something fails that training needs; what is only optional or slow is a note.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_flags_of, run_tool
from megatron_satformer.machine.checks import check_machine


def main() -> int:
    """Checks, prints as it goes, counts."""
    parser = ToolParser(description=__doc__.splitlines()[0])
    where = {"default": ".", "required": False}
    add_flags_of(parser, check_machine, "folder", "megabytes", folder=where)
    args = parser.parse_args()
    if not Path(args.folder).is_dir():
        raise ValueError(f"folder ({args.folder}) must be a folder that exists. Make it first.")
    if args.megabytes < 1:
        raise ValueError(f"megabytes ({args.megabytes}) must be at least 1. Give more.")
    states: Counter[str] = Counter()
    for finding in check_machine(**vars(args)):
        print(finding, flush=True)
        states[finding.state] += 1
    print(f"{states['ok']} ok, {states['note']} to note, {states['FAIL']} failed")
    return int(states["FAIL"] > 0)


if __name__ == "__main__":
    run_tool(main)
