"""The CPU backend: makes the published megatron-core wheel (0.19.2) run on CPU with gloo.

Megatron has no CPU path. `activate` replaces what it asks of torch.cuda, and nothing else, so that
every parallel layout can be run, debugged and tested on a laptop. Never active when CUDA is used.
Each patch has one line that says which Megatron call needs it.
"""

import contextlib
import copy
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_satformer.backend.process_memory import resident

CPU = torch.device("cpu")
_active = False


def activate() -> None:
    """Install every patch; once per process, a second call does nothing."""
    global _active
    if not _active:
        _active = True
        _patch_cuda_module()
        _patch_factories()
        _patch_tensors()
        _patch_distributed()
        _patch_megatron()


class _Stream:
    """torch.cuda.Stream and Event: the CPU runs everything in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "_Stream") -> float:
        return (end.time - self.time) * 1e3  # ms

    def query(self) -> bool:
        return True

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_Stream":
        return _Stream()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Properties:
    """The newest architecture: older ones need CUDA_DEVICE_MAX_CONNECTIONS for ordering."""

    major = 10


def _constant(value: Any) -> Callable[..., Any]:
    # A new function each time: torch.compile refuses one object under two names.
    return lambda *args, **kwargs: value


def _held(what: str, *_: Any) -> int:
    return resident(what)


def _patch_cuda_module() -> None:
    cuda = torch.cuda
    replacements: dict[str, Any] = {
        "is_available": _constant(True),  # initialize_megatron asserts it
        "device_count": _constant(1),  # _initialize_distributed skips model parallel at 0
        "current_device": _constant(CPU),  # device= of every buffer Megatron allocates
        "set_device": _constant(None),  # _initialize_distributed
        "synchronize": _constant(None),  # timers, batched p2p
        "empty_cache": _constant(None),  # evaluate_and_print_results, checkpointing
        "Stream": _Stream,  # DDP construction, overlapped communication
        "Event": _Stream,  # distributed optimizer, straggler timer
        "current_stream": _constant(_Stream()),  # DDP construction
        "default_stream": _constant(_Stream()),  # StragglerDetector, schedules
        "stream": _constant(contextlib.nullcontext()),  # DDP construction
        "get_device_capability": _constant((10, 0)),  # validate_args
        "get_device_properties": _constant(_Properties()),  # validate_args
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),  # RNG tracker, checkpointing
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),  # same
        "manual_seed": torch.manual_seed,  # model_parallel_cuda_manual_seed
        "is_initialized": _constant(True),  # RNG tracker
        "default_generators": {CPU: torch.default_generator},  # RNG tracker
        "memory_allocated": partial(_held, "VmRSS"),  # report_memory, log_memory
        "max_memory_allocated": partial(_held, "VmHWM"),  # report_memory
        "memory_reserved": partial(_held, "VmRSS"),  # report_memory
        "max_memory_reserved": partial(_held, "VmHWM"),  # report_memory
        "device_memory_used": partial(_held, "VmRSS"),  # report_memory
        "memory_stats": _constant({}),  # log_memory_to_tensorboard
        "is_current_stream_capturing": _constant(False),  # optimizer steps, CUDA graphs
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    torch.accelerator.current_accelerator = _constant(None)  # Adam's graph capture check
    cuda.random.get_rng_state = replacements["get_rng_state"]  # RNG tracker
    cuda.nvtx.range_push = _constant(None)  # nvtx_range_push in every layer
    cuda.nvtx.range_pop = _constant(None)  # same


def _patch_factories() -> None:
    """`device="cuda"`, which Megatron writes out in places, becomes the CPU."""
    names = (
        "tensor zeros ones empty full arange rand randn randint as_tensor empty_strided empty_like"
    )
    for name in names.split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # --ckpt-fully-parallel-load: the factory is a default, bound when the class was made.
    ShardedTensor.init_data.__defaults__ = (torch.empty,)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    build.__name__ = factory.__name__
    return build


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


def _patch_tensors() -> None:
    plain_type, plain_to = torch.Tensor.type, torch.Tensor.to

    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # Float16 optimizers sort parameters by the names of CUDA tensor types.
        if dtype is None:
            return plain_type(self).replace("torch.", "torch.cuda.")
        return plain_type(
            self, str(dtype).replace("cuda.", "") if isinstance(dtype, str) else dtype
        )

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if isinstance(a, str) and _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return plain_to(self, *args, **kwargs)

    torch.Tensor.type = type_
    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # get_batch, p2p
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # model to device
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # data loader


def _patch_distributed() -> None:
    dist = torch.distributed
    plain_all_reduce, plain_barrier = dist.all_reduce, dist.barrier
    plain_all_gather = dist.all_gather

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        # gloo has no AVG (averaged gradients of replicated parameters).
        if op != dist.ReduceOp.AVG:
            return plain_all_reduce(tensor, op=op, **kwargs)
        assert not kwargs.get("async_op"), "AVG is emulated synchronously"
        plain_all_reduce(tensor, op=dist.ReduceOp.SUM, **kwargs)
        tensor.div_(dist.get_world_size(kwargs.get("group")))
        return None

    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        # gloo takes no device_ids (initialize_model_parallel).
        return plain_barrier(*args, **kwargs)

    def all_gather(tensors: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kw: Any) -> Any:
        # gloo has no ranks that give more than others (LayerWiseDistributedOptimizer).
        most = max(x.numel() for x in tensors)
        if all(x.numel() == most for x in tensors):
            return plain_all_gather(tensors, tensor, *args, **kw)
        assert not kw.get("async_op"), "ranks of many sizes are emulated synchronously"
        padded = [tensor.new_empty(most) for _ in tensors]
        mine = torch.cat((tensor.flatten(), tensor.new_empty(most - tensor.numel())))
        plain_all_gather(padded, mine, *args, **kw)
        for place, whole in zip(tensors, padded, strict=True):
            place.copy_(whole[: place.numel()].view(place.shape))
        return None

    dist.all_reduce, dist.barrier, dist.all_gather = all_reduce, barrier, all_gather


def _patch_megatron() -> None:
    import torch.utils.data
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import training

    def move_to_cpu(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
        # MoEAlltoAllTokenDispatcher sends in splits of numpy, which it makes of CUDA tensors only.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # update_seqlen_stats_from_cu_seqlens would put it on device "cuda:cpu" (packed documents).
    training._seqlen_stats_in_iteration = torch.zeros(2, dtype=torch.float64)
    PersistentAsyncCaller.async_loop = staticmethod(_async_loop)
    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu
    # The RNG tracker warns when random numbers move the CPU's generator: here there is no other.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    torch.compiler.set_stance("force_eager")  # jit_fuser compiles for a GPU that is not there

    plain_init = torch.utils.data.DataLoader.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # build_pretraining_data_loader always pins memory. A generator of its own, because every
        # iterator draws a seed, and dropout on a GPU never sees that.
        kwargs = {"generator": torch.Generator()} | kwargs
        plain_init(self, *args, **kwargs | {"pin_memory": False})

    torch.utils.data.DataLoader.__init__ = init


def _async_loop(*args: Any, **kwargs: Any) -> None:
    """PersistentAsyncCaller's worker (--async-save): a process of its own, without our patches."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    plain_preload = writer.preload_tensors

    def preload_tensors(*args: Any, **kwargs: Any) -> Any:
        # .to("cpu") copies nothing here, and the next step changes what is being written.
        return copy.deepcopy(plain_preload(*args, **kwargs))

    writer.preload_tensors = staticmethod(preload_tensors)
    _patch_cuda_module()  # it sets a CUDA device
    async_utils.PersistentAsyncCaller.async_loop(*args, **kwargs)
