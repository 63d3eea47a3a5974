"""SATFormer, ResFormer and Transformer decoders for Hugging Face transformers.

This file is copied into every exported folder: it imports torch and transformers, and
`configuration_satformer.py` beside it. Needs transformers >= 5.4.

Per KV head g of layer n, x_n the normed input of attention (arXiv 2605.03953, 2410.17897)::

    V_n  = W_v,n x_n                           V'_1 = V_1
    V'_n = V_n + gate(W_gate,n x_n) * V_1                                SATFormer
    V'_n = lambda1_n * V_1 + lambda2_n * V_n                             ResFormer

V' is what attention reads and what the cache holds: decoding needs V_1 of the new tokens only,
which layer 1 has just made, so the cache is that of a plain Transformer.

Shapes: b batch, s sequence, h hidden, np query heads, ng KV heads, hn head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from .configuration_satformer import SATFormerConfig

# logits [b, s, ng] -> alpha [b, s, ng]; ng is the number of KV heads of the whole model
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1) * z.size(-1),
    "softmax_sigmoid": lambda z: z.softmax(-1) * z.sigmoid() * z.size(-1),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
SPLIT_HEADS = "{} needs all KV heads together; tensor parallelism has split them. Use one rank."


def select_positions(hidden_states: Tensor, keep: int | Tensor) -> Tensor:
    """The positions of [b, s, h] that logits are wanted of, see `SATFormerForCausalLM.forward`."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:]  # 0: all
    if keep.dim() == 1:
        return hidden_states[:, keep]
    if keep.dtype == torch.bool:
        return hidden_states[keep]
    return hidden_states.take_along_dim(keep.unsqueeze(-1), dim=1)


@dataclass
class SATFormerModelOutputWithPast(BaseModelOutputWithPast):
    """Adds gates: alpha [b, s, ng] of each mixing layer, with `output_gates=True`."""

    gates: tuple[Tensor, ...] | None = None


@dataclass
class SATFormerCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Adds gates: alpha [b, s, ng] of each mixing layer, with `output_gates=True`."""

    gates: tuple[Tensor, ...] | None = None


class SATFormerValueResidual(nn.Module):
    """ResFormer's static weights of V1, shared by the mixing layers through one softmax."""

    def __init__(self, config: SATFormerConfig) -> None:
        super().__init__()
        self.lambda_logits = nn.Parameter(torch.zeros(len(config.mixing_layers)))
        self.lambda_scale = nn.Parameter(torch.full((1,), float(config.num_hidden_layers)))

    def forward(self) -> Tensor:
        """Returns lambda1 [number of mixing layers]; at init all are L / (number of them)."""
        return self.lambda_scale * self.lambda_logits.softmax(-1)


class SATFormerAttention(nn.Module):
    """Grouped-query attention whose values carry the value residual."""

    def __init__(self, config: SATFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.mixes = layer_idx in config.mixing_layers
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if config.qk_norm:
            eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=eps)
        if self.mixes and config.architecture == "satformer":
            self.value_gate = nn.Linear(
                config.hidden_size, config.num_key_value_heads, bias=config.value_gate_bias
            )
        if self.mixes and config.architecture == "resformer":
            self.value_lambda2 = nn.Parameter(torch.full((1,), 0.5))

    def mix_values(
        self, hidden_states: Tensor, v: Tensor, v1: Tensor | None, lambda1: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The equation: V_n and V_1, both [b, s, ng, hn] -> V'_n and alpha [b, s, ng] or None."""
        if not self.mixes:
            return v, None
        assert v1 is not None, "layer 1 has not run"
        split = v.size(-2) < self.config.num_key_value_heads  # by tensor parallelism
        if self.config.architecture == "resformer":
            assert lambda1 is not None
            if split and self.training:  # each rank would have its heads' part of the gradient
                raise NotImplementedError(SPLIT_HEADS.format("training architecture (resformer)"))
            # the lambdas stay float32 in a bf16 model: scalars near 1..L lose too much there
            return (lambda1 * v1 + self.value_lambda2 * v).to(v.dtype), None
        logits = self.value_gate(hidden_states)
        if split and "softmax" in self.config.value_gate:
            raise NotImplementedError(SPLIT_HEADS.format(f"value_gate ({self.config.value_gate})"))
        alpha = GATES[self.config.value_gate](logits)
        return torch.addcmul(v, alpha.unsqueeze(-1), v1), alpha

    def forward(
        self,
        hidden_states: Tensor,
        v1: Tensor | None,
        lambda1: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Normed x [b, s, h] -> output [b, s, h], v1 [b, s, ng, hn], alpha, attention weights."""
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q = self.q_proj(hidden_states).view(hidden_shape)
        k = self.k_proj(hidden_states).view(hidden_shape)
        v = self.v_proj(hidden_states).view(hidden_shape)
        if self.layer_idx == 0 and self.config.mixing_layers:
            v1 = v
        v, alpha = self.mix_values(hidden_states, v, v1, lambda1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(output), v1, alpha, weights


class SATFormerDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU. v1 and lambda1 need gradients, hence go by position."""

    def __init__(self, config: SATFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SATFormerAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        v1: Tensor | None = None,
        lambda1: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Hidden states [b, s, h], v1 [b, s, ng, hn] -> the same, alpha, attention weights."""
        output, v1, alpha, weights = self.self_attn(
            self.input_layernorm(hidden_states), v1, lambda1, **kwargs
        )
        hidden_states = hidden_states + output
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, v1, alpha, weights


class SATFormerPreTrainedModel(PreTrainedModel):
    """What both models share: initialisation and what transformers may do with them."""

    config_class = SATFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SATFormerDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {
        "value_lambda2",
        "lambda_logits",
        "lambda_scale",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SATFormerAttention) and hasattr(module, "value_lambda2"):
            init.constant_(module.value_lambda2, 0.5)
        elif isinstance(module, SATFormerValueResidual):
            init.zeros_(module.lambda_logits)
            init.constant_(module.lambda_scale, float(self.config.num_hidden_layers))


class SATFormerModel(SATFormerPreTrainedModel):
    """The decoder without its head; hands V1 from the first layer to the mixing ones."""

    def __init__(self, config: SATFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SATFormerDecoderLayer(config, n) for n in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        if config.architecture == "resformer":
            self.value_residual = SATFormerValueResidual(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gates: bool | None = None,
        **kwargs,
    ) -> SATFormerModelOutputWithPast:
        """Ids [b, s] or embeddings [b, s, h] -> hidden states [b, s, h] after the last norm.

        Raises:
            ValueError: Not exactly one input, attention weights asked of a kernel without them, or
                a cache given to training with gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError("Training with gradient checkpointing reads no past_key_values.")
            use_cache = False  # the backward pass would fill it a second time
        output_attentions = output_attentions or self.config.output_attentions
        output_hidden_states = output_hidden_states or self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions needs attn_implementation 'eager', not "
                f"{self.config._attn_implementation!r}: model.set_attn_implementation('eager')."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
            position_ids = positions.unsqueeze(0)

        kwargs["attention_mask"] = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        kwargs["position_embeddings"] = self.rotary_emb(inputs_embeds, position_ids)
        kwargs["past_key_values"] = past_key_values
        lambdas = self.value_residual() if self.config.architecture == "resformer" else None

        hidden_states, v1, first = inputs_embeds, None, self.config.mixing_layers.start
        all_hidden, all_weights, gates = [], [], []
        for n, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden.append(hidden_states)
            lambda1 = lambdas[n - first] if lambdas is not None and n >= first else None
            hidden_states, v1, alpha, weights = layer(
                hidden_states, v1, lambda1, position_ids=position_ids, **kwargs
            )
            if output_attentions:
                all_weights.append(weights)
            if output_gates and alpha is not None:
                gates.append(alpha)
        hidden_states = self.norm(hidden_states)
        return SATFormerModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            gates=tuple(gates) if output_gates else None,
        )


class SATFormerForCausalLM(SATFormerPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SATFormerConfig) -> None:
        super().__init__(config)
        self.model = SATFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gates: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> SATFormerCausalLMOutputWithPast:
        """Ids [b, s] -> logits [b, s, vocab] and, if labels are given (the ids, not shifted), loss.

        logits_to_keep leaves out the other logits: the last n positions, those of a tensor [n] or
        [b, n], or, where a bool tensor [b, s] is True, as [number of True, vocab].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_gates=output_gates,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return SATFormerCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gates=outputs.gates,
        )


SATFormerModel.register_for_auto_class("AutoModel")
SATFormerForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["SATFormerForCausalLM", "SATFormerModel", "SATFormerPreTrainedModel"]
