"""OpenAI servers of vLLM, for test_vllm.py: what takes most of a start is imported once.

Each line of stdin is a JSON list, a log file and a server's flags. It is answered with the id of
the process that serves, which leads a group of its own.
"""

import json
import os
import signal
import sys


def start(log: str, flags: list[str]) -> int:
    """Forks a server; in it, this never returns."""
    if pid := os.fork():
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv[1:] = flags
    main()
    sys.exit()


if __name__ == "__main__":  # engines and workers, which are spawned, import this file
    import vllm.v1.engine.async_llm  # noqa: F401

    # what `python -m vllm.entrypoints.openai.api_server` runs
    from vllm.entrypoints.launchers.api_server.entry import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended is gone
    for line in sys.stdin:
        log, *flags = json.loads(line)
        print(start(log, flags), flush=True)
