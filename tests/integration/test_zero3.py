"""ZeRO 3 with a model larger than what it fetches ahead and keeps gathered, as every real one is: weights
are fetched while others compute, and some are still in flight when a forward ends."""

import pytest
import torch
from conftest import run_verb, write_lone_run

from inheritune.config.experiment import load_experiment
from inheritune.files.rundir import RunDir
from inheritune.models.sources import open_source

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
    folder.mkdir()
    settings = {"train_micro_batch_size_per_gpu": 5, "zero_optimization": ZERO[stage]}
    path = write_lone_run(folder, settings, run={"keep_at": [3]})
    run_verb("train", path, "--run", "reference", "--procs", ranks)
    return RunDir.of(load_experiment(path), "reference")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_exported_while_others_are_fetched(tmp_path, monkeypatch, ranks):
    """Kept weights and final/, each written after a validation: the same as at ZeRO 1."""
    folders = {}
    for stage in (3, 1):
        monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / f"root{stage}"))
        run = train(tmp_path / f"zero{stage}", stage, ranks)
        assert run.is_done()
        folders[stage] = (run.kept(3), run.final)
    for sharded, whole in zip(folders[3], folders[1], strict=True):
        its, others = open_source(str(sharded)), open_source(str(whole))
        assert its.names() == others.names() and len(its.names()) > 20
        for name in its.names():
            torch.testing.assert_close(its.tensor(name), others.tensor(name), rtol=0, atol=1e-5, msg=name)
