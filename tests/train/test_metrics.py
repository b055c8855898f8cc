"""A run's plots, and its speed as a share of the machine's peak."""

import pytest

from gpt2.train import metrics


def test_plot_has_axes_with_units_and_both_curves(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, format: (drawn.append(self), path.touch())
    )
    lines = [{"step": k, "train_loss": 4.0 / k} for k in range(1, 50)]
    lines[20]["val_loss"], lines[40]["val_loss"] = 1.0, 0.5
    metrics.plot(tmp_path / "loss.png", lines, "A title", "character")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "loss (nats per character)"
    assert axes.get_title() == "A title"
    curves = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert curves["validation"].tolist() == [[21, 1.0], [41, 0.5]]
    smooth = curves["training, smoothed"]
    assert len(smooth) == 49 and smooth[0, 1] == 4.0 and smooth[-1, 1] < 0.1


def test_mfu_is_speed_over_peak(tmp_path):
    with metrics.Progress(
        tmp_path / "m",
        step=0,
        steps=4,
        elapsed_s=10.0,
        tokens_per_step=100,
        flops_per_token=6,
        peak_flops=12_000.0,
    ) as progress:
        progress.add(2.0, 0.5)
        progress.add(4.0, 1.5)
        progress.line(2, 0.1)
    (row,) = progress.rows
    assert row["train_loss"] == 3.0
    assert row["tokens_per_s"] == 100.0
    assert row["mfu"] == pytest.approx(0.05)
    assert 10.0 < row["elapsed_s"] < 11.0
