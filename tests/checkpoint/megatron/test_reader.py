"""Checkpoints are found by folder and step, and what is none is named."""

import pytest

from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from tests.checkpoint import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_steps(tmp_path):
    first, second = (checkpoints.build_reference(value_gate=gate) for gate in ("relu", "tanh"))
    checkpoints.write_checkpoint(tmp_path, first, step=10)
    checkpoints.write_checkpoint(tmp_path, second, step=20)
    assert open_checkpoint(tmp_path).args.value_gate == "tanh"
    assert open_checkpoint(tmp_path, 10).args.value_gate == "relu"
    assert open_checkpoint(tmp_path / "iter_0000010").step == 10
    with pytest.raises(ValueError, match=r"step \(15\).*\[10, 20\]"):
        open_checkpoint(tmp_path, 15)
    with pytest.raises(ValueError, match="one step's folder"):
        open_checkpoint(tmp_path / "iter_0000010", 20)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ValueError, match="no save was completed"):
        open_checkpoint(tmp_path)
    (tmp_path / "iter_0000020" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="torch_dist"):
        open_checkpoint(tmp_path, 20)
    with pytest.raises(ValueError, match="there is none"):
        open_checkpoint(tmp_path / "nothing")


def test_another_format_is_named(tmp_path):
    folder = tmp_path / "iter_0000020"
    (folder / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"format torch \(mp_rank_.*--ckpt-format torch_dist"):
        open_checkpoint(tmp_path, 20)
    (folder / "mp_rank_00").rmdir()
    (folder / ".metadata").touch()
    (folder / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    with pytest.raises(ValueError, match=r"format fsdp_dtensor.*--ckpt-format torch_dist"):
        open_checkpoint(tmp_path, 20)
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="and is none"):
        open_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").touch()
    with pytest.raises(ValueError, match="and is a Hugging Face folder"):
        open_checkpoint(tmp_path / "hf")
