"""From a checkpoint or a folder to what is written; the tool itself."""

import importlib.util
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_satformer.analysis.gates.access import build_grid
from megatron_satformer.analysis.gates.measure import Measured, batches, read_text
from megatron_satformer.analysis.retrieval.examples import Difficulty
from megatron_satformer.analysis.retrieval.files import Plan, build_retrieval_data
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.model.architectures import PLAIN
from tests.analysis.gates.measured import TOKENIZER
from tests.datasets import write_dataset
from tests.models import build_exported, build_twin
from tests.parallel.layouts import DILATED, GATED, NORMED

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 96
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def load_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints = load_file(ROOT / "tests/checkpoint/checkpoints.py")
checkpoints.VOCABULARY, checkpoints.PADDED = VOCABULARY, 128
tool = load_file(ROOT / "tools" / "analyze_gates.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Retrieval tasks with their tokenizer, a text of its words, checkpoints and an export."""
    folder = tmp_path_factory.mktemp("gates")
    plan = Plan(tasks=("mqar", "induction"), lengths=(32, 128), train=0, valid=0, test=10)
    build_retrieval_data(folder / "tasks", plan, Difficulty(pairs=2), vocab_size=VOCABULARY)
    rng = np.random.default_rng(0)
    write_dataset(folder / "text", rng.integers(0, VOCABULARY, 1200), [400] * 3, VOCABULARY)
    for name in (*GATED, *DILATED, *NORMED, PLAIN):
        twin = checkpoints.build_reference(vocab_size=VOCABULARY, architecture=name)
        checkpoints.write_checkpoint(
            folder / name,
            twin,
            vocab_size=None,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder / "tasks" / "tokenizer"),
        )
    export_to_hf(folder / "satformer", folder / "hf")
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    def call(load, *flags, out="out"):
        argv = ["--load", made / load, "--data", made / "text", "--out", tmp_path / out, *flags]
        monkeypatch.setattr(sys, "argv", ["analyze_gates.py", *map(str, argv)])
        tool.main()
        told = capsys.readouterr().out
        return json.loads((tmp_path / out / "gates.json").read_text()), told, tmp_path / out

    return call


def test_either_kind_of_folder(made, run):
    flags = ["--split", "67,33,0", "--seq-length", 32, "--retrieval", made / "tasks"]
    flags += ["--ablation-tokens", 64]
    found, told, out = run("satformer", *flags)
    other, _, _ = run("hf", *flags, out="other")
    for name in ("mean", "zeros", "claims", "categories", "ablations", "opened_most"):
        assert found[name] == other[name], name
    assert {path.name for path in out.iterdir()} == {
        *("gates.json", "gates.html", "mean.png", "zeros.png", "categories.png")
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("*.png"))
    assert (found["tokens"], found["sequences"]) == (12 * 32, 12)  # of the third document
    assert (found["rows"], found["columns"]) == (["2", "3"], ["1", "2"])
    assert found["exact_zeros"]["at_initialisation"] == 0.5
    assert found["exact_zeros"]["share"] == pytest.approx(np.mean(found["zeros"]))
    groups = {entry["group"] for entry in found["categories"]}
    assert groups == {
        *("word", "kind", "frequency", "occurrence", "position", "loss", "task", "prompts")
    }
    tasks = {e["category"] for e in found["categories"] if e["group"] == "task"}
    assert tasks == {"text", "mqar", "induction"}  # those of 128 tokens are too long
    for claim in found["claims"]:
        assert claim["sentence"] in told
        assert claim["verdict"] in ("supported", "not supported", "undecided")
    assert len(found["claims"]) == 4
    changes = found["ablations"]["changes"]
    assert len(changes) == 1 + 2 + 4 + 1 + 2
    assert set(changes[0]["exact_match"]) == {"mqar", "induction"}
    assert found["ablations"]["tokens"] == 64
    most = found["opened_most"][0]["tokens"]
    assert most[0]["value"] >= most[-1]["value"] > 0
    assert {"token", "before", "after"} < set(most[0])
    page = (out / "gates.html").read_text()
    assert "<html" in page


@pytest.mark.parametrize(
    ("architecture", "by_token"), [("denseformer", False), ("muddformer", True)]
)
def test_other_learned_access_has_its_pictures(run, architecture, by_token):
    found, _, out = run(architecture, "--seq-length", 32, "--ablation-tokens", 32)
    assert (found["gates"], found["by_token"], found["value"]) == (False, by_token, "weight")
    names = {"gates.json", "gates.html", "mean.png"} | ({"categories.png"} if by_token else set())
    assert {path.name for path in out.iterdir()} == names
    assert found["claims"] == []
    assert ("categories" in found) == by_token
    mean = np.array(found["mean"], dtype=float)
    assert mean.shape == (3, 4 if architecture in DILATED else 13)
    assert np.isnan(mean[0]).any()  # a layer reads none that come later


def test_a_plain_transformer_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"architecture \(transformer\) must be one whose layers"):
        run("transformer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seq-length", 65], r"seq_length \(65\) must be at most 64, the model's"),
        (["--max-tokens", 40, "--seq-length", 48], r"seq_length \(48\) must be at most the tokens"),
        (["--split", "100,0,0"], r"split \(100,0,0\) must leave validation a document"),
        (["--max-tokens", 1], r"max_tokens \(1\) must be at least 2"),
        (["--retrieval", "/nowhere"], r"retrieval \(/nowhere\) must be a folder made by"),
        (["--device", "cuda:99"], r"device \(cuda:99\) must be there"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told(run, tmp_path, flags, told):
    with pytest.raises(ValueError, match=told):
        run("satformer", *flags)
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_tokenizer_are_refused(made, run, tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "other", [VOCABULARY] * 90, [90], VOCABULARY + 1)
    with pytest.raises(ValueError, match=rf"must be in the model's tokens \({VOCABULARY}\)"):
        run("satformer", "--data", data)


def test_what_else_lies_there_is_kept(run, tmp_path):
    flags = ["--seq-length", 32, "--max-tokens", 64, "--ablation-tokens", 0]
    found, _, out = run("satformer", *flags)
    assert "ablations" not in found
    with pytest.raises(ValueError, match=r"out \(.*\) exists already. Pass --overwrite"):
        run("satformer", *flags)
    run("satformer", *flags, "--overwrite")
    (out / "gates.json").rename(out / "mine.json")
    with pytest.raises(ValueError, match="is not an earlier output of this command"):
        run("satformer", *flags, "--overwrite")
    assert (out / "mine.json").exists()


def test_memory_does_not_grow_with_the_text():
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    model = build_exported(build_twin(vocab_size=50, **shape, **heads)).eval()
    tokens = np.random.default_rng(0).integers(0, 50, 60 * 2048).astype(np.uint16)
    grid = build_grid(model, torch.zeros(1, 4, dtype=torch.int64))
    edges, fifths = np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(50, np.int8)

    def peak(most: int) -> int:
        measured = Measured(grid, TOKENIZER, [])
        tracemalloc.start()
        rows = batches(tokens, 64, most)
        read_text(model, measured, rows, fifths, edges, lambda line: None)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert measured.tokens == most
        return found

    few = peak(4 * 2048)
    assert peak(60 * 2048) < 1.2 * few
