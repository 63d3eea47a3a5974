"""Training with values that are no numbers in some steps, as a fault of the data or the machine."""

import os
import sys

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

import pretrain_satformer
from megatron_satformer.model.builder import DecoderModelBuilder


def train(argv: list[str], steps: list[int], rank: int, kind: str) -> None:
    """pretrain_satformer.main(), with one rank's second micro-batch bad in some steps.

    Args:
        argv: flags.
        steps: 1-based.
        rank: that meets it, of the first stage (a spike: of the last).
        kind: "loss", in its second sample; "gradients"; "once", a loss that is good when the step
            is made again; "spike", one that is only large.
    """
    build = DecoderModelBuilder.build_model
    made: dict[int, int] = {}  # forward passes by step

    def is_bad() -> bool:
        machine = get_rerun_state_machine()
        if machine.get_mode() == RerunMode.DISABLED or torch.distributed.get_rank() != rank:
            return False
        step = machine.current_iteration + 1
        made[step] = made.get(step, 0) + 1
        again = 2 + get_num_microbatches()
        return step in steps and made[step] in ((2,) if kind == "once" else (2, again))

    def spoil(module, inputs, output):
        if not is_bad():
            return output
        if kind == "gradients":
            output.register_hook(lambda gradient: gradient * torch.inf)
            return output
        output = output.clone()
        output[:, 1] *= 200.0 if kind == "spike" else torch.nan  # [s, b, h]
        return output

    def build_spoiled(builder, *args, **kwargs):
        model = build(builder, *args, **kwargs)
        if kind == "spike":
            if model.post_process:
                model.decoder.final_layernorm.register_forward_hook(spoil)
        elif model.pre_process:
            model.embedding.register_forward_hook(spoil)
        return model

    DecoderModelBuilder.build_model = build_spoiled
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()


def train_on_damaged(argv: list[str], step: int, prefix: str, how: str) -> None:
    """pretrain_satformer.main(), whose data set is damaged while a step is made.

    Args:
        argv: flags.
        step: 1-based.
        prefix: of the data set.
        how: "cut", to half of its tokens; "foreign", its tokens become 65000.
    """
    build = DecoderModelBuilder.build_model
    file = f"{prefix}.bin"
    done: list[str] = []

    def damage(module, inputs, output):
        if done or get_rerun_state_machine().current_iteration + 1 != step:
            return
        done.append(how)
        if how == "cut":
            os.truncate(file, os.path.getsize(file) // 2)
        else:
            np.memmap(file, np.uint16, "r+")[:] = 65_000

    def build_damaging(builder, *args, **kwargs):
        model = build(builder, *args, **kwargs)
        model.register_forward_hook(damage)
        return model

    DecoderModelBuilder.build_model = build_damaging
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
