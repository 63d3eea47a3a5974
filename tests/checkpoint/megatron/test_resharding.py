"""A checkpoint belongs to no layout: weights and moments move bit by bit, losses go on."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from megatron_satformer.model.architectures import find_architecture
from tests.models import build_config
from tests.parallel.layouts import (
    CARRYING,
    EVERY_CELL,
    FORMS,
    FROM_IDS,
    GATED,
    READING,
    STREAMED,
    VIRTUAL,
)
from tests.small import DO, PP2, RTOL, TP2

# Odd sizes: rows of linear_qkv need padding at every tensor-parallel size, 12 rows at TP1, 14 of
# each rank at TP2, 7 at TP4.
LAYERS, H, NP, NG, HN, FFN, VOCABULARY = 4, 40, 8, 4, 6, 72, 512
SHAPE = f"""--num-layers {LAYERS} --hidden-size {H} --num-attention-heads {NP} --kv-channels {HN}
--group-query-attention --num-query-groups {NG} --ffn-hidden-size {FFN} --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --min-lr 3e-4
--lr-decay-iters 10 --log-interval 1 --eval-iters 1 --eval-interval 100 --num-workers 0
--init-method-std 0.05""".split()
SAVED, LAST = 5, 10
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
TP4, PP4 = "--tensor-model-parallel-size 4", "--pipeline-model-parallel-size 4"
HOME = (4, f"{TP2} {PP2} {DO} {RESHARDABLE}")
TWO = "PP2 x 2 virtual"
# Several chunks of a rank have copies of what is shared, which data-parallel ranks write.
SHARED = "PP2 x 2 virtual x DP2"
LAYOUTS = {
    "TP1": (1, ""),
    TWO: (2, f"{PP2} {VIRTUAL}"),
    SHARED: (4, f"{PP2} {VIRTUAL}"),
    "TP4": (4, TP4),
    "PP4": (4, PP4),
    "DP4": (4, ""),
}
FAST = [(name, layout) for name in GATED for layout in (TWO,)]
CASES = [
    pytest.param(name, layout, marks=() if (name, layout) in FAST else pytest.mark.slow)
    for name in (*CARRYING, *READING)
    for layout in (LAYOUTS if name in GATED else ("TP4", SHARED if name in FORMS else TWO))
]
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (H,),
    "self_attention.linear_qkv.weight": ((NP + 2 * NG) * HN, H),
    "self_attention.q_layernorm.weight": (HN,),
    "self_attention.k_layernorm.weight": (HN,),
    "self_attention.linear_proj.weight": (H, NP * HN),
    "mlp.linear_fc1.layer_norm_weight": (H,),
    "mlp.linear_fc1.weight": (2 * FFN, H),
    "mlp.linear_fc2.weight": (H, FFN),
}
WHOLE = {
    "embedding.word_embeddings.weight": (VOCABULARY, H),
    "decoder.final_layernorm.weight": (H,),
}
ATTENTION = "decoder.layers.{}.self_attention"
# Beside what the records say, for two that the package knows: what they add, spelled out.
ADDED = {
    "satformer": {
        f"decoder.layers.{n}.self_attention.value_gate.weight": (NG, H) for n in (1, 2, 3)
    },
    "resformer": {f"decoder.layers.{n}.self_attention.value_lambda2": (1,) for n in (1, 2, 3)}
    | {
        "decoder.value_residual.lambda_logits": (LAYERS - 1,),
        "decoder.value_residual.lambda_scale": (1,),
    },
}


def expected_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, whatever the layout: no padding of linear_qkv in any."""
    shape = {"num_layers": LAYERS, "hidden_size": H, "num_attention_heads": NP, "kv_channels": HN}
    config = build_config(architecture, num_query_groups=NG, **shape)
    if hasattr(config, "padded_vocab_size"):
        config.padded_vocab_size = VOCABULARY
    added = find_architecture(architecture).all_tensors(config)
    model = WHOLE | {tensor.megatron: tensor.shape for _, tensor in added}
    for layer in range(LAYERS):
        model |= {f"decoder.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    if config.layers_alike:  # one tensor of each kind, with a leading layer axis
        stacked = {
            re.sub(r"(layers\.)\d+\.", r"\1", k): (LAYERS, *s)
            for k, s in model.items()
            if ".layers." in k
        }
        model = {k: s for k, s in model.items() if ".layers." not in k} | stacked
    moments = {
        f"optimizer.state.{state}.{key}": shape
        for state in ("param", "exp_avg", "exp_avg_sq")
        for key, shape in model.items()
    }
    return model | moments


def read_all(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, on this one process."""
    folder = folder / f"iter_{step:07d}"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def check_main_weights(tensors: dict[str, torch.Tensor]) -> None:
    """In fp32 the optimizer's own copy of a weight is that weight."""
    kept = {key: key.removeprefix("optimizer.state.param.") for key in tensors}
    kept = {key: weight for key, weight in kept.items() if key != weight}
    assert kept
    assert not [
        key for key, weight in kept.items() if not torch.equal(*map(tensors.get, (key, weight)))
    ]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.fixture(scope="module")
def home(pretrain, data_flags, tmp_path_factory):
    """Architecture -> flags, the folder saved at TP2 x PP2, its tensors, the next five losses."""
    made = {}

    def train(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            flags = [*SHAPE, *data_flags, "--architecture", architecture]
            ranks, layout = HOME
            saving = ["--save", folder, "--save-interval", SAVED, "--train-iters", LAST]
            run = pretrain(ranks, *flags, *layout.split(), *saving)
            made[architecture] = flags, folder, read_all(folder, SAVED), run.losses[SAVED:]
        return made[architecture]

    return train


def save_at_once(pretrain, flags, ranks, layout, source, target) -> dict[str, torch.Tensor]:
    """Load `source` in a layout, take no step, save; what was saved."""
    loading = ["--load", source, "--ckpt-step", SAVED, "--override-opt-param-scheduler"]
    saving = ["--save", target, "--save-interval", SAVED + 1, "--train-iters", SAVED]
    pretrain(ranks, *flags, *layout.split(), *loading, *saving, board=False)
    return read_all(target, SAVED)


def continue_from(pretrain, flags, ranks, layout, source) -> list[float]:
    resuming = ["--load", source, "--ckpt-step", SAVED, "--train-iters", LAST]
    resuming += ["--override-opt-param-scheduler"]  # save_at_once has written its own length
    return pretrain(ranks, *flags, *layout.split(), *resuming).losses


@pytest.mark.parametrize(("architecture", "layout"), CASES)
def test_moves_to_another_layout(home, pretrain, tmp_path, architecture, layout):
    flags, folder, tensors, losses = home(architecture)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected_shapes(architecture)
    check_main_weights(tensors)
    ranks, extra = LAYOUTS[layout]
    extra = f"{extra} {DO} {RESHARDABLE}"
    moved = save_at_once(pretrain, flags, ranks, extra, folder, tmp_path)
    assert not differing(moved, tensors)  # the same bits under the same keys: the way back is free
    assert continue_from(pretrain, flags, ranks, extra, folder) == pytest.approx(losses, rel=RTOL)


@pytest.mark.parametrize("architecture", ADDED)
def test_what_is_added_is_what_is_documented(architecture):
    shapes = expected_shapes(architecture)
    assert {key: shapes.get(key) for key in ADDED[architecture]} == ADDED[architecture]
    assert len(shapes) == 4 * (len(WHOLE) + LAYERS * len(LAYER) + len(ADDED[architecture]))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CARRYING if EVERY_CELL else (*GATED, *STREAMED))
def test_there_and_back_continues_to_the_last_digit(home, pretrain, tmp_path, architecture):
    flags, folder, _, losses = home(architecture)
    save_at_once(pretrain, flags, 1, f"{DO} {RESHARDABLE}", folder, tmp_path)
    assert continue_from(pretrain, flags, *HOME, tmp_path) == losses


@pytest.mark.slow
def test_without_distributed_optimizer(pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags]
    saving = ["--save", tmp_path / "tp2", "--save-interval", SAVED, "--train-iters", LAST]
    losses = pretrain(2, *flags, *TP2.split(), *saving).losses[SAVED:]
    tensors = read_all(tmp_path / "tp2", SAVED)
    assert not differing(
        save_at_once(pretrain, flags, 1, "", tmp_path / "tp2", tmp_path / "one"), tensors
    )
    continued = continue_from(pretrain, flags, 1, "", tmp_path / "tp2")
    assert continued == pytest.approx(losses, rel=RTOL)


def test_many_buckets(pretrain, data_flags, tmp_path):
    """Megatron would save what lies behind the first padded bucket shifted; see the backend."""
    flags = [*SHAPE, *data_flags, *f"{DO} {RESHARDABLE}".split()]
    buckets = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 3000".split()
    saving = ["--save", tmp_path, "--save-interval", 2, "--train-iters", 2]
    pretrain(2, *flags, *buckets, *saving)
    tensors = read_all(tmp_path, 2)
    check_main_weights(tensors)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected_shapes("satformer")


@pytest.fixture(scope="module")
def fixed_layout(pretrain, data_flags, tmp_path_factory):
    """Flags and folder of a PP2 run whose optimizer state fits PP2 alone."""
    folder = tmp_path_factory.mktemp("fixed_layout")
    flags = [*SHAPE, *data_flags, "--train-iters", 3]
    saving = ["--save", folder, "--save-interval", 2, "--exit-interval", 2]
    pretrain(2, *flags, *f"{PP2} {DO}".split(), *saving)
    return [*flags, "--load", folder]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (DO, "pipeline_model_parallel_size (1) must be that of the checkpoint in load"),
        ("", "use_distributed_optimizer (False) must be that of the checkpoint in load"),
        (f"{DO} {FROM_IDS}", "(The table above has 1 more.)"),
    ],
)
def test_optimizer_state_of_one_layout_is_refused_in_another(fixed_layout, pretrain, flags, told):
    run = pretrain(1, *fixed_layout, *flags.split(), code=2)
    assert told in run.output
    assert "start with fresh moments (--no-load-optim)" in run.output


def test_weights_alone_move(fixed_layout, pretrain):
    assert len(pretrain(1, *fixed_layout, DO, "--no-load-optim").losses) == 1


def test_padded_vocabulary_stays(fixed_layout, pretrain):
    flags = [*fixed_layout, "--no-load-optim", "--make-vocab-size-divisible-by", 100]
    run = pretrain(1, *flags, code=2)
    assert "padded_vocab_size (500) must be that of the checkpoint in load" in run.output
    assert f"Add --padded-vocab-size {VOCABULARY}." in run.output
    assert len(pretrain(1, *flags, "--padded-vocab-size", VOCABULARY).losses) == 1
