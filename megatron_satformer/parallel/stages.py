"""The two ends of a pipeline chunk: unpack what came in, pack what goes out."""

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.architectures.record import Carry
from megatron_satformer.parallel import recompute
from megatron_satformer.parallel.carry import carry_behind, pack, unpack
from megatron_satformer.parallel.replicas import makes_v1_everywhere, replicate_v1


def finish_chunks(chunks: list[GPTModel]) -> list[GPTModel]:
    """Let the first and the last layer of every chunk unpack and pack.

    By hooks, which fit any layer class and run inside of recomputed functions, so that the packed
    tensor is what gets checkpointed. Chunks without layers hand on what they got. And no chunk
    keeps what it has received.

    Args:
        chunks: this rank's part of the model, not wrapped yet (a `pre_wrap_hooks` of Megatron's).

    Returns:
        The same chunks.
    """
    replicate_v1(chunks)
    for chunk in chunks:
        decoder, config = chunk.decoder, chunk.config
        architecture = find_architecture(config.architecture)
        packs = any(architecture.carries(config)) or makes_v1_everywhere(config)
        if packs or architecture.reads_tokens:
            recompute.activate()
        if not packs:
            continue
        decoder.register_forward_hook(_forget_input)
        if not decoder.layers:
            continue
        first, last = decoder.layers[0], decoder.layers[-1]
        enters = carry_behind(config, first.layer_number - 1)
        if any(enters):
            first.register_forward_pre_hook(_unpack_before(config, enters), with_kwargs=True)
        if any(carry_behind(config, last.layer_number)):
            last.register_forward_hook(_pack_behind)
    return chunks


def _unpack_before(config: DecoderConfig, carry: Carry) -> Callable[..., Any]:
    # TransformerBlock (0.19.2) gives its layers everything by name.
    def unpack_input(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_states, carried = unpack(kwargs["hidden_states"], config, carry)
        return args, kwargs | {"hidden_states": hidden_states, "context": carried}

    return unpack_input


def _pack_behind(_: Any, args: Any, output: tuple[Tensor, tuple[Tensor, ...]]) -> Any:
    return pack(*output), None


def _forget_input(decoder: Any, *_: Any) -> None:
    # TransformerBlock (0.19.2) would keep it, all that is carried included, until the next
    # micro-batch arrives.
    decoder.input_tensor = None
