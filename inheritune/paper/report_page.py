"""A report as one HTML page: its parts, and the page made of them.

The page holds all that it shows: style, charts, and plotly, compressed. It asks for nothing over a network,
and its policy (CSP) forbids it. Jinja escapes every word; a link leads to a file beside the page.
"""

import base64
import gzip
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inheritune.errors import UserError
from inheritune.files.writing import write_text
from inheritune.paper.report_charts import Chart

FOLDER = Path(__file__).resolve().parent
GENERATOR = "inheritune report"
"""Name of what wrote a page, in its head."""


@dataclass(frozen=True)
class Piece:
    """Words of a cell, and the file that they were read from."""

    text: str
    file: Path | None = None


Cell = tuple[Piece, ...]


def make_cell(text: Any, file: Path | None = None) -> Cell:
    """Return a cell of one piece."""
    return (Piece(str(text), file),)


@dataclass(frozen=True)
class Grid:
    """A table. `quiet` are the indices of rows that hold no result."""

    headers: list[str]
    rows: list[list[Cell]]
    quiet: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of a growth on its timeline. `state` is chosen, finished, running or missing."""

    title: str
    state: str
    words: str
    file: Path | None = None


@dataclass
class Section:
    """A part of the page under a heading: sentences, a table, stages, links, charts."""

    title: str
    words: list[str] = field(default_factory=list)
    grid: Grid | None = None
    stages: list[Stage] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    links: Cell = ()

    def is_empty(self) -> bool:
        """Return whether the section shows nothing but its heading."""
        return not (self.words or self.grid or self.stages or self.charts or self.notes or self.links)


@dataclass
class Page:
    """A whole report."""

    title: str
    about: str
    verdict: str
    sections: list[Section]
    rehearsal: bool = False
    open_points: list[str] = field(default_factory=list)
    """What the results do not say: runs that are not run, growth that ended early, noise that is unknown."""


def pack_plotly() -> str:
    """Return plotly's program, compressed, as base64: 2 MB instead of 5.

    Raises UserError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("a report needs plotly, which is not installed; run: pip install plotly") from None
    packed = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)  # without a time: the same bytes again
    return base64.b64encode(packed).decode()


def write_page(page: Page, path: Path) -> Path:
    """Write a page, and return its path. Raises UserError if plotly or Jinja is not installed."""
    program = pack_plotly()
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("a report needs Jinja2, which is not installed; run: pip install Jinja2") from None
    maker = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    maker.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False, "separators": (",", ":")}
    maker.filters["link"] = lambda file: link_file(file, path.parent)
    maker.filters["split_interval"] = split_interval
    maker.filters["finite"] = replace_non_finite
    style, script = ((FOLDER / f"report.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    parts = {"page": page, "style": style, "script": script, "plotly": program, "generator": GENERATOR}
    write_text(path, maker.get_template("report.html").render(parts))
    return path


def is_page(path: Path) -> bool:
    """Return whether a file is a page that `write_page` wrote."""
    with open(path, "rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(2000)


def link_file(file: Path | None, folder: Path) -> str:
    """Return the address of a file as seen from `folder`; empty without a file, or if it does not exist."""
    if file is None or not file.exists():
        return ""
    address = quote(os.path.relpath(file.resolve(), folder.resolve()).replace(os.sep, "/"))
    return "./" + address + ("/" if file.is_dir() else "")


def split_interval(text: str) -> tuple[str, str]:
    """Return (number, interval and what follows it) of a cell such as -0.38 (-0.39 to -0.37); (text, "") of
    another one."""
    found = re.fullmatch(r"(\S+) (\(\S+ to \S+\).*)", text)
    return (found[1], found[2]) if found else (text, "")


def replace_non_finite(value: Any) -> Any:
    """Return a JSON value with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
