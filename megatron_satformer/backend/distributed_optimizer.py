"""What Megatron's distributed optimizer (0.19.2) needs mended to keep and find its state.

Needed everywhere:

- sharded_param_state_fully_reshardable (--dist-ckpt-optim-fully-reshardable) closes the gaps
  between buckets and then looks parameters up where they are with the gaps: behind a bucket whose
  size is not a multiple of its padding, weights and moments would be saved shifted, the last ones
  as zeros. Several buckets come with --overlap-grad-reduce, tied embeddings on several stages, and
  ResFormer's shared lambdas.

Needed on CPU, and on a GPU where neither Transformer Engine nor apex is installed:

- state_dict takes the step count from the state of the inner optimizer and asserts that there is
  exactly one; before the first step, and on a data-parallel rank whose shard is empty, there is
  none.
- load_state_dict gives all parameters one step tensor, which torch's AdamW then advances once per
  parameter, and overwrites it with a step that was never loaded: the bias correction of a resumed
  run would be wrong.
- _set_main_param_and_optimizer_states copies a loaded shard into a view of an fp32 parameter,
  which autograd forbids outside no_grad; and it asks for a step that the fully reshardable format
  does not hold, so that no checkpoint of that format could be loaded.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_PLACEHOLDER = "no parameter has been stepped"
_plain_state_dict = DistributedOptimizer.state_dict
_plain_load_state_dict = DistributedOptimizer.load_state_dict
_plain_set = DistributedOptimizer._set_main_param_and_optimizer_states
_plain_fully_reshardable = DistributedOptimizer.sharded_param_state_fully_reshardable


def activate() -> None:
    """Mend all of it; once per process, a second call changes nothing."""
    DistributedOptimizer.sharded_param_state_fully_reshardable = _fully_reshardable
    DistributedOptimizer._set_main_param_and_optimizer_states = _set
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        DistributedOptimizer.state_dict = _state_dict
        DistributedOptimizer.load_state_dict = _load_state_dict


def _fully_reshardable(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
    with contextlib.ExitStack() as told_padded:
        for buffer in self.buffers:
            told_padded.enter_context(_as_unpadded(buffer, buffer.numel))
            for bucket in buffer.buckets:
                told_padded.enter_context(_as_unpadded(bucket, bucket.grad_data.numel()))
        return _plain_fully_reshardable(self, *args, **kwargs)


@contextlib.contextmanager
def _as_unpadded(holder: Any, numel: int) -> Iterator[None]:
    """Let a buffer or a bucket count its padding as contents, so that no gap is closed."""
    unpadded, holder.numel_unpadded = holder.numel_unpadded, numel
    try:
        yield
    finally:
        holder.numel_unpadded = unpadded


@torch.no_grad()
def _set(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict) -> None:
    # What is not a tensor is left alone: _load_state_dict sets the step.
    _plain_set(self, model_param, {"step": None, **tensors})


def _state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    state = self.optimizer.state
    if state:
        return _plain_state_dict(self)
    state[_PLACEHOLDER] = {"step": torch.tensor(0.0)}
    try:
        return _plain_state_dict(self)
    finally:
        del state[_PLACEHOLDER]


def _load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    _plain_load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = torch.tensor(float(state_dict["optimizer"]["param_groups"][0]["step"]))
