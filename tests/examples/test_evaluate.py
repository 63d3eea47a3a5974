"""tools/evaluate.py and examples/evaluate: what they run, and the figures of the real lm_eval."""

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.checkpoint.hugging_face.test_tokenizer import (
    byte_level,  # noqa: F401
    export_tokenizer,
    write_model,
)

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = ROOT / "examples/evaluate"
BIN = Path(sys.executable).parent
TASKS = ("perplexity", "last_word", "ending", "recall")
SUITES = {
    "1_zero_shot.sh": {
        *("wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande"),
        *("arc_easy", "arc_challenge", "boolq"),
    },
    "2_retrieval.sh": {"fda", "swde", "squad_completion", "triviaqa", "nq_open", "drop"},
}


def run_script(script, *flags, path=BIN, **environment):
    paths = f"{path}:{BIN}:{os.environ['PATH']}"
    return subprocess.run(
        [EVALUATE / script, *flags],
        env={"PATH": paths, "HOME": os.environ.get("HOME", "/")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """A PATH entry whose python3 only prints its arguments, one a line."""
    path = tmp_path_factory.mktemp("bin")
    (path / "python3").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (path / "python3").chmod(0o755)
    return path


@pytest.mark.parametrize("script", SUITES)
def test_online_suites(recorder, script):
    environment = {"HF_MODEL": "a model, exported", "DEVICE": "cpu", "PREFIX_TOKEN_ID": "7"}
    result = run_script(script, "--limit", "5", path=recorder, **environment)
    assert result.returncode == 0, result.stderr
    tool, *words = result.stdout.splitlines()
    assert Path(tool).resolve() == ROOT / "tools/evaluate.py"
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert set(flags.pop("--tasks").split(",")) == SUITES[script]
    assert flags == {
        "--model": "a model, exported",
        "--save": "results",
        "--batch-size": "8",
        "--dtype": "auto",
        "--device": "cpu",
        "--prefix-token-id": "7",
        "--limit": "5",
    }


def test_lm_eval_has_the_tasks():
    tasks = Path(find_spec("lm_eval").origin).parent / "tasks"
    known = set()
    for file in tasks.glob("*/**/*.yaml"):
        known |= set(re.findall(r"^task: (\w+)\s*$", file.read_text("utf-8"), re.MULTILINE))
    assert set().union(*SUITES.values()) <= known


def test_mistakes(recorder, tmp_path):
    result = run_script("1_zero_shot.sh", path=recorder)
    assert (result.returncode, "HF_MODEL must be set" in result.stderr) == (2, True)
    result = run_script("3_offline.sh", path=recorder, HF_MODEL=str(tmp_path))
    assert (result.returncode, "TASKS must be set" in result.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("template", [False, True], ids=["SentencePiece", "a template adds <s>"])
def test_figures_of_lm_eval(tmp_path, byte_level, template):  # noqa: F811
    """The real command, offline: its figures are those of the model's own log-probabilities.

    In a folder whose path is longer than a file's name may be.
    """
    from transformers import AutoTokenizer

    from megatron_satformer.analysis.local_tasks import build_local_tasks
    from megatron_satformer.checkpoint.exported.configuration_satformer import SATFormerConfig
    from megatron_satformer.checkpoint.exported.modeling_satformer import SATFormerForCausalLM
    from tests.texts import source_texts, write_lines

    torch.manual_seed(0)
    config = SATFormerConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = SATFormerForCausalLM(config).eval()
    folder = tmp_path.joinpath(*(letter * 120 for letter in "abc"))
    model.save_pretrained(folder)
    source = byte_level if template else write_model(tmp_path / "tokenizer.model")
    export_tokenizer(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    adds = tokenizer("").input_ids
    prefix = adds if template else [2]
    assert adds == [1] * template
    text = source_texts()[0]
    documents = [{"text": text[n * 900 : n * 900 + 900]} for n in range(30)]
    corpus = write_lines(tmp_path / "corpus.jsonl", documents)
    options = {"samples": 5, "passage_words": 40}
    build_local_tasks([str(corpus)], tmp_path / "tasks", EVALUATE / "tasks", **options)

    home = str(tmp_path / "home")
    result = run_script(
        "3_offline.sh",
        HF_MODEL=str(folder),
        TASKS=str(tmp_path / "tasks"),
        RESULTS=str(tmp_path / "results"),
        HF_HOME=home,
        DEVICE="cpu",
        PYTHONWARNINGS="always:This process",
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "use of fork()" not in result.stderr  # with threads it hangs, once in a while
    told = "the token before a text is " + ("1 (<s>)" if template else "2 (</s>)")
    assert result.stdout.count(told) == 2
    (file,) = (tmp_path / "results").glob("results_*.json")
    assert len([*(tmp_path / "results").iterdir()]) == 1 + len(TASKS)
    figures = json.loads(file.read_text())["results"]

    def log_probabilities(context: str, continuation: str) -> tuple[torch.Tensor, bool]:
        """Of the continuation's tokens, and whether each is the likeliest."""
        # a text alone follows one token and no more, a context what the template puts before it
        before = tokenizer.encode(context) if context else prefix
        whole = tokenizer.encode(context + continuation, add_special_tokens=False)
        ids = torch.tensor([*(adds if context else prefix), *whole])
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0, len(before) - 1 :].log_softmax(-1)
        target = ids[len(before) :]
        return logits.gather(1, target[:, None])[:, 0], torch.equal(logits.argmax(-1), target)

    def read(name: str) -> list[dict]:
        lines = (tmp_path / "tasks/data" / f"{name}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    rows = read("perplexity")
    nats = -sum(log_probabilities("", row["text"])[0].sum().item() for row in rows)
    size = sum(len(row["text"].encode()) for row in rows)
    bits = figures["local_perplexity"]["bits_per_byte,none"]
    assert bits == pytest.approx(nats / size / math.log(2), rel=1e-4)

    found = [log_probabilities(row["context"], " " + row["answer"]) for row in read("last_word")]
    mean = sum(values.sum().item() for values, _ in found) / len(found)
    perplexity = figures["local_last_word"]["perplexity,none"]
    assert math.log(perplexity) == pytest.approx(-mean, rel=1e-4)
    assert figures["local_last_word"]["acc,none"] == sum(hit for _, hit in found) / len(found)

    rows = read("ending")
    hits = 0
    for row in rows:
        choices = [log_probabilities(row["context"], " " + c)[0].sum() for c in row["choices"]]
        hits += torch.stack(choices).argmax().item() == row["label"]
    assert figures["local_ending"]["acc,none"] == pytest.approx(hits / len(rows))
    assert 0 <= figures["local_recall"]["exact_match,first_word"] <= 1
