"""What Megatron (0.19.2) needs mended to start from an installed wheel, on every device.

A wheel ships the compiled dataset helper and no Makefile; compile_helpers runs `make` there all the
same, which fails, and ends the run.
"""

from pathlib import Path

from megatron.core.datasets import utils


def activate() -> None:
    """Compile only where there is something to compile with; a second call changes nothing."""
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = _find_helper


def _find_helper() -> None:
    from megatron.core.datasets import helpers_cpp  # noqa: F401
