"""What a checkpoint's arguments mean for the exported model, and what cannot be exported.

Fields are those of Megatron's argument parser (0.19.2) and this project's own.
"""

from argparse import Namespace
from typing import Any

from megatron_satformer.checkpoint.hugging_face.code import config_class
from megatron_satformer.model.architectures import PLAIN, find_architecture
from megatron_satformer.unsupported import EXPORT, refuse_unsupported


def check_exportable(args: Namespace) -> None:
    """Refuses what the exported model does not compute.

    Raises:
        ValueError: Names the first option, its value, and what it would have to be.
    """
    refuse_unsupported(args, EXPORT)


def own_options(args: Namespace) -> dict[str, Any]:
    """Architecture of a checkpoint and its own options; what an older one lacks has its default.

    Args:
        args: Of the checkpoint.
    """
    name = getattr(args, "architecture", PLAIN)
    defaults = find_architecture(name).model_options
    return {"architecture": name} | {o: getattr(args, o, d) for o, d in defaults.items()}


def build_hf_config(args: Namespace, vocab_size: int) -> Any:
    """Builds the exported model's configuration, of the architecture's own class.

    Args:
        args: Of the checkpoint.
        vocab_size: Of the tokenizer, without padding.

    Raises:
        ValueError: If the options cannot be exported.
    """
    check_exportable(args)
    heads = args.num_attention_heads
    epsilon = getattr(args, "norm_epsilon", None) or args.layernorm_epsilon
    own = own_options(args)
    return config_class(own["architecture"])(
        **own,
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels,
        max_position_embeddings=args.max_position_embeddings,
        rms_norm_eps=epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        attention_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        initializer_range=args.init_method_std,
    )
