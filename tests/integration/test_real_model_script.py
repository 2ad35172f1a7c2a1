"""recipes/real_model.sh on a tiny model in the place of the real one: 30 layers, two steps of each run."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from fork_server import FORKS
from test_own_model import TEXTS
from tiny_models import config_of, random_model

from inheritune.data.bpe_training import train_bpe
from inheritune.files.json_files import read_json
from inheritune.runs.comparison import compare_windows

EVIDENCE = REPOSITORY / "recipes" / "evidence"


@pytest.mark.slow
def test_the_real_model_script_in_small(own_root, tmp_path):
    folder = tmp_path / "place"
    config = config_of("llama")
    config.num_hidden_layers, config.vocab_size, config.max_position_embeddings = 30, 320, 128
    random_model(config, 1).save_pretrained(folder / "smollm2")
    train_bpe("bpe:300", [path.read_text() for path in TEXTS], folder / "smollm2")
    lines = [json.dumps({"text": text}) for path in TEXTS for text in path.read_text().split("\n\n")]
    (folder / "topics.jsonl").write_text("\n".join(lines) + "\n")
    text = (EVIDENCE / "smollm2.yaml").read_text()
    for old, new in (
        ("steps: 200", "steps: 2"),
        ("warmup_steps: 20", "warmup_steps: 1"),
        ("_every: 40", "_every: 1"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "small.yaml").write_text(text)
    command = ["bash", REPOSITORY / "recipes" / "real_model.sh", folder, tmp_path / "small.yaml"]
    environment = {**os.environ, **FORKS.on_path(anyway=True)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made, table = read_json(tmp_path / "small/real_model.json"), (tmp_path / "small/table.md").read_text()
    models = {(model["run"], model["stage"]): model for model in made["models"]}
    assert len(models) == 10 and (tmp_path / "small/layer_worth.png").stat().st_size > 10_000
    for model in models.values():
        whole = models["reference", None]
        gap = compare_windows(np.array(model["windows"]), np.array(whole["windows"]))
        assert model["loss"]["mean"] == pytest.approx(np.mean(model["windows"]), rel=1e-6)
        if model is not whole:
            assert model["difference"]["mean"] == pytest.approx(gap["mean"], abs=1e-6)
            assert f"{gap['mean']:+.4f} (" in table
    assert models["trained_on", None]["layers"] == 30 and models["cost", None]["layers"] == 15
    assert len([row for row in made["analysis"] if row["kind"] == "layer" and "cost" in row]) == 30
    kept = {path: path.stat().st_mtime_ns for path in own_root.rglob("DONE")}
    shutil.rmtree(tmp_path / "small")
    again = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert again.returncode == 0 and read_json(tmp_path / "small/real_model.json") == made
    assert kept == {path: path.stat().st_mtime_ns for path in own_root.rglob("DONE")}


def test_numbers_are_not_collected_before_all_runs_are_finished(own_root, tmp_path):
    config = config_of("llama")
    config.num_hidden_layers, config.vocab_size, config.max_position_embeddings = 30, 320, 128
    random_model(config, 1).save_pretrained(tmp_path / "smollm2")
    shutil.copy(EVIDENCE / "smollm2.yaml", tmp_path)
    for words, said in (
        (["collect", "smollm2.yaml"], "not finished yet: the model, the model trained on, first layers"),
        (["collct", "smollm2.yaml"], "real_model.py takes get FOLDER or collect EXPERIMENT"),
    ):
        command = [sys.executable, EVIDENCE / "real_model.py", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
