"""Configuration of a plain Transformer decoder for Hugging Face transformers.

Its relatives subclass it in files beside this one; an export holds them in one file. It imports
transformers and nothing else. Needs transformers >= 5.4.
"""

from dataclasses import is_dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, __version__

if not is_dataclass(PreTrainedConfig):
    raise ImportError(
        f"transformers ({__version__}) must be 5.4.0 or newer, where configurations became "
        "dataclasses. Upgrade it: pip install -U transformers."
    )


class DecoderConfig(PreTrainedConfig):
    """Shape of a pre-norm decoder.

    The fields that Llama has mean what they mean there; what differs:

    Attributes:
        architecture: As in the training that made it.
        qk_norm: RMSNorm over the head dim of queries and keys, before the rotary embedding.
        qk_norm_eps: Its epsilon; None means rms_norm_eps, that of the other norms.
        attention_bias: Bias on the q, k and v projections; the output projection never has one.
    """

    model_type = "megatron_decoder"
    # Megatron's names for the same numbers
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "ffn_hidden_size": "intermediate_size",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # no base_model_pp_plan: a stage hands on the hidden states alone, and the rest would be lost
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 11
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # None: num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    qk_norm: bool = True
    qk_norm_eps: float | None = None
    architecture: str = "transformer"

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        super().__post_init__(**kwargs)


DecoderConfig.register_for_auto_class()

__all__ = ["DecoderConfig"]
