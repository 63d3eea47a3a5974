"""What tests of the stage boundary run on forked ranks (see tests/zygote.py)."""

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_satformer.backend.device import choose_device
from megatron_satformer.parallel.carry import boundary_widths
from megatron_satformer.parallel.p2p import CarryP2PCommunicator
from tests.parallel.test_carry import build_config


def sends_and_receives(options: dict, one_stream: bool = False) -> None:
    """What one stage packs is what the next receives; the gradient returns as wide."""
    choose_device("cpu")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = build_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **options)
    (width,) = boundary_widths(config)
    rows = (15, 1) if one_stream else (5, 3)
    packed = torch.arange(5.0 * 3 * width).view(*rows, width)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    communicator = CarryP2PCommunicator(groups.pp, config, 1, one_stream)
    shape = (5, 3, 24)  # what Megatron's schedules ask for
    if groups.pp.rank() == 0:
        communicator.send_forward(packed, is_last_stage=False)
        assert torch.equal(communicator.recv_backward(shape, is_last_stage=False), 2 * packed)
    else:
        received = communicator.recv_forward(shape, is_first_stage=False)
        assert torch.equal(received, packed)
        communicator.send_backward(2 * received.detach(), is_first_stage=False)


def widths_in_order(options: dict, microbatches: int, before: list, behind: list) -> None:
    """The interleaved schedule's receives, on every rank, in the order in which they come."""
    choose_device("cpu")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = build_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **options)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    communicator = CarryP2PCommunicator(groups.pp, config, microbatches)
    for _ in range(2):  # every schedule starts again
        with torch.no_grad():
            communicator._start_interleaved()
        rank = groups.pp.rank()
        assert [*communicator._widths_before] == before[rank]
        assert [*communicator._widths_behind] == behind[rank]
