"""The example scripts are valid shell, and their flags mean what the paper's tables say."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_satformer.model.architectures import PLAIN, TABLE
from tests.examples.commands import write_command
from tests.parallel.layouts import GATED

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "examples/pretrain"
SHELL = sorted(
    path
    for pattern in ("examples/**/*.sh", "examples/**/*.sbatch", "tools/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)
SIZES = ["130m", "350m", "760m", "1.3b"]

# arXiv 2605.03953: layers, hidden size, FFN, heads.
SHAPES = {
    "130m": (11, 768, 3072, 12),
    "350m": (18, 1024, 4096, 16),
    "760m": (19, 1536, 6144, 24),
    "1.3b": (24, 2048, 5632, 32),
}
# The same: parameters without and of the gates at 32000 tokens of vocabulary, peak learning
# rate, training and warmup tokens. Four sizes.
PUBLISHED = {
    "130m": (128_404_096, 92_160, 2e-3, 5e9, 0.05e9),
    "350m": (334_798_080, 278_528, 1.5e-3, 10e9, 0.1e9),
    "760m": (766_440_320, 663_552, 1e-3, 20e9, 0.2e9),
    "1.3b": (1_298_764_800, 1_507_328, 8e-4, 30e9, 0.3e9),
}
# What other architectures add, in the order of the sizes.
ADDED = {
    PLAIN: (0,) * 4,
    "depth_attention": (0,) * 4,
    "value_embeddings": (147_456_864, 294_913_728, 491_522_880, 786_436_608),
    "denseformer": (77, 189, 209, 324),
    "hyperconnections": (101_948, 222_120, 351_196, 591_072),
    "lime": (9_360, 43_520, 108_864, 306_176),
    "muddformer": (232_752, 785_380, 1_287_912, 2_675_046),
    "attnres": (35_328, 75_776, 119_808, 200_704),
    "mhc": (1_622_610, 3_539_916, 5_604_354, 9_438_480),
}
# One size of all, and all of one.
EVERY = pytest.mark.parametrize(
    ("size", "architecture"),
    [
        pytest.param(size, name, marks=() if size == "130m" or name in GATED else pytest.mark.slow)
        for size in SIZES
        for name in TABLE
    ],
)
PATHS = {
    "DATA_PATH": "0.5 a_text_document 0.5 b_text_document",
    "TOKENIZER_MODEL": "tokenizer.model",
    "CHECKPOINT_PATH": "checkpoints",
    "TENSORBOARD_LOGS_PATH": "tensorboard",
}


@pytest.fixture(scope="module")
def bin_dir(tmp_path_factory):
    """A PATH entry whose torchrun only prints its arguments, one a line."""
    path = tmp_path_factory.mktemp("bin")
    write_command(path / "torchrun", "printf '%s\\n' \"$@\"")
    return path


def run_script(bin_dir, script, *flags, **environment):
    path = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [PRETRAIN / script, *flags],
        env=path | PATHS | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def recorded_flags(bin_dir, size, *flags, **environment):
    """What torchrun was asked to do: its own flags, and those of pretrain_satformer.py."""
    result = run_script(bin_dir, f"satformer_{size}.sh", *flags, **environment)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    program = words.index(str(ROOT / "pretrain_satformer.py"))
    return words[:program], words[program + 1 :]


@pytest.fixture(scope="module")
def parsed(bin_dir, on_ranks, tmp_path_factory):
    """(size, architecture, more flags) -> what the real parser makes of the script's flags."""
    file = tmp_path_factory.mktemp("flags") / "described.json"

    @cache
    def parse(size, architecture, *more):
        flags = recorded_flags(bin_dir, size, *more, ARCHITECTURE=architecture)[1]
        on_ranks(1, "tests.examples.parse_flags:describe", flags, str(file))
        return json.loads(file.read_text())

    return parse


@pytest.mark.parametrize("script", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=here)
    result = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert os.access(script, os.X_OK)


def test_every_size_has_a_script():
    assert {path.stem for path in PRETRAIN.glob("satformer_*.sh")} == {
        f"satformer_{size}" for size in SIZES
    }


def test_scripts_differ_in_one_line():
    first, *others = ((PRETRAIN / f"satformer_{size}.sh").read_text().split("\n") for size in SIZES)
    for size, lines in zip(SIZES[1:], others, strict=True):
        changed = [(a, b) for a, b in zip(first, lines, strict=True) if a != b]
        assert changed == [("    --model-size 130m \\", f"    --model-size {size} \\")]


@EVERY
def test_shape(parsed, size, architecture):
    run = parsed(size, architecture)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    assert tuple(run[name] for name in names) == SHAPES[size]


@EVERY
def test_parameters(parsed, size, architecture):
    run = parsed(size, architecture)
    plain, gates, *_ = PUBLISHED[size]
    assert run["counted"] == plain
    added = ADDED | {"satformer": (gates,) * 4}
    if architecture in added:
        assert run["counted_own"] == added[architecture][SIZES.index(size)]
    assert run["built"] == plain + run["counted_own"]


@EVERY
def test_schedule(parsed, size, architecture):
    run = parsed(size, architecture)
    _, _, lr, tokens, warmup = PUBLISHED[size]
    assert run["lr"] == lr
    assert run["min_lr"] == pytest.approx(lr / 10)
    assert run["train_samples"] == tokens // run["seq_length"]
    assert run["lr_decay_samples"] is None  # Megatron's word for all of them
    assert run["lr_warmup_samples"] == warmup // run["seq_length"]
    assert run["global_batch_size"] * run["seq_length"] == 2**21


COMMON = {
    "seq_length": 4096,
    "kv_channels": 64,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "lr_decay_style": "cosine",
    "init_method_std": 0.02,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "qk_layernorm": True,
    "swiglu": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "untie_embeddings_and_output_weights": False,
    "bf16": True,
    "use_distributed_optimizer": True,
    "ckpt_format": "torch_dist",
}


@EVERY
def test_what_all_have_in_common(parsed, size, architecture):
    run = parsed(size, architecture)
    assert {name: run[name] for name in COMMON} == COMMON


def test_flags_after_the_script_win(parsed):
    run = parsed("130m", PLAIN, "--micro-batch-size", "2", "--lr", "3e-3")
    assert run["micro_batch_size"] == 2
    assert run["lr"] == 3e-3


def test_nodes_and_gpus_come_from_the_environment(bin_dir):
    launcher, _ = recorded_flags(
        bin_dir, "1.3b", NNODES="4", GPUS_PER_NODE="2", MASTER_ADDR="n1", MASTER_PORT="1234"
    )
    options = dict(zip(launcher[::2], launcher[1::2], strict=True))
    assert options["--nnodes"] == "4"
    assert options["--nproc-per-node"] == "2"
    assert options["--rdzv-endpoint"] == "n1:1234"


def test_one_node_meets_on_a_port_of_its_own(bin_dir):
    launcher, _ = recorded_flags(bin_dir, "130m")
    options = dict(zip(launcher[::2], launcher[1::2], strict=True))
    assert options["--rdzv-endpoint"] == "localhost:0"


def test_a_launch_meets_nobody_else(bin_dir):
    def meeting(**environment):
        several = {"NNODES": "2", "MASTER_ADDR": "n1"}
        launcher, _ = recorded_flags(bin_dir, "130m", **several, **environment)
        options = dict(zip(launcher[::2], launcher[1::2], strict=True))
        return options["--rdzv-id"], options["--rdzv-endpoint"]

    step = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}
    assert meeting(**step) == ("123456.0", "n1:23456")
    assert meeting(**step, CHECKPOINT_PATH="b", MASTER_PORT="1") == ("123456.0", "n1:1")
    assert meeting(**step | {"SLURM_STEP_ID": "1"})[0] == "123456.1"
    # without SLURM all nodes know where the checkpoints are, and no other launch writes there
    one, other = meeting(CHECKPOINT_PATH="a"), meeting(CHECKPOINT_PATH="b")
    assert one == meeting(CHECKPOINT_PATH="a")
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert 20_000 <= int(one[1].partition(":")[2]) < 30_000


MEMBER = """
import os, pathlib, time
here = pathlib.Path(os.environ["PROBE"])
launch, rank, size = (os.environ[f"{n}"] for n in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"))
(here / f"member_{launch}_{rank}_{size}").touch()
while len([*here.glob("member_*")]) < 4:
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_two_launches_at_one_port_do_not_join_each_other(tmp_path):
    """Two of two nodes each, all here, at the worst: with the same address and port."""
    (tmp_path / "member.py").write_text(MEMBER)
    launcher = f'exec {sys.executable} -m torch.distributed.run "${{@:1:10}}" $PROBE/member.py'
    write_command(tmp_path / "torchrun", launcher)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROBE": str(tmp_path), "NNODES": "2"}
    here |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GPUS_PER_NODE": "1"}
    launches = [
        subprocess.Popen(
            [PRETRAIN / "satformer_130m.sh"],
            env=os.environ | PATHS | here | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in ("1", "2", "1", "2")
    ]
    for launch in launches:
        _, told = launch.communicate(timeout=300)
        assert launch.returncode == 0, told
    members = sorted(path.name for path in tmp_path.glob("member_*"))
    assert members == [f"member_{job}.0_{rank}_2" for job in (1, 2) for rank in (0, 1)]


@pytest.mark.parametrize(("listed", "processes"), [("", "1"), ("GPU 0: A\nGPU 1: A", "2")])
def test_a_process_for_each_gpu_or_one(bin_dir, tmp_path, listed, processes):
    write_command(tmp_path / "nvidia-smi", f"printf '%s' '{listed}'; [[ '{listed}' ]]")
    launcher, _ = recorded_flags(bin_dir, "130m", PATH=f"{tmp_path}:{bin_dir}:{os.environ['PATH']}")
    options = dict(zip(launcher[::2], launcher[1::2], strict=True))
    assert options["--nproc-per-node"] == processes


def test_several_nodes_need_a_place_to_meet(bin_dir):
    result = run_script(bin_dir, "satformer_130m.sh", NNODES="2")
    assert result.returncode != 0
    assert "MASTER_ADDR: the first of NNODES nodes" in result.stderr


@pytest.mark.slow
def test_the_launcher_trains_on_the_cpu(data_flags, tmp_path):
    named = dict(zip(data_flags[::2], data_flags[1::2], strict=True))
    paths = {
        "DATA_PATH": named["--data-path"],
        "TOKENIZER_MODEL": named["--tokenizer-model"],
        "SPLIT": named["--split"],
        "CHECKPOINT_PATH": str(tmp_path / "checkpoints"),
        "TENSORBOARD_LOGS_PATH": str(tmp_path / "tensorboard"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    flags = ["--model-size", "debug", "--num-layers", "2", "--train-tokens", "4096"]
    result = subprocess.run(
        [PRETRAIN / "launch.sh", *flags, "--data-cache-path", named["--data-cache-path"]],
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "16 samples (4,096 tokens) for 4,096 tokens, about 2 steps" in result.stdout
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_blend_becomes_several_words(bin_dir):
    _, flags = recorded_flags(bin_dir, "130m")
    start = flags.index("--data-path")
    assert flags[start + 1 : start + 5] == PATHS["DATA_PATH"].split()


@pytest.mark.parametrize("name", PATHS)
def test_a_missing_path_is_named(bin_dir, name):
    result = run_script(bin_dir, "satformer_130m.sh", **{name: ""})
    assert result.returncode != 0
    assert f"{name}: " in result.stderr
