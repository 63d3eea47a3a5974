"""How a command-line tool reports a user's mistake: one line on stderr, exit code 2."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

EXIT_USER_ERROR = 2


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to the help, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is not None and action.default is not False
        return super()._get_help_string(action) if told else action.help


class ToolParser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations, whose errors are one line."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Prints `message` and where the flags are listed, then exits with code 2."""
        print(f"error: {message}. See {self.prog} --help.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Runs a tool's `main` and turns what a user can put right into one line.

    ValueError and NotImplementedError carry a message written for the user; OSError is the
    machine's word (disk full, permission). Anything else is our bug and keeps its traceback.
    SIGTERM unwinds like ctrl-C, so that temporary files go. What `main` returns is the exit code.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
        sys.stdout.flush()
    except (ValueError, NotImplementedError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output went away (`tool | head`): nothing is left to say.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
