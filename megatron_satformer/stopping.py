"""Ends a run after the step that it is in, with a checkpoint: on a signal, or a file.

Megatron's --exit-signal-handler (0.19.2) does this for one signal (--exit-signal, SIGTERM): ranks
tell each other of it after every step. Here SIGUSR2, which batch systems send ahead of a time
limit, and a file count as well. Must not know: models, checkpoints.
"""

import contextlib
import ctypes
import os
import signal
from argparse import Namespace
from pathlib import Path
from types import FrameType
from typing import Any

from megatron.training import get_args, get_signal_handler

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def activate(args: Namespace) -> None:
    """Let Megatron's handler of one signal answer to all that end a run.

    Args:
        args: Validated; Megatron's handler is there.
    """
    if args.exit_signal_handler:
        _Stop(get_signal_handler(), args)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_torchrun()


def _end_with_torchrun() -> None:
    """SIGTERM to this rank when torchrun is gone: a signal it knows nothing of ends it alone."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


class _Stop:
    def __init__(self, handler: Any, args: Namespace) -> None:
        self.handler, self.first = handler, args.rank == 0
        self.trigger = Path(args.exit_trigger_file) if args.exit_trigger_file else None
        self.why = ""
        self._plain = handler.signals_received
        handler.signals_received = self.received
        for number in {*SIGNALS, args.exit_signal}:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.why = signal.Signals(number).name
        self.handler._signal_received = True

    def received(self) -> list[int]:
        """In place of DistributedSignalHandler's: called after every step, on all ranks."""
        # One rank looks: a file system in a network would be asked by thousands.
        if self.first and self.trigger is not None and self.trigger.exists():
            self.why = f"exit_trigger_file ({self.trigger})"
            self.handler._signal_received = True
            try:
                self.trigger.unlink()
            except OSError as error:  # alone on this rank it would leave the others waiting
                self.why += f", which is to be removed before the next start ({error.strerror})"
        received = self._plain()
        if self.first and any(received):
            args = get_args()
            why = self.why or f"a signal to rank {received.index(1)}"
            saves = f"saves to {args.save}" if args.save else "saves nothing, without --save"
            print(f"> stops after step {args.curr_iteration + 1}: {why}; {saves}", flush=True)
        return received
