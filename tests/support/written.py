"""Documents that scripts write parts of: Markdown tables, and the marks between which they stand."""


def markdown(heads: list, rows: list[list]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def filled(text: str, maker: str, made: str) -> str:
    """`text` with `made` between the two marks of the script `maker`."""
    begin, end = f"<!-- made by {maker} -->", f"<!-- end of what {maker} makes -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
