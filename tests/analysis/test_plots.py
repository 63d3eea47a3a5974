import pytest

from megatron_satformer.analysis import plots
from megatron_satformer.analysis.losses import Losses

LOSSES = Losses(train={2: 6.0, 1: 8.0, 3: 5.0}, valid={3: 5.5, 1: 8.5})


@pytest.fixture
def drawn(monkeypatch):
    """The figure, as it is when it is saved."""
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda f, path: (figures.append(f), save(f, path)))
    return figures


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_losses(tmp_path, drawn):
    plots.plot_losses(tmp_path / "loss.png", LOSSES, unigram_entropy=6.5, tokens_per_step=2000)
    (axes,) = drawn[0].axes
    curves = {line.get_label().split()[0]: line for line in axes.lines}
    assert [list(xy) for xy in curves["training"].get_data()] == [[1, 2, 3], [8.0, 6.0, 5.0]]
    assert [list(xy) for xy in curves["validation"].get_data()] == [[1, 3], [8.5, 5.5]]
    assert list(curves["unigram"].get_ydata()) == [6.5, 6.5]
    assert axes.get_xlabel() == "training step"
    assert axes.get_ylabel() == "cross entropy (nats per token)"
    assert [axis.get_xlabel() for axis in axes.child_axes] == ["training tokens (thousands)"]
    assert is_picture(tmp_path / "loss.png")


def test_no_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="losses must have a training step"):
        plots.plot_losses(tmp_path / "loss.png", Losses())
    assert not (tmp_path / "loss.png").exists()


def test_the_command_compares_with_counting(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(plots, "read_losses", lambda tensorboard, log: LOSSES)
    entropies = {("data", "95,5,0", 10): 6.25}
    monkeypatch.setattr(plots, "unigram_entropy", lambda *args: entropies[args])
    argv = f"plots --tensorboard-dir x --save {tmp_path} --data-path data --split 95,5,0"
    monkeypatch.setattr("sys.argv", [*argv.split(), "--vocab-size", "10"])
    plots.main()
    curves = {line.get_label().split()[0]: line for line in drawn[0].axes[0].lines}
    assert list(curves["unigram"].get_ydata()) == [6.25, 6.25]
