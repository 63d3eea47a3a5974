"""What was saved and exported before each architecture had a room of its own is still read.

saved_at_244399b.tar.xz holds, of three architectures, a checkpoint of two steps of training and its
export, made by pretrain_satformer.py and convert_checkpoint.py of that commit.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_satformer.checkpoint.convert.from_hf import import_from_hf
from megatron_satformer.checkpoint.convert.options import own_options
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ARCHIVE = Path(__file__).with_name("saved_at_244399b.tar.xz")
# The options that each was trained with, and its model's flags.
FLAGS = {
    "satformer": "--value-gate tanh --value-gate-bias",
    "resformer": "--value-residual-last-k 1",
    "transformer": "--add-qkv-bias",
}
SHAPE = """--num-layers 3 --hidden-size 16 --num-attention-heads 2 --kv-channels 4
--ffn-hidden-size 16 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2
--global-batch-size 4 --lr 3e-3 --min-lr 3e-4 --log-interval 1 --eval-iters 0 --eval-interval 100
--num-workers 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 39
--make-vocab-size-divisible-by 8""".split()
EVERY = pytest.mark.parametrize("architecture", FLAGS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@EVERY
def test_the_export_is_the_same_bits(saved, tmp_path, architecture):
    made = export_to_hf(saved / architecture / "megatron", tmp_path / "hf", verify=True)
    assert made.step == 2
    old, new = (
        load_file(folder / "model.safetensors")
        for folder in (saved / architecture / "hf", tmp_path / "hf")
    )
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype, name
        assert torch.equal(tensor, new[name]), name


@EVERY
def test_an_old_export_computes_the_same(saved, tmp_path, architecture, monkeypatch):
    """With its own code, beside the code of today."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    export_to_hf(saved / architecture / "megatron", tmp_path / "hf")
    ids = torch.randint(39, (2, 16), generator=torch.Generator().manual_seed(1))
    old, new = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        for folder in (saved / architecture / "hf", tmp_path / "hf")
    )
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits)


@EVERY
def test_an_old_export_becomes_the_same_checkpoint(saved, tmp_path, architecture):
    padding = {"make_vocab_size_divisible_by": 8}
    made = import_from_hf(saved / architecture / "hf", tmp_path / "megatron", **padding)
    assert made.architecture == architecture
    old, new = open_checkpoint(saved / architecture / "megatron"), open_checkpoint(made.folder)
    assert old.tensors.keys() == new.tensors.keys()
    for key in old.tensors:
        rows = 39 if "word_embeddings" in key else None  # the rest is padding
        assert torch.equal(old.read(key)[:rows], new.read(key)[:rows]), key


@EVERY
def test_an_old_run_goes_on(saved, tmp_path, pretrain, architecture):
    flags = [*SHAPE, "--architecture", architecture, *FLAGS[architecture].split()]
    flags += ["--load", saved / architecture / "megatron", "--train-iters", 4]
    # it was saved without the optimizer's state
    flags += ["--no-load-optim", "--no-load-rng"]
    run = pretrain(1, *flags)
    assert list(run.scalars("lm loss")) == [3, 4]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--architecture satformer", "value_gate (relu) must be that of the checkpoint in load"),
        (
            "--architecture satformer --value-gate tanh",
            "value_gate_bias (False) must be that of the checkpoint in load",
        ),
        ("--architecture resformer", "architecture (resformer) must be that of the checkpoint"),
    ],
)
def test_an_old_run_does_not_go_on_as_another(saved, pretrain, flags, told):
    flags = [*SHAPE, *flags.split(), "--load", saved / "satformer" / "megatron"]
    run = pretrain(1, *flags, "--train-iters", 4, "--no-load-optim", code=2)
    assert told in run.output


def test_an_option_that_an_old_checkpoint_does_not_know_has_its_default(saved):
    """What is new in a later version must not change how it is read."""
    args = open_checkpoint(saved / "resformer" / "megatron").args
    del args.value_residual_last_k
    assert own_options(args) == {
        "architecture": "resformer",
        "value_residual_last_k": None,
        "resformer_form": "learnable_plus",
        "resformer_lambda": None,
    }
    del args.architecture
    assert own_options(args) == {"architecture": "transformer"}
