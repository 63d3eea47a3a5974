"""The offline tasks ask what they say they ask, from the documents that they may use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.analysis.local_tasks import build_local_tasks
from tests.texts import source_texts, write_lines

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "examples/evaluate/tasks"
OPTIONS = {"templates": TEMPLATES, "samples": 40, "passage_words": 30}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty documents, some of them empty or short, and the file that holds them."""
    text = "\n".join(source_texts())
    documents = [text[n * 5000 : (n + 1) * 5000] for n in range(60)]
    documents[50], documents[55] = "", "too short"
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return documents, write_lines(path, [{"text": document} for document in documents])


def read(folder, name):
    lines = (folder / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    return build_local_tasks(
        [str(corpus[1])], tmp_path_factory.mktemp("out") / "tasks", split="80,20,0", **OPTIONS
    )


def test_questions_come_from_validation_documents(corpus, made):
    held_out = [document for document in corpus[0] if document][47:]
    assert made.documents == len(held_out) == 12
    for name in ("last_word", "ending", "recall"):
        rows = read(made.folder, name)
        assert made.samples[name] == len(rows) > 10
        assert len({row["context"] for row in rows}) == len(rows)
        for row in rows:
            assert any(row["context"] in document for document in held_out)
    assert {row["text"] for row in read(made.folder, "perplexity")} == set(held_out)


def test_answers(corpus, made):
    for row in read(made.folder, "last_word"):
        assert row["answer"] in row["context"].split()
        assert any(f"{row['context']} {row['answer']}" in document for document in corpus[0])
    labels = set()
    for row in read(made.folder, "ending"):
        labels.add(row["label"])
        true = row["context"].split() + row["choices"][row["label"]].split()
        assert any(" ".join(true) in " ".join(document.split()) for document in corpus[0])
        assert len(set(row["choices"])) == 4
        assert {len(choice.split()) for choice in row["choices"]} == {16}
    assert labels == {0, 1, 2, 3}
    for row in read(made.folder, "recall"):
        assert row["context"].count(row["cue"]) == 1
        assert row["context"].partition(f"{row['cue']} ")[2].startswith(row["answer"])


def test_text_is_read_as_by_preprocess_data(corpus, tmp_path):
    documents = [document for document in corpus[0] if document.strip()]
    path = tmp_path / "corpus.TXT"
    path.write_bytes("\r\n=\r\n".join(documents).encode())
    command = [sys.executable, ROOT / "tools/build_eval_tasks.py", "--input", path]
    command += ["--save", tmp_path / "tasks", "--document-separator", r"\n=\n"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"from {len(documents)} documents" in result.stdout
    assert not result.stderr


def test_tasks_name_their_data(made):
    names = {path.stem for path in made.folder.glob("*.yaml")}
    assert names == {f"local_{name}" for name in made.samples}
    for name in made.samples:
        text = (made.folder / f"local_{name}.yaml").read_text()
        assert f'"{made.folder}/data/{name}.jsonl"' in text


def test_same_seed_same_questions(corpus, made, tmp_path):
    again = build_local_tasks([str(corpus[1])], tmp_path / "a", split="80,20,0", **OPTIONS)
    other = build_local_tasks([str(corpus[1])], tmp_path / "b", split="80,20,0", seed=1, **OPTIONS)
    assert read(again.folder, "recall") == read(made.folder, "recall")
    assert read(other.folder, "recall") != read(made.folder, "recall")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, r"samples \(0\) must be at least 1"),
        ({"passage_words": 10}, r"passage_words \(10\)"),
        ({"passage_words": 9000}, "no sample of local_last_word in 59 documents"),
        ({"split": "100,0,0"}, r"split \(100,0,0\) leaves validation none of 59"),
        ({"templates": Path("/nowhere")}, r"templates \(/nowhere\)"),
        ({"json_key": "body"}, "body"),
    ],
)
def test_refused(corpus, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        build_local_tasks([str(corpus[1])], tmp_path / "tasks", **(OPTIONS | options))
    assert not list(tmp_path.iterdir())


def test_overwrite(corpus, tmp_path):
    values, save = [str(corpus[1])], tmp_path / "tasks"
    build_local_tasks(values, save, **OPTIONS)
    with pytest.raises(ValueError, match="--overwrite"):
        build_local_tasks(values, save, **OPTIONS)
    build_local_tasks(values, save, overwrite=True, **OPTIONS | {"samples": 3})
    assert len(read(save, "recall")) == 3
    (save / "tasks.json").unlink()
    with pytest.raises(ValueError, match="not an earlier output"):
        build_local_tasks(values, save, overwrite=True, **OPTIONS)
