import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_satformer.data.datasets.indexed import IndexedFile, bin_path, idx_path
from megatron_satformer.data.datasets.manifest import read_manifest
from megatron_satformer.data.preprocess import encoding, main
from megatron_satformer.data.preprocess.main import preprocess
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.fast import fast_pipeline
from megatron_satformer.data.tokenizers.options import TokenizerOptions

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"


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


@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("keep_empty", [False, True])
def test_bytes_equal_megatrons(
    corpus: Path,
    texts: list[str],
    spm: TokenizerOptions,
    tmp_path: Path,
    backend: str,
    keep_empty: bool,
) -> None:
    out = tmp_path / "new" / "folder" / "out"
    summary = preprocess(
        PreprocessOptions(
            [corpus],
            out,
            spm,
            ("text", "title"),
            append_eod=not keep_empty,
            keep_empty=keep_empty,
            tokenizer_backend=backend,
            verify_fraction=1.0,
            workers=1,
            chunk_bytes=50_000,
        )
    )
    for key, values in (("text", texts), ("title", [text[:20] for text in texts])):
        kept = values if keep_empty else [text for text in values if text]
        assert contents(out, key) == megatron_contents(tmp_path / key, kept, spm, not keep_empty)
    empty = 2 * texts.count("")
    assert summary.documents == 2 * len(texts) - (0 if keep_empty else empty)
    assert (summary.empty_documents, summary.rejected_documents) == (empty, 0)
    assert summary.text_bytes == corpus.stat().st_size
    assert summary.backend == backend
    compared = summary.verified_documents + summary.routed_documents
    assert compared == (2 * len(texts) if backend == "fast" else 0)
    entry = read_manifest(Path(f"{out}.manifest.json"))["datasets"]["out_text_document"]
    data = IndexedFile(f"{out}_text_document")
    assert (entry["documents"], entry["tokens"]) == (data.documents, data.tokens.size)
    assert entry["largest_token"] == data.tokens.max()


def test_output_does_not_depend_on_workers_or_compression(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, tool: Callable
) -> None:
    # Large enough for some chunks, with the order of documents visible.
    lines = corpus.read_bytes() * 4
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(lines)
    packed.write_bytes(gzip.compress(lines, 1))
    alone = tmp_path / "alone"
    preprocess(PreprocessOptions([plain, corpus], alone, spm, append_eod=True, workers=1))
    log = tmp_path / "log.jsonl"
    for name, source, workers in (("two", plain, 2), ("three", packed, 3)):
        result = tool(
            "preprocess_data", "--input", source, corpus, *flags(spm), "--append-eod",
            "--output-prefix", tmp_path / name, "--workers", workers, "--json-log", log,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert contents(tmp_path / name) == contents(alone)
        assert len(result.stdout.splitlines()) == 1
        assert f"{IndexedFile(f'{alone}_text_document').tokens.size} tokens of uint16" in (
            result.stdout
        )
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["event"] for record in records].count("tokenized") == 2
    assert all(record["bytes"] == len(lines) + corpus.stat().st_size for record in records[-1:])
    assert not list(tmp_path.glob("*.partial"))


def test_standard_input_and_text(spm: TokenizerOptions, tmp_path: Path, tool: Callable) -> None:
    texts = ["one\ntwo", "three", "four "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    preprocess(PreprocessOptions([tmp_path / "a.jsonl"], tmp_path / "a", spm))
    (tmp_path / "b.txt").write_text("\n--\n".join(texts))
    separator = ["--document-separator", r"\n--\n"]
    for name, source, more, stdin in (
        ("b", tmp_path / "b.txt", separator, None),
        ("c", "-", separator, "\n--\n".join(texts)),
        ("d", "-", [], (tmp_path / "a.jsonl").read_text()),
    ):
        result = tool(
            "preprocess_data", "--input", source, *more, *flags(spm),
            "--output-prefix", tmp_path / name, input=stdin,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert contents(tmp_path / name) == contents(tmp_path / "a")


BAD = {
    "json": ('{"text": "a"', "invalid JSON"),
    "key": ('{"body": "a"}', 'no key "text" (its keys: body); see --json-keys'),
    "string": ('{"text": 3}', '"text" must be a string, not a number'),
    "utf8": (b'{"text": "\xff"}', "invalid UTF-8"),
    "surrogate": (r'{"text": "\udc00"}', '"text" has half a surrogate pair'),
    "empty": ("", "the line is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_skipped(name: str, spm: TokenizerOptions, tmp_path: Path) -> None:
    line, message = BAD[name]
    bad = line if isinstance(line, bytes) else line.encode()
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + bad + b'\n{"text": "c"}\n')
    options = PreprocessOptions([source], tmp_path / "out" / "x", spm)
    with pytest.raises(ValueError, match="Correct or remove it") as error:
        preprocess(options)
    assert str(error.value).startswith(f"{source}, line 3: {message}")
    assert os.listdir(tmp_path / "out") == []
    skipping = PreprocessOptions([source], tmp_path / "out" / "x", spm, on_error="skip")
    assert preprocess(skipping).rejected_documents == 1
    (reject,) = map(json.loads, Path(f"{tmp_path}/out/x.rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"]) == (str(source), 3)
    assert message in reject["reason"]
    whole = tmp_path / "whole.jsonl"
    whole.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    preprocess(PreprocessOptions([whole], tmp_path / "whole", spm))
    assert contents(tmp_path / "out" / "x") == contents(tmp_path / "whole")
    source.write_text(whole.read_text())
    preprocess(PreprocessOptions([source], tmp_path / "out" / "x", spm, overwrite=True))
    assert not Path(f"{tmp_path}/out/x.rejects.jsonl").exists()


@pytest.mark.slow
def test_a_bad_line_far_in_is_named_by_workers_and_can_be_skipped_from_there(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, fails: Callable, tool: Callable
) -> None:
    source = tmp_path / "bad.jsonl"
    good = corpus.read_bytes()
    source.write_bytes(good * 6 + b"broken\n" + good * 3 + b"broken too\n")
    number = 6 * good.count(b"\n") + 1
    command = ["--input", source, *flags(spm), "--output-prefix", tmp_path / "x"]
    error = fails("preprocess_data", *command, "--workers", 2)
    assert f"{source}, line {number}: invalid JSON" in error
    assert not list(tmp_path.glob("x_*"))
    result = tool("preprocess_data", *command, "--on-error", "skip")
    assert "continuing after" in result.stderr
    assert "2 rejected" in result.stdout
    clean = tmp_path / "clean.jsonl"
    clean.write_bytes(good * 9)
    preprocess(PreprocessOptions([clean], tmp_path / "y", spm))
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_bad_options(corpus: Path, spm: TokenizerOptions, tmp_path: Path, fails: Callable) -> None:
    empty, blank, plain = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl", tmp_path / "a.txt"
    empty.touch()
    plain.touch()
    blank.write_text('{"text": ""}\n')
    usual = {"--input": corpus, "--output-prefix": tmp_path / "x"}
    model = flags(spm)
    separated = ["--json-keys", "a", "b", "--document-separator", ""]
    cases: list[tuple[dict[str, object], list[object], str]] = [
        ({}, ["--workers", 0], "workers (0) must be at least 1"),
        ({}, ["--log-interval", 0], "log_interval (0) must be at least 1"),
        ({}, ["--verify-fraction", 2], "verify_fraction (2.0) must be from 0 to 1"),
        ({}, ["--json-keys", "text", "text"], "json_keys (text text) must name each key once"),
        ({"--output-prefix": f"{tmp_path}/"}, [], "must end in a name"),
        ({}, ["--split-sentences"], "--split-sentences is refused: data sets of sentences are"),
        ({}, ["--dataset-impl", "lazy"], "invalid choice: 'lazy'"),
        ({}, ["--append"], "unrecognized arguments: --append"),
        ({}, ["--json-log", tmp_path / "none" / "log"], "cannot be written: No such file"),
        ({"--input": tmp_path / "none"}, [], f"input ({tmp_path}/none) does not exist"),
        ({"--input": plain}, [], "--document-separator"),
        ({"--input": plain}, separated, "json_keys (a b) must be one with plain text"),
        ({"--input": empty}, [], "has no documents. Nothing was written"),
        ({"--input": blank}, [], "no document has a token"),
        ({"--tokenizer-model": "/none"}, [], "tokenizer_model (/none) does not exist"),
        ({"--tokenizer-type": "BertWordPieceCase"}, [], "tokenizer_type (BertWordPieceCase) must"),
    ]
    for changes, more, message in cases:
        given = {**usual, **dict(zip(model[::2], model[1::2], strict=True)), **changes}
        error = fails("preprocess_data", *[x for pair in given.items() for x in pair], *more)
        assert message in error
    assert list(tmp_path.glob("x*")) == []


def test_old_flags_are_taken_with_a_note(
    spm: TokenizerOptions, tmp_path: Path, tool: Callable
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "first"}\n')
    old = ["--dataset-impl", "mmap", "--chunk-size", 25, "--partitions", 2]
    kind, model = flags(spm)[1], flags(spm)[3]
    result = tool(
        "preprocess_data", "--input", source, "--tokenizer-type", kind, "--vocab", model, *old,
        "--keep-sequential-samples", "--output-prefix", tmp_path / "x",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    notes = result.stderr.splitlines()
    for flag in ("--dataset-impl", "--chunk-size", "--partitions", "--keep-seq", "--vocab"):
        assert sum(note.startswith(f"note: {flag}") for note in notes) == 1, notes


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


def test_a_mismatch_starts_over_on_the_reference(
    corpus: Path,
    spm: TokenizerOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def swapped(self: object, texts: list[str]) -> object:
        ids, lengths = right(self, texts)
        # Nothing is wrong until a document late in the corpus.
        return (ids[::-1], lengths) if any("help(" in text for text in texts) else (ids, lengths)

    right = encoding.FastTokenizer.encode_batch
    options = {"workers": 1, "verify_fraction": 1.0, "chunk_bytes": 20_000}
    preprocess(PreprocessOptions([corpus], tmp_path / "right", spm, **options))  # type: ignore[arg-type]
    # Small inputs are not worth a fast tokenizer, and fast_pipeline compares too.
    pipeline = fast_pipeline(spm, build_tokenizer(spm))
    monkeypatch.setattr(main, "SMALL", 0)
    monkeypatch.setattr(main, "fast_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(encoding.FastTokenizer, "encode_batch", swapped)
    summary = preprocess(PreprocessOptions([corpus], tmp_path / "x", spm, **options))  # type: ignore[arg-type]
    assert summary.backend == "reference"
    assert contents(tmp_path / "x") == contents(tmp_path / "right")
    warning = capsys.readouterr().err
    assert f"WARNING: {corpus}, line " in warning
    assert "Starting over with the reference alone" in warning
    with pytest.raises(ValueError, match="Use --tokenizer-backend auto or reference"):
        preprocess(
            PreprocessOptions([corpus], tmp_path / "y", spm, tokenizer_backend="fast", **options)  # type: ignore[arg-type]
        )


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
        "names = ('torch', 'megatron', 'transformers')\n"
        "loaded = [name for name in names if sys.modules.get(name)]\n"
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
    source.write_bytes(corpus.read_bytes() * 40)
    command = [sys.executable, str(TOOL), "--input", str(source), *flags(spm), "--workers", "2"]
    command += ["--tokenizer-backend", "reference", "--output-prefix", str(tmp_path / "out" / "x")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "Processed" in process.stderr.readline()
    yield process, command
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGKILL],
)
@pytest.mark.slow
def test_a_stopped_run_leaves_nothing_running_and_is_continued(
    running: tuple[subprocess.Popen[str], list[str]], tmp_path: Path, names: Callable, number: int
) -> None:
    process, command = running
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in stderr
    assert names(tmp_path / "out") == ["x.partial"]
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "continuing after" in result.stderr
    model = TokenizerOptions(
        "SentencePieceTokenizer", command[command.index("--tokenizer-model") + 1]
    )
    preprocess(PreprocessOptions([tmp_path / "large.jsonl"], tmp_path / "whole", model))
    assert contents(tmp_path / "out" / "x") == contents(tmp_path / "whole")


def test_a_dead_worker_is_an_error_and_the_work_is_kept(
    running: tuple[subprocess.Popen[str], list[str]], tmp_path: Path, names: Callable
) -> None:
    process, _ = running
    # The last child: the first is multiprocessing's resource tracker.
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    last = stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/large.jsonl, line ")
    assert "a worker died" in last
    assert "Traceback" not in stderr
    assert names(tmp_path / "out") == ["x.partial"]


def test_a_full_disk_is_an_error(
    corpus: Path, spm: TokenizerOptions, tmp_path: Path, fails: Callable, names: Callable
) -> None:
    out = tmp_path / "out"
    # A limit on file size stands in for the disk: writing fails in the same way.
    error = fails(
        "preprocess_data", "--input", corpus, *flags(spm), "--output-prefix", out / "x",
        "--workers", 1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert f"{corpus}, line 1: {os.strerror(27)}" in error
    assert names(out) == []
