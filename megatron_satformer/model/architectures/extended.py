"""Layers with parameters of their own beside a Transformer's, which its checkpoint can start.

Must not know: which.
"""

from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedStateDict
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.unsupported import Row

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


def _transformer_was_read(layer: ExtendedLayer, _: Any) -> None:
    # All chunks have handed out their entries by now; what is saved from here on is whole.
    layer.config.expect_transformer(False)
