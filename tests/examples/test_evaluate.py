"""examples/evaluate: the commands that it runs, and the figures of the real lm_eval."""

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

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = ROOT / "examples/evaluate"
BIN = Path(sys.executable).parent
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
    """A PATH entry whose lm_eval only prints its arguments, one a line."""
    path = tmp_path_factory.mktemp("bin")
    (path / "lm_eval").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (path / "lm_eval").chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path):
    """What looks like an exported folder to the scripts."""
    path = tmp_path / "a model, exported"
    path.mkdir()
    (path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.mark.parametrize("script", SUITES)
def test_online_suites(recorder, folder, script):
    result = run_script(script, "--limit", "5", path=recorder, HF_MODEL=str(folder))
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    flags = {flag: words[n + 1] for n, flag in enumerate(words[:-1]) if flag.startswith("--")}
    assert words[0] == "run"
    assert set(flags["--tasks"].split(",")) == SUITES[script]
    assert flags["--limit"] == "5"
    assert json.loads(flags["--model_args"]) == {
        "pretrained": str(folder),
        "trust_remote_code": True,
        "dtype": "auto",
        "prefix_token_id": 7,
    }


def test_lm_eval_has_the_tasks():
    tasks = Path(find_spec("lm_eval").origin).parent / "tasks"
    known = set()
    for file in tasks.glob("*/**/*.yaml"):
        known |= set(re.findall(r"^task: (\w+)\s*$", file.read_text("utf-8"), re.MULTILINE))
    assert set().union(*SUITES.values()) <= known


def test_mistakes(recorder, folder, tmp_path):
    for environment, words in (
        ({}, "HF_MODEL must be set"),
        ({"HF_MODEL": str(tmp_path)}, "it has no config.json"),
    ):
        result = run_script("1_zero_shot.sh", path=recorder, **environment)
        assert (result.returncode, words in result.stderr) == (2, True), result.stderr
    result = run_script("3_offline.sh", path=recorder, HF_MODEL=str(folder))
    assert (result.returncode, "TASKS must be set" in result.stderr) == (2, True)
    (folder / "config.json").write_text('{"eos_token_id": null}')
    result = run_script("1_zero_shot.sh", path=recorder, HF_MODEL=str(folder))
    assert "PREFIX_TOKEN_ID" in result.stderr
    assert result.returncode != 0
    (folder / "tokenizer_config.json").unlink()
    result = run_script("1_zero_shot.sh", path=recorder, HF_MODEL=str(folder))
    assert "no tokenizer" in result.stderr


@pytest.mark.slow
def test_figures_of_lm_eval(tmp_path):
    """The real command, offline: its figures are those of the model's own log-probabilities."""
    from transformers import AutoTokenizer

    from megatron_satformer.analysis.local_tasks import build_local_tasks
    from megatron_satformer.checkpoint.exported.configuration_satformer import SATFormerConfig
    from megatron_satformer.checkpoint.exported.modeling_satformer import SATFormerForCausalLM
    from tests.checkpoint.hugging_face.test_tokenizer import export_tokenizer, write_model
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
    model.save_pretrained(tmp_path / "hf")
    export_tokenizer(write_model(tmp_path / "tokenizer.model"), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    text = source_texts()[0]
    documents = [{"text": text[n * 900 : n * 900 + 900]} for n in range(30)]
    corpus = write_lines(tmp_path / "corpus.jsonl", documents)
    options = {"samples": 5, "passage_words": 40}
    build_local_tasks([str(corpus)], tmp_path / "tasks", EVALUATE / "tasks", **options)

    home = str(tmp_path / "home")
    result = run_script(
        "3_offline.sh",
        HF_MODEL=str(tmp_path / "hf"),
        TASKS=str(tmp_path / "tasks"),
        RESULTS=str(tmp_path / "results"),
        HF_HOME=home,
        DEVICE="cpu",
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    figures = json.loads(file.read_text())["results"]

    def log_probabilities(context: str, continuation: str) -> tuple[torch.Tensor, bool]:
        """Of the continuation's tokens, and whether each is the likeliest."""
        # lm_eval puts the end-of-document token before a text alone, and nothing before a context
        before = tokenizer.encode(context) if context else [2]
        whole = tokenizer.encode(context + continuation)
        ids = torch.tensor(whole if context else [2, *whole])
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
