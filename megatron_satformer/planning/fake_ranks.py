"""One process as any rank of any layout: torch's fake process groups and fake tensors.

What is built is the model of a run, module by module; nothing has values, and nothing is sent. The
CPU backend must be active. Must not know: args, what is measured.
"""

import math
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.builder import DecoderModelBuilder, DecoderModelConfig
from megatron_satformer.parallel.stages import finish_chunks


@contextmanager
def pretend_ranks(preview: Namespace) -> Iterator[None]:
    """Megatron reads arguments as if --gpus processes had been started.

    Args:
        preview: the arguments as given; gets the number of processes, too.
    """
    name, before = "WORLD_SIZE", os.environ.get("WORLD_SIZE")
    preview.world_size = preview.gpus or preview.world_size
    os.environ[name] = str(preview.world_size)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def fake_rank(config: DecoderConfig, stage: int) -> Iterator[None]:
    """This process is the first tensor-parallel rank of a pipeline stage; tensors are fake.

    Data-parallel ranks hold alike, so there is one, or as many as experts need.

    Args:
        config: the model.
        stage: pipeline rank.
    """
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    cp = config.context_parallel_size
    experts = config.expert_model_parallel_size * (config.expert_tensor_parallel_size or tp)
    per_stage = math.lcm(tp * cp, experts)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=stage * per_stage, world_size=pp * per_stage
    )
    try:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            config.virtual_pipeline_model_parallel_size,
            context_parallel_size=cp,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=config.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        # Fake random states cannot be compared; inference's tracker keeps none.
        random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        # Constants that torch makes out of its modes' sight: random states, rotary tables.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_chunk(model: DecoderModelConfig, chunk: int, chunks: int) -> GPTModel:
    """One chunk of the model as `fake_rank` holds it.

    Args:
        model: of the run.
        chunk: place among all chunks, in the order the model runs them.
        chunks: how many there are.
    """
    config = model.transformer
    virtual = config.virtual_pipeline_model_parallel_size
    built = DecoderModelBuilder(model).build_model(
        ProcessGroupCollection.use_mpu_process_groups(),
        chunk == 0,
        chunk == chunks - 1,
        None if virtual is None else chunk // config.pipeline_model_parallel_size,
    )
    _convert(built, config)
    return finish_chunks([built])[0]


def _convert(module: torch.nn.Module, config: Any) -> None:
    """What Float16Module does: all of it in the dtype of the parameters."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dtype != config.params_dtype:
                cast = torch.nn.Parameter(parameter.detach().to(config.params_dtype))
                for key, value in vars(parameter).items():
                    with suppress(AttributeError):
                        setattr(cast, key, value)
                setattr(part, name, cast)


class Silu(torch.autograd.Function):
    """torch's silu, whose gradient autograd takes apart where tensors are fake."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """As torch.nn.functional.silu."""
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """In one kernel, as it is where tensors are real."""
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, x)
