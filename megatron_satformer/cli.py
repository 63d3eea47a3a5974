"""A user's mistake: one clear line on stderr, once, exit code 2, whatever was started.

`run_tool` is for tools, `usage_errors` for the part of a launch on many ranks that reads arguments.
Both know a mistake by USER_ERRORS and leave by `_refuse`.
"""

import argparse
import contextlib
import inspect
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Literal, NoReturn, get_args, get_origin

EXIT_USER_ERROR = 2
# The first two carry a message written for the user; OSError is the machine's word (disk full,
# permission). Anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, NotImplementedError, OSError)
_SPEAKER_HEAD_START = 20  # seconds


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


def add_flags_of(
    group: argparse._ActionsContainer,
    target: Callable[..., object],
    *names: str,
    **further: dict[str, Any],
) -> None:
    """Adds flags that are parameters of a function, or fields of a dataclass, of the same names.

    Types and defaults are its own, the help is what its docstring says of each.

    Args:
        group: Parser or group of one.
        target: What the parsed arguments are for.
        names: The parameters, in the order of the help.
        further: By name, what `add_argument` is to get besides; "flags" if it has other names.
    """
    lines = inspect.cleandoc(target.__doc__ or "")
    told = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", lines, re.MULTILINE))
    parameters = inspect.signature(target).parameters
    for name in names:
        hint, default = parameters[name].annotation, parameters[name].default
        how: dict[str, Any] = {"help": " ".join(told[name].split()), "default": default}
        if default is inspect.Parameter.empty:
            how |= {"default": None, "required": True}
        # "int | None" is an int, "tuple[str, ...] | None" some words.
        kinds = {get_origin(kind) or kind: kind for kind in (hint, *get_args(hint))}
        if hint is bool:
            how["action"] = "store_false" if default else "store_true"
        elif Literal in kinds:
            how["choices"] = get_args(kinds[Literal])
        elif kinds.keys() & {tuple, Sequence}:
            how |= {"nargs": "+", "default": list(how["default"] or ()) or None}
        elif kinds.keys() & {int, float}:
            how["type"] = int if int in kinds else float
        how |= further.get(name, {})
        flags = how.pop("flags", (f"--{name.replace('_', '-')}",))
        group.add_argument(*flags, dest=name, **how)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns the errors of argument handling into one line and exit code 2, on every rank.

    AssertionError is one of them here, because that is what Megatron's own validation raises.
    """
    try:
        yield
    except (*USER_ERRORS, AssertionError) as error:
        _refuse(error)
    except SystemExit as leaving:
        if leaving.code == EXIT_USER_ERROR:  # argparse has printed its line
            _let_rank_0_speak()
        raise


@contextlib.contextmanager
def only_rank_0_speaks() -> Iterator[None]:
    """Mutes stderr on the other ranks; around argparse alone, which prints before it leaves."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere if _rank() else sys.stderr),
    ):
        yield


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Runs a tool's `main`; what that returns is the exit code.

    SIGTERM unwinds like ctrl-C, so that temporary files go.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`tool | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except USER_ERRORS as error:
        _refuse(error)
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)


def _refuse(error: Exception) -> NoReturn:
    if _rank():
        _let_rank_0_speak()
    else:
        told = " ".join(str(error).split()) or _failed_line(error)
        print(f"error: {told}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _failed_line(error: Exception) -> str:
    """What to tell of an assertion without a message."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = os.path.basename(place.filename)
    return f"the options do not go together: `{place.line}` ({file}, line {place.lineno})"


def _let_rank_0_speak() -> None:
    if _rank():
        # torchrun ends every rank as soon as one has failed.
        time.sleep(_SPEAKER_HEAD_START)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
