"""Snapshots: the code and the user's files that a job runs with, as they were when it was submitted."""

from pathlib import Path

import pytest
from conftest import REPOSITORY, experiment_dict, write_experiment

from inheritune.config import paths
from inheritune.config.experiment import load_experiment
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.errors import UserError
from inheritune.submit.request import read_request
from inheritune.submit.snapshot import list_code, list_own_files, make_snapshot
from inheritune.submit.snapshot_uses import _remove, drop_use, mark_use


def test_a_snapshot_is_the_code_as_it_was(own_root):
    names = {str(path) for path in list_code()}
    assert {
        "slurm/job.sh",
        "slurm/jobs.yaml",
        "inheritune/cli/program.py",
        "recipes/quickstart.yaml",
    } <= names
    code = make_snapshot()
    assert code == make_snapshot() and code.is_relative_to(Path(own_root))  # equal code, one copy
    job = Path("slurm/job.sh")
    assert (code / job).read_bytes() == (REPOSITORY / job).read_bytes() and (
        code / "COMMIT"
    ).read_text().strip()


def test_a_snapshot_has_the_users_own_files(tmp_path, own_root, monkeypatch):
    """An experiment and a DeepSpeed JSON from outside the repository: an edit does not reach a queued job."""
    monkeypatch.chdir(tmp_path)
    raw = experiment_dict()
    raw["train"]["deepspeed"] = "mine.json"
    path = write_experiment(tmp_path, raw)
    (tmp_path / "mine.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    (tmp_path / "other.json").write_text("{}")
    request, loaded = read_request("train", ["small.yaml", "reference"]), load_experiment("small.yaml")
    own = list_own_files(request, loaded)
    assert own == [tmp_path / "mine.json", Path(path)]
    assert list_own_files(read_request("prepare", ["small.yaml"]), loaded) == [Path(path)]
    given = read_request("train", ["small.yaml", "reference", "--ds", "other.json"])
    assert list_own_files(given, loaded) == [tmp_path / "other.json", Path(path)]
    for other in (["quickstart", "reference"], [f"{REPOSITORY}/recipes/quickstart.yaml", "reference"]):
        assert not list_own_files(read_request("train", other), load_experiment("quickstart"))
    code = make_snapshot(own)
    raw["train"]["steps"] += 1
    write_experiment(tmp_path, raw)
    (tmp_path / "mine.json").write_text('{"train_micro_batch_size_per_gpu": 8}')
    assert make_snapshot(own) != code
    # as in a job: the code that runs is that of the snapshot
    monkeypatch.setattr(paths, "REPOSITORY", code)
    monkeypatch.setenv("INHERITUNE_REPOSITORY", str(REPOSITORY))
    for name in ("small.yaml", path):
        assert load_experiment(name).train.steps == loaded.train.steps
    assert load_deepspeed_json("mine.json") == {"train_micro_batch_size_per_gpu": 4}
    assert paths.resolve_path(str(tmp_path)) == tmp_path  # a folder of which the snapshot has some files
    assert paths.resolve_path(f"{REPOSITORY}/ds_configs/cpu.json") == code / "ds_configs" / "cpu.json"
    assert paths.resolve_path("ds_configs/cpu.json") == code / "ds_configs" / "cpu.json"


def test_a_snapshot_that_gets_another_user_stays(own_root):
    """Between a submission's look at the marks and its removal of a snapshot, another may choose it."""
    code = make_snapshot()
    mark_use(str(code), "7", "lab")
    (mark,) = code.parent.glob("*.used-*")
    assert make_snapshot() == code  # marks it
    assert not _remove(code, {mark.name}) and (code / "COMMIT").is_file() and mark.is_file()
    drop_use(code)
    assert _remove(code, {mark.name}) and not list(code.parent.iterdir())


def test_a_full_disk_leaves_nothing_of_a_snapshot(disk, monkeypatch):
    monkeypatch.setenv("INHERITUNE_ROOT", str(disk.path / "root"))
    disk.resize(200_000)
    with pytest.raises(UserError, match="^no space left while writing .*; free some, or ") as caught:
        make_snapshot()
    assert "\n" not in str(caught.value) and not list((disk.path / "root" / "runs" / "code").iterdir())
