"""The recipe from a dataset on disk to its tokens, as a user runs it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.data.datasets.indexed import IndexedFile
from tests.examples.commands import write_command
from tests.texts import source_texts, write_lines

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/fineweb_edu"
STEPS = ["1_download", "2_tokenizer", "3_preprocess", "4_train", "5_export", "6_evaluate"]


@pytest.fixture
def environment(tmp_path):
    """Of a recipe at a small size from a local dataset, on a machine without SLURM."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    texts = [part for text in source_texts() for part in text.split("\n\n\n") if part]
    write_lines(
        dataset / "train.jsonl",
        [{"text": text, "token_count": len(text) // 4} for text in texts],
    )
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    here = {
        "PATH": f"{bin_dir}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "home"),
        "RECIPE": str(tmp_path / "recipe"),
        "DATASET": str(dataset),
        "TOKENS": "20k",
        "VOCAB_SIZE": "500",
        "NUM_PARTS": "1",
        "SIZE": "debug",
    }
    return os.environ | here


def run(step, environment, *flags):
    return subprocess.run(
        [RECIPE / f"{step}.sh", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_steps_are_there_and_can_be_run():
    assert [path.stem for path in sorted(RECIPE.glob("[0-9]*.sh"))] == STEPS
    assert all((RECIPE / f"{step}.sh").stat().st_mode & stat.S_IXUSR for step in STEPS)


@pytest.mark.slow
def test_from_a_dataset_to_its_tokens(environment, tmp_path):
    for step in STEPS[:3]:
        result = run(step, environment | {"SBATCH": ""})
        assert result.returncode == 0, result.stderr
    data = IndexedFile(tmp_path / "recipe/data/corpus_text_document")
    assert data.documents > 10
    assert data.tokens.size > 10_000


def test_under_slurm_parts_are_an_array_and_merged_behind_it(environment, tmp_path):
    calls = tmp_path / "calls"
    write_command(
        tmp_path / "bin/sbatch",
        f'printf "%s\\n" "$@" --- >>{calls}; [[ " $* " != *" --parsable "* ]] || echo "7;cluster"',
    )
    assert run("3_preprocess", environment | {"NUM_PARTS": "5"}, "--account=me").returncode == 0
    array, merge, _ = calls.read_text().split("---\n")
    words = array.splitlines()
    assert words[:4] == [
        "--parsable",
        "--array=0-4",
        "--account=me",
        "examples/slurm/preprocess.sbatch",
    ]
    words = merge.splitlines()
    assert words[2:5] == ["--dependency=afterok:7", "--kill-on-invalid-dep=yes", "--account=me"]
    assert words[-1].split()[:2] == ["python3", "tools/merge_datasets.py"]
    calls.unlink()
    assert run("4_train", environment | {"SBATCH_FLAGS": "--nodes 4"}, "--lr", "1").returncode == 0
    words = calls.read_text().splitlines()
    assert words[:5] == ["--job-name", "satformer_debug", "--nodes", "4"] + [
        "examples/slurm/pretrain.sbatch"
    ]
    assert words[5:-1] == ["examples/pretrain/launch.sh", "--model-size", "debug", "--lr", "1"]
