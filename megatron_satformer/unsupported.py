"""Megatron's options that a model of this project cannot have: where each is refused, and why.

Training, running a checkpoint's model, export and import read it here. Options are named as in
Megatron's argument parser (0.19.2). Must not know: modules, checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Place:
    """Where options are refused: with which exception, in which words."""

    error: type[Exception]
    message: str

    def refusal(self, option: str, value: Any, **words: Any) -> Exception:
        """Builds the exception; `words` fill the message."""
        return self.error(f"{option} ({value}) {self.message.format(**words)}")


class Row(NamedTuple):
    """Options that are refused for one reason, and their values that ask for nothing."""

    options: str
    why: str = ""  # where the place's message does not say it
    allowed: tuple[Any, ...] = (None, False)


Table = Mapping[tuple[Place, ...], tuple[Row, ...]]

TRAINING = Place(NotImplementedError, "is not supported: {why}. Leave it out.")
ARCHITECTURE = Place(
    NotImplementedError,
    "is not supported with architecture ({architecture}): {why}. Leave it out, or use "
    "--architecture transformer.",
)
LOCAL_BACKEND = Place(
    ValueError,
    "must come with --attention-backend local: torch's scaled_dot_product_attention does not have "
    "it. Add it, or use --transformer-impl transformer_engine.",
)
SDPA = Place(
    NotImplementedError,
    "is not supported by the local backend's scaled_dot_product_attention. Use "
    "--attention-backend local.",
)
MEGATRONS_ATTENTION = Place(
    ValueError,
    "must not come with --attention-backend local: Megatron's own attention {why}. Leave that out.",
)
ONE_CPU = Place(
    NotImplementedError,
    "is not supported where a checkpoint's Megatron model is run on one CPU process: {why}. "
    "Evaluate it with pretrain_satformer.py --skip-train.",
)
EXPORT = Place(
    ValueError,
    "must be {needed} for an export to Hugging Face: the exported model computes nothing else.",
)

_MASK = "Megatron's own attention makes its mask on a GPU"
UNSUPPORTED: Table = {
    (TRAINING,): (
        Row(
            "sft fim_data perform_rl_step logits_load_dir logits_save_dir hybrid_context_parallel",
            "pretrain_satformer.py trains on plain text from the start of each sample to its end",
        ),
        Row(
            "overlap_moe_expert_parallel_comm",
            "its schedule runs past the layer's forward",
        ),
        Row("moe_use_upcycling", "Megatron 0.19.2 would give the dense model experts too"),
        Row("freeze_all_layers", "Megatron 0.19.2 ignores it where a builder makes the model"),
        Row(
            "kitchen_config_file kitchen_recipe_number use_kitchen_attention",
            "Kitchen's layers have not been tried",
        ),
    ),
    (TRAINING, EXPORT): (
        Row("apply_residual_connection_post_layernorm", "Megatron 0.19.2 no longer reads it"),
    ),
    (TRAINING, ONE_CPU, EXPORT): (
        Row("multi_latent_attention", "its values are no plain projection of the layer's input"),
        Row(
            "mtp_num_layers",
            "they would need what is carried behind the last stage",
        ),
        Row(
            "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json",
            "all layers must project values the same way",
        ),
        Row(
            "hybrid_layer_pattern hybrid_override_pattern is_hybrid_model",
            "not every layer is an attention layer",
        ),
        Row(
            "experimental_attention_variant",
            "it replaces the attention that is built on",
        ),
    ),
    (LOCAL_BACKEND, SDPA, ONE_CPU, EXPORT): (Row("softmax_type", _MASK, ("vanilla",)),),
    (MEGATRONS_ATTENTION,): (
        Row("context_parallel_size", "has no context parallelism", (1,)),
        Row(
            "dataloader_inter_document_masking",
            "keeps documents apart with --reset-attention-mask alone",
        ),
    ),
    (LOCAL_BACKEND, SDPA, ONE_CPU): (Row("apply_query_key_layer_scaling", _MASK, (False,)),),
    (ONE_CPU, EXPORT): (
        Row("apply_layernorm_1p layernorm_zero_centered_gamma", "torch's norms do not have it"),
    ),
    (ONE_CPU,): (
        Row("fp32_residual_connection moe_latent_size", "Transformer Engine alone computes it"),
    ),
    (EXPORT,): (
        Row("normalization", allowed=("RMSNorm",)),
        Row("position_embedding_type", allowed=("rope",)),
        Row("swiglu", allowed=(True,)),
        Row("add_bias_linear qk_l2_norm attention_output_gate use_mup", allowed=(False,)),
        Row("rotary_interleaved use_rope_scaling", allowed=(False,)),
        Row("rotary_percent rotary_scaling_factor", allowed=(1.0,)),
        Row("rotary_seq_len_interpolation_factor no_rope_freq num_experts", allowed=(None,)),
        Row("window_size", allowed=(None,)),
        Row("rope_type", allowed=(None, "rope")),
        Row("activation_func_clamp_value", allowed=(None,)),
        Row("glu_linear_offset", allowed=(0.0,)),
    ),
}


def refuse_unsupported(
    options: object, place: Place, table: Table = UNSUPPORTED, **words: Any
) -> None:
    """Raises for the first option that a place refuses; one that is absent asks for nothing.

    Args:
        options: The arguments, or a configuration with fields of the same names.
        place: Whose rows count.
        table: Where they stand.
        words: What the place's message says beside the row's own.

    Raises:
        Exception: The place's; names the option and its value.
    """
    for row in (row for places, rows in table.items() if place in places for row in rows):
        for option in row.options.split():
            value = getattr(options, option, row.allowed[0])
            if value not in row.allowed:
                raise place.refusal(option, value, why=row.why, needed=row.allowed[0], **words)
