import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_satformer.data.preprocess.main import preprocess
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.tokenizers.options import TokenizerOptions

ROOT = Path(__file__).resolve().parents[3]
# One process with its imports done, which starts when told: a kill meets the work, not the start.
DRIVER = """
import pickle, sys
from megatron_satformer.data.preprocess.main import preprocess
from megatron_satformer.data.preprocess.options import PreprocessOptions
if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        options = pickle.load(file)
    print("ready", flush=True)
    preprocess(options)
"""
FILES = ("x_text_document.bin", "x_text_document.idx", "x.manifest.json")


@pytest.fixture
def options(corpus: Path, spm: TokenizerOptions, tmp_path: Path) -> PreprocessOptions:
    source = tmp_path / "input.jsonl"
    source.write_bytes(corpus.read_bytes()[:400_000].rpartition(b"\n")[0] + b"\nbroken\n")
    return PreprocessOptions(
        [source],
        tmp_path / "out" / "x",
        spm,
        ("text",),
        append_eod=True,
        on_error="skip",
        workers=1,
        chunk_bytes=10_000,
    )


@pytest.fixture
def expected(options: PreprocessOptions, tmp_path: Path) -> list[bytes]:
    """The files of a run that nothing disturbs."""
    preprocess(options)
    folder = tmp_path / "out"
    found = [(folder / name).read_bytes() for name in FILES]
    for path in folder.iterdir():
        path.unlink()
    return found


def finished(tmp_path: Path) -> list[bytes]:
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*FILES, "x.rejects.jsonl"])
    return [(tmp_path / "out" / name).read_bytes() for name in FILES]


class Stop(BaseException):
    """Stands in for a kill: nothing of ours catches it, and nothing is put in order."""


def stop_after(calls: int, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Lets so many calls of a function of os through, and stops at the next."""
    left = [calls]
    original = getattr(os, name)

    def counted(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, counted)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    options: PreprocessOptions, expected: list[bytes], tmp_path: Path, workers: int
) -> None:
    slow = replace(options, workers=workers, tokenizer_backend="reference")
    order, driver = tmp_path / "options", tmp_path / "driver.py"
    order.write_bytes(pickle.dumps(slow))
    driver.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    generator = random.Random(workers)
    kills = 0
    longest = 0.3
    while kills < 10:
        process = subprocess.Popen(
            [sys.executable, str(driver), str(order)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        begun = time.perf_counter()
        try:
            assert process.wait(timeout=generator.uniform(0, longest)) == 0
            longest = time.perf_counter() - begun
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        left = os.listdir(tmp_path / "out")
        # Nothing at all: killed before it began.
        if left and "x.partial" not in left:
            assert finished(tmp_path)[:2] == expected[:2]
            for path in (tmp_path / "out").iterdir():
                path.unlink()
    preprocess(slow)
    # The manifest names the backend.
    assert finished(tmp_path)[:2] == expected[:2]


def test_a_kill_between_any_two_renames_is_continued(
    options: PreprocessOptions,
    expected: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text('{"text": "what stood there before"}\n')
    moments = 0
    for calls in range(20):
        preprocess(replace(options, input=[old], overwrite=True, on_error="stop"))
        with monkeypatch.context() as patch:
            stop_after(calls, patch, "replace")
            try:
                preprocess(replace(options, overwrite=True))
            except Stop:
                moments += 1
            else:
                break
        idx = tmp_path / "out" / "x_text_document.idx"
        if idx.exists() and idx.read_bytes() != expected[1]:
            # As long as the old index is there, its tokens are too.
            assert (tmp_path / "out" / "x_text_document.bin").stat().st_size < 100
        preprocess(replace(options, overwrite=True))
        assert finished(tmp_path) == expected
    assert moments >= 4


def test_a_kill_before_publishing_is_continued(
    options: PreprocessOptions,
    expected: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for calls in range(4):
        with monkeypatch.context() as patch:
            stop_after(calls, patch, "fsync")
            with pytest.raises(Stop):
                preprocess(options)
        preprocess(options)
        assert finished(tmp_path) == expected
        for path in (tmp_path / "out").iterdir():
            path.unlink()


@pytest.fixture
def stopped(
    options: PreprocessOptions, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> PreprocessOptions:
    """Options of a run that was stopped after half its chunks."""
    from megatron_satformer.data.preprocess.run_folder import RunFolder

    original, left = RunFolder.append, [20]

    def append(self: RunFolder, *args: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        original(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", append)
        with pytest.raises(Stop):
            preprocess(options)
    return options


def test_a_stopped_run_is_taken_up_where_it_was(
    stopped: PreprocessOptions, expected: list[bytes], tmp_path: Path
) -> None:
    summary = preprocess(replace(stopped, workers=2, log_interval=7))
    assert 150_000 < summary.resumed_bytes < 250_000
    assert finished(tmp_path) == expected


@pytest.mark.parametrize(
    "harm", ["torn journal", "short tokens", "flipped token", "short lengths", "more of all"]
)
def test_what_the_journal_does_not_vouch_for_is_done_again(
    stopped: PreprocessOptions, expected: list[bytes], tmp_path: Path, harm: str
) -> None:
    folder = tmp_path / "out" / "x.partial"
    journal, tokens = folder / "chunks.jsonl", folder / "x_text_document.bin"
    lengths = folder / "x_text_document.lengths"
    if harm == "torn journal":
        os.truncate(journal, journal.stat().st_size - 20)
    elif harm == "short tokens":
        os.truncate(tokens, tokens.stat().st_size // 2 + 1)
    elif harm == "short lengths":
        os.truncate(lengths, lengths.stat().st_size - 1)
    elif harm == "flipped token":
        content = bytearray(tokens.read_bytes())
        content[len(content) // 3] ^= 1
        tokens.write_bytes(content)
    else:
        for path in (tokens, lengths, folder / "rejects.jsonl"):
            with path.open("ab") as file:
                file.write(b"of a chunk that the journal does not know")
    preprocess(stopped)
    assert finished(tmp_path) == expected


def test_another_input_or_option_is_refused(
    stopped: PreprocessOptions, expected: list[bytes], tmp_path: Path, spm_model: str
) -> None:
    source = Path(str(stopped.input[0]))
    other = tmp_path / "other.jsonl"
    other.write_bytes(source.read_bytes())
    changes: list[tuple[dict[str, object], str]] = [
        ({"append_eod": False}, r"append_eod \(False\) was True when this run began"),
        ({"json_keys": ("title",)}, "json_keys"),
        ({"on_error": "stop"}, r"on_error \(stop\) was skip"),
        ({"document_separator": ""}, "document_separator"),
        ({"input": [other]}, r"other.jsonl\) was .*input.jsonl when this run began"),
        ({"input": [source, other]}, "input has 2 files, but had 1"),
        ({"tokenizer": TokenizerOptions("GPTSentencePieceTokenizer", spm_model)}, "tokenizer_type"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message) as error:
            preprocess(replace(stopped, **change))  # type: ignore[arg-type]
        assert "--overwrite to start over" in str(error.value)
    times = source.stat()
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="has changed since this run began"):
        preprocess(stopped)
    summary = preprocess(replace(stopped, overwrite=True))
    assert summary.resumed_bytes == 0
    assert finished(tmp_path)[:2] == expected[:2]


def test_unknown_files_may_be_skipped_later_and_never_the_other_way(
    options: PreprocessOptions, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_satformer.data.preprocess.run_folder import RunFolder

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            preprocess(replace(options, on_unknown="error"))
        with pytest.raises(Stop):
            preprocess(replace(options, on_unknown="skip"))
        with pytest.raises(ValueError, match=r"on_unknown \(error\) was skip when this run began"):
            preprocess(replace(options, on_unknown="error"))
    assert preprocess(replace(options, on_unknown="skip")).resumed_bytes > 0


def test_an_input_that_grows_while_it_is_read_is_refused(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_satformer.data.preprocess.run_folder import RunFolder

    original = RunFolder.append

    def append(self: RunFolder, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        with open(options.input[0], "ab") as file:
            file.write(b'{"text": "late"}\n')

    monkeypatch.setattr(RunFolder, "append", append)
    with pytest.raises(ValueError, match="changed while it was read"):
        preprocess(options)


def test_two_runs_to_one_output_do_not_mix(options: PreprocessOptions) -> None:
    from megatron_satformer.data.preprocess.run_folder import RunFolder

    with RunFolder(options, []), pytest.raises(ValueError, match="by another process"):
        preprocess(options)


def test_the_manifest_says_what_was_done(
    options: PreprocessOptions, expected: list[bytes], spm_model: str
) -> None:
    content = json.loads(expected[2])
    assert content["summary"]["rejected_documents"] == 1
    assert content["asked"]["inputs"][0]["path"] == str(options.input[0])
    assert content["asked"]["tokenizer"]["tokenizer_model"] == spm_model
