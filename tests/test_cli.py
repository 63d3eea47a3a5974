import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import pytest

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
