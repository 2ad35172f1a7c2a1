"""Entries that you choose by name: model sizes and families, downstream tasks, GPUs, each a table in YAML."""

from pathlib import Path

import yaml

from inheritune.config.paths import RECIPES, REPOSITORY


def _read_table(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


MODEL_SIZES = _read_table(Path(__file__).parent / "sizes.yaml")
TASKS = _read_table(RECIPES / "lm_eval" / "tasks.yaml")
GPU_SPECS = _read_table(Path(__file__).parent / "gpus.yaml")
FAMILIES = tuple(_read_table(REPOSITORY / "inheritune" / "models" / "architectures.yaml"))
"""Values of `model_type` that surgery and training know all about."""
