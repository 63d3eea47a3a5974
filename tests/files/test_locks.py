"""One process at a time, until it ends, however that is."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.files import locks
from megatron_satformer.files.atomic import AtomicFile, write_atomically
from megatron_satformer.files.locks import open_locked, try_lock

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from pathlib import Path
from megatron_satformer.files.atomic import AtomicFile
output = AtomicFile(Path(sys.argv[1]))
output.file.write(b"half of it")
output.file.flush()
print("writing", flush=True)
sys.stdin.read()
"""


def test_two_writers_do_not_mix_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    for _ in range(2):  # an attempt that failed has not let go of the other's lock
        with pytest.raises(ValueError, match=r"out\.bin is being written by another process \("):
            write_atomically(path, b"mine")
    assert (tmp_path / "out.bin.partial").read_bytes() == b"half of it"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert os.listdir(tmp_path) == ["out.bin.partial"]
    write_atomically(path, b"mine")
    assert os.listdir(tmp_path) == ["out.bin"]
    assert path.read_bytes() == b"mine"


def test_what_goes_between_open_and_lock_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = AtomicFile(tmp_path / "out.bin")

    def publish_first(descriptor: int) -> bool | None:
        first.seal()
        first.publish()
        return try_lock(descriptor)

    monkeypatch.setattr(locks, "try_lock", publish_first)
    with pytest.raises(ValueError, match="was finished by another process just now"):
        AtomicFile(tmp_path / "out.bin")
    assert os.listdir(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int, blocking: bool) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "lock_descriptor", fail)
    descriptor = open_locked(tmp_path, os.O_RDONLY, "busy")
    assert try_lock(descriptor) is None
    os.close(descriptor)
    write_atomically(tmp_path / "out.bin", b"content")
    assert os.listdir(tmp_path) == ["out.bin"]
