"""The authors' toy demonstration, run here: `python -m inheritune.paper.toy` computes, `table toy` shows.

The computation takes minutes on two busy CPU cores, so its numbers are kept in toy.json among the results.
The notebook's seed is 42; seed k here is 42 + k.
"""

import sys
from pathlib import Path

from inheritune.config import environment
from inheritune.files.json_files import read_json, write_json
from inheritune.paper.attention_lines import mark_rank_one
from inheritune.paper.canvas import COLORS, GRID_GREY, open_canvas, place_legend
from inheritune.paper.items import Item
from inheritune.paper.published import find_published
from inheritune.paper.table_cells import NOT_RUN
from inheritune.paper.table_files import locate_results, write_table

DEFINITIONS = {"batch_mean": "rank of the batch's mean map", "sequence": "mean rank of the sequences' maps"}
"""Key of toy.json -> what it is: the notebook's definition, and the paper's."""
SMALL = {"steps": 3, "width": 32, "n_heads": 2, "length": 16, "batch": 4}
SMALL_HEADS = {"n_heads": 2, "width": 64, "length": 32, "batch": 4}
"""The two models in a rehearsal."""


def read_rehearsal(rehearse: bool | None) -> bool:
    """Return whether to rehearse: `rehearse`, or REHEARSE=1 if that is None."""
    return bool(environment.read_flag("REHEARSE")) if rehearse is None else rehearse


def locate_toy(seed: int, rehearsal: bool) -> Path:
    """Return the file of the measured ranks."""
    return locate_results(rehearsal, seed) / "toy.json"


def run_toy(seed: int = 0, rehearse: bool | None = None) -> Path:
    """Compute the ranks of both toy models and write them. Returns the file."""
    from inheritune.analysis.toy import NOTEBOOK_SEED, measure_random_heads, train_layer

    small = read_rehearsal(rehearse)
    started = NOTEBOOK_SEED + seed
    curve = []
    for point in train_layer(started, **(SMALL if small else {})):
        curve.append(point)
        print(
            f"step {point['step']}: batch mean {point['batch_mean']:.2f}, sequences {point['sequence']:.2f}"
        )
    found = measure_random_heads(started, **(SMALL_HEADS if small else {}))
    path = locate_toy(seed, small)
    write_json(path, {"rehearsal": small, "seed": started, **found, "trained_layer": curve})
    return path


def make_table(name: str, item: Item, seed: int, rehearse: bool | None, only_missing: bool) -> None:
    """Print and write the table and the plot of the toy, or the step that is missing before."""
    small = read_rehearsal(rehearse)
    path = locate_toy(seed, small)
    if only_missing:
        if not path.is_file():
            print("toy - - -")
        return
    headers, cells = make_rows(item, path)
    title = f"{'REHEARSAL, not a result. ' if small else ''}{item.title}, seed {seed}"
    records = [dict(zip(headers, row, strict=True)) for row in cells]
    write_table(path.with_name(name), title, headers, cells, item.notes, records)
    if path.is_file():
        plot_toy(read_json(path)["trained_layer"], path.with_name(f"{name}.png"), small)


def make_rows(item: Item, path: Path) -> tuple[list[str], list[list[str]]]:
    """Return (headers, rows) of the table of the toy; `path` is the file of the measured ranks."""
    measured = _select_rows(read_json(path)) if path.is_file() else {}
    headers = ["model", "rank in the notebook", *DEFINITIONS.values()]
    cells = []
    for row in item.rows:
        theirs = find_published(item, row, item.columns["rank"])["value"]
        ours = measured.get(row.toy or "", {})
        cells.append([row.label, theirs, *(f"{ours[key]:.2f}" if ours else NOT_RUN for key in DEFINITIONS)])
    return headers, cells


def _select_rows(found: dict) -> dict[str, dict]:
    """Return {name of a row in items.yaml: {batch_mean, sequence}}."""
    curve = found["trained_layer"]
    middle = min(curve, key=lambda point: abs(point["step"] - 500))
    return {
        "before_softmax": found["before_softmax"],
        "after_softmax": found["after_softmax"],
        "step_0": curve[0],
        "step_500": middle,
        "end": curve[-1],
    }


def plot_toy(curve: list[dict], path: Path, rehearsal: bool = False) -> None:
    """Plot both ranks of the trained layer over its steps."""
    with open_canvas(path, 7, 4, rehearsal) as figure:
        axes = figure.add_subplot()
        for color, (key, name) in zip(COLORS, DEFINITIONS.items(), strict=False):
            steps, ranks = [point["step"] for point in curve], [point[key] for point in curve]
            axes.plot(steps, ranks, color=color, marker="o", markersize=3, label=name)
        axes.set_xlim(0, max(1, curve[-1]["step"]))
        axes.set_ylim(0, 1.05 * max(max(point[key] for key in DEFINITIONS) for point in curve))
        mark_rank_one(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("rank (τ = 0.90), mean of the heads")
        axes.set_title("A layer trained on noise: one collapse, by one of two definitions")
        axes.grid(axis="y", color=GRID_GREY, linewidth=0.6)
        place_legend(axes, len(DEFINITIONS))


if __name__ == "__main__":
    print(run_toy(seed=int(sys.argv[1]) if sys.argv[1:] else 0))
