"""One folder opened by transformers 4.57 and by the installed transformers, each in a process of its own."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

# what 4.57 asks for
OLDER = ["transformers>=4.57,<4.58", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<0.23"]
WORKER = Path(__file__).with_name("open_worker.py")


def install_older(folder: Path) -> Path:
    """The folder with transformers 4.57 and the two libraries that it needs in other versions, installed
    once: ten seconds. All else, torch and numpy among it, is that of this environment. Skips the test where
    the index lacks them."""
    site = folder / f"site-{sys.version_info.major}.{sys.version_info.minor}"
    if site.is_dir():
        return site
    unfinished = folder / f".{uuid.uuid4().hex}.tmp"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(unfinished), *OLDER]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"transformers 4.57 cannot be installed: "
            f"{(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
        )
    try:
        unfinished.rename(site)
    except OSError:  # another process was quicker
        assert site.is_dir()
    return site


def open_in_both(jobs: list[dict], older: Path, folder: Path) -> tuple[list[dict], list[dict]]:
    """Results of `jobs` (see open_worker.py) in transformers 4.57 and in the installed one; {"logits": array}
    among them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    started = []
    for name, path in (("older", [str(older)]), ("newer", [])):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(WORKER), str(folder / "jobs.json"), str(folder / name)]
        log = open(folder / f"{name}.log", "w")  # noqa: SIM115 - closed with the process
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for process in started:
        assert process.wait(timeout=600) == 0, "".join(
            path.read_text()[-4000:] for path in folder.glob("*.log")
        )
    return _results(folder / "older"), _results(folder / "newer")


def _results(path: Path) -> list[dict]:
    arrays = np.load(f"{path}.npz")
    facts = json.loads(Path(f"{path}.json").read_text())
    return [{**one, "logits": arrays[str(n)]} if str(n) in arrays else one for n, one in enumerate(facts)]


def assert_alike(older: dict, newer: dict) -> None:
    """The two versions agree in all that a user sees."""
    assert "error" not in older, older["error"]
    assert "error" not in newer, newer["error"]
    assert older["version"].startswith("4.57.") and not newer["version"].startswith("4.")
    compared = (older.keys() | newer.keys()) - {"version", "class", "logits"}
    different = {key for key in compared if older.get(key) != newer.get(key)}
    assert not different, {key: (older.get(key), newer.get(key)) for key in different}
    assert_close(older["logits"], newer["logits"])


def assert_close(first, second) -> None:
    """Logits agree to 1e-5 of the largest, or of 1."""
    first, second = np.asarray(first), np.asarray(second)
    assert first.shape == second.shape
    assert np.abs(first - second).max() <= 1e-5 * max(1.0, np.abs(second).max())
