"""The report of the evidence over seeds, from evidence.json, table.csv, table.md and the seeds' files."""

import csv
import statistics
from pathlib import Path

from inheritune.errors import UserError
from inheritune.files.escape import unescape_csv, unescape_markdown
from inheritune.files.json_files import read_json
from inheritune.paper.report_charts import (
    Chart,
    Curve,
    draw_layers,
    draw_losses,
    draw_marks,
)
from inheritune.paper.report_page import Cell, Grid, Page, Piece, Section, make_cell
from inheritune.paper.report_runs import list_files, shorten_commit

RECORD = "evidence.json"
CORE = ("reference", "random", "random_longer", "inheritune", "last_half")
"""Runs of the first chart of losses; the others follow."""
CONTROLS = {
    "random_longer": "a random start with the reference's steps added",
    "reference_longer": "the reference trained on for as many steps",
}
"""Runs that have had what Inheritune and its reference have had, which the verdict compares with it."""
MEASURES = {"max_rank": "MaxRank", "avg_mass": "AvgMass"}


def is_evidence(folder: Path) -> bool:
    """Return whether recipes/evidence.sh has left its results in `folder`."""
    return (folder / RECORD).is_file()


def build_evidence_page(folder: Path) -> Page:
    """Return the report of the evidence in `folder`. Raises UserError if one of its files is damaged."""
    found = read_json(folder / RECORD)
    seeds = {seed: read_json(folder / "seeds" / f"seed{seed}.json") for seed in found["seeds"]}
    title, *_, notes = _read_notes(folder)
    rows = {(row["run"], row["stage"]): row for row in found["rows"]}
    sections = [
        _make_table(folder, found, notes),
        Section("Validation loss", charts=_draw_curves(found, seeds)),
        _make_growth(folder, seeds),
        Section(
            "Attention over training",
            words=[f"Means of {len(seeds)} seeds; at the last step also their range."],
            charts=_draw_attention(seeds),
        ),
    ]
    if found["rank_worth"]["points"]:
        sections.append(Section("What a start is worth, by rank", charts=[_draw_worth(found)]))
    sections += [
        Section("What ran where", grid=_make_machines(folder, found), words=[f"Made by: {found['command']}"]),
        Section("Tables and plots", links=list_files(folder, "table")),
    ]
    return Page(
        title=f"The evidence over {len(seeds)} seeds",
        about=title,
        verdict=_make_verdict(found, rows),
        sections=sections,
        rehearsal=found["rehearsal"],
        open_points=_list_open_points(found, seeds),
    )


def _read_notes(folder: Path) -> tuple[str, str, list[str]]:
    """Return (title, table, notes) of table.md."""
    parts = _open_table(folder / "table.md").read_text(encoding="utf-8").strip().split("\n\n")
    return unescape_markdown(parts[0]), parts[1], [unescape_markdown(part) for part in parts[2:]]


def _open_table(file: Path) -> Path:
    """Return a file of the table. Raises UserError if it is missing."""
    if not file.is_file():
        raise UserError(f"{file} is missing; make it again: bash recipes/evidence.sh, or its summary alone")
    return file


def _make_verdict(found: dict, rows: dict) -> str:
    """Return the outcome in sentences: Inheritune's first stage against the reference and its controls."""
    ours, reference = rows["inheritune", 1], rows["reference", None]
    to_reference, to_random = (describe_difference(ours[key]) for key in ("to_reference", "to_random"))
    words = [
        f"With {_join(ours['layers'])} of {_join(reference['layers'])} layers, Inheritune ends "
        f"{to_reference} the reference and {to_random} a random start of its size."
    ]
    for run, name in CONTROLS.items():
        if gap := found["beside_inheritune"].get(run):
            words.append(f"It ends {describe_difference(gap)} {name}.")
    shown = [gap for row in found["rows"] for gap in (row["to_reference"], row["to_random"]) if gap]
    tested = {  # a comparison that is shown twice, or in both directions, counts once
        (abs(gap["mean"]), gap["p"]): gap["p_holm"]
        for gap in (*shown, *found["beside_inheritune"].values())
        if "p" in gap
    }
    if tested:
        left = sum(p_holm < 0.05 for p_holm in tested.values())
        words.append(f"Of all {len(tested)} comparisons, {left} are below 0.05 after Holm's correction.")
    return " ".join(words)


def describe_difference(gap: dict) -> str:
    """Return where a model is by a difference over seeds, before the other model's name."""
    if gap["low"] is None:
        return f"{gap['mean']:+.4f} nats (one seed, noise unknown) from"
    ends = f"95% interval {gap['low']:+.4f} to {gap['high']:+.4f}"
    if "p_holm" in gap:
        ends += f", p {gap['p']:.2g}, corrected {gap['p_holm']:.2g}"
    if gap["low"] <= 0 <= gap["high"]:
        return f"level, within the noise ({gap['mean']:+.4f}, {ends}), with"
    return f"{abs(gap['mean']):.4f} nats ({ends}) {'above' if gap['mean'] > 0 else 'below'}"


def _join(numbers: list) -> str:
    return " or ".join(str(number) for number in numbers)


def _list_open_points(found: dict, seeds: dict[int, dict]) -> list[str]:
    """Return what the evidence does not say."""
    points = []
    ranks = [min(_find_last(_find(record, "reference"))["max_rank"]) for record in seeds.values()]
    lazy = sum(rank <= 1 for rank in ranks)
    words = "no layer of any reference is lazy, so nothing here tests what lazy layers cost"
    if lazy:
        words = f"{lazy} of {len(ranks)} references have a lazy layer"
    points.append(
        f"Lowest MaxRank at the end, seed by seed: {', '.join(f'{rank:.2f}' for rank in ranks)}; {words}."
    )
    few = [row["label"] for row in found["rows"] if len(row["seeds"]) < len(seeds)]
    if few:
        points.append(f"Not all seeds have: {'; '.join(few)}.")
    unknown = [row["label"] for row in found["rows"] if row["loss"]["low"] is None]
    if unknown:
        points.append(f"Noise unknown (one seed): {'; '.join(unknown)}.")
    return points


def _make_table(folder: Path, found: dict, notes: list[str]) -> Section:
    """Return the section of the table; each row leads to the files of its seeds."""
    with open(_open_table(folder / "table.csv"), encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    record = folder / RECORD
    rows: list[list[Cell]] = []
    for line, row in zip(lines, found["rows"], strict=True):
        cells = [
            make_cell(unescape_csv(words), record)
            for name, words in line.items()
            if name not in ("model", "seeds")
        ]
        files: list[Piece] = []
        for seed in row["seeds"]:
            files += [Piece(", ")] if files else []
            files.append(Piece(str(seed), folder / "seeds" / f"seed{seed}.json"))
        place = list(line).index("seeds") - 1
        rows.append([make_cell(row["label"]), *cells[:place], tuple(files), *cells[place:]])
    return Section("Results", grid=Grid(list(lines[0]), rows), notes=notes)


def _find(record: dict, run: str, stage: int | None = None) -> dict:
    """Return a model of a seed's record that every counted seed has."""
    return next(one for one in record["models"] if (one["run"], one["stage"]) == (run, stage))


def _find_last(model: dict) -> dict:
    """Return the attention at a model's last measured step."""
    return model["attention"][max(model["attention"], key=int)]


def _draw_curves(found: dict, seeds: dict[int, dict]) -> list[Chart]:
    """Return the charts of mean loss curves with their range over seeds; of grown runs the first stage."""
    curves: dict[bool, list[Curve]] = {True: [], False: []}
    for row in found["rows"]:
        if row["stage"] not in (None, 1):
            continue
        models = [_find(seeds[seed], row["run"], row["stage"]) for seed in row["seeds"]]
        steps = [step for step, _ in models[0]["curve"]][1:]
        losses = [[loss for _, loss in model["curve"]][1:] for model in models]  # seeds x points
        points = list(zip(*losses, strict=True))
        means = [statistics.fmean(point) for point in points]
        low, high = [min(point) for point in points], [max(point) for point in points]
        label = f"{row['label']}, {_join(row['layers'])} layers"
        curve = Curve(label, steps, means, low, high, f"{means[-1]:.4f}")
        curves[row["run"] in CORE].append(curve)
    end = curves[True][0].y[-1]
    note = "Means over seeds with their range, from the first evaluation after step 0 on."
    charts = draw_losses("The core runs", curves[True], end, "nats per token", note)
    if curves[False]:
        others = [curves[True][0], *curves[False]]
        charts += draw_losses("The other runs beside the reference", others, end, "nats per token", note)
    return charts


def _make_growth(folder: Path, seeds: dict[int, dict]) -> Section:
    """Return the section of how each growth ended, seed by seed."""
    headers = [
        "run",
        "seed",
        "ended at stage",
        "layers",
        "parity",
        "difference to the reference (95% interval)",
    ]
    rows = []
    for seed, record in seeds.items():
        file = folder / "seeds" / f"seed{seed}.json"
        for run, verdict in record["growth"].items():
            gap = verdict["difference"]
            words = [
                seed,
                verdict["stage"],
                verdict["layers"],
                "yes" if verdict["parity"] else "no",
                f"{gap['mean']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})",
            ]
            label = _find(record, run, 1)["label"].removesuffix(", stage 1")
            rows.append([make_cell(label), *(make_cell(word, file) for word in words)])
    rows.sort(key=lambda row: row[0][0].text)
    return Section("Growth, seed by seed", grid=Grid(headers, rows))


def _draw_attention(seeds: dict[int, dict]) -> list[Chart]:
    """Return the charts of MaxRank and AvgMass per layer at each measured step."""
    charts = []
    for run, stage in (("reference", None), ("inheritune", 1)):
        models = [_find(record, run, stage) for record in seeds.values()]
        steps = sorted(models[0]["attention"], key=int)
        for field, name in MEASURES.items():
            curves = []
            for step in steps:
                layers = list(zip(*(model["attention"][step][field] for model in models), strict=True))
                x, means = list(range(1, len(layers) + 1)), [statistics.fmean(layer) for layer in layers]
                ends = ([min(layer) for layer in layers], [max(layer) for layer in layers])
                low, high = ends if step == steps[-1] else (None, None)
                curves.append(Curve(f"step {int(step):,}", x, means, low, high))
            charts.append(draw_layers(f"{name}: {models[0]['label']}", curves, name))
    return charts


def _draw_worth(found: dict) -> Chart:
    """Return the chart of what a start from a window of layers is worth, by the rank of these layers."""
    series: dict[str, list[dict]] = {}
    for point in found["rank_worth"]["points"]:
        label = f"layers {point['layers'][0] + 1} to {point['layers'][-1] + 1}"
        series.setdefault(label, []).append(point)
    curves = [
        Curve(label, [one["avg_rank"] for one in points], [one["to_random"] for one in points])
        for label, points in series.items()
    ]
    slope = found["rank_worth"]["slope"]
    note = ""
    if slope:
        ends = "" if slope["low"] is None else f" (95% interval {slope['low']:+.4f} to {slope['high']:+.4f})"
        note = f"A mark per seed. Slope: {slope['mean']:+.4f} nats for each rank{ends}."
    return draw_marks(
        "Starts from windows of layers", curves, "mean MaxRank", "to the random start, nats", note
    )


def _make_machines(folder: Path, found: dict) -> Grid:
    """Return the table of the machines, versions and commits that made the seeds."""
    rows: dict[tuple, list[str]] = {}
    for one in found["made_by"]:
        versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
        key = (one["machine"], one["python"], versions)
        rows.setdefault(key, []).append(shorten_commit(one["git_commit"]))
    record = folder / RECORD
    cells = [
        [make_cell(words, record) for words in (*key, ", ".join(dict.fromkeys(commits)))]
        for key, commits in rows.items()
    ]
    return Grid(["machine", "Python", "versions", "commits"], cells)
