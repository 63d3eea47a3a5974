"""The two ends of a pipeline chunk: unpack what came in, pack what goes out."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.model.layer import ValueResidualLayer
from megatron_satformer.parallel.carry import (
    boundary_is_packed,
    carried_width,
    chunk_layers,
    pack,
    unpack,
)


class StageLayer(ValueResidualLayer):
    """ValueResidualLayer that unpacks at the entry of a pipeline chunk and packs at its exit."""

    def __init__(self, config: SATFormerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        number = self.layer_number
        chunks = chunk_layers(config)
        index = next(i for i, layers in enumerate(chunks) if number in layers)
        first, last = number == chunks[index][0], number == chunks[index][-1]
        self.enters = first and index > 0 and boundary_is_packed(config, number - 1)
        self.leaves = last and index < len(chunks) - 1 and boundary_is_packed(config, number)

    # TransformerLayer.forward, 0.19.2: the narrowest place that sees the layer's whole input and
    # output; inside it also under recompute, so the packed tensor is what gets checkpointed.
    def forward(
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As TransformerLayer.forward; `context` is V1, [s, b, ng/tp, hn]."""
        if self.enters:
            hidden_states, context = unpack(hidden_states, self.config)
        hidden_states, v1 = super().forward(hidden_states, *args, context=context, **kwargs)
        if self.leaves:
            return pack(hidden_states, v1), None
        return hidden_states, v1


def finish_chunks(chunks: list[GPTModel]) -> list[GPTModel]:
    """What layers cannot do at the ends of a chunk.

    Chunks that hold only the embedding or only the loss get the width of their boundary. Those in
    between hand on what they got, so only the two ends of the model need it, and only in the
    interleaved schedule; see `boundary_is_packed`. And no chunk keeps what it has received.

    Args:
        chunks: this rank's part of the model, not wrapped yet (a `pre_wrap_hooks` of Megatron's).

    Returns:
        The same chunks.
    """
    for chunk in chunks:
        decoder, config = chunk.decoder, chunk.config
        if not decoder.layers:
            if chunk.pre_process and boundary_is_packed(config, 0):
                decoder.register_forward_hook(_pad)
            if chunk.post_process and boundary_is_packed(config, config.num_layers):
                decoder.register_forward_pre_hook(_drop_v1)
        if config.architecture != "transformer":
            decoder.register_forward_hook(_forget_input)
    return chunks


def _pad(decoder: Any, _: Any, hidden_states: Tensor) -> Tensor:
    return torch.nn.functional.pad(hidden_states, (0, carried_width(decoder.config)))


def _drop_v1(decoder: Any, _: Any) -> None:
    # TransformerBlock (0.19.2) takes what its stage received from this attribute.
    decoder.input_tensor, _v1 = unpack(decoder.input_tensor, decoder.config)


def _forget_input(decoder: Any, *_: Any) -> None:
    # TransformerBlock (0.19.2) would keep it, V1 included, until the next micro-batch arrives.
    decoder.input_tensor = None
