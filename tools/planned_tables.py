"""Writes the tables that `plan` computes into the documents: python tools/planned_tables.py

A test fails when they are stale.

They are for the H100 (80 GB) at 40% of its bf16 rate, with the DeepSpeed JSON that each experiment names."""

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / place) for place in ("", "tests/support"))
from written import filled, markdown

from inheritune.config.catalog import GPU_SPECS
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.jobs import load_jobs
from inheritune.config.paths import RECIPES, REPOSITORY
from inheritune.data.batches import Share
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.planning import memory, proposals
from inheritune.planning import plan as planning

SIZES = [
    ("gpt2_small_owt", 12),
    ("gpt2_medium_owt", 24),
    ("gpt2_large_owt", 36),
    ("gpt2_xl_owt", 24),
    ("gpt2_xl_owt", 48),
]
SIZES += [("openllama_3b_1b", 13), ("openllama_7b", 6), ("llama2_7b", 7)]

MARGIN = 1.1
"""Measured peak over planned: on an H100 14.4 GB were reserved where 13.2 were planned (docs/gpu.md)."""
CARD_FILE = "ds_configs/zero1_h100.json"


def span(values: list[float]) -> str:
    """Return '38' or '38 to 47', rounded to what a reader needs."""
    ends = [f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def experiments() -> dict[str, list[dict]]:
    """Return {experiment: plans on 8 GPUs} without the quickstart, by GPU-hours of the first run."""
    names = [path.stem for path in RECIPES.glob("*.yaml") if path.stem != "quickstart"]
    plans = {name: planning.plan_experiment(load_experiment(name)) for name in names}
    return dict(sorted(plans.items(), key=lambda item: (item[1][0]["gpu_hours"], item[0])))


def recipes_table() -> str:
    rows = []
    for name, plans in experiments().items():
        grown = [facts["gpu_hours"] for facts in plans if facts["stage"] and facts["run"] == "inheritune"]
        rows.append(
            [
                name,
                f"{plans[0]['run']} {span([plans[0]['gpu_hours']])}",
                span(grown) if grown else "",
                f"{sum(facts['gpu_hours'] for facts in plans):,.0f}",
                span([facts["peak"] / 1e9 for facts in plans]),
                f"{sum(facts['disk'] for facts in plans) / 1e9:,.0f}",
            ]
        )
    heads = ["experiment", "first run", "a stage of growth", "every run", "GB per GPU of 8", "GB of disk"]
    return markdown(heads, rows)


def slurm_table() -> str:
    """Return the table of the scripts of slurm/ per experiment, their GPUs and GPU-hours."""
    rows = []
    for name, plans in experiments().items():
        jobs = (job for job in load_jobs().values() if job.experiment == name)
        asked = {job.name.rpartition("_"): job.gpus for job in jobs}
        stem = next(iter(asked))[0]
        kinds = [
            kind for kind in ("reference", "stage1", "growth", "baselines") if (stem, "_", kind) in asked
        ]
        scripts = f"`{stem}_{kinds[0]}.sh`" if len(kinds) == 1 else f"`{stem}_{{{','.join(kinds)}}}.sh`"
        first = plans[0]
        stages = [facts for facts in plans if facts["stage"] and facts["run"] == "inheritune"]
        hours = f"{first['run']} ({first['layers']} layers) {span([first['gpu_hours']])}"
        if stages:
            depths = ", ".join(str(facts["layers"]) for facts in stages)
            hours += f"; stages of {depths} layers " + ", ".join(
                span([facts["gpu_hours"]]) for facts in stages
            )
        rows.append([scripts, max(asked.values()), hours, f"`{name}`"])
    return markdown(["script", "GPUs", "GPU-hours of each job", "runs of"], rows)


def memory_table() -> str:
    """Return the table of planned peaks of the paper's sizes under each JSON, on 1 and 8 GPUs."""
    files = sorted(p.name for p in (REPOSITORY / "ds_configs").glob("*.json") if not p.name.startswith("cpu"))
    rows = []
    for name, layers in SIZES:
        experiment = load_experiment(name)
        for gpus in (1, 8):
            row = [f"{experiment.model.size}, {layers} layers", f"{gpus}"]
            for file in files:
                settings, length = load_deepspeed_json(f"ds_configs/{file}"), experiment.data.sequence_length
                peaks = [
                    memory.estimate_memory(experiment.model, layers, its, experiment.train, gpus, length)[
                        "peak"
                    ]
                    / 1e9
                    for its in (
                        settings,
                        proposals.apply_change(settings, {"inheritune.activation_checkpointing": True}),
                    )
                ]
                row.append(f"{peaks[0]:.0f} ({peaks[1]:.0f})")
            rows.append(row)
    return markdown(["model", "GPUs", *(file.removesuffix(".json") for file in files)], rows)


def peak_of(experiment: Experiment, layers: int, settings: dict, gpus: int, micro: int) -> float:
    """Return the planned peak in bytes of each of `gpus` GPUs at micro batches of up to `micro`."""
    its = proposals.apply_change(settings, {"train_micro_batch_size_per_gpu": micro})
    length = experiment.data.sequence_length
    return memory.estimate_memory(experiment.model, layers, its, experiment.train, gpus, length)["peak"]


def fitting_micro_batch(experiment: Experiment, layers: int, gpus: int) -> int:
    """Return the micro batch of the fewest micro steps with which ZeRO 1 fits an H100 with MARGIN. Raises
    StopIteration if a single sequence does not fit."""
    share = -(-experiment.train.batch_tokens // experiment.data.sequence_length // gpus)
    settings, room = load_deepspeed_json(CARD_FILE), GPU_SPECS["H100"]["memory_gb"] * 1e9 / MARGIN
    sizes = dict.fromkeys(-(-share // steps) for steps in range(1, share + 1))
    return next(n for n in sizes if peak_of(experiment, layers, settings, gpus, n) <= room)


def card_table() -> str:
    """Return the table of micro batches on H100s: each recipe's file, and the fewest micro steps."""
    rows = []
    for name, layers in SIZES:
        experiment = load_experiment(name)
        own, card = load_deepspeed_json(experiment.train.deepspeed), load_deepspeed_json(CARD_FILE)
        sequences = experiment.train.batch_tokens // experiment.data.sequence_length
        for gpus in (1, 4, 8):
            micros = (own["train_micro_batch_size_per_gpu"], fitting_micro_batch(experiment, layers, gpus))
            cells = []
            for its, micro in zip((own, card), micros, strict=True):
                share = Share.of(sequences, 0, gpus, micro)
                peak = peak_of(experiment, layers, its, gpus, micro) / 1e9
                cells.append(f"{share.micro_batch} x {share.accumulation}, {peak:.0f} GB")
            file = Path(experiment.train.deepspeed).stem
            rows.append([f"`{name}`, {layers} layers", gpus, f"{file}: {cells[0]}", cells[1]])
    return markdown(["experiment", "GPUs", "the recipe's file", "ZeRO 1, fewest micro steps"], rows)


def documents() -> dict[Path, str]:
    """Return {file: text with current tables}."""
    texts = {}
    for folder, made in (
        ("ds_configs", memory_table()),
        ("recipes", recipes_table()),
        ("slurm", slurm_table()),
        ("docs/memory.md", card_table()),
    ):
        file = REPOSITORY / folder if folder.endswith(".md") else REPOSITORY / folder / "README.md"
        texts[file] = filled(file.read_text(encoding="utf-8"), "tools/planned_tables.py", made)
    return texts


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
