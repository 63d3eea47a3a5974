import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.analysis.samples import generate_samples
from megatron_satformer.data.tokenizers.training import train_tokenizer
from tests.checkpoint.hugging_face.test_tokenizer import export_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["def parse", "import os\n"]


@pytest.fixture
def folder(build_folder, tmp_path):
    folder, _ = build_folder()
    text = tmp_path / "text.jsonl"
    source = (ROOT / "tests" / "analysis" / "test_losses.py").read_text()
    text.write_text(json.dumps({"text": source}) + "\n")
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=400)
    export_tokenizer(tmp_path / "tokenizer" / "tokenizer.model", folder)
    return folder


def test_the_same_folder_gives_the_same_text(folder):
    first = generate_samples(folder, PROMPTS, 12, temperature=0.8, top_p=0.95)
    assert first == generate_samples(folder, PROMPTS, 12, temperature=0.8, top_p=0.95)
    for prompt, text in zip(PROMPTS, first, strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)


BLOCKED = """
import runpy, sys

class Blocked:
    def find_spec(self, name, *args):
        if name.partition(".")[0] in ("megatron", "megatron_satformer"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_needs_nothing_of_this_project(folder, tmp_path):
    script = ROOT / "megatron_satformer" / "analysis" / "samples.py"
    argv = [script, "--model", folder, "--output", tmp_path / "samples.txt"]
    argv += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", BLOCKED, *map(str, argv), "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    samples = (tmp_path / "samples.txt").read_text()
    assert [repr(prompt) in samples for prompt in PROMPTS] == [True, True]
