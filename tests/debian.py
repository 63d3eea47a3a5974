"""Debian's packages in a folder: nothing is installed."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def why_not() -> str | None:
    """What this machine lacks for it, or None."""
    if os.getuid() != 0:
        return "Debian's packages are downloaded as root"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "Debian's packages are wanted, and there is no apt-get here"
    return None


def unpack(packages: Sequence[str], folder: Path) -> None:
    """Puts packages, and those they need that are not installed, into a folder.

    Raises:
        OSError: if they cannot be had.
    """
    archives = folder.with_name(f"{folder.name}.archives")
    (archives / "partial").mkdir(parents=True)
    command = ["apt-get", "install", "--yes", "--reinstall", "--download-only"]
    command += ["--no-install-recommends", "-o", f"Dir::Cache::archives={archives}"]
    command += ["-o", "Debug::NoLocking=1", *packages]
    told = _run(command)
    if told:  # the lists of packages are old, or not there
        _run(["apt-get", "update"])
        told = _run(command)
    if told:
        raise OSError(f"apt-get cannot download {packages[0]}: {told}")
    for package in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    shutil.rmtree(archives)


def _run(command: Sequence[str]) -> str:
    """What a command says where it fails; else nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        return str(error)
    return f"status {result.returncode}, {result.stderr.strip()}" if result.returncode else ""
