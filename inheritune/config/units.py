"""How sizes in bytes are written in messages and tables: in powers of 1000, as disks and the Hub count."""

UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def format_bytes(size: float, unit: str | None = None, decimals: int | None = None) -> str:
    """Return a number of bytes in `unit`, by default the largest of UNITS that the size reaches.

    By default GB have one of `decimals`, the smaller units none."""
    if unit is None:
        unit = next((name for name in reversed(UNITS) if size >= UNITS[name]), "B")
    if decimals is None:
        decimals = 1 if unit == "GB" else 0
    return f"{size / UNITS[unit]:,.{decimals}f} {unit}"


def format_memory(size: float) -> str:
    """Return a number of bytes in GB, or in MB below 0.1 GB, so that the rows of a table compare."""
    return format_bytes(size, "GB" if size >= 1e8 else "MB", 1)
