"""metrics.jsonl: what a resumed run keeps of it, and what a kill leaves."""

import pytest

from megatron_satformer.files.metrics_file import MetricsFile, read_metrics


def write_run(path, start, *records):
    file = MetricsFile(path, start)
    for step, split, loss in records:
        file.write({"step": step, "split": split, "lm_loss": loss})


def read_run(path):
    return [(record["step"], record["split"], record["lm_loss"]) for record in read_metrics(path)]


def test_steps_that_are_trained_again_are_there_once(tmp_path):
    path = tmp_path / "folder" / "metrics.jsonl"
    write_run(path, 0, (1, "train", 9), (2, "train", 8), (2, "validation", 7), (3, "train", 6))
    write_run(path, 2, (3, "train", 5))
    told = [(1, "train", 9), (2, "train", 8), (2, "validation", 7), (3, "train", 5)]
    assert read_run(path) == told


def test_the_last_evaluation_is_made_again_by_a_run_that_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = (2, "train", 8), (2, "validation", 7), (2, "final validation", 6), (2, "test", 5)
    write_run(path, 0, *first)
    write_run(path, 2, (3, "train", 4))
    assert read_run(path) == [*first[:2], (3, "train", 4)]


def test_a_line_that_a_kill_has_cut_off_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, (1, "train", 9), (2, "train", 8))
    for cut in (2, 10, len(path.read_bytes()) // 2 - 1):
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        assert read_run(path) == [(1, "train", 9)]
        write_run(path, 2, (2, "train", 8))
        assert read_run(path) == [(1, "train", 9), (2, "train", 8)]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"step": 1}', "\0\0\0"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2 must be an object with a step and a split"):
        read_metrics(path)


def test_what_is_no_number_is_null(tmp_path):
    write_run(tmp_path / "metrics.jsonl", 0, (1, "train", float("nan")))
    assert "null" in (tmp_path / "metrics.jsonl").read_text()
