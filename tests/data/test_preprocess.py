import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_satformer.data.indexed import IndexedFile, bin_path, idx_path
from megatron_satformer.data.preprocess import PreprocessOptions, preprocess
from megatron_satformer.data.tokenizers import TokenizerOptions, build_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def flags(options: TokenizerOptions) -> list[str]:
    model = options.tokenizer_model or ""
    return ["--tokenizer-type", options.tokenizer_type, "--tokenizer-model", model]


def contents(prefix: object, key: str = "text") -> tuple[bytes, bytes]:
    whole = f"{prefix}_{key}_document"
    return bin_path(whole).read_bytes(), idx_path(whole).read_bytes()


def megatron_contents(
    path: Path, texts: list[str], options: TokenizerOptions, append_eod: bool
) -> tuple[bytes, bytes]:
    """What Megatron-LM's tool does for each document, with Megatron's own builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = build_tokenizer(options)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(bin_path(path)), dtype)
    for text in texts:
        ids = list(tokenizer.encode(text))
        if ids and append_eod:
            ids.append(tokenizer.eod)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(idx_path(path)))
    return bin_path(path).read_bytes(), idx_path(path).read_bytes()


@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_equal_megatrons(
    corpus: Path, texts: list[str], spm: TokenizerOptions, tmp_path: Path, append_eod: bool
) -> None:
    out = tmp_path / "new" / "folder" / "out"
    summary = preprocess(
        PreprocessOptions([corpus], out, spm, ("text", "title"), append_eod, workers=1)
    )
    for key, values in (("text", texts), ("title", [text[:20] for text in texts])):
        expected = megatron_contents(tmp_path / key, values, spm, append_eod)
        assert contents(out, key) == expected
    assert summary.documents == 2 * len(texts)
    assert summary.empty_documents == 2 * texts.count("")
    assert summary.json_bytes == corpus.stat().st_size
    data = IndexedFile(f"{out}_text_document")
    assert data.documents == len(texts)
    ends = np.cumsum(data.lengths) - 1
    eod = build_tokenizer(spm).eod
    assert (data.tokens[ends] == eod).all() == append_eod


def test_output_does_not_depend_on_workers_or_compression(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, tool: Callable, monkeypatch
) -> None:
    # Large enough for a dozen chunks, with the order of documents visible.
    lines = corpus.read_bytes() * 4
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(lines)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines, 1))
    alone = tmp_path / "alone"
    preprocess(PreprocessOptions([plain, corpus], alone, spm, append_eod=True, workers=1))
    for name, source, workers in (("two", plain, 2), ("three", packed, 3)):
        result = tool(
            "preprocess_data", "--input", source, corpus, *flags(spm), "--append-eod",
            "--output-prefix", tmp_path / name, "--workers", workers, "--log-interval", 500,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert contents(tmp_path / name) == contents(alone)
        assert "documents, " in result.stderr
        assert len(result.stdout.splitlines()) == 1
        assert f"{IndexedFile(f'{alone}_text_document').tokens.size} tokens of uint16" in (
            result.stdout
        )
    assert not list(tmp_path.glob("*.partial"))


BAD = {
    "json": ('{"text": "a"', "line 3: invalid JSON"),
    "key": ('{"body": "a"}', 'line 3: no key "text" (its keys: body); see --json-keys'),
    "string": ('{"text": 3}', 'line 3: "text" must be a string, not a number'),
    "utf8": (b'{"text": "\xff"}', "line 3: invalid UTF-8"),
    "surrogate": (r'{"text": "\udc00"}', "line 3: "),
    "empty": ("", "line 3: the line is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_is_written(
    name: str, spm: TokenizerOptions, tmp_path: Path, fails: Callable, names: Callable
) -> None:
    line, message = BAD[name]
    bad = line if isinstance(line, bytes) else line.encode()
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + bad + b'\n{"text": "c"}\n')
    out = tmp_path / "out"
    error = fails("preprocess_data", "--input", source, *flags(spm), "--output-prefix", out / "x")
    assert f"error: {source}, {message}" in error
    assert names(out) == []


def test_a_bad_line_far_in_is_named_by_workers_too(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, fails: Callable, names: Callable
) -> None:
    source = tmp_path / "bad.jsonl"
    good = corpus.read_bytes()
    source.write_bytes(good * 3 + b"broken\n" + good * 3 + b"broken too\n")
    number = 3 * good.count(b"\n") + 1
    out = tmp_path / "out"
    error = fails(
        "preprocess_data", "--input", source, *flags(spm), "--output-prefix", out / "x",
        "--workers", 2, "--log-interval", 10**9,
    )  # fmt: skip
    assert f"{source}, line {number}: invalid JSON" in error
    assert names(out) == []


def test_bad_options(corpus: Path, spm: TokenizerOptions, tmp_path: Path, fails: Callable) -> None:
    empty, blank = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    empty.touch()
    blank.write_text('{"text": ""}\n')
    usual = {"--input": corpus, "--output-prefix": tmp_path / "x"}
    model = flags(spm)
    cases: list[tuple[dict[str, object], list[object], str]] = [
        ({}, ["--workers", 0], "workers (0) must be at least 1"),
        ({}, ["--log-interval", 0], "log_interval (0) must be at least 1"),
        ({}, ["--json-keys", "text", "text"], "json_keys (text text) must name each key once"),
        ({}, ["--split-sentences"], "unrecognized arguments: --split-sentences"),
        ({}, ["--partitions", 2], "unrecognized arguments: --partitions 2"),
        ({}, ["--append"], "unrecognized arguments: --append"),
        ({"--input": tmp_path / "none"}, [], f"input ({tmp_path}/none) does not exist"),
        ({"--input": empty}, [], "has no documents. Nothing was written"),
        ({"--input": blank}, [], "every document is empty"),
        ({"--tokenizer-model": "/none"}, [], "tokenizer_model (/none) does not exist"),
        ({"--tokenizer-type": "BertWordPieceCase"}, [], "tokenizer_type (BertWordPieceCase) must"),
    ]
    for changes, more, message in cases:
        given = {**usual, **dict(zip(model[::2], model[1::2], strict=True)), **changes}
        error = fails("preprocess_data", *[x for pair in given.items() for x in pair], *more)
        assert message in error
    assert list(tmp_path.glob("x*")) == []


def test_append_eod_needs_an_eod(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    model = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(model))
    options = TokenizerOptions("HuggingFaceTokenizer", str(model))
    with pytest.raises(ValueError, match="append_eod needs a tokenizer with an end-of-sequence"):
        preprocess(PreprocessOptions([corpus], tmp_path / "x", options, append_eod=True))


@pytest.mark.parametrize("text", ["1 2 300", "1 -1", f"1 {2**70}", "hello"])
def test_ids_that_do_not_fit_name_the_line(text: str, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "1 2"}) + "\n" + json.dumps({"text": text}) + "\n")
    options = TokenizerOptions("NullTokenizer", None, 300)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: (token id|NullTokenizer)"):
        preprocess(PreprocessOptions([source], tmp_path / "x", options))
    assert list(tmp_path.glob("x*")) == []


def test_existing_output(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, tool: Callable, fails: Callable
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "first"}\n')
    command = ["--input", source, *flags(spm), "--output-prefix", tmp_path / "x"]
    assert tool("preprocess_data", *command).returncode == 0
    before = contents(tmp_path / "x")
    source.write_text('{"text": "a second one"}\n')
    assert "x_text_document.idx exists already. Pass --overwrite" in fails(
        "preprocess_data", *command
    )
    assert contents(tmp_path / "x") == before
    assert tool("preprocess_data", *command, "--overwrite").returncode == 0
    assert contents(tmp_path / "x") != before


def test_the_tool_imports_neither_torch_nor_megatron(spm: TokenizerOptions, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "first"}\n')
    code = (
        "import runpy, sys\n"
        "sys.argv.pop(0)\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "loaded = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    command = [sys.executable, "-c", code, str(TOOL), "--input", str(source), *flags(spm)]
    subprocess.run([*command, "--output-prefix", str(tmp_path / "x")], check=True)


@pytest.fixture
def running(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A run in the middle of its work: tokens are on disk, much is still to come."""
    source = tmp_path / "large.jsonl"
    source.write_bytes(corpus.read_bytes() * 20)
    command = [sys.executable, str(TOOL), "--input", str(source), *flags(spm), "--workers", "2"]
    command += ["--output-prefix", str(tmp_path / "out" / "x"), "--log-interval", "100"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "Processed" in process.stderr.readline()
    yield process, command
    process.kill()
    process.communicate()


def test_after_a_kill_nothing_is_left_running_and_a_rerun_succeeds(
    running: tuple[subprocess.Popen[str], list[str]], tmp_path: Path, names: Callable
) -> None:
    process, command = running
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [name for name in names(tmp_path / "out") if not name.endswith(".partial")]
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    subprocess.run(command, check=True, capture_output=True)
    assert names(tmp_path / "out") == ["x_text_document.bin", "x_text_document.idx"]
    model = TokenizerOptions(
        "SentencePieceTokenizer", command[command.index("--tokenizer-model") + 1]
    )
    source = tmp_path / "large.jsonl"
    preprocess(PreprocessOptions([source], tmp_path / "whole", model, workers=1))
    assert contents(tmp_path / "out" / "x") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(
    running: tuple[subprocess.Popen[str], list[str]], tmp_path: Path, names: Callable, number: int
) -> None:
    process, _ = running
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert names(tmp_path / "out") == []


def test_a_dead_worker_is_an_error(
    running: tuple[subprocess.Popen[str], list[str]], tmp_path: Path, names: Callable
) -> None:
    process, _ = running
    # The last child: the first is multiprocessing's resource tracker.
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: workers (2): one of them died")
    assert "Traceback" not in stderr
    assert names(tmp_path / "out") == []


def test_a_full_disk_is_an_error(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, fails: Callable, names: Callable
) -> None:
    out = tmp_path / "out"
    # A limit on file size stands in for the disk: writing fails in the same way.
    error = fails(
        "preprocess_data", "--input", corpus, *flags(spm), "--output-prefix", out / "x",
        "--workers", 1, "--log-interval", 10**9,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert os.strerror(27) in error
    assert names(out) == []
