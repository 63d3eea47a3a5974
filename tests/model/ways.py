"""What test_ways.py runs on forked ranks: real modules, gloo, fp32."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_satformer.model.architectures import PLAIN
from megatron_satformer.model.norm import build_norm
from tests.model import ranks
from tests.model.ranks import BATCH, SEQUENCE, SHAPE, close

WAYS = {"architecture": "muddformer"}


class FusedNormLinear(ColumnParallelLinear):
    """A norm inside of a linear layer, under Transformer Engine's names."""

    def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        norm = build_norm(config=config, hidden_size=input_size, eps=config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, 1e-6)
        return super().forward(normed, *args)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def fused_norms_hold_the_same_checkpoint() -> None:
    """Keys and places; and with what one holds the other computes the same loss."""
    from megatron_satformer.model import specs

    ranks.start(_size())
    local = ranks.build(WAYS)
    adapt = specs._adapt

    def fuse(submodules, config):
        changed = adapt(submodules, config)
        changed.self_attention.submodules.linear_qkv = FusedNormLinear
        changed.input_layernorm = IdentityOp
        return changed

    specs._adapt = fuse
    fused = ranks.build(WAYS)
    specs._adapt = adapt
    ours = {(key, str(place)): data for key, place, data in ranks.entries(local, lambda p: p)}
    theirs = {(key, str(place)): data for key, place, data in ranks.entries(fused, lambda p: p)}
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, data in ours.items():
            data += 0.1 * torch.randn(data.shape, generator=generator)
            theirs[key].copy_(data)
        close("loss", ranks.mean_loss(fused), ranks.mean_loss(local))


def pieces_are_a_plain_linear_qkv(options: dict[str, Any]) -> None:
    """Their keys and places, and what they compute of one input."""
    ranks.start(_size())
    own = {"hetereogenous_dist_checkpoint": True} | options
    model, plain = ranks.build(WAYS | own), ranks.build({"architecture": PLAIN} | own)
    for layer, other in list(zip(model.decoder.layers, plain.decoder.layers, strict=True))[1:]:
        qkv, plain_qkv = layer.self_attention.linear_qkv, other.self_attention.linear_qkv
        entries = qkv.sharded_state_dict("qkv.").values()
        for name, parameter in plain_qkv.named_parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
            begin = torch.distributed.get_rank() * len(parameter)
            with torch.no_grad():
                for entry in (entry for entry in entries if entry.key == f"qkv.{name}"):
                    for piece in entry.build_fn(entry.key, entry.data, entry.replica_id, None):
                        first = piece.global_offset[0] - begin
                        piece.data.copy_(parameter[first : first + len(piece.data)])
        x = torch.randn(SEQUENCE, BATCH, SHAPE["hidden_size"])
        whole = qkv((x, x, x))[0]
        close("qkv", whole, plain_qkv(x)[0])
        queries_alone = qkv((x, x.flip(0), x.flip(0)))[0] == whole
        assert queries_alone.any()
        assert not queries_alone.all()


def _size() -> int:
    return ranks._world_size()
