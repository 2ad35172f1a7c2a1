"""What a report says of single runs: how far they are, their growth, and what ran where."""

from dataclasses import dataclass
from pathlib import Path

from inheritune.config.experiment import Experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir
from inheritune.paper.report_page import Cell, Grid, Piece, Stage, make_cell
from inheritune.runs.job import Job

MACHINE_HEADERS = [
    "run",
    "started",
    "machine",
    "processes",
    "commit",
    "versions",
    "hours in steps",
    "hours x processes",
    "restarts",
]
NOT_RECORDED = "not recorded"
HOUR_S = 3600


@dataclass(frozen=True)
class Work:
    """The time that the steps of a run took, those done again after a restart included."""

    hours: float
    process_hours: float


def list_folders(experiment: Experiment, run: str, seed: int) -> list[tuple[str, RunDir]]:
    """Return (name, folder) of a run, or of each stage of a grown run, that has begun."""
    folder = RunDir.of(experiment, run, seed)
    places = [(run, folder)]
    if experiment.run(run).grow:
        places = [(f"{run}, stage {number}", folder.stage(number)) for number in folder.stages()]
    return [(name, place) for name, place in places if place.metrics.is_file() or place.is_done()]


def describe_progress(experiment: Experiment, run: str, seed: int) -> str:
    """Return in words how far an unfinished run is."""
    spec = experiment.run(run)
    if spec.init.external:
        return "not evaluated"
    begun = list_folders(experiment, run, seed)
    if not begun:
        return "not run"
    name, folder = begun[-1]
    step = max((row["step"] for row in read_jsonl(folder.metrics)), default=0)
    where = name.removeprefix(run).strip(", ")
    return (
        f"not finished: {f'{where}, ' if where else ''}step {step:,} of {experiment.train_of(spec).steps:,}"
    )


def list_stages(experiment: Experiment, run: str, seed: int) -> tuple[list[Stage], str]:
    """Return (the stages of a grown run, those that were not needed too; how the growth ended)."""
    root = RunDir.of(experiment, run, seed)
    depths = Job(experiment, run, seed, stage=1).depths()
    verdict = read_json(root.done) if root.is_done() else {}
    stages = []
    for number, layers in enumerate(depths, 1):
        folder = root.stage(number)
        title = f"Stage {number}: {layers} layers."
        if folder.is_done():
            state = "chosen" if verdict.get("stage") == number else "finished"
            stages.append(Stage(title, state, _describe_stage(folder, state), folder.results))
        elif folder.metrics.is_file():
            stages.append(Stage(title, "running", "Begun, not finished.", folder.metrics))
        else:
            words = "Not run: the growth ended before." if verdict else "Not run yet."
            stages.append(Stage(title, "missing", words))
    return stages, _describe_end(verdict, depths)


def _describe_stage(folder: RunDir, state: str) -> str:
    """Return in words what came out of a finished stage."""
    results = folder.read_results()
    words = [f"Loss {results['validation']['mean']:.4f}."]
    if gap := results.get("difference"):
        words.append(
            f"{gap['mean']:+.4f} to the reference (95% interval {gap['low']:+.4f} to {gap['high']:+.4f})."
        )
    else:
        words.append("Not compared with the reference: its difference and noise are unknown.")
    begun = _read_starts(folder)
    words += [f"Begun {format_time(begun[0])}."] if begun else []
    words += ["Chosen."] if state == "chosen" else []
    return " ".join(words)


def _describe_end(verdict: dict, depths: list[int]) -> str:
    """Return in words how a growth ended."""
    if not verdict:
        return "The growth is not finished."
    margin = f"{verdict['margin']:g} nats"
    if verdict["parity"]:
        early = f", before its last stage ({depths[-1]} layers)" if verdict["layers"] < depths[-1] else ""
        return (
            f"The growth ended at {verdict['layers']} layers{early}: the upper end of the interval is at or "
            f"below the margin of {margin}, which is parity."
        )
    return (
        f"The growth ended without parity at its last stage ({depths[-1]} layers): no interval ends at or "
        f"below the margin of {margin}. The stage of {verdict['layers']} layers has the lowest loss."
    )


def _read_starts(folder: RunDir) -> list[dict]:
    """Return the starts of a run; [] if it has no provenance.json."""
    return folder.read_starts() if folder.provenance.is_file() else []


def format_time(start: dict) -> str:
    """Return when a start was made, to the minute, with its time zone."""
    words = str(start.get("time", "?"))
    zone = words[19:].replace("+0000", "UTC")
    return f"{words[:10]} {words[11:16]} {zone}".strip()


def measure_work(folder: RunDir) -> Work:
    """Return the time of a run's steps. A row of the record counts for the steps since the row before."""
    starts = _read_starts(folder)
    ranks = [(start.get("resumed_at") or 0, start.get("ranks", 1)) for start in starts] or [(0, 1)]
    hours = process_hours = 0.0
    for file in (folder.metrics, folder.discarded_metrics):
        before = 0
        for row in read_jsonl(file):
            if not row.get("step_s") or "loss" not in row:
                continue
            took = row["step_s"] * max(0, row["step"] - before) / HOUR_S
            before = row["step"]
            hours += took
            at_work = [n for resumed_at, n in ranks if resumed_at < row["step"]] or [ranks[0][1]]
            process_hours += took * at_work[-1]
    return Work(hours, process_hours)


def describe_machines(folders: list[tuple[str, RunDir]]) -> dict:
    """Return the parts of a section on what ran where: a row per run or stage, as provenance.json has it.

    A column that is the same for all rows is a sentence instead."""
    rows = [_make_machine_row(name, folder) for name, folder in folders]
    notes = ["Hours are those of the steps, without starts, validation and saving."]
    headers = list(MACHINE_HEADERS)
    for column in ("versions", "commit", "machine"):
        place = headers.index(column)
        shared = {row[place][0].text for row in rows}
        if len(rows) > 1 and len(shared) == 1 and shared != {NOT_RECORDED}:
            notes.insert(0, f"All: {column} {shared.pop()}.")
            headers.pop(place)
            for row in rows:
                row.pop(place)
    return {"grid": Grid(headers, rows), "notes": notes}


def _make_machine_row(name: str, folder: RunDir) -> list[Cell]:
    starts, file = _read_starts(folder), folder.provenance
    if not starts:
        return [make_cell(name, folder.path), *[make_cell(NOT_RECORDED)] * (len(MACHINE_HEADERS) - 1)]
    work = measure_work(folder)
    versions = {f"{key} {value}" for start in starts for key, value in start.get("versions", {}).items()}
    pythons = {f"Python {start.get('python')}" for start in starts}
    jobs = [str(start["slurm_job"]) for start in starts if start.get("slurm_job")]
    hosts = _join({f"{start.get('host')} ({start.get('machine')})" for start in starts})
    words = [
        format_time(starts[0]),
        hosts + (f", Slurm job {_join(jobs)}" if jobs else ""),
        _join(f"{start.get('ranks')} on {start.get('gpu') or start.get('device')}" for start in starts),
        _join(shorten_commit(start.get("git_commit")) for start in starts),
        ", ".join(sorted(pythons) + sorted(versions)),
    ]
    cells = [make_cell(word, file) for word in words]
    hours = [make_cell(f"{value:.2f}", folder.metrics) for value in (work.hours, work.process_hours)]
    restarts = make_cell(len(starts) - 1, file)
    return [make_cell(name, folder.path), *cells, *hours, restarts]


def shorten_commit(commit: str | None) -> str:
    """Return the first digits of a commit, and whether files differed from it."""
    if not commit:
        return "unknown"
    return commit[:12] + (" with changes" if commit.endswith("+changes") else "")


def _join(words) -> str:
    """Return different words in the order of their first appearance."""
    return ", ".join(dict.fromkeys(words if not isinstance(words, set) else sorted(words)))


def list_files(folder: Path, stem: str) -> Cell:
    """Return links to the tables and plots in a folder."""
    files = [folder / f"{stem}{end}" for end in (".md", ".csv", ".tex")] + sorted(folder.glob("*.png"))
    pieces: list[Piece] = []
    for file in (file for file in files if file.is_file()):
        pieces += [Piece(", "), Piece(file.name, file)] if pieces else [Piece(file.name, file)]
    return tuple(pieces)
