"""How many parameters a model has, from its config alone: nothing is allocated."""

from dataclasses import dataclass

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model, over all ranks, without the padding of fused gate rows.

    Attributes:
        embeddings: word, position and output layer.
        layers: attention, MLPs, all experts with their router, and norms, the final one included.
        own: what the architecture adds to a plain Transformer.
        idle: those of `layers` in experts that one token is not routed to.
    """

    embeddings: int
    layers: int
    own: int
    idle: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embeddings + self.layers + self.own

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.total - self.idle


def count_parameters(
    config: DecoderConfig,
    padded_vocab_size: int,
    share_embeddings: bool = True,
    learned_positions: int = 0,
) -> ParameterCount:
    """Count the parameters of a decoder, dense or with experts.

    Args:
        config: the model.
        padded_vocab_size: rows of the word embedding.
        share_embeddings: whether the output layer is the word embedding.
        learned_positions: rows of a learned position embedding, 0 for RoPE.

    Raises:
        NotImplementedError: multi-latent attention.
    """
    if config.multi_latent_attention:
        raise NotImplementedError("parameters are not counted for multi-latent attention")
    h, hn = config.hidden_size, config.kv_channels
    query, kv = config.num_attention_heads * hn, config.kv_projection_size
    bias = int(config.add_bias_linear)
    norm = 2 if config.normalization == "LayerNorm" else 1
    qkv = query * (2 if config.attention_output_gate else 1) + 2 * kv
    attention = qkv * (h + int(bias or config.add_qkv_bias)) + h * (query + bias)
    if config.qk_layernorm and not config.qk_l2_norm:
        attention += 2 * hn * norm
    if config.softmax_type == "learnable":
        attention += config.num_attention_heads
    moe = count_moe_layers(config)
    layers = config.num_layers * (attention + 2 * h * norm) + h * norm
    architecture = find_architecture(config.architecture)
    dense = range(1, config.num_layers - moe + 1)  # those with experts differ in no dense width
    layers += sum(_mlp(config, architecture.ffn_width(config, n)) for n in dense)
    idle = 0
    if moe:
        expert = _mlp(config, config.moe_ffn_hidden_size, config.moe_latent_size)
        layers += moe * (config.num_moe_experts * expert + _around_experts(config))
        idle = moe * (config.num_moe_experts - config.moe_router_topk) * expert
    embeddings = h * (padded_vocab_size * (1 if share_embeddings else 2) + learned_positions)
    own = architecture.count_parameters(config)
    return ParameterCount(embeddings, layers, own, idle)


def _mlp(config: DecoderConfig, ffn: int, hidden: int | None = None) -> int:
    h = hidden or config.hidden_size
    bias = int(config.add_bias_linear)
    return ffn * (2 if config.gated_linear_unit else 1) * (h + bias) + h * (ffn + bias)


def count_moe_layers(config: DecoderConfig) -> int:
    """How many layers have experts."""
    if config.num_moe_experts is None:
        return 0
    every = config.moe_layer_freq  # a pattern of 0 and 1, or every how many layers, the first one
    return sum(every) if isinstance(every, list) else -(-config.num_layers // every)


def _around_experts(config: DecoderConfig) -> int:
    """Router, shared experts and latent projections of one layer."""
    h, bias = config.hidden_size, int(config.add_bias_linear)
    count = config.num_moe_experts * (h + bias)
    if config.moe_shared_expert_intermediate_size is not None:
        count += _mlp(config, config.moe_shared_expert_intermediate_size)
        count += h * config.moe_shared_expert_gate
    if config.moe_latent_size:
        count += config.moe_latent_size * (h + bias) + h * (config.moe_latent_size + bias)
    return count
