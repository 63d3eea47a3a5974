"""V1 made on every stage: payload, equal copies, checkpoints that know nothing of it."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.parallel.carry import boundary_widths
from tests.checkpoint.megatron.test_resharding import (
    RESHARDABLE,
    SAVED,
    differing,
    read_all,
    save_at_once,
)
from tests.models import build_config
from tests.parallel.layouts import FROM_IDS, MIXING, OPTIMIZER, PP2, PP4, VIRTUAL
from tests.small import SHAPE

STAGES = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "hidden_dropout": 0.0}
STAGES |= {"pipeline_model_parallel_size": 4, "pipeline_dtype": torch.float32}
STAGES |= {"transformer_impl": "local"}
# On 4 ranks, two data-parallel ones: rank 0 has originals, and copies in its second chunk.
BOTH_ON_ONE_RANK = f"{PP2} {VIRTUAL} {OPTIMIZER}"


@pytest.fixture
def train_and_compare(zygote):
    """Trains on 4 ranks; every copy ends with the original's bits."""

    def run(*flags):
        argv = [[*map(str, flags)]]
        run = zygote.run(4, call="tests.parallel.replicas:train", args=argv)
        assert run.codes == [0] * 4, run.output[-6000:]

    return run


@pytest.mark.parametrize("architecture", MIXING)
def test_payload_is_a_plain_transformers(architecture):
    assert boundary_widths(build_config(architecture, **STAGES)) == [16, 16, 16]
    config = build_config(architecture, **STAGES, v1_transport="recompute")
    assert boundary_widths(config) == [8, 8, 8]


@pytest.mark.slow
def test_copies_stay_equal(train_and_compare, started):
    """20 steps from one rank's checkpoint."""
    flags, _ = started("satformer")
    layout = f"{BOTH_ON_ONE_RANK} {FROM_IDS}".split()
    train_and_compare(*flags, *layout, "--train-iters", 20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_knows_no_transport(train_and_compare, pretrain, data_flags, tmp_path):
    flags, layout = [*SHAPE, *data_flags], f"{BOTH_ON_ONE_RANK} {FROM_IDS}".split()
    remade, carried, moved = (tmp_path / name for name in ("remade", "carried", "moved"))
    length = ["--save-interval", SAVED, "--train-iters", 2 * SAVED]
    straight = pretrain(4, *flags, *layout, *length, "--save", remade)
    resumed = pretrain(4, *flags, *layout, *length, "--load", remade, "--ckpt-step", SAVED)
    for curve in ("lm loss", "grad-norm"):
        later = {n: value for n, value in straight.scalars(curve).items() if n > SAVED}
        assert resumed.scalars(curve) == later
    tensors = read_all(remade, SAVED)
    # As `carry`, in the same layout: the same keys in the same pieces, each once, the same bits.
    saved = save_at_once(pretrain, flags, 4, f"{BOTH_ON_ONE_RANK} {RESHARDABLE}", remade, carried)
    assert not differing(saved, tensors)
    assert pieces(carried) == pieces(remade)
    # And from there, in another layout, `recompute` again.
    loading = ["--load", carried, "--train-iters", SAVED, "--override-opt-param-scheduler"]
    saving = ["--save", moved, "--save-interval", SAVED + 1, "--use-distributed-optimizer"]
    train_and_compare(*flags, *PP4.split(), *FROM_IDS.split(), *loading, *saving)
    assert not differing(read_all(moved, SAVED), tensors)
    assert export_to_hf(remade, tmp_path / "hf", verify=True).step == 2 * SAVED


def pieces(folder):
    """What files hold of tensors: key and offset of every piece, and its bytes."""
    stored = FileSystemReader(folder / f"iter_{SAVED:07d}").read_metadata().storage_data
    found = [(i.fqn, tuple(i.offset), s.length) for i, s in stored.items() if i.offset is not None]
    assert found
    return sorted(found)
