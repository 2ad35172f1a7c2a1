"""Names that are not ours in our folders: copies that people make, what systems and sync programs leave. No
run stops for them, none is taken for ours, none is changed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import experiment_dict, run_verb, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.engines import checkpoint, resize
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.sources import open_source
from inheritune.runtime.log import logger
from inheritune.training.mirror import sync

FOLDERS = (
    "step_4",
    "step_00000004.bak",
    "step_00000004 (copy)",
    "step_00000004 (conflicted copy 2026-01-02)",
    "step_000000004",
)
FOLDERS += (
    "Step_00000004",
    "step_00000004~",
    ".step_00000004.Xa1b2c",
    ".nfs0000",
    "step_٠٠٠٠٠٠٠٤",
    "step_-0000001",
    "notes",
)
FILES = (
    ".DS_Store",
    "._step_00000004",
    "step_00000100",
    ".nfs000000000123",
    ".notes.tmp",
    "step_00000002.tar",
)


def litter(folder: Path) -> None:
    """All that must not be taken for a checkpoint, a marker of each kind within."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "kept").write_text("a person's")
        for marker in ("COMPLETE", "DONE"):
            (folder / name / marker).write_text("{}")
    for name in FILES:
        (folder / name).write_text("a person's")


def litter_run(run: RunDir) -> list[Path]:
    """Foreign names in every folder of a run.  -> these folders"""
    litter(run.checkpoints)
    for folder in (run.path, run.validation):
        folder.mkdir(exist_ok=True)
        for name in ("stage01", "stage1.bak", "stage", "at_4", "at_00000004.bak", ".ipynb_checkpoints"):
            (folder / name).mkdir()
            (folder / name / "kept").write_text("a person's")
        for name in (".DS_Store", "._DONE", "DONE~", "step_3.npy.bak", ".metrics.jsonl.swp", ".run.tmp1"):
            (folder / name).write_text("a person's")
    return [run.checkpoints, run.path, run.validation]


def foreign(folders: list[Path]) -> dict:
    """The content of all foreign files."""
    found = {}
    for folder in folders:
        names = [
            *FOLDERS,
            *FILES,
            "stage01",
            "stage1.bak",
            "stage",
            "at_4",
            "at_00000004.bak",
            ".ipynb_checkpoints",
        ]
        names += ["._DONE", "DONE~", "step_3.npy.bak", ".metrics.jsonl.swp", ".run.tmp1"]
        for path in (folder / name for name in names):
            if path.is_dir():
                found |= {str(path / name): facts for name, facts in hash_folder(path).items()}
            elif path.exists():
                found[str(path)] = path.read_bytes()
    return found


def unfinish(run: RunDir) -> None:
    """As if the run had been killed after its last checkpoint."""
    for path in (run.done, run.results):
        path.unlink()
    shutil.rmtree(run.final)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(experiment's path, root) of a run, with weights kept on the way, that was trained among foreign
    names."""
    folder = tmp_path_factory.mktemp("foreign")
    raw = experiment_dict(runs={"reference": {"init": "random", "keep_at": [3]}}, paper=[])
    path = write_experiment(folder, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder / "root"))
        data = get_data_dir(load_experiment(path))
        write_tokens(data)
        run = RunDir.of(load_experiment(path), "reference")
        run.path.mkdir(parents=True)
        run.kept(3).mkdir()  # somebody's empty folder is not what was kept
        for name in (".ipynb_checkpoints", "old"):
            (data / "tokenizer" / name).mkdir()
        (data / "tokenizer" / ".DS_Store").write_text("x")
        before = foreign(litter_run(run))
        said = run_verb("train", path, "--run", "reference")
        assert run.is_done() and foreign([run.checkpoints, run.path, run.validation]) == before, said.stdout
        assert len(before) == len(FOLDERS) + len(FILES) + 2 * (6 + 6)
    return path, folder / "root"


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> RunDir:
    """A copy of that run."""
    path, root = trained
    shutil.copytree(root, tmp_path / "root", dirs_exist_ok=True)
    return RunDir.of(load_experiment(path), "reference")


def test_a_run_among_foreign_names_is_trained_and_resumed(trained, run):
    assert run.complete_checkpoints() == [2, 4] and (run.kept(3) / "COMPLETE").is_file()
    assert not {".DS_Store", "old", ".ipynb_checkpoints"} & {path.name for path in run.final.iterdir()}
    folders, weights = [run.checkpoints, run.path, run.validation], hash_folder(run.final)
    unfinish(run)
    before = foreign(folders)
    said = run_verb("train", trained[0], "--run", "reference").stdout
    assert "resumed at step 4 of 6" in said and "passed over" not in said
    assert hash_folder(run.final) == weights and foreign(folders) == before


def test_a_checkpoint_under_a_wrong_name_is_not_resumed(trained, run):
    unfinish(run)
    shutil.copytree(run.checkpoint(4), run.checkpoint(5))
    shutil.copytree(run.checkpoint(4), run.checkpoint(3))
    assert run.complete_checkpoints() == [2, 4]
    said = run_verb("train", trained[0], "--run", "reference").stdout
    assert f"{run.checkpoint(5)} is a copy of the checkpoint of step 4 under a wrong name" in said
    assert "resumed at step 4 of 6" in said and run.checkpoint(5).is_dir() and run.checkpoint(3).is_dir()
    assert run.is_done() and run.complete_checkpoints() == [2, 4]


def test_a_run_whose_only_checkpoints_have_wrong_names_does_not_start_over(run, capsys):
    unfinish(run)
    shutil.rmtree(run.checkpoint(2))
    run.checkpoint(4).rename(run.checkpoint(5))
    with pytest.raises(
        UserError,
        match="is a copy of the checkpoint of step 4 under a wrong name; rename or delete it; no other",
    ):
        checkpoint.find_newest_checkpoint(run)
    run.checkpoint(5).rename(run.checkpoint(4))  # as it says
    assert checkpoint.find_newest_checkpoint(run) == 4


def test_what_was_put_into_a_checkpoint_is_not_read(run, tmp_path):
    folder = run.checkpoint(4)
    expected = {
        name: open_source(folder).tensor(name)
        for name in ("transformer.wte.weight", "transformer.h.0.ln_1.weight")
    }
    shutil.copytree(folder / "deepspeed", folder / "deepspeed.bak")
    for file in list((folder / "deepspeed").iterdir()):
        (folder / "deepspeed" / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    assert all(open_source(folder).tensor(name).equal(tensor) for name, tensor in expected.items())
    assert resize.read_client_state(folder)["run"]["step"] == 4
    run_verb("inherit", "--source", folder, "--layers", "0:2", "--out", tmp_path / "cut")


def test_stages_are_counted_by_exact_names(tmp_path):
    run = RunDir(tmp_path)
    for name in (
        "stage2",
        "stage10",
        "stage1",
        "stage01",
        "stage1.bak",
        "stage",
        "stage0",
        "stage-1",
        "stage１",
        "stage3 (copy)",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "stage4").write_text("a file")
    assert run.stages() == [1, 2, 10] and RunDir(tmp_path / "none").stages() == []
    with pytest.raises(
        UserError, match=r"is a grown run, whose stages are runs of their own \(stage1, stage2, stage10\)"
    ):
        sync(str(tmp_path))


# --- what cannot be deleted ---------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path):
    """Make a folder that not even root can delete, as one on NFS with a file that somebody reads: a file
    system is mounted in it."""
    mounted = []

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        if (
            os.geteuid()
            or subprocess.run(
                ["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False
            ).returncode
        ):
            pytest.skip("a folder that cannot be deleted needs root and the right to mount")
        mounted.append(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def make_checkpoint(run: RunDir, step: int) -> None:
    run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(step) / "weights").write_text(str(step))
    write_json(run.checkpoint(step) / "COMPLETE", {"step": step, "files": hash_folder(run.checkpoint(step))})


def test_what_cannot_be_deleted_is_told_and_stops_nothing(tmp_path, busy, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    run = RunDir(tmp_path / "run")
    for step in (2, 4, 6):
        make_checkpoint(run, step)
    busy(run.checkpoint(2) / "open")
    (run.checkpoints / ".step_00000001.tmpnode1-0123abcd-7").mkdir()
    busy(run.checkpoints / ".step_00000001.tmpnode1-0123abcd-7" / "open")
    for _ in range(2):
        checkpoint.prune_checkpoints(run, 6, 1)
        checkpoint.prepare_folders(run.checkpoints / "new", run.checkpoint(8))
        (run.checkpoints / "new").rmdir()
    assert run.complete_checkpoints() == [6] and not run.checkpoint(4).exists() and run.checkpoint(2).is_dir()
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and all(
        "is not needed any more and cannot be deleted (" in line for line in told
    ), told


def test_what_a_killed_deletion_left_is_deleted_later(tmp_path):
    """A checkpoint loses its marker first, so that what is half deleted is none; the next one takes the rest
    away."""
    run = RunDir(tmp_path)
    for step in (2, 4, 6):
        make_checkpoint(run, step)
    (run.checkpoint(2) / "COMPLETE").unlink()
    checkpoint.prune_checkpoints(run, 6, 2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000004", "step_00000006"]


def test_a_marker_is_the_first_to_go(tmp_path, busy):
    run = RunDir(tmp_path / "run")
    for step in (2, 4):
        make_checkpoint(run, step)
    busy(run.checkpoint(2) / "0")  # what comes before COMPLETE in the alphabet
    checkpoint.prune_checkpoints(run, 4, 1)
    assert run.checkpoint(2).is_dir() and run.complete_checkpoints() == [4]
    assert read_json(run.checkpoint(4) / "COMPLETE")["step"] == 4
