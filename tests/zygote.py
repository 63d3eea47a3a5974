"""A process that has imported torch and Megatron once and forks the ranks of every test.

Says when it is ready. Then reads one JSON job per line from stdin, {"ranks", "call" or "argv",
"log", "port"}, and answers each with one line, the list of exit codes. Computes nothing itself, so
that forking stays safe. Where an import has started CUDA, which does not survive a fork, ranks
import for themselves.
"""

import ast
import contextlib
import functools
import gc
import importlib
import inspect
import json
import math
import multiprocessing.managers
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

# The slow imports, once.
import megatron.core.tokenizers.text.text_tokenizer  # noqa: F401
import torch
import torch.utils.tensorboard
import transformers.configuration_utils  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training.global_vars import get_tensorboard_writer

import pretrain_satformer
import tests.architectures  # noqa: F401  # one more in the table
from megatron_satformer import arguments

GRACE = 30
SCRIPT = __file__
# Megatron reads and parses its own source for the help texts at every parse.
inspect.getsource = functools.cache(inspect.getsource)
ast.parse = functools.cache(ast.parse)
JOB = sys.argv[1:]
sys.argv[1:] = []
arguments.preview_arguments()


def _serve() -> None:
    forking = _cuda_survives_a_fork()
    queues = _start_queues()
    gc.freeze()  # a collection, of which every save makes two, passes over what is imported
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        children = [_fork(rank, job, forking, queues) for rank in range(job["ranks"])]
        codes = _wait(children)
        print(json.dumps([codes[pid] for pid in children]), flush=True)


def _wait(children: list[int]) -> dict[int, int | None]:
    """Exit codes by process; once a rank has failed, the others have GRACE seconds to end too."""
    codes: dict[int, int | None] = dict.fromkeys(children)
    deadline = None
    while None in codes.values():
        pid, status = os.waitpid(-1, os.WNOHANG if deadline else 0)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] and deadline is None:
                deadline = time.monotonic() + GRACE
        elif time.monotonic() > deadline:
            # they would wait ten minutes for it
            for child in (child for child, code in codes.items() if code is None):
                os.kill(child, signal.SIGKILL)
            deadline = math.inf
        else:
            time.sleep(0.02)
    return codes


def _cuda_survives_a_fork() -> bool:
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    works = not os.path.exists("/dev/nvidiactl")
    with contextlib.suppress(RuntimeError):
        works = works or torch.zeros(1, device="cuda").item() == 0
    os._exit(not works)


def _start_queues() -> multiprocessing.managers.SyncManager:
    """The process through which Megatron's saves hand their results, with its imports made.

    Each rank would start one for its first save, and wait until that has imported torch.
    """
    queues = multiprocessing.get_context("spawn").Manager()
    queues.Queue().put(filesystem_async.WriteResult)
    return queues


def _fork(rank: int, job: dict, forking: bool, queues: multiprocessing.managers.SyncManager) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job["ranks"]),
        "LOCAL_WORLD_SIZE": str(job["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job["port"]),
    }
    if not forking:
        os.execv(sys.executable, [sys.executable, "-W", "ignore", SCRIPT, json.dumps(job)])
    pretrain_satformer._PROGRAM_START_TIME = time.time()  # --exit-duration-in-mins counts from it
    filesystem_async._results_queue = queues.Queue()
    multiprocessing.process._children.clear()  # theirs is no child of this one
    return _run(job)


def _run(job: dict) -> NoReturn:
    try:
        if "argv" in job:
            sys.argv = ["pretrain_satformer.py", *job["argv"]]
            pretrain_satformer.main()
        else:
            module, function = job["call"].split(":")
            getattr(importlib.import_module(module), function)(*job["args"])
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    for thread in threading.enumerate():  # as the interpreter does: old steps are being removed
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    multiprocessing.util._exit_function()  # ends what Megatron's save has started
    os._exit(code)  # tearing down a process this large takes two seconds


if __name__ == "__main__":
    del __file__  # or every save would import this script again, in a helper process
    if JOB:
        _run(json.loads(JOB[0]))
    _serve()
