"""Programs that stand in for others on a PATH."""

from pathlib import Path


def write_command(path: Path, script: str) -> None:
    """Writes a shell script that can be run."""
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
