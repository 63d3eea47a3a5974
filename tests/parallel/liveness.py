"""What test_liveness.py runs on forked ranks: main(), and all that is carried watched.

A storage is watched by a weak reference, so it is seen to live as long as anything holds it, a
Python name or a node of the autograd graph. Python's cycle collector is off: what dies, dies by
reference counting. Functions of Megatron and of this project are wrapped, never replaced.
"""

import ctypes
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import training
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pretrain_satformer
from megatron_satformer.model.architectures import all_architectures, find_architecture
from megatron_satformer.parallel import stages

# What is watched: what layers made to be carried, and what a chunk received and made for others.
MADE, RECEIVED, SENT = "made", "received", "sent"
SCALAR = 8  # bytes


class Flight:
    """What one micro-batch made in one chunk, between its forward and its backward."""

    def __init__(self, starts: bool) -> None:
        self.starts = starts  # whether its chunk is the model's first
        self.storages: list[tuple[str, StorageWeakRef]] = []

    def watch(self, kind: str, tensor: torch.Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        # What is unpacked lies in the buffer received, which is counted already.
        if all((known, ref.cdata) != (RECEIVED, storage.cdata) for known, ref in self.storages):
            self.storages.append((kind, storage))

    def alive(self) -> Counter:
        # By address: the same storage may have been seen twice.
        alive = {(kind, ref.cdata) for kind, ref in self.storages if _holds_memory(ref)}
        return Counter(kind for kind, _ in alive)


def _holds_memory(ref: StorageWeakRef) -> bool:
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)  # None if nobody holds it
    return storage is not None and storage.nbytes() > 0


class Watch:
    """Follows every micro-batch of every chunk through Megatron's schedules."""

    def __init__(self) -> None:
        self.flights: list[Flight] = []
        self.pending: dict[int, Flight] = {}  # by the output that its backward starts from
        self.current: Flight | None = None
        self.schedules: list[dict] = []
        self.chunks: list[Any] = []
        self.before_schedule: Callable[[], None] = lambda: None

    def install(self) -> None:
        for layer in {record.layer for record in all_architectures()}:
            self._wrap_layer(layer)
        self._wrap_ends()
        self._wrap_steps()
        self._wrap_schedule()

    def alive(self) -> Counter:
        return sum((flight.alive() for flight in self.flights), Counter())

    def note(self, event: str) -> Counter:
        alive = self.alive()
        in_flight = len(self.pending)
        starting = sum(flight.starts for flight in self.pending.values())
        counts = [event, in_flight, starting, *(alive[kind] for kind in (MADE, RECEIVED, SENT))]
        self.schedules[-1]["events"].append(counts)
        return alive

    def _wrap_layer(self, layer: type) -> None:
        plain = layer.forward

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            output = plain(module, *args, **kwargs)
            for tensor in output[1] or ():
                self.current.watch(MADE, tensor)
            return output

        layer.forward = forward

    def _wrap_ends(self) -> None:
        pack, unpack = stages.pack, stages.unpack

        def watched_pack(hidden_states: torch.Tensor, carried: tuple) -> torch.Tensor:
            packed = pack(hidden_states, carried)
            self.current.watch(SENT, packed)
            return packed

        def watched_unpack(packed: torch.Tensor, *args: Any) -> Any:
            self.current.watch(RECEIVED, packed)
            return unpack(packed, *args)

        stages.pack, stages.unpack = watched_pack, watched_unpack

    def _wrap_steps(self) -> None:
        plain_forward, plain_backward = schedules.forward_step, schedules.backward_step

        # Positions as in schedules.forward_step and backward_step, 0.19.2.
        def forward_step(*args: Any, **kwargs: Any) -> Any:
            self.note("forward starts")
            received = _first(args[4])
            self.current = Flight(received is None)
            self.flights.append(self.current)
            if received is not None:
                self.current.watch(RECEIVED, received)
                del received
            result = plain_forward(*args, **kwargs)
            output = _first(result[0])
            if not kwargs.get("is_last_stage", True):
                self.current.watch(SENT, output)
            if torch.is_grad_enabled():
                self.pending[id(output)] = self.current
            del output
            self.note("forward ended")
            return result

        def backward_step(input_tensor: Any, output_tensor: Any, *args: Any) -> Any:
            flight = self.current = self.pending.pop(id(_first(output_tensor)))
            result = plain_backward(input_tensor, output_tensor, *args)
            self.note("backward ended")
            dead = flight.alive()
            assert not dead[MADE], "what is carried outlives the backward of its micro-batch"
            assert not dead[SENT], "what was sent outlives the backward of its micro-batch"
            return result

        schedules.forward_step, schedules.backward_step = forward_step, backward_step

    def _wrap_schedule(self) -> None:
        plain_get = training.get_forward_backward_func

        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            plain = plain_get(*args, **kwargs)

            def forward_backward(**kwargs: Any) -> Any:
                gc.disable()
                self.chunks = kwargs["model"]
                self.schedules.append({"forward_only": kwargs["forward_only"], "events": []})
                self.before_schedule()
                result = plain(**kwargs)
                alive = self.note("schedule ended")
                assert not alive[MADE], f"{alive[MADE]} carried alive after the schedule"
                assert not alive[SENT], f"{alive[SENT]} outputs alive after the schedule"
                config = self.chunks[0].config
                carries = find_architecture(config.architecture).carries(config)
                if any(carries):  # a plain Transformer keeps its last
                    assert not alive[RECEIVED], f"{alive[RECEIVED]} received alive after it"
                self.flights.clear()
                return result

            return forward_backward

        training.get_forward_backward_func = get_forward_backward_func

    def check_modules(self) -> None:
        """No tensor on any layer or its attention: parameters and buffers are kept elsewhere."""
        layers = [m for chunk in self.chunks for m in chunk.modules()]
        layers = [layer for layer in layers if isinstance(layer, TransformerLayer)]
        assert layers
        for layer in layers:
            for name, value in (*vars(layer).items(), *vars(layer.self_attention).items()):
                held = value if isinstance(value, list | tuple) else [value]
                left = [item for item in held if isinstance(item, torch.Tensor)]
                assert not left, f"{name} stays on layer {layer.layer_number}"


def _first(tensors: Any) -> Any:
    return tensors[0] if isinstance(tensors, list) else tensors


def _write(record: str, result: Any) -> None:
    Path(f"{record}.{os.environ['RANK']}").write_text(json.dumps(result))


def lives(record: str, argv: list[str]) -> None:
    """Run main(), check all that is carried, and write what was alive when.

    Args:
        record: file to write, as JSON, with ".<rank>" appended.
        argv: flags of pretrain_satformer.py.
    """
    watch = Watch()
    watch.install()
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
    _write(record, watch.schedules)


def dies(argv: list[str], rank: int, layer_number: int, part: str) -> None:
    """An exception inside a forward pass, in the second step, leaves nothing behind.

    Args:
        argv: flags of pretrain_satformer.py.
        rank: the one that fails; the others lose their neighbour.
        layer_number: in which layer.
        part: in which of the layer's modules, "self_attention.core_attention" for example.
    """
    watch = Watch()
    watch.install()
    calls = Counter()

    def fail_in_the_third(*_: Any) -> None:
        calls[part] += 1
        if calls[part] == 3:
            raise ArithmeticError("as asked")

    def before_schedule() -> None:
        if len(watch.schedules) == 2 and int(os.environ["RANK"]) == rank:
            for chunk in watch.chunks:
                for module in chunk.modules():
                    number = getattr(module, "layer_number", None)
                    if number == layer_number and isinstance(module, TransformerLayer):
                        module.get_submodule(part).register_forward_pre_hook(fail_in_the_third)

    watch.before_schedule = before_schedule
    sys.argv = ["pretrain_satformer.py", *argv]
    try:
        pretrain_satformer.main()
    except ArithmeticError:
        assert int(os.environ["RANK"]) == rank
    except RuntimeError:
        assert int(os.environ["RANK"]) != rank
    else:
        raise AssertionError("main() did not fail")
    assert len(watch.schedules) == 2
    watch.check_modules()
    for chunk in watch.chunks:
        for module in chunk.modules():
            # Megatron's own (0.19.2): keeps the graph of a forward that fails in the MLP until
            # the layer's next one, in a plain Transformer too.
            if getattr(module, "mlp_norm_manager", None) is not None:
                module.mlp_norm_manager = None
    gc.collect()  # a traceback and its frames may form a cycle
    alive = watch.alive()
    assert not alive[MADE], f"{alive[MADE]} carried alive after the exception"


class Storages(TorchDispatchMode):
    """Every storage that an operator returned, by weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # An address is not reused while a weak reference to it exists.
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes_alive(self, least: int = SCALAR + 1) -> int:
        """Of all storages of `least` bytes and more.

        Without scalars by default: gloo's thread may hold the last reduced one a moment longer.
        """
        self.known = {a: known for a, known in self.known.items() if not known[0].expired()}
        return sum(size for _, size in self.known.values() if size >= least)


def _process_bytes() -> int:
    """Memory of the process that no file backs; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back: no allocator's caches
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def memory(record: str, argv: list[str]) -> None:
    """Run main() and write, after every step, the bytes of live tensors and the process's own."""
    storages = Storages()
    steps: list[list[int]] = []
    plain = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        gc.disable()
        with storages:
            result = plain(*args, **kwargs)
        alive = storages.bytes_alive()
        steps.append([alive, _process_bytes()])
        return result

    training.train_step = train_step
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
    _write(record, steps)
