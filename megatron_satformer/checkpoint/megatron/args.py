"""Megatron's options for a model that was not trained here: what `options.py` reads, backwards.

Names and meanings are those of Megatron's argument parser (0.19.2) and this project's own flags.
"""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_satformer.model.architectures import find_architecture

# What an imported model computes, whatever its shape; our script's defaults are the same.
FAMILY: dict[str, Any] = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "swiglu": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "num_experts": None,
}
# A checkpoint of weights alone, which knows no layout.
SAVED: dict[str, Any] = {
    "ckpt_format": "torch_dist",
    "use_dist_ckpt": True,
    "no_save_optim": True,
    "no_save_rng": True,
    "use_distributed_optimizer": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "world_size": 1,
    "data_parallel_size": 1,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
}


def pad_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Rows of Megatron's embedding, as its tokenizer setup computes them.

    Raises:
        ValueError: If a number is less than 1.
    """
    for option, value in (
        ("make_vocab_size_divisible_by", divisible_by),
        ("tensor_model_parallel_size", tensor_parallel_size),
    ):
        if value < 1:
            raise ValueError(f"{option} ({value}) must be at least 1.")
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def build_args(
    config: Any, dtype: torch.dtype, padded_vocab_size: int, tokenizer: Path | None
) -> Namespace:
    """Builds the arguments that a checkpoint of this model carries.

    Args:
        config: Of the model.
        dtype: Of the weights.
        padded_vocab_size: Rows of the embedding.
        tokenizer: Folder of a Hugging Face tokenizer, if there is one.
    """
    assert config.rope_parameters is not None
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    own = find_architecture(config.architecture).model_options
    end = config.eos_token_id
    return Namespace(
        architecture=config.architecture,
        **{name: getattr(config, name) for name in own},
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups,
        kv_channels=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        qk_layernorm=config.qk_norm,
        add_qkv_bias=config.attention_bias,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        attention_dropout=config.attention_dropout,
        init_method_std=config.initializer_range,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        vocab_size=config.vocab_size,
        model_vocab_size=config.vocab_size,
        padded_vocab_size=padded_vocab_size,
        tokenizer_type="NullTokenizer" if tokenizer is None else "HuggingFaceTokenizer",
        tokenizer_model=None if tokenizer is None else str(tokenizer.resolve()),
        null_tokenizer_eod_id=end if isinstance(end, int) else None,
        **FAMILY,
        **SAVED,
    )


def training_flags(args: Namespace) -> list[str]:
    """The flags that pretrain_satformer.py needs for the model, one with its value each.

    Args:
        args: From `build_args`.

    Returns:
        All of the model's shape, and what differs from our script's defaults.
    """
    flags = [f"--architecture {args.architecture}"]
    for option, default in find_architecture(args.architecture).model_options.items():
        value = getattr(args, option)
        if value != default:
            told = "" if isinstance(value, bool) else f" {value}"
            flags.append(f"--{option.replace('_', '-')}{told}")
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    flags += [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in shape]
    if args.group_query_attention:
        flags.append(f"--group-query-attention --num-query-groups {args.num_query_groups}")
    flags += [
        f"--kv-channels {args.kv_channels}",
        f"--max-position-embeddings {args.max_position_embeddings}",
        f"--norm-epsilon {args.layernorm_epsilon!r}",
        f"--rotary-base {args.rotary_base}",
    ]
    flags += ["--no-qk-layernorm"] * (not args.qk_layernorm)
    flags += ["--add-qkv-bias"] * args.add_qkv_bias
    flags += ["--untie-embeddings-and-output-weights"] * args.untie_embeddings_and_output_weights
    if args.attention_dropout:
        flags.append(f"--attention-dropout {args.attention_dropout}")
    flags.append(f"--padded-vocab-size {args.padded_vocab_size}")
    flags += ["--bf16"] * args.bf16 + ["--fp16"] * args.fp16
    return flags


def tokenizer_flags(args: Namespace) -> list[str]:
    """The flags of the tokenizer, quoted for a shell; none if there was none to import."""
    if args.tokenizer_model is None:
        return []
    return [
        f"--tokenizer-type {args.tokenizer_type}",
        f"--tokenizer-model {shlex.quote(args.tokenizer_model)}",
    ]
