"""verify: every marker, every kind of damage, and nothing else called damaged."""

import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, write_tokens
from open_files import open_files_limited
from test_damage import modes_count

from inheritune.cluster.verify import verify
from inheritune.engines.checkpoint import _find_newest
from inheritune.errors import NoAccess, UserError
from inheritune.files import writing
from inheritune.files.json_files import write_json, write_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir
from inheritune.files.writing import replace_atomically, sync_path
from inheritune.runtime.limits import explain_limit
from inheritune.runtime.log import logger
from inheritune.training.record import Metrics


@pytest.fixture
def tree(tmp_path):
    """A finished run with a checkpoint, an inherited start and data, all whole."""
    run = RunDir(tmp_path / "runs" / "small" / "seed0" / "reference")
    for folder in (run.final, run.init, run.checkpoint(4) / "deepspeed"):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(range(200)))
    write_json(run.init / "inherited.json", {"files": hash_folder(run.init)})
    write_json(run.checkpoint(4) / "COMPLETE", {"files": hash_folder(run.checkpoint(4))})
    write_json(run.done, {"final": hash_folder(run.final)})
    write_json(tmp_path / "runs" / "small" / "seed0" / "grown" / "DONE", {"stage": 1})
    (run.checkpoint(8)).mkdir()
    write_tokens(tmp_path / "data" / "tiny")
    return tmp_path


def test_whole_tree_is_whole(tree, capsys):
    verify(tree)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("whole: ") for line in lines) == 5 and len(lines) == 6
    assert [
        line for line in lines if line.startswith("unfinished: ") and "step_00000008 has no COMPLETE" in line
    ]
    assert not list(tree.rglob(".*"))


FILES = {
    "final": "runs/small/seed0/reference/final/weights",
    "init": "runs/small/seed0/reference/init/weights",
    "checkpoint": "runs/small/seed0/reference/checkpoints/step_00000004/deepspeed/weights",
    "data": "data/tiny/train_00001.bin",
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut off or replaced"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "one bit": (flip, "does not have the content"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (folder_in_its_place, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_each_damage_is_named(tree, capsys, file, damage):
    harm, sentence = DAMAGES[damage]
    harm(tree / FILES[file])
    with pytest.raises(UserError, match="^1 files of"):
        verify(tree)
    out = capsys.readouterr().out
    assert out.count("DAMAGED") == 1 and sentence in out and str(tree / FILES[file]) in out


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"splits": 3}'])
def test_damaged_marker_is_named(tree, capsys, content):
    marker = tree / "data" / "tiny" / "manifest.json"
    marker.write_text(content)
    with pytest.raises(UserError, match="1 files"):
        verify(tree)
    assert f"DAMAGED: {marker}" in capsys.readouterr().out


def test_what_no_run_reads_is_named(tree, capsys):
    checkpoints = tree / "runs" / "small" / "seed0" / "reference" / "checkpoints"
    write_json(checkpoints / "step_00000004" / "COMPLETE", {"step": 4, "files": {}})
    shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000005")
    shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000004.bak")
    for name in ("step_00000006", ".DS_Store"):
        (checkpoints / name).write_text("a file")
    verify(tree)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("whole: ")]
    assert lines == [
        f"not read by any run: {checkpoints}/step_00000004.bak has no name of a checkpoint",
        f"not read by any run: {checkpoints}/step_00000005 is a copy of the checkpoint of step 4",
        f"not read by any run: {checkpoints}/step_00000006 has no name of a checkpoint",
        f"unfinished: {checkpoints}/step_00000008 has no COMPLETE, so no run reads it",
    ]


def test_linked_folders_are_verified_too_and_once(tree, capsys):
    """Runs and data often lie on another disk; a link loop ends."""
    shutil.move(tree / "runs" / "small", tree / "elsewhere")
    (tree / "runs" / "small").symlink_to(tree / "elsewhere")
    (tree / "elsewhere" / "loop").symlink_to(tree)
    flip(tree / "elsewhere" / "seed0" / "reference" / "final" / "weights")
    with pytest.raises(UserError, match="^1 files of"):
        verify(tree / "runs")
    assert capsys.readouterr().out.count("DAMAGED") == 1


def test_a_folder_that_cannot_be_read_is_not_passed_over(tree, capsys):
    folder = tree / "runs" / "small" / "seed0" / "reference" / "checkpoints" / "step_00000004"
    folder.chmod(0)
    with modes_count(), pytest.raises(UserError, match="1 cannot be read .*they may be sound"):
        verify(tree)
    folder.chmod(0o755)
    assert f"NOT READ: {folder} cannot be read (Permission denied)" in capsys.readouterr().out


@pytest.mark.parametrize("file", [*FILES, "marker"])
def test_another_users_sound_files_are_not_called_damaged(tree, capsys, file):
    """Its remedy for damage is to delete them."""
    path = tree / FILES.get(file, "data/tiny/manifest.json")
    path.chmod(0)
    with modes_count(), pytest.raises(UserError, match="1 cannot be read .*they may be sound$") as told:
        verify(tree)
    out = capsys.readouterr().out
    assert "DAMAGED" not in out and "delete" not in str(told.value) and out.count("NOT READ") == 1
    assert f"{path} cannot be read (Permission denied): see its owner and mode" in out
    with modes_count(), pytest.raises(UserError, match="restore them.* 1 cannot be read"):
        flip(tree / FILES["init" if file != "init" else "final"])
        verify(tree)


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over_for_an_older_one(tree):
    run = RunDir(tree / "runs" / "small" / "seed0" / "reference")
    shutil.copytree(run.checkpoint(4), run.checkpoint(6))
    for hidden in (run.checkpoint(6) / "COMPLETE", run.checkpoint(6) / "deepspeed" / "weights"):
        hidden.chmod(0)
        with modes_count(), pytest.raises(NoAccess, match=f"{hidden} cannot be read .Permission denied"):
            _find_newest(run)
        hidden.chmod(0o644)


@pytest.mark.parametrize("more", range(3))
def test_a_limit_of_open_files_is_no_damage(tree, capsys, more):
    """Else a start would take an older checkpoint, and the work since would be lost."""
    run = RunDir(tree / "runs" / "small" / "seed0" / "reference")
    shutil.copytree(run.checkpoint(4), run.checkpoint(6))
    for read in (lambda: _find_newest(run), lambda: verify(tree)):
        try:
            with open_files_limited(more):
                assert read() in (None, 6)
        except OSError as error:
            assert "ulimit -n" in str(explain_limit(error))
        assert "DAMAGED" not in capsys.readouterr().out
    assert _find_newest(run) == 6


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_damaged(tree, capsys):
    checkpoint = tree / "runs" / "small" / "seed0" / "reference" / "checkpoints" / "step_00000004"

    def deleting(markers):
        for marker in markers:
            if marker.parent == checkpoint:
                shutil.rmtree(checkpoint)
            yield marker

    verify(tree, deleting)
    assert f"deleted meanwhile: {checkpoint}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("results.json", "results.json is not as it was written"),
        ("attention.jsonl", "attention.jsonl is not as it was written"),
        ("provenance.json", "provenance.json is not as it was written"),
        ("metrics.jsonl", "metrics.jsonl"),
    ],
)
def test_a_changed_digit_in_a_record_is_named(tree, capsys, file, says):
    """verify once looked at the markers alone, and called such a folder whole."""
    run = RunDir(tree / "runs/small/seed0/reference")
    run.metrics.write_text('{"step": 1, "loss": 2.5}\n')
    write_json(run.results, {"loss": 2.5, "record": hash_folder(run.path, only=["metrics.jsonl"])})
    write_json(run.provenance, {"loss": 2.5})
    write_jsonl(run.attention, [{"kind": "header", "loss": 2.5}, {"kind": "layer"}])
    verify(tree)
    path = run.path / file
    path.write_text(path.read_text().replace("2.5", "2.6"))
    capsys.readouterr()
    with pytest.raises(UserError, match="1 files of .* are damaged"):
        verify(tree)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED"))
    assert says in line


def test_nothing_to_verify_is_told(tree):
    shutil.rmtree(tree / "runs" / "small" / "seed0" / "reference" / "init")
    with pytest.raises(UserError, match="nothing to verify in .*final"):
        verify(tree / "runs" / "small" / "seed0" / "reference" / "final")


def test_what_a_killed_process_left_is_removed_by_the_next_attempt(tmp_path):
    code = "import os, sys, pathlib, inheritune.files.writing as r\n"
    code += "with r.replace_atomically(pathlib.Path(sys.argv[1])) as t: t.mkdir(), os._exit(9)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=REPOSITORY, check=False)
    ours = tmp_path / f".out.tmp{socket.gethostname()}-{os.getppid()}"  # of a process that lives
    ours.mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    with replace_atomically(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert sorted(tmp_path.iterdir()) == [ours, tmp_path / "out"]


def test_a_folder_and_all_its_files_are_on_disk_before_its_name(tmp_path, monkeypatch):
    """A power cut after the rename must not leave the name with empty files behind it: all are synced
    first."""
    synced, sync = [], os.fsync

    def noting(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "made").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    with replace_atomically(tmp_path / "made") as folder:
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "vocab.json").write_text("{}")
        (folder / "config.json").write_text("{}")
        names = [folder, folder / "config.json", folder / "tokenizer", folder / "tokenizer" / "vocab.json"]
    assert sorted(synced[:-1]) == sorted((str(name), False) for name in names) and synced[-1] == (
        str(tmp_path),
        True,
    )


@pytest.mark.parametrize("folder", ["/proc", "/sys", "/proc/self/fd"])
def test_a_folder_whose_file_system_cannot_sync_is_no_error(folder):
    """As some network and FUSE file systems: these of the kernel answer EINVAL to every fsync."""
    descriptor = os.open(folder, os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    sync_path(Path(folder))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS])
def test_files_are_written_where_folders_cannot_be_synced(tmp_path, monkeypatch, caplog, code):
    """The kernel's boundary is replaced: no file system here takes files and refuses to sync its folders."""
    sync = os.fsync

    def refusing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("DEBUG", logger.name)
    writing._log_unsynced.cache_clear()
    for name in ("a", "b"):
        with replace_atomically(tmp_path / name) as folder:
            folder.mkdir()
            (folder / "config.json").write_text(name)
    assert (tmp_path / "b" / "config.json").read_text() == "b"
    told = [(record.levelname, record.message) for record in caplog.records]
    sentence = (
        f"a file or folder cannot be synced ({os.strerror(code)}): a power cut may lose what was written last"
    )
    assert told == [("DEBUG", sentence)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_failing_disk_is_told_by_the_sync_too(tmp_path, monkeypatch, code):
    def failing(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises((UserError, OSError), match="no space left while writing|Input/output error"):
        write_json(tmp_path / "a.json", {})
    with pytest.raises(OSError, match=os.strerror(code)):
        metrics = Metrics.__new__(Metrics)
        metrics._file = open(tmp_path / "metrics.jsonl", "w")  # noqa: SIM115
        metrics.sync()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_was_written_but_cannot_be_read_is_no_error(tmp_path):
    """Under a umask that keeps a file's own owner from reading it, and with links that lead nowhere."""
    with modes_count(), replace_atomically(tmp_path / "made") as folder:
        folder.mkdir()
        (folder / "dangling").symlink_to("/nowhere")
        (folder / "written").write_text("x")
        (folder / "written").chmod(0o200)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["dangling", "written"]
