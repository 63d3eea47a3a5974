"""What tests of the model run on forked ranks (see tests/zygote.py): real modules, gloo, fp32.

On a GPU, as tests/gpu/ does, with NCCL.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses import FakeTensorMode

from megatron_satformer.backend.device import choose_device
from megatron_satformer.checkpoint.convert.names import convert_to_megatron, iterate_names
from megatron_satformer.model import kernels
from megatron_satformer.model.architectures import PLAIN, find_architecture
from megatron_satformer.model.builder import (
    DecoderModelBuilder,
    DecoderModelConfig,
    build_layer_spec,
)
from megatron_satformer.model.parameters import count_parameters
from megatron_satformer.parallel.stages import finish_chunks
from tests.models import build_config, build_exported_config, build_twin
from tests.parallel.liveness import Storages

# Odd sizes: nothing here is a multiple of 16, so every kind of row padding occurs.
VOCABULARY, SEQUENCE, BATCH = 54, 19, 3
SHAPE = {
    "num_layers": 4,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 10,
    "ffn_hidden_size": 44,
}
RTOL = 1e-5  # of the largest element; in fp32 the two sides add up in different orders


def start(tp: int = 1, device: str = "cpu") -> None:
    cuda = choose_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)


def build(options: dict[str, Any], tied: bool = True) -> Any:
    """One whole Megatron model, every rank its tensor-parallel share."""
    base = {
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": torch.distributed.get_world_size(),
    }
    config = build_config(**base | SHAPE | options)
    model_config = DecoderModelConfig(
        transformer=config,
        transformer_layer_spec=build_layer_spec,
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = DecoderModelBuilder(model_config).build_model(groups, True, True).cuda()
    return finish_chunks([model])[0]


def build_reference(
    options: dict[str, Any], tied: bool = True, scale: float = 0.2
) -> tuple[Any, Any]:
    """The plain twin, its weights large enough that every path matters, and its exported config."""
    shape = SHAPE | options
    architecture = shape.get("architecture", "satformer")
    own = find_architecture(architecture).model_options
    model = build_twin(
        architecture,
        seed=5,
        scale=scale,
        vocab_size=VOCABULARY,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        head_dim=shape["kv_channels"],
        qk_norm=shape.get("qk_layernorm", True),
        attention_bias=shape.get("add_qkv_bias", False),
        tie_word_embeddings=tied,
        **{name: shape[name] for name in own if name in shape},
    )
    return model, build_exported_config(model.config)


def entries(model: Any, of: Callable[[Any], Any]) -> Iterator[tuple[str, tuple[slice, ...], Any]]:
    """Checkpoint key, place in the whole tensor, and `of(parameter)` for all that is saved."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for entry in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).values():
        if isinstance(entry, ShardedTensorFactory):
            built = entry.build_fn(entry.key, of(entry.data), entry.replica_id, None)
            pieces = list(built.values()) if isinstance(built, dict) else built
            tensors = [(piece, piece.data) for piece in pieces]
        elif isinstance(entry, ShardedTensor):
            tensors = [(entry, of(entry.data))]
        else:
            continue
        for piece, data in tensors:
            key, offset = piece.key, piece.global_offset
            if piece.prepend_axis_num:  # alike layers are one tensor with a leading layer axis
                key, offset = key.replace("layers.", f"layers.{offset[0]}."), offset[1:]
            ends = zip(offset, data.shape, strict=True)
            yield key, tuple(slice(start, start + n) for start, n in ends), data


def whole_tensors(tensors: dict[str, torch.Tensor], exported: Any) -> dict[str, torch.Tensor]:
    """Reference tensors under their checkpoint keys."""
    padded = VOCABULARY
    return {
        name.megatron: convert_to_megatron(name, tensors, exported, padded)
        for name in iterate_names(exported)
    }


def load(model: Any, reference: Any, exported: Any) -> None:
    whole = whole_tensors(reference.state_dict(), exported)
    loaded = set()
    with torch.no_grad():
        for key, place, data in entries(model, lambda parameter: parameter):
            data.copy_(whole[key][place])
            loaded.add(key)
    assert loaded == set(whole)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def mean_loss(model: Any) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs, labels = (ids.to(device) for ids in tokens())
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
    return model(inputs, positions, None, labels=labels).mean()


def close(
    name: str,
    got: torch.Tensor,
    wanted: torch.Tensor,
    rtol: float = RTOL,
) -> None:
    worst = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    assert worst <= rtol, f"{name}: {worst:.2e} of the largest element"


def equals_reference(options: dict[str, Any], tied: bool = True) -> None:
    """Loss, logits and every gradient of the Megatron model equal the reference's.

    In float64: rounding grows with weights as large as these, and the gradient of a coefficient is
    a sum over all tokens that may all but cancel. Formulas that differ do there too.
    """
    start(_world_size())
    model = build(options, tied)
    reference, exported = build_reference(options, tied)
    load(model, reference, exported)
    model.double()
    reference.double()
    inputs, labels = tokens()
    wanted = reference(inputs, labels)
    wanted.loss.backward()
    got = mean_loss(model)
    got.backward()
    close("loss", got, wanted.loss)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    whole = whole_tensors(gradients, exported)
    tp = _world_size()
    for parameter in model.parameters():
        if tp > 1 and getattr(parameter, "average_gradients_across_tp_domain", False):
            torch.distributed.all_reduce(parameter.grad)  # so does it for these: their mean
            parameter.grad /= tp
    for key, place, gradient in entries(model, lambda parameter: parameter.grad):
        replicated = gradient.shape == whole[key].shape and tp > 1
        if replicated and key.split(".")[-2] in ("q_layernorm", "k_layernorm"):
            torch.distributed.all_reduce(gradient)  # as finalize_model_grads does: sum over heads
        close(key, gradient, whole[key][place])
    check_padding(model)
    nothing_left(model)


def _world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def check_padding(model: Any) -> None:
    """Padding rows of linear_qkv: zero weight, exactly zero gradient, multiple of 16 in all."""
    for layer in model.decoder.layers:
        attention = layer.self_attention
        if getattr(attention, "gate_rows", 0):
            weight = attention.linear_qkv.weight
            padding = attention._row_counts[2]
            assert weight.size(0) % 16 == 0
            if padding:
                assert weight[-padding:].abs().max() == 0
                assert weight.grad[-padding:].abs().max() == 0


def nothing_left(model: Any) -> None:
    """No tensor stays on a module after the call: parameters and buffers are kept elsewhere."""
    for name, module in model.decoder.named_modules():
        for attribute, value in vars(module).items():
            held = value if isinstance(value, list | tuple) else [value]
            left = [item for item in held if isinstance(item, torch.Tensor)]
            assert not left, f"{attribute} stays on {name}"


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    own = find_architecture(options["architecture"]).own_options
    return {n: v for n, v in options.items() if n not in own} | {"architecture": PLAIN}


def starts_as_a_transformer(options: dict[str, Any]) -> None:
    """With its own tensors as built, loss and shared gradients equal the plain Transformer's."""
    start()
    options = options | {"layernorm_epsilon": 1e-14}
    ours, plain = build(options), build(_plain(options))
    shared = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in shared:
                shared[name].normal_(shared[name].mean().item(), 0.2)
                parameter.copy_(shared[name])
    losses = [mean_loss(ours), mean_loss(plain)]
    close("loss", *losses, 1e-6)
    for loss in losses:
        loss.backward()
    for name, parameter in ours.named_parameters():
        if name in shared:
            close(name, parameter.grad, shared[name].grad)


def holds_for_backward(options: dict[str, Any], most: float, times: float = 9.0) -> None:
    """Per layer, at most so many tensors like hidden_states more than a plain Transformer's.

    And at most so many times what that one holds.
    """
    start()
    held = []
    for given in (options, _plain(options)):
        bytes_of = []
        for layers in (3, 5):
            model = build(given | {"num_layers": layers})
            storages: dict[int, int] = {}

            def keep(tensor: torch.Tensor, storages: dict = storages) -> torch.Tensor:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                mean_loss(model)
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            bytes_of.append(sum(n for at, n in storages.items() if at not in own))
        one = BATCH * SEQUENCE * model.config.hidden_size * 4
        held.append((bytes_of[1] - bytes_of[0]) / 2 / one)
    print(f"held per layer: {held[0]:.2f}, a Transformer {held[1]:.2f}")
    assert held[0] - held[1] <= most, held
    assert held[0] <= times * held[1], held


def zero_gate_is_transformer() -> None:
    """With the gate at zero, losses and shared gradients equal the plain Transformer's."""
    start()
    satformer = build({"architecture": "satformer", "value_gate_init_std": 0.0})
    transformer = build({"architecture": "transformer"})
    for gate in (layer.self_attention for layer in satformer.decoder.layers[1:]):
        rows = gate._row_counts
        assert gate.linear_qkv.weight[rows[0] :].abs().max() == 0
    shared = dict(transformer.named_parameters())
    with torch.no_grad():
        for name, parameter in satformer.named_parameters():
            parameter[: len(shared[name])].copy_(shared[name])
    losses = [mean_loss(satformer), mean_loss(transformer)]
    for loss in losses:
        loss.backward()
    close("loss", losses[0], losses[1], 1e-6)
    for name, parameter in satformer.named_parameters():
        wanted = shared[name].grad
        close(name, parameter.grad[: len(wanted)], wanted, 1e-6)


def counts_parameters(options: dict[str, Any], tied: bool) -> None:
    """count_parameters equals the parameters of the built model, padding aside."""
    start()
    model = build(options, tied)
    padding = sum(
        layer.self_attention._row_counts[2] * model.config.hidden_size
        for layer in model.decoder.layers
        if getattr(layer.self_attention, "gate_rows", 0)
    )
    built = sum(parameter.numel() for parameter in model.parameters()) - padding
    counted = count_parameters(model.config, VOCABULARY, tied)
    assert counted.total == built, (counted, built)


def gate_init_std(std: float) -> None:
    """The gate rows have the standard deviation asked for, the q/k/v rows Megatron's."""
    start()
    model = build({"value_gate_init_std": std, "init_method_std": 0.02, "num_query_groups": 6})
    for layer in model.decoder.layers[1:]:
        attention = layer.self_attention
        qkv, gate, padding = attention.linear_qkv.weight.split(attention._row_counts)
        assert abs(qkv.std() / 0.02 - 1) < 0.1
        assert abs(gate.std() / std - 1) < 0.3
        assert padding.abs().max() == 0


def gate_bias_alone() -> None:
    """A gate bias without q/k/v biases: the shared bias vector moves in its gate rows only."""
    start()
    model = build({"architecture": "satformer", "value_gate_bias": True})
    mean_loss(model).backward()
    for layer in model.decoder.layers[1:]:
        attention = layer.self_attention
        qkv, gate, _ = attention.linear_qkv.bias.grad.split(attention._row_counts)
        assert qkv.abs().max() == 0
        assert gate.abs().max() > 0
    keys = [key for key, _, _ in entries(model, lambda parameter: parameter)]
    assert not any("linear_qkv.bias" in key for key in keys)
    assert sum("value_gate.bias" in key for key in keys) == 3


def gate_bias_init(value: float) -> None:
    """Biases of gates start where they are told to, those of q, k and v at 0."""
    start()
    for gate in ("relu", "lerp_channels", "constant"):
        options = {"value_gate": gate, "value_gate_bias": gate == "relu"}
        model = build(options | {"value_gate_bias_init": value})
        for attention in (layer.self_attention for layer in model.decoder.layers[1:]):
            if gate == "relu":
                qkv, biases, padding = attention.linear_qkv.bias.split(attention._row_counts)
                assert qkv.abs().max() == padding.abs().max() == 0
            else:
                own = attention.value_gate_up.bias if "lerp" in gate else attention.value_gate.alpha
                biases = own
            assert (biases == value).all()


def recompute_equals_plain(
    options: dict[str, Any], model_options: dict | None = None, rtol: float = 0.0
) -> None:
    """Recompute gives the same losses and gradients, bit by bit unless told otherwise."""
    start()
    results = []
    for recompute in ({}, options):
        torch.manual_seed(9)
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        model = build({"architecture": "satformer"} | (model_options or {}) | recompute)
        loss = mean_loss(model)
        loss.backward()
        results.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters()})
        nothing_left(model)
    for name, plain in results[0].items():
        close(name, results[1][name], plain, rtol)


def held_grows_linearly(options: dict[str, Any]) -> None:
    """What one forward leaves for backward, counted in whole activations, at 8, 16, 32 layers.

    Per-token weights grow with the square of the depth, and stay below one activation each.
    """
    start()
    wide = {"hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 8, "kv_channels": 32}
    held = []
    for layers in (8, 16, 32):
        model = build(options | wide | {"num_layers": layers})
        with Storages() as storages:
            loss = mean_loss(model)
        for parameter in model.parameters():  # a view of one is no activation
            storages.known.pop(parameter.untyped_storage()._cdata, None)
        held.append(storages.bytes_alive(least=SEQUENCE * BATCH * 256 * 4))
        del loss
    first, second = held[1] - held[0], held[2] - held[1]
    assert abs(second / (2 * first) - 1) < 0.02, held


def engine_holds_the_same_checkpoint(options: dict[str, Any]) -> None:
    """A checkpoint moves local -> Transformer Engine -> local without changing a value.

    Transformer Engine has no CPU kernels, but its modules construct and hold weights there.
    """
    start(_world_size())
    local = build(options)
    engine = build(
        options | {"transformer_impl": "transformer_engine"} | {"use_cpu_initialization": True}
    )
    theirs = {(key, str(place)): data for key, place, data in entries(engine, lambda p: p)}
    ours = {(key, str(place)): data for key, place, data in entries(local, lambda p: p)}
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    with torch.no_grad():
        before = {key: data.clone() for key, data in ours.items()}
        for key, data in theirs.items():
            data.copy_(ours[key])
        for data in ours.values():
            data.zero_()
        for key, data in ours.items():
            data.copy_(theirs[key])
            assert torch.equal(data, before[key]), key
    for mine, engines in zip(local.decoder.layers, engine.decoder.layers, strict=True):
        for name, parameter in mine.self_attention.linear_qkv.named_parameters():
            other = engines.self_attention.linear_qkv.get_parameter(name)
            assert torch.equal(other, parameter)


def forward_on_a_gpu_that_is_not_there(options: dict[str, Any]) -> None:
    """Fake tensors of device cuda refuse to meet those of another, and to tell the host a value."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    gpu = torch.device("cuda", 0)
    torch.cuda.current_device = lambda: gpu
    torch.nn.Module.cuda = lambda module: module  # fake parameters cannot be replaced
    kernels.usable = lambda *tensors, **sizes: False  # they have no address
    with FakeTensorMode():
        model = build({"perform_initialization": False} | options)
        assert {parameter.device for parameter in model.parameters()} == {gpu}
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64, device=gpu)
        losses = model(ids, ids, None, labels=ids)
    assert losses.device == gpu
    assert losses.shape == (BATCH, SEQUENCE)


def starts_with_shared_weights(options: dict[str, Any]) -> None:
    """With one seed, all that a plain Transformer has too begins as it does there."""
    start(int(os.environ["WORLD_SIZE"]))
    plain, mine = _first_weights({"architecture": PLAIN}), _first_weights(options)
    assert len(plain) >= 10 * SHAPE["num_layers"] - 2
    for place, whole in plain.items():
        assert torch.equal(put_together(mine, place), whole), place


def _first_weights(options: dict[str, Any]) -> dict[tuple, torch.Tensor]:
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(1234)
    model = build(options)
    return {(key, place): data.detach() for key, place, data in entries(model, lambda p: p)}


def put_together(
    tensors: dict[tuple, torch.Tensor], wanted: tuple[str, tuple[slice, ...]]
) -> torch.Tensor:
    """What a model has at a place of a tensor, which it may hold in pieces."""
    key, place = wanted
    whole = torch.full([part.stop - part.start for part in place], torch.nan)
    for (name, piece), data in tensors.items():
        if name == key:
            shifted = [
                slice(p.start - w.start, p.stop - w.start)
                for p, w in zip(piece, place, strict=True)
            ]
            if all(p.start >= 0 and p.stop <= n for p, n in zip(shifted, whole.shape, strict=True)):
                whole[tuple(shifted)] = data
    return whole
