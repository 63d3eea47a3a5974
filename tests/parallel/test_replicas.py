"""V1 made on every stage: payload, equal copies."""

import pytest
import torch

from megatron_satformer.parallel.carry import boundary_widths
from tests.models import build_config
from tests.parallel.layouts import FROM_IDS, MIXING, OPTIMIZER, PP2, VIRTUAL

STAGES = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "hidden_dropout": 0.0}
STAGES |= {"pipeline_model_parallel_size": 4, "pipeline_dtype": torch.float32}
STAGES |= {"transformer_impl": "local"}


@pytest.mark.parametrize("architecture", MIXING)
def test_payload_is_a_plain_transformers(architecture):
    assert boundary_widths(build_config(architecture, **STAGES)) == [16, 16, 16]
    config = build_config(architecture, **STAGES, v1_transport="recompute")
    assert boundary_widths(config) == [8, 8, 8]


@pytest.mark.slow
def test_copies_stay_equal(zygote, started):
    """20 steps from one rank's checkpoint."""
    flags, _ = started("satformer")
    flags = [*flags, *PP2.split(), *VIRTUAL.split(), *OPTIMIZER.split(), *FROM_IDS.split()]
    argv = [*map(str, flags), "--train-iters", "20"]
    run = zygote.run(4, call="tests.parallel.replicas:train", args=[argv])
    assert run.codes == [0] * 4, run.output[-6000:]
