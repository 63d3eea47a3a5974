"""Layers with parameters of their own beside a Transformer's, which its checkpoint can start.

Must not know: which.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.architectures.record import OwnTensor
from megatron_satformer.model.coefficients import stream_coefficients, stream_projection
from megatron_satformer.unsupported import Row

SEED = 1234  # Megatron's --seed, where none is given
_STATIC = "what layers carry would have to be static buffers"
# Megatron's options that cannot be used where what a layer made is read by later ones.
REFUSES = (
    Row("fine_grained_activation_offloading", "it frees tensors that later layers read"),
    Row("cpu_offloading_num_layers", "what layers carry outlives those whose tensors it moves"),
    Row("enable_cuda_graph external_cuda_graph", _STATIC),
    Row("cuda_graph_impl", _STATIC, ("none",)),
    Row("use_megatron_fsdp use_torch_fsdp2", "it has not been tried with what layers carry"),
)


class ExtendedLayer(TransformerLayer):
    """TransformerLayer whose own tensors keep their init with --from-transformer."""

    config: DecoderConfig
    # What layer L, and no other, uses; the decoder owns it, so that layers are alike.
    end: tuple["Coefficients", ...] = ()

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.expects_transformer:
            self.register_load_state_dict_post_hook(_transformer_was_read)

    # TransformerLayer.sharded_state_dict, 0.19.2: what is no persistent object is not looked for.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's entries; where a plain Transformer's are expected, the layer's own stay."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.expects_transformer:
            architecture = find_architecture(self.config.architecture)
            tensors = architecture.tensors(self.config, self.layer_number)
            own = {prefix + tensor.megatron for tensor in tensors}
            for name, entry in entries.items():
                if getattr(entry, "key", None) in own:  # a norm's is not its name here
                    entries[name] = LocalNonpersistentObject(entry.data)
        return entries


class Coefficients(MegatronModule):
    """Parameters applied to tensors like hidden_states, which every rank holds whole.

    Args:
        config: of the model.
        tensors: what it holds, named by what stands behind the first dot of their key.
        tp_group: over which they are replicated.
    """

    config: Any

    def __init__(self, config: DecoderConfig, tensors: Sequence[OwnTensor], tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        for tensor in tensors:
            name = tensor.megatron.partition(".")[2]
            child, dot, _ = name.partition(".")
            if dot:
                within = replace(tensor, megatron=name)
                self.add_module(child, Coefficients(config, [within], tp_group))
                continue
            build = stream_projection if len(tensor.shape) > 1 else stream_coefficients
            with torch.device("cpu"):  # a model may be built on another, meta among them
                values = tensor.start(tensor.shape)
            setattr(self, name, build(config, values))

    # MegatronModule.sharded_state_dict, 0.19.2: as ExtendedLayer's, for what no layer owns.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's entries; none are looked for where a plain Transformer's are expected."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.expects_transformer:
            own = {prefix + name: p for name, p in self.named_parameters()}
            entries |= {name: LocalNonpersistentObject(p.data) for name, p in own.items()}
        return entries


def seeded_generator(seed: int, place: int) -> torch.Generator:
    """For the start of a tensor, alike on every rank and in every layout.

    Args:
        seed: Megatron's --seed.
        place: which tensor.
    """
    return torch.Generator("cpu").manual_seed(1_000_003 * seed + place)


def attach_end(chunk: Any, name: str, kind: type[Coefficients]) -> None:
    """Give the chunk that has layer L what the whole model owns, if it owns anything.

    Args:
        chunk: a GPTModel, not wrapped yet.
        name: of the module, below "decoder.".
        kind: its class.
    """
    decoder, config = chunk.decoder, chunk.config
    tensors = find_architecture(config.architecture).tensors(config, 0)
    last = decoder.layers[-1] if decoder.layers else None
    if tensors and last is not None and last.layer_number == config.num_layers:
        module = kind(config, tensors, decoder.pg_collection.tp)
        setattr(decoder, name, module)
        last.end = (module,)  # in a tuple, so that the layer does not own it too


def _transformer_was_read(layer: ExtendedLayer, _: Any) -> None:
    # All chunks have handed out their entries by now; what is saved from here on is whole.
    layer.config.expect_transformer(False)
