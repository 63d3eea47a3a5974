"""The one table of parameter names: Megatron checkpoint keys beside Hugging Face names.

Megatron's keys do not depend on the layout that saved them. Shapes: h hidden, np query heads,
ng KV heads, hn head dim, ffn MLP width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.architectures.record import OwnTensor, Packing

MEGATRON_LAYER = "decoder.layers.{n}."
HF_LAYER = "model.layers.{n}."


@dataclass(frozen=True)
class Name:
    """One Megatron tensor and the Hugging Face tensors that it holds.

    Attributes:
        megatron: Key in the checkpoint.
        hf: Names in the exported model.
        packing: How the first holds the second. "one": as it is. "vocabulary": with rows of padding
            at the end. "qkv": rows per KV group, its np/ng query heads, its key head, its value
            head. "halves": one after the other.
        layer: Layer (0-based) it belongs to, None for the model's own.
        fp32: Whether it is float32 in every model.
        own: What the architecture adds to a plain Transformer; None for the rest.
    """

    megatron: str
    hf: tuple[str, ...]
    packing: Packing = "one"
    layer: int | None = None
    fp32: bool = False
    own: OwnTensor | None = None

    @property
    def stacked(self) -> str:
        """Key where layers are alike: all layers in one tensor, with a leading axis."""
        return self.megatron.replace(MEGATRON_LAYER.format(n=self.layer), "decoder.layers.")


EMBEDDING = Name("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")
FINAL_NORM = Name("decoder.final_layernorm.weight", ("model.norm.weight",))
OUTPUT = Name("output_layer.weight", ("lm_head.weight",), "vocabulary")
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_LAYER: dict[str, tuple[str, tuple[str, ...], Packing]] = {
    "input_norm": (
        "self_attention.linear_qkv.layer_norm_weight",
        ("input_layernorm.weight",),
        "one",
    ),
    "qkv": ("self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in _QKV), "qkv"),
    "qkv_bias": ("self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in _QKV), "qkv"),
    "q_norm": ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "one"),
    "k_norm": ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "one"),
    "output": ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "one"),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), "one"),
    "mlp_in": ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "halves"),
    "mlp_out": ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "one"),
}


def iterate_names(config: Any) -> Iterator[Name]:
    """Yields the names of every tensor of a model, in the order of its layers.

    Args:
        config: Exported configuration of the model.
    """
    own = [
        Name(t.megatron, t.hf, t.packing, n - 1 if n else None, t.fp32, t)
        for n, t in find_architecture(config.architecture).all_tensors(config)
    ]
    taken = {name for tensor in own for name in tensor.hf}
    absent = {
        "qkv_bias": not config.attention_bias,
        "q_norm": not config.qk_norm,
        "k_norm": not config.qk_norm,
    }
    yield EMBEDDING
    yield from (name for name in own if name.layer is None)
    for n in range(config.num_hidden_layers):
        for part, (megatron, hf, packing) in _LAYER.items():
            names = tuple(HF_LAYER.format(n=n) + name for name in hf)
            if not (absent.get(part, False) or taken.intersection(names)):
                yield Name(MEGATRON_LAYER.format(n=n) + megatron, names, packing, n)
        yield from (name for name in own if name.layer == n)
    yield FINAL_NORM
    if not config.tie_word_embeddings:
        yield OUTPUT


def convert_to_hf(name: Name, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Takes one Megatron tensor apart.

    Args:
        name: Of the table.
        tensor: Of the checkpoint, whole (no parallelism).
        config: Exported configuration of the model.

    Returns:
        Hugging Face name -> tensor with memory of its own.
    """
    pieces = [tensor]
    if name.packing == "vocabulary":
        pieces = [tensor[: config.vocab_size]]
    elif name.packing == "halves":
        pieces = list(tensor.chunk(2))
    elif name.packing == "qkv":
        ng, ratio = config.num_key_value_heads, _queries_per_group(config)
        groups = tensor.view(ng, ratio + 2, config.head_dim, *tensor.shape[1:])
        pieces = [part.flatten(0, 2) for part in groups.split([ratio, 1, 1], dim=1)]
    # a slice would keep the whole tensor alive, and safetensors refuses shared memory
    return {
        key: piece.clone() if piece.untyped_storage().nbytes() > piece.nbytes else piece
        for key, piece in zip(name.hf, pieces, strict=True)
    }


def convert_to_megatron(
    name: Name, tensors: Mapping[str, Tensor], config: Any, padded_vocab_size: int
) -> Tensor:
    """Puts one Megatron tensor together, the inverse of `convert_to_hf`.

    Args:
        name: Of the table.
        tensors: Hugging Face state dict.
        config: Exported configuration of the model.
        padded_vocab_size: Rows of Megatron's embedding. Those added repeat the last one: rows of
            zeros would have the logit 0, far above that of most tokens in a trained model, and
            raise its loss.
    """
    pieces = [tensors[key] for key in name.hf]
    if name.packing == "vocabulary":
        pieces.append(pieces[0][-1:].expand(padded_vocab_size - len(pieces[0]), -1))
    elif name.packing == "qkv":
        ng = config.num_key_value_heads
        groups = [piece.view(ng, -1, config.head_dim, *piece.shape[1:]) for piece in pieces]
        return torch.cat(groups, dim=1).flatten(0, 2)
    return torch.cat(pieces)


def _queries_per_group(config: Any) -> int:
    return config.num_attention_heads // config.num_key_value_heads
