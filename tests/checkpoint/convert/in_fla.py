"""Logits of a folder by flash-linear-attention's own class, for test_paper_layout.py.

    python in_fla.py FOLDER IDS LOGITS

Its kernels need a GPU: where it has a plain form of its own beside one, that is what runs here;
torch's stands in for the others.
"""

import sys
from typing import Any

import torch
from fla.layers import attn
from fla.models import TransformerForCausalLM
from fla.models.transformer import modeling_transformer
from fla.modules import RMSNorm, mlp
from fla.modules.rotary import ops as rotary
from fla.ops.attnres.naive import naive_attnres
from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple) -> Tensor:
    """Of [b, s, heads, hn], causal, no window."""
    assert causal
    assert window_size == (-1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """All of x [b, s, heads, hn], from position 0."""
    return rotary.rotary_embedding_ref(x, cos[: x.size(1)], sin[: x.size(1)])


def main(folder: str, ids: str, target: str) -> None:
    """Reads ids [b, s], writes logits [b, s, vocab]; every tensor has to have its place."""
    attn.flash_attn_func = attention
    rotary.rotary_embedding = rotate
    modeling_transformer.fused_attnres = naive_attnres
    mlp.swiglu = lambda gate, up: F.silu(gate) * up
    RMSNorm.forward = lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    plain = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}
    model, loaded = TransformerForCausalLM.from_pretrained(
        folder, **plain, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    with torch.no_grad():
        torch.save(model.eval()(torch.load(ids), use_cache=False).logits, target)


main(*sys.argv[1:])
