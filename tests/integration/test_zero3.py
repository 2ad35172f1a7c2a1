"""ZeRO 3 with a model larger than what it fetches ahead and keeps gathered, as every real one is: weights
are fetched while others compute, and some are still in flight when a forward ends."""

import json

import pytest
import torch
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from safetensors.torch import load_file

from inheritune.config.experiment import load_experiment
from inheritune.files.rundir import RunDir, get_data_dir

KEPT = 40_000
"""Elements; the model has 60,416, of them 12,288 in each of its four blocks."""
ZERO = {
    1: {"stage": 1},
    3: {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": KEPT // 3,
        "stage3_max_live_parameters": KEPT,
        "stage3_max_reuse_distance": KEPT,
        "reduce_bucket_size": KEPT,
    },
}


def train(folder, stage: int, ranks: int) -> RunDir:
    """A run of six steps, whose weights are kept after the third, at this ZeRO stage."""
    settings = {"train_micro_batch_size_per_gpu": 5, "zero_optimization": ZERO[stage]}
    folder.mkdir()
    (folder / "ds.json").write_text(json.dumps(settings))
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random", "keep_at": [3]}})
    raw["train"] |= {"deepspeed": str(folder / "ds.json")}
    path = write_experiment(folder, raw, f"stage{stage}")
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment)) if not get_data_dir(experiment).exists() else None
    run_verb("train", path, "--run", "reference", "--procs", ranks)
    return RunDir.of(experiment, "reference")


def read(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_exported_while_others_are_fetched(tmp_path, own_root, ranks):
    """Kept weights and final/, each written after a validation: the same as at ZeRO 1."""
    sharded, whole = (train(tmp_path / f"zero{stage}", stage, ranks) for stage in (3, 1))
    assert sharded.is_done()
    for folder in ("kept", "final"):
        one, other = (read(run.kept(3) if folder == "kept" else run.final) for run in (sharded, whole))
        assert one.keys() == other.keys() and len(one) > 20
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5, msg=name)
