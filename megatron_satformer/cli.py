"""A user's mistake: one clear line on stderr, once, exit code 2, whatever was started.

`run_tool` is for tools, `usage_errors` for the part of a launch on many ranks that reads arguments.
Both know a mistake by USER_ERRORS and leave by `_refuse`, which also leaves the line where torchrun
looks for the cause of its failure.
"""

import argparse
import contextlib
import difflib
import inspect
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args, get_origin

EXIT_USER_ERROR = 2
DTYPES = ("bf16", "fp16", "fp32")  # of --dtype
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun reads why a rank has failed
# The first two carry a message written for the user; OSError is the machine's word (disk full,
# permission). Anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, NotImplementedError, OSError)
_SPEAKER_HEAD_START = 20  # seconds
_SAME_LAUNCH = 300  # seconds within which a parent's number and a port are not another launch's


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
        print(f"error: {describe_flag_error(self, message)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def describe_flag_error(parser: argparse.ArgumentParser, message: str) -> str:
    """What is wrong with a command line, in one line; of an unknown flag, which one is nearest.

    Args:
        parser: That found it.
        message: What argparse says of it.
    """
    head, _, words = message.partition("unrecognized arguments: ")
    nearest = []
    for word in words.split() if not head else ():
        flag = word.partition("=")[0]
        spelt = flag.lower().replace("_", "-")
        known = {known.lower().replace("_", "-"): known for known in parser._option_string_actions}
        found = difflib.get_close_matches(spelt, known, 1) if flag.startswith("--") else []
        nearest += [f"The nearest to {flag} is {known[found[0]]}."] if found else []
    return " ".join([f"{message}.", *nearest, f"See {parser.prog} --help."])


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


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `analysis.generate.load_model` takes: load, step, tokenizer, dtype, device."""
    add = parser.add_argument
    add(
        "--load",
        type=Path,
        required=True,
        help="Megatron checkpoint of any layout (what --save named in training, or one step's "
        "folder), or Hugging Face folder: an export, a Llama, a Qwen3. Its code is run.",
    )
    add("--step", type=int, help="Iteration of a checkpoint; default: the last one saved.")
    add("--tokenizer", help="File or folder; default: the model's own.")
    add("--dtype", choices=DTYPES, help="Default: the one saved.")
    add("--device", default="cpu", help="A torch device, such as cuda.")


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns the errors of argument handling into one line and exit code 2, on every rank.

    AssertionError is one of them here, because that is what Megatron's own validation raises.
    """
    try:
        yield
    except (*USER_ERRORS, AssertionError) as error:
        _refuse(error)


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
    told = " ".join(str(error).split()) or _failed_line(error)
    if _rank():
        _await_rank_0()
    leave_cause(f"error: {told}")
    if _is_first_to_speak():
        met = f" (met by rank {_rank()})" if _rank() else ""
        print(f"error: {told}{met}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def leave_cause(told: str) -> None:
    """Leaves a line where torchrun looks for the cause of its failure; without torchrun, nowhere.

    Args:
        told: Why this rank leaves.
    """
    file = os.environ.get(ERROR_FILE)
    if not file:
        return
    # The form that torch.distributed.elastic's ErrorHandler writes; its summary shows the stack.
    extra = {"py_callstack": told, "timestamp": str(int(time.time()))}
    content = {"message": {"message": told, "extraInfo": extra}}
    with contextlib.suppress(OSError), open(file, "w") as stream:
        json.dump(content, stream)


def _await_rank_0() -> None:
    """Returns when a rank has told its error, or when rank 0 must have met it by now.

    Where another machine holds rank 0, torchrun ends this rank first.
    """
    deadline = time.monotonic() + _SPEAKER_HEAD_START
    while time.monotonic() < deadline and not _has_been_told():
        time.sleep(0.05)


def _has_been_told() -> bool:
    with contextlib.suppress(OSError):
        return time.time() - os.stat(_told_file()).st_mtime < _SAME_LAUNCH
    return False


def _is_first_to_speak() -> bool:
    """Whether no other rank of this launch on this machine has told its error; rank 0 always is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        os.close(os.open(_told_file(), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if _has_been_told():
            return _rank() == 0
        os.utime(_told_file())
    except OSError:  # a second line is better than none
        pass
    return True


def _told_file() -> str:
    launch = f"satformer-{os.getuid()}-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
    return os.path.join(tempfile.gettempdir(), f"{launch}.told")


def _failed_line(error: Exception) -> str:
    """What to tell of an assertion without a message."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = os.path.basename(place.filename)
    return f"the options do not go together: `{place.line}` ({file}, line {place.lineno})"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
