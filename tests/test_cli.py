import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import pytest

from megatron_satformer import cli
from megatron_satformer.cli import ToolParser, add_flags_of, usage_errors


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, signal, sys\n"
        "from megatron_satformer.cli import ToolParser, run_tool\n"
        f"def main():\n    {body}\n"
        "run_tool(main)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("raise ValueError('x (1) must be 2.')", 2, "error: x (1) must be 2.\n"),
        ("raise NotImplementedError('not yet')", 2, "error: not yet\n"),
        ("open('/none/x')", 2, "error: [Errno 2] No such file or directory: '/none/x'\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "error: interrupted.\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ],
)
def test_exit_codes(body: str, code: int, stderr: str) -> None:
    result = run(body)
    assert (result.returncode, result.stderr) == (code, stderr)


def test_our_own_bugs_keep_their_traceback() -> None:
    result = run("raise KeyError('ours')")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_flag_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ToolParser(prog="tool")
    parser.add_argument("--workers", type=int)
    for args in (["--workers", "x"], ["--work", "1"], ["--nothing"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(args)
        assert end.value.code == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ")
        assert stderr.endswith("See tool --help.\n")
        assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("x (1) must be 2.\n   Use 2."), "error: x (1) must be 2. Use 2.\n"),
        (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: "),
        (AssertionError("Megatron's word"), "error: Megatron's word\n"),
        (AssertionError(), "error: the options do not go together: `raise error` (test_cli.py, "),
    ],
)
def test_bad_arguments_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, usage_errors():
        raise error
    stderr = capsys.readouterr().err
    assert end.value.code == 2
    assert stderr.startswith(line)
    assert stderr.count("\n") == 1


def test_flags_come_from_what_they_fill():
    def work(
        path: str,
        size: int | None = None,
        words: Sequence[str] = ("a",),
        kind: Literal["x", "y"] | None = None,
        keep: bool = True,
        dry: bool = False,
    ) -> None:
        """Works.

        Args:
            path: Where.
            size: How large; this line
                goes on.
            words: Which.
            kind: What.
            keep: Whether.
            dry: Whether not.
        """

    parser = ToolParser()
    names = ("path", "size", "words", "kind", "keep", "dry")
    add_flags_of(parser, work, *names, keep={"flags": ["--no-keep"]})
    assert vars(parser.parse_args(["--path", "p"])) == {
        "path": "p",
        "size": None,
        "words": ["a"],
        "kind": None,
        "keep": True,
        "dry": False,
    }
    given = ["--path", "p", "--size", "3", "--words", "b", "c", "--kind", "y", "--no-keep", "--dry"]
    assert list(vars(parser.parse_args(given)).values()) == ["p", 3, ["b", "c"], "y", False, True]
    assert "How large; this line goes on." in " ".join(parser.format_help().split())
    with pytest.raises(SystemExit):
        parser.parse_args(["--path", "p", "--kind", "z"])


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (["--worker", "1"], " The nearest to --worker is --workers."),
        (["--Max_Tokens=3"], " The nearest to --Max_Tokens is --max-tokens."),
        (["--zzz"], ""),
        (["word"], ""),
    ],
)
def test_a_flag_that_does_not_exist_names_the_nearest(given, nearest, capsys):
    parser = ToolParser(prog="tool")
    for flag in ("--workers", "--max-tokens"):
        parser.add_argument(flag)
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    told = f"error: unrecognized arguments: {' '.join(given)}.{nearest} See tool --help.\n"
    assert capsys.readouterr().err == told


def test_only_one_of_many_ranks_speaks_and_says_which(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_SPEAKER_HEAD_START", 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_PORT", f"{os.getpid()}-{time.time_ns()}")
    for rank in "321":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end, usage_errors():
            raise ValueError("x (1) must be 2.")
        assert end.value.code == 2
    assert capsys.readouterr().err == "error: x (1) must be 2. (met by rank 3)\n"


SCRIPT = """
import os, time
from megatron_satformer import cli
cli._SPEAKER_HEAD_START = 0.5
with cli.usage_errors():
    if os.environ["RANK"] == {rank!r}:
        raise ValueError("x (1) must be 2.")
    time.sleep(60)
"""


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_torchruns_summary_shows_the_line_as_the_root_cause(tmp_path, rank):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(rank=rank))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command = [*launch, "127.0.0.1", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    ).stderr
    cause = told.partition("Root Cause (first observed failure):")[2]
    assert f"rank      : {rank}" in cause
    assert "error: x (1) must be 2." in cause
    assert "To enable traceback" not in told
    met = " (met by rank 1)" if rank == "1" else ""
    assert told.count(f"error: x (1) must be 2.{met}\n") == (2 if not met else 1)


def test_no_error_file_is_no_further_error(monkeypatch, capsys):
    monkeypatch.setenv(cli.ERROR_FILE, "/nowhere/error.json")
    with pytest.raises(SystemExit), usage_errors():
        raise ValueError("x (1) must be 2.")
    assert capsys.readouterr().err == "error: x (1) must be 2.\n"


def test_the_error_file_has_torchs_form(monkeypatch, tmp_path):
    monkeypatch.setenv(cli.ERROR_FILE, str(tmp_path / "error.json"))
    with pytest.raises(SystemExit), usage_errors():
        raise ValueError("x (1) must be 2.")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == message["message"] == "error: x (1) must be 2."
