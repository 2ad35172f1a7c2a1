"""Figures: written from rows alone, the same bytes for the same rows, without torch."""

import json
import struct
import subprocess
import sys

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inheritune.errors import UserError
from inheritune.paper import attention_plots, canvas, loss_plots, table_plots, worth_plot


def make_rows(n_layers=6, n_heads=3, maps=True, rehearsal=False):
    """What analyze writes, with made-up numbers."""
    rows = [{"kind": "header", "model": "runs/e/seed0/reference/final", "rehearsal": rehearsal, "loss": 4.0}]
    for layer in range(n_layers):
        ranks = [max(1.0, 9.0 / (layer + 1) + head) for head in range(n_heads)]
        rows.append(
            {
                "kind": "layer",
                "layer": layer,
                "rank": {"0.9": ranks},
                "max_rank": {"0.8": max(ranks) - 0.5, "0.9": max(ranks)},
                "max_rank_std": {"0.8": 0.2, "0.9": 0.4},
                "avg_mass": {"0.9": 12.0 - layer},
                "avg_mass_std": {"0.9": 1.0},
                "lazy": layer == n_layers - 1,
                "cost": {"block": 3.0 / (layer + 1) ** 3 - 0.02, "attn": None if layer else 0.1, "mlp": 0.05},
            }
        )
    causal = [[1 / (i + 1) if j <= i else 0.0 for j in range(5)] for i in range(5)]
    if maps:
        rows += [
            {"kind": "map", "layer": layer, "head": 1, "sequences": 3, "mean": causal} for layer in (0, 2, 5)
        ]
    return rows


def make_curve(steps, start, end, batch=1000):
    """Rows of metrics.jsonl, training rows (no val_loss) among them."""
    rows = [{"step": 5, "tokens": 5 * batch, "loss": 9.0}]
    for step in range(0, steps + 1, 10):
        rows.append({"step": step, "tokens": step * batch, "val_loss": end + (start - end) * 0.9**step})
    return rows


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data.rstrip().endswith(b"IEND\xaeB`\x82")
    assert b"Software" not in data and b"matplotlib" not in data
    return struct.unpack(">II", data[16:24])


DRAWN = {
    "max_rank": lambda path, **how: attention_plots.plot_max_rank(
        [("ours", make_rows()), ("full", make_rows(12))], path, **how
    ),
    "taus": lambda path, **how: attention_plots.plot_tau_ablation(make_rows(), path, "reference", **how),
    "avg_mass": lambda path, **how: attention_plots.plot_avg_mass([("ours", make_rows())], path, **how),
    "worth": lambda path, **how: worth_plot.plot_worth(make_rows(), path, "reference", **how),
    "heat_map": lambda path, **how: attention_plots.plot_heat_map(
        make_rows(30, 30), path, "reference", **how
    ),
    "maps": lambda path, **how: attention_plots.plot_attention_maps(make_rows(), path, "reference", **how),
    "loss": lambda path, **how: loss_plots.plot_loss_curves(
        [("a", make_curve(100, 8, 3)), ("b", make_curve(200, 8, 2.9))], path, reference_loss=3.01, **how
    ),
    "cells": lambda path, **how: table_plots.plot_cells(make_cells(), path, "two columns", **how),
}


def make_cells() -> list[dict]:
    """Both numbers, the paper's only, ours only, none: as `table` writes them into a CSV file."""
    cells = [
        ("49.1", None, 48.2, 0.9),
        ("50.3", 0.4, None, None),
        ("", None, 47.0, None),
        ("", None, None, None),
    ]
    return [
        {
            "row": f"model {i}",
            "column": column,
            "paper": paper,
            "paper_noise": spread,
            "ours": ours,
            "noise": noise,
        }
        for i, (paper, spread, ours, noise) in enumerate(cells)
        for column in ("mean", "MMLU")
    ]


@pytest.mark.parametrize("name", DRAWN)
def test_same_rows_same_bytes(name, tmp_path):
    for file in ("one", "two"):
        DRAWN[name](tmp_path / "new folder" / f"{file}.png")
    one, two = (tmp_path / "new folder" / f"{file}.png" for file in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert min(png_size(one)) > 250
    DRAWN[name](tmp_path / "three.png", rehearsal=True)
    assert (tmp_path / "three.png").read_bytes() != one.read_bytes(), "REHEARSAL is written across"


def test_all_figures_of_a_model_without_torch(tmp_path):
    (tmp_path / "attention.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in make_rows(rehearsal=True))
    )
    code = (
        "import sys; from inheritune.paper.attention_plots import plot_attention; paths = "
        "plot_attention(sys.argv[1])\n"
        "assert all(path.is_file() for path in paths) and len(paths) == 6\n"
        "assert not {'torch', 'transformers', 'inheritune.analysis.attention', 'matplotlib.pyplot'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list(tmp_path.glob("*.png"))) == 6
    (tmp_path / "attention.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in make_rows(maps=False))
    )
    assert [path.name for path in attention_plots.plot_attention(tmp_path)][-1] == "layer_worth.png"
    plain = [{key: value for key, value in row.items() if key != "cost"} for row in make_rows(maps=False)]
    (tmp_path / "attention.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    assert [path.name for path in attention_plots.plot_attention(tmp_path)][-1] == "rank_heat_map.png"


def test_rows_read_off_the_paper_have_no_deviation(tmp_path):
    rows = [{"kind": "layer", "layer": layer, "max_rank": {"0.9": 3.0}} for layer in range(2, 24)]
    attention_plots.plot_max_rank([("paper", rows)], tmp_path / "paper.png")
    assert png_size(tmp_path / "paper.png")


def test_edges(tmp_path):
    """One layer, one head, one evaluation, equal losses, all ranks 1."""
    one = [{**row, "rank": {"0.9": [1.0]}, "max_rank": {"0.9": 1.0}} for row in make_rows(1, 1, maps=False)]
    attention_plots.plot_heat_map(one, tmp_path / "heat.png")
    attention_plots.plot_max_rank([("one", one)], tmp_path / "rank.png")
    flat = [{"step": step, "tokens": step * 64, "val_loss": 3.0} for step in (0, 5)]
    loss_plots.plot_loss_curves([("flat", flat)], tmp_path / "flat.png")
    loss_plots.plot_loss_curves([("start", flat[:1])], tmp_path / "start.png", smooth=10)
    loss_plots.plot_loss_curves([("none", [{"step": 7, "val_loss": 3.0}])], tmp_path / "no_tokens.png")
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_trailing_mean():
    assert loss_plots.compute_trailing_mean([4.0, 2.0, 6.0, 1.0], 2) == [4.0, 3.0, 4.0, 3.5]
    assert loss_plots.compute_trailing_mean([4.0, 2.0], 1) == [4.0, 2.0]


def test_the_label_of_a_line_gives_its_end_as_drawn(tmp_path, monkeypatch):
    """Of trailing means the last mean, not the last evaluation; of a part of a run the end of the part."""
    rows = [{"step": step, "val_loss": loss} for step, loss in ((0, 9.0), (10, 4.0), (20, 3.0), (30, 1.0))]
    labels, usual = [], Axes.legend
    monkeypatch.setattr(
        Axes, "legend", lambda self, *a, **k: (labels.extend(self.lines), usual(self, *a, **k))[1]
    )
    for smooth, steps in ((2, (0, None)), (2, (0, 20)), (1, (0, 20))):
        loss_plots.plot_loss_curves([("a", rows)], tmp_path / "x.png", smooth=smooth, steps=steps)
    assert [line.get_label() for line in labels] == ["a (2.000)", "a (3.500)", "a (3.000)"]
    assert [line.get_ydata()[-1] for line in labels] == [2.0, 3.5, 3.0]


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="analyze"):
        attention_plots.plot_attention(tmp_path)
    with pytest.raises(UserError, match="no layer rows"):
        attention_plots.plot_max_rank([("x", [{"kind": "header"}])], tmp_path / "x.png")
    with pytest.raises(UserError, match="no attention maps"):
        attention_plots.plot_attention_maps(make_rows(maps=False), tmp_path / "x.png")
    with pytest.raises(UserError, match="run 'x' has no validation loss"):
        loss_plots.plot_loss_curves([("x", [{"step": 1, "loss": 2.0}])], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_more_than_six_models_are_in_several_panels(tmp_path, monkeypatch):
    """Of loss curves and of measures per layer; in no panel has a colour two models, and the first is in
    each."""
    panels = []

    def draw(axes, *arguments, **how):
        colors = {line.get_label(): line.get_color() for line in axes.lines if line.get_label()[0] != "_"}
        panels.append(colors)
        return usual(axes, *arguments, **how)

    usual = Axes.legend
    monkeypatch.setattr(Axes, "legend", draw)
    names = [f"model {number}" for number in range(12)]
    loss_plots.plot_loss_curves([(name, make_curve(100, 8, 3)) for name in names], tmp_path / "loss.png")
    attention_plots.plot_max_rank([(name, make_rows()) for name in names], tmp_path / "rank.png")
    attention_plots.plot_avg_mass([(name, make_rows()) for name in names], tmp_path / "mass.png")
    assert [len(panel) for panel in panels] == [6, 6, 2] * 3
    for panel in panels:
        assert len(set(panel.values())) == len(panel) and any(label.startswith("model 0") for label in panel)
    labels = [name + end for name in names[:6] for end in ("", canvas.PAPER_SUFFIX)]
    assert canvas.split_labels(labels) == [list(range(12))]  # the paper's line has its model's colour


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ((6.0, 4.0, 3.5, 3.2), (3.2, 6.0, False)),  # all of it
        ((11.0, 4.0, 3.5, 3.2), (3.2, 4.0, True)),  # the first one is far above
    ],
)
def test_no_loss_is_cut_off_unless_the_title_says_so(losses, shown, tmp_path, monkeypatch):
    rows = [{"step": 50 * step, "val_loss": loss} for step, loss in enumerate(losses)]
    seen, usual = [], Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **k: (seen.append(text), usual(self, text))[1])
    loss_plots.plot_loss_curves([("a", rows)], tmp_path / "x.png")
    low, high, is_cut = loss_plots.choose_loss_range([(row["step"], row["val_loss"]) for row in rows])
    assert low < shown[0] and high > shown[1] and (high < losses[0]) == is_cut == shown[2]
    assert ("the first steps lie above" in seen[0]) == is_cut


def test_the_numbers_at_the_ends_of_lines_do_not_overlap(tmp_path, monkeypatch):
    """Six runs that end at the same step, within a thousandth of each other."""
    texts = []
    usual = Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda *a, **k: (texts.append(usual(*a, **k)), texts[-1])[1])
    series = [(f"m{i}", make_curve(100, 8, 3 + i / 5000)) for i in range(6)]
    loss_plots.plot_loss_curves(series, tmp_path / "x.png")
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert len(boxes) == 6
    assert all(one.y1 <= two.y0 + 1 for one, two in zip(boxes, boxes[1:], strict=False))


def test_maps_and_ranks_use_their_colours():
    """A uniform causal map is spread over its scale, and a masked weight does not count."""
    uniform = [[1 / (i + 1) if j <= i else 0.0 for j in range(100)] for i in range(100)]
    assert attention_plots.find_faintest([uniform]) == pytest.approx(0.01)
    assert attention_plots.find_faintest([[[1.0, 0.0], [1.0, 0.0]]]) == attention_plots.FAINTEST
    parts = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in attention_plots.RANK_COLORS]
    lightness = [3 * red + 6 * green + blue for red, green, blue in parts]
    assert lightness == sorted(lightness)  # in grey too
