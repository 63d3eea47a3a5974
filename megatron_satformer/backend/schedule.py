"""A run that goes on ends where it was asked to end, on the learning rates it was asked for.

What the checkpoint's comparison has decided (checkpoint/megatron/resume.py) reaches Megatron here,
on every rank. megatron.training (0.19.2) counts the steps of a sample-based run as if all had had
today's batch; its scheduler starts anew where the optimizer's state is not read, and refuses every
value that differs; and the optimizer finds the groups of its state by the learning rates they had,
and keeps those, as it keeps the old betas.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    update_num_microbatches,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

# What a parameter group is found by, and what it is stepped with.
RATES = ("max_lr", "min_lr")
OF_GROUP = (*RATES, "betas", "eps", "momentum")


@dataclass(frozen=True)
class Continuation:
    """How a run goes on from a checkpoint.

    Attributes:
        step: Steps that are done.
        samples: Samples that are done.
        reached: Samples of the learning rate's schedule that are done: without the steps that fp16
            skipped.
        end: Samples with which it ends.
        last_step: The step with which it ends; None where the batch grows by a schedule.
        schedule: OptimizerParamScheduler's arguments, and its state, in samples.
        options: Of Megatron's arguments, those that take other values than given.
        rates: Options with the learning rates of the run that saved it, by which the groups of its
            optimizer are found; None where its optimizer and schedule are not read.
    """

    step: int
    samples: int
    reached: int
    end: int
    last_step: int | None
    schedule: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, Any] | None = None


def share(known: Any) -> Any:
    """Gives every rank what rank 0 knows; the process groups are there.

    Args:
        known: On rank 0.
    """
    held = [known]
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def activate(plan: Continuation, args: Namespace) -> None:
    """Lets Megatron follow the plan; before it builds optimizer and schedule.

    Args:
        plan: From `share`.
        args: Megatron's, which take the plan's values.
    """
    vars(args).update(plan.options)
    if args.train_iters and plan.last_step is not None:
        args.train_iters = plan.last_step

    class Scheduler(_Scheduler):
        continuation = plan

    training.OptimizerParamScheduler = Scheduler
    training.update_train_iters = lambda args: _count_steps(plan, args)


def _count_steps(plan: Continuation, args: Namespace) -> None:
    # Megatron's update_train_iters (0.19.2), from the samples on that are done.
    if args.train_iters:
        return
    step, samples = plan.step, plan.samples
    if plan.last_step is not None:
        step = plan.last_step
    else:
        while samples < plan.end:
            update_num_microbatches(samples, consistency_check=False)
            samples += get_current_global_batch_size()
            step += 1
        update_num_microbatches(0, consistency_check=False)
    args.train_iters = step


class _Scheduler(OptimizerParamScheduler):
    continuation: Continuation

    def __init__(self, optimizer: Any, **options: Any) -> None:
        plan = self.continuation
        known = {name: value for name, value in plan.schedule.items() if name in options}
        super().__init__(optimizer, **options | known)
        # What differs is asked for, and has been told: the values given count.
        self.override_opt_param_scheduler = True
        self.use_checkpoint_opt_param_scheduler = False
        self.asked: list[dict[str, Any]] = []
        if plan.rates is None:
            self.step(plan.reached)
        else:
            self._show_rates_then(plan.rates)

    def _show_rates_then(self, rates: Mapping[str, Any]) -> None:
        """Lets groups have, until the state is loaded, the rates that they were saved with."""
        now = training.get_args()
        then = {rate: _group_values(Namespace(**vars(now) | dict(rates)), rate) for rate in RATES}
        for group in self.optimizer.param_groups:
            self.asked.append({name: group[name] for name in OF_GROUP if name in group})
            for rate in RATES:
                pairs = zip(_group_values(now, rate), then[rate], strict=True)
                group[rate] = dict(pairs).get(group[rate], group[rate])

    # OptimizerParamScheduler's, 0.19.2: the optimizer's state has just been loaded.
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, asked in zip(self.optimizer.param_groups, self.asked, strict=True):
            group.update(asked)
        super().load_state_dict(state_dict)


def _group_values(args: Namespace, rate: str) -> list[Any]:
    """A rate in the base group, and in every group that has its own."""
    config, overrides = training.get_megatron_optimizer_config(args)
    base = {"max_lr": config.lr, "min_lr": config.min_lr}[rate]
    return [base, *(values.get(rate, base) for values in (overrides or {}).values())]
