"""Every family is cut in the middle and at the end: the logits are those of the source with the other blocks
removed by hand, to the last bit, in both transformers versions.

Families that are cut only are tested here; test_architectures.py has those that are also measured and trained.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cut_worker
import pytest
from tiny_families import AUTOMATIC, FAMILIES, FURTHER, family_config
from tiny_models import random_model

from inheritune.files.json_files import read_json, write_json
from inheritune.models.architectures import find_architecture
from inheritune.models.config_files import add_older_keys
from inheritune.models.surgery import inherit

CUT = [*FURTHER, *AUTOMATIC]
LAYERS = {"middle": [1, 2, 3], "end": [2, 3, 4]}
ONLY_FIRST = {"exaone_moe": "first blocks"}


def make_cuts(name: str, folder: Path) -> dict:
    """A job of cut_worker.py: a source of the family and cuts of it in `folder`."""
    config = family_config(name)
    random_model(config).save_pretrained(folder / "source")
    described = add_older_keys(read_json(folder / "source" / "config.json"))
    write_json(folder / "source" / "config.json", described, seal=False)
    for place, kept in LAYERS.items():
        inherit(folder / "source", kept, folder / place)
    blocks = find_architecture(config).block.removesuffix(".{i}.")
    cuts = {str(folder / place): kept for place, kept in LAYERS.items()}
    return {"family": config.model_type, "source": str(folder / "source"), "blocks": blocks, "cuts": cuts}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, dict]:
    """{family: its job}"""
    folder = tmp_path_factory.mktemp("families")
    return {name: make_cuts(name, folder / name) for name in [*FAMILIES, *CUT]}


def assert_equal(result: dict) -> None:
    """The result of one job: no difference, of logits that are something."""
    assert "error" not in result, result["error"]
    assert len(result) == len(LAYERS)
    for difference, largest in result.values():
        assert difference == 0.0 and largest > 0.0


@pytest.mark.parametrize("name", CUT)
def test_a_cut_has_the_logits_of_the_source_without_the_other_blocks(jobs, name):
    assert find_architecture(family_config(name)).automatic == (name in AUTOMATIC)
    assert_equal(cut_worker.run_jobs([jobs[name]])[0])


@pytest.fixture(scope="module")
def in_older(jobs, older, tmp_path_factory) -> dict[str, dict | None]:
    """{family: the result of its job in transformers 4.57}, None for a family that it lacks"""
    folder = tmp_path_factory.mktemp("older")
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    worker, environment = Path(cut_worker.__file__), {**os.environ, "PYTHONPATH": str(older)}
    command = [sys.executable, str(worker), str(folder / "jobs.json"), str(folder / "results.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "results.json").read_text())
    assert found["version"].startswith("4.57.")
    return dict(zip(jobs, found["results"], strict=True))


NEWER = {"afmoe", "exaone_moe", "hyperclovax", "jais2", "mellum", "minimax_m2", "ministral3", "nanochat"}
NEWER |= {"ministral", "solar_open"}
"""Families that transformers 4.57 does not have."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *CUT])
def test_it_has_them_in_transformers_4_57_too(in_older, name):
    assert (in_older[name] is None) == (name in NEWER)
    if name not in NEWER:
        assert_equal(in_older[name])


def test_at_least_forty_families_are_cut_in_both_versions():
    assert len(({model_type for model_type, _ in FAMILIES.values()} | {*CUT}) - NEWER) >= 40
