"""Which token a text follows, and that no results are no success. The figures: tests/examples/."""

import json
import os
from pathlib import Path

import pytest

from megatron_satformer.analysis.evaluation import check_saved, evaluate, find_prefix
from tests.checkpoint.convert.test_to_hf import load_tool, run_tool
from tests.checkpoint.hugging_face.test_tokenizer import (
    byte_level,  # noqa: F401
    export_tokenizer,
    write_model,
)
from tests.checkpoint.hugging_face.word_tokenizer import write_word_tokenizer


def write_template(folder: Path, before: list[str], after: list[str], end: object = 7) -> Path:
    """A folder whose tokenizer puts words around a text."""
    from tokenizers import Tokenizer, processors

    write_word_tokenizer(folder, 20, eos_token="t2", bos_token="t1")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [*before, *after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]),
        special_tokens=[(word, int(word[1:])) for word in words],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


@pytest.mark.parametrize(
    ("before", "after", "end", "given", "token", "why"),
    [
        ([], [], 7, None, 7, "eos_token_id"),
        ([], [], [7, 8], None, 7, "eos_token_id"),
        (["t1"], [], [7, 8], None, 1, "template puts it there"),
        (["t5", "t1"], [], None, None, 1, "template puts it there"),
        (["t1"], ["t2"], 7, None, 1, "template also puts tokens behind"),
        ([], ["t2"], 7, None, 7, "template also puts tokens behind"),
        (["t1"], [], 7, 3, 3, "PREFIX_TOKEN_ID"),
        ([], [], None, 0, 0, "PREFIX_TOKEN_ID"),
    ],
)
def test_the_token_before_a_text(tmp_path, before, after, end, given, token, why):
    folder = write_template(tmp_path / "hf", before, after, end)
    prefix = find_prefix(folder, given)
    assert (prefix.token, prefix.text) == (token, f"t{token}")
    assert why in str(prefix)
    assert prefix.ends == bool(after)


@pytest.mark.parametrize(
    ("before", "given", "told"),
    [
        (["t5", "t1"], None, "WARNING: the template puts t5 before it"),
        (["t6", "t5", "t1"], None, "WARNING: the template puts t6 t5 before it"),
        (["t5", "t1"], 1, ""),  # as asked
        (["t1"], None, ""),
    ],
)
def test_what_a_template_puts_there_and_is_not_counted(tmp_path, before, given, told):
    prefix = str(find_prefix(write_template(tmp_path / "hf", before, []), given))
    assert told in prefix
    assert ("WARNING" in prefix) == bool(told)


@pytest.mark.parametrize("end", [None, []], ids=str)
def test_no_token_before_a_text(tmp_path, end):
    folder = write_template(tmp_path / "hf", [], [], end)
    with pytest.raises(ValueError, match=r"must name the token.* Set PREFIX_TOKEN_ID"):
        find_prefix(folder)


def test_real_tokenizers(tmp_path, byte_level):  # noqa: F811
    for source, token in ((write_model(tmp_path / "a.model"), 2), (byte_level, 1)):
        folder = tmp_path / f"{token}"
        export_tokenizer(source, folder)
        (folder / "config.json").write_text('{"eos_token_id": 2}')
        assert find_prefix(folder).token == token


def test_mistakes(tmp_path):
    tool = load_tool("evaluate")
    folder = write_template(tmp_path / "hf", [], [])
    flags = ["--tasks", "piqa", "--save", str(tmp_path / "file" / "results")]
    (tmp_path / "file").touch()
    for model, told in (
        (tmp_path / "none", "must be an exported folder: it has no config.json"),
        (folder, "Not a directory"),
    ):
        code, out, err = run_tool(tool, ["--model", str(model), *flags])
        assert (code, out, err.count("\n"), told in err) == (2, "", 1, True), err
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    code, _, err = run_tool(tool, ["--model", str(folder), *flags])
    assert (code, "has no tokenizer. Export with to-hf --tokenizer" in err) == (2, True)


@pytest.mark.parametrize(
    "flags",
    ["--output_path elsewhere", "-o elsewhere", "--model_args dtype=float16", "-t winogrande"],
)
def test_a_flag_that_would_replace_ours(tmp_path, flags):
    folder = write_template(tmp_path / "hf", [], [])
    with pytest.raises(ValueError, match=r"must be left out: it is set by"):
        evaluate(folder, "piqa", tmp_path / "results", flags=flags.split())
    assert not any((tmp_path / "results").iterdir())


@pytest.mark.parametrize(
    ("damage", "missing", "kept"),
    [
        ("nothing at all", ["figures"], 0),
        ("figures cut", ["figures"], 0),
        ("a task's samples missing", ["samples of task_a"], 2),
        ("a task's samples cut", ["samples of task_a"], 2),
        ("", [], 3),
    ],
)
def test_what_was_not_saved(tmp_path, damage, missing, kept):
    """As lm_eval leaves it behind, which says nothing and exits with 0."""
    when = "2026-01-01T00-00-00.000001"
    figures, samples = (tmp_path / f"{n}_{when}.json" for n in ("results", "samples_task_a"))
    samples = samples.with_suffix(".jsonl")
    if damage != "nothing at all":
        figures.write_text(json.dumps({"configs": {"task_a": {}, "task_a_b": {}}}))
        samples.write_text('{"doc_id": 0}\n' * 3)
        (tmp_path / f"samples_task_a_b_{when}.jsonl").write_text('{"doc_id": 0}\n')
        file = samples if damage.startswith("a task") else figures
        if damage.endswith("missing"):
            file.unlink()
        elif damage:
            os.truncate(file, file.stat().st_size - 5)
    whole, lost = check_saved(tmp_path)
    assert (len(whole), lost) == (kept, missing)
    assert whole[:1] == [figures] * bool(kept)
