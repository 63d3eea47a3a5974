"""A user's mistake: one clear line, once, exit code 2, before any process group exists."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

EXIT_CODE = 2
_SPEAKER_HEAD_START = 20  # seconds


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the errors of argument handling into one printed line and exit code 2.

    AssertionError is included because that is what Megatron's own validation raises; one without a
    message is told by its source line.
    """
    try:
        yield
    except (ValueError, NotImplementedError, AssertionError, FileNotFoundError) as error:
        told = " ".join(str(error).split()) or _failed_line(error)
        _leave(f"{os.path.basename(sys.argv[0])}: error: {told}")
    except SystemExit as leaving:
        if leaving.code == EXIT_CODE:  # argparse has printed its line
            _leave("")
        raise


@contextlib.contextmanager
def only_rank_0_speaks() -> Iterator[None]:
    """Mute stderr on the other ranks; around argparse alone, which prints before it leaves."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere if _rank() else sys.stderr),
    ):
        yield


def _failed_line(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = os.path.basename(place.filename)
    return f"the options do not go together: `{place.line}` ({file}, line {place.lineno})"


def _leave(line: str) -> NoReturn:
    if _rank():
        # torchrun ends every rank as soon as one has failed: let rank 0 speak first.
        time.sleep(_SPEAKER_HEAD_START)
    elif line:
        print(line, file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
