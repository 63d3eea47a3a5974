"""wandb's own package, offline: a run that starts again is the same run, and has the gates."""

import importlib.util
import json
import os
import struct
import sys

import pytest

from tests.small import PP2, SHAPE

if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed", allow_module_level=True)


BLOCK, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, kind


def read_records(content):
    """The records of wandb's file: LevelDB's log behind seven bytes of its own."""
    at, whole = 7, b""
    while at + HEADER.size <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        whole += content[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):  # all of it, or its end
            yield whole
            whole = b""


def read_history(file):
    """The rows that wandb has written, value by name."""
    from wandb.proto import wandb_internal_pb2

    for content in read_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def train(argv):
    import pretrain_satformer

    os.environ["WANDB_MODE"] = "offline"
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()


@pytest.mark.slow
def test_a_run_that_starts_again_is_one_run(zygote, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, *PP2.split(), "--save", tmp_path, "--load", tmp_path]
    flags += ["--save-interval", 2, "--wandb-project", "p", "--wandb-exp-name", "n"]
    flags += ["--log-gates-interval", 1, "--train-iters", 4, "--tensorboard-log-interval", 1]
    for further in (["--exit-interval", 2], []):
        argv = [*map(str, [*flags, *further])]
        run = zygote.run(2, call=f"{__name__}:train", args=[argv])
        assert run.codes == [0, 0], run.output[-6000:]
    files = sorted((tmp_path / "wandb").rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    run_id = (tmp_path / "wandb_run_id.txt").read_text()
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    steps = []
    for file in files:
        rows = [*read_history(file)]
        gates = [row["_step"] for row in rows if "alpha mean/layer 2" in row]
        assert gates == [row["_step"] for row in rows if "lm loss" in row]
        steps += gates
    assert steps == [1, 2, 3, 4]
