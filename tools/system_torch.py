"""Build on a Python that already has torch (`make quickstart VENV=system`), for install.sh.

check DIR        the running Python has a torch to keep (one line), or why not (exit code 1)
link DIR         let the environment DIR use the running Python's packages
constraints FILE print FILE without the packages that are there already, and pin torch's stack
"""

import argparse
import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

# Compiled against each other: replacing one of them breaks the container's build.
KEPT = re.compile(
    r"(torch|triton|pytorch-triton|nvidia-.*|cuda-.*|transformer-engine.*|apex|flash-attn)$"
)


def check(venv_dir: Path) -> None:
    """Print what would be kept; exit with the reason when this Python does not fit."""
    if sys.version_info[:2] not in ((3, 12), (3, 13)):
        sys.exit(f"it is Python {sys.version_info[0]}.{sys.version_info[1]}")
    if Path(sys.prefix).resolve() == venv_dir.resolve():
        sys.exit(f"it is {venv_dir} itself")
    try:
        import torch
    except Exception as error:  # a broken build may raise anything
        sys.exit(f"import torch says {error!r}")
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or (int(release[1]), int(release[2])) < (2, 6):
        sys.exit(f"it has torch {torch.__version__}")
    cuda = torch.version.cuda or "none"
    print(f"keeping torch {torch.__version__} (CUDA {cuda}) of {sys.executable}")


def link(venv_dir: Path) -> None:
    """Give the environment this Python's packages, and a torchrun of its own.

    `--system-site-packages` shows only the packages of the base interpreter; and the torchrun that
    came with torch starts the system's Python, which does not see what the environment adds.
    """
    if sys.prefix != sys.base_prefix:
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        target = venv_dir / "lib" / version / "site-packages" / "satformer_system.pth"
        # addsitedir also reads the .pth files there, which editable installs are made of.
        lines = (f"import site; site.addsitedir({path!r})\n" for path in sorted(paths))
        target.write_text("".join(lines))
    torchrun = venv_dir / "bin" / "torchrun"
    python = venv_dir.absolute() / "bin" / "python"
    torchrun.write_text(f"#!{python}\nfrom torch.distributed.run import main\n\nmain()\n")
    torchrun.chmod(0o755)


def constraints(pins: Path) -> None:
    """Print the pins for what is missing, and the installed versions of what must stay."""
    have = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in distributions()}
    for name, version in sorted(have.items()):
        if KEPT.match(name):
            print(f"{name}=={version}")
    for line in pins.read_text().splitlines():
        name = re.sub(r"[-_.]+", "-", line.partition("==")[0]).strip().lower()
        if "==" in line and not line.startswith("#") and name not in have:
            print(line)


def main() -> None:
    """Parse the command line and run one of the three jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("job", choices=["check", "link", "constraints"])
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    {"check": check, "link": link, "constraints": constraints}[args.job](args.path)


if __name__ == "__main__":
    main()
