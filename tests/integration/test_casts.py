"""Weights are rounded to bf16 once per optimizer step, with the same bits as once per micro step."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import experiment_dict, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_jsonl
from inheritune.files.markers import hash_file
from inheritune.files.rundir import RunDir, get_data_dir

WORKER = Path(__file__).parents[1] / "support" / "cast_worker.py"
STEPS, MICRO_STEPS = 4, 4


def read_record(run: RunDir) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock and the memory."""
    kept = ("step", "loss", "val_loss", "grad_norm", "lr", "tokens")
    return [{key: row[key] for key in kept if key in row} for row in read_jsonl(run.metrics)]


def test_the_micro_steps_of_a_step_share_the_rounded_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path))
    runs = {}
    for stage in (0, 1, 2, 3):
        checkpointing = stage == 2  # recomputed blocks use them too
        settings = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_optimization": {"stage": stage},
            "inheritune": {"activation_checkpointing": checkpointing},
        }
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(settings))
        for how in ("kept", "anew"):
            train = {"deepspeed": str(tmp_path / f"zero{stage}.json"), "precision": "bf16_autocast"}
            runs[f"zero{stage}_{how}"] = {"init": "random", "train": train}
    raw = experiment_dict(runs=runs, paper=[])
    raw["train"] |= {"steps": STEPS, "batch_tokens": 3 * MICRO_STEPS * raw["data"]["sequence_length"]}
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    done = subprocess.run([sys.executable, WORKER, path, *runs], capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    folders = {name: RunDir.of(experiment, name) for name in runs}
    for stage in (0, 1, 2, 3):
        kept, anew = folders[f"zero{stage}_kept"], folders[f"zero{stage}_anew"]
        assert len(read_record(kept)) >= STEPS and read_record(kept) == read_record(anew), stage
        files = [next(run.final.glob("*.safetensors")) for run in (kept, anew)]
        assert hash_file(files[0]) == hash_file(files[1]), stage
    for stage in (0, 1):
        assert counts[f"zero{stage}_anew"] == MICRO_STEPS * counts[f"zero{stage}_kept"] > 0
    assert counts["zero2_anew"] > MICRO_STEPS * counts["zero2_kept"] > 0
    assert counts["zero3_anew"] == counts["zero3_kept"]
