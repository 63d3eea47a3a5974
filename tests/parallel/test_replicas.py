"""V1 made on every stage: payload, equal copies, checkpoints without them."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_satformer.parallel.carry import boundary_widths
from tests.models import build_config
from tests.parallel.layouts import FROM_IDS, MIXING, PP2, VIRTUAL
from tests.small import RTOL

STAGES = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "hidden_dropout": 0.0}
STAGES |= {"pipeline_model_parallel_size": 4, "pipeline_dtype": torch.float32}
STAGES |= {"transformer_impl": "local"}


def keys(folder, step):
    return set(FileSystemReader(folder / f"iter_{step:07d}").read_metadata().state_dict_metadata)


@pytest.mark.parametrize("architecture", MIXING)
def test_payload_is_a_plain_transformers(architecture):
    assert boundary_widths(build_config(architecture, **STAGES)) == [16, 16, 16]
    config = build_config(architecture, **STAGES, v1_transport="recompute")
    assert boundary_widths(config) == [8, 8, 8]


@pytest.mark.slow
def test_copies_stay_equal_and_are_not_saved(zygote, pretrain, started, tmp_path):
    """20 steps from one rank's checkpoint; they go on alike, V1 carried or not."""
    flags, _ = started("satformer")
    load = flags.index("--load")
    source, flags = flags[load + 1], [*flags[:load], "--lr-decay-iters", 30]
    flags += [*PP2.split(), *VIRTUAL.split()]
    first = [
        *flags,
        *FROM_IDS.split(),
        "--train-iters",
        20,
        "--save",
        tmp_path,
        "--save-interval",
        20,
    ]
    first += ["--load", source, "--finetune", "--no-load-optim", "--no-load-rng"]
    run = zygote.run(4, call="tests.parallel.replicas:train", args=[[*map(str, first)]])
    assert run.codes == [0] * 4, run.output[-6000:]
    saved = keys(tmp_path, 20)
    assert not any("v1_source" in key for key in saved)
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in saved
    longer = [*flags, "--load", tmp_path, "--train-iters", 22]
    again = pretrain(4, *longer, *FROM_IDS.split())
    carried = pretrain(4, *longer)
    assert len(again.losses) == 2
    assert carried.losses == pytest.approx(again.losses, rel=RTOL)
    assert carried.grad_norms == pytest.approx(again.grad_norms, rel=RTOL)
