"""Writes the index of the paper's tables and figures into recipes/README.md, from recipes/paper/items.yaml
and the arithmetic of `plan`: python tools/paper_index.py. A test fails when it is stale."""

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / place) for place in ("", "tests/support"))
from planned_tables import span
from written import filled, markdown

from inheritune.config.paths import RECIPES
from inheritune.paper.items import Item, load_experiments, load_item
from inheritune.paper.prerequisites import list_missing
from inheritune.planning import plan as planning

FILE = RECIPES / "README.md"


def items_of(script: Path) -> list[Item]:
    """Return the items that the last line of a script names."""
    last = script.read_text(encoding="utf-8").splitlines()[-1]
    names = last.partition('paper_item.sh" ')[2].removesuffix(' "$@"').split()
    return [load_item(name) for name in names]


def models_of(items: list[Item]) -> dict[tuple, dict]:
    """Return {(experiment, run, stage): plan} of every model that the items need or start from.

    A grown run has its stages up to the last one shown."""
    found = {}
    for item in items:
        experiments = load_experiments(item, rehearse=False)
        shown = {}
        for row in item.models():
            shown[row.run] = max(row.stage or 1, shown.get(row.run, 1))
        for step in list_missing(item, experiments, lambda *_: False):
            if step.verb in ("train", "grow"):
                for facts in planning.plan_experiment(experiments[step.experiment], step.run):
                    if (facts["stage"] or 1) <= shown.get(f"{step.experiment}/{step.run}", 1):
                        found[step.experiment, step.run, facts["stage"]] = facts
    return found


def row(script: Path) -> list:
    items = items_of(script)
    names = [item.title.partition(":" if item.title[:4] in ("Tabl", "Figu") else " (")[0] for item in items]
    models = models_of(items)
    runs = sorted({r.run.rpartition("/")[0] for item in items for r in item.models() if r.run})
    hours, tokens = (sum(facts[key] for facts in models.values()) for key in ("gpu_hours", "tokens"))
    work = [len(models), span([hours]), span([tokens / 1e9])] if models else ["", "", ""]
    said = [
        "; ".join(dict.fromkeys(filter(None, texts)))
        for texts in zip(*((i.reports, i.differs) for i in items), strict=True)
    ]
    return ["; ".join(names), f"[{script.name}]({script.name})", ", ".join(runs), *work, *said]


def document() -> str:
    """Return recipes/README.md with a current index."""
    scripts = sorted(RECIPES.glob("table*.sh")) + sorted(RECIPES.glob("fig*.sh"))
    heads = [
        "paper",
        "script",
        "runs of",
        "models",
        "GPU-hours",
        "B tokens",
        "the paper reports",
        "what differs",
    ]
    made = markdown(heads, [row(script) for script in scripts])
    return filled(FILE.read_text(encoding="utf-8"), "tools/paper_index.py", made)


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
