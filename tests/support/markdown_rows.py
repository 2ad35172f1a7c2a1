"""The rows of a Markdown table."""


def split_row(line: str) -> list[str]:
    """The cells of one row."""
    return [cell.strip() for cell in line.strip("|").split("|")]
