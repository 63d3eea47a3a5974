"""Logits of a folder by flash-linear-attention's own class, for test_paper_layout.py.

    TRITON_INTERPRET=1 python in_fla.py FOLDER IDS LOGITS

A process of its own: Triton asks once, when it is imported, whether to interpret. flash-attn has no
CPU path: torch's attention stands in for its one function.
"""

import sys

import torch
from fla.layers import attn
from fla.models import TransformerForCausalLM
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple) -> Tensor:
    """Of [b, s, heads, hn], causal, no window."""
    assert causal
    assert window_size == (-1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def main(folder: str, ids: str, target: str) -> None:
    """Reads ids [b, s], writes logits [b, s, vocab]; every tensor has to have its place."""
    attn.flash_attn_func = attention
    plain = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}
    model, loaded = TransformerForCausalLM.from_pretrained(
        folder, **plain, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    with torch.no_grad():
        torch.save(model.eval()(torch.load(ids), use_cache=False).logits, target)


main(*sys.argv[1:])
