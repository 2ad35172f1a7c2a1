"""Escaping of the user's words (labels, names, titles) for CSV, Markdown, LaTeX and plots."""

import html
import re
from typing import Any

NUMBER = r"[-+]?(?:[0-9][0-9,]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?%?"
MEASURED = re.compile(rf"{NUMBER}(?: \({NUMBER} to {NUMBER}\))?")
"""A number, or a number with its interval, as in the tables."""
FORMULA = ("=", "+", "-", "@")
"""First characters of a cell that a spreadsheet evaluates (OWASP, CSV injection)."""


def join_lines(words: str) -> str:
    """Return the words on one line: each run of unprintable characters and blanks becomes one blank."""
    if words.isprintable():
        return words
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in words)).strip()


def escape_csv(value: Any) -> Any:
    """Return a cell of a CSV file.

    Text that a spreadsheet would evaluate gets an apostrophe in front; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    words = join_lines(value)
    return f"'{words}" if words.startswith(FORMULA) and not MEASURED.fullmatch(words) else words


def unescape_csv(words: str) -> str:
    """Return the words that `escape_csv` made `words` of, as long as they are one line."""
    return words[1:] if words.startswith("'") and words[1:].startswith(FORMULA) else words


def escape_markdown(words: str) -> str:
    """Return words for a table or sentence of GitHub's Markdown, which then shows them unchanged.

    They hold no markup, no HTML and no cell border."""
    words = re.sub(r"([\\`*\[\]|$~])", r"\\\1", join_lines(words))
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", words)  # an underscore within a word needs no escape
    words = re.sub(r"&(?=#?\w+;)", "&amp;", words)
    words = re.sub(r"^(?=[#+-])", r"\\", words)  # at the start of a line: a heading, a list
    words = re.sub(r"^([0-9]+)(?=[.)] )", r"\1\\", words)
    return words.replace("<", "&lt;").replace(">", "&gt;")


def unescape_markdown(words: str) -> str:
    """Return the words that `escape_markdown` made `words` of."""
    return html.unescape(re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", words))


def escape_latex(words: str) -> str:
    """Return words for a LaTeX table or a one-line comment; tabulate escapes the special characters."""
    return join_lines(words)


def escape_plot_label(words: str) -> str:
    """Return words for a plot; legends also show those that begin with an underscore.

    The paper's figures turn formulas off, so `$` needs no escape."""
    words = join_lines(words)
    return f" {words}" if words.startswith("_") else words
