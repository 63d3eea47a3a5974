"""Layer specs: which modules make one layer, for Transformer Engine and for the local backend.

An architecture is one file and one line in `ATTENTION`. Must not know: args, training.
"""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.model.layer import ValueResidualLayer
from megatron_satformer.model.norm import build_norm
from megatron_satformer.model.resformer import ResFormerAttention
from megatron_satformer.model.satformer import SATFormerAttention
from megatron_satformer.model.sdpa import ScaledDotProductAttention

ATTENTION: dict[str, type[SelfAttention]] = {
    "transformer": SelfAttention,
    "resformer": ResFormerAttention,
    "satformer": SATFormerAttention,
}


def build_block_spec(
    config: SATFormerConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    residual_layer: type[ValueResidualLayer] = ValueResidualLayer,
) -> TransformerBlockSubmodules:
    """Spec of the decoder layers of one pipeline chunk and of the final norm.

    Args:
        config: the model; `transformer_impl` chooses the backend.
        vp_stage: virtual pipeline stage of the chunk.
        pp_rank: pipeline rank; default: this process's.
        residual_layer: layer class for the architectures with a value residual.
    """
    local = config.transformer_impl == "local"
    if config.num_moe_experts is not None:
        # Plain Transformer alone (the value residual refuses experts): Megatron's own choice.
        return get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=not local,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
            pp_rank=pp_rank,
        )
    submodules = _local_submodules(config) if local else _engine_submodules(config)
    submodules.self_attention.module = ATTENTION[config.architecture]
    layer = TransformerLayer if config.architecture == "transformer" else residual_layer
    spec = ModuleSpec(module=layer, submodules=submodules)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage, pp_rank),
        layer_norm=build_norm if local else _engine_norm(),
    )


def _engine_submodules(config: SATFormerConfig) -> TransformerLayerSubmodules:
    return get_gpt_layer_with_transformer_engine_submodules(
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        qk_l2_norm=config.qk_l2_norm,
        use_kitchen=config.use_kitchen,
        use_te_activation_func=config.use_te_activation_func,
        use_kitchen_attention=config.use_kitchen_attention,
        kitchen_attention_backend=config.kitchen_attention_backend,
    )


def _local_submodules(config: SATFormerConfig) -> TransformerLayerSubmodules:
    """Megatron's local submodules with norms for sequence parallelism and fused attention."""
    submodules = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    submodules.input_layernorm = build_norm
    submodules.pre_mlp_layernorm = build_norm
    attention = submodules.self_attention.submodules
    if config.qk_layernorm and not config.qk_l2_norm:
        attention.q_layernorm = attention.k_layernorm = build_norm
    elif config.qk_l2_norm:
        attention.q_layernorm = attention.k_layernorm = L2Norm
    if config.attention_backend == AttnBackend.local:
        attention.core_attention = DotProductAttention
    else:
        attention.core_attention = ScaledDotProductAttention
    return submodules


def _engine_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
