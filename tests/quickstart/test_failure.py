import pytest

from megatron_satformer.quickstart import failure
from megatron_satformer.quickstart.failure import explain_failure

TORCHRUN = """W1122 api.py:1028] Sending process 24670 closing signal SIGTERM
E1122 api.py:1002] failed (exitcode: {code}) local_rank: 1 (pid: 24671) of binary: python3.12
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  exitcode  : {code} (pid: 24670)
  traceback : {trace}
"""


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (
            "[rank1]: Traceback (most recent call last):\n[rank1]: TypeError: the first\n"
            "[rank0]: RuntimeError: gloo lost its peer\n" + TORCHRUN.format(code=1, trace="none"),
            1,
            "TypeError: the first",
        ),
        ("error: 3 pieces are too few.\n", 2, "error: 3 pieces are too few."),
        ("usage: x\nx.py: error: unknown flag --y\n", 2, "x.py: error: unknown flag --y"),
        ("ValueError: of an earlier try\n$ again\nquiet\n", 3, "train.py ended with exit code 3."),
        (
            "[rank0]: RuntimeError: gloo lost its peer\n"
            + TORCHRUN.format(code=-15, trace="Signal 15 (SIGTERM) received by PID 24670")
            + TORCHRUN.format(code=-9, trace="Signal 9 (SIGKILL) received by PID 24671"),
            1,
            "train.py was ended by SIGKILL, perhaps because memory ran out.",
        ),
        ("", -11, "train.py was ended by SIGSEGV."),
    ],
)
def test_the_reason_is_found(tmp_path, log, code, reason):
    path = tmp_path / "log"
    path.write_text(log)
    assert explain_failure(["python", "/a/train.py", "--x"], code, path)[0] == reason


def test_the_excerpt_ends_with_the_cause(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f"line {n}\n" for n in range(50)) + "OSError: full\nand\nmore\n")
    _, excerpt, _ = explain_failure(["python", "x.py"], 1, path)
    assert len(excerpt) == failure.EXCERPT_LINES
    assert excerpt[-2:] == ["line 49", "OSError: full"]
