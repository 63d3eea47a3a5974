"""The tool on what users have: folders of many kinds, tokenizers of many kinds."""

import bz2
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.datasets.manifest import read_manifest
from megatron_satformer.data.preprocess.main import preprocess
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from tests.checkpoint.hugging_face.test_tokenizer import write_model


def test_a_folder_is_read_whole_and_what_is_not_is_counted(
    tmp_path: Path, tool: Callable, fails: Callable
) -> None:
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    lines = [json.dumps({"text": f"{n} {n}"}).encode() + b"\n" for n in range(4)]
    (folder / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + lines[0])
    (folder / "b.jsonl.bz2").write_bytes(bz2.compress(lines[1]))
    (folder / "part-00000").write_bytes(lines[2])
    (folder / "inner" / "c.jsonl").write_bytes(lines[3])
    (folder / "link").symlink_to("inner")
    (folder / "README").write_text("no data")
    (folder / "weights.bin").write_bytes(b"\0" * 99)
    command = ["--input", folder, "--tokenizer-type", "NullTokenizer", "--vocab-size", 10]
    command += ["--output-prefix", tmp_path / "x"]
    assert f"{folder}/weights.bin (no text)" in fails("preprocess_data", *command)
    assert not list(tmp_path.glob("x*"))
    result = tool("preprocess_data", *command, "--on-unknown", "skip")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == [
        f"note: {folder}/link is not read: the same as {folder}/inner, which is read.",
        f"note: {folder}/weights.bin is not read: no text.",
        f"note: 1 beside the data are not read, being metadata, hidden or empty: {folder}/README.",
    ]
    assert result.stdout.startswith("4 documents (0 empty, 0 rejected, 2 files not read), 8 tokens")
    manifest = read_manifest(tmp_path / "x.manifest.json")
    assert manifest["summary"]["unread_files"] == 2
    assert manifest["unread"] == [
        {"file": f"{folder}/link", "reason": f"the same as {folder}/inner, which is read"},
        {"file": f"{folder}/weights.bin", "reason": "no text"},
    ]
    assert manifest["asked"]["on_unknown"] == "skip"
    assert IndexedFile(str(tmp_path / "x_text_document")).tokens.tolist() == [
        0,
        0,
        1,
        1,
        3,
        3,
        2,
        2,
    ]


def test_a_tokenizer_that_cannot_be_exported_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "first"}\n')
    for run, expected in (("\u2581\u2581", 1), ("<sep>", 0)):
        model = write_model(
            tmp_path / "a.model", user_defined_symbols=[run], add_dummy_prefix=False
        )
        options = TokenizerOptions("SentencePieceTokenizer", str(model))
        preprocess(PreprocessOptions([source], tmp_path / "x", options, overwrite=True))
        warnings = capsys.readouterr().err.splitlines()
        assert len(warnings) == expected
        assert all(f"WARNING: tokenizer_model ({model}) has user-defined" in w for w in warnings)
