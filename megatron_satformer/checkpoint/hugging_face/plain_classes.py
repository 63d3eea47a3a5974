"""Which plain Transformers are a Llama or a Qwen3 of transformers' own, to the last weight.

RMSNorm, rotary embedding, SwiGLU and attention are the same there; what differs is the QK-norm,
which Qwen3 always has and Llama never.
"""

from typing import Any

from megatron_satformer.model.architectures import find_architecture

# fields that mean the same in all three
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
)


def build_stock_config(config: Any) -> Any | None:
    """Builds the configuration of the stock class that computes exactly what `config` does.

    Args:
        config: Of the model, in our own class.

    Returns:
        A Qwen3Config, a LlamaConfig, or None where neither is exact: for another architecture; for
        biases (theirs come with one on the output projection, ours do not); for a QK-norm with an
        epsilon of its own; for a hidden size that Llama refuses because the heads do not divide it.
    """
    from transformers import LlamaConfig, Qwen3Config

    if not find_architecture(config.architecture).stock or config.attention_bias or config.mlp_bias:
        return None
    if config.qk_norm and config.qk_norm_eps not in (None, config.rms_norm_eps):
        return None
    fields = {name: getattr(config, name) for name in (*SHAPE_FIELDS, "hidden_act")}
    assert config.rope_parameters is not None
    fields["rope_parameters"] = dict(config.rope_parameters)
    # Their embedding gives a pad token no gradient: fine-tuning would never move an eos that pads.
    pad = config.pad_token_id
    fields["pad_token_id"] = None if pad == config.eos_token_id else pad
    if config.qk_norm:
        return Qwen3Config(**fields, attention_bias=False, use_sliding_window=False)
    if config.hidden_size % config.num_attention_heads:
        return None
    return LlamaConfig(**fields, attention_bias=False, mlp_bias=False)
