"""metrics.jsonl: a JSON object a line, with a step and a split; no step of a split twice."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_satformer.files.atomic import write_atomically

# What is evaluated once, behind the last step: a longer run does it again.
_LAST = ("final validation", "test")


class MetricsFile:
    """Appends the objects of a run.

    Args:
        path: The file. Objects of steps that this run trains again are removed from it, and a
            line that a kill has cut off.
        start: The step of the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [record for record in read_metrics(path) if _stays(record, start)]
            write_atomically(path, b"".join(map(_line, kept)))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one object, in one write; what JSON has no number for becomes null."""
        with self.path.open("ab", buffering=0) as file:
            file.write(_line(record))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a metrics.jsonl; a last line that a kill has cut off is left out.

    Raises:
        ValueError: If another line is no object with a step and a split.
    """
    records = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"], record["split"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(
                f"{path} line {number} must be an object with a step and a split, as training "
                "writes them. Remove the line, or the file."
            ) from None
        records.append(record)
    return records


def _stays(record: dict[str, Any], start: int) -> bool:
    again = record["split"].startswith(_LAST)
    return record["step"] < start or (record["step"] == start and not again)


def _line(record: dict[str, Any]) -> bytes:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return (json.dumps(finite) + "\n").encode()
