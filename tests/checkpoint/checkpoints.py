"""Checkpoints as pretrain_satformer.py writes them, made of a reference model without training."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

from megatron_satformer.checkpoint.convert.names import convert_to_megatron, iterate_names
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.reference.decoder import Decoder
from tests.models import build_exported_config, build_twin

VOCABULARY, PADDED = 60, 128
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def build_reference(**options) -> Decoder:
    return build_twin(**{**SHAPE, **options}, scale=0.2)


def build_args(config: Any, **changes) -> Namespace:
    """Megatron's arguments for the model, as far as an export reads them."""
    args = Namespace(
        architecture=config.architecture,
        **{n: getattr(config, n) for n in find_architecture(config.architecture).model_options},
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        group_query_attention=config.num_key_value_heads != config.num_attention_heads,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=config.rope_theta,
        max_position_embeddings=64,
        qk_layernorm=config.qk_norm,
        add_qkv_bias=config.attention_bias,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        init_method_std=0.02,
        padded_vocab_size=PADDED,
        vocab_size=VOCABULARY,
        tokenizer_type="NullTokenizer",
        tokenizer_model=None,
        bf16=False,
        fp16=False,
        seq_length=64,
        consumed_train_samples=160,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
    )
    vars(args).update(changes)
    return args


def write_checkpoint(
    folder: Path,
    model: Decoder,
    step: int = 20,
    stacked: bool = False,
    drop: str | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    **changes,
) -> Path:
    """Writes `folder`/iter_*: the model beside optimizer state and the like, which is ignored.

    Args:
        folder: As given to --save.
        model: Whose weights to write.
        step: Iterations.
        stacked: Layers in one tensor with a leading axis, as where layers are alike.
        drop: Key to leave out.
        extra: Further tensors.
        changes: Of the arguments.
    """
    config = build_exported_config(model.config)
    state = {key: value.detach() for key, value in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, list[torch.Tensor]] = {}
    for name in iterate_names(config):
        tensor = convert_to_megatron(name, state, config, PADDED)
        if name.packing == "vocabulary":
            tensor[VOCABULARY:] = float("nan")  # nothing of the padding may come through
        if stacked and name.layer is not None:
            layers.setdefault(name.stacked, []).append(tensor)
        else:
            tensors[name.megatron] = tensor
    tensors |= {key: torch.stack(parts) for key, parts in layers.items()}
    tensors.pop(drop, None)
    for key in list(tensors):
        tensors[f"optimizer.state.exp_avg.{key}"] = torch.full_like(tensors[key], float("nan"))
    args = build_args(model.config, **changes)
    objects = {
        "common_state/shard_0_1": [{"args": args, "iteration": step, "checkpoint_version": 3.0}],
        "decoder.layers.self_attention._extra_state/shard_0_1": [None],
        "rng_state/shard_0_1": [1, 2, 3],
    }
    target = folder / f"iter_{step:07d}"
    save(
        {**tensors, **(extra or {}), **objects},
        storage_writer=FileSystemWriter(target),
        planner=DefaultSavePlanner(flatten_state_dict=False),
        no_dist=True,
    )
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (target / "metadata.json").write_text(json.dumps(backend))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder
