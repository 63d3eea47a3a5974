"""How many parameters a model has, from its config alone: nothing is allocated."""

from dataclasses import dataclass

from megatron_satformer.config import SATFormerConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model, over all ranks, without the padding of fused gate rows."""

    embeddings: int
    layers: int
    value_residual: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embeddings + self.layers + self.value_residual


def count_parameters(
    config: SATFormerConfig,
    padded_vocab_size: int,
    share_embeddings: bool = True,
    learned_positions: int = 0,
) -> ParameterCount:
    """Count the parameters of a dense decoder.

    Args:
        config: the model.
        padded_vocab_size: rows of the word embedding.
        share_embeddings: whether the output layer is the word embedding.
        learned_positions: rows of a learned position embedding, 0 for RoPE.

    Returns:
        Parameters of the embeddings (word, position, output layer), of the layers (with the final
        norm), and of the value residual (gates or lambdas).

    Raises:
        NotImplementedError: mixture of experts or multi-latent attention.
    """
    if config.num_moe_experts is not None or config.multi_latent_attention:
        raise NotImplementedError("parameters are counted for dense models only")
    h, hn = config.hidden_size, config.kv_channels
    query, kv = config.num_attention_heads * hn, config.kv_projection_size
    bias = int(config.add_bias_linear)
    norm = 2 if config.normalization == "LayerNorm" else 1
    qkv = query * (2 if config.attention_output_gate else 1) + 2 * kv
    fc1 = config.ffn_hidden_size * (2 if config.gated_linear_unit else 1)
    attention = qkv * (h + int(bias or config.add_qkv_bias)) + h * (query + bias)
    if config.qk_layernorm and not config.qk_l2_norm:
        attention += 2 * hn * norm
    mlp = fc1 * (h + bias) + h * (config.ffn_hidden_size + bias)
    layers = config.num_layers * (attention + mlp + 2 * h * norm) + h * norm
    embeddings = h * (padded_vocab_size * (1 if share_embeddings else 2) + learned_positions)
    return ParameterCount(embeddings, layers, _value_residual(config))


def _value_residual(config: SATFormerConfig) -> int:
    mixing = config.num_mixing_layers
    if config.architecture == "satformer":
        return mixing * config.num_query_groups * (config.hidden_size + config.value_gate_bias)
    if config.architecture == "resformer":
        return 2 * mixing + 1  # lambda_logits and lambda2 per mixing layer, one lambda_scale
    return 0
