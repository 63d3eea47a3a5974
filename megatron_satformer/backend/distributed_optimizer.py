"""Megatron's distributed optimizer with torch's AdamW and with fp32 models (0.19.2).

Needed on CPU, and on a GPU where neither Transformer Engine nor apex is installed:

- state_dict takes the step count from the state of the inner optimizer and asserts that there is
  exactly one; before the first step, and on a data-parallel rank whose shard is empty, there is
  none.
- load_state_dict gives all parameters one step tensor, which torch's AdamW then advances once per
  parameter, and overwrites it with a step that was never loaded: the bias correction of a resumed
  run would be wrong.
- _set_main_param_and_optimizer_states copies a loaded shard into a view of an fp32 parameter,
  which autograd forbids outside no_grad.
"""

from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_PLACEHOLDER = "no parameter has been stepped"
_plain_state_dict = DistributedOptimizer.state_dict
_plain_load_state_dict = DistributedOptimizer.load_state_dict
_plain_set = DistributedOptimizer._set_main_param_and_optimizer_states


def activate() -> None:
    """Mend all three; once per process, a second call changes nothing."""
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(_plain_set)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        DistributedOptimizer.state_dict = _state_dict
        DistributedOptimizer.load_state_dict = _load_state_dict


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
