import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_satformer.analysis import summary

LINE = (
    " [2026-11-22 10:00:00] iteration {:8d}/       3 | consumed samples: 8 |"
    " elapsed time per iteration (ms): {} | lm loss: 5.0E+00 |\n"
)
VALID = " validation loss at iteration {} | lm loss value: {} | lm loss PPL: 2E+02 |\n"


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the command; returns what it wrote."""
    (tmp_path / "hf").mkdir()
    save_file({"a": np.zeros((2, 3)), "b": np.zeros(4)}, tmp_path / "hf" / "1.safetensors")
    save_file({"c": np.zeros((5, 1))}, tmp_path / "hf" / "2.safetensors")
    monkeypatch.setattr(summary, "unigram_entropy", lambda data, split, vocab_size: 5.7001)

    def call(final):
        lines = [LINE.format(n, 100.0 * n) for n in (1, 2, 3)]
        lines.insert(1, VALID.format(1, "7.0E+00"))
        (tmp_path / "log").write_text("".join([*lines, VALID.format(3, final)]))
        argv = f"summary --model {tmp_path}/hf --log {tmp_path}/log --data-path x --split 95,5,0"
        argv += f" --vocab-size 10 --tokens-per-step 400 --save {tmp_path}/s.json --min-gain 0.7"
        monkeypatch.setattr("sys.argv", [*argv.split(), "--seconds", '{"a": 1.25, "b": 2.5}'])
        summary.main()
        return json.loads((tmp_path / "s.json").read_text())

    return call


def test_summary(call, capsys):
    assert call("5.0E+00") == {
        "parameters": 15,
        "train_tokens": 1200,
        "tokens_per_second": 2000.0,
        "first_val_loss": 7.0,
        "first_val_step": 1,
        "final_val_loss": 5.0,
        "unigram_entropy": 5.7001,
        "wall_seconds": {"a": 1.25, "b": 2.5},
        "total_wall_seconds": 3.75,
    }
    assert capsys.readouterr().out == (
        "validation loss 5.000 nats per token, 0.700 below what counting tokens gives (5.700)\n"
    )


@pytest.mark.parametrize("final", ["5.01E+00", "nan"])
def test_a_model_that_has_not_learnt_fails(call, tmp_path, final):
    with pytest.raises(SystemExit, match=r"error: the final .* must be at least 0.7 nats below"):
        call(final)
    assert (tmp_path / "s.json").exists()


def test_a_log_without_steps_is_refused(tmp_path):
    (tmp_path / "log").write_text(VALID.format(1, 2.0))
    with pytest.raises(ValueError, match="must tell of a training step and of a validation"):
        summary.summarize_log(tmp_path / "log", 1)
