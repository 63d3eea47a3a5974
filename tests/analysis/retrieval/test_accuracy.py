"""Exact match is that of greedy decoding, by task, length and depth, of either kind of model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_satformer.analysis.generate import load_model
from megatron_satformer.analysis.retrieval.accuracy import (
    Answered,
    answer,
    evaluate_retrieval,
    find_test_sets,
    score,
)
from megatron_satformer.analysis.retrieval.examples import Difficulty, Example
from megatron_satformer.analysis.retrieval.files import Plan, build_retrieval_data
from megatron_satformer.analysis.retrieval.vocabulary import write_word_tokenizer
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from tests.small import PP2, RTOL, SP, TP2

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model whose greedy words depend on all that it has read, and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    write_word_tokenizer(folder, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,
    )
    model = LlamaForCausalLM(config).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def continue_greedily(model, tokenizer, text, words):
    ids = tokenizer(text, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=words, do_sample=False, pad_token_id=0
    )
    return "".join(f" w{n}" for n in made[0, ids.size(1) :].tolist())


def test_right_where_greedy_decoding_gives_the_answer(llama):
    """Answers that the model gives and answers with one word wrong, several to a text."""
    model, tokenizer = llama
    rng = np.random.default_rng(0)
    examples, expected = [], []
    while len(expected) < 24:
        parts, depths = [], []
        for number in range(3):
            parts.append("".join(f" w{n}" for n in rng.integers(1, 64, size=rng.integers(3, 9))))
            true = continue_greedily(model, tokenizer, "".join(parts), 2).split()
            if "w0" in true:  # the end of a document
                break
            right = bool(rng.integers(2))
            if not right:
                place = rng.integers(2)
                true[place] = "w1" if true[place] != "w1" else "w2"
            parts.append("".join(f" {word}" for word in true))
            depths.append(number / 2)
            expected.append((right, number / 2))
        if depths:
            examples.append(Example(tuple(parts[: 2 * len(depths)]), tuple(depths)))
    assert {right for right, _ in expected} == {True, False}
    answers = answer(model, tokenizer, examples)
    assert [(one.right, one.depth) for one in answers] == expected
    alone = [one for example in examples for one in answer(model, tokenizer, [example])]
    for one, other in zip(answers, alone, strict=True):
        assert one.right == other.right
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    losses = {right: [a.loss for a in answers if a.right == right] for right in (True, False)}
    assert np.mean(losses[True]) < np.mean(losses[False])


def test_score():
    answers = [Answered(n < 30, 2.0, None) for n in range(40)]
    found = score(answers)
    assert (found.exact_match, found.answers, found.loss) == (0.75, 40, 2.0)
    # Wilson's interval of 30 in 40, as tables have it
    assert (found.low, found.high) == (
        pytest.approx(0.598, abs=1e-3),
        pytest.approx(0.858, abs=1e-3),
    )
    assert score(answers[:30]).low > 0.88
    assert score(answers[30:]).high < 0.28


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    save = tmp_path_factory.mktemp("data") / "tasks"
    plan = Plan(
        ("mqar", "induction"), (32, 96), train=4000, valid=100, test=100, train_lengths=(32,)
    )
    build_retrieval_data(save, plan, Difficulty(pairs=2), vocab_size=64, tell=lambda line: None)
    return save


def test_by_task_length_and_depth(llama, data, tmp_path):
    model, tokenizer = llama
    sets = find_test_sets(data)
    assert [(one.task, one.length) for one in sets] == [
        (task, length) for task in ("induction", "mqar") for length in (32, 96)
    ]
    with pytest.raises(ValueError, match="lengths must be at most 64, which the model was made"):
        evaluate_retrieval(model, tokenizer, sets, tell=lambda line: None)
    lines: list[str] = []
    short = find_test_sets(data, lengths=[32])
    found = evaluate_retrieval(model, tokenizer, short, 7, 50, lines.append)
    assert found["induction"]["32"]["all"]["answers"] == 50
    assert found["mqar"]["32"]["all"]["answers"] == 2 * 50
    depths = found["induction"]["32"]["by_depth"]
    assert [*depths] == ["0", "25", "50", "75", "100"]
    assert {part["answers"] for part in depths.values()} == {10}
    quarters = found["mqar"]["32"]["by_depth"]
    assert set(quarters) <= {"0-25", "25-50", "50-75", "75-100"}
    assert sum(part["answers"] for part in quarters.values()) == 100
    assert [line.split()[:3] for line in lines] == [
        ["induction", "32", "tokens"],
        ["mqar", "32", "tokens"],
    ]
    for wrong, words in [
        ({"tasks": ["passkey"]}, r"tasks \(passkey\) must be there to be tested: induction, mqar"),
        ({"lengths": [33]}, r"lengths \(33\) must be there to be tested: 32, 96"),
    ]:
        with pytest.raises(ValueError, match=words):
            find_test_sets(data, **wrong)
    with pytest.raises(ValueError, match=r"it has no retrieval\.json"):
        find_test_sets(tmp_path)
    for wrong in ({"batch_size": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            evaluate_retrieval(model, tokenizer, short, **wrong)


@pytest.mark.slow
def test_trained_with_masks_and_evaluated(pretrain, data, tmp_path):
    """One loss in every layout, that of the answers; lm_eval agrees on each of them."""
    flags = "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64".split()
    flags += "--seq-length 32 --micro-batch-size 16 --global-batch-size 32 --lr 1e-2".split()
    flags += ["--adam-eps", 1e-6]  # above rounding noise around 0
    flags += "--eval-iters 3 --num-workers 0 --log-interval 1 --train-iters 80".split()
    flags += ["--eval-interval", 80, "--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", data / "tokenizer", "--use-loss-masks"]
    for split in ("train", "valid", "test"):
        # Megatron draws 96 of 99 samples: one more document would make it a hundred
        flags += [f"--{split}-data-path", data / split / "mqar_32"]
    flags += ["--make-vocab-size-divisible-by", 32]  # 64 rows, with and without TP2
    flags += ["--data-cache-path", tmp_path / "cache"]
    saving = ["--save", tmp_path / "ckpt", "--save-interval", 80]
    alone = pretrain(1, *flags, *saving)
    assert "> loss mask: 8,000 tokens of" in alone.output
    going_on = [*flags, "--load", tmp_path / "ckpt", "--finetune", "--no-load-optim"]
    going_on += ["--no-load-rng", "--exit-interval", 3]
    one = pretrain(1, *going_on)
    spread = pretrain(4, *going_on, *TP2.split(), SP, *PP2.split())
    for ours, theirs in ((one.losses, spread.losses), (one.grad_norms, spread.grad_norms)):
        assert len(ours) == 3
        np.testing.assert_allclose(theirs, ours, rtol=20 * RTOL)

    export_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    sets = find_test_sets(data, ["mqar"], [32])
    found = []
    for folder in ("ckpt", "hf"):
        save = tmp_path / f"{folder}.json"
        command = [
            sys.executable,
            ROOT / "tools/evaluate_retrieval.py",
            "--load",
            tmp_path / folder,
        ]
        command += ["--data", data, "--save", save, "--tasks", "mqar", "--lengths", "32"]
        subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
        found.append(json.loads(save.read_text())["tasks"]["mqar"]["32"])
    assert found[0] == found[1]
    told = [line for line in alone.output.splitlines() if "on test set" in line]
    loss = float(told[-1].split("lm loss value: ")[1].split()[0])
    assert found[0]["all"]["loss"] == pytest.approx(loss, rel=0.01)
    assert loss < 3.8, "of a value among 32, and not of any word among 64"
    check_lm_eval(data, tmp_path, sets)


def check_lm_eval(data, folder, sets):
    """lm_eval asks one answer of each text, and says of each what we say."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets")}
    command = [sys.executable, ROOT / "tools/evaluate.py", "--model", folder / "hf", "--tasks"]
    command += [
        "retrieval_mqar_32",
        "--save",
        folder / "results",
        "--include_path",
        data / "lm_eval",
    ]
    command += ["--device", "cpu"]
    subprocess.run(
        [*map(str, command)], check=True, env=environment, capture_output=True, text=True
    )
    (file,) = (folder / "results").glob("samples_retrieval_mqar_32*.jsonl")
    samples = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    model, tokenizer = load_model(folder / "hf")
    rows = [json.loads(line) for line in sets[0].file.read_text("utf-8").splitlines()]
    ours = []
    for row, example in zip(rows, sets[0].examples(), strict=True):
        ours.append(answer(model, tokenizer, [example])[row["asked"] // 2].right)
    theirs = {sample["doc_id"]: bool(sample["acc"]) for sample in samples}
    assert [theirs[n] for n in range(len(rows))] == ours
    assert 0 < sum(ours) < len(ours)
