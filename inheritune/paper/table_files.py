"""Where tables and figures of the paper are written, and how a table is written: Markdown, CSV and LaTeX."""

import csv
import io
from pathlib import Path

from tabulate import tabulate

from inheritune.config import names
from inheritune.files.escape import escape_csv, escape_latex, escape_markdown
from inheritune.files.rundir import get_runs_dir
from inheritune.files.writing import write_text


def locate_results(rehearsal: bool, seed: int) -> Path:
    """Return the folder for the paper's tables and figures."""
    return get_runs_dir(rehearsal) / names.PAPER / f"seed{seed}"


def write_table(
    stem: Path, title: str, headers: list[str], cells: list[list[str]], notes: list[str], records: list[dict]
) -> None:
    """Print a table as Markdown, and write stem.md, stem.tex and stem.csv.

    The CSV file holds `records`, one per number. The title, the headers and the first cell of a row are text
    and are escaped here. The other cells are numbers, and the notes are Markdown."""
    words = [[escape_markdown(row[0]), *row[1:]] for row in cells]
    text = tabulate(
        words, headers=list(map(escape_markdown, headers)), tablefmt="github", disable_numparse=True
    )
    page = "\n\n".join([escape_markdown(title), text, *notes]) + "\n"
    write_text(stem.with_suffix(".md"), page)
    plain = [[escape_latex(row[0]), *(cell.replace("**", "") for cell in row[1:])] for row in cells]
    below = [f"% {escape_latex(line)}" for line in [title, *notes]]
    text = tabulate(
        plain, headers=list(map(escape_latex, headers)), tablefmt="latex_booktabs", disable_numparse=True
    )
    write_text(stem.with_suffix(".tex"), "\n".join([*below, text]) + "\n")
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(map(escape_csv, records[0]))
    writer.writerows([escape_csv(record[key]) for key in records[0]] for record in records)
    write_text(stem.with_suffix(".csv"), lines.getvalue())
    print(page)
