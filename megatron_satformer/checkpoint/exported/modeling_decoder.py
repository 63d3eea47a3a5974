"""A plain Transformer decoder for Hugging Face transformers, and the seams of its relatives.

They subclass it in files beside this one; an export holds all that it needs in one file. It imports
torch and transformers, and its configuration. Needs transformers >= 5.4.

Shapes: b batch, s sequence, h hidden, np query heads, ng KV heads, hn head dim.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
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
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_decoder import DecoderConfig

SPLIT_HEADS = "{} needs all KV heads together; tensor parallelism has split them. Use one rank."


def name_wrapped(method: Callable) -> Callable:
    """Names what decorators hide by where it is found; compile caches pickle functions by name."""
    outer = method
    while inner := getattr(outer, "__wrapped__", None):
        inner.__qualname__ = f"{outer.__qualname__}.__wrapped__"
        outer = inner
    return method


def select_positions(hidden_states: Tensor, keep: int | Tensor) -> Tensor:
    """The positions of [b, s, h] that logits are wanted of, see `DecoderForCausalLM.forward`."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:]  # 0: all
    if keep.dim() == 1:
        return hidden_states[:, keep]
    if keep.dtype == torch.bool:
        return hidden_states[keep]
    return hidden_states.take_along_dim(keep.unsqueeze(-1), dim=1)


@dataclass
class DecoderModelOutputWithPast(BaseModelOutputWithPast):
    """Adds gates: what each layer that has some tells of them, with `output_gates=True`."""

    gates: tuple[Tensor, ...] | None = None


@dataclass
class DecoderCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Adds gates: what each layer that has some tells of them, with `output_gates=True`."""

    gates: tuple[Tensor, ...] | None = None


class DecoderAttention(nn.Module):
    """Grouped-query attention; relatives override `mix` or `mix_normed`."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
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

    def expect(self, carried: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        """What is carried, for relatives to unpack.

        Raises:
            ValueError: If it is not `count` tensors: the layer is called alone.
        """
        if len(carried) != count:
            raise ValueError(
                f"The tensors carried ({len(carried)}) must be {count} for layer {self.layer_idx}, "
                "which cannot run alone. Call the model, or hand on what the layer before returns "
                "behind its attention weights: layer(hidden_states, *carried, ...)."
            )
        return carried

    def mix(
        self, hidden_states: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """Keys and values as attention and cache get them, before norm and rotation.

        Args:
            hidden_states: Normed input, [b, s, h].
            k: Projected, [b, s, ng, hn].
            v: Projected, [b, s, ng, hn].
            carried: From the layer before.

        Returns:
            Keys, values, what the next layer gets, and what `output_gates` tells of this one.
        """
        return k, v, carried, None

    def mix_normed(
        self, q: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Values as attention and cache get them, from q and k as normed, before rotation.

        Args:
            q: [b, s, np, hn].
            k: [b, s, ng, hn].
            v: From `mix`, [b, s, ng, hn].
            carried: From `mix`.

        Returns:
            Values, and what the next layer gets.
        """
        return v, carried

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, Tensor, Tensor],
        carried: tuple[Tensor, ...],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """Normed x [b, s, h], or three -> output [b, s, h], gates, attention weights, carried."""
        inputs = (hidden_states,) * 3 if isinstance(hidden_states, Tensor) else hidden_states
        for_q, for_k, for_v = inputs
        input_shape = for_q.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q = self.q_proj(for_q).view(hidden_shape)
        k = self.k_proj(for_k).view(hidden_shape)
        v = self.v_proj(for_v).view(hidden_shape)
        k, v, carried, gates = self.mix(for_v, k, v, carried)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        v, carried = self.mix_normed(q, k, v, carried)
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
        return self.o_proj(output), gates, weights, carried


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU. What is carried needs gradients, hence goes by position."""

    def __init__(
        self, config: DecoderConfig, layer_idx: int, attention_class: type[DecoderAttention]
    ) -> None:
        super().__init__()
        self.self_attn = attention_class(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def norm_inputs(self, hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Any:
        """What attention reads: one tensor [b, s, h], or one each for q, k and v."""
        return self.input_layernorm(hidden_states)

    def forward(self, hidden_states: Tensor, *carried: Tensor, **kwargs) -> tuple[Any, ...]:
        """Hidden states [b, s, h] -> the same, gates, attention weights, all that is carried."""
        output, gates, weights, carried = self.self_attn(
            self.norm_inputs(hidden_states, carried), carried, **kwargs
        )
        hidden_states = hidden_states + output
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, gates, weights, *carried


class DecoderPreTrainedModel(PreTrainedModel):
    """What both models share: initialisation and what transformers may do with them."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(DecoderAttention, index=2),
        "gates": OutputRecorder(DecoderAttention, index=1),
    }

    @classmethod
    def build_auto_map(cls) -> dict[str, str]:
        """Auto class -> the class of this one's module that serves its configuration."""
        module = sys.modules[cls.__module__]
        served = [cls.config_class, *vars(module).values()]
        return {
            c._auto_class: f"{c.__module__.rpartition('.')[2]}.{c.__name__}"
            for c in served
            if getattr(c, "_auto_class", None)
            and cls.config_class in (c, getattr(c, "config_class", None))
        }

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args, **kwargs
    ) -> None:
        """As transformers', which names no other class, and saves torch's code where FSDP2 is."""
        cls = own = type(self)
        if issubclass(cls, FSDPModule):
            own = cls.__mro__[2]  # behind the class that was made and FSDPModule
            cls._auto_class = None
            if is_main_process and not torch.distributed.get_rank():
                os.makedirs(save_directory, exist_ok=True)
                custom_object_save(own.__new__(own), save_directory)
        self.config.auto_map = own.build_auto_map()
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


class DecoderModel(DecoderPreTrainedModel):
    """The decoder without its head; hands what is carried from layer to layer."""

    attention_class: ClassVar[type[DecoderAttention]] = DecoderAttention
    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, n, self.attention_class)
            for n in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def start(self, input_ids: Tensor | None) -> tuple[Tensor, ...]:
        """What the first layer gets; input_ids: [b, s], None where embeddings were given."""
        return ()

    def finish(self, hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Tensor:
        """What the last norm gets, [b, s, h]; with an early exit, behind any layer."""
        return hidden_states

    @name_wrapped
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> DecoderModelOutputWithPast:
        """Ids [b, s] or embeddings [b, s, h] -> hidden states [b, s, h] after the last norm.

        Raises:
            ValueError: Not exactly one input, or a cache given to training with gradient
                checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if self.gradient_checkpointing and self.training and past_key_values is not None:
            # the backward pass would fill it a second time
            raise ValueError("Training with gradient checkpointing reads no past_key_values.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
            position_ids = positions.unsqueeze(0)
        if isinstance(attention_mask, dict):  # made beforehand, as models with windows need it
            mask = attention_mask["full_attention"]
        else:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states, carried = inputs_embeds, self.start(input_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer: assistant_early_exit
            hidden_states, _, _, *carried = layer(
                hidden_states,
                *carried,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return DecoderModelOutputWithPast(
            last_hidden_state=self.norm(self.finish(hidden_states, tuple(carried))),
            past_key_values=past_key_values if use_cache else None,
        )


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}
    model_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @name_wrapped
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> DecoderCausalLMOutputWithPast:
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
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return DecoderCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gates=outputs.gates,
        )


class DecoderForSequenceClassification(GenericForSequenceClassification, DecoderPreTrainedModel):
    """The decoder with a score per label, of the last token that is no padding."""

    model_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: DecoderConfig) -> None:
        # past its own, which asks AutoModel for the decoder: that knows none of ours
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


DecoderModel.register_for_auto_class("AutoModel")
DecoderForCausalLM.register_for_auto_class("AutoModelForCausalLM")
DecoderForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "DecoderForCausalLM",
    "DecoderForSequenceClassification",
    "DecoderModel",
    "DecoderPreTrainedModel",
]
