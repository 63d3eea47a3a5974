"""The tool on what users have: folders of many kinds, tokenizers of many kinds."""

import bz2
import json
from collections.abc import Callable
from pathlib import Path

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.datasets.manifest import read_manifest


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
