"""Real text for tests, on every machine."""

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# The documentation and code of modules of the standard library.
MODULES = ("argparse", "ast", "datetime", "decimal", "difflib", "inspect", "locale", "typing")


def source_texts() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    names = [folder / f"{name}.py" for name in MODULES]
    return [path.read_text("utf-8") for path in names if path.exists()]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
