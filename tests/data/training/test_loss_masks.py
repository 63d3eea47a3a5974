"""Loss masks from disk: what they must be, and which tokens of Megatron's samples they leave."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_satformer.data.training.loss_masks import check_masks, describe_unused, mask_prefix
from megatron_satformer.data.training.masked_dataset import MaskedGPTDataset
from tests.datasets import write_dataset

LENGTH, EXAMPLES = 16, 12


class Tokenizer:
    vocab_size, eod, pad, unique_identifiers = 1000, 0, 999, {"class": "Tokenizer"}


def write(prefix: Path, examples: int = EXAMPLES, first: int = 1) -> str:
    """Every token is another one; of those of an example, three are marked."""
    tokens = np.arange(first, first + LENGTH * examples)
    rng = np.random.default_rng(0)
    marks = np.stack([rng.permutation(LENGTH) < 3 for _ in range(examples)]).astype(int)
    name = write_dataset(prefix, tokens, [LENGTH] * examples, 1000)
    write_mask(prefix, marks.reshape(-1), [LENGTH] * examples)
    return name


def write_mask(prefix: Path, marks, lengths) -> None:
    from megatron_satformer.data.datasets.indexed import bin_path, idx_path, index_blocks

    at = mask_prefix(prefix)
    counts = np.asarray(lengths, dtype=np.int32)
    bin_path(at).write_bytes(np.asarray(marks).astype(np.uint8).tobytes())
    idx_path(at).write_bytes(b"".join(index_blocks(np.dtype("u1"), counts)))


def build(paths: list[str], seq_length: int, samples: int, cache: Path, **options):
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=(paths, None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **options,
    )
    builder = BlendedMegatronDatasetBuilder(MaskedGPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]


def marked_tokens(prefix: str) -> set[int]:
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    return set(tokens[np.fromfile(f"{mask_prefix(prefix)}.bin", np.uint8) == 1].tolist())


@pytest.mark.parametrize("seq_length", [LENGTH, 4 * LENGTH])
def test_labels_that_count_are_the_marked_tokens(tmp_path, seq_length):
    """Over three epochs: every one but a sample's first token, which no sample has as a label."""
    prefix = write(tmp_path / "a")
    samples = 3 * EXAMPLES * LENGTH // seq_length - 1
    data = build([prefix], seq_length, samples, tmp_path / "cache")
    wanted = marked_tokens(prefix)
    for number in range(len(data)):
        for _ in range(2):  # the first sample of all fills GPTDataset's cache
            sample = data[number]
            labels = sample["labels"].tolist()
            counted = [
                n for n, one in zip(labels, sample["loss_mask"].tolist(), strict=True) if one
            ]
            assert counted == [n for n in labels if n in wanted]
        starts = sample["tokens"][::LENGTH] - 1
        assert (starts % LENGTH == 0).all(), "a sample begins in the middle of an example"
    assert sum(data[None]["loss_mask"]) == 0  # what fills a batch up


def test_data_without_a_mask_count_whole(tmp_path):
    plain = write_dataset(tmp_path / "plain", range(500, 500 + 64), [32, 32], 1000)
    masked = write(tmp_path / "masked")
    data = build([plain, masked], LENGTH, 10, tmp_path / "cache")
    seen = {"plain": 0, "masked": 0}
    for number in range(len(data)):
        sample = data[number]
        name = "plain" if sample["tokens"][0] >= 500 else "masked"
        seen[name] += 1
        expected = [one in marked_tokens(masked) for one in sample["labels"].tolist()]
        if name == "plain":
            expected = [True] * LENGTH
        assert sample["loss_mask"].bool().tolist() == expected
    assert min(seen.values()) > 0
    (line,) = check_masks([plain, masked, masked], LENGTH)
    assert f"36 tokens of {masked} count, 18.75%" in line
    (line,) = describe_unused([plain, masked])
    assert line.startswith(f"WARNING: {masked} has a loss mask")


@pytest.mark.parametrize(
    ("marks", "lengths", "seq_length", "words"),
    [
        (None, None, 16, r"use_loss_masks \(True\) must come with a data set that has _mask.bin"),
        ([1] * 16, [16], 16, "must have the documents of .* token for token; it has 1 of 16"),
        ([2] * 32, [16, 16], 16, "must hold 0 and 1 alone; it holds 2"),
        ([0] * 32, [16, 16], 16, "must mark a token; it marks none"),
        ([1] * 32, [16, 16], 24, r"seq_length \(24\) must be a multiple of 16.*--seq-length 16"),
        ([1] * 32, [15, 17], 16, "must be of documents of one length"),
    ],
)
def test_refused(tmp_path, marks, lengths, seq_length, words):
    there = lengths if lengths and sum(lengths) == 32 else [16, 16]
    prefix = write_dataset(tmp_path / "a", range(32), there)
    if marks is not None:
        write_mask(tmp_path / "a", marks, lengths)
    with pytest.raises(ValueError, match=words):
        check_masks([prefix], seq_length)
