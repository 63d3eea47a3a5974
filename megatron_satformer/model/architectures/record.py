"""What an architecture declares about itself: everything by which it differs from the others.

Must not know: any architecture, pipeline stages, training.

Layers are numbered from 1; n = 0 stands for what belongs to the whole model. Shapes: s sequence,
b micro-batch, h hidden, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.layouts import PaperLayout
from megatron_satformer.model.attention import DecoderAttention
from megatron_satformer.unsupported import Row

if TYPE_CHECKING:  # it takes seconds, and tools only want what is declared
    from megatron.core.models.gpt.gpt_model import GPTModel

Packing = Literal["one", "vocabulary", "qkv", "halves"]


class Carry(NamedTuple):
    """What crosses the boundary behind a layer beside hidden_states, in this order.

    Attributes:
        streams: tensors like hidden_states, [s, b, h] ([s/tp, b, h] under sequence parallelism).
        heads: tensors of KV heads, [s, b, ng/tp, hn].
    """

    streams: int = 0
    heads: int = 0


@dataclass(frozen=True)
class OwnTensor:
    """A tensor of a checkpoint that a plain Transformer does not have, or packs otherwise.

    One that holds a Hugging Face tensor of the plain Transformer takes the place of the plain one.

    Attributes:
        megatron: key below "decoder.layers.{n - 1}.", or below "decoder." for n = 0.
        hf: names of what it holds, below "model.layers.{n - 1}.", or below "model." for n = 0.
        shape: of the whole tensor, without parallelism.
        packing: how it holds them, see `checkpoint/convert/names.py`.
        fp32: whether it stays float32 in the files of a model in another dtype.
        start: shape -> values with which the model computes a plain Transformer, see
            `Architecture.plain_start`.
        like: Hugging Face name, in the same layer, of the plain Transformer's tensor whose values
            it then has instead of `start`.
        behind: whether the Hugging Face names are those of the layer before: what Megatron's layer
            n + 1 reads at its entry, other stages' outputs included, stands behind layer n there.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    packing: Packing = "one"
    fp32: bool = False
    start: Callable[[tuple[int, ...]], Tensor] = torch.zeros
    like: str | None = None
    behind: bool = False

    def placed(self, n: int) -> "OwnTensor":
        """The same with the full names that it has in layer n, or in the model for n = 0."""
        layer, theirs = (f"layers.{i}." if n else "" for i in (n - 1, n - 1 - self.behind))
        names = tuple(f"model.{theirs}{name}" for name in self.hf)
        like = self.like and f"model.{theirs}{self.like}"
        return replace(self, megatron=f"decoder.{layer}{self.megatron}", hf=names, like=like)


@dataclass(frozen=True)
class NoOptions:
    """An architecture without options of its own."""


@dataclass(frozen=True)
class Architecture:
    """The record of one architecture.

    Options are read from whatever has them as attributes, with `num_layers`, `hidden_size`,
    `num_query_groups` and `kv_channels`: a DecoderConfig or an exported configuration.

    Attributes:
        name: value of --architecture.
        source: where it is published.
        equation: for card and README; "{config.value_gate}" and the like are filled in from the
            exported configuration.
        about: a sentence or two for the card.
        twin: import path of the plain torch model, "module:class".
        exported: import path of the exported causal language model, "module:class".
        config: Megatron's configuration, with the options as fields.
        options: dataclass of its own options: one flag each. A field with metadata `changeable`
            does not say what the model computes: a run may go on with another value.
        attention: class of every layer's self-attention.
        layer: class of every layer.
        adapt: changes Megatron's submodules of one layer further.
        carry: config and n, 0 < n < num_layers -> what crosses the boundary behind layer n.
        reads_tokens: whether its layers read the token ids, which every stage then gets from the
            data; `finish` hands them to the decoder.
        tensors: options and n -> its own tensors.
        ffn_width: options and n -> width of the MLP of layer n, where that is dense.
        finish: what one chunk of the model needs beyond its layers; called with the chunk, its
            place in the model, and its TransformerBlock's process groups in place.
        refuses: Megatron's options that cannot be used with it, and why.
        defaults: parsed arguments -> defaults of other flags.
        parameter_groups: parsed arguments -> patterns of parameters' names, and how the optimizer
            treats those that have one, in the terms of Megatron's ParamGroupOverride. Without it
            what has one axis is not decayed, and the rest is.
        plain_start: options -> None if its own tensors, at their `start`, compute the plain
            Transformer and learn from there; else why not.
        start_options: options of an import from a plain Transformer, where not the defaults.
        stock: whether transformers' own Llama and Qwen3 compute it, where they have its options.
        from_transformer: why training cannot start from a Transformer's weights; None: it can, and
            its modules heed `DecoderConfig.expects_transformer`.
        gates: what `output_gates=True` gives, for the card; None: nothing.
        layers_note: exported configuration -> what the card says of its layers.
        mfu: model FLOPs utilization of one GPU, of the plain Transformer's FLOPs, for plans; see
            docs/performance.md. None: not timed; plans then count what it adds.
        paper: its layouts in other repositories; what ours can be turned into is the first that
            does not refuse it.
        controls: what it is compared to beside other architectures: name -> own options that make
            it of this architecture.
    """

    name: str
    source: str
    equation: str
    about: str
    twin: str
    exported: str
    config: type[DecoderConfig] = DecoderConfig
    options: type = NoOptions
    attention: type[SelfAttention] = DecoderAttention
    layer: type[TransformerLayer] = TransformerLayer
    adapt: Callable[[TransformerLayerSubmodules, Any], TransformerLayerSubmodules] | None = None
    carry: Callable[[Any, int], Carry] = lambda config, n: Carry()
    reads_tokens: bool = False
    tensors: Callable[[Any, int], Sequence[OwnTensor]] = lambda options, n: ()
    ffn_width: Callable[[Any, int], int] = lambda options, n: options.ffn_hidden_size
    finish: "Callable[[GPTModel, int], None] | None" = None
    refuses: tuple[Row, ...] = ()
    defaults: Callable[[Namespace], dict[str, Any]] = lambda preview: {}
    parameter_groups: Callable[[Namespace], dict[str, dict[str, float]]] = lambda args: {}
    plain_start: Callable[[Any], str | None] = lambda options: None
    start_options: Mapping[str, Any] = field(default_factory=dict)
    stock: bool = False
    from_transformer: str | None = "its layers read no checkpoint without its own tensors"
    gates: str | None = None
    layers_note: Callable[[Any], str] = lambda config: ""
    mfu: float | None = None
    paper: tuple[PaperLayout, ...] = ()
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def own_options(self) -> dict[str, Any]:
        """Names of its own options and their defaults."""
        return {option.name: option.default for option in fields(self.options)}

    @property
    def model_options(self) -> dict[str, Any]:
        """Those of its own options that say what the model computes, and their defaults."""
        changeable = {f.name for f in fields(self.options) if f.metadata.get("changeable")}
        return {n: value for n, value in self.own_options.items() if n not in changeable}

    def carry_behind(self, config: DecoderConfig, n: int) -> Carry:
        """What crosses the boundary behind n layers: nothing at either end of the model."""
        return self.carry(config, n) if 0 < n < config.num_layers else Carry()

    def carries(self, config: DecoderConfig) -> Carry:
        """The most of each kind that any boundary has to take."""
        behind = [self.carry_behind(config, n) for n in range(config.num_layers + 1)]
        return Carry(max(c.streams for c in behind), max(c.heads for c in behind))

    def all_tensors(self, options: Any) -> list[tuple[int, OwnTensor]]:
        """Layer, or 0, and its own tensors under their full names, of the whole model."""
        return [
            (n, tensor.placed(n))
            for n in range(options.num_layers + 1)
            for tensor in self.tensors(options, n)
        ]

    def by_key(self, options: Any) -> dict[str, OwnTensor]:
        """Key in a checkpoint -> its own tensor; layers that are alike are one, without number."""
        found = {}
        for n, tensor in self.all_tensors(options):
            layer = "layers." if self.config.layers_alike else f"layers.{n - 1}."
            found[tensor.megatron.replace(f"layers.{n - 1}.", layer)] = tensor
        return found

    def count_parameters(self, options: Any) -> int:
        """Number of parameters in its own tensors."""
        return sum(prod(tensor.shape) for _, tensor in self.all_tensors(options))
