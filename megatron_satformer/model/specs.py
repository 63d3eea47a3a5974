"""Layer specs: which modules make one layer, for Transformer Engine and for the local backend.

The architecture's record names its attention, its layer and what else it changes. Must not know:
args, training.
"""

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.norm import build_norm
from megatron_satformer.model.sdpa import ScaledDotProductAttention


def build_block_spec(
    config: DecoderConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Spec of the decoder layers of one pipeline chunk and of the final norm.

    Args:
        config: the model; `transformer_impl` chooses the backend.
        vp_stage: virtual pipeline stage of the chunk.
        pp_rank: pipeline rank; default: this process's.
    """
    layer = find_architecture(config.architecture).layer
    return TransformerBlockSubmodules(
        layer_specs=[
            ModuleSpec(module=layer, submodules=_adapt(spec.submodules, config))
            for spec in _megatron_layers(config, vp_stage, pp_rank)
        ],
        layer_norm=build_norm if _is_local(config) else _engine_norm(),
    )


def _megatron_layers(
    config: DecoderConfig, vp_stage: int | None, pp_rank: int | None
) -> list[ModuleSpec]:
    """Megatron's own spec of every layer of the chunk, chosen as its GPT builder does (0.19.2)."""
    if config.num_moe_experts is not None:
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=not _is_local(config),
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
            pp_rank=pp_rank,
        )
        return block.layer_specs
    if _is_local(config):
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            use_te_op_fuser=config.use_transformer_engine_op_fuser,
            use_kitchen=config.use_kitchen,
            use_te_activation_func=config.use_te_activation_func,
            use_kitchen_attention=config.use_kitchen_attention,
            kitchen_attention_backend=config.kitchen_attention_backend,
            use_grouped_gemm_for_dense_mlp=config.use_grouped_gemm_for_dense_mlp,
        )
    return [spec] * get_num_layers_to_build(config, vp_stage, pp_rank)


def _adapt(
    submodules: TransformerLayerSubmodules, config: DecoderConfig
) -> TransformerLayerSubmodules:
    """Megatron's submodules with the architecture's attention and, locally, our norms and SDPA."""
    attention = submodules.self_attention.submodules
    changes: dict[str, Any] = {}
    if _is_local(config):
        fused = config.attention_backend != AttnBackend.local
        core = ScaledDotProductAttention if fused else DotProductAttention
        attention = replace(attention, core_attention=core)
        if config.qk_layernorm and not config.qk_l2_norm:
            attention = replace(attention, q_layernorm=build_norm, k_layernorm=build_norm)
        changes = {"input_layernorm": build_norm, "pre_mlp_layernorm": build_norm}
        if getattr(submodules.mlp, "func", None) is MoELayer:
            # Transformer Engine does not fuse this norm into experts: under its key a checkpoint
            # serves both backends. Megatron's local spec renames it as in a dense layer.
            keys = dict(submodules.sharded_state_dict_keys_map)
            del keys["pre_mlp_layernorm."]
            changes["sharded_state_dict_keys_map"] = keys
    architecture = find_architecture(config.architecture)
    changes["self_attention"] = replace(
        submodules.self_attention, module=architecture.attention, submodules=attention
    )
    adapted = replace(submodules, **changes)
    return adapted if architecture.adapt is None else architecture.adapt(adapted, config)


def _is_local(config: DecoderConfig) -> bool:
    return config.transformer_impl == "local"


def _engine_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
