import pytest

from megatron_satformer.analysis.losses import (
    parse_train_line,
    parse_valid_line,
    read_events,
    read_log,
    read_losses,
)

# As Megatron 0.19.2 printed them.
TRAIN = (
    " [2026-11-22 00:30:25.376878] iteration {:8d}/      12 | consumed samples:           96 | "
    "elapsed time per iteration (ms): 3323.0 | learning rate: 1.378115E-03 | global batch size:"
    "    16 | lm loss: {:.6E} | loss scale: 1.0 | grad norm: 1.553 | number of skipped iterations: "
    "  0 | number of nan iterations:   0 |"
)
VALID = " validation loss at iteration {} | lm loss value: {:.6E} | lm loss PPL: 1.717594E+03 | "
LAST = (
    " validation loss at iteration {} on validation set | lm loss value: {:.6E} | lm loss PPL: 1 "
)
TEST = " validation loss at iteration 12 on test set | lm loss value: 1.0E+00 | lm loss PPL: 1 | "


def write_events(folder, curves):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder))
    for tag, step, value, time in curves:
        writer.add_scalar(tag, value, step, walltime=time)
    writer.close()


def test_lines_of_the_log():
    step = parse_train_line(TRAIN.format(6, 7.203230))
    assert (step.iteration, step.total, step.milliseconds, step.loss) == (6, 12, 3323.0, 7.20323)
    assert parse_valid_line(VALID.format(4, 7.448681)) == (4, 7.448681)
    assert parse_valid_line(LAST.format(12, 6.5)) == (12, 6.5)
    for line in ("", "  iteration ........ 3", "saving checkpoint at iteration 4", TEST):
        assert parse_train_line(line) is None
        assert parse_valid_line(line) is None


def test_of_a_resumed_run_the_later_line_counts():
    lines = [TRAIN.format(n, loss) for n, loss in ((1, 8.0), (2, 7.0), (3, 6.9), (2, 7.5), (3, 6))]
    losses = read_log([*lines, VALID.format(2, 7.7), LAST.format(3, 6.2)])
    assert losses.train == {1: 8.0, 2: 7.5, 3: 6.0}
    assert losses.valid == {2: 7.7, 3: 6.2}


def test_of_two_event_files_the_later_value_counts(tmp_path):
    tag = "lm loss"
    write_events(tmp_path, [(tag, 1, 8.0, 10.0), (tag, 2, 7.0, 11.0), (tag, 3, 6.0, 12.0)])
    write_events(
        tmp_path, [(tag, 2, 7.25, 21.0), ("lm loss validation", 2, 7.5, 22.0), ("x", 9, 1.0, 23.0)]
    )
    losses = read_events(tmp_path)
    assert losses.train == {1: 8.0, 2: 7.25, 3: 6.0}
    assert losses.valid == {2: 7.5}


def test_what_a_kill_took_from_the_events_is_in_the_log(tmp_path):
    write_events(tmp_path, [("lm loss", n, 8.0 - n, float(n)) for n in range(1, 200)])
    (event_file,) = tmp_path.glob("events*")
    event_file.write_bytes(event_file.read_bytes()[:5000])
    lost = set(range(1, 200)) - read_events(tmp_path).train.keys()
    assert lost
    log = tmp_path / "train.log"
    log.write_text("".join(TRAIN.format(n, 1.5) + "\n" for n in range(1, 200)))
    losses = read_losses(tmp_path, log)
    assert losses.train == {n: 1.5 if n in lost else 8.0 - n for n in range(1, 200)}
    assert list(losses.train) == sorted(losses.train)


def test_without_a_log(tmp_path):
    write_events(tmp_path, [("lm loss", 1, 8.0, 1.0)])
    assert read_losses(tmp_path).train == pytest.approx({1: 8.0})
