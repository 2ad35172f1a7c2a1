"""Writes the tables of benchmarks/README.md from results/*.json: python benchmarks/report.py"""

import json

import growth
from harness import GOAL_HEADS, HERE, goal_rows, table_of
from written import filled, markdown

ORDER = (
    "train_step",
    "pieces",
    "prepare",
    "readers",
    "inherit",
    "analyze",
    "batches",
    "checkpoint",
    "startup",
    "downstream",
)

PROFILES = "Files and line numbers are those of the day of the measurement; some have moved since."


def stored(part: str) -> list[dict]:
    path = HERE / "results" / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def where(results: list[dict]) -> str:
    """Machines, dates and versions of the results, once each."""
    lines = []
    for result in results:
        its = result["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in its["versions"].items() if number)
        gpu = f", {its['gpu']}" if its["gpu"] else ", no GPU"
        lines.append(
            f"{its['cpu']}, {its['cores']} cores, {its['memory_gb']} GB{gpu}; Python {its['python']}, "
            f"{versions}"
        )
    dates = sorted(result["date"] for result in results)
    loads = [
        load
        for result in results
        for load in (result["machine"]["load_before"], result["machine"]["load_after"])
    ]
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{' / '.join(dict.fromkeys(lines))}. {span}; load average {min(loads)} to {max(loads)}, the "
        f"benchmark's own included."
    )


def text() -> str:
    results = [result for part in ORDER for result in stored(part)]
    if not results:
        return "Nothing has been measured yet: `bash benchmarks/run.sh`."
    missed = [result for result in results if result["profile"]]
    parts = [
        where(results),
        "### Goals",
        markdown(GOAL_HEADS, [row for result in results for row in goal_rows(result)]),
    ]
    parts += ["### All numbers", table_of(results)]
    if grown := stored("growth"):
        parts += [
            "### How cost grows",
            where(grown),
            growth.table(grown),
            "![Cost at four sizes](results/growth.png)",
        ]
    parts += ["### Where the time goes where a goal was missed", PROFILES] if missed else []
    for result in missed:
        parts.append(f"{result['part']}: {result['case']}\n\n```\n" + "\n".join(result["profile"]) + "\n```")
    return "\n\n".join(parts)


def main() -> None:
    readme = HERE / "README.md"
    readme.write_text(
        filled(readme.read_text(encoding="utf-8"), "benchmarks/report.py", text()), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
