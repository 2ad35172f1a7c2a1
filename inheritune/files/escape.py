"""The user's words (labels, names, titles) in what programs read: CSV, Markdown, LaTeX, plots. One function
for each."""

import re

NUMBER = r"[-+]?(?:[0-9][0-9,]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?%?"
MEASURED = re.compile(rf"{NUMBER}(?: \({NUMBER} to {NUMBER}\))?")
"""A number, or one with its interval, as tables hold them."""
FORMULA = ("=", "+", "-", "@")
"""Beginnings of a cell that a spreadsheet computes (OWASP, CSV injection)."""


def one_line(words: str) -> str:
    """The words, every run of line breaks and other characters that cannot be printed made one blank."""
    if words.isprintable():
        return words
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in words)).strip()


def csv_cell(value):
    """A cell of a CSV file: text that a spreadsheet would compute gets an apostrophe before it; numbers stay
    numbers."""
    if not isinstance(value, str):
        return value
    words = one_line(value)
    return f"'{words}" if words.startswith(FORMULA) and not MEASURED.fullmatch(words) else words


def markdown(words: str) -> str:
    """Words in a table or a sentence of GitHub's Markdown, which shows them as they are: no markup, no HTML,
    no new cell."""
    words = re.sub(r"([\\`*\[\]|$~])", r"\\\1", one_line(words))
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", words)  # within a word an underscore is one already
    words = re.sub(r"&(?=#?\w+;)", "&amp;", words)
    words = re.sub(r"^(?=[#+-])", r"\\", words)  # at the start of a line: a heading, a list
    words = re.sub(r"^([0-9]+)(?=[.)] )", r"\1\\", words)
    return words.replace("<", "&lt;").replace(">", "&gt;")


def latex(words: str) -> str:
    """Words in a LaTeX table, whose special characters tabulate escapes, or in a comment of one line."""
    return one_line(words)


def plot_label(words: str) -> str:
    """Words in a plot, shown in legends though they may begin with an underscore. (figures.canvas reads no
    formula in them.)"""
    words = one_line(words)
    return f" {words}" if words.startswith("_") else words
