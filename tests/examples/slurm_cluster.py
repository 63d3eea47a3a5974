"""SLURM on this machine alone: Debian's packages in a folder, its daemons on ports of their own.

Nothing is installed: the packages are unpacked, and every path that SLURM was built with is given
another by its configuration. Only what was started here is ended.
"""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.debian import unpack

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PATIENCE = 300.0
PR_SET_PDEATHSIG, LIBC = 1, ctypes.CDLL(None)
# A job that was queued again waits for its old credential to expire, five seconds at least; the
# scheduler looks every second; a job may outlive its limit: a slow machine has time to save.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
PluginDir={plugins}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
OverTimeLimit=10
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for[T](found: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """Returns the first answer that is not empty."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return answer


def _free_port() -> int:
    while True:
        port = random.SystemRandom().randrange(15_000, 20_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            return port


class Cluster:
    """One node that is this machine.

    Args:
        root: Folder for all of it; short, since a socket lies there.

    Attributes:
        environment: For its commands.

    Raises:
        OSError: if its packages cannot be had.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        system = root / "system"
        unpack(PACKAGES, system)
        (plugins,) = system.glob("usr/lib/*/slurm-wlm")
        libraries = [plugins, plugins.parent, system / "lib" / plugins.parent.name]
        values = {"host": socket.gethostname().partition(".")[0], "root": root, "plugins": plugins}
        values |= {"controller_port": _free_port(), "daemon_port": _free_port()}
        (root / "slurm.conf").write_text(CONFIGURATION.format(**values))
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PATH": f"{system}/usr/bin:{system}/usr/sbin:{os.environ['PATH']}",
        }
        for folder in ("state", "spool"):
            (root / folder).mkdir()
        key = root / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        self._daemons: list[subprocess.Popen[bytes]] = []
        sbin = system / "usr/sbin"
        munge = [
            f"--{name}={root}/munge.{name.partition('-')[0]}"
            for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ]
        self._start([sbin / "munged", "--foreground", "--force", *munge])
        wait_for((root / "munge.socket").exists, "munged")
        self._start([sbin / "slurmctld-wlm", "-D"])
        self._start([sbin / "slurmd-wlm", "-D", "-d", sbin / "slurmstepd-wlm"])
        wait_for(lambda: "idle" in self.ask("sinfo", "--noheader", "-o", "%T"), "the node")

    def _start(self, command: Sequence[object]) -> None:
        words = [*map(str, command)]
        with (self.root / f"{Path(words[0]).name}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    words,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
                )
            )

    def ask(self, *words: object) -> str:
        """What a command of SLURM prints; empty where it fails, as before the daemons are up."""
        result = subprocess.run(
            [*map(str, words)], env=self.environment, capture_output=True, text=True, timeout=60
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, folder: Path, *words: object, **environment: str) -> str:
        """Submits a job from a folder and returns its number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            env=self.environment | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol tells of a job, or of a task of an array."""
        words = self.ask("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """Ends all jobs, then the daemons, then what is left of either."""
        self.ask("scancel", "--user", "root")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.ask("squeue", "--noheader"), "the end of all jobs", 30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(30)
        mark = self.environment["SLURM_CONF"]
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("SLURM_CONF") == mark:
                with contextlib.suppress(psutil.Error):
                    process.kill()
