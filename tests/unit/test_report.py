"""Reports: the page's numbers, links and words from made-up run folders in their real form."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from conftest import REPOSITORY, experiment_dict, write_experiment
from made_up_runs import (
    RUNS,
    START,
    end_growth,
    finish_run,
    make_layers,
    write_attention,
    write_record,
)
from test_claims import medium
from test_tables import finish, score

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files import escape
from inheritune.files.json_files import write_json
from inheritune.files.rundir import RunDir
from inheritune.paper import report_charts, report_page, report_runs
from inheritune.paper.report import report

LABELS = {
    "reference": "reference",
    "grown": "Inheritune",
    "random": "random <b>start</b> & 'more' %{y}",
    "longer": "never run",
}


class Reader(HTMLParser):
    """What a page holds: the cells of its tables, the addresses of its links, words, figures."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.words, self.figures, self.stack = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link"):
            self.stack.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"{tag} does not close what is open"

    def handle_data(self, data):
        tag, attributes = self.stack[-1] if self.stack else ("", {})
        if tag == "script":
            if attributes.get("type") == "application/json":
                self.figures.append(json.loads(data))
            return
        if tag == "style":
            return
        self.words += data
        if any(one in ("td", "th") for one, _ in self.stack):
            self.tables[-1][-1][-1] += data

    def row(self, label: str, table: int = 0) -> list[str]:
        """The only row of a table that begins with `label`."""
        (found,) = [row for row in self.tables[table] if row[0].strip() == label]
        return [" ".join(cell.split()) for cell in found]

    def lines(self) -> dict[str, dict]:
        """{name: trace} of all named lines of all charts; of several of one name the first."""
        traces = [trace for figure in self.figures for trace in figure["data"] if trace.get("name")]
        return {trace["name"]: trace for trace in reversed(traces)}


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def make_experiment(tmp_path: Path, rehearse: bool = False):
    """(path of an experiment with four runs, the experiment)."""
    rows = [{"run": run, "label": label} for run, label in LABELS.items()]
    raw = experiment_dict(paper=rows, runs=RUNS, about="A <test> & more")
    path = write_experiment(tmp_path / "recipes", raw)
    return path, load_experiment(path, rehearse)


@pytest.fixture
def made(tmp_path):
    """An experiment whose growth ended early; one run was not compared, one is not run."""
    path, experiment = make_experiment(tmp_path)
    write_attention(finish_run(experiment, "reference", 3.0), make_layers(4))
    write_attention(finish_run(experiment, "grown", 2.98, stage=1, gap=-0.02), make_layers(2, costs=False))
    end_growth(experiment, "grown", stage=1, layers=2, parity=True, gap=-0.02)
    finish_run(experiment, "random", 3.1)
    return path, experiment


def test_the_table_has_the_runs_numbers_and_says_what_is_missing(made):
    page = read(report(made[0]))
    row = page.row("reference")[:6]
    assert row == ["reference", "4", "12.35M", "6", "4.0000", "3.0000(2.9900 to 3.0100)"]
    grown = page.row("Inheritune, stage 1")
    assert grown[6:] == ["-0.0200(-0.0240 to -0.0160)", "6", "100", "1.50e+15"]
    assert page.row("never run")[1] == "not run"
    words = " ".join(page.words.split())
    assert (
        "With 2 of the reference's 4 layers, Inheritune reaches the reference's validation loss within the "
        "margin of 0.01 nats: -0.0200 nats" in words
    )
    assert "never run: not run." in words
    assert f"{LABELS['random']}: not compared with the reference; noise unknown." in words
    assert "Growth of grown ended early; not run: stage 2: 3 layers; stage 3: 4 layers." in words
    assert "The growth ended at 2 layers, before its last stage (4 layers)" in words
    assert "One seed." in words and "REHEARSAL" not in words


def test_a_report_goes_where_it_is_wanted(made, tmp_path):
    """Over an older one, and over nothing else; links lead to the runs from there."""
    out = tmp_path / "shared" / "page.html"
    for _ in range(2):
        assert report(made[0], out=str(out)) == out
    page = read(out)
    assert page.row("reference") == read(report(made[0])).row("reference")
    links = [unquote(href) for href in re.findall(r'href="([^"#:]+)"', out.read_text())]
    assert links and all((out.parent / link).exists() for link in links)
    other = tmp_path / "mine.html"
    other.write_text("<p>mine")
    for path in (other, tmp_path):
        with pytest.raises(UserError, match="is no report|is a folder"):
            report(made[0], out=str(path))
    assert other.read_text() == "<p>mine"


def test_a_margin_that_was_changed_after_the_growth_is_named(made):
    path = Path(made[0])
    raw = yaml.safe_load(path.read_text())
    raw["runs"]["grown"]["grow"]["margin"] = -0.5
    path.write_text(yaml.safe_dump(raw))
    words = " ".join(read(report(str(path))).words.split())
    assert "does not reach the reference's validation loss within the margin of -0.5 nats: -0.0200" in words
    assert "-0.0160), at the stage where growth ended with a margin of 0.01" in words


def test_the_charts_hold_the_records_points(made):
    page = read(report(made[0]))
    lines = page.lines()
    curve = lines["Inheritune, stage 1 (2.9800)"]
    assert curve["x"] == list(range(7)) and curve["y"][-1] == pytest.approx(2.98)
    assert lines["end of the reference (3.0000)"]["y"] == [3.0, 3.0]
    assert lines["reference, 4 layers"]["y"] == pytest.approx([11.0, 6.5, 5.0, 4.25])  # MaxRank
    worth = lines["without the block"]["customdata"]
    assert worth == pytest.approx([2.94, 0.315, 3 / 27 - 0.06, 3 / 64 - 0.06])
    assert lines["without its attention"]["customdata"] == [0.1, None, None, None]
    heat = [t for figure in page.figures for t in figure["data"] if t.get("type") == "heatmap"]
    assert heat[0]["customdata"][2] == pytest.approx([11.0, 6.5, 5.0, 4.25])
    map_shown = heat[1]["z"]
    assert map_shown[0][1] is None and map_shown[-1][0] == pytest.approx(-1.079, abs=0.001)  # log10(1/12)


def test_what_ran_where(made, tmp_path):
    """Hours are steps x 900 s, on 8 processes; a restart and steps done again count."""
    path, experiment = made
    folder = RunDir.of(experiment, "random")
    later = START | {"resumed_at": 4, "ranks": 4, "slurm_job": "4712"}
    write_json(folder.provenance, {"starts": [START, later]})
    again = {"step": 4, "loss": 3.5, "step_s": 900.0}
    folder.discarded_metrics.write_text(json.dumps({**again, "step": 3}) + "\n" + json.dumps(again) + "\n")
    page = read(report(path))
    cells = page.row("random", table=-1)
    assert cells[0] == "random" and "2026-11-02 09:30 UTC" in cells
    assert "gpu07 (x86_64, 64 cores), Slurm job 4711, 4712" in cells
    assert "8 on NVIDIA H100 80GB HBM3, 4 on NVIDIA H100 80GB HBM3" in cells
    # 6 steps and 4 done again; of these the last two of the first count on 4 processes
    assert cells[-3:] == ["2.50", "18.00", "1"]
    assert "commit 0123456789ab with changes" in page.words


def test_every_link_leads_to_a_file_beside_the_page(made):
    path = report(made[0])
    page = read(path)
    assert len(page.links) > 40
    for link in page.links:
        assert (path.parent / unquote(link)).exists(), link
    assert {"results.json", "metrics.jsonl", "provenance.json"} <= {Path(link).name for link in page.links}


def test_the_page_asks_for_nothing_and_is_the_same_again(made):
    first = report(made[0]).read_bytes()
    assert report(made[0]).read_bytes() == first
    text = first.decode()
    assert len(text) < 3_000_000
    assert "default-src 'none'" in text and not re.search(r"(src|href)=\"?(https?:)?//", text)


def test_labels_are_words_not_markup(made):
    path = report(made[0])
    text = path.read_text()
    page = Reader(text)
    assert "<b>start</b>" not in text and "A &lt;test&gt; &amp; more" in text
    assert page.row(LABELS["random"])
    names = page.lines()
    assert "random &lt;b&gt;start&lt;/b&gt; &amp; 'more' %{y} (3.1000)" in names  # as plotly is to read it
    assert {trace.get("hovertemplate") for trace in names.values()} >= {"%{y:.4f}", "%{y:.2f}"}


def test_a_rehearsal_is_said(tmp_path):
    path, experiment = make_experiment(tmp_path, rehearse=True)
    finish_run(experiment, "reference", 3.0)
    page = report(path, rehearse=True)
    assert "rehearsal" in page.parts and "REHEARSAL, not a result." in read(page).words


def test_runs_in_progress_are_shown(tmp_path):
    """The reference has begun, nothing is finished; then with nothing at all."""
    path, experiment = make_experiment(tmp_path)
    with pytest.raises(UserError, match="has begun: nothing to report"):
        report(path)
    assert not RunDir.of(experiment, "report.html").path.exists()
    write_record(RunDir.of(experiment, "reference"), 3, 4.0)
    page = read(report(path))
    words = " ".join(page.words.split())
    assert "No verdict yet: the reference, run 'reference', is not finished." in words
    assert page.row("reference")[1] == "not finished: step 3 of 6"
    assert "reference: not finished: step 3 of 6." in words
    assert page.lines()["reference (4.0000)"]["x"] == [0, 1, 2, 3]


def test_a_growth_against_a_third_party_model(tmp_path):
    """Its reference has no record of its own, and one loss; the stage was not compared with it."""
    runs = {
        "public": {"init": {"external": {"source": "some/model"}}},
        "grown": {
            "init": {"inherit": {"source": "some/model", "layers": "0:2"}},
            "compare": "public",
            "grow": {"by": 2, "max_layers": 4},
        },
    }
    rows = [{"run": run, "label": run} for run in runs]
    path = write_experiment(tmp_path / "recipes", experiment_dict(paper=rows, runs=runs))
    experiment = load_experiment(path)
    loss = {"mean": 2.0, "low": 1.9, "high": 2.1, "n": 400}
    facts = {"run": "public", "layers": 4, "parameters": 5_000_000, "validation": loss}
    more = {"seed": 0, "curve_loss": 2.2, "window_losses": [2.0] * 400, "data_fingerprint": "tiny"}
    write_json(RunDir.of(experiment, "public").results, facts | more)
    finish_run(experiment, "grown", 2.5, stage=1)
    page = read(report(path))
    words = " ".join(page.words.split())
    assert page.row("public")[:6] == ["public", "4", "5.00M", "", "", "2.0000(1.9000 to 2.1000)"]
    assert "With 2 of the reference's 4 layers, Inheritune was not compared with the reference" in words
    assert "grown, stage 1: not compared with the reference; noise unknown." in words
    assert "The growth is not finished." in words and "Not run yet." in words
    assert page.lines()["end of the reference (2.2000)"]


def test_costs_that_could_not_be_measured_have_no_chart(made):
    path, experiment = made
    rows = make_layers(4)
    for row in rows:
        if "cost" in row:
            row["cost"] = dict.fromkeys(row["cost"])
    write_attention(RunDir.of(experiment, "reference"), rows)
    assert "without the block" not in read(report(path)).lines()


def test_a_damaged_evidence_is_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "cpu"
    shutil.copytree(REPOSITORY / "recipes" / "evidence" / "cpu", folder)
    (folder / "table.csv").unlink()
    with pytest.raises(UserError, match=r"table\.csv is missing"):
        report(str(folder))
    shutil.copy(REPOSITORY / "recipes" / "evidence" / "cpu" / "table.csv", folder)
    assert report(str(folder)) == folder / "report.html"
    (folder / "seeds" / "seed12.json").unlink()
    with pytest.raises(UserError, match=r"seed12\.json is missing"):
        report(str(folder))


def test_growth_without_parity(made):
    path, experiment = made
    for stage, gap in ((2, 0.04), (3, 0.05)):
        finish_run(experiment, "grown", 3.05, stage=stage, gap=gap)
    end_growth(experiment, "grown", stage=2, layers=3, parity=False, gap=0.04)
    page = read(report(path))
    words = " ".join(page.words.split())
    assert "ended without parity at its last stage (4 layers)" in words and "The stage of 3 layers" in words
    axes = [figure["layout"]["xaxis"]["title"]["text"] for figure in page.figures]
    through = page.figures[axes.index("step, all stages counted")]
    assert [trace["x"][0] for trace in through["data"][:3]] == [0, 6, 12]  # one after the other


def test_more_than_six_models_are_in_several_charts():
    curves = [report_charts.Curve(f"model {i}", [0, 1], [3.0, 2.0]) for i in range(12)]
    panels = report_charts.split_panels(curves)
    assert [len(panel) for panel in panels] == [6, 6, 2]
    assert all(panel[0] is curves[0] for panel in panels)
    paper = [report_charts.Curve(f"model {i}{end}", [0], [1.0]) for i in range(6) for end in ("", ": paper")]
    assert len(report_charts.split_panels(paper)) == 1  # six models


def test_an_item_of_the_paper(tmp_path):
    """A failed claim is the verdict; cells lead to the paper's file and to results.json."""
    medium(2.65, 2.70)
    path = report("table5")
    page = read(path)
    words = " ".join(page.words.split())
    assert path.name == "table5.html"
    assert "Medium, 16 layers, Inheritune, round 3: above the full model: +0.0500±0.0072, fails" in words
    assert "Not run: Large, 36 layers" in words
    assert "10 steps are missing; python -m inheritune table table5 --missing lists them." in words
    files = {"table_gpt2_owt_val_loss.csv", "curves_reference_val_loss.csv", "results.json"}
    assert files == {Path(link).name for link in page.links} - {"reference", "stage1", "stage2", "stage3"} - {
        "random_16",
        "random_16_200k",
    }
    ours = page.lines()["this repository"]
    assert 2.65 in ours["x"] and 2.7 in ours["x"]


def test_a_table_without_a_noise_says_so(tmp_path):
    finish("gpt2_xl_owt", "reference", 2.65, tasks={"wikitext": score(25.0, None, "word_perplexity")})
    words = " ".join(read(report("table7")).words.split())
    assert "Noise unknown, so no verdict: 48 layers, random start" in words


def test_a_figure_of_the_paper_has_its_lines_and_the_papers():
    experiment = load_experiment("gpt2_medium_owt")
    folder = finish("gpt2_medium_owt", "reference", 2.65)
    write_attention(folder, make_layers(24))
    page = read(report("fig01"))
    lines = page.lines()
    ours = next(trace for name, trace in lines.items() if trace["x"] == list(range(1, 25)))
    assert experiment.model.layers == 24 and ours["y"][0] == pytest.approx(11.0)
    assert any(name.endswith(": paper") for name in lines)
    assert "drawn" in page.words


@pytest.mark.parametrize("name", ["fig01", "fig05", "fig09", "table6", "toy", "v1_average"])
def test_items_without_a_run_say_so(name):
    page = read(report(name))
    assert "not run" in page.words.lower() or name == "table6"


def test_the_evidence():
    """The committed one: its numbers are those of evidence.json, without a spreadsheet's apostrophes."""
    folder = REPOSITORY / "recipes" / "evidence" / "cpu"
    from inheritune.paper.report_evidence import build_evidence_page

    page = build_evidence_page(folder)
    found = json.loads((folder / "evidence.json").read_text())
    ours = next(row for row in found["rows"] if (row["run"], row["stage"]) == ("inheritune", 1))
    assert f"{abs(ours['to_reference']['mean']):.4f} nats" in page.verdict
    for run, name in (
        ("random_longer", "a random start with"),
        ("reference_longer", "the reference trained on"),
    ):
        gap = found["beside_inheritune"][run]
        assert f"p {gap['p']:.2g}, corrected {gap['p_holm']:.2g}) above {name}" in page.verdict
    # a comparison that is shown twice is one
    gaps = [row[key] for row in found["rows"] for key in ("to_reference", "to_random")]
    gaps += found["beside_inheritune"].values()
    pairs = {abs(gap["mean"]): gap["p_holm"] for gap in gaps if gap and "p" in gap}
    left = sum(p_holm < 0.05 for p_holm in pairs.values())
    assert f"Of all {len(pairs)} comparisons, {left} are below 0.05" in page.verdict
    rows = {row[0][0].text: row for row in page.sections[0].grid.rows}
    cells = [piece.text for cell in rows["half width"] for piece in cell]
    assert "+0.2522 (+0.2369 to +0.2675); p 0.0002, 0.0099" in cells
    names = {
        trace["name"]: trace for c in page.sections[1].charts for trace in c.figure["data"] if "name" in trace
    }
    assert names["reference, 12 layers (3.5276)"]["y"][-1] == pytest.approx(3.5276, abs=1e-4)
    assert "no layer of any reference is lazy" in page.open_points[0]
    assert all(len(chart.figure["data"]) <= 3 * 6 + 1 for chart in page.sections[1].charts)


def test_figures_are_plotlys(made):
    """plotly itself accepts every key and value of every chart."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in read(report(made[0])).figures:
        graph_objects.Figure(figure)


def test_without_plotly_a_sentence_says_what_to_install(made):
    code = "import sys; sys.modules['plotly'] = None\n"
    code += "from inheritune.paper.report import report\nreport(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, made[0]], capture_output=True, text=True, check=False)
    assert "UserError: a report needs plotly, which is not installed; run: pip install plotly" in done.stderr
    assert not RunDir.of(made[1], "report.html").path.exists()


def test_a_report_needs_no_torch(made):
    code = (
        "import sys; from inheritune.paper.report import report; report(sys.argv[1])\n"
        "assert not {'torch', 'transformers', 'matplotlib.figure', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, made[0]], check=True)


@pytest.mark.parametrize(
    "words", ["a_b *c* `d` [e](f) <g> & &amp; h|i $j$ ~k", "# 1. x", "1. x", r"a\b\\_c", "_x_"]
)
def test_escaping_is_undone(words):
    assert escape.unescape_markdown(escape.escape_markdown(words)) == words
    for cell in (words, "-0.1 (x)", "+0.2; p 0.3", "'quoted'"):
        assert escape.unescape_csv(escape.escape_csv(cell)) == cell


def test_cells_and_commits_as_shown():
    assert report_page.split_interval("-0.1 (-0.2 to +0.1); p 0.5, 1") == ("-0.1", "(-0.2 to +0.1); p 0.5, 1")
    assert report_page.split_interval("4 or 5") == ("4 or 5", "")
    assert report_runs.shorten_commit(None) == "unknown"
    assert report_page.replace_non_finite({"a": [1.0, float("nan"), (float("inf"),)]}) == {
        "a": [1.0, None, [None]]
    }
