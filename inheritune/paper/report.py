"""`report ITEM`: one self-contained HTML page of an experiment, of an item of the paper, or of the evidence.

The page is made from the JSON of runs only, opens from disk, and needs no network.
"""

from pathlib import Path

from inheritune.config.experiment import load_experiment
from inheritune.config.paths import REPOSITORY
from inheritune.files.outputs import resolve_replaceable
from inheritune.files.rundir import RunDir
from inheritune.paper.items import list_items, load_experiments, load_item
from inheritune.paper.report_evidence import build_evidence_page, is_evidence
from inheritune.paper.report_experiment import build_experiment_page
from inheritune.paper.report_page import is_page, write_page
from inheritune.paper.report_paper import build_paper_page
from inheritune.paper.table_files import locate_results

NAME = "report.html"


def report(item: str, seed: int = 0, rehearse: bool | None = None, out: str | None = None) -> Path:
    """Write the report of `item` and return its path.

    ITEM is an experiment (the page is written into the seed's folder), a table or figure of the paper (next
    to the paper's tables) or the folder of the evidence's results (into it). `out` is another file.

    Raises UserError if nothing has begun, a file is damaged, or plotly is not installed, and for an `out`
    that is something else than a report."""
    given = resolve_replaceable(out, "report", is_page) if out else None
    if item in list_items():
        small = any(one.rehearsal for one in load_experiments(load_item(item), rehearse).values())
        path = locate_results(small, seed) / f"{item}.html"
        return write_page(build_paper_page(item, seed, rehearse), given or path)
    for folder in (Path(item), REPOSITORY / item):
        if is_evidence(folder):
            return write_page(build_evidence_page(folder), given or folder / NAME)
    experiment = load_experiment(item, rehearse, list_items())
    path = RunDir.of(experiment, NAME, seed).path
    return write_page(build_experiment_page(experiment, seed), given or path)
