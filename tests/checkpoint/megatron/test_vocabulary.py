"""A model keeps its vocabulary, whatever tokenizer comes with it, trains it or is exported."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_satformer.checkpoint.compare.logits import compare_models
from megatron_satformer.checkpoint.convert.from_hf import import_from_hf
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from megatron_satformer.checkpoint.megatron.vocabulary import record_vocabulary
from tests.checkpoint.checkpoints import build_reference, write_checkpoint
from tests.checkpoint.hugging_face.families import FAMILIES, LLAMA3
from tests.checkpoint.hugging_face.test_origin import check_same, read, train, write_folder
from tests.checkpoint.hugging_face.word_tokenizer import write_word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROWS = LLAMA3["vocab_size"]
SPECIAL = {"bos_token": "t5", "eos_token": "t6"}


@pytest.fixture
def imported(tmp_path):
    """Imports a Llama 3 whose tokenizer has so many entries."""

    def start(entries: int):
        write_folder(tmp_path / "hf", *FAMILIES["Llama 3"])
        write_word_tokenizer(tmp_path / "hf", entries, **SPECIAL)
        return import_from_hf(tmp_path / "hf", tmp_path / "megatron")

    return start


@pytest.mark.parametrize("entries", [ROWS - 20, ROWS, ROWS + 10], ids=["fewer", "as many", "more"])
def test_there_and_back(imported, tmp_path, capsys, entries):
    imported(entries)
    told = f"the tokenizer has {entries} entries and the model {ROWS}, which it keeps"
    assert (told in capsys.readouterr().out) == (entries > ROWS)
    export_to_hf(tmp_path / "megatron", tmp_path / "back")
    check_same(tmp_path / "hf", tmp_path / "back")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert compare_models(tmp_path / "megatron", tmp_path / "back").vocab_size == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("entries", [ROWS - 20, ROWS + 10], ids=["fewer", "more"])
def test_training_keeps_it(imported, pretrain, tmp_path, entries):
    made = imported(entries)
    flags = [word for flag in made.tokenizer for word in flag.split()]
    train(pretrain, made, 1, tmp_path / "run", "--mock-data", *flags, "--train-iters", 1)
    assert open_checkpoint(tmp_path / "run").args.vocab_size is None  # Megatron's says nothing
    export_to_hf(tmp_path / "run", tmp_path / "back")
    check_same(tmp_path / "hf", tmp_path / "back")


def test_training_does_not_cut_it(imported, pretrain, tmp_path):
    """Megatron pads for the run's tokenizer, and would drop the rows above without a word."""
    made = imported(20)
    flags = [word for flag in made.flags + made.tokenizer for word in flag.split()]
    at = flags.index("--padded-vocab-size")
    short = "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 1"
    flags = [*flags[:at], *flags[at + 2 :], *short.split(), "--make-vocab-size-divisible-by", 8]
    flags += ["--mock-data", "--pretrained-checkpoint", tmp_path / "megatron"]
    run = pretrain(1, *flags, code=2)
    assert "padded_vocab_size (24) must be at least the vocabulary of the checkpoint" in run.output
    assert "Add --padded-vocab-size 128." in run.output


@pytest.mark.parametrize("entries", [ROWS - 20, ROWS + 10], ids=["fewer", "more"])
def test_another_tokenizer_is_exported(imported, tmp_path, capsys, entries):
    imported(ROWS)
    other = write_word_tokenizer(tmp_path / "other", entries, eos_token="t7")
    if entries > ROWS:
        with pytest.raises(ValueError, match=rf"{entries} entries, the checkpoint's model only"):
            export_to_hf(tmp_path / "megatron", tmp_path / "back", tokenizer=str(other))
        return
    export_to_hf(tmp_path / "megatron", tmp_path / "back", tokenizer=str(other))
    ids = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
    check_same(tmp_path / "hf", tmp_path / "back", ids)
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "back", name)["eos_token_id"] == 7
    assert "special ids are its own" in capsys.readouterr().err


def test_a_folder_without_tokenizer_gets_one(tmp_path):
    """One whose end is among the folder's own ends is taken for its tokenizer."""
    write_folder(tmp_path / "hf", *FAMILIES["Llama 3"])
    import_from_hf(tmp_path / "hf", tmp_path / "megatron")
    for end, same in (("t98", True), ("t97", False)):
        other = write_word_tokenizer(tmp_path / f"with {end}", 100, eos_token=end)
        export_to_hf(tmp_path / "megatron", tmp_path / end, tokenizer=str(other))
        assert (read(tmp_path / end, "config.json")["eos_token_id"] == [91, 98, 99]) == same


def origin_of(entries: int) -> dict:
    values = {"model_type": "llama", "config": {}, "generation": None, "vocab_size": ROWS}
    return values | {"tokenizer": (entries, 5, 6, None)}


@pytest.mark.parametrize(
    ("saved", "entries", "size"),
    [
        (None, 80, 80),
        ({"model_vocab_size": ROWS}, 80, ROWS),
        ({"model_vocab_size": ROWS}, 130, 130),  # training with a larger one made it larger
        ({"model_vocab_size": ROWS, "hugging_face_origin": origin_of(130)}, 130, ROWS),
        ({"model_vocab_size": ROWS, "hugging_face_origin": origin_of(130)}, 140, 140),
        # what an import wrote before there was a record
        ({"vocab_size": ROWS, "tokenizer_type": "HuggingFaceTokenizer"}, 80, ROWS),
        # what Megatron does not read
        ({"vocab_size": 7000, "tokenizer_type": "SentencePieceTokenizer"}, 80, 80),
    ],
    ids=str,
)
def test_record(saved, entries, size):
    args = Namespace()
    record_vocabulary(args, None if saved is None else Namespace(**saved), entries)
    assert args.model_vocab_size == size


def test_a_run_from_scratch_has_its_tokenizers(tmp_path: Path):
    """And keeps it when another one is exported with it."""
    tokenizer = write_word_tokenizer(tmp_path / "own", 60, eos_token="t6")
    flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    model = build_reference(architecture="transformer", qk_norm=False)
    load = write_checkpoint(tmp_path / "ckpt", model, **flags, vocab_size=None, model_vocab_size=60)
    for entries in (40, 60):
        other = write_word_tokenizer(tmp_path / f"{entries}", entries, eos_token="t7")
        export_to_hf(load, tmp_path / "hf", tokenizer=str(other), overwrite=True)
        assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == 60
    other = write_word_tokenizer(tmp_path / "larger", 61, eos_token="t7")
    with pytest.raises(
        ValueError, match="tokenizer has 61 entries, the checkpoint's model only 60"
    ):
        export_to_hf(load, tmp_path / "hf", tokenizer=str(other), overwrite=True)
