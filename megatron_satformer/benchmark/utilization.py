"""Model FLOPs utilization: what a training step computes, over what the GPU could in that time."""

from typing import Any

# Dense bf16 FLOP/s by the vendors' data sheets; the first that a device's name contains.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


def count_training_flops(shape: Any) -> float:
    """FLOPs per token, forward and backward, of the plain Transformer with SwiGLU at a shape.

    Two for each multiplication and addition, three passes, attention counted as causal, nothing
    for recompute (arXiv 2204.02311, appendix B). What an architecture adds is not in it: of two
    that take the same time one that computes more for it is not the better.

    Args:
        shape: with sizes named as Megatron's flags: hidden_size, num_layers, num_attention_heads,
            num_query_groups, ffn_hidden_size, seq_length, vocab_size, and kv_channels where heads
            are not a share of hidden_size.
    """
    head = getattr(shape, "kv_channels", None) or shape.hidden_size // shape.num_attention_heads
    query, kv = head * shape.num_attention_heads, head * shape.num_query_groups
    attention = shape.hidden_size * (2 * query + 2 * kv)
    mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
    scores = query * shape.seq_length  # q k and p v, half of each
    layers = shape.num_layers * (attention + mlp + scores)
    return 6.0 * (layers + shape.hidden_size * shape.vocab_size)
