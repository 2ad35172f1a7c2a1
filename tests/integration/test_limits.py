"""Limits of the machine, met by the real verbs: memory, open files and disk used up, a folder that cannot be
written, W&B away. Each is one sentence with exit code 2 that leaves nothing half done, or does not stop the
run at all."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, experiment_dict, one_sentence, run_verb, write_experiment
from drill import write_documents
from test_stop import make

from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Model
from inheritune.engines.failures import explain_write_error
from inheritune.errors import UserError
from inheritune.files.json_files import read_jsonl
from inheritune.files.lock import Lock
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.files.writing import remove_path, write_text
from inheritune.models.networks import build_config
from inheritune.models.surgery import write_random
from inheritune.runtime.limits import explain_limit
from inheritune.training.mirror import start_wandb
from inheritune.training.record import Metrics

pytestmark = pytest.mark.slow


def limited(megabytes: int, *words) -> str:
    """A verb that has this much memory beside its libraries, and not enough.  -> its one sentence"""
    command = [sys.executable, "tests/support/limited_worker.py", str(megabytes), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    return one_sentence(done)


# --- memory and open files ----------------------------------------------------------------------------------


def test_prepare_out_of_memory_is_one_sentence_and_goes_on_with_more(tmp_path):
    words = random.Random(0).choices(["alpha", "beta", "(x)", " = ", "\n"], k=4_000_000)
    # the last one has 15 MB
    texts = [" ".join(words[n : n + 500]) for n in range(0, 20_000, 500)] + [" ".join(words)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raw = experiment_dict()
    raw["data"] |= {"source": "files", "files": [str(tmp_path / "docs.jsonl")], "tokenizer": "bpe:300"}
    path = write_experiment(tmp_path, raw)
    folder = get_data_dir(load_experiment(path))
    assert "out of memory" in limited(20, "prepare", path, "--workers", 1)
    assert not (folder / "manifest.json").exists() and not list(folder.glob(".*"))
    run_verb("prepare", path, "--workers", 1)
    assert json.loads((folder / "manifest.json").read_text())["splits"]["train"]["tokens"] > 1e6


def test_inherit_out_of_memory_is_one_sentence_and_leaves_nothing(tmp_path):
    sizes = {"layers": 2, "width": 1024, "heads": 2, "positions": 32, "vocab_size": 20_000}
    # its embedding has 80 MB
    write_random(build_config(Model(size="gpt2_tiny", **sizes), 2), tmp_path / "source")
    words = ("inherit", "--source", tmp_path / "source", "--layers", "0:1", "--out", tmp_path / "out")
    for megabytes in (1, 10):
        assert "out of memory" in limited(megabytes, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    run_verb(*words)
    assert (tmp_path / "out" / "inherited.json").is_file()


def few_files(most: int, *words) -> subprocess.CompletedProcess:
    """A verb that may open `most` files at a time."""
    return subprocess.run(
        [sys.executable, "-m", "inheritune", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
    )


def test_64_open_files_are_enough_for_a_run_of_many_shards(tmp_path, monkeypatch):
    path, root, run = make(tmp_path, steps=3)
    monkeypatch.setenv("INHERITUNE_ROOT", str(root))
    folder = get_data_dir(load_experiment(path))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"] *= 50
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = few_files(64, "train", path, "--run", "reference")
    assert done.returncode == 0 and run.is_done(), done.stdout + done.stderr
    assert (
        few_files(
            64, "inherit", "--source", run.final, "--layers", "0:1", "--out", tmp_path / "out"
        ).returncode
        == 0
    )


# --- a folder that cannot be written ------------------------------------------------------------------------


def test_a_read_only_run_folder_is_one_sentence_naming_it(tmp_path):
    path, root, run = make(tmp_path, steps=3)
    runs = root / "runs"
    runs.mkdir()
    runs.chmod(0o555)
    mounted = False
    if os.geteuid() == 0:  # whom modes do not stop
        bind = ["mount", "--bind", str(runs), str(runs)]
        mounted = subprocess.run(bind, capture_output=True, check=False).returncode == 0
        if not mounted:
            pytest.skip("as root a folder is only read-only on a mount that is")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(runs)], check=True)
    try:
        said = one_sentence(run_verb("train", path, "--run", "reference", check=False, INHERITUNE_ROOT=root))
    finally:
        if mounted:
            subprocess.run(["umount", str(runs)], check=True)
    assert f"cannot write {runs}" in said and "INHERITUNE_ROOT" in said and not list(runs.iterdir())


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.mark.drill
def test_a_disk_that_fills_up_at_any_moment_of_any_verb(tmp_path, monkeypatch, disk):
    """Each verb of a chain meets a disk with room for a share of what it writes, then one with room for
    all."""
    disk.resize(1 << 30)
    roomy = tmp_path / "roomy"
    raw = experiment_dict()
    raw["data"] |= {
        "source": "files",
        "files": [str(tmp_path / "docs.jsonl")],
        "tokenizer": "bpe:512",
        "shard_tokens": 400_000,
    }
    raw["model"] |= {"vocab_size": 512}
    raw["train"] |= {"steps": 4, "eval_every": 2, "checkpoint_every": 2, "log_every": 1}
    raw["paper"], raw["runs"] = raw["paper"][:1], {"reference": {"init": "random"}}
    write_documents(tmp_path / "docs.jsonl")
    path = write_experiment(tmp_path, raw)

    def chain(root: Path) -> list[tuple]:
        monkeypatch.setenv("INHERITUNE_ROOT", str(root))
        run = RunDir.of(load_experiment(path), "reference")
        analyze = ("analyze", "--model", run.final, "--data", path, "--length", 16, "--sequences", 4)
        return [
            ("prepare", path, "--workers", 1),
            ("train", path, "--run", "reference"),
            analyze,
            ("inherit", "--source", run.final, "--layers", "0:1", "--out", root / "cut"),
            ("export", run.path, "--to", root / "out"),
            ("table", path),
        ]

    def left(root: Path) -> dict:
        return {
            name: facts
            for name, facts in hash_folder(root).items()
            if name.endswith((".safetensors", ".bin", ".png"))
        }

    for words in chain(disk.path):
        before = disk.used()
        shutil.copytree(disk.path, tmp_path / "saved")
        run_verb(*words)
        needs = disk.used() - before
        for entry in disk.path.iterdir():
            remove_path(entry)
        shutil.copytree(tmp_path / "saved", disk.path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "saved")
        for share in (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            disk.resize(before + int(needs * share))
            done = run_verb(*words, check=False)
            if done.returncode:
                assert "MB free" in one_sentence(done)
            else:
                assert share > 0, f"{words}: nothing is written?"
            assert not list(disk.path.rglob(".*")), f"{words}, {share}"
            disk.resize(1 << 30)
        run_verb(*words)
    monkeypatch.undo()
    for words in chain(roomy):
        run_verb(*words)
    assert left(disk.path) == left(roomy) and len(left(disk.path)) > 5


def test_no_lock_is_left_where_it_could_not_be_written(tmp_path, monkeypatch):
    def fill(self, text, **_):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(UserError, match="no space left while writing .*MB free"):
        Lock(tmp_path / "run", wait=0).acquire()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EDQUOT, "Disk quota exceeded"), Exception("No space left on device (os error 28)")],
)
def test_a_full_disk_is_told_whoever_says_so(error):
    assert "no space left while writing" in str(explain_limit(error))


@pytest.mark.parametrize(
    "error", [OSError(errno.EFBIG, "File too large"), Exception("File too large (os error 27)")]
)
def test_a_limit_of_file_sizes_is_told_whoever_says_so(error):
    assert "is larger than a file may be here (File too large); raise the limit" in str(explain_limit(error))


def test_what_is_written_below_a_limit_of_file_sizes_is_one_sentence(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    torchs = RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match="out is larger than a file may be here"):
            write_text(tmp_path / "out", "x" * 2000)
        said = str(explain_write_error(torchs, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "out is larger than a file may be here" in said and not list(tmp_path.iterdir())


# --- W&B ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_where_wandb_cannot_be_reached(tmp_path):
    path, root, run = make(tmp_path, steps=3, wandb="online")
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": 8}
    said = run_verb("train", path, "--run", "reference", INHERITUNE_ROOT=root, **away).stdout
    assert run.is_done() and "W&B could not start" in said and "0000" not in said


def lose_wandb(folder: str) -> None:
    """Log on while W&B's own process is killed; in a process of its own, since wandb keeps to the dead
    one."""
    run = RunDir(Path(folder))
    mirror = start_wandb(run, load_experiment("quickstart"), "reference", "offline", "ours")
    metrics = Metrics(run, -1, mirror=mirror)
    metrics.add({"step": 1, "loss": 5.0})
    children = subprocess.run(
        ["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=True
    ).stdout.split()
    (own,) = [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(own), signal.SIGKILL)
    for step in range(2, 50):
        metrics.add({"step": step, "loss": 5.0})
    metrics.close()
    print("all is logged", flush=True)
    os._exit(0)  # what W&B says at its own exit is its own affair


def test_a_run_goes_on_when_wandbs_own_process_dies(tmp_path):
    code = (
        "import sys, logging, test_limits; logging.basicConfig(stream=sys.stdout); from "
        "inheritune.runtime.log import logger; "
    )
    code += "logger.propagate = True; test_limits.lose_wandb(sys.argv[1])"
    environment = {
        **os.environ,
        "WANDB_DIR": str(tmp_path),
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{Path(__file__).parent}:{REPOSITORY / 'tests' / 'drills'}",
    }
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "all is logged" in done.stdout, done.stdout + done.stderr
    assert [row["step"] for row in read_jsonl(RunDir(tmp_path).metrics)] == list(range(1, 50))
    assert "W&B failed" in done.stdout and "metrics.jsonl is the record" in done.stdout
