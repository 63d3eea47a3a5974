"""What test_tools.py runs on two forked ranks (see tests/zygote.py)."""

import json
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from megatron_satformer.checkpoint.hugging_face.code import model_class


def check(folder: str, architecture: str, losses: list[float]) -> None:
    """A bf16 model, sharded by torch and by transformers, trains as it does whole."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    cls, ids = model_class(architecture), torch.load(f"{folder}/ids")
    by_torch = cls.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in by_torch.model.layers:
        fully_shard(layer)
    fully_shard(by_torch)
    sharding = DistributedConfig(fsdp_size=2)
    by_transformers = cls.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=sharding)
    for model in (by_torch, by_transformers):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert all(hasattr(p, "placements") for p in model.parameters()), "sharded"
        found = train(model, ids)
        torch.testing.assert_close(found, losses, rtol=1e-2, atol=0.0)
    by_transformers.save_pretrained(f"{folder}/again")
    torch.distributed.barrier()
    config = json.loads(Path(f"{folder}/again/config.json").read_text())
    assert config["auto_map"] == cls.build_auto_map()
    code = {path.name for path in Path(f"{folder}/again").glob("*.py")}
    assert code == {path.name for path in Path(folder).glob("*.py")}, "ours, and none of torch's"


def train(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    """Losses of a few steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(3):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
