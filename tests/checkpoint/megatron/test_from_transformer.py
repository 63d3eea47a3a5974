"""A model starts as the plain Transformer whose checkpoint it is given, and goes on alone."""

import pytest
import torch

from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from megatron_satformer.model.architectures import (
    PLAIN,
    TABLE,
    all_architectures,
    find_architecture,
)
from tests.checkpoint.megatron.test_resharding import read_all
from tests.models import build_config
from tests.small import DO, PP2, SHAPE, TP2

STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CONFIG = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
GQA = ["--group-query-attention", "--num-query-groups", "2"]
VIRTUAL = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
AT_ZERO = "--architecture satformer --value-gate-init-std 0 --value-gate tanh".split()
STARTABLE = [a.name for a in all_architectures() if a.from_transformer is None]
# Flags with which the start is exactly the Transformer, where the defaults are not it.
EXACT = {
    "satformer": "--value-gate-init-std 0 --value-gate tanh",
    "lime": "--lime-router-init identity",
    "mhc": "--mhc-start transformer",
    "value_embeddings": "--value-embedding-init zero",
}
LAYOUTS = {
    "one rank": (1, ""),
    "one rank, biases": (1, "--value-gate-bias"),
    "TP2": (2, TP2),
    "PP2 x 2 virtual": (2, VIRTUAL),
    "DP2, distributed optimizer": (2, DO),
}


@pytest.fixture(scope="module")
def transformer(pretrain, data_flags, tmp_path_factory):
    """Flags of the shape, the folder of a trained Transformer, its losses when started again."""
    folder = tmp_path_factory.mktemp("transformer")
    # the epsilon sees by how much attnres divides what its norms read
    flags = [*SHAPE, *GQA, *data_flags, "--norm-epsilon", "1e-12"]
    training = ["--architecture", "transformer", "--train-iters", STEPS]
    pretrain(1, *flags, *training, "--save", folder, "--save-interval", STEPS)
    again = pretrain(1, *flags, *training, "--load", folder, "--finetune")
    return flags, folder, again.losses


def gates(folder, step: int) -> dict[str, float]:
    """Largest weight of every gate in a checkpoint."""
    return {
        key: tensor.abs().max().item()
        for key, tensor in read_all(folder, step).items()
        if key.startswith("decoder") and key.endswith("value_gate.weight")
    }


@pytest.mark.parametrize(
    "layout", [n if "PP2" in n else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_starts_as_that_transformer(transformer, pretrain, tmp_path, layout):
    flags, folder, losses = transformer
    ranks, extra = LAYOUTS[layout]
    starting = ["--from-transformer", "--pretrained-checkpoint", folder, "--train-iters", STEPS]
    saving = ["--save", tmp_path, "--load", tmp_path, "--save-interval", STEPS]
    run = pretrain(ranks, *flags, *AT_ZERO, *extra.split(), *starting, *saving)
    assert run.losses[0] == pytest.approx(losses[0], rel=1e-6)
    assert run.losses[1:] == pytest.approx(losses[1:], rel=1e-2)
    assert run.losses[1:] != pytest.approx(losses[1:], rel=1e-6)
    opened = gates(tmp_path, STEPS)
    assert len(opened) == 3
    assert min(opened.values()) > 1e-3
    assert "WARNING: value_gate" not in run.output


@pytest.mark.slow
@pytest.mark.parametrize("architecture", STARTABLE)
def test_starts_as_that_transformer_on_two_stages_of_two_ranks(
    transformer, pretrain, tmp_path, architecture
):
    """And saves what a start of its own would: all that it adds has moved."""
    flags, folder, losses = transformer
    mine = ["--architecture", architecture, *EXACT.get(architecture, "").split()]
    starting = ["--from-transformer", "--pretrained-checkpoint", folder, "--train-iters", STEPS]
    saving = ["--save", tmp_path, "--load", tmp_path, "--save-interval", STEPS]
    run = pretrain(4, *flags, *mine, *TP2.split(), *PP2.split(), *starting, *saving)
    assert run.losses[0] == pytest.approx(losses[0], rel=1e-6)
    assert run.losses[1:] != pytest.approx(losses[1:], rel=1e-6)
    saved = open_checkpoint(tmp_path)
    config = build_config(architecture, **CONFIG)
    record = find_architecture(architecture)
    own = record.by_key(config)
    assert own
    assert own.keys() <= saved.tensors.keys()
    if not record.config.layers_alike:
        assert not all(torch.equal(saved.read(key), t.start(t.shape)) for key, t in own.items())


@pytest.mark.slow
def test_same_command_line_resumes(transformer, pretrain, tmp_path):
    flags, folder, _ = transformer
    starting = ["--from-transformer", "--pretrained-checkpoint", folder, "--train-iters", STEPS]
    command = [*flags, *AT_ZERO, *VIRTUAL.split(), *starting]
    straight = pretrain(2, *command)
    command += ["--save", tmp_path, "--load", tmp_path, "--save-interval", 3]
    first = pretrain(2, *command, "--exit-interval", 3)
    second = pretrain(2, *command)
    assert first.losses + second.losses == straight.losses


@pytest.mark.slow
def test_relu_gates_at_exactly_zero_never_open(transformer, pretrain, tmp_path):
    flags, folder, losses = transformer
    starting = ["--from-transformer", "--load", folder, "--finetune", "--train-iters", STEPS]
    relu = [*flags, *starting, "--save-interval", STEPS, "--value-gate-init-std"]
    dead = pretrain(1, *relu, 0, "--save", tmp_path / "dead")
    assert set(gates(tmp_path / "dead", STEPS).values()) == {0.0}
    assert dead.losses == pytest.approx(losses, rel=1e-6)
    told = "WARNING: value_gate (relu) with value_gate_init_std (0): relu has no gradient at 0"
    assert dead.output.count(told) == 1
    alive = pretrain(1, *relu, 1e-3, "--save", tmp_path / "alive")
    assert alive.losses[0] == pytest.approx(losses[0], rel=1e-4)
    assert min(gates(tmp_path / "alive", STEPS).values()) > 4e-3
    assert "WARNING: value_gate" not in alive.output


PRETRAINED = "--pretrained-checkpoint {transformer}"
REFUSED = {
    f"{PRETRAINED}": (
        "architecture (satformer) must be that of the checkpoint in pretrained_checkpoint",
        "which is (transformer). To start a satformer from its weights, add --from-transformer.",
    ),
    "--load {transformer} --finetune": ("To start a satformer from its weights, add",),
    "--load {transformer} --from-transformer": ("Give its folder as --pretrained-checkpoint",),
    "--from-transformer": (
        "from_transformer (True) must come with a checkpoint, and load (None) holds none.",
    ),
    "--from-transformer --load {empty}": (
        "holds none. Give its folder as --pretrained-checkpoint",
    ),
    "--pretrained-checkpoint {empty}": ("must hold a checkpoint, and there is no latest_check",),
    "--from-transformer --pretrained-checkpoint {satformer}": (
        "from_transformer (True) must be given with a Transformer's checkpoint, and",
        "is that of architecture (satformer). Leave --from-transformer out.",
    ),
    **{
        f"{PRETRAINED} --from-transformer --architecture {a.name}": (
            f"from_transformer (True) is not supported with architecture ({a.name}): "
            f"{a.from_transformer}. Leave it out",
        )
        for a in all_architectures()
        if a.from_transformer is not None
    },
    f"{PRETRAINED} --from-transformer --norm-epsilon 1e-5": (
        "layernorm_epsilon (1e-05) must be that of the checkpoint in pretrained_checkpoint",
    ),
    f"{PRETRAINED} --from-transformer --num-query-groups 4": ("num_query_groups (4) must be that",),
}


def test_which_can_start():
    """Those that this file tests, and reasons for the rest."""
    reasons = {name: find_architecture(name).from_transformer for name in TABLE}
    assert {*EXACT} < {*STARTABLE}
    assert reasons["resformer"] == "its lambdas start far from a Transformer's"
    assert reasons[PLAIN] == "it reads a Transformer's checkpoint as it is"


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_start_is_one_clear_line(
    transformer, started, pretrain, data_flags, tmp_path, given
):
    common, _ = started("satformer")
    folders = {
        "transformer": transformer[1],
        "satformer": common[common.index("--load") + 1],
        "empty": tmp_path,
    }
    flags = [*transformer[0], "--train-iters", 1]
    run = pretrain(1, *flags, *given.format(**folders).split(), code=2)
    told = [line for line in run.output.splitlines() if "error: " in line]
    assert len(told) == 1, run.output[-3000:]
    for part in REFUSED[given]:
        assert part in told[0]
